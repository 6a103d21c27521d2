"""What `conformance run` shows while it runs: a live table on a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output holds the summary alone. A result is
shown only after it is safe in the run file.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

import pytest
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from conformance.explain import explain, headline, visible
from conformance.plugin import RECORDER
from conformance.results import Preflight, Result, Verdict
from conformance.verdicts import BAD, verdict_counts

_HEARTBEAT = 10.0
_TARGETS = logging.getLogger("conformance.targets")
"""What targets write for people goes to this logger and those below it."""
_EXPLAINED = 5
"""Failures of one target that are explained in full; more would bury the summary."""


class _Notices(logging.Handler):
    """Shows what targets have to say, such as that a server is starting."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show one line."""
        self._show(visible(record.getMessage()))


class ProgressPlugin:
    """pytest plugin of the process that shows progress.

    Args:
        console: Where to.
        verbose: Show every result, and explain every failure, known or not.
        explain_known: Explain known failures as new ones are.
        preflight: What was asked before, for the run file.
    """

    def __init__(
        self,
        console: Console,
        *,
        verbose: bool,
        explain_known: bool = False,
        preflight: tuple[Preflight, ...] = (),
    ) -> None:
        self._console = console
        self._verbose = verbose
        self._explain_known = explain_known or verbose
        self._preflight = preflight
        self._counts: dict[str, Counter[Verdict]] = {}
        self._failures: Counter[str] = Counter()
        self._live: Live | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._current: Text = Text("collecting suites …", style="dim")
        self._done = 0
        self._planned = 0
        self._last_line = time.monotonic()
        self._notices = _Notices(self._line)
        self.errors: list[str] = []
        """Broken suites and crashes of the harness itself, for the caller to print."""
        self.interrupted = False
        """Somebody pressed Ctrl-C."""

    def pytest_configure(self, config: pytest.Config) -> None:
        """Listen to the recording, and take over the screen."""
        if hasattr(config, "workerinput"):
            return
        recording = config.stash[RECORDER].recording
        recording.listeners.append(self._show)
        recording.preflight = self._preflight
        _TARGETS.addHandler(self._notices)
        _TARGETS.setLevel(logging.INFO)
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=8)
            self._live.start()

    def pytest_unconfigure(self) -> None:
        """Give the screen back."""
        _TARGETS.removeHandler(self._notices)
        _TARGETS.setLevel(logging.NOTSET)
        if self._live is not None:
            self._current = Text("")
            self._live.stop()
            self._live = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Number of cases, without workers."""
        self._start(session.config)

    @pytest.hookimpl(optionalhook=True, trylast=True)
    def pytest_xdist_node_collection_finished(self, node: pytest.Item) -> None:
        """Number of cases, with workers."""
        self._start(node.config)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the text of a broken suite."""
        if report.failed:
            self.errors.append(str(report.longrepr))

    def pytest_internalerror(self, excrepr: object) -> None:
        """Keep the text of a crash of pytest or of this harness."""
        self.errors.append(str(excrepr))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Tell an interrupt from the other ways in which pytest ends early."""
        self.interrupted = isinstance(excinfo.value, KeyboardInterrupt)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name the case that runs."""
        self._current = Text(visible(nodeid), style="dim", no_wrap=True, overflow="ellipsis")

    def _start(self, config: pytest.Config) -> None:
        planned = config.stash[RECORDER].recording.planned
        if self._planned or not planned:
            return
        self._planned = len(planned)
        for target, total in Counter(item.target for item in planned.values()).items():
            self._counts[target] = Counter()
            self._tasks[target] = self._bars.add_task(target, total=total, counts=Text(""))
        if self._live is None:
            noun = "case" if self._planned == 1 else "cases"
            self._line(f"{self._planned} {noun} on {', '.join(self._tasks)}")

    def _show(self, result: Result) -> None:
        self._done += 1
        counts = self._counts.setdefault(result.target, Counter())
        counts[result.verdict] += 1
        if result.target in self._tasks:
            self._bars.update(
                self._tasks[result.target], completed=counts.total(), counts=verdict_counts(counts)
            )
        name = f"{result.suite}::{result.case} [{result.target}]"
        if result.verdict in BAD:
            self._failures[result.target] += 1
            number = self._failures[result.target]
            self._line(f"{explain(result)}\n" if self._verbose or number <= _EXPLAINED else headline(result))
            if number == _EXPLAINED and not self._verbose:
                self._line(
                    f"further failures of {result.target} are named only; see the dashboard, or use -v\n"
                )
        elif result.verdict == "xfail" and self._explain_known:
            self._line(f"{explain(result)}\n")
        elif self._verbose or result.verdict == "inconclusive":
            self._line(visible(f"{result.verdict} {name}{f': {result.reason}' if result.reason else ''}"))
        elif self._live is None and time.monotonic() - self._last_line > _HEARTBEAT:
            self._line(f"{self._done} of {self._planned} done, last: {name}")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self._bars, self._current)
