"""Where every character of an output went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["reasoning", "content", "call_name", "call_arguments", "marker", "dropped"]


@dataclass(frozen=True)
class Span:
    """Characters `[start, end)` of the output and what became of them; `reason` only when dropped."""

    start: int
    end: int
    role: Role
    reason: str = ""


class SpanLog:
    """Collects spans in input order, neighbours of one kind merged. Keeps nothing when switched off."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._spans: list[Span] = []
        self._position = 0

    def add(self, role: Role, length: int, reason: str = "") -> None:
        """The next `length` characters of the output got this role."""
        if not self._enabled or length == 0:
            return
        start, self._position = self._position, self._position + length
        if self._spans:
            last = self._spans[-1]
            if (last.role, last.reason) == (role, reason) and role != "marker":
                self._spans[-1] = Span(last.start, self._position, role, reason)
                return
        self._spans.append(Span(start, self._position, role, reason))

    def spans(self) -> tuple[Span, ...]:
        """All spans so far; together they cover the characters settled so far without gap or overlap."""
        return tuple(self._spans)
