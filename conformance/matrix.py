"""The matrix of CI: axes and their values, the cells they span, and which cells a tier has.

1. A cell is one value of every axis: a target, a checkpoint, and what `Settings` hold. Its settings are
   imposed on the cases of its checkpoint (`conformance.placing`).
2. A combination that means nothing is no cell: a backend of another engine, or settings that no case of the
   checkpoint takes. One that means something and cannot run here is a cell, and is reported as not run.
3. A tier is a covering: every combination of so many values occurs in it, in a cell that can run if there is
   one. Cells that cannot run are covered by themselves, so that they cost no coverage and are never left out.
4. A cell's id names its target, its checkpoint, and what is not the first value of its axis. So a new axis
   changes no id.
"""

from __future__ import annotations

import fnmatch
import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from conformance import placing, resources, yamlfile
from conformance.covering import covering
from conformance.errors import ConformanceError, UsageError
from conformance.loading import LoadedCase, LoadedSuites, load_suites
from conformance.placing import Settings
from conformance.results import CellRecord
from conformance.suitebase import CaseId, Strict
from conformance.targets import registry
from conformance.targets.protocol import Feature

BACKENDS = "attention"
LAYOUTS = "layout"
"""The axes of the dashboard's map; every matrix has them."""
TARGETS = "target"
CHECKPOINTS = "checkpoint"

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
Need = Literal["cuda"]
"""What a machine must have."""

_UNKNOWN_SECONDS = 60.0
"""For a cell where nothing was measured."""
_NOT_RUN_SECONDS = 1.0
_DURATIONS = TypeAdapter(dict[str, float])


class TargetEntry(Strict):
    """One value of the axis `target`."""

    features: tuple[Feature, ...] = ()
    """What it can be asked for. The covering is made with it; what a cell comes to, the target decides."""
    needs: Need | None = None


class CheckpointEntry(Strict):
    """One value of the axis `checkpoint`."""

    cases: tuple[str, ...] = Field(min_length=1)
    """Addresses or patterns of the cases that use it."""
    of: tuple[str, ...] = ()
    """Patterns of the targets that can be asked these cases; empty: all."""


class Value(Settings):
    """One value of another axis, and what it sets."""

    of: tuple[str, ...] = ()
    """Patterns of the targets that have it; empty: all."""
    needs: Need | None = None


class Exclusion(Strict):
    """Cells that the matrix does not have, though they mean something."""

    where: dict[str, tuple[str, ...]] = Field(min_length=2)
    """Axis to values; cells that have one of them on each of these axes."""
    reason: str = Field(min_length=8)


class Tier(Strict):
    """Which cells run on one occasion."""

    strength: int | None = Field(default=None, ge=1)
    """How many values each covered combination has; absent: all cells."""
    shards: int = Field(default=1, ge=1, le=256)
    """Jobs that CI spreads it over; GitHub makes no more than 256 of one matrix."""
    trigger: Literal["pull-request", "nightly", "release", "manual"] = "manual"
    """When CI runs it."""
    publish: bool = False
    """Whether its dashboard is published; else it is kept with the run."""


class MatrixFile(Strict):
    """What `ci/matrix.yaml` holds."""

    title: str
    targets: dict[str, TargetEntry] = Field(min_length=1)
    """By canonical spec."""
    checkpoints: dict[CaseId, CheckpointEntry] = Field(min_length=1)
    axes: dict[CaseId, dict[Label, Value]]
    """The first value of each is the usual one; it sets nothing."""
    excluded: tuple[Exclusion, ...] = ()
    tiers: dict[CaseId, Tier] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One point of the matrix."""

    id: str
    labels: Mapping[str, str]
    """Every axis to its value, `target` and `checkpoint` first."""
    settings: Settings
    needs: tuple[Need, ...]
    lacks: tuple[Feature, ...]
    """What its target cannot do, as far as the file knows."""
    cases: tuple[str, ...]
    """Patterns of its cases."""

    @property
    def target(self) -> str:
        """Spec of its target."""
        return self.labels[TARGETS]

    @property
    def checkpoint(self) -> str:
        """Name of its checkpoint."""
        return self.labels[CHECKPOINTS]

    @property
    def may_run(self) -> bool:
        """Whether it is one of those that can run without a GPU."""
        return not self.needs and not self.lacks

    @property
    def file_name(self) -> str:
        """Name of its run file."""
        return "".join(c if c.isalnum() or c in "@+._-" else "_" for c in self.id) + ".jsonl"

    @property
    def record(self) -> CellRecord:
        """What a run's header says of it."""
        return CellRecord(id=self.id, axes=dict(self.labels), settings=self.settings.imposed)


class Matrix:
    """A loaded file.

    Args:
        path: It.
        file: What it holds.
        suites: Where its cases are.
        custom: The path, where it is not the bundled file.
    """

    def __init__(
        self, path: Path, file: MatrixFile, suites: LoadedSuites, custom: Path | None = None
    ) -> None:
        self.path = path
        self.custom = custom
        self.file = file
        self._cases = {
            name: tuple({c.address: c for pattern in entry.cases for c in suites.match(pattern)}.values())
            for name, entry in file.checkpoints.items()
        }
        self._applicable: dict[tuple[str, str], bool] = {}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in the order of the file: the last axis changes fastest."""
        return tuple(self._expand())

    def cell(self, cell_id: str) -> Cell:
        """One cell.

        Raises:
            UsageError: there is none of this id.
        """
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        raise UsageError(f"{self.path}: no cell {cell_id!r}; `conformance matrix show --all` names them all")

    def select(self, names: Sequence[str], tier: str | None = None) -> tuple[Cell, ...]:
        """Cells of a tier that are named by their ids or by patterns; of the whole matrix without a tier.

        Raises:
            UsageError: no such tier, or a name that matches nothing.
        """
        cells = self.cells if tier is None else self.tier(tier)
        if not names:
            return cells
        chosen: set[str] = set()
        for name in names:
            found = {cell.id for cell in cells if fnmatch.fnmatchcase(cell.id, name)}
            if not found:
                where = f"in tier {tier!r} " if tier is not None else ""
                raise UsageError(f"{name!r} matches no cell {where}of {self.path}")
            chosen |= found
        return tuple(cell for cell in cells if cell.id in chosen)

    def tier(self, name: str) -> tuple[Cell, ...]:
        """The cells of a tier, in the order of the file.

        Raises:
            UsageError: there is no such tier.
        """
        if name not in self.file.tiers:
            raise UsageError(f"{self.path}: no tier {name!r}; there are {', '.join(self.file.tiers)}")
        strength = self.file.tiers[name].strength
        if strength is None:
            return self.cells
        chosen: set[str] = set()
        for able in (True, False):
            cells = {cell.id: cell for cell in self.cells if cell.may_run == able}
            ids = {tuple(cell.labels.values()): cell_id for cell_id, cell in cells.items()}
            rows = covering([cell.labels for cell in cells.values()], strength)
            chosen |= {ids[tuple(row.values())] for row in rows}
        return tuple(cell for cell in self.cells if cell.id in chosen)

    def placed(self, cell: Cell) -> tuple[LoadedCase, ...]:
        """The cases of a cell, with its settings."""
        cases = self._cases[cell.checkpoint]
        placed = (placing.place(case, cell.settings, cell.id, self.custom) for case in cases)
        return tuple(case for case in placed if isinstance(case, LoadedCase))

    def left_out(self, cell: Cell) -> dict[str, str]:
        """Addresses of cases of its checkpoint that a cell does not have, and why."""
        reasons = {c.address: placing.why_not(c, cell.settings) for c in self._cases[cell.checkpoint]}
        return {address: reason for address, reason in reasons.items() if reason}

    def _expand(self) -> Iterable[Cell]:
        for spec, target in self.file.targets.items():
            for checkpoint, entry in self.file.checkpoints.items():
                rows: list[dict[str, str]] = [{}] if _has(entry, spec) else []
                for axis, values in self.file.axes.items():
                    own = [label for label, value in values.items() if _has(value, spec)]
                    rows = [row | {axis: label} for row in rows for label in own]
                cells = (self._cell(spec, target, checkpoint, entry, row) for row in rows)
                yield from (c for c in cells if not self._is_excluded(c) and self._has_cases(c))

    def _is_excluded(self, cell: Cell) -> bool:
        return any(
            all(cell.labels[axis] in labels for axis, labels in exclusion.where.items())
            for exclusion in self.file.excluded
        )

    def _has_cases(self, cell: Cell) -> bool:
        key = (cell.checkpoint, json.dumps(cell.settings.imposed, sort_keys=True))
        if key not in self._applicable:
            cases = self._cases[cell.checkpoint]
            self._applicable[key] = not all(placing.why_not(case, cell.settings) for case in cases)
        return self._applicable[key]

    def _cell(
        self,
        spec: str,
        target: TargetEntry,
        checkpoint: str,
        entry: CheckpointEntry,
        row: dict[str, str],
    ) -> Cell:
        values = [self.file.axes[axis][label] for axis, label in row.items()]
        settings = Settings.model_validate({k: v for value in values for k, v in value.imposed.items()})
        needs = (target.needs, *(value.needs for value in values))
        named = [label for axis, label in row.items() if label != _first(self.file.axes[axis])]
        return Cell(
            id="+".join([spec, checkpoint, *named]),
            labels={TARGETS: spec, CHECKPOINTS: checkpoint, **row},
            settings=settings,
            needs=tuple(dict.fromkeys(need for need in needs if need is not None)),
            lacks=tuple(feature for feature in settings.features if feature not in target.features),
            cases=entry.cases,
        )


def load(path: Path | None = None) -> Matrix:
    """Load a matrix file; None for the one that comes with the harness.

    Raises:
        SuiteError: with file, line, field and what to do.
    """
    custom, path = path, (resources.ci_dir() / "matrix.yaml") if path is None else path
    document = yamlfile.read(path)
    if not isinstance(document.value, dict):
        raise document.error((), "a matrix is a mapping with title, targets, checkpoints, axes and tiers")
    file = document.validate(MatrixFile)
    suites = load_suites()
    _check_targets(document, file)
    for name, entry in file.checkpoints.items():
        for index, pattern in enumerate(entry.cases):
            if not suites.match(pattern):
                where = ("checkpoints", name, "cases", index)
                raise document.error(where, f"{pattern!r} matches no case; a case is `suite-id::case-id`")
        _check_of(document, ("checkpoints", name, "of"), entry.of, file)
    _check_axes(document, file)
    _check_exclusions(document, file)
    return Matrix(path, file, suites, custom)


def json_schema() -> dict[str, Any]:
    """JSON Schema of matrix files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **MatrixFile.model_json_schema()}


def durations(matrix: Matrix) -> dict[str, float]:
    """Measured seconds by cell id, from `durations.json` beside the matrix; empty where there is none.

    Raises:
        ConformanceError: the file holds something else.
    """
    path = matrix.path.with_name("durations.json")
    try:
        return _DURATIONS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError):
        raise ConformanceError(
            f"{path}: is no mapping of cells to seconds; `conformance matrix measure` writes it"
        ) from None


def write_durations(matrix: Matrix, measured: Mapping[str, float]) -> Path:
    """Replace what is known of some cells; cells that the matrix no longer has are dropped."""
    known = {**durations(matrix), **measured}
    kept = {cell.id: round(known[cell.id], 1) for cell in matrix.cells if cell.id in known}
    path = matrix.path.with_name("durations.json")
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return path


def shard(
    cells: Sequence[Cell],
    seconds: Mapping[str, float],
    number: int,
    count: int,
    installs: Mapping[str, float] | None = None,
) -> tuple[Cell, ...]:
    """The cells of one of several jobs that take about as long.

    The longest cell goes first, to the job that is done earliest with it. An engine's first cell in a job
    costs its installation besides, and counts twice in the choice: it takes time that another job has spent
    already, so that it has to be worth more than the moment it saves.

    Args:
        cells: To be spread.
        seconds: Measured, by id. What is missing is taken to last as long as others of its target do.
        number: Of the job, from 1.
        count: Of all jobs. There may be more than cells; then some have none.
        installs: Seconds that the installation of a target takes; none for those that are not there.

    Raises:
        UsageError: there is no such job.
    """
    if not 1 <= number <= count:
        raise UsageError(f"shard {number}/{count}: the number is between 1 and {count}")
    expected = {cell.id: expected_seconds(cell, cells, seconds) for cell in cells}
    loads = [0.0] * count
    installed: list[set[str]] = [set() for _ in range(count)]
    mine: set[str] = set()
    for cell in sorted(cells, key=lambda cell: (-expected[cell.id], cell.id)):
        install = (installs or {}).get(cell.target, 0.0) if cell.may_run else 0.0
        extra = [0.0 if cell.target in there else install for there in installed]
        costs = [load + 2 * more for load, more in zip(loads, extra, strict=True)]
        job = costs.index(min(costs))
        loads[job] += extra[job] + expected[cell.id]
        if install:
            installed[job].add(cell.target)
        if job == number - 1:
            mine.add(cell.id)
    return tuple(cell for cell in cells if cell.id in mine)


def expected_seconds(cell: Cell, cells: Sequence[Cell], seconds: Mapping[str, float]) -> float:
    """How long a cell takes: as measured, else as others of its target do."""
    if cell.id in seconds:
        return seconds[cell.id]
    if not cell.may_run:
        return _NOT_RUN_SECONDS
    alike = [seconds[c.id] for c in cells if c.target == cell.target and c.may_run and c.id in seconds]
    return statistics.median(alike or list(seconds.values()) or [_UNKNOWN_SECONDS])


def _has(value: Value | CheckpointEntry, spec: str) -> bool:
    return not value.of or any(fnmatch.fnmatchcase(spec, pattern) for pattern in value.of)


def _first(values: Mapping[str, Value]) -> str:
    return next(iter(values))


def _check_targets(document: yamlfile.Document, file: MatrixFile) -> None:
    for spec in file.targets:
        try:
            canonical = registry.resolve(spec)
        except ConformanceError as error:
            raise document.error(("targets", spec), str(error)) from None
        if canonical != spec:
            raise document.error(("targets", spec), f"write {canonical!r}: ids of cells name the version")


def _check_axes(document: yamlfile.Document, file: MatrixFile) -> None:
    for axis in (BACKENDS, LAYOUTS):
        if axis not in file.axes:
            raise document.error(("axes",), f"the axis `{axis}` is missing; the dashboard's map needs it")
    for axis in (TARGETS, CHECKPOINTS):
        if axis in file.axes:
            raise document.error(("axes", axis), f"`{axis}` is an axis already; name this one otherwise")
    labels: dict[str, str] = {}
    owners: dict[str, str] = {}
    for axis, values in file.axes.items():
        if not values:
            raise document.error(("axes", axis), "an axis needs a value")
        for number, (label, value) in enumerate(values.items()):
            where = ("axes", axis, label)
            if number == 0 and (value.imposed or value.of or value.needs):
                raise document.error(where, "the first value is the usual one: it sets and needs nothing")
            if number and not value.imposed:
                raise document.error(
                    where, f"sets nothing; known settings: {', '.join(Settings.model_fields)}"
                )
            if number and labels.setdefault(label, axis) != axis:
                raise document.error(where, f"is also a value of `{labels[label]}`; ids need distinct ones")
            for name in value.imposed:
                if owners.setdefault(name, axis) != axis:
                    raise document.error((*where, name), f"is set by the axis `{owners[name]}` already")
            _check_of(document, (*where, "of"), value.of, file)


def _check_exclusions(document: yamlfile.Document, file: MatrixFile) -> None:
    known: dict[str, Collection[str]] = {TARGETS: file.targets, CHECKPOINTS: file.checkpoints, **file.axes}
    for index, exclusion in enumerate(file.excluded):
        for axis, labels in exclusion.where.items():
            where = ("excluded", index, "where", axis)
            if axis not in known:
                raise document.error(where, f"no axis {axis!r}; there are {', '.join(known)}")
            for label in labels:
                if label not in known[axis]:
                    raise document.error(where, f"{label!r} is no value of `{axis}`")


def _check_of(document: yamlfile.Document, where: yamlfile.Loc, of: Sequence[str], file: MatrixFile) -> None:
    for pattern in of:
        if not any(fnmatch.fnmatchcase(spec, pattern) for spec in file.targets):
            raise document.error(where, f"{pattern!r} matches no target of this matrix")
