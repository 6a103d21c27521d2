"""What a night consists of: its steps, each a command of this harness that can be repeated by hand.

A step whose target, checkpoint or file is not there is planned with its reason, and counted as not run.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conformance import backtests, grounds, runfile
from conformance.commands.selection import select
from conformance.errors import ConformanceError
from conformance.faults import record, registry
from conformance.faults.record import FaultsFile
from conformance.gates import record as sensitivity
from conformance.recording import new_run_id
from conformance.sealed import RecordError
from conformance.targets import registry as targets
from conformance.trials import record as trials

LADDERS = ("vllm", "sglang-parsers", "transformers")
"""Targets with releases, whose newest is asked each night."""
KILLED = ("parser/*", "template/*")
"""Cases of the run that is killed: they are quick, so that a kill hits between many results."""
STEP_LIMIT = 6 * 3600.0
"""Seconds that one step may take."""


@dataclass(frozen=True)
class Night:
    """What to run, and where to."""

    folder: Path
    database: str | None
    record: Path
    """Of faults; it grows night by night."""
    cases: tuple[str, ...] = ()
    """Cases of the suites; empty for all quick ones."""
    targets: tuple[str, ...] = ()
    """Empty for the defaults."""
    tier: str = "nightly"
    cells: tuple[str, ...] = ()
    """Cells of the tier, by id or pattern; empty for all."""
    spread: int = 1
    """Over how many nights on end these cells are spread: each has its turn in one of them."""
    matrix: Path | None = None
    ladders: tuple[str, ...] = LADDERS
    backtests: tuple[str, ...] = ()
    """Catalogue ids of faults that are looked for in the releases that had them; empty for all."""
    sample: int = 3
    """Faults that are measured."""
    clean_runs: int = 2
    kills: int = 50
    workers: int = 1
    skip: frozenset[str] = frozenset()
    """Names of steps that are left out."""
    limit: float = STEP_LIMIT
    today: dt.date = field(default_factory=lambda: dt.datetime.now(dt.UTC).date())

    @property
    def asked(self) -> str:
        """Digest of what bears on its steps: the options, the day and the sources.

        What is left out, how many processes there are and how long they have may differ when it goes on.
        """
        told = {
            name: str(value)
            for name, value in vars(self).items()
            if name not in ("folder", "workers", "limit", "skip")
        }
        return grounds.of_text(f"{sorted(told.items())} {runfile.harness_digest()}")

    @property
    def share(self) -> str:
        """The part of the cells whose turn it is, as `--shard` takes it."""
        return f"{self.today.toordinal() % self.spread + 1}/{self.spread}"

    @property
    def suites_file(self) -> Path:
        """Run file of the suites."""
        return self.folder / "suites.jsonl"

    @property
    def cells_folder(self) -> Path:
        """Run files of cells."""
        return self.folder / "cells"

    @property
    def trials_file(self) -> Path:
        """Record of the trials; one that is long enough may be committed."""
        return self.folder / "trials.json"

    def ladder_file(self, target: str) -> Path:
        """Where the newest rung of a ladder is written."""
        return self.folder / f"ladder-{target}.json"

    @property
    def backtests_file(self) -> Path:
        """What became of backtests."""
        return self.folder / "backtests.json"

    @property
    def site(self) -> Path:
        """The dashboard."""
        return self.folder / "site"


@dataclass(frozen=True)
class Step:
    """One step."""

    name: str
    arguments: tuple[str, ...] = ()
    """Of `conformance`; empty where there is nothing to run."""
    reason: str = ""
    """Why it cannot run; that is nobody's failure."""
    ladder: Path | None = None
    """The ladder that it writes, if it is one."""
    wrong: str = ""
    """What is wrong, so that it cannot be planned: it has failed."""


STEPS = (
    *("suites", "ladder", "backtests", "matrix", "faults-check", "faults-sample"),
    *("gates-check", "trials-check", "checkpoints-check", "clean", "kill", "merge", "report"),
)
"""Names that `--skip` takes; a ladder's step is called `ladder-TARGET`."""


def steps(night: Night) -> list[Step]:
    """The steps whose results go into the history, in their order."""
    several = _several(night)
    asked = tuple(word for target in night.targets for word in ("-t", target))
    runfile.discard_unbegun(night.suites_file)
    where = "--resume" if night.suites_file.exists() else "--out"
    matrix = ("--matrix", str(night.matrix)) if night.matrix is not None else ()
    share = ("--shard", night.share) if night.spread > 1 else ()
    planned = [
        Step(
            "suites",
            ("run", *night.cases, "--quick", *asked, *several, "--no-report", where, str(night.suites_file)),
        ),
        Step(
            "matrix",
            (
                *("matrix", "run", *night.cells, "--tier", night.tier, *share, *matrix, *several),
                *("--out", str(night.cells_folder), "--resume"),
            ),
        ),
    ]
    return [step for step in planned if step.name not in night.skip]


def trial_steps(night: Night) -> list[Step]:
    """The steps that are about releases, and about the harness itself."""
    planned = [
        *(_ladder(night, target) for target in night.ladders),
        _backtests(night),
        *_faults(night, _several(night)),
        _gates_check(),
        _trials_check(),
        # Training takes longer than a night: what is committed says with which sources it was trained.
        Step("checkpoints-check", ("checkpoints", "check")),
        Step(
            "clean",
            (
                *("trial", "clean", *night.cases, "--runs", str(night.clean_runs), "--seed", _seed(night)),
                *("--out", str(night.folder / "clean"), "--record", str(night.trials_file)),
            ),
        ),
        Step(
            "kill",
            (
                *("trial", "kill", *(night.cases or KILLED), "--times", str(night.kills)),
                # A trial that was ended with its night is made anew.
                *("--seed", _seed(night), "--out", str(night.folder / "kill" / new_run_id())),
                *("--record", str(night.trials_file)),
            ),
        ),
    ]
    return [step for step in planned if step.name not in night.skip and _group(step) not in night.skip]


def merge(night: Night) -> Step:
    """Put the run files of the night into the history."""
    files = [path for path in (night.suites_file,) if path.exists()]
    files += sorted(night.cells_folder.glob("*.jsonl")) if night.cells_folder.is_dir() else []
    if not files:
        return Step("merge", reason="no run file was written")
    return Step("merge", ("store", "merge", *map(str, files), *_database(night)))


def report(night: Night) -> Step:
    """Write the dashboard of the night, with a page for all that it ran."""
    if not night.suites_file.exists():
        return Step("report", reason="the suites have no run file")
    options: list[str] = []
    for target in night.ladders:
        if night.ladder_file(target).exists():
            options += ["--ladder", str(night.ladder_file(target))]
    if night.backtests_file.exists():
        options += ["--backtests", str(night.backtests_file)]
    if night.cells_folder.is_dir() and any(night.cells_folder.glob("*.jsonl")):
        options += ["--matrix", str(night.cells_folder)]
    if night.record.exists():
        options += ["--faults", str(night.record)]
    if night.trials_file.exists():
        options += ["--trials", str(night.trials_file)]
    options += [*_database(night), "--out", str(night.site)]
    return Step("report", ("report", str(night.suites_file), *options))


def _several(night: Night) -> tuple[str, ...]:
    return ("-n", str(night.workers)) if night.workers > 1 else ()


def _database(night: Night) -> tuple[str, ...]:
    return ("--database", night.database) if night.database is not None else ()


def _group(step: Step) -> str:
    return step.name.partition("-")[0] if step.name.startswith("ladder-") else step.name


def _seed(night: Night) -> str:
    """Another one each night."""
    return str(night.today.toordinal())


def _ladder(night: Night, target: str) -> Step:
    """The newest release, and the one before it if it is installed, for what the newest changed."""
    name = f"ladder-{target}"
    try:
        every = targets.releases(target)
    except ConformanceError as error:
        return Step(name, reason=str(error))
    reason = targets.unavailable(every[-1])
    if reason:
        return Step(name, reason=f"{every[-1]}: {reason}")
    usable = [spec for spec in every[-2:] if not targets.unavailable(spec)]
    rungs = tuple(word for spec in usable for word in ("--release", spec.partition("@")[2]))
    path = night.ladder_file(target)
    asked = ("ladder", *night.cases, "--target", target, *rungs, "--out", str(path))
    return Step(name, asked, ladder=path)


def _backtests(night: Night) -> Step:
    """Those faults that were public, in the releases that had them, as far as both are installed."""
    try:
        table = backtests.load()
        reasons = [
            backtests.not_installed(entry, table) for entry in backtests.choose(table, night.backtests)
        ]
    except ConformanceError as error:
        return Step("backtests", wrong=str(error))
    if all(reasons):
        return Step("backtests", reason=reasons[0])
    return Step(
        "backtests", ("backtest", *night.backtests, "--installed", "--out", str(night.backtests_file))
    )


def _faults(night: Night, several: tuple[str, ...]) -> Sequence[Step]:
    if {"faults-check", "faults-sample"} <= night.skip:
        return ()  # what follows loads torch
    try:
        return _planned_faults(night, several)
    except ConformanceError as error:
        wanted = ("faults-check", "faults-sample")
        return [Step(name, wrong=str(error)) for name in wanted if name not in night.skip]


def _planned_faults(night: Night, several: tuple[str, ...]) -> Sequence[Step]:
    """The same.

    Raises:
        ConformanceError: the committed record, a fault's place or a suite is broken.
    """
    _set_aside(night.record)
    source = record.default_path()
    if source.is_file():
        own = record.read(night.record) if night.record.exists() else FaultsFile()
        record.write(record.newest(own, record.read(source)), night.record)
    check = Step("faults-check", ("faults", "check", str(night.record)))
    if not night.record.exists():
        check = Step("faults-check", reason=f"there is no record {night.record} yet")
    if "faults-sample" in night.skip:
        return (check,)
    chosen = sample(night)
    named = tuple(word for fault in chosen for word in ("--fault", fault))
    work = ("--work", str(night.folder / "faults"))
    measure = ("faults", "measure", *night.cases, *named, "--again", "--out", str(night.record), *work)
    return check, Step("faults-sample", (*measure, *several))


def _gates_check() -> Step:
    """Of the committed record of what gates notice, which takes hours to measure."""
    if not sensitivity.default_path().is_file():
        return Step("gates-check", reason=f"there is no record {sensitivity.default_path()} yet")
    return Step("gates-check", ("gate", "check-sensitivity"))


def _trials_check() -> Step:
    """Of the committed record: what takes too long for a night is made once for each state of the sources."""
    if not trials.default_path().is_file():
        return Step("trials-check", reason=f"there is no record {trials.default_path()} yet")
    return Step("trials-check", ("trial", "check"))


def _set_aside(path: Path) -> None:
    """Rename a record that this version cannot read, such as an older one out of a cache, to begin anew."""
    if path.exists():
        try:
            record.read(path)
        except RecordError:
            path.replace(path.with_name(f"{path.name}.unreadable"))


def sample(night: Night) -> list[str]:
    """The faults of a night: those whose record does not hold, the oldest first, then others each night."""
    known = record.read(night.record) if night.record.exists() else FaultsFile()
    cases = select(night.cases, quick=True).cases
    faults = list(registry().values())
    stale = [fault.id for fault in faults if record.stale(known.of(fault.id), record.basis(fault, cases))]
    when = {found.fault: found.last.at for found in known.faults}
    stale.sort(key=lambda name: when.get(name, ""))
    start = night.today.toordinal() * night.sample % len(faults)
    others = [fault.id for fault in (*faults[start:], *faults[:start]) if fault.id not in stale]
    return [*stale, *others][: night.sample]
