"""What the dashboard shows of accuracy: scores with their intervals over time, outcome classes, every item.

A *series* is one case on one target. Its newest scores are the run's own where the run has any, else the
newest in the history; its points are those of the history and the run's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from conformance.gates.decision import Decision
from conformance.reporting.charts import Chart, Reading, chart
from conformance.reporting.items import ItemList, item_lists
from conformance.reporting.signs import Status, status_of
from conformance.reporting.slugs import Slugs
from conformance.reporting.view import Case, Entry, Site
from conformance.results import AccuracyEvidence, Result
from conformance.scoring import SheetHeader
from conformance.store import Key, StoredVerdict

History = Mapping[Key, Sequence[tuple[StoredVerdict, Result]]]
"""Results of accuracy cases by case and target, oldest first. All but the newest come without their items."""

MOST_POINTS = 60
"""Runs that a chart has room for; older ones stay in the history."""


@dataclass(frozen=True)
class Point:
    """A series in one run."""

    run_id: str
    started: str
    result: Result
    own: bool
    """It is of the run of this dashboard."""

    @property
    def status(self) -> Status:
        """Sign of its verdict."""
        return status_of(self.result)

    @property
    def evidence(self) -> AccuracyEvidence | None:
        """Its scores, if it came to any."""
        return self.result.evidence.accuracy

    @property
    def decision(self) -> Decision | None:
        """What the gate made of them, if it compared."""
        return self.evidence.decision if self.evidence is not None else None

    @property
    def outcomes(self) -> dict[str, int]:
        """Outcome class to number of items; of earlier runs, as the gate counted them."""
        if self.evidence is None:
            return {}
        if self.evidence.sheet.items or self.decision is None:
            return {name: number for name, number in self.evidence.sheet.counts().items() if number}
        return self.decision.outcomes


@dataclass(eq=False)
class Series:
    """One case on one target, over time."""

    key: Key
    slug: str
    points: list[Point]
    """Oldest first; of each run one."""
    case: Case | None
    """The case in the run of this dashboard, if it is there."""
    latest: Point
    """The one whose items are shown; it has scores."""

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"accuracy/{self.slug}.html"

    @property
    def address(self) -> str:
        """`accuracy/nano::gsm8k-e`."""
        return f"{self.key[0]}::{self.key[1]}"

    @property
    def target(self) -> str:
        """Spec of the target."""
        return self.key[2]

    @property
    def title(self) -> str:
        """What the case says of itself; its address where the run has no such case."""
        return self.case.title if self.case is not None else self.address

    @property
    def evidence(self) -> AccuracyEvidence:
        """The newest scores."""
        evidence = self.latest.evidence
        assert evidence is not None  # by construction
        return evidence

    @property
    def header(self) -> SheetHeader:
        """What was asked, of whom and how."""
        return self.evidence.sheet.header

    @property
    def decision(self) -> Decision | None:
        """The newest decision."""
        return self.evidence.decision

    @property
    def outcomes(self) -> dict[str, int]:
        """Outcome class to number of items."""
        return self.latest.outcomes

    @property
    def shown(self) -> list[Point]:
        """The points that a chart has room for."""
        return self.points[-MOST_POINTS:]

    @cached_property
    def scores(self) -> Chart | None:
        """Scores over time, with the reference's and the gate's lines."""
        return chart([_score_reading(point) for point in self.shown])

    @cached_property
    def drops(self) -> Chart | None:
        """Drops over time, with the margin."""
        return chart([_drop_reading(point) for point in self.shown], percent=False)

    @cached_property
    def lists(self) -> list[ItemList]:
        """Its items, in the lists in which they are shown."""
        return item_lists(self.evidence.sheet.items, self.decision, f"accuracy/{self.slug}")


@dataclass(frozen=True)
class Strip:
    """A score with its interval between the lines that it is held against, in a strip of 100 units."""

    at: float
    low: float
    high: float
    reference: float
    gate: float
    shape: str


@dataclass(eq=False)
class Task:
    """A task on a checkpoint, over all cases and targets."""

    name: str
    checkpoint: str
    slug: str
    series: list[Series] = field(default_factory=list)

    def strip(self, series: Series) -> Strip | None:
        """A row's score beside those of the other rows; None where the gate did not compare."""
        decision = series.decision
        if decision is None:
            return None
        low, high = self._span

        def at(share: float) -> float:
            return 100 * (share - low) / (high - low)

        reference, gate = _lines(decision)
        return Strip(
            at=at(decision.score.share),
            low=at(decision.score.interval.low),
            high=at(decision.score.interval.high),
            reference=at(reference),
            gate=at(gate),
            shape=decision.verdict,
        )

    @cached_property
    def _span(self) -> tuple[float, float]:
        """Lowest and highest share that the rows have to show, with some room."""
        decisions = [series.decision for series in self.series if series.decision is not None]
        shares = [
            share
            for decision in decisions
            for share in (decision.score.interval.low, decision.score.interval.high, *_lines(decision))
        ]
        room = max(0.02, (max(shares) - min(shares)) * 0.1)
        return min(shares) - room, max(shares) + room


class AccuracyView:
    """The accuracy of a run, with what history there is.

    Args:
        site: The run.
        history: Earlier results, and those of cases and targets that the run has not.
    """

    def __init__(self, site: Site, history: History | None = None) -> None:
        self.from_history = history is not None
        self.without: list[Entry] = []
        """Results of accuracy cases without scores in this run."""
        self.tasks: list[Task] = []
        self._slugs, self._task_slugs = Slugs(), Slugs()
        self._by_key: dict[Key, Series] = {}
        entries = {
            (e.case.suite.id, e.case.id, e.target.spec): e
            for e in site.entries
            if e.planned.kind == "accuracy"
        }
        past = history or {}
        for key in [*entries, *(key for key in past if key not in entries)]:
            self._add(site, key, entries.get(key), past.get(key, ()))
        self.tasks.sort(key=lambda task: (task.name, task.checkpoint))

    def __bool__(self) -> bool:
        return bool(self.tasks or self.without)

    @property
    def series(self) -> list[Series]:
        """All series."""
        return list(self._by_key.values())

    def of(self, entry: Entry) -> Series | None:
        """The series of a planned result, if there are scores of this run."""
        found = self._by_key.get(_key(entry))
        return found if found is not None and found.latest.own else None

    def _add(
        self, site: Site, key: Key, entry: Entry | None, past: Sequence[tuple[StoredVerdict, Result]]
    ) -> None:
        header = site.run.header
        points = [
            Point(verdict.run_id, verdict.started, result, own=False)
            for verdict, result in past
            if entry is None or verdict.run_id != header.run_id
        ]
        own = None
        if entry is not None and entry.result is not None:
            own = Point(header.run_id, header.started, entry.result, own=True)
            points.append(own)
            points.sort(key=lambda point: (_time(point.started), point.run_id))
        if entry is not None and (own is None or own.evidence is None):
            self.without.append(entry)
        scored = [point for point in points if point.evidence is not None]
        if scored:
            latest = own if own is not None and own.evidence is not None else scored[-1]
            case = entry.case if entry is not None else None
            series = Series(key, self._slugs["\0".join(key)], points, case, latest)
            self._by_key[key] = series
            self._task(series.header).series.append(series)

    def _task(self, header: SheetHeader) -> Task:
        found = [t for t in self.tasks if (t.name, t.checkpoint) == (header.task, header.checkpoint)]
        if not found:
            slug = self._task_slugs[f"{header.task}\0{header.checkpoint}"]
            found = [Task(header.task, header.checkpoint, slug)]
            self.tasks += found
        return found[0]


def _key(entry: Entry) -> Key:
    return (entry.case.suite.id, entry.case.id, entry.target.spec)


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares for people, in points."""
    rounded = round(100 * difference, 1) + 0.0  # no negative zero
    return f"{rounded:+.1f}".replace("-", "\u2212") if rounded else "0.0"


def size(difference: float) -> str:
    """The size of a difference of shares for people, in points."""
    return f"{100 * difference:.1f}"


def _lines(decision: Decision) -> tuple[float, float]:
    """The reference's score, and the one at which the drop is as large as the margin."""
    reference = decision.score.share + decision.drop
    return reference, reference - decision.limits.margin


def _score_reading(point: Point) -> Reading:
    decision = point.decision
    if decision is None:
        return Reading(_day(point.started), "", "", lines=(None, None), own=point.own)
    interval = decision.score.interval
    words = (
        f"{_day(point.started)}: {percent(decision.score.share)}, "
        f"{percent(interval.low)} to {percent(interval.high)}, {decision.verdict}"
    )
    return Reading(
        name=_day(point.started),
        words=words,
        shape=decision.verdict,
        value=decision.score.share,
        low=interval.low,
        high=interval.high,
        lines=_lines(decision),
        own=point.own,
    )


def _drop_reading(point: Point) -> Reading:
    decision = point.decision
    if decision is None:
        return Reading(_day(point.started), "", "", lines=(None,), own=point.own)
    interval = decision.drop_interval
    limits = f", {points(interval.low)} to {points(interval.high)}" if interval is not None else ""
    return Reading(
        name=_day(point.started),
        words=f"{_day(point.started)}: a drop of {points(decision.drop)} points{limits}, {decision.verdict}",
        shape=decision.verdict,
        value=decision.drop,
        low=interval.low if interval is not None else None,
        high=interval.high if interval is not None else None,
        lines=(decision.limits.margin,),
        own=point.own,
    )


def _time(stamp: str) -> float:
    """For the order of runs; what is no time comes first."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return 0.0


def _day(stamp: str) -> str:
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{moment.day} {moment:%b}"


@dataclass(frozen=True)
class Setting:
    """A fact of how answers were obtained, of the target and of the stored reference."""

    name: str
    mine: str
    theirs: str

    @property
    def differs(self) -> bool:
        """Whether both are known and not the same."""
        return bool(self.mine and self.theirs) and self.mine != self.theirs


def settings(evidence: AccuracyEvidence) -> list[Setting]:
    """How the answers were obtained, beside how the reference's were."""
    mine = _facts(evidence.sheet.header)
    theirs = _facts(evidence.reference) if evidence.reference is not None else {}
    return [Setting(name, mine.get(name, ""), theirs.get(name, "")) for name in {**mine, **theirs}]


def _facts(header: SheetHeader) -> dict[str, str]:
    facts = {
        "task": f"{header.task}, version {header.task_version}",
        "answers read by": header.filter,
        "metric": header.metric,
        "checkpoint": header.checkpoint,
        "checkpoint SHA-256": header.checkpoint_sha256,
        "target": header.target,
        "engine version": header.engine_version,
        "number format": header.dtype,
        **{f"effective {name}": value for name, value in header.effective.items()},
        "chat template SHA-256": header.template_sha256,
        "thinking": "on" if header.thinking else "off",
        "solved examples": str(header.shots),
        "new tokens at most": str(header.max_new_tokens),
        "seed of the examples": str(header.seed),
        "seed of the order": str(header.order_seed),
        "limit": str(header.limit) if header.limit is not None else "none",
        "documents": str(header.available),
        **{f"SHA-256 of {name}": digest for name, digest in header.data.items()},
        "lm-eval": header.lm_eval,
        "harness": header.harness,
        "commit": header.commit or "unknown",
        "asked": header.created,
    }
    return {name: fact for name, fact in facts.items() if fact}
