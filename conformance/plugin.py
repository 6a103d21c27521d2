"""pytest plugin: `pytest suites/` runs the suites, one item per case and target.

1. A project without suites pays one comparison per collected file; everything else is imported
   when the first suite, or an option of this plugin, is met.
2. One execution path: `conformance run` starts pytest with this plugin too.
3. Results travel from xdist workers to the controller in the reports; only the process that the
   user started writes the run file.
4. When nothing but suite items ran, pytest's exit status is the one of DESIGN: 2, 1, 3 or 0.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.discovery import looks_like_suite, may_hold_suites
from conformance.errors import ConformanceError

if TYPE_CHECKING:
    from conformance.loading import LoadedCase
    from conformance.recording import Recording
    from conformance.results import Result
    from conformance.session import SuiteSession

_SESSION: pytest.StashKey[SuiteSession] = pytest.StashKey()
_SHARED: pytest.StashKey[tuple[str, ...]] = pytest.StashKey()
"""Names of the environment variables that were set for workers."""
RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()
_ATTRIBUTE = "conformance"
"""Attribute of a report: JSON text with the result and where it came from."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of suites."""
    group = parser.getgroup("conformance", "conformance suites")
    group.addoption(
        "--target",
        action="append",
        dest="conformance_targets",
        metavar="SPEC",
        help="run suites on this target, such as `reference` or `vllm@0.32.0`; may be repeated "
        "(default: the targets that `conformance targets` marks as default)",
    )
    group.addoption(
        "--conformance-run", dest="conformance_run", metavar="FILE", help="write results to a new run file"
    )
    group.addoption(
        "--resume",
        dest="conformance_resume",
        metavar="FILE",
        help="go on with a run file: reuse its results where nothing has changed, append the others",
    )
    group.addoption(
        "--conformance-record",
        dest="conformance_record",
        metavar="FILE",
        help="write the answers of the target to a new file, which `--target replay@FILE` judges again",
    )
    group.addoption(
        "--conformance-cell",
        dest="conformance_cell",
        metavar="ID",
        help="run suites as this cell of the matrix: on its target, with its settings",
    )
    group.addoption(
        "--conformance-matrix",
        dest="conformance_matrix",
        metavar="FILE",
        help="the matrix that has the cell (default: the one that comes with the harness)",
    )
    group.addoption(
        "--conformance-timeout",
        dest="conformance_timeout",
        metavar="SECONDS",
        type=_seconds,
        help="limit of one request to a target (default: 5)",
    )
    group.addoption(
        "--conformance-seed",
        dest="conformance_seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of sampled stream chunkings and drawn answers (default: 0)",
    )
    group.addoption(
        "--conformance-shuffle",
        dest="conformance_shuffle",
        metavar="N",
        type=int,
        help="run the cases in an order drawn from this seed",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Check the options before anything is collected; register the recorder."""
    if hasattr(config, "workerinput"):
        return
    # Workers see the options as they are now, from a working directory of their own.
    for name in ("conformance_run", "conformance_resume", "conformance_record", "conformance_matrix"):
        if config.getoption(name):
            setattr(config.option, name, str(Path(config.getoption(name)).absolute()))
    if config.getoption("conformance_record") and config.getoption("numprocesses", None):
        raise pytest.exit.Exception("answers are recorded by one process: leave out -n", returncode=2)
    _share(config)
    try:
        recorder = Recorder(config)
    except ConformanceError as error:
        raise pytest.exit.Exception(str(error), returncode=2) from None
    config.stash[RECORDER] = recorder
    config.pluginmanager.register(recorder, "conformance-recorder")


def _share(config: pytest.Config) -> None:
    """Tell the workers of pytest-xdist, through their environment, what of the machine is theirs."""
    workers = config.getoption("numprocesses", None)
    if workers and _may_meet_suites(config):
        from conformance import shares

        variables = shares.variables(workers)
        config.stash[_SHARED] = tuple(variables)
        os.environ.update(variables)


def _may_meet_suites(config: pytest.Config) -> bool:
    return any(may_hold_suites(Path(argument.split("::")[0]).absolute()) for argument in config.args)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the targets; take back what was set for workers."""
    for name in config.stash.get(_SHARED, ()):
        os.environ.pop(name, None)
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.pool.close()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect suite files."""
    if file_path.suffix == ".yaml" and looks_like_suite(file_path):
        return SuiteFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the cases of one target together, after ordinary tests, so that each engine starts once."""
    session = config.stash.get(_SESSION, None)
    seed = config.getoption("conformance_shuffle")
    if session is not None and seed is not None:
        cases = [item for item in items if isinstance(item, CaseItem)]
        random.Random(seed).shuffle(cases)  # noqa: S311 - an order that can be had again
        items[:] = [*(item for item in items if not isinstance(item, CaseItem)), *cases]
    if session is not None and len(session.specs) > 1:
        order = {spec: position for position, spec in enumerate(session.specs, 1)}
        items.sort(key=lambda item: order[item.target] if isinstance(item, CaseItem) else 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the result to the report, and the suite's line to a skip."""
    report = yield
    if isinstance(item, CaseItem) and report.when == "call" and item.payload is not None:
        setattr(report, _ATTRIBUTE, item.payload)
        if report.skipped and isinstance(report.longrepr, tuple):
            report.longrepr = (str(item.path), item.loaded.line, report.longrepr[2])
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, Any] | None:
    """Words for the verdicts that pytest does not know."""
    verdict = report_verdict(report)
    if verdict == "inconclusive":
        return "inconclusive", "I", ("INCONCLUSIVE", {"yellow": True})
    if verdict in ("xpass", "error", "timeout"):
        return "failed", "F", (verdict.upper(), {"red": True})
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the cases of one engine on one worker, unless another distribution was asked for."""
    if config.getvalue("dist") not in ("load", "loadgroup"):
        return None
    if not _may_meet_suites(config):
        return None
    from conformance.scheduling import TargetScheduling

    return TargetScheduling(config, log)


class CaseFailed(Exception):  # noqa: N818 - a verdict, not an error of the harness
    """Carries a result whose verdict fails the run to pytest."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.verdict)
        self.result = result


class SuiteFile(pytest.File):
    """One suite file."""

    def collect(self) -> Iterator[CaseItem]:
        """One item per case and target.

        Raises:
            CollectError: the suite or its expectations are broken.
        """
        from conformance.loading import load_suite

        session = _suite_session(self.config)
        try:
            suite = load_suite(self.path)
            session.expectations(suite.root)
        except ConformanceError as error:
            raise self.CollectError(str(error)) from None
        for case in suite.cases:
            placed = session.place(case)
            for target in session.specs if placed is not None else ():
                yield CaseItem.from_parent(self, loaded=placed, target=target)


class CaseItem(pytest.Item):
    """One case on one target."""

    def __init__(self, *, parent: SuiteFile, loaded: LoadedCase, target: str, **kwargs: Any) -> None:
        name = f"{loaded.case.id}[{target}]"
        # The id is given as text, so that its brackets are read as pytest reads them from its cache.
        super().__init__(name=name, parent=parent, nodeid=f"{parent.nodeid}::{name}", **kwargs)
        self.loaded = loaded
        self.target = target
        self.payload: str | None = None
        """JSON text for the report: the result, its target's description, and whether it was reused."""

    def runtest(self) -> None:
        """Judge the case, and raise what pytest's own outcomes need."""
        done = _suite_session(self.config).run(self.loaded, self.target)
        self.payload = done.to_json()
        result = done.result
        if result.verdict == "xfail":
            raise pytest.xfail.Exception(result.reason)
        if result.verdict in ("skip", "inconclusive"):
            raise pytest.skip.Exception(result.reason or result.verdict)
        if result.verdict != "pass":
            raise CaseFailed(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Rules and differences for a failed case; pytest's own text for anything else."""
        if isinstance(excinfo.value, CaseFailed):
            from conformance.explain import explain

            return explain(excinfo.value.result)
        if isinstance(excinfo.value, pytest.xfail.Exception):  # pytest's own takes long, and is not shown
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where the case stands."""
        return self.path, self.loaded.line - 1, f"{self.loaded.address}[{self.target}]"


class Recorder:
    """Hooks of the process that the user started: feeds the recording, sets the exit status."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.broken_suites: list[str] = []
        self._ordinary = False
        self._recording: Recording | None = None
        names = ("targets", "run", "resume", "record", "cell")
        options = [f"conformance_{name}" for name in names]
        self._asked = any(config.getoption(name) for name in options)
        if self._asked:  # a wrong target or run file ends the session before anything is collected
            _ = self.recording

    @property
    def recording(self) -> Recording:
        """The run; made when first needed.

        Raises:
            ConformanceError: the options name a target or a run file that cannot be used.
        """
        if self._recording is None:
            from conformance.recording import Recording

            session = _suite_session(self.config)
            run = self.config.getoption("conformance_run")
            resume = self.config.getoption("conformance_resume")
            session.check_options(run, resume)
            path = None if self.config.option.collectonly else resume or run
            self._recording = Recording(
                argv=(_program(), *sys.argv[1:]),
                unavailable=session.unavailable,
                path=Path(path) if path else None,
                resume=bool(resume),
                cell=session.cell.record if session.cell is not None else None,
            )
        return self._recording

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn the items of a session without workers."""
        if session.items:
            from_items = {item.nodeid: item for item in session.items if isinstance(item, CaseItem)}
            self._plan([item.nodeid for item in session.items], from_items)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Iterable[str]) -> None:
        """Learn the items of a session with workers."""
        self._plan(list(ids), {})

    def _plan(self, node_ids: list[str], items: dict[str, CaseItem]) -> None:
        planned = []
        for node_id in node_ids:
            entry = self._planned(node_id, items)
            if entry is None:
                self._ordinary = True
            else:
                planned.append((node_id, entry))
        if planned:
            self.recording.plan(planned)

    def _planned(self, node_id: str, items: dict[str, CaseItem]) -> Any:
        if ".yaml::" not in node_id:
            return None
        from conformance.recording import Planned, planned_item

        if node_id in items:
            return Planned(items[node_id].loaded, items[node_id].target)
        found = planned_item(self.config.rootpath, node_id)
        placed = _suite_session(self.config).place(found.loaded) if found is not None else None
        return Planned(placed, found.target) if found is not None and placed is not None else found

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a result down before anything else sees it."""
        payload = getattr(report, _ATTRIBUTE, None)
        if payload is not None:
            from conformance.session import Done

            done = Done.from_json(payload)
            self.recording.record(done.result, done.info, stored=done.stored)
        elif report.failed and self._recording is not None:
            self._recording.crashed(report.nodeid, str(report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note broken suites: they are wrong use, not failures."""
        if report.failed and report.nodeid.endswith(".yaml"):
            self.broken_suites.append(str(report.longrepr))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
        """Close the run file, and replace pytest's exit status where only suites ran."""
        session.exitstatus = self._exit_status(int(exitstatus))
        if self._recording is not None:
            self._recording.finish(int(session.exitstatus))
        yield

    def _exit_status(self, status: int) -> int:
        ok, failed, interrupted, crashed, nothing = 0, 1, 2, 3, 5
        if status == crashed and self._recording is not None:
            return 1  # pytest's code for a crash of its own is the one for inconclusive here
        if status not in (ok, failed, interrupted, nothing) or self.config.option.collectonly:
            return status
        if self.broken_suites:
            return 2
        code = 2 if self._recording is None else self._recording.exit_code()
        if self._ordinary:
            return code if status == ok and code in (1, 3) else status
        if self._recording is None or not self._recording.verdicts:
            return 2 if status == nothing and self._wants_suites() else status
        if status == interrupted:  # also what xdist makes of `-x`
            return 1 if code == 1 else status
        return 1 if status == failed else code

    def _wants_suites(self) -> bool:
        """Whether the user asked for suites, so that collecting none is wrong use."""
        arguments = [Path(argument.split("::")[0]) for argument in self.config.args]
        return self._asked or (bool(arguments) and all("suites" in a.absolute().parts for a in arguments))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List inconclusive cases, which pytest has no section for, and name the run file."""
        reports = terminalreporter.stats.get("inconclusive", [])
        for report in reports:
            terminalreporter.write_line(f"INCONCLUSIVE {report.nodeid} - {report.longrepr[2]}", yellow=True)
        if self._recording is not None and self._recording.path is not None:
            if self._recording.whole.keys() > self._recording.verdicts.keys():
                from conformance.verdicts import counted

                whole = ", ".join(counted(Counter(self._recording.whole.values())))
                terminalreporter.write_line(f"whole run, with earlier sessions: {whole}")
            terminalreporter.write_line(f"run file: {self._recording.path}")


def _program() -> str:
    """Name of the program that runs, without the machine's paths."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def report_verdict(report: pytest.TestReport) -> str | None:
    """Verdict of a suite item's report; None for ordinary tests."""
    payload = getattr(report, _ATTRIBUTE, None)
    return None if payload is None else str(json.loads(payload)["result"]["verdict"])


def _suite_session(config: pytest.Config) -> SuiteSession:
    """What suite items of this process share.

    Raises:
        ConformanceError: a target that was asked for cannot be used.
    """
    if _SESSION not in config.stash:
        from conformance.session import SuiteSession

        session = SuiteSession(
            targets=config.getoption("conformance_targets"),
            timeout=config.getoption("conformance_timeout"),
            resume=config.getoption("conformance_resume"),
            record=config.getoption("conformance_record"),
            expect_failures=not config.option.runxfail,
            cell=config.getoption("conformance_cell"),
            matrix=config.getoption("conformance_matrix"),
            seed=config.getoption("conformance_seed"),
        )
        config.stash[_SESSION] = session
    return config.stash[_SESSION]
