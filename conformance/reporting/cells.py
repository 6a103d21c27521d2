"""What the dashboard shows of the matrix: for each target a map of backends by layouts, and its cells.

A box of the map holds all cells with that backend and layout; other axes, such as dtype, differ inside it.
Its numbers are those of the list that it links to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from conformance.execute import CellResult, summarise
from conformance.matrix import BACKENDS, LAYOUTS, TARGETS
from conformance.reporting.signs import SIGNS, Status, status_of
from conformance.reporting.slugs import Slugs
from conformance.reporting.view import Case, Site
from conformance.results import CellRecord, CellVerdict, PlannedCase, Result, Run

_WORST: tuple[Status, ...] = ("error", "timeout", "fail", "xpass", "inconclusive", "xfail", "pass", "not-run")


@dataclass(eq=False)
class CellCase:
    """One case of a cell."""

    planned: PlannedCase
    result: Result | None
    case: Case | None
    """The same case in the run of this dashboard, if it is there."""

    @property
    def status(self) -> Status:
        """What became of it."""
        return status_of(self.result)

    @property
    def address(self) -> str:
        """`generation/scripted::batch`."""
        return f"{self.planned.suite}::{self.planned.case}"

    @property
    def reason(self) -> str:
        """Why it is no plain pass, as far as no problem says it."""
        return self.result.reason if self.result is not None else ""

    @property
    def effective(self) -> dict[str, str]:
        """What really ran, where the target says so."""
        if self.result is None:
            return {}
        got = self.result.evidence.got
        if self.result.evidence.parity is not None:
            return self.result.evidence.parity.effective
        found = got.get("effective") if isinstance(got, dict) else None
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


@dataclass(eq=False)
class CellEntry:
    """One cell, as its newest run has it."""

    record: CellRecord
    run: Run
    outcome: CellResult
    slug: str
    cases: list[CellCase]

    @property
    def id(self) -> str:
        """Its id."""
        return self.record.id

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"cells/{self.slug}.html"

    @property
    def status(self) -> Status:
        """The worst of its verdicts."""
        return status_of_cell(self.outcome.verdict)

    @property
    def rest(self) -> str:
        """Its values on the axes that the map does not show."""
        hidden = (TARGETS, BACKENDS, LAYOUTS)
        return ", ".join(label for axis, label in self.record.axes.items() if axis not in hidden)

    @property
    def counts(self) -> dict[Status, int]:
        """Its cases by status, in the order of the signs."""
        tally = Counter(case.status for case in self.cases)
        return {status: tally[status] for status in SIGNS if tally[status]}


@dataclass(eq=False)
class Box:
    """Cells that are counted together."""

    slug: str = ""
    entries: list[CellEntry] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many cells it holds."""
        return len(self.entries)

    @property
    def counts(self) -> dict[Status, int]:
        """Cells by status, in the order of the signs."""
        tally = Counter(entry.status for entry in self.entries)
        return {status: tally[status] for status in SIGNS if tally[status]}

    @property
    def worst(self) -> Status:
        """What colours it: the worst status; one that did not run counts only where none ran."""
        return next(status for status in _WORST if status in self.counts)

    def of(self, status: Status) -> list[CellEntry]:
        """The cells with one status."""
        return [entry for entry in self.entries if entry.status == status]


@dataclass(eq=False)
class Map:
    """Backends by layouts of one target."""

    target: str
    slug: str
    backends: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    boxes: dict[tuple[str, str], Box] = field(default_factory=dict)
    """By backend and layout."""
    all: Box = field(default_factory=Box)


class MatrixView(Box):
    """The matrix.

    Args:
        runs: Of its cells; of several of one cell, the newest counts.
        site: The run beside which it is shown, for links.
        left_out: Sentences that say which cells are not shown, and why.

    Raises:
        RunFileError: a run is of no cell.
    """

    def __init__(self, runs: Iterable[Run], site: Site, left_out: Sequence[str] = ()) -> None:
        super().__init__(slug="all")
        self.left_out = left_out
        slugs, self._target_slugs, self._box_slugs = Slugs(), Slugs(), Slugs()
        cases = {case.address: case for case in site.cases}
        self.maps: dict[str, Map] = {}
        for run, outcome in _newest(runs):
            assert run.header.cell is not None
            latest = run.latest()
            entry = CellEntry(
                record=run.header.cell,
                run=run,
                outcome=outcome,
                slug=slugs[run.header.cell.id],
                cases=[
                    CellCase(
                        plan, latest.get((plan.suite, plan.case, plan.target)), cases.get(_address(plan))
                    )
                    for plan in run.header.manifest
                ],
            )
            self._add(entry)

    @property
    def attention(self) -> list[CellEntry]:
        """Cells that someone should look at, worst first."""
        return [entry for status in _WORST if SIGNS[status].attention for entry in self.of(status)]

    @property
    def idle(self) -> dict[str, list[CellEntry]]:
        """Cells that did not run, by the reason."""
        found: dict[str, list[CellEntry]] = {}
        for entry in self.of("not-run"):
            found.setdefault(entry.outcome.reason or "no reason is recorded", []).append(entry)
        return found

    def _add(self, entry: CellEntry) -> None:
        axes = entry.record.axes
        target = axes.get(TARGETS, "unknown")
        if target not in self.maps:
            slug = self._target_slugs[target]
            self.maps[target] = Map(target, slug, all=Box(slug))
        shown = self.maps[target]
        backend, layout = axes.get(BACKENDS, "unknown"), axes.get(LAYOUTS, "unknown")
        for label, known in ((backend, shown.backends), (layout, shown.layouts)):
            if label not in known:
                known.append(label)
        box = shown.boxes.get((backend, layout))
        if box is None:
            name = f"{shown.slug} {backend} {layout}"
            box = shown.boxes.setdefault((backend, layout), Box(self._box_slugs[name]))
        for group in (self, shown.all, box):
            group.entries.append(entry)


def status_of_cell(verdict: CellVerdict) -> Status:
    """The sign of a cell."""
    return "not-run" if verdict == "not run" else verdict


def _newest(runs: Iterable[Run]) -> Sequence[tuple[Run, CellResult]]:
    """The newest run of each cell, in the order in which cells were first met."""
    found: dict[str, tuple[Run, CellResult]] = {}
    for run in runs:
        outcome = summarise(run, run.header.run_id)
        known = found.get(outcome.cell)
        if known is None or known[0].header.started <= run.header.started:
            found[outcome.cell] = (run, outcome)
    return list(found.values())


def _address(plan: PlannedCase) -> str:
    return f"{plan.suite}::{plan.case}"
