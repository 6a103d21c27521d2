"""`conformance targets`: what can be tested here, and the environments it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
from rich.table import Table

from conformance.commands import output
from conformance.commands.output import DoctorOutput, DoctorRow, TargetRow, TargetsOutput, json_option
from conformance.errors import TargetError, UsageError
from conformance.targets import environments, overlays, registry


def target_rows() -> tuple[TargetRow, ...]:
    """Every target and version that the registry names."""
    return tuple(
        TargetRow(
            spec=found.spec,
            description=found.description,
            default=found.default,
            usable=not found.reason,
            megabytes=found.megabytes,
            reason=found.reason,
            parts=found.parts,
        )
        for found in registry.summaries()
    )


def target_table(rows: Iterable[TargetRow]) -> Table:
    """The same for people."""
    columns = ("target", "what it is", "default", "MB", "usable")
    cells = [
        (
            row.spec,
            row.description,
            "yes" if row.default else "",
            str(row.megabytes or ""),
            ("yes" if row.usable else f"no: {row.reason}") + (f"; {row.parts}" if row.parts else ""),
        )
        for row in rows
    ]
    table = output.table("targets", columns, cells)
    table.caption = "\n".join(f"also {form}: {what}" for form, what in registry.FORMS.items())
    table.caption_justify = "left"
    return table


@click.group("targets", invoke_without_command=True)
@json_option
@click.pass_context
def targets_group(context: click.Context, as_json: bool) -> None:
    """List targets; install, check or remove their environments."""
    if context.invoked_subcommand is None:
        _print(as_json)


@targets_group.command("list")
@json_option
def list_targets(as_json: bool) -> None:
    """List targets, and whether each can be used here."""
    _print(as_json)


@targets_group.command("install")
@click.argument("specs", nargs=-1)
@click.option("--default", "defaults", is_flag=True, help="Those that run when no target is named.")
@json_option
@click.pass_context
def install_targets(context: click.Context, specs: tuple[str, ...], defaults: bool, as_json: bool) -> None:
    """Install the environments of SPECS, such as vllm@0.32.0; complete ones are left alone.

    By name, an environment is installed with all its parts; by --default, without those that are not there
    yet. One that fails does not keep the others from being installed; the exit code is then 1.
    """
    named = set(_chosen(specs, defaults=False)) if specs else set()
    failed = False
    for spec in _chosen(specs, defaults=defaults):
        try:
            environments.install(spec, progress=lambda line: click.echo(line, err=True), parts=spec in named)
        except TargetError as error:
            click.echo(f"{spec}: {error}", err=True)
            failed = True
    _print(as_json)
    context.exit(1 if failed else 0)


@targets_group.command("lock")
@click.argument("spec", metavar="NAME@VERSION")
@click.option("--with", "extra", multiple=True, metavar="PACKAGE==VERSION", help="What the base lacks.")
@click.option("--adapter", default="", metavar="MODULE", help="Adapter, where the usual one does not fit.")
def lock_target(spec: str, extra: tuple[str, ...], adapter: str) -> None:
    """Add a release of an engine: install it over the newest environment of that engine, and pin it."""
    path = overlays.add(spec, extra=extra, adapter=adapter, progress=lambda line: click.echo(line, err=True))
    click.echo(f"{path}: written; see whether it works: conformance targets doctor {spec}")


@targets_group.command("remove")
@click.argument("specs", nargs=-1, required=True)
@json_option
def remove_targets(specs: tuple[str, ...], as_json: bool) -> None:
    """Remove the environments of SPECS. A server has none of its own: name its engine, which goes as well."""
    for spec in specs:
        resolved = registry.resolve(spec)
        if (engine := registry.environment_of(resolved)) != resolved:
            raise UsageError(f"{resolved} runs in the environment of {engine}; to remove both, name {engine}")
    for spec in _chosen(specs, defaults=False):
        removed = environments.remove(spec)
        click.echo(f"{spec}: {'removed' if removed else 'was not installed'}", err=True)
    _print(as_json)


@targets_group.command("doctor")
@click.argument("specs", nargs=-1)
@json_option
@click.pass_context
def doctor_command(context: click.Context, specs: tuple[str, ...], as_json: bool) -> None:
    """Start SPECS (default: all that are installed) and check them; exit with 1 if one is ill."""
    usable = [found.spec for found in registry.summaries() if not found.reason]
    rows = tuple(
        DoctorRow(target=spec, name=check.name, ok=check.ok, detail=check.detail)
        for spec in ([registry.resolve(spec) for spec in specs] or usable)
        for check in registry.doctor(spec)
    )
    if as_json:
        output.emit_json(DoctorOutput(checks=rows))
    else:
        columns = ("target", "check", "result", "detail")
        table = [(row.target, row.name, "good" if row.ok else "ILL", row.detail) for row in rows]
        output.console().print(output.table("health of targets", columns, table))
    context.exit(0 if all(row.ok for row in rows) else 1)


def _chosen(specs: Sequence[str], *, defaults: bool) -> list[str]:
    """The environments of targets, by their specs."""
    with_environment = {found.spec for found in environments.environments()}
    chosen = [spec for spec in registry.default_targets() if spec in with_environment] if defaults else []
    for spec in specs:
        resolved = registry.environment_of(registry.resolve(spec))
        if resolved not in with_environment:
            names = ", ".join(sorted(with_environment))
            raise UsageError(f"{spec!r} has no environment of its own; these have: {names}")
        chosen.append(resolved)
    if not specs and not defaults:
        raise UsageError("name a target such as vllm@0.32.0, or give --default")
    return list(dict.fromkeys(chosen))


def _print(as_json: bool) -> None:
    rows = target_rows()
    if as_json:
        output.emit_json(TargetsOutput(targets=rows, forms=registry.FORMS))
    else:
        output.console().print(target_table(rows))
