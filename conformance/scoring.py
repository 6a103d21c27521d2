"""Scored answers: items, the sheet that holds them, and what became of an answer.

A sheet is a JSON Lines file: a header line, then one item a line, in the order in which they were drawn. The
header says what was asked, of whom and how, so that two sheets can be compared or refused.

An answer is classified from what the scorer found in it, and before any scorer may guess: one from which
nothing can be read is `unparsable` and counts as wrong. Answers that never came are no wrong answers; they
are `refused` or `transport-error`, and counted apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from conformance.errors import ConformanceError
from conformance.records import Record

OutcomeClass = Literal["correct", "wrong", "unparsable", "truncated", "empty", "refused", "transport-error"]
"""`unparsable`: there is no answer in the text. `truncated`: it broke off at the limit of tokens. `empty`:
the model ended its turn without a word besides its thought. `refused`: the target would not take the request.
`transport-error`: the target broke, or nothing came back in time."""

OUTCOMES: tuple[OutcomeClass, ...] = get_args(OutcomeClass)
Failure = Literal["", "refused", "transport-error"]
"""Why there is no answer; empty where there is one."""

SHEET_VERSION = 1
INVALID = "[invalid]"
"""What lm-eval's filters give where they find nothing."""


_Line = TypeVar("_Line", bound=Record)


class SheetError(ConformanceError):
    """A sheet cannot be read: names the file and the line."""


class Item(Record):
    """One question, its answer, and what became of it."""

    doc_id: str
    """Stable in the split: the document's own id, or its number."""
    doc_hash: str
    """SHA-256 of the document's fields, media included."""
    prompt_hash: str
    """SHA-256 of what was asked: messages, media and whether to think. The same for every target."""
    cluster: str = ""
    """What it shares with others: MMMU's subject. Empty: it stands alone."""
    prompt: str
    """As the model read it, or the messages where a server renders them."""
    media: tuple[str, ...] = ()
    """SHA-256 of each picture or sound, in order."""
    answer: str
    """As it came, thoughts and markers included."""
    extracted: str | None
    """What the scorer read in it; None: nothing."""
    expected: str
    outcome: OutcomeClass
    tokens: int = Field(ge=0)
    """Of the answer; 0 where a server does not say."""
    finish_reason: str
    """`stop`, `length`, or a server's own word; empty where there is no answer."""
    repeats: int = Field(default=1, ge=1)
    """How often it was asked."""
    error: str = ""
    """Why there is no answer."""


class SheetHeader(Record):
    """What was asked, of whom and how."""

    type: Literal["sheet"] = "sheet"
    sheet_version: int = SHEET_VERSION
    task: str
    task_version: str
    filter: str
    """lm-eval's filter that reads the answers."""
    metric: str
    checkpoint: str
    """Name."""
    checkpoint_sha256: str
    """Of the files that decide what it says; empty where only a server knows."""
    target: str
    """Spec."""
    engine_version: str
    dtype: str
    effective: dict[str, str] = Field(default_factory=dict)
    """What the target says it ran."""
    template_sha256: str
    """Of the chat template; empty where a server has its own, or none was used."""
    thinking: bool
    shots: int = Field(ge=0)
    """Solved examples before each question."""
    max_new_tokens: int
    seed: int
    """Of the choice of examples."""
    order_seed: int
    """Of the order of the items, which also decides which ones a limit leaves."""
    limit: int | None = None
    available: int
    """Documents in the split."""
    data: dict[str, str] = Field(default_factory=dict)
    """Local files that the documents come from, with their SHA-256; empty: from the task itself or a hub."""
    lm_eval: str
    """Version."""
    harness: str
    """Version of this package."""
    torch: str = ""
    """Version of PyTorch that the target computes with, as it tells; empty where it does not."""
    commit: str | None = None
    """Of the harness, with `+dirty` where sources were changed since."""
    created: str
    """ISO 8601, UTC."""


class Sheet(Record):
    """A header and its items, in the order in which they were drawn."""

    header: SheetHeader
    items: tuple[Item, ...]

    @model_validator(mode="after")
    def _ids_are_distinct(self) -> Self:
        counts = Counter(item.doc_id for item in self.items)
        twice = [doc_id for doc_id, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"the document {twice[0]!r} is there twice")
        return self

    def counts(self) -> dict[OutcomeClass, int]:
        """How many items of each class there are, all classes named."""
        found = Counter(item.outcome for item in self.items)
        return {outcome: found[outcome] for outcome in OUTCOMES}

    def write(self, path: Path) -> None:
        """Write the file; one of that name is replaced."""
        lines = [self.header.model_dump_json(), *(item.model_dump_json() for item in self.items)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Sheet:
        """Read a file.

        Raises:
            SheetError: it cannot be read, or a line of it is no header or no item.
        """
        try:
            # Not `splitlines`: answers hold other characters that it takes for the end of a line.
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SheetError(f"{path}: cannot be read: {error}") from error
        if lines == [""]:
            raise SheetError(f"{path}: empty; a sheet begins with a header line")
        header = _read(path, 1, lines[0], SheetHeader)
        items = [_read(path, number, line, Item) for number, line in enumerate(lines[1:], start=2)]
        try:
            return cls(header=header, items=tuple(items))
        except ValidationError as error:
            raise SheetError(f"{path}: {error.errors()[0]['msg']}") from error


def classify(*, content: str, finish_reason: str, extracted: str | None, correct: bool) -> OutcomeClass:
    """What became of an answer that came.

    Args:
        content: What the model said, without its thought.
        finish_reason: `length` where the answer broke off.
        extracted: What the scorer read in it; None: nothing.
        correct: Whether the scorer takes that for right. It does not count where nothing was read.
    """
    if extracted is not None and correct:
        return "correct"
    if finish_reason == "length":
        return "truncated"
    if not content.strip():
        return "empty"
    return "unparsable" if extracted is None else "wrong"


def read_extracted(filtered: Any) -> str | None:
    """What a filter of lm-eval found; None where it says that there is nothing."""
    if isinstance(filtered, Sequence) and not isinstance(filtered, str):
        filtered = filtered[0] if filtered else INVALID
    text = str(filtered).strip()
    return None if text in ("", INVALID) else text


def _read(path: Path, number: int, line: str, kind: type[_Line]) -> _Line:
    """A line of a sheet."""
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise SheetError(f"{path}:{number}: expected a JSON object, found {type(found).__name__}")
        version = found.get("sheet_version", SHEET_VERSION)
        if version != SHEET_VERSION:
            raise SheetError(
                f"{path}:{number}: a sheet of version {version}; this harness reads version {SHEET_VERSION}"
            )
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise SheetError(f"{path}:{number}: {field or kind.__name__}: {first['msg']}") from error
    except ValueError as error:
        raise SheetError(f"{path}:{number}: no JSON: {error}") from error
