"""What the dashboard shows: a run, regrouped by target, area, suite and case.

The manifest says what was planned. A planned result that the run does not hold is *not run*; a
result that was never planned is kept and flagged. Each planned result is one `Entry` and has one
status, so the numbers of a group add up to its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from conformance.loading import LoadedCase, LoadedSuite
from conformance.reporting.signs import SIGNS, Status, status_of
from conformance.reporting.slugs import Slugs
from conformance.results import PlannedCase, Result, Run
from conformance.suites import ParserCase
from conformance.targets.protocol import TargetInfo

StreamKind = Literal["certified", "sampled", "unsupported", "unrecorded"]
STREAM_KINDS: dict[StreamKind, str] = {
    "certified": "Every one of the ways of cutting the output was visited.",
    "sampled": "A selection of chunkings was tried: the usual ones, splits around markers, and random ones.",
    "unsupported": "The target does not stream.",
    "unrecorded": "No result, or one that ended before streaming was tried.",
}


@dataclass(eq=False)
class Group:
    """Entries that are counted together."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many results were planned here."""
        return len(self.entries)

    @property
    def counts(self) -> dict[Status, int]:
        """Number of entries by status, in the order of the signs, without zeros."""
        counts = Counter(entry.status for entry in self.entries)
        return {status: counts[status] for status in SIGNS if counts[status]}

    def of(self, status: Status) -> list[Entry]:
        """The entries with one status."""
        return [entry for entry in self.entries if entry.status == status]

    def of_target(self, target: Target) -> list[Entry]:
        """The entries of one target."""
        return [entry for entry in self.entries if entry.target is target]


@dataclass(eq=False)
class Target(Group):
    """An implementation under test."""

    spec: str = ""
    slug: str = ""
    info: TargetInfo | None = None
    unavailable: str | None = None
    """Why it could not be used."""

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"targets/{self.slug}.html"

    @property
    def stream_page(self) -> str:
        """The page that lists how far streaming was explored, from the site's root."""
        return f"streams/{self.slug}.html"

    @property
    def install(self) -> str | None:
        """The command that installs it, for engines that are named with a version."""
        return f"conformance targets install {self.spec}" if "@" in self.spec else None


@dataclass(eq=False)
class Area(Group):
    """A row of the overview."""

    name: str = ""
    slug: str = ""
    cells: dict[str, Group] = field(default_factory=dict)
    """By target spec."""


@dataclass(eq=False)
class Suite(Group):
    """A suite, with what its file says where that was given."""

    id: str = ""
    slug: str = ""
    digest: str = ""
    loaded: LoadedSuite | None = None
    cases: list[Case] = field(default_factory=list)

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"suites/{self.slug}.html"

    @property
    def title(self) -> str:
        """Its title, or its id when its file is not at hand."""
        return self.loaded.suite.title if self.loaded else self.id

    @property
    def changed(self) -> bool:
        """The file is another one than the run's."""
        return self.loaded is not None and self.digest not in ("", self.loaded.digest)

    @cached_property
    def by_id(self) -> dict[str, Case]:
        """The cases by id; to be asked for once the suite is complete."""
        return {case.id: case for case in self.cases}

    @cached_property
    def controls(self) -> dict[str, list[Case]]:
        """Negative controls by the id of their case; to be asked for once the suite is complete."""
        controls: dict[str, list[Case]] = {}
        for case in self.cases:
            if case.control_of in self.by_id and case.control_of != case.id:
                controls.setdefault(case.control_of, []).append(case)
        return controls

    def ordered(self) -> list[Case]:
        """The cases, each followed by its negative controls."""
        inner = {control.id for group in self.controls.values() for control in group}
        # Cases that only a circle of controls leads to come last, so that none is lost.
        waiting = [case for case in self.cases if case.id not in inner] + self.cases
        waiting.reverse()
        ordered: dict[str, Case] = {}
        while waiting:
            case = waiting.pop()
            if case.id not in ordered:
                ordered[case.id] = case
                waiting.extend(reversed(self.controls.get(case.id, [])))
        return list(ordered.values())


@dataclass(eq=False)
class Case(Group):
    """A case on all targets."""

    suite: Suite = field(default_factory=Suite)
    id: str = ""
    slug: str = ""
    planned: PlannedCase | None = None
    loaded: LoadedCase | None = None
    """Only where the case in the suite's file is still the one that ran."""

    @property
    def page(self) -> str:
        """Its page, from the site's root."""
        return f"cases/{self.suite.slug}/{self.slug}.html"

    @property
    def address(self) -> str:
        """`parser/reasoning::label-is-dropped`."""
        return f"{self.suite.id}::{self.id}"

    @property
    def title(self) -> str:
        """The rule that it checks."""
        return (self.planned.title if self.planned else "") or self.id

    @property
    def kind(self) -> str:
        """Kind of its suite."""
        return self.planned.kind if self.planned else ""

    @property
    def control_of(self) -> str | None:
        """Id of the case that this one is the negative control of."""
        return self.loaded.case.control_of if self.loaded else None

    @property
    def contested(self) -> bool:
        """Several answers are accepted."""
        if self.loaded is not None and isinstance(self.loaded.case, ParserCase):
            return self.loaded.case.policy is not None
        return any(e.result is not None and e.result.evidence.policy is not None for e in self.entries)


@dataclass(eq=False)
class Entry:
    """One planned result."""

    case: Case
    target: Target
    planned: PlannedCase
    result: Result | None
    unplanned: bool = False

    @property
    def status(self) -> Status:
        """What became of it."""
        return status_of(self.result)

    @property
    def link(self) -> str:
        """Where the case page shows it."""
        return f"{self.case.page}#t.{self.target.slug}"

    @property
    def summary(self) -> str:
        """One line that says why it is not a plain pass."""
        result = self.result
        if result is None:
            return ""
        if self.status == "policy":
            return f"answer: {result.evidence.policy}"
        if result.problems and not (self.status == "xfail" and result.reason):
            more = f" (+{len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
            return f"{result.problems[0].rule}: {result.problems[0].message}{more}"
        return result.reason

    @property
    def stream_kind(self) -> StreamKind | None:
        """How far streaming was explored; None where the case has nothing to stream."""
        if self.result is not None and self.result.evidence.stream is not None:
            return self.result.evidence.stream.kind
        return "unrecorded" if self.planned.kind == "parser" else None


class Site(Group):
    """A whole run, regrouped."""

    def __init__(self, run: Run, suites: Iterable[LoadedSuite] = ()) -> None:
        super().__init__()
        self.run = run
        self.targets: list[Target] = []
        self.areas: list[Area] = []
        self.suites: list[Suite] = []
        self.cases: list[Case] = []
        self.unplanned = 0
        self._loaded = {loaded.suite.id: loaded for loaded in suites}
        self._loaded_cases = {case.address: case for loaded in self._loaded.values() for case in loaded.cases}
        self._target_by_spec: dict[str, Target] = {}
        self._area_by_name: dict[str, Area] = {}
        self._suite_by_id: dict[str, Suite] = {}
        self._case_by_key: dict[tuple[str, str], Case] = {}
        self._target_slugs, self._area_slugs, self._suite_slugs = Slugs(), Slugs(), Slugs()
        self._case_slugs: dict[str, Slugs] = {}
        for spec in run.header.targets:
            self._target(spec)
        self._fill(run)

    def _fill(self, run: Run) -> None:
        results = run.latest()
        planned = {(p.suite, p.case, p.target): p for p in run.header.manifest}
        for key, plan in planned.items():
            self._add(plan, results.get(key), unplanned=False)
        for key, result in results.items():
            if key not in planned:
                self.unplanned += 1
                self._add(_plan_of(result), result, unplanned=True)

    def _add(self, plan: PlannedCase, result: Result | None, *, unplanned: bool) -> None:
        case, target, area = self._case(plan), self._target(plan.target), self._area(plan.area)
        entry = Entry(case, target, plan, result, unplanned)
        groups: Sequence[Group] = (
            self,
            case,
            case.suite,
            target,
            area,
            area.cells.setdefault(target.spec, Group()),
        )
        for group in groups:
            group.entries.append(entry)

    def _target(self, spec: str) -> Target:
        if spec not in self._target_by_spec:
            header = self.run.header
            target = Target(
                spec=spec,
                slug=self._target_slugs[spec],
                info=header.targets.get(spec),
                unavailable=header.unavailable.get(spec),
            )
            self._target_by_spec[spec] = target
            self.targets.append(target)
        return self._target_by_spec[spec]

    def _area(self, name: str) -> Area:
        if name not in self._area_by_name:
            self._area_by_name[name] = Area(name=name, slug=self._area_slugs[name])
            self.areas.append(self._area_by_name[name])
        return self._area_by_name[name]

    def _suite(self, suite_id: str) -> Suite:
        if suite_id not in self._suite_by_id:
            suite = Suite(
                id=suite_id,
                slug=self._suite_slugs[suite_id],
                digest=self.run.header.suites.get(suite_id, ""),
                loaded=self._loaded.get(suite_id),
            )
            self._suite_by_id[suite_id] = suite
            self._case_slugs[suite_id] = Slugs()
            self.suites.append(suite)
        return self._suite_by_id[suite_id]

    def _case(self, plan: PlannedCase) -> Case:
        key = (plan.suite, plan.case)
        if key not in self._case_by_key:
            suite = self._suite(plan.suite)
            loaded = self._loaded_cases.get(f"{plan.suite}::{plan.case}")
            case = Case(
                suite=suite,
                id=plan.case,
                slug=self._case_slugs[plan.suite][plan.case],
                planned=plan,
                loaded=loaded if loaded is not None and loaded.digest == plan.digest else None,
            )
            self._case_by_key[key] = case
            suite.cases.append(case)
            self.cases.append(case)
        return self._case_by_key[key]

    @property
    def missing_targets(self) -> list[Target]:
        """Targets that could not be used, planned or not."""
        return [
            self._target_by_spec.get(spec) or Target(spec=spec, unavailable=reason)
            for spec, reason in self.run.header.unavailable.items()
        ]

    @property
    def attention(self) -> list[Entry]:
        """What someone should look at, worst first."""
        return [
            entry
            for status, sign in SIGNS.items()
            if sign.attention
            for entry in sorted(self.of(status), key=lambda e: (e.case.suite.id, e.case.id))
        ]

    @property
    def contested(self) -> list[Case]:
        """Cases with several accepted answers."""
        return [case for case in self.cases if case.contested]

    def streams(self, target: Target) -> dict[StreamKind, list[Entry]]:
        """A target's cases that have something to stream, by how far that was explored."""
        return {
            kind: [entry for entry in target.entries if entry.stream_kind == kind] for kind in STREAM_KINDS
        }


def _plan_of(result: Result) -> PlannedCase:
    return PlannedCase(
        suite=result.suite,
        case=result.case,
        target=result.target,
        kind=result.kind,
        area=result.area,
        title="",
        source=(),
        digest=result.digest,
    )
