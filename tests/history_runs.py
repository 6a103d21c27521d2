"""Run files and accuracy evidence for the tests of history. Nothing here was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from conformance import runfile
from conformance.gates.decision import Decision, Interval, Limits, Rate
from conformance.results import (
    AccuracyEvidence,
    Evidence,
    Footer,
    Header,
    PlannedCase,
    Result,
    Run,
    Verdict,
)
from conformance.scoring import OUTCOMES, Item, OutcomeClass, Sheet, SheetHeader
from conformance.targets.protocol import TargetInfo

SUITE, CASE = "accuracy/nano", "gsm8k-e"
INFO = TargetInfo(name="fake", version="1.0", capabilities=("generate",))


def header(run_id: str = "run-1", started: str = "2026-11-01T02:00:00+00:00", **changes: object) -> Header:
    base = Header(run_id=run_id, started=started, harness="0.1.0", commit="abc123", targets={"fake": INFO})
    return base.model_copy(update=changes)


def result(case: str = CASE, verdict: Verdict = "pass", **changes: object) -> Result:
    base = Result(
        suite=SUITE,
        case=case,
        target="fake",
        kind="accuracy",
        area="accuracy",
        verdict=verdict,
        digest="d1",
        repeat="conformance run …",
    )
    return base.model_copy(update=changes)


def planned(*results: Result, **changes: object) -> tuple[PlannedCase, ...]:
    shared = {"suite", "case", "target", "kind", "area", "digest"}
    return tuple(
        PlannedCase(**(r.model_dump(include=shared) | {"title": f"The {r.case}", "source": ()} | changes))
        for r in results
    )


def footer(duration: float = 60.0) -> Footer:
    return Footer(finished="2026-11-01T02:01:00Z", duration=duration, counts={}, exit_code=0)


def write(path: Path, *lines: Header | Result | Footer) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line.model_dump_json() + "\n" for line in lines), encoding="utf-8")
    return path


def run_of(path: Path, *lines: Header | Result | Footer) -> Run:
    return runfile.read(write(path, *lines))


# ------------------------------------------------------------------------------------------- accuracy


def item(number: int, outcome: OutcomeClass = "correct", **changes: object) -> Item:
    base = Item(
        doc_id=str(number),
        doc_hash=_sha(f"doc {number}"),
        prompt_hash=_sha(f"prompt {number}"),
        prompt=f"<|turn>user\nHow many pears are {number} and 1?<turn|>\n<|turn>model\n",
        answer="" if outcome == "empty" else f"<|channel>thought\nadd 1<channel|>The answer is {number + 1}.",
        extracted=str(number + 1) if outcome in ("correct", "wrong") else None,
        expected=str(number + 1),
        outcome=outcome,
        tokens=0 if outcome == "empty" else 12,
        finish_reason="length" if outcome == "truncated" else "stop",
    )
    return base.model_copy(update=changes)


def sheet(items: Sequence[Item], **changes: object) -> Sheet:
    head = SheetHeader(
        task="nano_gsm8k",
        task_version="1.0",
        filter="flexible-extract",
        metric="exact_match",
        checkpoint="nano-e",
        checkpoint_sha256="c" * 64,
        target="fake",
        engine_version="1.0",
        dtype="float32",
        effective={"attention": "eager"},
        template_sha256="e" * 64,
        thinking=True,
        shots=0,
        max_new_tokens=256,
        seed=1,
        order_seed=7,
        available=500,
        lm_eval="0.4.9",
        harness="0.1.0",
        created="2026-11-01T02:00:30+00:00",
    )
    return Sheet(header=head.model_copy(update=changes), items=tuple(items))


def items_of(counts: dict[OutcomeClass, int]) -> list[Item]:
    """Items of these outcomes, mixed and numbered."""
    outcomes = [outcome for outcome in OUTCOMES for _ in range(counts.get(outcome, 0))]
    order = sorted(range(len(outcomes)), key=lambda n: _sha(str(n)))
    return [item(number, outcomes[n]) for number, n in enumerate(order)]


def decision(
    answers: Sheet,
    *,
    lost: Sequence[str] = (),
    gained: Sequence[str] = (),
    verdict: str = "pass",
    margin: float = 0.02,
    spread: float = 0.012,
    kind: str = "paired",
    **changes: object,
) -> Decision:
    """A decision on a sheet, whose limits are made up."""
    counts = answers.counts()
    of = len(answers.items)
    right = counts["correct"]
    before = right + len(lost) - len(gained) if kind == "paired" else round(0.93 * of)
    drop = (before - right) / of if of else 0.0
    base = Decision(
        kind=kind,
        verdict=verdict,
        reasons=("within-margin" if verdict == "pass" else "drop" if verdict == "fail" else "between",),
        sentence="Made up by a test.",
        limits=Limits(
            margin=margin,
            floor=0.01,
            alpha=0.05,
            max_truncated=0.02,
            max_refused=0.0,
            max_transport_errors=0.01,
        ),
        items=of,
        score=rate(right, of),
        reference_score=rate(before, of),
        drop=drop,
        drop_interval=Interval(low=drop - spread, high=drop + spread, level=0.9, method="Tango"),
        lost=tuple(lost),
        gained=tuple(gained),
        p_value=0.31 if kind == "paired" else None,
        test="exact McNemar" if kind == "paired" else "two proportions",
        outcomes={name: number for name, number in counts.items() if number},
        truncated=rate(counts["truncated"], of),
    )
    return base.model_copy(update=changes)


def rate(count: int, of: int) -> Rate:
    share = count / of if of else 0.0
    low, high = max(0.0, share - 0.02), min(1.0, share + 0.02)
    return Rate(count=count, of=of, interval=Interval(low=low, high=high, level=0.95, method="Wilson"))


def accuracy_result(
    answers: Sheet, made: Decision | None, case: str = CASE, verdict: Verdict | None = None, **changes: object
) -> Result:
    evidence = Evidence(accuracy=AccuracyEvidence(sheet=answers, decision=made))
    return result(case, verdict or (made.verdict if made else "error"), evidence=evidence, **changes)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
