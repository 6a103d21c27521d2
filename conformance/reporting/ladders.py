"""What the dashboard shows of a release ladder: releases, their changes, and cases by suite.

A *turn* is the first release with another answer to "does the case pass?" than the release before it that
gave a verdict: the first good one, or the first bad one. A verdict that says nothing about the release (a
skip, say) is stepped over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from conformance.history import BAD, GOOD, Cell, Ladder, LadderRow, Rung
from conformance.reporting.signs import SIGNS, Status
from conformance.reporting.slugs import Slugs
from conformance.reporting.view import Case, Site

Turn = Literal["mended", "broke"]
_FAILING: tuple[Status, ...] = ("fail", "xfail")
_IN_STREAMS = "fail in streams only"


@dataclass(eq=False)
class Step:
    """One case on one release."""

    status: Status | None
    """None where there is no verdict."""
    turn: Turn | None = None
    """Whether this release is the first good or the first bad one."""
    whole: bool | None = None
    """Whether the whole answer breaks no rule."""

    @property
    def streams_only(self) -> bool:
        """Whether it fails in streams alone."""
        return self.status in _FAILING and bool(self.whole)


@dataclass(eq=False)
class Line:
    """One case over the releases that gave verdicts."""

    address: str
    slug: str
    source: tuple[str, ...]
    steps: list[Step]
    case: Case | None
    """The case in the run of this dashboard, if it is there."""
    turns: list[tuple[Turn, Release, tuple[str, ...]]] = field(default_factory=list)
    """What happened, at which release, and the rules that it breaks there; oldest first."""
    whole_turns: list[tuple[bool, Release]] = field(default_factory=list)
    """Releases at which the whole answer became right or wrong while streams kept failing."""

    @property
    def id(self) -> str:
        """Its id within the suite."""
        return self.address.partition("::")[2]

    @property
    def title(self) -> str:
        """The rule that it checks; its id where the run has no such case."""
        return self.case.title if self.case else self.id

    @property
    def differs(self) -> bool:
        """Whether releases differ on it. That a failure is expected of some only is no difference."""
        shown = {("fail" if step.status == "xfail" else step.status, step.whole) for step in self.steps}
        return len(shown) > 1


@dataclass(eq=False)
class Release:
    """A release that gave verdicts."""

    version: str
    slug: str
    tally: Counter[Status] = field(default_factory=Counter)
    streams_only: int = 0
    """Failures that show in streams alone."""
    mended: list[Line] = field(default_factory=list)
    broke: list[Line] = field(default_factory=list)

    lines: list[tuple[Line, Step]] = field(default_factory=list)
    """The cases that it was asked, with what it came to."""
    page: str = ""
    """With all of them, from the site's root."""

    @property
    def total(self) -> int:
        """How many cases it was asked."""
        return self.tally.total()

    @property
    def listed(self) -> dict[str, tuple[Status, str, list[Line]]]:
        """The cases behind each of `parts`, by the anchor of their list: sign, words and cases."""
        found: dict[str, tuple[Status, str, list[Line]]] = {}
        for status, words, *_ in self.parts:
            lines = [line for line, step in self.lines if _words(step) == words]
            found[words.replace(" ", "-")] = status, words, lines
        return found

    @property
    def counts(self) -> dict[Status, int]:
        """Cases by status, in the order of the signs, without zeros."""
        return {status: self.tally[status] for status in SIGNS if self.tally[status]}

    @property
    def parts(self) -> list[tuple[Status, str, int, float, float]]:
        """Cases by status, failures in streams alone apart: status, words, number, start and width of 100."""
        failing = sum(self.tally[status] for status in _FAILING)
        found: list[tuple[Status, str, int]] = [
            ("pass", SIGNS["pass"].word, self.tally["pass"]),
            ("skip", _IN_STREAMS, self.streams_only),
            ("fail", SIGNS["fail"].word, failing - self.streams_only),
        ]
        found += [
            (status, SIGNS[status].word, number)
            for status, number in self.counts.items()
            if status not in ("pass", *_FAILING)
        ]
        parts, at = [], 0.0
        for status, words, number in found:
            if number:
                width = 100 * number / self.total
                parts.append((status, words, number, at, width))
                at += width
        return parts


@dataclass(eq=False)
class LadderSuite:
    """The cases of one suite."""

    id: str
    slug: str
    title: str
    page: str | None
    """Its page in the run of this dashboard, if it is there."""
    lines: list[Line] = field(default_factory=list)

    @property
    def changing(self) -> list[Line]:
        """Cases on which releases differ."""
        return [line for line in self.lines if line.differs]

    @property
    def steady(self) -> dict[Status, list[Line]]:
        """Cases on which all releases agree, by what they agree on."""
        found: dict[Status, list[Line]] = {}
        for line in self.lines:
            status = line.steps[0].status if line.steps else None
            if status is not None and not line.differs:
                found.setdefault(status, []).append(line)
        return {status: found[status] for status in SIGNS if status in found}


class LadderView:
    """One ladder.

    Args:
        ladder: What `conformance ladder` wrote.
        site: The run beside which it is shown, for titles and links.
        slug: Name of its page.
    """

    def __init__(self, ladder: Ladder, site: Site, slug: str) -> None:
        self.target = ladder.target
        self.sources = ladder.sources
        self.slug = slug
        slugs = Slugs()
        self._rungs = [rung for rung in ladder.releases if not rung.reason]
        self.releases = [Release(rung.version, slugs[rung.version]) for rung in self._rungs]
        for release in self.releases:
            release.page = f"ladders/{slug}/{release.slug}.html"
        self.missing: list[Rung] = [rung for rung in ladder.releases if rung.reason]
        self.suites: list[LadderSuite] = []
        self._site = site
        self._case_by_address = {case.address: case for case in site.cases}
        self._suite_by_id: dict[str, LadderSuite] = {}
        self._suite_slugs, self._line_slugs = Slugs(), Slugs()
        for row in ladder.rows:
            self._add(row)

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"ladders/{self.slug}.html"

    @property
    def total(self) -> int:
        """Number of cases."""
        return sum(len(suite.lines) for suite in self.suites)

    @property
    def statuses(self) -> set[Status]:
        """What occurs in it."""
        return {status for release in self.releases for status in release.counts}

    @property
    def changing(self) -> int:
        """Number of cases on which releases differ."""
        return sum(len(suite.changing) for suite in self.suites)

    def _add(self, row: LadderRow) -> None:
        line = Line(
            address=row.case,
            slug=self._line_slugs[row.case],
            source=row.source,
            steps=[],
            case=self._case_by_address.get(row.case),
        )
        before: bool | None = None
        whole_before: bool | None = None
        for rung, release in zip(self._rungs, self.releases, strict=True):
            cell = row.cells.get(rung.spec)
            step = Step(status_of_cell(cell), whole=cell.whole) if cell is not None else Step(None)
            line.steps.append(step)
            if cell is None or step.status is None:
                continue
            release.tally[step.status] += 1
            release.streams_only += step.streams_only
            release.lines.append((line, step))
            good = True if cell.verdict in GOOD else False if cell.verdict in BAD else None
            if good is not None and before is not None and good != before:
                step.turn = "mended" if good else "broke"
                (release.mended if good else release.broke).append(line)
                line.turns.append((step.turn, release, cell.rules))
            elif cell.whole is not None and whole_before is not None and cell.whole != whole_before:
                line.whole_turns.append((cell.whole, release))
            before = before if good is None else good
            whole_before = whole_before if cell.whole is None else cell.whole
        self._suite(row.case.partition("::")[0]).lines.append(line)

    def _suite(self, suite_id: str) -> LadderSuite:
        if suite_id not in self._suite_by_id:
            known = next((suite for suite in self._site.suites if suite.id == suite_id), None)
            suite = LadderSuite(
                id=suite_id,
                slug=self._suite_slugs[suite_id],
                title=known.title if known else suite_id,
                page=known.page if known else None,
            )
            self._suite_by_id[suite_id] = suite
            self.suites.append(suite)
        return self._suite_by_id[suite_id]


def _words(step: Step) -> str:
    """Under which words a release counts a case."""
    if step.streams_only:
        return _IN_STREAMS
    status = "fail" if step.status in _FAILING else step.status
    return SIGNS[status].word if status is not None else ""


def status_of_cell(cell: Cell) -> Status:
    """The sign of a case on a release: the check's own verdict, set apart where an expectation covers it."""
    return "xfail" if cell.known and cell.verdict == "fail" else cell.verdict


def views(ladders: Iterable[Ladder], site: Site) -> list[LadderView]:
    """Ladders as they are shown: one for each target, the last that was given."""
    slugs = Slugs()
    latest = {ladder.target: ladder for ladder in ladders}
    return [LadderView(ladder, site, slugs[target]) for target, ladder in latest.items()]
