"""What docs and manifests say was measured: the tables of sensitivity, the checkpoints' scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conformance import resources
from conformance.expectations import Expectations
from conformance.faults import select as select_faults
from conformance.gates import sensitivity
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


def tables() -> dict[str, dict[str, str]]:
    """Gate to fault to cell; under `tensors`, what is said of the suites of tensors, which is asked once."""
    found: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for line in (ROOT / "docs" / "gates.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if cells[:1] == ["fault"]:
            header = cells[1:]
        elif cells and header and cells[0].startswith("`"):
            for name, cell in zip(header, cells[1:], strict=True):
                found.setdefault(name, {})[cells[0].strip("`")] = cell
        elif not cells:
            header = []
    return found


def test_the_tables_have_all_faults_and_all_gates() -> None:
    found = tables()
    assert found.keys() == {"tensors", *CASES}
    for rows in found.values():
        assert tuple(rows) == sensitivity.FAULTS


def test_suites_of_tensors_notice_all_and_gates_alone_most() -> None:
    found = tables()
    assert all(int(cell.removesuffix(" cases")) > 0 for cell in found.pop("tensors").values())
    cells = [(fault, cell) for rows in found.values() for fault, cell in rows.items()]
    noticed = {fault for fault, cell in cells if cell.startswith("**fail**")}
    assert len(noticed) >= NOTICED


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("mmmu-nano-d", "images-seen-causally"),
        ("gsm8k-nano-a", "expert-scale-dropped"),
    ],
)
def test_a_row_comes_out_again(case: str, fault: str) -> None:
    found = sensitivity.measure(select_faults([fault]), [CASES[case]], None, Expectations())
    row = sensitivity.markdown(found).splitlines()[-1]
    assert row == f"| `{fault}` | not asked | {tables()[case][fault]} |"


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_the_score_of_the_manifest(name: str) -> None:
    case = CASES[name].case
    assert isinstance(case, AccuracyCase)
    folder = checkpoint_folder(case.checkpoint)
    score = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["scores"][case.task]
    sheet = Sheet.read(resources.suites_dir() / "accuracy" / "references" / f"{name}.jsonl")
    right = sum(item.outcome == "correct" for item in sheet.items)
    assert (right, len(sheet.items)) == (score["right"], score["of"])


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
