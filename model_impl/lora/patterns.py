"""Patterns of an adapter's configuration, which come from strangers: each set of them has a limit of time."""

from __future__ import annotations

import time

import regex

from model_impl.errors import ConfigError

_SECONDS = 2.0
"""For all that one configuration's patterns are asked. An honest one takes microseconds a name."""
_LONGEST = 10_000
"""Characters of a pattern."""


class Patterns:
    """Matches names with regular expressions within a limit of time.

    Args:
        where: The file that they come from, for errors.
        seconds: For all matches together.
    """

    def __init__(self, where: str, seconds: float = _SECONDS) -> None:
        self._where = where
        self._left = seconds

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

    def first(self, pattern: str, name: str, key: str) -> str | None:
        """What the group `idx` of a pattern holds where the pattern matches the beginning of a name.

        Raises:
            ConfigError: as `matches`.
        """
        found = self._match(pattern, name, key, whole=False)
        return None if found is None else str(found["idx"])

    def _match(self, pattern: str, name: str, key: str, *, whole: bool = True) -> regex.Match[str] | None:
        if len(pattern) > _LONGEST:
            raise ConfigError(
                f"{self._where}: {key} has {len(pattern)} characters; {_LONGEST} are the most that is taken"
            )
        started = time.perf_counter()
        try:
            compiled = regex.compile(pattern)
            match = compiled.fullmatch if whole else compiled.match
            return match(name, timeout=max(self._left, 1e-6))
        except regex.error as error:
            raise ConfigError(
                f"{self._where}: {key} {pattern!r} is no regular expression: {error}"
            ) from error
        except TimeoutError:
            raise ConfigError(
                f"{self._where}: {key} {pattern!r} takes too long to match {name!r}; write it without nested "
                "repetitions, or list the modules"
            ) from None
        finally:
            self._left -= time.perf_counter() - started
