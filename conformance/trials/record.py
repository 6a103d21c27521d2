"""The record of trials that were long enough to keep, and whether it still holds.

It holds for what it was made with: the sources that bear on a verdict, and the cases (`conformance.grounds`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from conformance import fingerprint, grounds, resources, sealed
from conformance.loading import LoadedCase
from conformance.records import Record
from conformance.sealed import Sealed
from conformance.trials.clean import CleanPlan, CleanRun, alarming
from conformance.trials.kill import KillPlan, KillTrial

Name = Literal["clean", "kill"]
"""Of a trial."""
NAMES: tuple[Name, ...] = ("clean", "kill")
CLEAN_RUNS = 10
"""Varied runs without a fault that a record must have."""
KILLS = 50
"""Kills that a record must have."""


class Made(Record):
    """With what a trial was made."""

    at: str
    """ISO 8601, UTC."""
    commit: str | None
    sources: str
    """Digest of the sources that bear on a verdict, and of the trials themselves."""
    cases: str
    """Digest of the cases that were chosen."""
    selection: tuple[str, ...]
    """Cases that were asked for; empty for all quick ones."""
    targets: tuple[str, ...]
    seed: int


class CleanTrial(Record):
    """Runs without a fault."""

    made: Made
    runs: tuple[CleanRun, ...]


class Kills(Record):
    """A run that was killed."""

    made: Made
    trial: KillTrial


class TrialsFile(Sealed):
    """What `--record` of both trials writes."""

    schema_version: Literal[1] = 1
    clean: CleanTrial | None = None
    kill: Kills | None = None


def default_path() -> Path:
    """The record that is committed."""
    return resources.ci_dir() / "trials.json"


def read(path: Path) -> TrialsFile:
    """Read a record.

    Raises:
        RecordError: there is none, it is something else, or it was changed by hand.
    """
    return sealed.read(path, TrialsFile, "`conformance trial clean|kill --record`")


def begun(plan: CleanPlan | KillPlan, cases: Sequence[LoadedCase]) -> Made:
    """With what a trial is made that begins now."""
    return Made(
        at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        commit=fingerprint.git_commit(),
        sources=grounds.sources(),
        cases=grounds.of_cases(cases),
        selection=plan.arguments,
        targets=plan.targets,
        seed=plan.seed,
    )


def keep(path: Path, made: Made, found: Sequence[CleanRun] | KillTrial) -> None:
    """Put a trial into a record, instead of the one of its kind.

    Args:
        path: Of the record; there may be none yet.
        made: With what it was begun.
        found: What came of it. Names of run files are kept without their folder.

    Raises:
        RecordError: the file at this path is no record.
    """
    file = read(path) if path.exists() else TrialsFile()
    if isinstance(found, KillTrial):
        names = {"run_file": Path(found.run_file).name, "undisturbed": Path(found.undisturbed).name}
        kill = Kills(made=made, trial=found.model_copy(update=names))
        file = file.model_copy(update={"kill": kill})
    else:
        runs = tuple(run.model_copy(update={"run_file": Path(run.run_file).name}) for run in found)
        file = file.model_copy(update={"clean": CleanTrial(made=made, runs=runs)})
    sealed.write(file, path)


def bad(file: TrialsFile) -> frozenset[Name]:
    """The recorded trials with an alarm, or with something lost."""
    found: set[Name] = set()
    if file.clean is not None and alarming(file.clean.runs):
        found.add("clean")
    if file.kill is not None and not file.kill.trial.sound:
        found.add("kill")
    return frozenset(found)


def stale(file: TrialsFile, chosen: Callable[[tuple[str, ...]], Sequence[LoadedCase]]) -> dict[Name, str]:
    """Why each trial of a record says nothing about today, or not enough; nothing is run.

    Args:
        file: The record.
        chosen: The quick cases of a selection.
    """
    found: dict[Name, str] = {}
    runs = len(file.clean.runs) if file.clean is not None else 0
    kills = len(file.kill.trial.kills) if file.kill is not None else 0
    entries: tuple[tuple[Name, CleanTrial | Kills | None, int, int], ...] = (
        ("clean", file.clean, runs, CLEAN_RUNS),
        ("kill", file.kill, kills, KILLS),
    )
    for name, entry, count, least in entries:
        if entry is None:
            found[name] = "was never made"
        elif count < least:
            found[name] = f"has {count} of {least} runs"
        elif name == "clean" and entry.made.selection:
            found[name] = "is of some cases and not of all quick ones"
        elif "reference" not in entry.made.targets:
            found[name] = "is not of the target `reference`"
        elif entry.made.cases != grounds.of_cases(chosen(entry.made.selection)):
            found[name] = "the cases have changed since"
        elif entry.made.sources != grounds.sources():
            found[name] = "the implementation or the harness has changed since"
    return found
