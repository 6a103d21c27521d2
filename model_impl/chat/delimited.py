"""Argument values between string delimiters."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO

from model_impl.chat.schema import Node, may_cast_quoted, quote, type_quoted

_TAIL = " \t\r\n}])"
"""What may stand between the last character of an unclosed string and the end of its call."""


class DelimitedText:
    """A delimited string while it is read.

    Brackets and blanks at its end are held until more follows: if the delimiter never comes, the call
    may have ended on them.

    Args:
        node: Schema of the value, or None.
    """

    __slots__ = ("_held", "_node", "_tail", "live")

    def __init__(self, node: Node | None) -> None:
        self._node = node
        self._held = StringIO()
        self._tail = StringIO()
        self.live = not may_cast_quoted(node)
        """Whether the value is a string for certain, so that it can be written while it is read."""

    def add(self, text: str) -> str:
        """Read text; return what became certain, in JSON."""
        certain = text.rstrip(_TAIL)
        json = ""
        if certain:
            json = self._write(self._tail.getvalue() + certain)
            self._tail = StringIO()
        self._tail.write(text[len(certain) :])
        return json

    def add_blanks(self, blanks: str) -> None:
        """Blanks that belong to the string, read before it was known to be one."""
        self._tail.write(blanks)

    def ends_with(self, closer: str) -> bool:
        """Whether the text so far ends on a bracket."""
        return self._tail.getvalue().rstrip().endswith(closer)

    def give_back(self, closers: Iterable[str]) -> bool:
        """Take brackets off the end, the innermost first; return whether all were there.

        Args:
            closers: The brackets that are still to come.
        """
        tail = self._tail.getvalue()
        end, complete = len(tail), True
        for closer in closers:
            last = end - 1
            while last >= 0 and tail[last].isspace():
                last -= 1
            if last < 0 or tail[last] != closer:
                complete = False
                break
            end = last
        self._tail = StringIO()
        self._tail.write(tail[:end])
        return complete

    def close(self) -> str:
        """The rest of the value, in JSON."""
        rest = self._write(self._tail.getvalue())
        return f'{rest}"' if self.live else type_quoted(self._held.getvalue(), self._node)

    def _write(self, text: str) -> str:
        if self.live:
            return quote(text)[1:-1]
        self._held.write(text)
        return ""
