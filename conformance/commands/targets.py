"""`conformance targets`: what can be tested here, and the environments it takes."""

from __future__ import annotations

from collections.abc import Iterable

import click
from rich.table import Table

from conformance.commands import output
from conformance.commands.output import TargetRow, TargetsOutput, json_option
from conformance.targets import registry


def target_rows() -> tuple[TargetRow, ...]:
    """Every target that the registry names."""
    defaults = {registry.resolve(spec) for spec in registry.default_targets()}
    rows = []
    for spec in dict.fromkeys(registry.resolve(spec) for spec in registry.known_targets()):
        reason = registry.unavailable(spec)
        rows.append(TargetRow(spec=spec, default=spec in defaults, usable=not reason, reason=reason))
    return tuple(rows)


def target_table(rows: Iterable[TargetRow]) -> Table:
    """The same for people."""
    columns = ("target", "default", "usable", "what to do")
    words = {True: "yes", False: "no"}
    return output.table(
        "targets", columns, [(row.spec, words[row.default], words[row.usable], row.reason) for row in rows]
    )


@click.group("targets", invoke_without_command=True)
@json_option
@click.pass_context
def targets_group(context: click.Context, as_json: bool) -> None:
    """List targets; install, check or remove their environments."""
    if context.invoked_subcommand is None:
        _print(as_json)


def _print(as_json: bool) -> None:
    rows = target_rows()
    if as_json:
        output.emit_json(TargetsOutput(targets=rows))
    else:
        output.console().print(target_table(rows))
