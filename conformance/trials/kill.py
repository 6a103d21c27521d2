"""A run that is killed at random points and resumed.

No result that was shown may be lost, and the verdicts must be those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conformance import runfile
from conformance.errors import ConformanceError, RunFileError
from conformance.execute import Job, LocalExecutor, guarded
from conformance.records import Record
from conformance.results import Run, Verdict
from conformance.targets import registry

Key = tuple[str, str, str]

_SHOWN = re.compile(r"^(?:[a-z]+ )?([\w./-]+)::([\w-]+) (?:\[([^\]]+)\]|on (\S+) )")
"""A line that `conformance run -v` shows of a result."""
_PAUSE = 0.2
"""Seconds within which a kill follows the result after which it comes."""


class KillError(ConformanceError):
    """The trial itself could not be made."""


class Killed(Record):
    """One kill."""

    after: int
    """Results that this session had shown."""
    shown: int
    """Results that all sessions so far had shown."""
    stored: int
    """Results that the file holds afterwards."""
    lost: tuple[str, ...]
    """Shown results that the file does not hold."""
    torn: bool
    """Whether the last line was cut."""


class KillTrial(Record):
    """What became of the run."""

    planned: int
    kills: tuple[Killed, ...]
    differing: tuple[str, ...]
    """Cases whose verdict is another one than in the undisturbed run, with both."""
    twice: tuple[str, ...]
    """Cases that were run again though the file held their result."""
    run_file: str
    undisturbed: str

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, and nothing differs."""
        return not self.differing and not self.twice and not any(kill.lost for kill in self.kills)


@dataclass(frozen=True)
class KillPlan:
    """Which run to kill, and how often."""

    arguments: tuple[str, ...]
    targets: tuple[str, ...]
    folder: Path
    times: int
    seed: int = 0
    workers: int = 0
    limit: float = 3600.0

    @property
    def asked(self) -> tuple[str, ...]:
        """The run, as arguments of `conformance`."""
        targets = tuple(word for target in self.targets for word in ("-t", target))
        workers = ("-n", str(self.workers)) if self.workers else ()
        return ("run", *self.arguments, "--quick", *targets, *workers, "--no-report", "-v")


def kill(plan: KillPlan, progress: Callable[[Killed], None] = lambda kill: None) -> KillTrial:
    """Make the undisturbed run, then one that is killed so many times, and compare.

    Raises:
        KillError: a run could not be made, or ended by itself before it was killed so often.
        RunFileError: a run file is there already, or holds what it should not.
    """
    whole_file, cut_file = (plan.folder / f"{name}-{plan.seed}.jsonl" for name in ("undisturbed", "killed"))
    for path in (whole_file, cut_file):
        runfile.check_new(path)
    plan.folder.mkdir(parents=True, exist_ok=True)
    whole = _undisturbed(plan, whole_file)
    planned = len(whole.header.manifest)
    if planned < plan.times + 1:
        raise KillError(f"a run of {planned} cases cannot be killed {plan.times} times; choose more cases")
    draw = random.Random(plan.seed)  # noqa: S311 - points that can be had again
    shown: set[Key] = set()
    kills: list[Killed] = []
    left = planned
    for number in range(plan.times):
        # A third of its share, as more results come before each kill: all the kills to come need some left.
        after = draw.randint(0, max(1, 2 * left // (3 * (plan.times - number))))
        printed = _kill_one(plan, cut_file, min(after, left - 1), draw.uniform(0, _PAUSE))
        if printed is None:
            break
        shown |= printed
        kills.append(_look(cut_file, len(printed), shown))
        left = planned - kills[-1].stored
        progress(kills[-1])
        if left <= 1:
            break
    before = _stored(cut_file)
    ended = _finish(plan, cut_file)
    return _compared(whole, ended, before, kills, cut_file, whole_file)


def _undisturbed(plan: KillPlan, path: Path) -> Run:
    (ended,) = LocalExecutor().run([Job("undisturbed", (*plan.asked, "--out", "{}"), path, plan.limit)])
    run = _read(path)
    if run is None or run.footer is None:
        raise KillError(f"the undisturbed run came to no end: {ended.tail[-300:]}")
    return run


def _finish(plan: KillPlan, path: Path) -> Run:
    where = "--resume" if _read(path) is not None else "--out"
    if where == "--out":
        path.unlink(missing_ok=True)
    (ended,) = LocalExecutor().run([Job("resumed", (*plan.asked, where, "{}"), path, plan.limit)])
    run = _read(path)
    if run is None or run.footer is None:
        raise KillError(f"the resumed run came to no end: {ended.tail[-300:]}")
    return run


def _kill_one(plan: KillPlan, path: Path, after: int, pause: float) -> set[Key] | None:
    """Start or resume the run, and kill it with all that it started.

    Returns:
        The results that it had shown and that the file did not hold; None if the run came to its end before
        the kill did.

    Raises:
        KillError: it ended too early, which a trial is to find, or showed too little within the limit.
    """
    where = "--resume" if _read(path) is not None else "--out"
    if where == "--out":
        path.unlink(missing_ok=True)  # a file without a header, which is no run yet
    job = Job("killed", (*plan.asked, where, "{}"), path, plan.limit)
    known = _stored(path)
    shown: set[Key] = set()
    lines: list[str] = []
    late = threading.Event()
    with guarded(job.command()) as process:
        assert process.stdout is not None

        def end() -> None:
            late.set()
            _kill_group(process.pid)

        timer = threading.Timer(plan.limit, end)
        timer.start()
        for raw in process.stdout:
            lines.append(raw.decode(errors="replace"))
            key = shown_result(lines[-1])
            if key is not None and key not in known:  # results of earlier sessions are shown again
                shown.add(key)
            if len(shown) >= after and (after or path.exists()):
                time.sleep(pause)
                break
        timer.cancel()
        ended = process.poll()
        _kill_group(process.pid)
        rest, _ = process.communicate()
    lines += rest.decode(errors="replace").splitlines()
    tail = " ".join("".join(lines[-5:]).split())[-300:]
    if late.is_set():
        raise KillError(f"a session showed fewer than {after} results within {plan.limit:g} s: {tail}")
    run = _read(path)
    if run is not None and run.footer is not None:
        return None
    if ended is not None or len(shown) < after:
        raise KillError(f"a session ended by itself after {len(shown)} results: {tail}")
    keys = (shown_result(line) for line in lines)
    return {key for key in keys if key is not None} - known


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(leader, signal.SIGKILL)


def shown_result(line: str) -> Key | None:
    """The result that a line of `conformance run -v` shows; None if it is another line."""
    match = _SHOWN.match(line)
    return (match[1], match[2], match[3] or match[4]) if match is not None else None


def _look(path: Path, after: int, shown: set[Key]) -> Killed:
    run = _read(path)
    stored = {result.key for result in run.results} if run is not None else set()
    return Killed(
        after=after,
        shown=len(shown),
        stored=len(stored),
        lost=tuple(sorted(_name(key) for key in shown - stored)),
        torn=bool(run is not None and run.torn),
    )


def _compared(
    whole: Run, ended: Run, before: set[Key], kills: list[Killed], cut_file: Path, whole_file: Path
) -> KillTrial:
    want: dict[Key, Verdict] = {key: result.verdict for key, result in whole.latest().items()}
    have: dict[Key, Verdict] = {key: result.verdict for key, result in ended.latest().items()}
    times = [result.key for result in ended.results]
    # Asked again by right: what came to no verdict, factories, and servers (`StoredResult.reusable`).
    anew = {
        target
        for target, info in whole.header.targets.items()
        if registry.is_factory(target) or "serve" in info.capabilities
    }
    firm = {key for key in before if key[2] not in anew and want.get(key) not in ("error", "timeout")}
    return KillTrial(
        planned=len(want),
        kills=tuple(kills),
        differing=tuple(
            f"{_name(key)}: {have.get(key, 'no result')}, undisturbed {want.get(key, 'no result')}"
            for key in sorted(want.keys() | have.keys())
            if want.get(key) != have.get(key)
        ),
        twice=tuple(_name(key) for key in sorted(firm) if times.count(key) > 1),
        run_file=str(cut_file),
        undisturbed=str(whole_file),
    )


def _stored(path: Path) -> set[Key]:
    run = _read(path)
    return {result.key for result in run.results} if run is not None else set()


def _read(path: Path) -> Run | None:
    try:
        return runfile.read(path)
    except RunFileError:
        return None


def _name(key: Key) -> str:
    return f"{key[0]}::{key[1]} [{key[2]}]"
