"""Patterns of an adapter's configuration, which come from strangers: a set of them has a limit of time.

A configuration can hold hundreds of patterns, each asked for hundreds of modules. Honest matches cost next to
nothing: what they take is not counted, and a plain name is compared without a regular expression.
"""

from __future__ import annotations

import re
import time

import regex

from model_impl.errors import ConfigError

_SECONDS = 2.0
"""Of computing, for all that one configuration's patterns are asked; other processes' time is not in it."""
_FREE = 1e-4
"""Seconds of each match that are not counted. An honest one takes microseconds."""
_LONGEST = 10_000
"""Characters of a pattern."""
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


class Patterns:
    """Matches names with regular expressions within a limit of time.

    Args:
        where: The file that they come from, for errors.
        seconds: For all matches together.
    """

    def __init__(self, where: str, seconds: float = _SECONDS) -> None:
        self._where = where
        self._left = seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def matches(self, pattern: str, name: str, key: str) -> bool:
        """Whether a pattern matches a whole name.

        Args:
            pattern: A regular expression.
            name: Of a module.
            key: Of the configuration, for errors.

        Raises:
            ConfigError: it is no regular expression, is too long, or takes too much time.
        """
        return self._match(pattern, name, key) is not None

    def ends(self, pattern: str, name: str, key: str) -> bool:
        """Whether a pattern matches a name, or the end of one behind a dot.

        Raises:
            ConfigError: as `matches`.
        """
        if _PLAIN.fullmatch(pattern):
            return _ends_plainly(pattern, name)
        return self.matches(rf"(?:.*\.)?(?:{pattern})", name, key)

    def first(self, pattern: str, name: str, key: str) -> str | None:
        """What the group `idx` of a pattern holds where the pattern matches the beginning of a name.

        Raises:
            ConfigError: as `matches`.
        """
        found = self._match(pattern, name, key, whole=False)
        return None if found is None else str(found["idx"])

    def _match(self, pattern: str, name: str, key: str, *, whole: bool = True) -> regex.Match[str] | None:
        compiled = self._compiled.get(pattern) or self._compile(pattern, key)
        match = compiled.fullmatch if whole else compiled.match
        started = time.thread_time()
        try:
            return match(name, timeout=max(self._left, _FREE))
        except TimeoutError:
            raise ConfigError(
                f"{self._where}: {key} {pattern!r} takes too long to match {name!r}; write it without nested "
                "repetitions, or list the modules"
            ) from None
        finally:
            self._left -= max(time.thread_time() - started - _FREE, 0.0)

    def _compile(self, pattern: str, key: str) -> regex.Pattern[str]:
        if len(pattern) > _LONGEST:
            raise ConfigError(
                f"{self._where}: {key} has {len(pattern)} characters; {_LONGEST} are the most that is taken"
            )
        try:
            made = regex.compile(pattern)
        except regex.error as error:
            raise ConfigError(
                f"{self._where}: {key} {pattern!r} is no regular expression: {error}"
            ) from error
        self._compiled[pattern] = made
        return made


def _ends_plainly(pattern: str, name: str) -> bool:
    """Whether a pattern of nothing but letters, digits, `_` and `.` matches the end of a name.

    A dot stands for any character, as it does in a regular expression.
    """
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(wanted in (own, ".") for wanted, own in zip(pattern, name[start:], strict=True))
