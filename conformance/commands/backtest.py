"""`conformance backtest`: are catalogued faults found in the releases that had them?"""

from __future__ import annotations

import contextlib
from collections import Counter

import click

from conformance import backtests
from conformance.backtests import BacktestResult
from conformance.commands import output
from conformance.commands.output import BacktestOutput, json_option
from conformance.history import Releases
from conformance.loading import load_suites


@click.command("backtest")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@json_option
@click.pass_context
def backtest_command(context: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Look for catalogued faults (default: all with a backtest) in the last release that had them.

    Exits with 1 if one is missed; else with 3 if one is not reachable, because a release is not installed or
    its engine does not start; else with 0.
    """
    table = backtests.load()
    chosen = backtests.choose(table, ids)
    suites = load_suites()
    found: list[BacktestResult] = []
    with contextlib.closing(Releases()) as releases:
        for entry in chosen:
            found.append(backtests.run(entry, suites, releases))
            click.echo(f"{entry.id}: {found[-1].state}", err=True)
    reasons = {i: unreached.reason for unreached in table.not_reachable for i in unreached.ids}
    if as_json:
        output.emit_json(BacktestOutput(backtests=tuple(found), not_reachable=reasons))
    else:
        _print(found, {} if ids else reasons)
    states = {result.state for result in found}
    context.exit(1 if "missed" in states else 3 if "not reachable" in states else 0)


def _print(found: list[BacktestResult], reasons: dict[str, str]) -> None:
    screen = output.console()
    for result in found:
        screen.print(f"{result.id} {result.state}: {result.title}", markup=False, soft_wrap=True)
        screen.print(f"    case {result.case}", markup=False, soft_wrap=True)
        for line in result.proof:
            screen.print(f"    {line}", markup=False, soft_wrap=True)
    for catalogue_id, reason in reasons.items():
        screen.print(f"{catalogue_id} has no backtest: {reason}", markup=False, soft_wrap=True)
    counts = Counter(result.state for result in found)
    screen.print(", ".join(f"{counts[state]} {state}" for state in ("detected", "missed", "not reachable")))
