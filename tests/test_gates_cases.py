"""Cases of kind `accuracy`: what the loader refuses, what the check makes of targets, stored references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from statsmodels.stats.multitest import multipletests

from conformance.checks import CheckOutcome, judge
from conformance.errors import ConformanceError, SuiteError, UsageError
from conformance.gates import asking, baseline, multiplicity
from conformance.gates.baseline import BaselineError
from conformance.gates.decide import decide
from conformance.gates.loading import find_case
from conformance.gates.planning import make_plan
from conformance.gates.suite import AccuracyCase
from conformance.loading import load_suite, load_suites
from conformance.scoring import Sheet
from tests import gate_targets
from tests.gate_sheets import arms, changed, header, item, paired, sheet

ITEMS = 60
GATE: dict[str, Any] = {
    "kind": "paired",
    "items": ITEMS,
    "margin": 0.2,
    "floor": 0.02,
    "discordance": 0.02,
    "reference": "references/sums.jsonl",
}
CASE: dict[str, Any] = {
    "id": "sums",
    "title": "It can add.",
    "source": ["spec 1.1"],
    "task": "nano_gsm8k",
    "checkpoint": "scripted",
    "max_new_tokens": 24,
    "gate": GATE,
}


def write_suite(root: Path, **fields: Any) -> Path:
    """A suite with one case; `gate` replaces fields of the gate, the others those of the case."""
    path = root / "suites" / "accuracy" / "demo.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    gate = {**GATE, **fields.pop("gate", {})}
    gate = {name: value for name, value in gate.items() if value is not None}
    suite = {
        "kind": "accuracy",
        "id": "accuracy/demo",
        "title": "Demo",
        "description": "Made by a test.",
        "area": "accuracy",
        "cases": [CASE | {"gate": gate} | fields],
    }
    path.write_text(yaml.safe_dump(suite, sort_keys=False), encoding="utf-8")
    return path


def asked(path: Path, target: Any | None = None) -> Sheet:
    """The answers of a target, by default of one that is always right."""
    case, _ = find_case(f"{path}::sums")
    solver = target or gate_targets.Solver()
    solver.spec = "solver"
    return asking.ask(case, solver, asking.find_checkpoint(case.checkpoint))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Sheet:
    return asked(write_suite(tmp_path_factory.mktemp("answers")))


@pytest.fixture
def suite(tmp_path: Path, answers: Sheet) -> Path:
    """A suite whose reference is there."""
    path = write_suite(tmp_path)
    baseline.store(
        path.parent / "references" / "sums.jsonl", answers, reason="For this test.", comparison=None
    )
    return path


def judged(path: Path, target: Any, spec: str = "solver") -> CheckOutcome:
    target.spec = spec
    loaded = load_suite(path).case("sums")
    return judge(loaded.case, loaded.suite.suite, target, folder=path.parent)


def rules(outcome: CheckOutcome) -> list[str]:
    return [problem.rule for problem in outcome.problems]


# ---------------------------------------------------------------------------- the check


def test_a_target_that_is_as_good_passes(suite: Path) -> None:
    outcome = judged(suite, gate_targets.Solver())
    assert (outcome.verdict, outcome.reason) == ("pass", "")
    evidence = outcome.evidence.accuracy
    assert evidence is not None
    assert evidence.decision is not None
    assert evidence.reference is not None
    assert evidence.decision.score.share == 1.0
    assert len(evidence.sheet.items) == ITEMS
    assert evidence.sheet.header.task == "nano_gsm8k"


def test_a_worse_target_fails_by_name(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATE_WRONG", "0.6")
    outcome = judged(suite, gate_targets.Solver())
    assert outcome.verdict == "fail"
    assert rules(outcome) == ["drop", "alarm"]
    assert "even the lower limit of the drop is above the margin" in outcome.problems[0].message.lower()
    assert outcome.evidence.accuracy is not None
    assert outcome.evidence.accuracy.decision is not None
    assert outcome.evidence.accuracy.decision.outcomes["wrong"] > ITEMS / 3


def test_a_change_that_does_not_matter_is_told(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_suite(suite.parents[2], gate={"floor": 0.25, "margin": 0.45})
    monkeypatch.setenv("GATE_WRONG", "0.16")
    outcome = judged(path, gate_targets.Solver())
    assert outcome.verdict == "pass"
    assert "there is a change, which is too small to matter" in outcome.reason


@pytest.mark.parametrize(
    ("target", "verdict", "rule"),
    [
        (gate_targets.Rambling, "fail", "truncated"),
        (gate_targets.Refusing, "fail", "refused"),
        (gate_targets.OtherLayout, "fail", "wrong-tensor-parallel"),
    ],
)
def test_other_ways_to_fail(suite: Path, target: type[gate_targets.Solver], verdict: str, rule: str) -> None:
    outcome = judged(suite, target())
    assert outcome.verdict == verdict
    assert rule in rules(outcome)


def test_lost_answers_are_inconclusive_and_not_wrong(suite: Path) -> None:
    outcome = judged(suite, gate_targets.Dropping())
    assert outcome.verdict == "inconclusive"
    assert "too many items are missing or were lost on the way" in outcome.reason.lower()
    assert outcome.evidence.accuracy is not None
    assert outcome.evidence.accuracy.sheet.counts()["wrong"] == 0


def test_what_cannot_generate_is_skipped(suite: Path) -> None:
    outcome = judged(suite, gate_targets.Parser(), "parser")
    assert outcome.verdict == "skip"
    assert outcome.reason == "parser has no capability `generate`: install its engine"


def test_a_checkpoint_that_is_not_here_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = load_suites().match("accuracy/published::gsm8k-31b")[0]
    target = gate_targets.Solver()
    monkeypatch.delenv(asking.VARIABLE, raising=False)

    def reason() -> str:
        outcome = judge(bundled.case, bundled.suite.suite, target, folder=bundled.suite.path.parent)
        assert outcome.verdict == "skip"
        return outcome.reason

    assert "is not at hand: CONFORMANCE_CHECKPOINTS is not set; download it" in reason()
    monkeypatch.setenv(asking.VARIABLE, str(tmp_path))
    assert f"{tmp_path}/google/gemma-4-31B-it has no config.json" in reason()
    folder = tmp_path / "google" / "gemma-4-31B-it"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert asking.find_checkpoint("google/gemma-4-31B-it") == folder


def test_another_prompt_is_an_error(suite: Path, monkeypatch: pytest.MonkeyPatch, answers: Sheet) -> None:
    other = changed(answers, 3, prompt_hash="0" * 64)
    monkeypatch.setattr(asking, "ask", lambda *_arguments, **_options: other)
    outcome = judged(suite, gate_targets.Solver())
    assert outcome.verdict == "error"
    assert "1 prompts differ" in outcome.reason
    assert outcome.evidence.accuracy is not None
    assert outcome.evidence.accuracy.decision is None


def test_a_sequential_gate_stops_early_and_asks_nothing_twice(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("GATE_LOG", str(log))
    monkeypatch.setenv("GATE_WRONG", "0.9")
    path = write_suite(suite.parents[2], gate={"stop_alpha": 0.02, "margin": 0.25})
    outcome = judged(path, gate_targets.Solver())
    assert rules(outcome) == ["stopped"]
    assert outcome.evidence.accuracy is not None
    seen = len(outcome.evidence.accuracy.sheet.items)
    assert seen < ITEMS
    assert log.read_text().count("asked") == seen

    log.unlink()
    monkeypatch.setenv("GATE_WRONG", "0")
    assert judged(path, gate_targets.Solver()).verdict == "pass"
    assert log.read_text().count("asked") == ITEMS


# ---------------------------------------------------------------------------- the loader


def refusal(path: Path) -> str:
    with pytest.raises(SuiteError) as error:
        load_suite(path)
    return str(error.value)


def test_a_gate_that_cannot_reach_its_margin_is_refused(suite: Path) -> None:
    path = write_suite(suite.parents[2], gate={"margin": 0.05})
    message = refusal(path)
    assert message.startswith(f"{path}:")
    assert "cases[0].gate.items: 60 items cannot certify a margin of 5 points" in message
    assert "(MDE) is" in message


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"gate": {"reference": "references/none.jsonl"}}, "gate.reference", "there is no such reference"),
        ({"gate": {"reference": "../sums.jsonl"}}, "gate.reference", "pattern"),
        ({"gate": {"reference": "/sums.jsonl"}}, "gate.reference", "pattern"),
        ({"gate": {"discordance": None}}, "gate", "`discordance` is required"),
        ({"gate": {"kind": "guessed"}}, "gate", "paired"),
        ({"gate": {"items": 61}}, "gate.reference", "has 60 items and the gate declares 61"),
        ({"thinking": True}, "gate.reference", "the case has thinking True and the reference False"),
        ({"task": "gsm8k"}, "gate.reference", "the case has task 'gsm8k'"),
        ({"order_seed": 4}, "gate.reference", "the case has order_seed 4"),
        ({"max_new_tokens": 25}, "gate.reference", "the case has max_new_tokens 25"),
        ({"checkpoint": "nano-e"}, "gate.reference", "the case has checkpoint 'nano-e'"),
        ({"shot": 5}, "shot", "shots"),
    ],
)
def test_broken_cases_name_the_field(suite: Path, fields: dict[str, Any], field: str, says: str) -> None:
    message = refusal(write_suite(suite.parents[2], **fields))
    assert f"cases[0].{field}:" in message
    assert says in message


def test_a_reference_must_stay_beside_its_suite(suite: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("{}")
    (suite.parent / "references" / "link.jsonl").symlink_to(outside)
    message = refusal(write_suite(tmp_path, gate={"reference": "references/link.jsonl"}))
    assert "leads out of" in message


def test_the_digest_of_a_case_knows_its_reference(suite: Path, answers: Sheet) -> None:
    before = load_suite(suite).case("sums").digest
    path = suite.parent / "references" / "sums.jsonl"
    decision = decide(paired(items=ITEMS, margin=0.2), answers, answers)
    newer = answers.model_copy(update={"header": answers.header.model_copy(update={"created": "later"})})
    baseline.store(path, newer, reason="A second one.", comparison=decision)
    suite.write_text(suite.read_text() + "\n")
    assert load_suite(suite).case("sums").digest != before


def test_a_published_figure_needs_its_method(tmp_path: Path) -> None:
    gate = {
        "kind": "unpaired",
        "reference": None,
        "discordance": None,
        "score": 0.9,
        "of": 60,
        "published": "spec 1.1",
    }
    message = refusal(write_suite(tmp_path, gate=gate))
    assert "the key `method` is required and missing" in message


def test_published_gates_say_what_they_can_detect() -> None:
    """In points, as docs/gates.md says of the first."""
    cases = [loaded.case for loaded in load_suites().match("accuracy/published")]
    found = {}
    for case in cases:
        assert isinstance(case, AccuracyCase)
        assert case.gate.kind == "unpaired"
        assert case.gate.published in case.source
        plan = make_plan(case.gate)
        assert plan.reaches(case.gate), case.id
        found[case.id] = round(100 * plan.detectable, 2)
    assert found == {"gsm8k-31b": 2.61, "gsm8k-e2b": 4.67, "gsm8k-e4b-base": 4.77, "mmmu-26b-a4b": 7.17}


def test_find_case(suite: Path) -> None:
    assert find_case("accuracy/published::gsm8k-31b")[0].task == "gsm8k"
    for wrong, says in [
        (f"{suite}::other", "no case 'other'; there are sums"),
        (str(suite), "names no case"),
        ("accuracy/none::sums", "names no case"),
    ]:
        with pytest.raises(UsageError, match=says):
            find_case(wrong)
    with pytest.raises(SuiteError, match="expected a suite of kind accuracy"):
        find_case("parser/reasoning::label-is-dropped")


# ---------------------------------------------------------------------------- stored references


def test_a_reference_that_was_changed_by_hand_is_refused(suite: Path) -> None:
    path = suite.parent / "references" / "sums.jsonl"
    path.write_text(path.read_text().replace('"correct"', '"wrong"', 1))
    suite.write_text(suite.read_text() + "\n")
    assert "it was changed without a comparison with the one before" in refusal(suite)


def _edited(record: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(record.read_text())
    edit(found)
    record.write_text(json.dumps(found))


def test_a_record_that_was_changed_by_hand_is_refused(suite: Path, answers: Sheet) -> None:
    path = suite.parent / "references" / "sums.jsonl"
    record = baseline.record_path(path)
    _edited(record, lambda found: found["entries"].append(found["entries"][0]))
    with pytest.raises(BaselineError, match=r"entries\.1: it does not follow"):
        baseline.read(path)
    _edited(record, lambda found: found.update(entries=[]))
    with pytest.raises(BaselineError, match="entries"):
        baseline.read(path)
    record.unlink()
    with pytest.raises(BaselineError, match="cannot be read"):
        baseline.read(path)


def test_a_reference_is_replaced_only_with_a_comparison(suite: Path, answers: Sheet) -> None:
    path = suite.parent / "references" / "sums.jsonl"
    with pytest.raises(BaselineError, match="with a comparison, and first made without one"):
        baseline.store(path, answers, reason="Because I say so.", comparison=None)
    decision = decide(paired(items=ITEMS, margin=0.2), answers, answers)
    with pytest.raises(BaselineError, match="first made without one"):
        baseline.store(path.with_name("new.jsonl"), answers, reason="For a test.", comparison=decision)
    baseline.store(path, answers, reason="Measured again.", comparison=decision)
    entries = baseline.history(path).entries
    assert [entry.reason for entry in entries] == ["For this test.", "Measured again."]
    assert entries[1].previous == entries[0].sha256
    assert entries[1].comparison == decision
    assert baseline.read(path) == answers


def test_a_reference_that_is_gone_leaves_its_record(suite: Path, answers: Sheet) -> None:
    """Else one could be made anew without a comparison with it."""
    path = suite.parent / "references" / "sums.jsonl"
    path.unlink()
    for what in (
        lambda: baseline.read(path),
        lambda: baseline.current(path),
        lambda: baseline.store(path, answers, reason="From the beginning.", comparison=None),
    ):
        with pytest.raises(BaselineError, match=r"its record sums\.baseline\.json tells of one; put it back"):
            what()
    assert not path.exists()
    baseline.record_path(path).unlink()
    assert baseline.current(path) is None


def test_drops_of_a_history_add_up(suite: Path, answers: Sheet) -> None:
    """Each passes; together they reach the margin. What was accepted as such begins anew."""
    path = suite.parent / "references" / "sums.jsonl"
    gate = load_gate(margin=0.2)
    same = decide(paired(items=ITEMS, margin=0.2), answers, answers)
    drop = same.model_copy(update={"drop": 0.08})
    totals = []
    for _ in range(2):
        totals.append(baseline.adds_up(path, drop))
        baseline.store(path, answers, reason="A little worse.", comparison=drop)
    totals.append(baseline.adds_up(path, drop))
    assert totals == pytest.approx([0.08, 0.16, 0.24])
    assert [baseline.too_much(total, gate) for total in totals] == [False, False, True]
    assert baseline.too_much(0.1 + 0.1, gate)
    assert baseline.adds_up(path, same.model_copy(update={"drop": -0.1})) == pytest.approx(0.06)
    entry = baseline.store(path, answers, reason="It is known.", comparison=drop, accepted=True)
    assert entry.accepted
    assert baseline.adds_up(path, drop) == pytest.approx(0.08)


def test_a_reference_of_changed_sources_is_told_apart(suite: Path, answers: Sheet) -> None:
    with pytest.raises(BaselineError, match=r"changed since their commit \(abc\+dirty\).*--allow-dirty"):
        baseline.check_sources("abc+dirty")
    baseline.check_sources("abc")
    baseline.check_sources(None)
    path = suite.parent / "references" / "other.jsonl"
    for commit, dirty in (("abc+dirty", True), ("abc", False)):
        made = answers.model_copy(update={"header": answers.header.model_copy(update={"commit": commit})})
        entry = baseline.store(path.with_stem(commit[:4]), made, reason="For this test.", comparison=None)
        assert entry.dirty is dirty


def _with_clusters(suite: Path, answers: Sheet) -> None:
    """The same reference, whose items name three clusters."""
    items = tuple(
        each.model_copy(update={"cluster": f"kind-{number % 3}"}) for number, each in enumerate(answers.items)
    )
    path = suite.parent / "references" / "sums.jsonl"
    path.unlink()
    baseline.record_path(path).unlink()
    made = answers.model_copy(update={"items": items})
    baseline.store(path, made, reason="With clusters.", comparison=None)


def test_a_reference_with_clusters_needs_a_gate_that_knows_of_them(suite: Path, answers: Sheet) -> None:
    _with_clusters(suite, answers)
    root = suite.parents[2]
    message = refusal(write_suite(root))
    assert "cases[0].gate.reference: the reference's items name 3 clusters, such as 'kind-0'" in message
    assert "`design_effect` has to say by how much" in refusal(write_suite(root, gate={"clusters": 3}))
    assert "declares 4" in refusal(write_suite(root, gate={"clusters": 4, "design_effect": 1, "margin": 0.4}))
    assert "`stop_alpha` does not go" in refusal(
        write_suite(root, gate={"clusters": 3, "design_effect": 1, "stop_alpha": 0.02})
    )
    # Three clusters make the limits nearly twice as wide: what sixty items reach alone, they do not.
    few = refusal(write_suite(root, gate={"clusters": 3, "design_effect": 1}))
    assert "60 items cannot certify a margin of 20 points" in few
    load_suite(write_suite(root, gate={"clusters": "all"}))
    load_suite(write_suite(root, gate={"clusters": 3, "design_effect": 1, "margin": 0.4}))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (sheet([True] * 9), "has 9 items and the gate declares 10"),
        (changed(sheet([True] * 10), 2, outcome="transport-error"), r"have no answer \(doc-2, …\)"),
        (changed(sheet([True] * 10), 2, finish_reason="length"), "1 answers of the reference break off"),
        (changed(sheet([True] * 10), 2, repeats=2), "asked 2 times"),
        (Sheet.model_construct(header=header(), items=(item(1), item(1))), "is there twice"),
    ],
)
def test_sheets_that_cannot_be_references(broken: Sheet, says: str) -> None:
    gate = load_gate(items=10)
    with pytest.raises(ConformanceError, match=says):
        baseline.check_reference(gate, broken)


def load_gate(**fields: Any) -> Any:
    return AccuracyCase.model_validate(CASE | {"gate": GATE | fields}).gate


# ---------------------------------------------------------------------------- many gates


def test_adjusted_p_values_agree_with_statsmodels() -> None:
    p_values = [0.001, 0.2, 0.03, 0.04, 0.01, 0.9, 0.03]
    assert multiplicity.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    listed = multiplicity.benjamini_hochberg(p_values)
    assert listed == pytest.approx(multipletests(p_values, method="fdr_bh")[1])
    assert multiplicity.holm([]) == multiplicity.benjamini_hochberg([]) == []


def test_a_year_of_nights() -> None:
    assert multiplicity.false_alarms_a_year(0.05) == pytest.approx(18.25)
    assert multiplicity.false_alarms_a_year(0.001, gates=3) == pytest.approx(1.095)


def test_sheets_survive_a_round_trip(tmp_path: Path) -> None:
    reference, target = arms(5, 2, 1, 2)
    for number, each in enumerate((reference, target)):
        each.write(tmp_path / f"{number}.jsonl")
    gate = paired(items=10, margin=0.3)
    again = decide(gate, Sheet.read(tmp_path / "0.jsonl"), Sheet.read(tmp_path / "1.jsonl"))
    assert again == decide(gate, reference, target)
