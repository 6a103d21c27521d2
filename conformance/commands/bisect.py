"""`conformance bisect`: the release that broke a case, or mended it."""

from __future__ import annotations

import contextlib

import click

from conformance.commands import output
from conformance.commands.output import BisectOutput, json_option
from conformance.commands.selection import select_one
from conformance.history import Bisection, Releases
from conformance.history import bisect as find_change

_NOT_MONOTONIC = (
    "These verdicts change more than once; the last change is named. `conformance ladder` shows them all."
)


@click.command("bisect")
@click.argument("case")
@click.option("--target", "-t", required=True, metavar="NAME", help="Target with versions, such as vllm.")
@click.option("--rule", metavar="NAME", help="Ask where this rule of the case was broken or kept.")
@json_option
def bisect_command(case: str, target: str, rule: str | None, as_json: bool) -> None:
    """Name the last release before CASE (suite-id::case-id) changed its verdict, and the first after it.

    A case that fails in some streams on every release may still change in a rule: `--rule expected` asks
    about the answer to the whole output.

    Halves the range between the oldest and the newest installed release; results of earlier runs count.
    """
    loaded = select_one(case)
    with contextlib.closing(Releases()) as releases:
        found = find_change(target, loaded, releases, rule, progress=lambda line: click.echo(line, err=True))
    if as_json:
        output.emit_json(BisectOutput(bisection=found))
        return
    rows = [
        (seen.spec, seen.verdict, ", ".join(seen.rules), "earlier" if seen.stored else "now")
        for seen in found.seen
    ]
    screen = output.console()
    screen.print(output.table(found.case, ("release", "verdict", "rules broken", "run"), rows))
    for rung in found.unusable:
        screen.print(f"{rung.spec} was not asked: {rung.reason}", markup=False, soft_wrap=True)
    screen.print(_sentence(found), markup=False, soft_wrap=True)
    if not found.monotonic:
        screen.print(_NOT_MONOTONIC, markup=False)


def _sentence(found: Bisection) -> str:
    if found.kind == "broke":
        return f"last good: {found.before}; first bad: {found.after}"
    if found.kind == "mended":
        return f"last bad: {found.before}; first good: {found.after}"
    if not found.seen:
        return f"no release of {found.target} could be asked"
    about = f" on the rule {found.rule}" if found.rule else ""
    return f"no change: the {len(found.seen)} releases seen agree{about}"
