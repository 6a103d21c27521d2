"""`conformance list`: what there is."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from conformance.commands import output
from conformance.commands.output import CaseRow, ListOutput, SourceRow, SuiteRow, json_option
from conformance.commands.selection import select
from conformance.commands.targets import target_rows, target_table
from conformance.loading import LoadedCase, LoadedSuite, LoadedSuites
from conformance.suites import ParserCase

SECTIONS = ("suites", "cases", "targets", "sources")


@click.command("list")
@click.argument("what", type=click.Choice(SECTIONS), required=False)
@click.option("--suites", "paths", multiple=True, metavar="PATH", help="Suite files or folders of your own.")
@json_option
def list_command(what: str | None, paths: tuple[str, ...], as_json: bool) -> None:
    """List suites, cases, targets or sources; without a word, all of them."""
    wanted = (what,) if what else SECTIONS
    result = collect(wanted, paths)
    if as_json:
        output.emit_json(result)
        return
    screen = output.console()
    for section in wanted:
        screen.print(_table(section, result))


def collect(wanted: tuple[str, ...], paths: tuple[str, ...]) -> ListOutput:
    """Fill the sections that are wanted."""
    suites = select(paths).suites if set(wanted) != {"targets"} else LoadedSuites(())
    sections: dict[str, Any] = {}
    if "suites" in wanted:
        sections["suites"] = tuple(_suite_row(suite) for suite in suites)
    if "cases" in wanted:
        sections["cases"] = tuple(_case_row(case) for case in suites.cases)
    if "targets" in wanted:
        sections["targets"] = target_rows()
    if "sources" in wanted:
        sections["sources"] = _sources(suites)
    return ListOutput(**sections)


def _suite_row(loaded: LoadedSuite) -> SuiteRow:
    suite = loaded.suite
    return SuiteRow(
        id=suite.id,
        title=suite.title,
        kind=suite.kind,
        area=suite.area,
        cases=len(suite.cases),
        path=str(loaded.path),
    )


def _case_row(loaded: LoadedCase) -> CaseRow:
    case = loaded.case
    return CaseRow(
        address=loaded.address,
        title=case.title,
        kind=loaded.suite.suite.kind,
        area=loaded.suite.suite.area,
        source=case.source,
        contested=isinstance(case, ParserCase) and case.policy is not None,
        control_of=case.control_of,
        tags=case.tags,
        path=str(loaded.suite.path),
        line=loaded.line,
    )


def _sources(suites: LoadedSuites) -> tuple[SourceRow, ...]:
    found: dict[str, list[str]] = {}
    for loaded in suites.cases:
        for source in loaded.case.source:
            found.setdefault(source, []).append(loaded.address)
    return tuple(SourceRow(source=source, cases=tuple(found[source])) for source in sorted(found))


def _table(section: str, result: ListOutput) -> Table:
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if section == "suites":
        columns = ("suite", "kind", "area", "cases", "title")
        rows = [(s.id, s.kind, s.area, str(s.cases), s.title) for s in result.suites or ()]
    elif section == "cases":
        columns = ("case", "area", "source", "rule")
        rows = [(c.address, c.area, ", ".join(c.source), c.title) for c in result.cases or ()]
    elif section == "targets":
        return target_table(result.targets or ())
    else:
        columns = ("source", "cases", "for example")
        rows = [(s.source, str(len(s.cases)), ", ".join(s.cases[:3])) for s in result.sources or ()]
    return output.table(section, columns, rows)
