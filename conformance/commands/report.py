"""`conformance report`: the dashboard of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from conformance import history, runfile
from conformance.backtests import read_findings
from conformance.commands import output
from conformance.commands.output import ReportOutput, json_option
from conformance.commands.selection import select
from conformance.commands.store import database_option
from conformance.comparison import Comparison, compare
from conformance.errors import RunFileError
from conformance.faults import record
from conformance.results import Run
from conformance.store import StoredRun
from conformance.trials.record import read as read_trials

if TYPE_CHECKING:
    from conformance.reporting.accuracy import History

DEFAULT_SITE = Path("reports/site")
_FILE = click.Path(path_type=Path)


@click.command("report")
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--or-newest",
    is_flag=True,
    help="Where RUN_FILE cannot be read, show the newest run of --database outside the matrix, else the "
    "newest of --matrix, and say so.",
)
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_SITE, show_default=True)
@click.option("--suites", "paths", multiple=True, metavar="PATH", help="Suite files or folders of your own.")
@click.option(
    "--ladder", "ladders", multiple=True, type=_FILE, help="What `conformance ladder` wrote; may be repeated."
)
@click.option("--backtests", type=_FILE, help="What `conformance backtest` wrote.")
@click.option(
    "--matrix",
    "cells",
    multiple=True,
    type=_FILE,
    help="Run files of cells, or folders of them, that `conformance matrix run` wrote; may be repeated.",
)
@click.option("--faults", type=_FILE, help="What `conformance faults measure` wrote.")
@click.option("--trials", type=_FILE, help="What `conformance trial --record` wrote.")
@database_option("Show the history of accuracy, what changed, and all runs from this database.")
@json_option
def report_command(
    run_file: Path,
    or_newest: bool,
    out: Path,
    paths: tuple[str, ...],
    ladders: tuple[Path, ...],
    backtests: Path | None,
    cells: tuple[Path, ...],
    faults: Path | None,
    trials: Path | None,
    database: str | None,
    as_json: bool,
) -> None:
    """Write the dashboard of RUN_FILE as static HTML.

    Without --database, nothing is compared, and accuracy is shown as this run has it, with no history. A run
    file of a cell that cannot be read is left out, and named on standard error.
    """
    from conformance.report import write_site

    of_cells, left_out = _cells(cells)
    try:
        run = runfile.read(run_file)
    except RunFileError as error:
        found = _newest(database, of_cells) if or_newest else None
        if found is None:
            raise
        run = found
        click.echo(f"note: {error}; shown is the newest run, {run.header.run_id}", err=True)
    if run.torn:
        click.echo(f"note: {run_file}: {run.torn}", err=True)
    known = _history(run, of_cells, database) if database is not None else _Known()
    write_site(
        run,
        out,
        suites=select(paths).suites,
        ladders=[history.read(path) for path in ladders],
        backtests=read_findings(backtests) if backtests is not None else None,
        history=known.accuracy,
        cells=of_cells,
        left_out=left_out,
        faults=record.read(faults) if faults is not None else None,
        trials=read_trials(trials) if trials is not None else None,
        comparison=known.comparison,
        runs=known.runs,
    )
    index = out / "index.html"
    if as_json:
        output.emit_json(ReportOutput(run_file=str(run_file), index=str(index), results=len(run.latest())))
    else:
        click.echo(f"dashboard: {index}")


def _cells(paths: tuple[Path, ...]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and what the others are: one that was cut off must not hide all."""
    found, left_out = [], []
    for path in runfile.files(paths):
        try:
            found.append(runfile.read(path))
        except RunFileError as error:
            left_out.append(f"A run of a cell is left out: {error}")
            click.echo(f"note: {left_out[-1]}", err=True)
    return found, left_out


def _newest(database: str | None, cells: list[Run]) -> Run | None:
    """The newest stored run outside the matrix, else the newest of a cell; None where there is none."""
    from conformance.store.history import Store

    if database is not None:
        with Store(database) as store:
            for stored in store.runs(limit=1, cells=False):
                return store.run(stored.run_id)
    return max(cells, key=lambda run: run.header.started, default=None)


@dataclass(frozen=True)
class _Known:
    """What a database says beside a run."""

    accuracy: History | None = None
    comparison: Comparison | None = None
    runs: tuple[StoredRun, ...] = ()


def _history(run: Run, cells: Sequence[Run], database: str) -> _Known:
    from conformance.store.history import Store

    scored = {key for key, result in run.latest().items() if result.evidence.accuracy is not None}
    with Store(database) as store:
        return _Known(
            accuracy=store.accuracy(besides=scored),
            comparison=compare(store, [run, *cells]),
            runs=tuple(store.runs()),
        )
