"""Classes of answers, and the sheet's file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from conformance.scoring import (
    OUTCOMES,
    Item,
    OutcomeClass,
    Sheet,
    SheetError,
    SheetHeader,
    classify,
    read_extracted,
)

HEADER = SheetHeader(
    task="t",
    task_version="1.0",
    filter="strict-match",
    metric="exact_match",
    checkpoint="c",
    checkpoint_sha256="0" * 64,
    target="reference",
    engine_version="1",
    dtype="float32",
    template_sha256="1" * 64,
    thinking=True,
    shots=0,
    max_new_tokens=8,
    seed=0,
    order_seed=0,
    available=2,
    lm_eval="0",
    harness="0",
    created="2026-01-01T00:00:00+00:00",
)


def item(doc_id: str, **changes: Any) -> Item:
    fields: dict[str, Any] = {
        "doc_id": doc_id,
        "doc_hash": "2" * 64,
        "prompt_hash": "3" * 64,
        "prompt": "1+1?",
        "answer": "zwei é\u2028\x85 2",
        "extracted": "2",
        "expected": "2",
        "outcome": "correct",
        "tokens": 3,
        "finish_reason": "stop",
    }
    return Item(**(fields | changes))


@pytest.mark.parametrize(
    ("content", "finish_reason", "extracted", "correct", "outcome"),
    [
        ("#### 2", "stop", "2", True, "correct"),
        ("#### 2", "length", "2", True, "correct"),
        ("#### 3", "stop", "3", False, "wrong"),
        ("#### 3", "length", "3", False, "truncated"),
        ("", "length", None, False, "truncated"),
        (" \n", "stop", None, False, "empty"),
        ("no idea", "stop", None, False, "unparsable"),
        ("no idea", "stop", None, True, "unparsable"),  # a scorer that guessed right
    ],
)
def test_classes(
    content: str, finish_reason: str, extracted: str | None, correct: bool, outcome: OutcomeClass
) -> None:
    found = classify(content=content, finish_reason=finish_reason, extracted=extracted, correct=correct)
    assert found == outcome


@pytest.mark.parametrize(
    ("filtered", "read"),
    [(["42"], "42"), ("42", "42"), (["[invalid]"], None), ([], None), (["  "], None), ([7], "7")],
)
def test_what_a_filter_found(filtered: Any, read: str | None) -> None:
    assert read_extracted(filtered) == read


def test_a_sheet_comes_back_as_it_was(tmp_path: Path) -> None:
    sheet = Sheet(header=HEADER, items=(item("b"), item("a", outcome="wrong", extracted=None)))
    sheet.write(tmp_path / "sheet.jsonl")
    assert Sheet.read(tmp_path / "sheet.jsonl") == sheet
    assert [each.doc_id for each in sheet.items] == ["b", "a"]
    assert tuple(sheet.counts()) == OUTCOMES
    assert {name: count for name, count in sheet.counts().items() if count} == {"correct": 1, "wrong": 1}


def test_a_document_is_there_once() -> None:
    with pytest.raises(ValidationError, match="'a' is there twice"):
        Sheet(header=HEADER, items=(item("a"), item("a")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [], "empty"),
        (lambda lines: lines[1:], r"sheet.jsonl:1: task: Field required"),
        (lambda lines: [*lines[:2], lines[2][:-5]], r"sheet.jsonl:3: no JSON"),
        (lambda lines: [lines[0], "[]"], r"sheet.jsonl:2: expected a JSON object, found list"),
        (lambda lines: [lines[0], lines[1].replace('"correct"', '"fine"')], r"sheet.jsonl:2: outcome: "),
        (lambda lines: [*lines, lines[1]], "is there twice"),
        (
            lambda lines: [lines[0].replace('"sheet_version":1', '"sheet_version":2'), *lines[1:]],
            "version 2; this harness reads version 1",
        ),
    ],
)
def test_a_broken_sheet_says_where(spoil: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sheet.jsonl"
    Sheet(header=HEADER, items=(item("a"), item("b"))).write(path)
    path.write_text("\n".join(spoil(path.read_text(encoding="utf-8").split("\n")[:-1])), encoding="utf-8")
    with pytest.raises(SheetError, match=message):
        Sheet.read(path)


def test_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(SheetError, match="cannot be read"):
        Sheet.read(tmp_path / "nowhere.jsonl")


def test_the_command_line_does_not_load_lm_eval() -> None:
    """It takes seconds that most commands need not spend."""
    heavy = ("lm_eval", "datasets", "torch")
    code = f"import sys, conformance.cli, conformance.plugin; print(set({heavy}) & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
