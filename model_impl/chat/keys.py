"""Keys of tool-call arguments that are written without string delimiters."""

from __future__ import annotations

import json
from io import StringIO


class KeyText:
    """A bare key while it is read: text up to a separator, trimmed, in ASCII quotes or not.

    A separator inside quotes belongs to the key, if the quotes close. Until they do it is only held:
    when the member ends first, the quote was text and the held separator counts after all.
    """

    __slots__ = ("_closed", "_held_at", "_length", "_quote", "_text", "blank")

    def __init__(self, text: str = "") -> None:
        self._text = StringIO()
        self._length = 0
        self.blank = True
        self._quote = ""
        self._closed = False
        self._held_at = -1
        if text:
            self.add(text)

    def add(self, text: str) -> None:
        """Append text of the key."""
        self._text.write(text)
        self._length += len(text)
        if self.blank:
            text = text.lstrip()
            if not text:
                return
            self.blank = False
            if text[0] in "\"'":
                self._quote, text = text[0], text[1:]
        self._closed = self._closed or self._quote in text

    def hold(self, separator: str) -> bool:
        """A separator was met: take it as text if the key's quotes are open, and say whether they are."""
        if not self._quote or self._closed:
            return False
        if self._held_at < 0:
            self._held_at = self._length
        self.add(separator)
        return True

    def split(self) -> tuple[str, str] | None:
        """Key and value text around the first held separator, if the quotes never closed."""
        if self._held_at < 0 or self._closed:
            return None
        text = self._text.getvalue()
        return text[: self._held_at].strip(), text[self._held_at + 1 :]

    def raw(self) -> str:
        """The text as written."""
        return self._text.getvalue()

    def name(self) -> str:
        """The key: trimmed, and without the quotes around it."""
        key = self._text.getvalue().strip()
        if len(key) >= 2 and key[0] == key[-1] and key[0] in "\"'":
            return unescape(key[1:-1]) if key[0] == '"' else key[1:-1]
        return key


def unescape(raw: str) -> str:
    """Undo JSON escapes; text that is no valid JSON string body stays as it is."""
    if "\\" not in raw:
        return raw
    try:
        text = json.loads(f'"{raw}"', strict=False)
    except json.JSONDecodeError:
        return raw
    return text if isinstance(text, str) else raw
