"""Gemma 4's protocol markers, and the lexer that finds them in a stream of text.

Source: the vocabulary's control tokens (fact sheet section 1.5) and the output grammar (section 6.4).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

CHANNEL_OPEN = "<|channel>"
CHANNEL_CLOSE = "<channel|>"
CALL_OPEN = "<|tool_call>"
CALL_CLOSE = "<tool_call|>"
CALL_OPEN_DRIFTED = "<|tool_call|>"
"""No token of the vocabulary: small checkpoints write it, from ordinary tokens, for `CALL_OPEN`."""
QUOTE = '<|"|>'
TURN_OPEN = "<|turn>"
TURN_CLOSE = "<turn|>"
RESPONSE_OPEN = "<|tool_response>"
RESPONSE_CLOSE = "<tool_response|>"

CALL_ENDING = frozenset({CALL_CLOSE, CALL_OPEN, TURN_CLOSE, TURN_OPEN, RESPONSE_OPEN, "<eos>"})
"""Markers after which no argument text of the current call can follow."""

_FIXED = (
    CHANNEL_OPEN,
    CHANNEL_CLOSE,
    CALL_OPEN,
    CALL_CLOSE,
    CALL_OPEN_DRIFTED,
    QUOTE,
    TURN_OPEN,
    TURN_CLOSE,
    RESPONSE_OPEN,
    RESPONSE_CLOSE,
    "<eos>",
    "<bos>",
    "<pad>",
)
_UNUSED = "<unused"
_UNUSED_DIGITS = 4
_MARKER = re.compile("|".join(re.escape(m) for m in _FIXED) + rf"|{_UNUSED}[0-9]{{1,{_UNUSED_DIGITS}}}>")
_PREFIXES = frozenset(
    {m[:k] for m in (*_FIXED, _UNUSED) for k in range(1, len(m))} | {_UNUSED},
)
_UNUSED_PREFIX = re.compile(rf"{_UNUSED}[0-9]{{0,{_UNUSED_DIGITS}}}\Z")
_LONGEST = max(len(m) for m in _FIXED)

Tokens = Literal["unknown", "control", "ordinary"]
"""What the text was decoded from: `control` tokens, `ordinary` tokens, or not known (plain text)."""


def is_marker_prefix(text: str) -> bool:
    """Whether `text` is the beginning, but not the whole, of some marker."""
    return text in _PREFIXES or _UNUSED_PREFIX.match(text) is not None


class Lexer:
    """Cuts a stream into text runs and markers, the same way wherever the stream is cut.

    Holds back at most one marker's length of text: a suffix that may still become a marker.
    """

    __slots__ = ("_held", "_held_tokens")

    def __init__(self) -> None:
        self._held = ""
        self._held_tokens: Tokens = "unknown"

    def feed(self, text: str, tokens: Tokens) -> Iterator[tuple[str, bool, Tokens]]:
        """Yield `(text, is_marker, tokens)` in order.

        Text of ordinary tokens holds no markers but the drifted opener, which has no token of its
        own. A held prefix is given up where the kind of token changes, because a marker is one token.
        """
        if self._held and tokens != self._held_tokens:
            yield from self.flush()
        if self._held:
            text = self._held + text
            self._held = ""
        self._held_tokens = tokens
        position = 0
        for match in _MARKER.finditer(text):
            marker = match.group()
            if tokens == "ordinary" and marker != CALL_OPEN_DRIFTED:
                continue
            if match.start() > position:
                yield text[position : match.start()], False, tokens
            yield marker, True, tokens
            position = match.end()
        rest = self._hold(text, position, tokens)
        if position < rest:
            yield text[position:rest], False, tokens

    def flush(self) -> Iterator[tuple[str, bool, Tokens]]:
        """Give up what is held: no marker came of it."""
        if self._held:
            held, self._held = self._held, ""
            yield held, False, self._held_tokens

    def _hold(self, text: str, position: int, tokens: Tokens) -> int:
        """Keep the longest suffix of `text[position:]` that may become a marker; return its start."""
        start = text.find("<", max(position, len(text) - _LONGEST))
        while start != -1:
            suffix = text[start:]
            viable = (
                is_marker_prefix(suffix) if tokens != "ordinary" else CALL_OPEN_DRIFTED.startswith(suffix)
            )
            if viable:
                self._held = suffix
                return start
            start = text.find("<", start + 1)
        return len(text)
