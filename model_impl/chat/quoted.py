"""Argument values in ASCII quotes, which models write instead of string delimiters."""

from __future__ import annotations

import re
from io import StringIO

from model_impl.chat.keys import unescape

QUOTED_STOP = {'"': re.compile(r'["\\]'), "'": re.compile(r"'")}
"""What needs a look inside each kind of quote: its end, and where there are escapes their start."""

Run = tuple[str, bool]
"""Text, or a marker (True)."""


class QuotedText:
    """A quoted value while it is read, and what followed a quote that may have been its last.

    Whether a quote closes the value is known only from what follows it, so everything is held: if no
    quote ever does, the text must be read again as that of a bare value, markers included.

    Args:
        quote: The opening quote.
    """

    __slots__ = ("_blanks", "_escaped", "_markers", "_text", "quote")

    def __init__(self, quote: str) -> None:
        self.quote = quote
        self._text = StringIO()
        self._blanks = StringIO()
        self._markers: list[tuple[int, int]] = []
        self._escaped = False

    def read(self, text: str, position: int) -> tuple[int, bool]:
        """Read from `position`; return where it stopped, and whether behind a quote that may close."""
        if self._escaped:
            self._text.write(text[position])
            self._escaped = False
            return position + 1, False
        match = QUOTED_STOP[self.quote].search(text, position)
        if match is None:
            self._text.write(text[position:])
            return len(text), False
        self._text.write(text[position : match.start()])
        if match.group() == self.quote:
            return match.end(), True
        self._text.write(match.group())
        self._escaped = True
        return match.end(), False

    def add_marker(self, marker: str) -> None:
        """A marker inside the quotes is text, as long as they close."""
        self._markers.append((self._text.tell(), len(marker)))
        self._text.write(marker)
        self._escaped = False

    def add_blanks(self, blanks: str) -> None:
        """Blanks behind the quote that may close."""
        self._blanks.write(blanks)

    def go_on(self) -> None:
        """No separator followed the quote, so it is part of the value, and so are the blanks behind it."""
        self._text.write(self.quote + self._blanks.getvalue())
        self._blanks = StringIO()

    @property
    def length(self) -> int:
        """Characters from the opening quote to the blanks behind the closing one."""
        return len(self.quote) * 2 + self._text.tell() + self._blanks.tell()

    def value(self) -> str:
        """The text between the quotes; double quotes have JSON's escapes."""
        text = self._text.getvalue()
        return unescape(text) if self.quote == '"' else text

    def runs(self) -> list[Run]:
        """The text from the opening quote on as it was written, with the markers in it."""
        text = self._text.getvalue()
        runs: list[Run] = [(self.quote, False)]
        position = 0
        for start, length in self._markers:
            runs += [(text[position:start], False), (text[start : start + length], True)]
            position = start + length
        return [*runs, (text[position:], False)]
