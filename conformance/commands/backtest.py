"""`conformance backtest`: are catalogued faults found in the releases that had them?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from conformance import backtests, runfile
from conformance.backtests import BacktestResult, Findings
from conformance.commands import output
from conformance.commands.output import BacktestOutput, json_option
from conformance.history import Releases
from conformance.loading import load_suites


@click.command("backtest")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="JSON file for `conformance report --backtests`."
)
@click.option(
    "--installed",
    is_flag=True,
    help="Leave those of releases that are not installed unreached, which then changes no exit code.",
)
@json_option
@click.pass_context
def backtest_command(
    context: click.Context, ids: tuple[str, ...], out: Path | None, installed: bool, as_json: bool
) -> None:
    """Look for catalogued faults (default: all with a backtest) in the last release that had them.

    Also looks for those that the chosen ones rest on: what a release fails by besides.

    Exits with 1 if one is missed; else with 3 if one is not reachable, because a release is not installed or
    its engine does not start; else with 0.
    """
    table = backtests.load()
    chosen = backtests.choose(table, ids)
    if out is not None:
        runfile.check_parent(out)
    suites = load_suites()
    lacking = {entry: backtests.not_installed(entry, table) for entry in chosen} if installed else {}
    with contextlib.closing(Releases()) as releases:
        asked = [entry for entry in chosen if not lacking.get(entry)]
        ran = backtests.run_all(asked, table, suites, releases, _tell) if asked else ()
    found = (*ran, *(backtests.unreached(entry, reason) for entry, reason in lacking.items() if reason))
    reasons = {i: unreached.reason for unreached in table.not_reachable for i in unreached.ids}
    findings = Findings(backtests=found, not_reachable=reasons)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(findings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if as_json:
        output.emit_json(BacktestOutput(**dict(findings)))
    else:
        _print(found, {} if ids else reasons)
    states = {result.state for result in ran}
    context.exit(1 if "missed" in states else 3 if "not reachable" in states else 0)


def _tell(result: BacktestResult) -> None:
    click.echo(f"{result.id}: {result.state}", err=True)


def _print(found: Sequence[BacktestResult], reasons: dict[str, str]) -> None:
    screen = output.console()
    for result in found:
        screen.print(f"{result.id} {result.state}: {result.title}", markup=False, soft_wrap=True)
        screen.print(f"    case {result.case}", markup=False, soft_wrap=True)
        if result.elsewhere:
            screen.print(f"    the catalogue has it of {result.elsewhere}", markup=False, soft_wrap=True)
        for line in result.proof:
            screen.print(f"    {line}", markup=False, soft_wrap=True)
    for catalogue_id, reason in reasons.items():
        screen.print(f"{catalogue_id} has no backtest: {reason}", markup=False, soft_wrap=True)
    counts = Counter(result.state for result in found)
    detected = {result.id for result in found if result.state == "detected"}
    numbers = ", ".join(f"{counts[state]} {state}" for state in backtests.STATES)
    screen.print(f"{numbers}; catalogue ids detected: {len(detected)}")
