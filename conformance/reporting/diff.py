"""Two texts side by side, with what is missing and what is extra marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import regex
from markupsafe import Markup

from conformance.reporting.text import MARKER, visible

_WORDS = regex.compile(rf"{MARKER.pattern}|\w+|\s|.", regex.V1 | regex.DOTALL)
_MOST_WORK = 160_000
"""Product of the two lengths above which `SequenceMatcher` could take seconds."""

_Opcode = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Sides:
    """Both texts as HTML: `<del>` on the left is missing on the right, `<ins>` is extra there."""

    left: Markup
    right: Markup
    shared: int
    """Characters that are the same in both."""


def compare(left: str, right: str, *, signs: bool = True) -> Sides:
    """Mark the differences between two texts, by words, or by lines where they are long.

    Args:
        left: What was expected.
        right: What came.
        signs: Give whitespace signs, as `visible` does.
    """
    a, b = _WORDS.findall(left), _WORDS.findall(right)
    if _work(a, b) > _MOST_WORK:
        a, b = left.splitlines(keepends=True), right.splitlines(keepends=True)
    codes = list(_opcodes(a, b))
    return Sides(
        _side([("del" if tag != "equal" else "", "".join(a[i:j])) for tag, i, j, _, _ in codes], signs),
        _side([("ins" if tag != "equal" else "", "".join(b[i:j])) for tag, _, _, i, j in codes], signs),
        sum(len("".join(a[i:j])) for tag, i, j, _, _ in codes if tag == "equal"),
    )


def _ends(a: Sequence[str], b: Sequence[str]) -> tuple[int, int]:
    """How many items at the start, and then at the end, are the same in both."""
    shorter = min(len(a), len(b))
    head = 0
    while head < shorter and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < shorter - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    return head, tail


def _work(a: Sequence[str], b: Sequence[str]) -> int:
    head, tail = _ends(a, b)
    return (len(a) - head - tail) * (len(b) - head - tail)


def _opcodes(a: Sequence[str], b: Sequence[str]) -> Iterable[_Opcode]:
    head, tail = _ends(a, b)
    if head:
        yield ("equal", 0, head, 0, head)
    end_a, end_b = len(a) - tail, len(b) - tail
    if (end_a - head) * (end_b - head) > _MOST_WORK:
        yield ("replace", head, end_a, head, end_b)
    else:
        matcher = SequenceMatcher(None, a[head:end_a], b[head:end_b], autojunk=False)
        for tag, i, j, k, m in matcher.get_opcodes():
            yield (tag, i + head, j + head, k + head, m + head)
    if tail:
        yield ("equal", end_a, len(a), end_b, len(b))


def _side(stretches: list[tuple[str, str]], signs: bool) -> Markup:
    stretches = [(tag, text) for tag, text in stretches if text]
    out = Markup()
    for number, (tag, text) in enumerate(stretches):
        previous = stretches[number - 1][1] if number else "\n"
        following = stretches[number + 1][1] if number + 1 < len(stretches) else "\n"
        drawn = visible(
            text,
            signs=signs,
            starts=previous.endswith("\n"),
            ends=following.startswith("\n"),
            every_space=bool(tag),
        )
        out += Markup("<{0}>{1}</{0}>").format(tag, drawn) if tag else drawn
    return out
