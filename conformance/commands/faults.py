"""`conformance faults`: known bugs, switched on one at a time, must be noticed by some case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from conformance import expectations
from conformance.commands import output
from conformance.commands.output import json_option
from conformance.commands.run import seconds
from conformance.commands.selection import select
from conformance.commands.trial_output import (
    FaultRow,
    FaultsCheckOutput,
    FaultsMeasureOutput,
    FaultsOutput,
    RecordRow,
    StaleRow,
)
from conformance.errors import UsageError
from conformance.faults import Fault, measure, record
from conformance.faults import select as select_faults
from conformance.faults.cleanly import Clean
from conformance.faults.places import CLASSES, places
from conformance.faults.record import FaultRecord, FaultsFile
from conformance.faults.run import Detection, detect
from conformance.records import Record

_PATH = click.Path(path_type=Path)
_faults = click.option("--fault", "ids", multiple=True, metavar="ID", help="Only this one; may be repeated.")
_classes = click.option(
    "--class", "classes", multiple=True, type=click.Choice(CLASSES), help="Only this class; may be repeated."
)


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
    known = expectations.beside(suites)

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


@faults_group.command("measure")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@_faults
@_classes
@click.option(
    "-n", "workers", type=click.IntRange(min=1), default=1, show_default=True, help="Faults at a time."
)
@click.option("--out", type=_PATH, help="The record.  [default: the committed ci/faults.json]")
@click.option(
    "--work", type=_PATH, default=Path("runs/faults"), show_default=True, help="What it goes on from."
)
@click.option(
    "--limit", default=measure.FAULT_LIMIT, show_default=True, callback=seconds, help="Seconds for one fault."
)
@click.option("--again", is_flag=True, help="Measure faults whose record holds, too.")
@json_option
@click.pass_context
def measure_faults(
    context: click.Context,
    cases: tuple[str, ...],
    ids: tuple[str, ...],
    classes: tuple[str, ...],
    workers: int,
    out: Path | None,
    work: Path,
    limit: float,
    again: bool,
    as_json: bool,
) -> None:
    """Run all quick suites, or CASES of them, with each fault on, and keep a record of what noticed it.

    A fault whose record holds is left alone, so a measurement that was ended goes on. Exits with 1 if a fault
    goes unnoticed.
    """
    chosen = _chosen(ids, classes)
    selected = select(cases, quick=True)
    path = out or record.default_path()
    plan = measure.Plan(chosen, cases, selected.cases, path, work, workers=workers, limit=limit, again=again)
    file = measure.measure(plan, progress=lambda found: click.echo(_told(found), err=True))
    wanted = {fault.id for fault in chosen}
    records = [found for found in file.faults if found.fault in wanted]
    if as_json:
        output.emit_json(_measured(file, records, path))
    else:
        _print_rates(file, records)
        click.echo(f"record: {path}")
    context.exit(0 if all(found.last.detected for found in records) else 1)


@faults_group.command("show")
@click.argument("file", required=False, type=_PATH)
@json_option
def show_faults(file: Path | None, as_json: bool) -> None:
    """Show a record (default: the committed one): rates by class, and what was noticed by a crash alone."""
    path = file or record.default_path()
    found = record.read(path)
    if as_json:
        output.emit_json(_measured(found, found.faults, path))
    else:
        _print_rates(found, found.faults)


@faults_group.command("check")
@click.argument("file", required=False, type=_PATH)
@_faults
@_classes
@json_option
@click.pass_context
def check_faults(
    context: click.Context, file: Path | None, ids: tuple[str, ...], classes: tuple[str, ...], as_json: bool
) -> None:
    """Check whether a record (default: the committed one) still holds, by digests; nothing is run.

    Exits with 3 if a fault must be measured again, or was never measured.
    """
    path = file or record.default_path()
    found = record.read(path)
    cases = select(found.selection, quick=True).cases
    rows = [
        StaleRow(id=fault.id, reason=record.stale(found.of(fault.id), record.basis(fault, cases)))
        for fault in _chosen(ids, classes)
    ]
    stale = [row for row in rows if row.reason]
    gone = tuple(entry.fault for entry in found.faults if entry.fault not in places().by_fault)
    if as_json:
        output.emit_json(FaultsCheckOutput(file=str(path), faults=len(rows), stale=tuple(stale), gone=gone))
    else:
        for reason in dict.fromkeys(row.reason for row in stale):
            names = [row.id for row in stale if row.reason == reason]
            click.echo(f"{len(names)} to be measured, as each {reason}: {', '.join(names)}")
        for name in gone:
            click.echo(f"{name}: is recorded, and there is no such fault any more")
        click.echo(f"{len(rows) - len(stale)} of {len(rows)} records hold")
    context.exit(3 if stale or gone else 0)


@faults_group.command("run-cleanly", hidden=True)
@click.argument("cases", nargs=-1)
@click.option("--out", type=_PATH, required=True)
def run_cleanly(cases: tuple[str, ...], out: Path) -> None:
    """What `measure` starts first."""
    _write(Clean.of(select(cases, quick=True).cases), out)


@faults_group.command("look-for", hidden=True)
@click.argument("fault")
@click.argument("cases", nargs=-1)
@click.option("--clean", type=_PATH, required=True)
@click.option("--out", type=_PATH, required=True)
def look_for_fault(fault: str, cases: tuple[str, ...], clean: Path, out: Path) -> None:
    """What `measure` starts for each fault."""
    (chosen,) = select_faults((fault,))
    known = Clean.read(clean)
    if known is None:
        raise UsageError(f"--clean: {clean} is not what `conformance faults measure` writes first")
    _write(measure.look_for(chosen, select(cases, quick=True).cases, known), out)


def _write(found: Record, out: Path) -> None:
    """Whoever reads it sees the whole file or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_suffix(".new")
    new.write_text(found.model_dump_json() + "\n", encoding="utf-8")
    new.replace(out)


def _chosen(ids: Sequence[str], classes: Sequence[str]) -> list[Fault]:
    """The faults that were named, of the classes that were named; all if none was.

    Raises:
        UsageError: an id is unknown, or none is left.
    """
    known = places().by_fault
    chosen = [
        fault
        for fault in select_faults(ids)
        if not classes or fault.id not in known or known[fault.id].class_ in classes
    ]
    if not chosen:
        raise UsageError("none of the faults that were named is of a class that was named")
    return chosen


def _told(found: FaultRecord) -> str:
    last = found.last
    if not last.detected:
        return f"{found.fault}: NOT NOTICED by {last.cases} cases, of which {last.asked} were asked" + (
            f"; {last.reason}" if last.reason else ""
        )
    by = ", ".join(f"{count} of {kind}" for kind, count in last.kinds.items())
    near = "in its area" if found.in_area(last) else "ELSEWHERE"
    where = "where it is" if found.localised(last) else near
    crash = ", BY CRASHES ONLY" if last.crash_only else ""
    return f"{found.fault}: noticed {where}{crash}, first at level {last.level}; by cases: {by}"


def _measured(file: FaultsFile, records: Sequence[FaultRecord], path: Path) -> FaultsMeasureOutput:
    rows = tuple(
        RecordRow(
            **found.model_dump(include={"fault", "title", "fault_class", "area", "layer", "level", "module"}),
            first=found.first,
            last=found.last,
            localised_first=found.localised(found.first),
            localised=found.localised(found.last),
            in_area_first=found.in_area(found.first),
            in_area=found.in_area(found.last),
        )
        for found in records
    )
    return FaultsMeasureOutput(
        file=str(path),
        digest=file.digest,
        faults=rows,
        rates=record.rates(records),
        classes=dict(record.rates_by_class(records)),
    )


def _print_rates(file: FaultsFile, records: Sequence[FaultRecord]) -> None:
    columns = (
        *("class", "faults", "noticed (first run)", "where they are (first run)"),
        *("in their area (first run)", "by crashes only"),
    )
    named = [*record.rates_by_class(records).items(), ("all", record.rates(records))]
    rows = [
        (
            str(name),
            str(r.faults),
            f"{r.detected} ({r.detected_first})",
            f"{r.localised} ({r.localised_first})",
            f"{r.in_area} ({r.in_area_first})",
            str(r.crash_only),
        )
        for name, r in named
    ]
    output.console().print(output.table("faults", columns, rows))
    for found in records:
        if found.last.crash_only or not found.last.detected or not found.localised(found.last):
            click.echo(_told(found))
    untold = record.rates(records).first_untold
    if untold:
        click.echo(
            f"{untold} first runs did not keep by which cases a fault was noticed, and count as not localised"
        )
    left_out = sum(file.left_out.values())
    if left_out:
        click.echo(f"{left_out} cases say nothing about faults here, as they do not pass without any")


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
