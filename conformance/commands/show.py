"""`conformance show`: one case, and how a run judged it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from conformance import expectations, runfile
from conformance.commands import output
from conformance.commands.output import ExpectationRow, ShowOutput, json_option
from conformance.commands.selection import select_one
from conformance.explain import explain, quoted, visible
from conformance.loading import LoadedCase, load_suites, resolve_tools


@click.command("show")
@click.argument("case")
@click.option(
    "--run", "run", type=click.Path(path_type=Path), help="Run file: show its results for the case."
)
@json_option
def show_command(case: str, run: Path | None, as_json: bool) -> None:
    """Show a CASE, named `suite-id::case-id`: input, rule, expectations, and results of a run."""
    result = describe(select_one(case), run)
    if as_json:
        output.emit_json(result)
        return
    click.echo(_text(result))


def describe(loaded: LoadedCase, run: Path | None) -> ShowOutput:
    """Everything that is known about a case."""
    suite = loaded.suite
    known = expectations.load(load_suites([suite.root]))
    results = runfile.read(run).latest() if run is not None else {}
    shown = loaded.case.model_dump(mode="json", exclude_defaults=True)
    if tools := resolve_tools(loaded.case, suite.suite):
        shown["tools"] = list(tools)
    return ShowOutput(
        address=loaded.address,
        title=loaded.case.title,
        kind=suite.suite.kind,
        area=suite.suite.area,
        path=str(suite.path),
        line=loaded.line,
        digest=loaded.digest,
        case=shown,
        controls=tuple(other.address for other in suite.cases if other.case.control_of == loaded.case.id),
        expectations=tuple(
            ExpectationRow(
                target=e.target,
                versions=e.entry.versions,
                rules=e.entry.rules,
                reason=e.entry.reason,
                source=e.entry.source,
                finding=e.entry.finding,
                review=e.entry.review.isoformat(),
                where=e.where,
            )
            for e in known.all
            if loaded.address in e.addresses
        ),
        results=tuple(r for key, r in results.items() if key[:2] == (suite.suite.id, loaded.case.id)),
    )


def _text(shown: ShowOutput) -> str:
    lines = [shown.address, f"  {shown.title}", f"  {shown.path}:{shown.line}", ""]
    case = dict(shown.case)
    for name in ("id", "title"):
        case.pop(name, None)
    for name, value in case.items():
        if isinstance(value, str):
            lines.append(f"{name}: {quoted(value)}")
        else:
            text = visible(json.dumps(value, indent=2, ensure_ascii=False))
            lines.append(f"{name}: {text}")
    if shown.controls:
        lines.append(f"controls: {', '.join(shown.controls)}")
    for known in shown.expectations:
        versions = known.versions or "every version"
        lines += [
            "",
            f"expected to fail on {known.target} ({versions}): {known.reason}",
            f"  rules {', '.join(known.rules)}; {known.source}; review by {known.review}; {known.where}",
        ]
    for result in shown.results:
        lines += ["", explain(result)]
    return "\n".join(lines)
