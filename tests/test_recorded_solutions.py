"""gsm8k's two filters agree with the labels that real solutions came with."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.evaluation import EvaluationOptions, evaluate
from conformance.scoring import Item
from tests.recorded_solutions import RecordedTarget, Solution, everything, sample, write_data

EVERY = {"sample": sample()} | everything()
LARGEST_SHARE = 0.01
"""Of solutions on whose label scorer and authors may differ."""


def replayed(solutions: list[Solution], scheme: str) -> dict[str, Item]:
    """The scored items, by document."""
    target = RecordedTarget(solutions, strict=scheme == "strict-match")
    options = EvaluationOptions(shots=0, filter=scheme, batch_size=512)
    sheet = evaluate(target, "gsm8k", checkpoint="recorded", options=options)
    assert len(sheet.items) == len(solutions)
    return {item.doc_id: item for item in sheet.items}


def test_the_sample_has_right_and_wrong_solutions() -> None:
    assert len(EVERY["sample"]) == 200
    assert 80 <= sum(each.is_correct for each in EVERY["sample"]) <= 120
    assert (Path(__file__).parent / "data" / "gsm8k" / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.parametrize("scheme", ["flexible-extract", "strict-match"])
@pytest.mark.parametrize("model", list(EVERY))
def test_known_labels(model: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solutions = EVERY[model]
    write_data(solutions, tmp_path)
    monkeypatch.setenv("CONFORMANCE_DATA_DIR", str(tmp_path))
    items = replayed(solutions, scheme)
    differ = [
        f"{item.outcome}, read {item.extracted!r}, expected {each.answer[-20:]!r}: {each.solution[-80:]!r}"
        for number, each in enumerate(solutions)
        if ((item := items[str(number)]).outcome == "correct") != each.is_correct
    ]
    assert len(differ) <= LARGEST_SHARE * len(solutions), "\n".join(differ)


def test_labels_turned_round_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solutions = EVERY["sample"][:40]
    write_data(solutions, tmp_path)
    monkeypatch.setenv("CONFORMANCE_DATA_DIR", str(tmp_path))
    items = replayed(solutions, "flexible-extract")
    wrong = [
        (items[str(n)].outcome == "correct") == (not each.is_correct) for n, each in enumerate(solutions)
    ]
    assert not any(wrong)


def test_strict_match_reads_nothing_in_another_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solutions = EVERY["sample"][:10]
    write_data(solutions, tmp_path)
    monkeypatch.setenv("CONFORMANCE_DATA_DIR", str(tmp_path))
    target = RecordedTarget(solutions, strict=False)
    options = EvaluationOptions(shots=0, filter="strict-match")
    sheet = evaluate(target, "gsm8k", checkpoint="recorded", options=options)
    assert sheet.counts()["unparsable"] == 10
