"""Templates and the values they get: one method per kind of page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from conformance import resources
from conformance.reporting import accuracy as scores
from conformance.reporting import evidence, items, values
from conformance.reporting.accuracy import AccuracyView, Series
from conformance.reporting.alone import AloneView
from conformance.reporting.backtests import BacktestsView
from conformance.reporting.cells import MatrixView
from conformance.reporting.compared import ComparisonView
from conformance.reporting.faults import FaultsView
from conformance.reporting.ladders import LadderView
from conformance.reporting.runs import RunsView
from conformance.reporting.signs import SIGNS, Status
from conformance.reporting.text import plain, prose
from conformance.reporting.trials import TrialsView
from conformance.reporting.view import STREAM_KINDS, Case, Entry, Group, Site, Target

Render = Callable[[], str]
"""Renders a page."""

SHORT_LIST = 40
"""Rows of a list on the overview; the rest is on the page that it links to."""

_ISSUE = re.compile(r"^([\w.-]+/[\w.-]+)#(\d+)$", re.ASCII)
_URL = re.compile(r"^https://[A-Za-z0-9.-]+(?::\d+)?(?:/[^\s\"'<>\\]*)?$")


def _printed(value: Any) -> Any:
    """What a template prints: markup as it is, text with unseen characters named; never None."""
    if hasattr(value, "__html__"):
        return value
    if value is None:
        raise TypeError("a template printed None; test for it first")
    return plain(str(value))


def source_url(source: str) -> str | None:
    """Where a case's source can be read; None for sections and catalogue ids."""
    issue = _ISSUE.match(source)
    if issue:
        return f"https://github.com/{issue[1]}/issues/{issue[2]}"
    return source if _URL.match(source) else None


def moment(stamp: str) -> str:
    """An ISO time for people; anything else is given back as it is."""
    try:
        when = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    zone = "" if when.tzinfo is None else f" {when.tzname()}"
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def seconds(value: float) -> str:
    """A duration for people."""
    if value >= 90:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def shares(group: Group) -> list[tuple[Status, str, str]]:
    """A group's statuses as stretches of a bar of 100 units: status, start, width."""
    out: list[tuple[Status, str, str]] = []
    at = 0.0
    for status, count in group.counts.items():
        width = 100 * count / group.total
        out.append((status, f"{at:.2f}", f"{width:.2f}"))
        at += width
    return out


def by_target(entries: Iterable[Entry]) -> dict[Target, list[Entry]]:
    """Entries grouped by target, in the targets' first order of appearance."""
    groups: dict[Target, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.target, []).append(entry)
    return groups


def by_case(entries: Iterable[Entry]) -> dict[Case, list[Entry]]:
    """Entries grouped by case, in the cases' first order of appearance."""
    groups: dict[Case, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.case, []).append(entry)
    return groups


def environment() -> Environment:
    """The templates, with autoescape on and nothing printed that was not made visible."""
    env = Environment(
        loader=FileSystemLoader(resources.templates_dir()),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        entries_by_target=lambda entries: {entry.target.spec: entry for entry in entries},
        moment=moment,
        percent=scores.percent,
        points=scores.points,
        prose=prose,
        seconds=seconds,
        shares=shares,
        shell_line=shlex.join,
        size=scores.size,
        stream_view=evidence.stream_view,
    )
    env.globals.update(
        SIGNS=SIGNS,
        STREAM_KINDS=STREAM_KINDS,
        SHORT_LIST=SHORT_LIST,
        SHORT_PROMPT=items.SHORT_PROMPT,
        CLASSES=items.CLASSES,
        MOST_POINTS=scores.MOST_POINTS,
        outcome_bar=items.bar,
        percent=scores.percent,
        points=scores.points,
        source_url=source_url,
        by_case=by_case,
        by_target=by_target,
    )
    return env


@dataclass(frozen=True)
class Extras:
    """What is shown beside a run where there is such a thing."""

    faults: FaultsView | None = None
    trials: TrialsView | None = None
    comparison: ComparisonView | None = None
    runs: RunsView | None = None


class Pages:
    """Renders every page of a site.

    Args:
        site: The run.
        ladders: Release ladders to show beside it.
        backtests: Backtests to show beside it.
        accuracy: Scores of the run, with what history there is; by default of the run alone.
        matrix: Cells to show beside it.
        extras: Faults, trials, a comparison and a list of runs to show beside it.
    """

    def __init__(
        self,
        site: Site,
        ladders: Sequence[LadderView] = (),
        backtests: BacktestsView | None = None,
        accuracy: AccuracyView | None = None,
        matrix: MatrixView | None = None,
        extras: Extras | None = None,
    ) -> None:
        self._site = site
        self._extras = extras if extras is not None else Extras()
        self._alone = AloneView(site)
        self._accuracy = accuracy if accuracy is not None else AccuracyView(site)
        self._ladders = ladders
        self._backtests = backtests
        self._matrix = matrix
        self._env = environment()
        self._env.globals.update(
            site=site,
            run=site.run,
            ladders=ladders,
            backtests=backtests,
            accuracy=self._accuracy,
            matrix=matrix,
            faults=self._extras.faults,
            trials=self._extras.trials,
            comparison=self._extras.comparison,
            runs=self._extras.runs,
            alone=self._alone,
        )

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Path below the site's root, and HTML, of each page."""
        for path, render in self.each():
            yield path, render()

    def each(self) -> Iterator[tuple[str, Render]]:
        """Path below the site's root of each page, and what renders it."""
        yield "index.html", self._render("index.html", 0)
        yield "policies.html", self._render("policies.html", 0)
        for ladder in self._ladders:
            yield ladder.page, self._render("ladder.html", 1, ladder=ladder)
            for release in ladder.releases:
                yield release.page, self._render("ladder_release.html", 2, ladder=ladder, release=release)
        if self._backtests is not None:
            yield "backtests.html", self._render("backtests.html", 0)
        if self._matrix is not None:
            yield "matrix.html", self._render("matrix.html", 0)
            for cell in self._matrix.entries:
                yield cell.page, self._render("cell.html", 1, cell=cell)
        yield from self._accuracy_pages()
        yield from self._extra_pages()
        for status in self._site.counts:
            yield f"verdicts/{status}.html", self._render("verdict.html", 1, sign=SIGNS[status])
        for target in self._site.targets:
            yield target.page, self._render("target.html", 1, target=target)
            yield target.stream_page, self._render("stream.html", 1, target=target)
        for suite in self._site.suites:
            yield suite.page, self._render("suite.html", 1, suite=suite)
            ordered = suite.ordered()
            for number, case in enumerate(ordered):
                before = ordered[number - 1] if number else None
                after = ordered[number + 1] if number + 1 < len(ordered) else None
                yield case.page, partial(self._case, case, before, after)

    def _extra_pages(self) -> Iterator[tuple[str, Render]]:
        if self._alone:
            yield "alone.html", self._render("alone.html", 0)
        if self._extras.comparison is not None:
            yield "comparison.html", self._render("comparison.html", 0)
        if self._extras.runs is not None:
            yield "runs.html", self._render("runs.html", 0)
        if self._extras.trials is not None:
            yield "trials.html", self._render("trials.html", 0)
        if self._extras.faults is not None:
            yield "faults.html", self._render("faults.html", 0)
            for fault in self._extras.faults.faults:
                yield fault.page, self._render("fault.html", 1, fault=fault)

    def _accuracy_pages(self) -> Iterator[tuple[str, Render]]:
        if not self._accuracy:
            return
        yield "accuracy.html", self._render("accuracy.html", 0)
        for series in self._accuracy.series:
            context = {"series": series, "settings": scores.settings(series.evidence)}
            yield series.page, self._render("accuracy_series.html", 1, **context)
            for page in (page for listed in series.lists for page in listed.pages):
                yield page.page, self._render("accuracy_items.html", 2, series=series, shown=page)

    def _case(self, case: Case, before: Case | None, after: Case | None) -> str:
        source = evidence.input_text(case)
        # Other kinds are asked for the prompt: it is then part of what each target answered.
        prompt = evidence.first_evidence(case, "prompt") if case.kind == "parser" else None
        render = self._render(
            "case.html",
            2,
            case=case,
            before=before,
            after=after,
            controls=case.suite.controls.get(case.id, []),
            controlled=case.suite.by_id.get(case.control_of) if case.control_of else None,
            source=values.block(source, signs=case.kind == "parser") if source else None,
            request=evidence.request(case),
            prompt=values.block(str(prompt)) if prompt else None,
            expected=[] if case.contested else values.fields(evidence.first_evidence(case, "expected")),
            recorded=evidence.first_evidence(case, "expected") is not None,
            answers=evidence.answers(case) if case.contested else [],
            views=[_entry_view(entry, self._accuracy.of(entry)) for entry in case.entries],
        )
        return render()

    def _render(self, template: str, depth: int, **context: Any) -> Render:
        return partial(self._env.get_template(template).render, root="../" * depth, **context)


def _entry_view(entry: Entry, series: Series | None) -> dict[str, Any]:
    """What a case page shows for one target."""
    result = entry.result
    if result is None:
        return {"entry": entry, "result": None}
    return {
        "entry": entry,
        "result": result,
        "problems": [evidence.problem_view(problem) for problem in result.problems],
        "got": values.fields(result.evidence.got),
        "annotated": evidence.annotate(result.evidence.input, result.evidence.spans),
        "stream": evidence.stream_view(result.evidence.stream),
        "parity": evidence.parity_view(result.evidence.parity),
        "accuracy": series,
        "stderr": values.block(result.stderr) if result.stderr else None,
        "repeat": result.repeat,
    }
