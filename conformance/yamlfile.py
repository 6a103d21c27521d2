"""YAML as the harness reads it: JSON data with line numbers, and nothing that surprises.

1. Scalars follow the core schema of YAML 1.2, so `2026-01-31` is text. Plain words that YAML 1.1 and
   1.2 read differently (`no`, `007`, `12:30`) are refused: the suites are about types.
2. Mapping keys are text as written. Duplicate keys, tags and non-finite numbers are refused.
3. Size, depth and the number of values after expansion of aliases are limited.
4. Every error is a `SuiteError` with file, line and field.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from conformance.errors import SuiteError

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 200
MAX_VALUES = 200_000
_MAX_ERRORS = 10
_MAX_NAME = 120

Loc = tuple[str | int, ...]
T = TypeVar("T", bound=BaseModel)

_NULL = re.compile(r"^(~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_AMBIGUOUS = re.compile(
    r"^((?i:yes|no|on|off)"  # booleans in YAML 1.1
    r"|[-+]?0[0-9]+|[-+]?0[xob][0-9a-fA-F]+"  # octal and other bases
    r"|[-+]?[0-9][0-9_]*_[0-9_]*"  # digit groups
    r"|[-+]?[0-9]+(:[0-5]?[0-9])+"  # base 60
    r"|[-+]?\.(?i:inf|nan)|\.(?i:nan))$"
)


@dataclass
class _Open:
    """A mapping or sequence whose end has not been read yet."""

    value: dict[str, Any] | list[Any]
    loc: Loc
    anchor: str | None
    values_before: int
    key: str | None = None
    depth: int = 1


@dataclass
class Document:
    """One parsed file: plain JSON data, and the line on which each value starts."""

    path: Path
    text: str
    value: Any = None
    lines: dict[Loc, int] = field(default_factory=dict)

    def line(self, loc: Loc) -> int:
        """Line of the value at `loc`, or of its nearest enclosing value."""
        while loc not in self.lines:
            if not loc:
                return 1
            loc = loc[:-1]
        return self.lines[loc]

    def error(self, loc: Loc, message: str) -> SuiteError:
        """Error at a place in this file."""
        name = _dotted(loc)
        return SuiteError(f"{self.path}:{self.line(loc)}: {f'{name}: ' if name else ''}{message}")

    def validate(self, model: type[T]) -> T:
        """Validate as JSON in strict mode: no text is read as a number or a boolean.

        Raises:
            SuiteError: with one line for each of the first errors.
        """
        try:
            return model.model_validate_json(json.dumps(self.value), strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False)
        # A list whose items are all broken is called too short as well: say only what is broken.
        details = [d for d in details if d["type"] != "too_short" or not d["input"]] or details
        messages = {str(self.error(self._existing(d["loc"]), _explain(d, model))): None for d in details}
        lines = list(messages)
        if len(lines) > _MAX_ERRORS:
            lines = [*lines[:_MAX_ERRORS], f"{self.path}: … and {len(lines) - _MAX_ERRORS} more errors"]
        raise SuiteError("\n".join(lines))

    def _existing(self, loc: tuple[int | str, ...]) -> Loc:
        """Drop the parts of a pydantic location that name types rather than places."""
        at, found = self.value, []
        for part in loc:
            if (isinstance(at, dict) and part in at) or (
                isinstance(at, list) and isinstance(part, int) and part < len(at)
            ):
                at = at[part]  # type: ignore[index]
                found.append(part)
        return tuple(found)


_WORDS = {
    "Input should be": "expected",
    "String should": "the text should",
    "Tuple should": "the list should",
    "a valid array": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
}
"""Pydantic's words, in the words of YAML."""


def read(path: Path) -> Document:
    """Read one YAML file.

    Raises:
        SuiteError: not readable, not UTF-8, too large, or not the YAML that this module admits.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise SuiteError(f"{path}: larger than {MAX_BYTES // 1024**2} MiB; split it into several files")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise SuiteError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8") from None
    document = Document(path, text)
    try:
        _build(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise SuiteError(f"{where}: not valid YAML: {problem}") from None
    return document


def _build(document: Document) -> None:
    """Fill `document` from parser events; a loop, so that nesting cannot exhaust the stack."""
    stack: list[_Open] = []
    anchors: dict[str, tuple[Any, int, int]] = {}  # value, number of values in it, depth
    documents = values = 0
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    event: Any
    for event in yaml.parse(document.text, Loader=loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise SuiteError(f"{document.path}:{line}: a second YAML document; keep one per file")
        if isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            if stack:
                stack[-1].depth = max(stack[-1].depth, done.depth + 1)
            if done.anchor:
                anchors[done.anchor] = (done.value, values - done.values_before, done.depth)
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        top = stack[-1] if stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            top.key = _key(document, top, event, line)
            continue
        loc = _place(top)
        document.lines.setdefault(loc, line)
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise document.error(loc, f"the tag {tag} is not allowed; quote a value to make it text")
        values += 1
        depth = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise document.error(loc, f"alias *{event.anchor} has no complete anchor before it")
            value, size, depth = anchors[event.anchor]
            values += size
        elif isinstance(event, yaml.ScalarEvent):
            value = _scalar(document, loc, event)
            if event.anchor:
                anchors[event.anchor] = (value, 1, 0)
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
            depth = 1
        if len(stack) + depth > MAX_DEPTH:
            raise document.error(loc, f"nested deeper than {MAX_DEPTH} levels")
        if values > MAX_VALUES:
            raise document.error(loc, f"more than {MAX_VALUES} values with aliases expanded; split the file")
        _add(document, top, value)
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(_Open(value, loc, event.anchor, values - 1))
        elif top is not None:
            top.depth = max(top.depth, depth + 1)
    if documents == 0 or document.value is None:
        raise SuiteError(f"{document.path}:1: the file is empty; see docs/writing-a-suite.md")


def _key(document: Document, top: _Open, event: yaml.NodeEvent, line: int) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise SuiteError(f"{document.path}:{line}: a mapping key must be plain text")
    key: str = event.value
    if key in top.value:
        first = document.lines[(*top.loc, key)]
        raise SuiteError(
            f"{document.path}:{line}: {_dotted((*top.loc, key))}: "
            f"duplicate key, first given on line {first}; remove one"
        )
    document.lines[(*top.loc, key)] = line
    return key


def _place(top: _Open | None) -> Loc:
    if top is None:
        return ()
    if isinstance(top.value, list):
        return (*top.loc, len(top.value))
    assert top.key is not None
    return (*top.loc, top.key)


def _add(document: Document, top: _Open | None, value: Any) -> None:
    if top is None:
        document.value = value
    elif isinstance(top.value, list):
        top.value.append(value)
    else:
        assert top.key is not None
        top.value[top.key] = value
        top.key = None


def _scalar(document: Document, loc: Loc, event: yaml.ScalarEvent) -> Any:
    text: str = event.value
    if not event.implicit[0]:  # quoted or block: text
        return text
    if _AMBIGUOUS.match(text):
        raise document.error(
            loc, f"{text} means different things in YAML 1.1 and 1.2; quote it, or write it in JSON's way"
        )
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    try:
        if _INT.match(text):
            return int(text)
        number = float(text) if _FLOAT.match(text) else None
    except ValueError as error:
        raise document.error(loc, f"{error}; quote it") from None
    if number is None:
        return text
    if not math.isfinite(number):
        raise document.error(loc, f"{text} is too large for a JSON number; quote it")
    return number


def _dotted(loc: Loc) -> str:
    """`cases[3].expect.content`."""
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return shown if len(shown) <= _MAX_NAME else f"{shown[:_MAX_NAME]}…"


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One pydantic error in the words of somebody who edits YAML."""
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        *parents, key = detail["loc"]
        known = sorted({name for cls in _models_at(model, tuple(parents)) for name in cls.model_fields})
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        return f"unknown key; {hint}known here: {', '.join(known)}"
    if kind == "missing":
        return f"the key `{detail['loc'][-1]}` is required and missing"
    message = detail["msg"].removeprefix("Value error, ")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    if kind == "value_error" or isinstance(value, dict | list):
        return message
    shown = json.dumps(value, ensure_ascii=False)
    return f"{message}, got {shown if len(shown) <= 80 else shown[:79] + '…'}"


def _models_at(annotation: Any, loc: tuple[int | str, ...]) -> set[type[BaseModel]]:
    """Models that a place in the data may hold."""
    models = set(_flatten(annotation))
    for part in loc:
        # List indices and the names of union members stay on the same models.
        deeper = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if deeper:
            models = {cls for item in deeper for cls in _flatten(item)}
    return models


def _flatten(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _flatten(argument)
