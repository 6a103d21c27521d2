"""`conformance nightly`: everything that CI asks once a day."""

from __future__ import annotations

from pathlib import Path

import click

from conformance.commands import output
from conformance.commands.output import json_option
from conformance.commands.run import matrix_option, seconds
from conformance.commands.store import database_option
from conformance.commands.trial_output import NightlyOutput
from conformance.nightly import plan, text
from conformance.nightly import run as nights
from conformance.recording import new_run_id

_PATH = click.Path(path_type=Path)


@click.command("nightly")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option(
    "--target", "-t", "targets", multiple=True, metavar="SPEC", help="Of the suites; may be repeated."
)
@click.option("--tier", default="nightly", show_default=True, help="Of the matrix.")
@click.option("--cell", "cells", multiple=True, metavar="ID", help="Only these cells; ids or patterns.")
@click.option(
    "--spread",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Nights over which these cells are spread, in shards that take turns.",
)
@matrix_option
@click.option(
    "--ladder", "ladders", multiple=True, metavar="NAME", help=f"[default: {', '.join(plan.LADDERS)}]"
)
@click.option("--backtest", "backtests", multiple=True, metavar="ID", help="Only these, by catalogue ids.")
@click.option("--sample", type=click.IntRange(min=1), default=3, show_default=True, help="Faults to measure.")
@click.option(
    "--runs", type=click.IntRange(min=1), default=2, show_default=True, help="Runs without a fault."
)
@click.option("--kills", type=click.IntRange(min=1), default=50, show_default=True, help="Kills of a run.")
@click.option("--skip", multiple=True, type=click.Choice(plan.STEPS), help="Leave this step out; repeatable.")
@click.option("-n", "workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option(
    "--limit", default=plan.STEP_LIMIT, show_default=True, callback=seconds, help="Seconds for one step."
)
@click.option(
    "--record", type=_PATH, default=Path("runs/faults.json"), show_default=True, help="Record of faults."
)
@click.option("--out", type=_PATH, help="Folder; one that is there goes on.  [default: runs/nightly-<id>]")
@database_option("The history.  [default: a file in the user's data folder]")
@json_option
@click.pass_context
def nightly_command(
    context: click.Context,
    cases: tuple[str, ...],
    targets: tuple[str, ...],
    tier: str,
    cells: tuple[str, ...],
    spread: int,
    matrix: Path | None,
    ladders: tuple[str, ...],
    backtests: tuple[str, ...],
    sample: int,
    runs: int,
    kills: int,
    skip: tuple[str, ...],
    workers: int,
    limit: float,
    record: Path,
    out: Path | None,
    database: str | None,
    as_json: bool,
) -> None:
    """Run a night: suites and gates, the newest releases, the matrix, faults, trials; merge, compare, report.

    Says what broke and since when, and writes that to nightly.txt and nightly.json in the folder. What is not
    installed is counted as not run. Exits with 1 if a step failed; else with 3 if one is open; else with 0.
    """
    from conformance.store.database import default_url  # it loads SQLAlchemy

    night = plan.Night(
        folder=out or Path("runs") / f"nightly-{new_run_id()}",
        # One for all steps: a report without a name for it has no history.
        database=database or default_url().render_as_string(hide_password=False),
        record=record,
        cases=cases,
        targets=targets,
        tier=tier,
        cells=cells,
        spread=spread,
        matrix=matrix,
        ladders=ladders or plan.LADDERS,
        backtests=backtests,
        sample=sample,
        clean_runs=runs,
        kills=kills,
        workers=workers,
        skip=frozenset(skip),
        limit=limit,
    )
    found = nights.run(
        night,
        progress=lambda step: click.echo(_told(step), err=True),
        keep=lambda found: _keep(night.folder, _answer(found)),
    )
    answer = _answer(found)
    if as_json:
        output.emit_json(answer)
    else:
        click.echo(answer.text, nl=False)
        click.echo(f"folder: {night.folder}")
    context.exit(found.exit_code)


def _answer(found: nights.NightResult) -> NightlyOutput:
    return NightlyOutput(night=found, text=text.told(found), exit_code=found.exit_code)


def _keep(folder: Path, answer: NightlyOutput) -> None:
    (folder / "nightly.txt").write_text(answer.text, encoding="utf-8")
    (folder / "nightly.json").write_text(answer.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _told(step: nights.StepResult) -> str:
    why = f": {step.reason}" if step.reason else ""
    return f"{step.name}: {step.state} ({step.seconds:.0f} s){why}"
