"""Run a night step by step, compare it with the history, and say what came of it.

A night that was ended goes on from its folder: a step that came to its end is not run again.
"""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from conformance import execute, runfile
from conformance.comparison import Comparison, compare
from conformance.errors import ConformanceError, RunFileError
from conformance.execute import Job, LocalExecutor
from conformance.nightly.plan import Night, Step, merge, report, steps
from conformance.records import Record
from conformance.results import Run
from conformance.targets.guarded import ending

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

    @property
    def exit_code(self) -> int:
        """1 for anything bad, else 3 for anything open, else 0; what could not run changes nothing."""
        states = {step.state for step in self.steps}
        return 1 if "bad" in states else 3 if "open" in states else 0


class _Done(Record):
    """What a folder holds of a night that was ended."""

    steps: dict[str, StepResult] = {}  # noqa: RUF012 - pydantic copies it


def run(night: Night, progress: Callable[[StepResult], None] = lambda step: None) -> NightResult:
    """Run a night.

    Raises:
        ConformanceError: a file of the night, or the record of faults, cannot be read.
    """
    night.folder.mkdir(parents=True, exist_ok=True)
    done = _done(night)
    results: list[StepResult] = []

    def take(step: Step) -> StepResult:
        result = done.get(step.name) or _run(step, night)
        if result.exit_code is not None or result.state == "not run":
            done[step.name] = result
            _file(night).write_text(_Done(steps=done).model_dump_json(indent=1) + "\n", encoding="utf-8")
        results.append(result)
        progress(result)
        return result

    for step in steps(night):
        take(step)
    compared: Comparison | None = None
    if "merge" not in night.skip and take(merge(night)).state == "good":
        compared = _compare(night)
    if "report" not in night.skip:
        take(report(night))
    return NightResult(
        folder=str(night.folder),
        steps=tuple(results),
        not_run=tuple(_not_run(night, results)),
        comparison=compared,
        gates=_gates(night),
    )


def _run(step: Step, night: Night) -> StepResult:
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
    return StepResult(
        name=step.name,
        state=state,
        reason=reason,
        exit_code=ended.code,
        seconds=round(ended.seconds, 1),
        repeat=shlex.join(["conformance", *step.arguments]),
    )


def _compare(night: Night) -> Comparison | None:
    from conformance.store.history import Store  # it loads SQLAlchemy

    with contextlib.suppress(ConformanceError), Store(night.database) as store:
        return compare(store, list(_runs(night)))
    return None


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
    for what, tally in (("suites", suites), ("matrix", cells)):
        for reason, count in tally.most_common():
            yield NotRun(what=what, count=count, reason=reason)


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


def _done(night: Night) -> dict[str, StepResult]:
    """Steps that came to their end in this folder, less those that would tell another story now."""
    try:
        known = _Done.model_validate_json(_file(night).read_text(encoding="utf-8")).steps
    except (OSError, ValidationError):
        return {}
    return {name: step for name, step in known.items() if name not in ("merge", "report")}
