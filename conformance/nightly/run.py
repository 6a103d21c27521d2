"""Run a night step by step, compare it with the history, and say what came of it.

1. What is known is kept after every step, so that a night that is ended, or is over its time, has told what
   broke until then. Suites and cells go first, and into the history at once.
2. A night that was ended goes on from its folder: a step that came to its end is not run again.
"""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from conformance import backtests, execute, history, runfile
from conformance import matrix as matrices
from conformance.comparison import Comparison, compare
from conformance.errors import ConformanceError, RunFileError, UsageError
from conformance.execute import Job, LocalExecutor
from conformance.nightly.plan import Night, Step, merge, report, steps, trial_steps
from conformance.records import Record
from conformance.results import Run
from conformance.targets.guarded import ending

_SIGNALS = 128
"""Exit codes from here on are those of processes that a signal ended."""
StepState = Literal["good", "bad", "open", "not run"]


class StepResult(Record):
    """What became of a step."""

    name: str
    state: StepState
    """`open`: inconclusive, or something that is to be measured again."""
    reason: str = ""
    """Why it did not run, or the end of what it printed if it is not good."""
    exit_code: int | None = None
    seconds: float = 0.0
    repeat: str = ""
    """One shell line that runs it again."""


class NotRun(Record):
    """Results or cells that were planned and could not be had here."""

    what: str
    """`suites`, `matrix`, or the name of a step."""
    count: int
    reason: str


class NightResult(Record):
    """What became of a night."""

    folder: str
    steps: tuple[StepResult, ...]
    not_run: tuple[NotRun, ...]
    comparison: Comparison | None
    """None where the history could not be asked."""
    gates: dict[str, int]
    """Accuracy gates by verdict."""
    over: bool = True
    """Whether all its steps have had their turn."""

    @property
    def exit_code(self) -> int:
        """1 for anything bad, else 3 for anything open, else 0; what could not run changes nothing."""
        states = {step.state for step in self.steps}
        return 1 if "bad" in states else 3 if "open" in states else 0


class _Done(Record):
    """What a folder holds of a night that was ended."""

    asked: str
    """Digest of what the night was asked for, and of the sources."""
    over: bool = False
    """Whether the night came to its end."""
    steps: dict[str, StepResult]


def run(
    night: Night,
    progress: Callable[[StepResult], None] = lambda step: None,
    keep: Callable[[NightResult], None] = lambda night: None,
) -> NightResult:
    """Run a night.

    Args:
        night: What to run.
        progress: Told of each step.
        keep: Told of the night so far, after each step.

    Raises:
        UsageError: the folder holds another night, or one that is over.
        ConformanceError: cases, targets or cells are wrong.
    """
    night.folder.mkdir(parents=True, exist_ok=True)
    done = _done(night)
    results: list[StepResult] = []
    compared: Comparison | None = None

    def so_far(*, over: bool = False) -> NightResult:
        return NightResult(
            folder=str(night.folder),
            steps=tuple(results),
            not_run=tuple(_not_run(night, results)),
            comparison=compared,
            gates=_gates(night),
            over=over,
        )

    def take(step: Step) -> None:
        result = done.get(step.name) or _run(step, night)
        if result.exit_code is not None and 0 <= result.exit_code < _SIGNALS:
            done[step.name] = result
            _write(night, _Done(asked=night.asked, steps=done))
        results.append(result)
        progress(result)
        keep(so_far())

    for step in steps(night):
        take(step)
    if "merge" not in night.skip:
        take(merge(night))
        compared, failed = _compare(night)
        if failed is not None:
            results.append(failed)
            progress(failed)
        keep(so_far())
    for step in trial_steps(night):
        take(step)
    if "report" not in night.skip:
        take(report(night))
    result = so_far(over=True)
    keep(result)
    _write(night, _Done(asked=night.asked, over=True, steps=done))
    return result


def _run(step: Step, night: Night) -> StepResult:
    if step.wrong:
        return StepResult(name=step.name, state="bad", reason=step.wrong)
    if step.reason:
        return StepResult(name=step.name, state="not run", reason=step.reason)
    log = night.folder / f"{step.name}.log"
    (ended,) = LocalExecutor().run([Job(step.name, step.arguments, log, night.limit)])
    log.write_text(ended.tail, encoding="utf-8")
    states: dict[int | None, StepState] = {0: "good", 3: "open"}
    state = states.get(ended.code, "bad")
    reason = ""
    if ended.code is None:
        reason = f"not done within {night.limit:g} s"
    elif state != "good":
        last = [line for line in ended.tail.splitlines() if line.strip()][-1:]
        reason = last[0].strip() if last else f"its process {ending(ended.code)}"
    if state == "good" and step.ladder is not None:
        reason = _of_newest(step.ladder)
        state = "bad" if reason else state
    return StepResult(
        name=step.name,
        state=state,
        reason=reason,
        exit_code=ended.code,
        seconds=round(ended.seconds, 1),
        repeat=shlex.join(["conformance", *step.arguments]),
    )


def _of_newest(path: Path) -> str:
    """What is wrong with the newest release of a ladder; empty if it breaks nothing that is not recorded."""
    try:
        ladder = history.read(path)
    except ConformanceError as error:
        return str(error)
    newest, *others = reversed(ladder.releases)
    if newest.reason:
        return f"{newest.spec}: {newest.reason}"
    before = next((rung.spec for rung in others if not rung.reason), None)
    broken: list[str] = []
    unjudged: list[str] = []
    for row in ladder.rows:
        now = row.cells.get(newest.spec)
        then = row.cells.get(before) if before is not None else None
        if now is None or now.known or now.verdict not in history.BAD:
            continue
        if then is None or then.verdict not in (*history.GOOD, *history.BAD):
            unjudged.append(row.case)
        elif then.verdict in history.GOOD:
            broken.append(row.case)
    found = []
    if broken:
        found.append(f"{newest.spec} fails what {before} passes: {_some(broken)}")
    if unjudged:
        found.append(f"{newest.spec} fails what no release before it was judged by: {_some(unjudged)}")
    return "; ".join(found)


def _some(cases: list[str]) -> str:
    return ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")


def _compare(night: Night) -> tuple[Comparison | None, StepResult | None]:
    """The night beside the history; else why there is no comparison.

    Whether all of the night could be merged does not matter: it is compared with what was there before.
    """
    from conformance.store.history import Store  # it loads SQLAlchemy

    try:
        with Store(night.database) as store:
            return compare(store, list(_runs(night))), None
    except ConformanceError as error:
        return None, StepResult(name="compare", state="bad", reason=str(error))


def _runs(night: Night) -> Iterator[Run]:
    """The runs of the night: of the suites, then of cells."""
    paths = [night.suites_file, *(sorted(night.cells_folder.glob("*.jsonl")))]
    for path in paths:
        with contextlib.suppress(RunFileError):
            yield runfile.read(path)


def _not_run(night: Night, results: list[StepResult]) -> Iterator[NotRun]:
    for step in results:
        if step.state == "not run":
            yield NotRun(what=step.name, count=1, reason=step.reason)
    suites: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    for run in _runs(night):
        if run.header.cell is not None:
            found = execute.summarise(run, run.header.run_id)
            if found.verdict == "not run":
                cells[found.reason] += 1
            continue
        latest = run.latest()
        for entry in run.header.manifest:
            result = latest.get((entry.suite, entry.case, entry.target))
            if result is None:
                suites["the run did not come to it"] += 1
            elif result.verdict == "skip":
                suites[result.reason] += 1
    if waiting := _waiting(night):
        cells[f"their turn is another night's; this one has shard {night.share}"] += waiting
    for what, tally in (("suites", suites), ("matrix", cells), ("backtests", _unreached(night))):
        for reason, count in tally.most_common():
            yield NotRun(what=what, count=count, reason=reason)


def _waiting(night: Night) -> int:
    """How many cells are left to other nights."""
    if night.spread == 1 or not night.cells_folder.is_dir():
        return 0
    chosen = {cell.file_name for cell in matrices.load(night.matrix).select(night.cells, night.tier)}
    return len(chosen - {path.name for path in night.cells_folder.iterdir()})


def _unreached(night: Night) -> Counter[str]:
    """Backtests whose releases are not here, by what is lacking."""
    try:
        found = backtests.read_findings(night.backtests_file).backtests
    except ConformanceError:
        return Counter()
    return Counter(result.proof[-1] for result in found if result.state == "not reachable")


def _gates(night: Night) -> dict[str, int]:
    tally: Counter[str] = Counter()
    for run in _runs(night):
        if run.header.cell is None:
            for result in run.latest().values():
                if result.kind == "accuracy":
                    tally["not run" if result.verdict == "skip" else result.verdict] += 1
    return dict(sorted(tally.items()))


def _file(night: Night) -> Path:
    return night.folder / "steps.json"


def _write(night: Night, done: _Done) -> None:
    aside = _file(night).with_suffix(".new")
    aside.write_text(done.model_dump_json(indent=1) + "\n", encoding="utf-8")
    aside.replace(_file(night))


def _done(night: Night) -> dict[str, StepResult]:
    """Steps that came to their end in this folder, less those that would tell another story now.

    Raises:
        UsageError: it is the folder of another night, or of one that is over.
    """
    try:
        known = _Done.model_validate_json(_file(night).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise UsageError(f"{_file(night)}: cannot be read: {error}; name a new folder with --out") from error
    if known.over:
        raise UsageError(f"{night.folder} holds a night that is over; name a new folder with --out")
    if known.asked != night.asked:
        raise UsageError(
            f"{night.folder} holds a night that was begun with other options, on another day or with other "
            "sources; name a new folder with --out"
        )
    return {name: step for name, step in known.steps.items() if name not in ("merge", "report")}
