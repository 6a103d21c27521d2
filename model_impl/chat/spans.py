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
        self._role: Role | None = None
        self._reason = ""
        self._start = 0
        self._end = 0

    def add(self, role: Role, length: int, reason: str = "") -> None:
        """The next `length` characters of the output got this role."""
        if not self._enabled or length == 0:
            return
        if role != self._role or reason != self._reason or role == "marker":
            self._spans += self._last()
            self._role, self._reason, self._start = role, reason, self._end
        self._end += length

    def spans(self) -> tuple[Span, ...]:
        """All spans so far; together they cover the characters settled so far without gap or overlap."""
        return (*self._spans, *self._last())

    def _last(self) -> tuple[Span, ...]:
        """The span that may still grow, if there is one."""
        return (Span(self._start, self._end, self._role, self._reason),) if self._role is not None else ()
