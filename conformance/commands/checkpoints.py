"""`conformance checkpoints`: the bundled checkpoints, which take too long to train in CI."""

from __future__ import annotations

import click

from conformance.commands import output
from conformance.commands.output import json_option
from conformance.commands.trial_output import CheckpointRow, CheckpointsCheckOutput


@click.group("checkpoints")
def checkpoints_group() -> None:
    """Ask about the bundled checkpoints."""


@checkpoints_group.command("check")
@json_option
@click.pass_context
def check_command(context: click.Context, as_json: bool) -> None:
    """Check whether the bundled checkpoints were trained with the sources that are here; nothing is run.

    Exits with 3 if a recipe, or a generator that it learns from, has changed since; the last line says what
    trains those again.
    """
    from conformance.targets import bundled  # it loads the implementation

    rows = tuple(
        CheckpointRow(checkpoint=found.name, changed=found.changed, train=found.train)
        for found in bundled.trained()
    )
    if as_json:
        output.emit_json(CheckpointsCheckOutput(checkpoints=rows))
    else:
        for row in rows:
            changed = (
                f"to be trained again: changed since: {', '.join(row.changed)}" if row.changed else "holds"
            )
            click.echo(f"{row.checkpoint}: {changed}")
        if stale := [row for row in rows if row.changed]:
            commands = "; ".join(row.train for row in stale)
            click.echo(f"{len(stale)} of {len(rows)} are to be trained again: {commands}")
    context.exit(3 if any(row.changed for row in rows) else 0)
