"""Values of a run made into text: blocks, named fields, JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from conformance.reporting.text import LONG_TEXT, shorten, visible

_PREVIEW = 600
_MANY_LINES = 80
_MANY_BLOCKS = 20
_LINE = 88


@dataclass(frozen=True)
class Block:
    """A stretch of text, drawn; a long one also has its beginning, to be shown while it is folded."""

    html: Markup
    characters: int
    lines: int
    preview: Markup | None = None
    left_out: int = 0


@lru_cache(maxsize=64)
def block(text: str, *, signs: bool = True) -> Block:
    """Draw a text; `signs` as in `visible`. Targets of one case mostly say the same, hence the cache."""
    shown, left_out = shorten(text)
    lines = text.count("\n") + 1
    preview = None
    if len(text) > LONG_TEXT or lines > _MANY_LINES:
        head = "\n".join(text[:_PREVIEW].split("\n")[:12])
        preview = visible(head, signs=signs, ends=False)
    return Block(visible(shown, signs=signs), len(text), lines, preview, left_out)


@dataclass(frozen=True)
class Field:
    """A named part of an answer."""

    name: str
    blocks: tuple[Block, ...]
    """Several for a list of texts."""


def is_empty(value: Any) -> bool:
    """An absent field: None, "" and empty lists mean the same (numbers and False are values)."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def as_text(value: Any, *, fit: bool = False) -> str:
    """A value for people: text as it is, tool calls as name and arguments, the rest as JSON.

    Args:
        value: Any JSON value.
        fit: Keep JSON on one line where it fits. Without, its layout does not depend on its length, so
            that two values can be compared line by line.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if _are_calls(value):
        return "\n".join(f"{call['name']} {_arguments(call['arguments'], fit=fit)}" for call in value)
    return laid_out(value, fit=fit)


def _are_calls(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(call, dict) and set(call) == {"name", "arguments"} for call in value)
    )


def _arguments(value: Any, *, fit: bool) -> str:
    """Arguments come as JSON text from engines and as a mapping from suites; draw both alike."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return str(value)
    return laid_out(value, fit=fit)


def laid_out(value: Any, *, fit: bool, sort: bool = True, indent: int = 0) -> str:
    """JSON on several lines; lists of numbers always stay on one."""
    line = json.dumps(value, ensure_ascii=False, sort_keys=sort, default=str)
    nested = isinstance(value, dict | list | tuple) and bool(value)
    if not nested or (fit and indent + len(line) <= _LINE):
        return line
    if isinstance(value, dict):
        keys = sorted(value, key=str) if sort else list(value)
        parts = [
            f"{json.dumps(str(key), ensure_ascii=False)}: "
            + laid_out(value[key], fit=fit, sort=sort, indent=indent + 2)
            for key in keys
        ]
        opened, closed = "{}"
    else:
        if all(isinstance(item, int | float) for item in value):
            return line
        parts = [laid_out(item, fit=fit, sort=sort, indent=indent + 2) for item in value]
        opened, closed = "[]"
    pad = " " * indent
    return f"{opened}\n" + ",\n".join(f"{pad}  {part}" for part in parts) + f"\n{pad}{closed}"


def fields(value: Any, *, skip: tuple[str, ...] = ()) -> list[Field]:
    """The parts of an answer that are there; a value without parts is one field without a name.

    Answers that were given for several families are set out family by family, equal ones together.
    """
    if isinstance(value, dict) and value and all(isinstance(part, dict) for part in value.values()):
        return [
            Field(f"{name}: {field.name}", field.blocks)
            for name, part in _families(value)
            for field in fields(part, skip=skip)
        ]
    if isinstance(value, dict):
        return [
            Field(str(key), _blocks(part))
            for key, part in value.items()
            if not is_empty(part) and key not in skip
        ]
    return [] if is_empty(value) else [Field("", _blocks(value))]


def _families(value: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    alike: dict[str, list[str]] = {}
    for name, part in value.items():
        alike.setdefault(laid_out(part, fit=True), []).append(name)
    return [(", ".join(names), value[names[0]]) for names in alike.values()]


def _blocks(value: Any) -> tuple[Block, ...]:
    if (
        isinstance(value, list | tuple)
        and len(value) <= _MANY_BLOCKS
        and all(isinstance(v, str) for v in value)
    ):
        return tuple(block(text) for text in value)
    return (block(as_text(value, fit=True), signs=isinstance(value, str)),)
