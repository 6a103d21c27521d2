"""`gate sensitivity`: gates and suites of tensors with known faults, and the table that comes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from conformance.expectations import Expectations
from conformance.faults import Fault, registry
from conformance.faults.run import BaselineError
from conformance.gates import baseline, sensitivity
from conformance.gates.decide import decide
from conformance.gates.decision import Decision
from conformance.loading import LoadedSuite, load_suite
from conformance.results import AccuracyEvidence, Evidence, Result
from tests.gate_sheets import arms, paired
from tests.test_gates_cases import asked, write_suite

MODEL = SimpleNamespace(lost=0)
"""Stands for the implementation: how many of 1000 items it loses."""


def fault(name: str, lost: int) -> Fault:
    change = (lambda: patch.object(MODEL, "lost", lost),)
    return Fault(name, f"Loses {lost} items.", ("X01",), "parity", "text-model", "model", change)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedSuite:
    """A suite with one gate, whose results follow `MODEL`."""
    path = write_suite(tmp_path)
    reference = path.parent / "references" / "sums.jsonl"
    baseline.store(reference, asked(path), reason="For this test.", comparison=None)

    def result(loaded: Any, spec: str, *_arguments: Any) -> Result:
        sheets = arms(900 - MODEL.lost, MODEL.lost, 0, 100)
        decision = decide(paired(), *sheets)
        return Result(
            suite=loaded.suite.suite.id,
            case=loaded.case.id,
            target=spec,
            kind="accuracy",
            area="accuracy",
            verdict=decision.verdict,
            evidence=Evidence(accuracy=AccuracyEvidence(sheet=sheets[1], decision=decision)),
            digest=loaded.digest,
            repeat="",
        )

    monkeypatch.setattr(sensitivity, "run_case", result)
    return load_suite(path)


def test_each_fault_is_measured_alone(gate: LoadedSuite) -> None:
    told: list[str] = []
    found = sensitivity.measure(
        [fault("large", 80), fault("small", 3)], gate.cases, None, Expectations(), progress=told.append
    )
    assert [(row.fault, row.caught) for row in found] == [("large", True), ("small", False)]
    decisions = [row.readings[0].decision for row in found]
    assert all(isinstance(decision, Decision) for decision in decisions)
    assert [decision.drop for decision in decisions if decision] == pytest.approx([0.08, 0.003])
    assert [line.partition(":")[0] for line in told] == ["no fault", "large", "small"]
    assert sensitivity.markdown(found) == (
        "| fault | tensors | sums |\n"
        "| --- | --- | --- |\n"
        "| `large` | not asked | **fail**, 82.0%, drop 8.0 (80 lost, 0 gained, 80 in other words) |\n"
        "| `small` | not asked | pass, 89.7%, drop 0.3 (3 lost, 0 gained, 3 in other words) |\n"
    )


def test_a_gate_that_fails_without_a_fault_proves_nothing(
    gate: LoadedSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODEL, "lost", 100)
    with pytest.raises(BaselineError, match="does not pass on the reference with no fault switched on"):
        sensitivity.measure([fault("any", 5)], gate.cases, None, Expectations())


def test_faults_that_tensors_miss_are_named(gate: LoadedSuite, monkeypatch: pytest.MonkeyPatch) -> None:
    detections = iter(
        [
            SimpleNamespace(detected=True, caught_by=(SimpleNamespace(case="parity/a::b"),)),
            SimpleNamespace(detected=False, caught_by=(SimpleNamespace(case="parity/a::b"),)),
        ]
    )
    monkeypatch.setattr(sensitivity, "detect", lambda *_arguments, **_options: [next(detections)])
    suites: Any = object()
    found = sensitivity.measure([fault("seen", 80), fault("unseen", 80)], gate.cases, suites, Expectations())
    assert [row.tensors for row in found] == [("parity/a::b",), ()]
    assert "| `seen` | 1 cases |" in sensitivity.markdown(found)
    assert "| `unseen` | 0 cases |" in sensitivity.markdown(found)


def test_the_usual_faults_are_there() -> None:
    known = registry()
    assert len(sensitivity.FAULTS) == 11
    assert {known[name].kind for name in sensitivity.FAULTS} == {"parity", "mask"}
