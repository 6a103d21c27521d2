"""Tests that start ranks, workers or engines have a deadline, whether they remembered to ask for one or not.

The time is the test's own, with what its fixtures take. A test that needs another limit has the marker
`timeout` of pytest-timeout; its seconds then count.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_timeout

OWN = 60.0
"""Seconds of a test that starts ranks of a layout, or a worker with this very interpreter."""
ENGINES = 600.0
"""Of one that starts an engine of an environment of its own: on a slow machine some take minutes to load."""
_RANKS, _WORKER = "model_impl.parallel.starter", "conformance.worker"


def limit_of(command: Sequence[object] | str) -> float | None:
    """Seconds that a test has which starts this; None if it is nothing of the kind."""
    words = [command] if isinstance(command, str) else [str(word) for word in command]
    if not any(word == _RANKS or word.startswith(_WORKER) for word in words):
        return None
    return OWN if words[0] == sys.executable else ENGINES


@dataclass(eq=False)
class Deadlines:
    """Sets a test's alarm when it starts the first such process, and those of all behind it in its module."""

    _modules: dict[Path, float] = field(default_factory=dict)
    _item: pytest.Item | None = None
    _began: float = 0.0
    _limit: float = 0.0
    """Of the running test; 0 before it has one."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._item, self._began, self._limit = item, time.monotonic(), 0.0
        if item.path in self._modules:
            self._set(item, self._modules[item.path])
        try:
            return (yield)
        finally:
            if self._limit:
                item.config.hook.pytest_timeout_cancel_timer(item=item)
            self._item = None

    def started(self, command: Sequence[object] | str) -> None:
        """A process is about to be started."""
        limit, item = limit_of(command), self._item
        if limit is None or item is None:
            return
        self._modules[item.path] = max(limit, self._modules.get(item.path, 0.0))
        if limit > self._limit:
            self._set(item, limit)

    def _set(self, item: pytest.Item, limit: float) -> None:
        if item.get_closest_marker("timeout") is not None:
            return
        self._limit = limit
        left = max(0.1, limit - (time.monotonic() - self._began))
        settings = pytest_timeout.Settings(
            timeout=left, method="signal", func_only=False, disable_debugger_detection=False
        )
        item.config.hook.pytest_timeout_set_timer(item=item, settings=settings)


def watch(tell: Callable[[Sequence[object] | str], None]) -> None:
    """Have every start of a process in this one told, from now on."""
    begin = subprocess.Popen.__init__

    @functools.wraps(begin)
    def told(self: Any, args: Any, *more: Any, **options: Any) -> None:
        if not isinstance(args, bytes) and not hasattr(args, "__fspath__"):
            tell(args)
        begin(self, args, *more, **options)

    subprocess.Popen.__init__ = told  # type: ignore[method-assign]
