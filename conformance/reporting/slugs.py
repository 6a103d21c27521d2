"""Names from a run file made into file names and anchors."""

from __future__ import annotations

import hashlib
import re

_UNSAFE = re.compile(r"[^a-z0-9]+")
_LONGEST = 80


def slug(name: str) -> str:
    """A name reduced to `a-z`, `0-9` and `-`: never empty, and unable to leave the folder it is put in."""
    text = _UNSAFE.sub("-", name.lower()).strip("-")
    return text if 0 < len(text) <= _LONGEST else _hashed(text, name)


def _hashed(text: str, name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{text[:_LONGEST].strip('-')}-{digest}".strip("-")


class Slugs:
    """Gives each name its own slug; a name whose slug is taken gets a digest added."""

    def __init__(self) -> None:
        self._by_name: dict[str, str] = {}
        self._taken: set[str] = set()

    def __getitem__(self, name: str) -> str:
        """The slug of a name, always the same one."""
        if name not in self._by_name:
            text = slug(name)
            while text in self._taken:
                text = _hashed(text, text + name)
            self._by_name[name] = text
            self._taken.add(text)
        return self._by_name[name]
