"""Comparing what targets say: JSON by value, text by its trimmed form."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any


def load_json(text: str, *, repeats: bool = False) -> Any:
    """Parse JSON with every number exact (`Decimal`), refusing NaN and Infinity.

    Args:
        text: The JSON.
        repeats: Let an object have a key twice; the last value counts, as for most readers.

    Raises:
        ValueError: The text is not JSON, nests too deeply to be read, has an object with a key twice
            (readers differ in which one counts), or holds a number beyond any range.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def exact(number: str) -> Decimal:
        try:
            return Decimal(number)
        except InvalidOperation:
            raise ValueError(f"the exponent of {number[:40]} is beyond any range") from None

    def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(members)
        if len(found) < len(members):
            keys = [key for key, _ in members]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice[:40]!r} is given twice")
        return found

    try:
        return json.loads(
            text,
            parse_float=exact,
            parse_int=exact,
            parse_constant=refuse,
            object_pairs_hook=None if repeats else unique,
        )
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None


def json_equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: numbers by exact value (5 == 5.0), booleans never equal numbers."""
    stack = [(a, b)]
    while stack:
        x, y = stack.pop()
        if isinstance(x, bool) or isinstance(y, bool) or x is None or y is None:
            if x is not y:
                return False
        elif isinstance(x, int | float | Decimal) and isinstance(y, int | float | Decimal):
            if _exact(x) != _exact(y):
                return False
        elif isinstance(x, dict) and isinstance(y, dict):
            if x.keys() != y.keys():
                return False
            stack.extend((x[k], y[k]) for k in x)
        elif isinstance(x, list | tuple) and isinstance(y, list | tuple):
            if len(x) != len(y):
                return False
            stack.extend(zip(x, y, strict=True))
        elif type(x) is not type(y) or x != y:
            return False
    return True


def _exact(number: float | Decimal) -> Decimal:
    return Decimal(repr(number)) if isinstance(number, float) else Decimal(number)


def same_text(a: str | None, b: str | None) -> bool:
    """Equality after trimming; None and "" are the same absence (catalogue X11)."""
    return (a or "").strip() == (b or "").strip()


_ONE_STRING = re.compile(r'\s*"(?:[^"\\]|\\.)*"', re.DOTALL)
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")


def complete_json(text: str) -> str:
    """Close the strings and brackets that a cut JSON text left open.

    Servers send the arguments of a call that was cut by the token limit as cut JSON; closing it makes
    it comparable. Text that is complete, or broken in another way, comes back unchanged. A cut key that is
    so far an earlier key of its object is left out.
    """
    stack: list[str] = []
    in_string = escaped = False
    escape_at = 0
    comma_at = -1
    for position, char in enumerate(text):
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
                escape_at = position
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{[":
            stack.append("}" if char == "{" else "]")
        elif char in "}]" and stack:
            stack.pop()
        elif char == ",":
            comma_at = position
    closed = text
    if in_string:
        closed = (text[:escape_at] if _CUT_ESCAPE.fullmatch(text, escape_at) else text) + '"'
    closers = "".join(reversed(stack))
    if not closers:
        return closed
    body = closed.rstrip().rstrip(",")
    candidates = [body, body + ":null", body + "null"]
    if comma_at >= 0 and _ONE_STRING.fullmatch(body, comma_at + 1):
        candidates.append(body[:comma_at])
    for candidate in candidates:
        try:
            load_json(candidate + closers)
        except ValueError:
            continue
        return candidate + closers
    return text
