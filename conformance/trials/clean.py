"""Runs without any fault, under circumstances that must not matter: every alarm in them is a false one.

Each run has its own number of threads and processes, order of cases, `PYTHONHASHSEED`, and seed of sampled
chunkings and drawn answers, all drawn from one seed.
"""

from __future__ import annotations

import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conformance import runfile, shares
from conformance.errors import RunFileError
from conformance.execute import Ended, Job, LocalExecutor
from conformance.records import Record
from conformance.results import Result, Verdict
from conformance.targets.guarded import ending
from conformance.verdicts import BAD

RUN_LIMIT = 4 * 3600.0
"""Seconds that one run may take."""
_THREADS = (1, 2, 4)
_WORKERS = (0, 2, 3)


class Circumstances(Record):
    """What must not matter to a verdict."""

    threads: int
    workers: int
    hash_seed: int
    order: int
    """Seed of the order of cases."""
    sampling: int
    """Seed of sampled chunkings and drawn answers."""

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """As variables of a process."""
        return (
            ("OMP_NUM_THREADS", str(self.threads)),  # of engines in processes of their own
            (shares.THREADS, str(self.threads)),  # of the bundled implementation
            # There may be more threads than cores: one that spins while it waits would take the turns of the
            # others, for which they wait.
            ("OMP_WAIT_POLICY", "PASSIVE"),
            ("PYTHONHASHSEED", str(self.hash_seed)),
        )

    @property
    def options(self) -> tuple[str, ...]:
        """As options of `conformance run`."""
        return (
            *(("-n", str(self.workers)) if self.workers else ()),
            *("--shuffle", str(self.order), "--seed", str(self.sampling)),
        )


class Alarm(Record):
    """A case that does not pass, or does not come out as in the first run."""

    address: str
    target: str
    verdict: Verdict | None
    """None where it has no result."""
    usual: Verdict | None
    """Its verdict in the first run that has one."""
    reason: str


class CleanRun(Record):
    """One run."""

    circumstances: Circumstances
    run_file: str
    repeat: str
    """One shell line that runs it again."""
    seconds: float
    counts: dict[Verdict, int]
    alarms: tuple[Alarm, ...]
    reason: str = ""
    """Why the run did not come to its end; that is an alarm too."""

    @property
    def quiet(self) -> bool:
        """Whether nothing was alarming."""
        return not self.alarms and not self.reason


@dataclass(frozen=True)
class CleanPlan:
    """Which runs to make."""

    arguments: tuple[str, ...]
    """Cases, as on the command line; empty for all."""
    targets: tuple[str, ...]
    folder: Path
    """For the run files."""
    runs: int
    seed: int = 0
    limit: float = RUN_LIMIT


def drawn(seed: int) -> Iterator[Circumstances]:
    """Circumstances without end; the first ones are those of an ordinary run, but for its order."""
    source = random.Random(seed)  # noqa: S311 - circumstances that can be had again
    first = True
    while True:
        yield Circumstances(
            threads=1 if first else source.choice(_THREADS),
            workers=0 if first else source.choice(_WORKERS),
            hash_seed=source.randrange(2**32),
            order=source.randrange(10**6),
            sampling=0 if first else source.randrange(1, 10**6),
        )
        first = False


def clean(plan: CleanPlan, progress: Callable[[CleanRun], None] = lambda run: None) -> list[CleanRun]:
    """Make the runs, one after the other; files of an earlier trial with the same seed are kept.

    Raises:
        RunFileError: a run file is none.
    """
    usual: dict[tuple[str, str, str], Verdict] = {}
    found = []
    for number, circumstances in zip(range(1, plan.runs + 1), drawn(plan.seed), strict=False):
        path = plan.folder / f"clean-{plan.seed}-{number}.jsonl"
        found.append(_run(plan, circumstances, path, usual))
        progress(found[-1])
    return found


def _run(
    plan: CleanPlan, circumstances: Circumstances, path: Path, usual: dict[tuple[str, str, str], Verdict]
) -> CleanRun:
    runfile.discard_unbegun(path)
    where = "--resume" if path.exists() else "--out"
    targets = tuple(word for target in plan.targets for word in ("-t", target))
    asked = ("run", *plan.arguments, "--quick", *targets, "--no-report", *circumstances.options)
    job = Job(path.stem, (*asked, where, "{}"), path, plan.limit, environment=circumstances.environment)
    (ended,) = LocalExecutor().run([job])
    variables = (f"{name}={value}" for name, value in circumstances.environment)
    nothing = CleanRun(
        circumstances=circumstances,
        run_file=str(path),
        repeat=shlex.join(["env", *variables, "conformance", *asked]),
        seconds=round(ended.seconds, 1),
        counts={},
        alarms=(),
        reason=_why(ended),
    )
    try:
        run = runfile.read(path)
    except RunFileError:
        return nothing
    # Not the newest alone: what came to no verdict is asked again when a trial is gone on with.
    every: dict[tuple[str, str, str], list[Result]] = {}
    for result in run.results:
        every.setdefault(result.key, []).append(result)
    alarms = []
    for entry in run.header.manifest:
        key = (entry.suite, entry.case, entry.target)
        results = every.get(key, [])
        before = usual.get(key)
        if results:
            usual.setdefault(key, results[-1].verdict)
        told = next((r for r in results if r.verdict in BAD or r.verdict != usual[key]), None)
        if not results or told is not None:
            alarms.append(
                Alarm(
                    address=f"{entry.suite}::{entry.case}",
                    target=entry.target,
                    verdict=told.verdict if told is not None else None,
                    usual=before,
                    reason=told.reason if told is not None else "no result",
                )
            )
    counts = Counter(result.verdict for result in run.latest().values())
    found = {"counts": dict(counts), "alarms": tuple(alarms)}
    return nothing.model_copy(update=found if run.footer is None else found | {"reason": ""})


def _why(ended: Ended) -> str:
    if ended.code is None:
        return f"the run was not done within {ended.job.limit:g} s"
    last = " ".join(ended.tail.split())[-300:]
    return f"its process {ending(ended.code)}" + (f": {last}" if last else "")


def alarming(runs: Sequence[CleanRun]) -> list[CleanRun]:
    """The runs with an alarm."""
    return [run for run in runs if not run.quiet]
