"""The record of what gates notice: what is kept, when it holds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance import grounds, resources
from conformance.commands.selection import select
from conformance.faults import registry
from conformance.gates import record
from conformance.gates.decide import decide
from conformance.gates.decision import Reading, Sensitivity
from conformance.loading import LoadedSuites, load_suites
from conformance.sealed import RecordError
from tests.conftest import Run
from tests.gate_sheets import arms, paired
from tests.test_cli import validated

FAULTS = ("rope-interleaved", "no-soft-cap")
GATES = tuple(case for case in select(("accuracy/nano",)).cases if case.address.endswith("nano-d"))
SUITES = load_suites([resources.suites_dir() / "parity"])


def today(suites: LoadedSuites | None = SUITES) -> record.Grounds:
    known = registry()
    return record.Grounds([known[fault] for fault in FAULTS], GATES, suites)


def measured(fault: str, lost: int, *, gates: Sequence[Any] = GATES, tensors: int | None = 3) -> Sensitivity:
    decision = decide(paired(), *arms(900 - lost, lost, 0, 100))
    return Sensitivity(
        fault=fault,
        title="",
        tensors=None if tensors is None else tuple(f"parity/a::{number}" for number in range(tensors)),
        readings=tuple(
            Reading(case=gate.address, verdict=decision.verdict, decision=decision) for gate in gates
        ),
    )


def check(file: record.SensitivityFile, suites: LoadedSuites = SUITES) -> dict[tuple[str, str], str]:
    return record.check(file, FAULTS, registry(), GATES, suites)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record of both faults on both gates, and of suites of tensors."""
    path = tmp_path / "sensitivity.json"
    record.keep(path, [measured(FAULTS[0], 80), measured(FAULTS[1], 0)], today())
    return path


def test_a_record_holds_while_nothing_has_changed(path: Path) -> None:
    file = record.read(path)
    assert len(file.cells) == 4
    assert str(file.cells[0].told) == "**fail**, 82.0%, drop 8.0 (80 lost, 0 gained, 80 in other words)"
    assert set(check(file).values()) == {""}
    assert len(check(file)) == 6


def test_what_is_measured_again_replaces_its_own_cells_alone(path: Path) -> None:
    one = GATES[:1]
    file = record.keep(path, [measured(FAULTS[0], 3, gates=one, tensors=None)], today(None))
    assert record.read(path) == file.model_copy(update={"digest": record.read(path).digest})
    lost = {(cell.fault, cell.case): cell.told.lost for cell in file.cells}
    first, second = (gate.address for gate in GATES)
    assert lost == {
        (FAULTS[0], first): 3, (FAULTS[0], second): 80, (FAULTS[1], first): 0, (FAULTS[1], second): 0,
    }  # fmt: skip
    assert [cell.cases for cell in file.tensors] == [3, 3]


def test_changed_sources_make_all_of_it_stale(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grounds, "sources", lambda *_without: "others")
    why = set(check(record.read(path)).values())
    assert why == {"the implementation or the harness has changed since"}


def test_a_changed_gate_makes_its_own_cells_stale(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = (replace(GATES[0], digest="0" * 64), GATES[1])
    held = record.check(record.read(path), FAULTS, registry(), changed, SUITES)
    stale = {asked for (_, asked), why in held.items() if why}
    assert stale == {GATES[0].address}
    assert held[FAULTS[0], GATES[0].address] == "the cases have changed since"


def test_other_suites_of_tensors_make_their_column_stale(path: Path) -> None:
    fewer = LoadedSuites(SUITES.suites[1:])
    stale = {asked for (_, asked), why in check(record.read(path), fewer).items() if why}
    assert stale == {record.TENSORS}


def test_what_was_never_measured_is_told(path: Path) -> None:
    file = record.read(path)
    part = file.model_copy(update={"cells": file.cells[1:], "tensors": ()})
    why = {asked: reason for asked, reason in check(part).items() if reason}
    assert set(why.values()) == {"was never measured"}
    assert len(why) == 3
    with pytest.raises(RecordError, match="was never measured"):
        record.table(part, FAULTS, [gate.address for gate in GATES])


def test_what_is_no_more_is_told(path: Path) -> None:
    file = record.read(path)
    gone = file.cells[0].model_copy(update={"case": "accuracy/nano::sums", "fault": "no-such-fault"})
    held = check(file.model_copy(update={"cells": (*file.cells, gone)}))
    assert held["no-such-fault", "accuracy/nano::sums"] == "is of a fault or a gate that there is no more"


def test_cells_without_grounds_do_not_hold_and_the_sentence_says_so(path: Path) -> None:
    file = record.read(path)
    unknown = file.cells[0].made.model_copy(update={"basis": record.UNKNOWN, "commit": "a" * 40})
    changed = file.model_copy(
        update={"cells": (file.cells[0].model_copy(update={"made": unknown}), *file.cells[1:])}
    )
    why = [reason for reason in check(changed).values() if reason]
    assert why == ["was measured before there were records"]
    assert "aaaaaaaaaa" in record.where_from(changed)
    assert "Of 1 it was not kept with which sources" in record.where_from(changed)
    assert "not kept" not in record.where_from(file)


def test_failing_by_words_alone_is_told_apart() -> None:
    reference, target = arms(1000, 0, 0, 0)
    items = [item.model_copy(update={"answer": f"Well: {item.answer}"}) for item in target.items[:20]]
    target = target.model_copy(update={"items": (*items, *target.items[20:])})
    decision = decide(paired(max_texts_differ=0.01), reference, target)
    told = record.Told.of(decision)
    assert str(told) == "**fail** by words alone, 100.0%, drop 0.0 (0 lost, 0 gained, 20 in other words)"
    reading = Reading(case="accuracy/a::b", verdict="fail", decision=decision)
    assert not Sensitivity(fault="f", title="", tensors=None, readings=(reading,)).caught
    worse = Reading(case="accuracy/a::b", verdict="fail", decision=decide(paired(), *arms(800, 100, 0, 100)))
    assert Sensitivity(fault="f", title="", tensors=None, readings=(reading, worse)).caught


def test_a_gate_without_a_decision_is_not_kept(path: Path) -> None:
    before = path.read_bytes()
    lost = Reading(case=GATES[0].address, verdict="error", reason="it broke")
    with pytest.raises(RecordError, match="came to no decision with rope-interleaved: it broke"):
        record.keep(
            path, [Sensitivity(fault=FAULTS[0], title="", tensors=None, readings=(lost,))], today(None)
        )
    assert path.read_bytes() == before


def test_a_record_that_was_changed_by_hand_is_refused(path: Path) -> None:
    text = json.loads(path.read_text())
    text["cells"][0]["told"]["lost"] = 0
    path.write_text(json.dumps(text))
    with pytest.raises(RecordError, match="was changed by hand"):
        record.read(path)


def test_the_check_runs_nothing_and_exits_with_3(run_conformance: Run, path: Path) -> None:
    done = run_conformance("gate", "check-sensitivity", path, "--json")
    assert done.returncode == 3, done.stderr
    found = validated("gate-check-sensitivity", done)
    assert {row["reason"] for row in found["stale"]} == {"was never measured"}
    said = run_conformance("gate", "check-sensitivity", path).stdout
    assert f"6 of {found['cells']} cells hold" in said
    assert "cells to be measured, as each was never measured: accuracy/nano::gsm8k-nano-d" in said
