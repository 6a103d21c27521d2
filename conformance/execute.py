"""Run cells of the matrix: each is one `conformance run --cell` in a process of its own.

1. A cell has a run file. Whatever becomes of its process, every case of the cell has a result in that file in
   the end: what a dead or hanging process left open is an `error` or a `timeout`.
2. A cell that cannot run here gets its file too, with a skip for each case that says why.
3. Nothing that was started stays: each process has a guardian (`conformance.worker.guardian`), which ends it
   and all that it started when it is over its limit, or when this process ends, whatever ends it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import conformance
from conformance import runfile, runner, shares
from conformance.errors import ConformanceError, RunFileError
from conformance.matrix import Cell, Matrix
from conformance.recording import Planned, Recording
from conformance.results import CellVerdict, Result, Run, Verdict, exit_code
from conformance.session import cannot_run
from conformance.targets import registry
from conformance.targets.guarded import STOP_GRACE, ending

CELL_LIMIT = 3600.0
"""Seconds that a cell may take."""

_WORST: tuple[CellVerdict, ...] = ("error", "timeout", "fail", "xpass", "inconclusive", "xfail", "pass")
_TAIL = 2000


@dataclass(frozen=True)
class Job:
    """One command of this harness that runs in a process of its own."""

    name: str
    """What it is for: the id of a cell, or of a fault."""
    arguments: tuple[str, ...]
    """Of `conformance`; `{}` stands for the file that it writes, `{matrix}` for the file of the matrix."""
    run_file: Path
    limit: float = CELL_LIMIT
    matrix: Path | None = None
    """The file of the matrix, where it is not the bundled one."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that it gets besides those of this process."""

    def command(self, run_file: Path | None = None) -> list[str]:
        """The process that runs it."""
        named = {"{}": str(run_file or self.run_file), "{matrix}": str(self.matrix)}
        arguments = (named.get(argument, argument) for argument in self.arguments)
        return [sys.executable, "-m", "conformance.worker.guarded", "conformance", *arguments]


@dataclass(frozen=True)
class Ended:
    """What became of a job's process."""

    job: Job
    code: int | None
    """None where it was ended at its limit; negative where a signal ended it."""
    seconds: float
    tail: str
    """Of what it printed."""
    attempts: int = 1
    """How often it was started, because what ran it died."""
    lost: str = ""
    """Why nothing is known of its process, where what should have run it did not answer for it."""


class Executor(Protocol):
    """Where jobs run."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run jobs, in any order; each run file is there, as far as it came, when its job is given back."""
        ...


class LocalExecutor:
    """Processes of this machine.

    Args:
        workers: How many run at a time.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run jobs; an interrupt, or leaving off early, ends all processes."""
        running: set[subprocess.Popen[bytes]] = set()
        stopping = threading.Event()
        shared = shares.variables(self._workers)
        with ThreadPoolExecutor(max_workers=self._workers) as threads:
            futures = [threads.submit(run_process, job, running, stopping, shared) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                stopping.set()
                for future in futures:
                    future.cancel()
                for process in list(running):
                    _end(process)


def run_process(
    job: Job,
    running: set[subprocess.Popen[bytes]] | None = None,
    stopping: threading.Event | None = None,
    shared: Mapping[str, str] | None = None,
) -> Ended:
    """Run one job here.

    Args:
        job: It.
        running: Where its process is entered while it runs.
        stopping: Nothing is started once it is set.
        shared: Variables for what runs beside others; those of the job win.
    """
    if stopping is not None and stopping.is_set():
        return Ended(job, None, 0.0, "")
    started = time.monotonic()
    known = running if running is not None else set()
    with guarded(job.command(), [*(shared or {}).items(), *job.environment]) as process:
        known.add(process)
        if stopping is not None and stopping.is_set():
            _end(process)  # it was not there yet when the others were ended
        try:
            output, _ = process.communicate(timeout=job.limit)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            _end(process)
            output, _ = process.communicate()
            code = None
        finally:
            known.discard(process)
    return Ended(job, code, time.monotonic() - started, output.decode(errors="replace")[-_TAIL:])


@contextlib.contextmanager
def guarded(
    command: Sequence[str], environment: Iterable[tuple[str, str]] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose guardian ends it, and all that it started, when this one ends."""
    packages = str(Path(conformance.__file__).parents[1])
    path = os.pathsep.join(part for part in (packages, os.environ.get("PYTHONPATH", "")) if part)
    watched, held = os.pipe()  # the guardian sees it close
    try:
        process = subprocess.Popen(  # noqa: S603 - our own program
            command,
            stdin=watched,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment) | {"PYTHONPATH": path},
            start_new_session=True,
        )
        os.close(watched)
        try:
            yield process
        finally:
            _end(process)
    finally:
        os.close(held)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a process and all that it started ended by its guardian; end the guardian if it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class CellResult:
    """What became of a cell."""

    cell: str
    run_file: Path | None
    """None where the run comes from elsewhere."""
    verdict: CellVerdict
    reason: str
    """Why it did not run, or the first reason for its verdict."""
    counts: dict[Verdict, int]
    seconds: float
    attempts: int = 1
    """How often it was started, because the worker that ran it died."""

    @property
    def exit_code(self) -> int:
        """Its contribution to the exit code of all."""
        return exit_code([verdict for verdict, count in self.counts.items() for _ in range(count)])


def summarise(run: Run, where: Path | str) -> CellResult:
    """What became of the cell that a run is of.

    Args:
        run: It.
        where: Its file, or what to call it.

    Raises:
        RunFileError: it is of none.
    """
    if run.header.cell is None:
        raise RunFileError(f"{where}: is no run of a cell; `conformance matrix run` writes those")
    latest = run.latest()
    planned = [(entry.suite, entry.case, entry.target) for entry in run.header.manifest]
    open_ends = sum(key not in latest for key in planned)
    counts: dict[Verdict, int] = {}
    for result in latest.values():
        counts[result.verdict] = counts.get(result.verdict, 0) + 1
    if open_ends:
        counts["error"] = counts.get("error", 0) + open_ends
    verdict: CellVerdict = next((v for v in _WORST if v in counts), "not run")
    wanted = "skip" if verdict == "not run" else verdict
    reason = next((_reason(r) for r in latest.values() if r.verdict == wanted and verdict != "pass"), "")
    if not reason and open_ends:
        reason = f"the run did not come to its end; {open_ends} cases have no result"
    seconds = run.footer.duration if run.footer is not None else sum(r.duration for r in latest.values())
    path = where if isinstance(where, Path) else None
    return CellResult(run.header.cell.id, path, verdict, reason, counts, seconds)


def _reason(result: Result) -> str:
    if result.reason or not result.problems:
        return result.reason
    return f"{result.problems[0].rule}: {result.problems[0].message}"


class CellRunner:
    """Runs cells into a folder of run files.

    Args:
        matrix: Where the cells are.
        folder: For the run files.
        executor: Gives where processes run; asked once the run files are known to be new.
        resume: Go on with run files that are there, and leave complete ones alone.
        options: More options of `conformance run`.
        limit: Seconds for one cell.
    """

    def __init__(
        self,
        matrix: Matrix,
        folder: Path,
        executor: Callable[[], Executor],
        *,
        resume: bool = False,
        options: Sequence[str] = (),
        limit: float = CELL_LIMIT,
    ) -> None:
        self._matrix = matrix
        self._folder = folder
        self._executor = executor
        self._resume = resume
        self._options = tuple(options)
        self._limit = limit
        self._features: dict[str, frozenset[str] | None] = {}

    def run(self, cells: Iterable[Cell]) -> Iterator[CellResult]:
        """Run cells; first come those that need no process.

        Raises:
            RunFileError: a run file is there already, and is not to be resumed or cannot be read (nothing has
                run then), or another run writes one.
        """
        jobs: dict[str, Job] = {}
        by_id = {cell.id: cell for cell in cells}
        complete = {cell.id: self._complete(cell) for cell in by_id.values()}
        for cell in by_id.values():
            path, done = self._path(cell), complete[cell.id]
            if done is not None and done.verdict != "not run":
                yield done
                continue
            # What did not run is asked again: its engine may have been installed since.
            cannot = cannot_run(cell)
            reason = cannot or self._lacks(cell)
            if reason and done is None:
                self._record(cell, "skip", reason, unavailable={cell.target: cannot} if cannot else {})
                done = summarise(runfile.read(path), path)
            if reason and done is not None:
                yield done
            else:
                jobs[cell.id] = self._job(cell, path)
        for ended in self._executor().run(list(jobs.values())) if jobs else ():
            self._close(by_id[ended.job.name], ended)
            found = summarise(runfile.read(ended.job.run_file), ended.job.run_file)
            yield replace(found, attempts=ended.attempts)

    def _path(self, cell: Cell) -> Path:
        return self._folder / cell.file_name

    def _complete(self, cell: Cell) -> CellResult | None:
        """What became of a cell that came to its end in an earlier session.

        Raises:
            RunFileError: its file is not to be resumed, or cannot be read. Such a file is left as it is.
        """
        path = self._path(cell)
        if not self._resume:
            runfile.check_new(path)
        run = _read(path)
        return summarise(run, path) if run is not None and run.footer is not None else None

    def _job(self, cell: Cell, path: Path) -> Job:
        custom = self._matrix.custom
        matrix = ("--matrix", "{matrix}") if custom is not None else ()
        where = ("--resume", "{}") if path.exists() else ("--out", "{}")
        arguments = ("run", "--cell", cell.id, *matrix, *where, "--no-report", *self._options)
        return Job(cell.id, arguments, path, self._limit, matrix=custom)

    def _lacks(self, cell: Cell) -> str:
        """What a cell's target says that it cannot do; asked only where the matrix says so too."""
        if not cell.lacks:
            return ""
        if cell.target not in self._features:
            self._features[cell.target] = _features(cell.target)
        known = self._features[cell.target]
        lacking = [] if known is None else [name for name in cell.settings.features if name not in known]
        return f"{cell.target} cannot generate with {', '.join(lacking)}" if lacking else ""

    def _close(self, cell: Cell, ended: Ended) -> None:
        """Give every case of a cell a result, whatever became of its process."""
        run = _read(ended.job.run_file)
        if run is not None and run.footer is not None:
            return
        last = " ".join(ended.tail.split())[-300:]
        if ended.lost:
            self._record(cell, "error", ended.lost)
        elif ended.code is None:
            self._record(cell, "timeout", f"the cell was not done within {ended.job.limit:g} s")
        else:
            said = f": {last}" if last else ""
            self._record(cell, "error", f"the cell's process {ending(ended.code)}{said}")

    def _record(
        self, cell: Cell, verdict: Verdict, reason: str, unavailable: dict[str, str] | None = None
    ) -> None:
        """Give all cases that have no result this one."""
        path = self._path(cell)
        earlier = _read(path)
        known = earlier.latest().keys() if earlier is not None else ()
        recording = Recording(
            argv=("conformance", "run", "--cell", cell.id),
            unavailable=unavailable or {},
            path=path,
            resume=earlier is not None,
            cell=cell.record,
        )
        try:
            planned = [Planned(loaded, cell.target) for loaded in self._matrix.placed(cell)]
            recording.plan((item.loaded.address, item) for item in planned)
            for item in planned:
                skipped = runner.skipped_result(item.loaded, cell.target, reason)
                if skipped.key not in known:
                    recording.record(skipped.model_copy(update={"verdict": verdict}), None, stored=False)
        finally:
            recording.finish(recording.exit_code())


def _read(path: Path) -> Run | None:
    """A run file; None where there is none. One in which no run has begun is removed.

    Raises:
        RunFileError: it cannot be read, or another run writes it. It is left as it is: it may be of a newer
            harness, and no run is worth another's results.
    """
    if not path.exists():
        return None
    try:
        return runfile.read(path)
    except RunFileError:
        if runfile.discard_unbegun(path):
            return None
        raise


def _features(spec: str) -> frozenset[str] | None:
    """What a target says of itself; None where it does not start: its cells say why."""
    try:
        target = registry.open_target(spec)
    except ConformanceError:
        return None
    try:
        return frozenset(registry.describe(target).features)
    except ConformanceError:
        return None
    finally:
        target.close()
