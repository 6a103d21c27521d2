"""What commands print: models of their `--json` output, and how both forms reach the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import click
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance.backtests import BacktestResult
from conformance.comparison import Comparison
from conformance.explain import visible
from conformance.gates.decision import Decision, Sensitivity
from conformance.history import Bisection, Ladder
from conformance.results import CellVerdict, Preflight, Result, Verdict
from conformance.store import Change, Merged, StoredRun, StoredVerdict, StorePoint

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; its schema: `conformance schema`."
)


class Output(BaseModel):
    """Base of what `--json` prints."""

    # Validators are built where one is first used, as a command needs few of them.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class SuiteRow(Output):
    """One suite file."""

    id: str
    title: str
    kind: str
    area: str
    cases: int
    path: str


class CaseRow(Output):
    """One case."""

    address: str
    title: str
    kind: str
    area: str
    source: tuple[str, ...]
    contested: bool
    """Engines do not agree on the answer; the case names several."""
    control_of: str | None
    tags: tuple[str, ...]
    path: str
    line: int


class TargetRow(Output):
    """One target that can be named."""

    spec: str
    description: str
    default: bool
    """It runs when no target is named."""
    usable: bool
    megabytes: int
    """Size of its environment, as measured or expected."""
    reason: str
    """Why it cannot be used, and what to do."""
    parts: str
    """Which parts its environment has, and how to install the others; empty where it can have none."""


class SourceRow(Output):
    """One source, and the cases that come from it."""

    source: str
    cases: tuple[str, ...]


class ListOutput(Output):
    """Output of `conformance list`; sections that were not asked for are absent."""

    suites: tuple[SuiteRow, ...] | None = None
    cases: tuple[CaseRow, ...] | None = None
    targets: tuple[TargetRow, ...] | None = None
    sources: tuple[SourceRow, ...] | None = None


class ExpectationRow(Output):
    """A known failure of a target on a case."""

    target: str
    versions: str
    rules: tuple[str, ...]
    reason: str
    source: str
    finding: str | None
    review: str
    where: str


class ShowOutput(Output):
    """Output of `conformance show`."""

    address: str
    title: str
    kind: str
    area: str
    path: str
    line: int
    digest: str
    case: dict[str, Any]
    """The case as loaded."""
    controls: tuple[str, ...]
    """Cases that are negative controls of this one."""
    expectations: tuple[ExpectationRow, ...]
    results: tuple[Result, ...]
    """Of the run file, if one was given."""


class AreaCounts(Output):
    """Verdicts of one target in one area."""

    target: str
    area: str
    counts: dict[Verdict, int]
    not_run: int = 0
    """Planned cases without a result."""


class ProblemRow(Output):
    """A result that fails the run, or leaves it open."""

    address: str
    target: str
    verdict: Verdict
    reason: str
    rules: tuple[str, ...]
    repeat: str


class RunOutput(Output):
    """Output of `conformance run`."""

    run_file: str
    site: str | None
    exit_code: int
    complete: bool
    """Whether every planned case has a result."""
    planned: int
    areas: tuple[AreaCounts, ...]
    problems: tuple[ProblemRow, ...]
    unavailable: dict[str, str]
    """Targets that could not be used, and why."""


class AreaVerdict(Output):
    """What the cases of one area come to."""

    area: str
    verdict: Literal["pass", "fail", "inconclusive", "not run"]
    """`fail` if any case fails the run; else `inconclusive` if any is; `pass` if all pass or fail as
    expected, and at least one passes; else `not run`."""
    counts: dict[Verdict, int]


class ProbeOutput(Output):
    """Output of `conformance probe`."""

    url: str
    model: str
    preflight: tuple[Preflight, ...]
    areas: tuple[AreaVerdict, ...]
    exit_code: int
    run: RunOutput | None
    """Null where the preflight did not get as far as the suites."""


class ReportOutput(Output):
    """Output of `conformance report`."""

    run_file: str
    index: str
    results: int


class MergedRow(Output):
    """What became of one run file."""

    run_file: str
    error: str = ""
    """Why it was not merged."""
    merged: Merged | None = None


class StoreMergeOutput(Output):
    """Output of `conformance store merge`."""

    database: str
    """Its URL, without a password."""
    files: tuple[MergedRow, ...]


class StoreListOutput(Output):
    """Output of `conformance store list`; what was not asked for is absent."""

    runs: tuple[StoredRun, ...] | None = None
    latest: tuple[StoredVerdict, ...] | None = None
    """The newest result of each case on each target."""


class StoreShowOutput(Output):
    """Output of `conformance store show`."""

    run: StoredRun
    since: str | None
    """The run that it is compared with; null where there is no earlier one."""
    changes: tuple[Change, ...]
    """Verdicts that differ between the two."""


class StoreCompareOutput(Output):
    """Output of `conformance store compare`."""

    comparison: Comparison
    text: str
    """What broke and since when, and what was mended."""


class StoreHistoryOutput(Output):
    """Output of `conformance store history`."""

    address: str
    points: tuple[StorePoint, ...]
    """Oldest first."""


class ChancesRow(Output):
    """Chances of a gate's verdicts, where the true drop is this."""

    drop: float
    passes: float
    fails: float
    inconclusive: float
    alarms: float
    """Of the test of "no worse", whatever the verdict."""


class PlanRow(Output):
    """What a gate can detect, and what it needs."""

    address: str
    kind: Literal["paired", "unpaired"]
    items: int
    margin: float
    floor: float
    alpha: float
    power: float
    reaches: bool
    """With so many items it has its power, for failing a drop of the margin and for passing none."""
    needed: int | None
    """Items that it takes; null: more than a million."""
    detectable: float
    """The least drop that fails with this power."""
    certifiable: float
    """The least margin that a target without any drop passes with this power."""
    chances: tuple[ChancesRow, ...]
    false_alarms_a_year: float
    """Expected false failures, if it runs every night."""


class GatePlanOutput(Output):
    """Output of `conformance gate plan`."""

    plans: tuple[PlanRow, ...]


class GateRow(Output):
    """What a gate said of a target."""

    address: str
    target: str
    verdict: Verdict
    reason: str
    decision: Decision | None
    holm: float | None
    """P-value that takes all gates of this run into account."""
    benjamini_hochberg: float | None
    sheet: str | None
    """Where the scored answers were written."""


class GateRunOutput(Output):
    """Output of `conformance gate run`."""

    run: RunOutput
    gates: tuple[GateRow, ...]


class GateCompareOutput(Output):
    """Output of `conformance gate compare`."""

    decision: Decision
    plan: PlanRow


class SensitivityOutput(Output):
    """Output of `conformance gate sensitivity`."""

    faults: tuple[Sensitivity, ...]
    caught: int
    """Faults that some gate fails by itself."""


class SensitivityRow(Output):
    """What one gate, or the suites of tensors, made of one fault, and why that does not hold any more."""

    fault: str
    case: str
    """Address of the gate, or `tensors`."""
    reason: str


class SensitivityCheckOutput(Output):
    """Output of `conformance gate check-sensitivity`."""

    file: str
    cells: int
    stale: tuple[SensitivityRow, ...]


class RebaselineOutput(Output):
    """Output of `conformance gate rebaseline`."""

    reference: str
    record: str
    """The history of the reference, with every comparison."""
    replaced: bool
    decision: Decision | None
    """The new answers against the old ones; null where there were none."""
    total_drop: float | None
    """What the drops of its history add up to with this one, since the last that was accepted as such; null
    where there is no other."""


class TargetsOutput(Output):
    """Output of `conformance targets` and its subcommands, except `doctor`."""

    targets: tuple[TargetRow, ...]
    forms: dict[str, str]
    """Targets that are named with what they need, such as `replay@PATH`, and what each is."""


class DoctorRow(Output):
    """One thing that was looked at."""

    target: str
    name: str
    ok: bool
    detail: str


class DoctorOutput(Output):
    """Output of `conformance targets doctor`."""

    checks: tuple[DoctorRow, ...]


class NewCaseOutput(Output):
    """Output of `conformance new-case`."""

    address: str
    path: str
    created: bool
    """The suite file is new."""
    reference: Any
    """What the bundled implementation answers; written down as the expectation, for review."""


class LadderOutput(Output):
    """Output of `conformance ladder`."""

    file: str
    """Where the ladder was written as JSON."""
    ladder: Ladder


class BisectOutput(Output):
    """Output of `conformance bisect`."""

    bisection: Bisection


class BacktestOutput(Output):
    """Output of `conformance backtest`."""

    backtests: tuple[BacktestResult, ...]
    not_reachable: dict[str, str]
    """Catalogue ids without a backtest, and why."""


class CellRow(Output):
    """A cell of the matrix."""

    id: str
    axes: dict[str, str]
    """Every axis to its value."""
    settings: dict[str, Any]
    """What it imposes on its cases."""
    cases: tuple[str, ...]
    left_out: dict[str, str]
    """Cases of its checkpoint that are not applicable, and why."""
    needs: tuple[str, ...]
    lacks: tuple[str, ...]
    """What its target cannot do, as far as the matrix knows."""
    note: str
    """Why it will not run here, as far as the matrix knows."""
    seconds: float
    """How long it is expected to take."""


class MatrixShowOutput(Output):
    """Output of `conformance matrix show`."""

    matrix: str
    tier: str | None
    cells: tuple[CellRow, ...]


class RanRow(Output):
    """What became of a cell."""

    id: str
    verdict: CellVerdict
    reason: str
    """Why it did not run, or what the first problem is."""
    counts: dict[Verdict, int]
    seconds: float
    run_file: str
    attempts: int
    """How often it was started, because the worker that ran it died."""


class MatrixRunOutput(Output):
    """Output of `conformance matrix run`."""

    folder: str
    """Of the run files."""
    tier: str | None
    shard: str | None
    cells: tuple[RanRow, ...]
    exit_code: int


class MatrixMeasureOutput(Output):
    """Output of `conformance matrix measure`."""

    file: str
    cells: dict[str, float]
    """Seconds that each took."""


class MatrixCheckOutput(Output):
    """Output of `conformance matrix check`."""

    cells: int
    """How many there should be."""
    missing: tuple[str, ...]
    """Those that have no complete run."""


def emit_json(output: Output) -> None:
    """Print an output as JSON."""
    click.echo(
        output.model_dump_json(indent=2, exclude_unset=isinstance(output, ListOutput | StoreListOutput))
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain text."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(escape(visible(cell)) for cell in row))
    return result


def console() -> Console:
    """Console of standard output; wide where it is no terminal, so that logs keep whole lines."""
    screen = Console(file=sys.stdout, highlight=False)
    if not screen.is_terminal:
        screen = Console(file=sys.stdout, highlight=False, width=160)
    return screen
