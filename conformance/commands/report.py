"""`conformance report`: the dashboard of a run."""

from __future__ import annotations

from pathlib import Path

import click

from conformance import history, runfile
from conformance.backtests import read_findings
from conformance.commands import output
from conformance.commands.output import ReportOutput, json_option
from conformance.commands.selection import select

DEFAULT_SITE = Path("reports/site")
_FILE = click.Path(path_type=Path)


@click.command("report")
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_SITE, show_default=True)
@click.option("--suites", "paths", multiple=True, metavar="PATH", help="Suite files or folders of your own.")
@click.option(
    "--ladder", "ladders", multiple=True, type=_FILE, help="What `conformance ladder` wrote; may be repeated."
)
@click.option("--backtests", type=_FILE, help="What `conformance backtest` wrote.")
@json_option
def report_command(
    run_file: Path,
    out: Path,
    paths: tuple[str, ...],
    ladders: tuple[Path, ...],
    backtests: Path | None,
    as_json: bool,
) -> None:
    """Write the dashboard of RUN_FILE as static HTML."""
    from conformance.report import write_site

    run = runfile.read(run_file)
    if run.torn:
        click.echo(f"note: {run_file}: {run.torn}", err=True)
    write_site(
        run,
        out,
        suites=select(paths).suites,
        ladders=[history.read(path) for path in ladders],
        backtests=read_findings(backtests) if backtests is not None else None,
    )
    index = out / "index.html"
    if as_json:
        output.emit_json(ReportOutput(run_file=str(run_file), index=str(index), results=len(run.latest())))
    else:
        click.echo(f"dashboard: {index}")
