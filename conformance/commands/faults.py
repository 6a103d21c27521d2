"""`conformance faults`: known bugs, switched on one at a time, must be noticed by some case."""

from __future__ import annotations

import click

from conformance import expectations
from conformance.commands import output
from conformance.commands.output import FaultRow, FaultsOutput, json_option
from conformance.commands.selection import select
from conformance.faults import Fault
from conformance.faults import select as select_faults
from conformance.faults.run import Detection, detect
from conformance.loading import load_suites


@click.group("faults")
def faults_group() -> None:
    """Switch known bugs on in the bundled implementation and see which cases notice."""


@faults_group.command("list")
@json_option
def list_faults(as_json: bool) -> None:
    """List the faults and where each was seen."""
    faults = select_faults(())
    if as_json:
        output.emit_json(FaultsOutput(faults=tuple(_row(fault) for fault in faults)))
        return
    rows = [(fault.id, ", ".join(fault.source), fault.area, fault.title) for fault in faults]
    columns = ("fault", "source", "area", "what goes wrong")
    output.console().print(output.table("faults", columns, rows))


@faults_group.command("run")
@click.argument("faults", nargs=-1)
@click.option("--suites", "paths", multiple=True, metavar="PATH", help="Suite files or folders of your own.")
@json_option
@click.pass_context
def run_faults(
    context: click.Context, faults: tuple[str, ...], paths: tuple[str, ...], as_json: bool
) -> None:
    """Run the suites once for each of FAULTS (default: all); exit with 1 if one goes unnoticed.

    A fault is noticed where it is if a failing case is of its area, and, with tensors, names its module.
    """
    chosen = {fault.id: fault for fault in select_faults(faults)}
    suites = select(paths).suites
    known = expectations.load(load_suites(sorted({suite.root for suite in suites})))

    def report(fault: Fault, detection: Detection) -> None:
        word = "noticed" if detection.localised else "NOTICED ELSEWHERE"
        if not detection.detected:
            word = "NOT NOTICED"
        click.echo(f"{fault.id}: {word} by {len(detection.caught_by)} of {detection.cases} cases", err=True)

    found = detect(list(chosen.values()), suites, known, progress=report)
    if as_json:
        rows = tuple(_row(chosen[d.fault], d) for d in found)
        output.emit_json(FaultsOutput(faults=rows))
    else:
        where = sum(d.localised for d in found)
        click.echo(f"{sum(d.detected for d in found)} of {len(found)} faults noticed, {where} where they are")
    context.exit(0 if all(d.detected and d.localised for d in found) else 1)


def _row(fault: Fault, detection: Detection | None = None) -> FaultRow:
    row = FaultRow(id=fault.id, title=fault.title, source=fault.source, kind=fault.kind, area=fault.area)
    if detection is None:
        return row
    return row.model_copy(
        update={
            "detected": detection.detected,
            "localised": detection.localised,
            "by_source": detection.by_source,
            "caught_by": tuple(catch.case for catch in detection.caught_by),
            "cases": detection.cases,
        }
    )
