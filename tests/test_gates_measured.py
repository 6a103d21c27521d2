"""What docs and manifests say was measured: the tables of sensitivity, the checkpoints' scores."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conformance import resources
from conformance.expectations import Expectations
from conformance.faults import select as select_faults
from conformance.gates import record, sensitivity
from conformance.gates.suite import AccuracyCase, AccuracySuite
from conformance.loading import LoadedCase, load_suites
from conformance.scoring import Sheet
from conformance.targets.reference_chat import checkpoint_folder
from model_impl.nano.curriculum import RECIPES

ROOT = Path(__file__).parents[1]
NOTICED = 8
"""Faults at least, of the eleven, that some gate alone notices."""


def cases() -> dict[str, LoadedCase]:
    (suite,) = load_suites([resources.suites_dir() / "accuracy" / "nano.yaml"])
    assert isinstance(suite.suite, AccuracySuite)
    return {case.case.id: case for case in suite.cases}


CASES = cases()
WHY_NOT = {
    "no-soft-cap": "soft-cap is monotone",
    "erf-gelu-in-mlp": "erf instead of tanh",
    "per-layer-sum-unscaled": "factor on the whole sum of the per-layer inputs",
}
"""How docs/gates.md begins to explain what no gate notices."""


def sheet(name: str) -> Sheet:
    """The stored reference of a gate."""
    return Sheet.read(resources.suites_dir() / "accuracy" / "references" / f"{name}.jsonl")


def written_by() -> ModuleType:
    """docs/gates.py."""
    spec = importlib.util.spec_from_file_location("gates_guide", ROOT / "docs" / "gates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


guide = written_by()


@pytest.fixture(scope="module")
def found() -> record.SensitivityFile:
    """The committed record."""
    return record.read(record.default_path())


def test_the_record_has_all_faults_on_all_gates(found: record.SensitivityFile) -> None:
    wanted = {(fault, case.address) for fault in sensitivity.FAULTS for case in CASES.values()}
    modes = {(fault, guide.LONG_IMAGES) for fault in guide.MODES}
    assert {(cell.fault, cell.case) for cell in found.cells} == wanted | modes
    assert [cell.fault for cell in found.tensors] == list(sensitivity.FAULTS)
    for cell in found.cells:
        gate = CASES[cell.case.partition("::")[2]].case
        assert isinstance(gate, AccuracyCase)
        assert cell.told.items == gate.gate.items


def test_a_score_is_the_references_less_what_was_lost(found: record.SensitivityFile) -> None:
    for name, case in CASES.items():
        right = sum(item.outcome == "correct" for item in sheet(name).items)
        for cell in found.cells:
            if cell.case == case.address:
                assert cell.told.right == right - cell.told.lost + cell.told.gained


def test_suites_of_tensors_notice_all_and_gates_alone_most(found: record.SensitivityFile) -> None:
    assert all(cell.cases > 0 for cell in found.tensors)
    assert len(guide.noticed(found)) >= NOTICED


def test_the_guide_has_the_tables_of_the_record(found: record.SensitivityFile) -> None:
    text = guide.GUIDE.read_text(encoding="utf-8")
    assert guide.written(text, found) == text, "write them again: python docs/gates.py"
    for fault in sensitivity.FAULTS:
        if fault not in guide.noticed(found):
            assert WHY_NOT[fault] in text.partition(guide.END)[2]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("mmmu-nano-d", "images-seen-causally"),
        ("gsm8k-nano-a", "expert-scale-dropped"),
    ],
)
def test_a_row_comes_out_again(found: record.SensitivityFile, case: str, fault: str) -> None:
    (row,) = sensitivity.measure(select_faults([fault]), [CASES[case]], None, Expectations())
    assert row.readings[0].decision is not None
    again, kept = record.Told.of(row.readings[0].decision), found.cell(fault, CASES[case].address)
    assert kept is not None
    unknown = {"texts_differ"} if kept.told.texts_differ is None else set()
    assert again.model_dump(exclude=unknown) == kept.told.model_dump(exclude=unknown)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_the_score_of_the_manifest(name: str) -> None:
    case = CASES[name].case
    assert isinstance(case, AccuracyCase)
    folder = checkpoint_folder(case.checkpoint)
    score = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["scores"][case.task]
    items = sheet(name).items
    assert (sum(item.outcome == "correct" for item in items), len(items)) == (score["right"], score["of"])


def test_the_guide_has_the_scores_of_the_manifests() -> None:
    guide = (ROOT / "docs" / "nano.md").read_text(encoding="utf-8")
    for name in RECIPES:
        manifest = json.loads((checkpoint_folder(name) / "manifest.json").read_text(encoding="utf-8"))
        cells = [_score(manifest["scores"].get(task)) for task in ("nano_gsm8k", "nano_mmmu", "nano_sounds")]
        assert f"| `{name}` | {' | '.join(cells)} |" in guide


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    low, high = (100 * limit for limit in score["interval"])
    return f"{score['right']} ({low:.1f} to {high:.1f} %)"
