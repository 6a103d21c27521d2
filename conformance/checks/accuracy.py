"""Judge how many items of a task a target answers right, by the gate of the case.

1. The target answers every item greedily; lm-eval's task scores the answers. A sequential gate may stop
   early, to fail.
2. The gate decides (docs/gates.md): `drop`, `alarm` and `stopped` say that the target is worse, `truncated`
   and `refused` that it does not answer, `texts` that it says something else. What is in between is
   inconclusive.
3. What ran, as read back from the engine, must be what was asked for (`wrong-…`).
4. Sheets that are answers to different questions are an error; so is a reference that was changed by hand.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.checks.base import CheckOutcome
from conformance.errors import ConformanceError
from conformance.gates.decision import Decision
from conformance.gates.spec import PairedGate
from conformance.gates.suite import AccuracyCase
from conformance.results import AccuracyEvidence, Evidence, Problem
from conformance.targets.protocol import Target, TargetInfo

if TYPE_CHECKING:  # lm-eval and SciPy take seconds to import
    from conformance.scoring import Sheet


_NOTICES = logging.getLogger("conformance.targets.accuracy")
"""Shown beside what targets have to say."""
_NOTED = 10
"""Parts of a case after which its progress is told."""


def judge(case: AccuracyCase, target: Target, folder: Path) -> CheckOutcome:
    """Ask, score, decide.

    Args:
        case: It.
        target: Who is asked; it generates, or serves this very checkpoint.
        folder: Of the suite, where the reference stands.

    Raises:
        EvaluationError, DataError, BaselineError: the items cannot be asked, or the reference not read.
    """
    reason = _cannot(case, target)
    if reason:
        return CheckOutcome("skip", reason=reason)
    from conformance.answering import UnavailableError
    from conformance.gates import asking, loading
    from conformance.gates.decide import decide

    gate = case.gate
    try:
        checkpoint = asking.find_checkpoint(case.checkpoint)
        reference = loading.reference(case, gate, folder) if isinstance(gate, PairedGate) else None
        sheet = asking.ask(
            case, target, checkpoint, reference=reference, progress=_Progress(case, target.spec).tell
        )
    except (asking.NotAtHandError, UnavailableError) as error:
        return CheckOutcome("skip", reason=str(error))
    try:
        decision = decide(gate, reference, sheet)
    except ConformanceError as error:
        return CheckOutcome("error", evidence=_evidence(case, sheet, None, reference), reason=str(error))
    evidence = _evidence(case, sheet, decision, reference)
    problems = (*_setting_problems(case, sheet), *_decision_problems(decision))
    if problems:
        return CheckOutcome("fail", problems, evidence)
    return CheckOutcome(decision.verdict, evidence=evidence, reason=_reason(decision))


class _Progress:
    """Tells of the items that are answered, now and then."""

    def __init__(self, case: AccuracyCase, spec: str) -> None:
        self._what = f"{spec}: {case.checkpoint}, {case.task}"
        self._told = 0

    def tell(self, done: int, total: int) -> None:
        """Told after each batch."""
        part = done * _NOTED // max(total, 1)
        if part > self._told:
            self._told = part
            _NOTICES.info("%s: %d of %d items", self._what, done, total)


def _cannot(case: AccuracyCase, target: Target) -> str:
    """Why the target is not asked; empty if it is."""
    info: TargetInfo = target.describe()
    if "generate" in info.capabilities:
        return ""
    if "serve" not in info.capabilities:
        why = info.unavailable.get("generate")
        return f"{target.spec} has no capability `generate`{f': {why}' if why else ''}"
    served = info.environment.get("model", "")
    if served.rpartition("/")[2] != case.checkpoint.rpartition("/")[2]:
        return f"{target.spec} serves {served or 'an unnamed model'} and not {case.checkpoint}"
    return ""


def _setting_problems(case: AccuracyCase, sheet: Sheet) -> Iterator[Problem]:
    """Layouts that were asked for and not used; `evaluate` has looked at dtype and attention."""
    for name in ("tensor_parallel", "pipeline_parallel"):
        asked, ran = str(getattr(case, name)), sheet.header.effective.get(name, str(getattr(case, name)))
        if ran != asked:
            yield Problem(
                rule=f"wrong-{name.replace('_', '-')}",
                message=f"{name} {asked} was asked for and {ran} ran",
                expected=asked,
                got=ran,
            )


def _decision_problems(decision: Decision) -> Iterator[Problem]:
    """One for each reason to fail."""
    from conformance.gates.decide import WHY

    if decision.verdict != "fail":
        return
    for number, reason in enumerate(decision.reasons):
        yield Problem(
            rule=reason,
            message=WHY[reason] if number else decision.sentence,
            expected={
                "margin": decision.limits.margin,
                "floor": decision.limits.floor,
                "max_texts_differ": decision.limits.max_texts_differ,
            },
            got={
                "drop": decision.drop,
                "lost": len(decision.lost),
                "gained": len(decision.gained),
                "texts_differ": decision.texts_differ,
            },
        )


def _reason(decision: Decision) -> str:
    """Why it is inconclusive, or what has changed though it passes."""
    return decision.sentence if decision.verdict == "inconclusive" or decision.changed else ""


def _evidence(
    case: AccuracyCase, sheet: Sheet, decision: Decision | None, reference: Sheet | None
) -> Evidence:
    asked = case.model_dump(mode="json", exclude={"id", "title", "source", "tags", "control_of", "gate"})
    return Evidence(
        input=json.dumps(asked, ensure_ascii=False, indent=2),
        expected=case.gate.model_dump(mode="json"),
        got=decision.sentence if decision is not None else None,
        accuracy=AccuracyEvidence(
            sheet=sheet,
            decision=decision,
            reference=reference.header if reference is not None else None,
        ),
    )
