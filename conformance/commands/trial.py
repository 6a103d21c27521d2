"""`conformance trial`: no false alarm without a fault, and no result lost when a run is killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

from conformance.commands import output
from conformance.commands.output import json_option
from conformance.commands.run import seconds
from conformance.commands.selection import select
from conformance.commands.trial_output import CleanOutput, KillOutput, TrialCheckOutput, TrialRow
from conformance.recording import new_run_id
from conformance.trials import clean as cleaning
from conformance.trials import kill as killing
from conformance.trials import record as records
from conformance.verdicts import counted

_DEFAULT_TARGET = ("reference",)
Command = Callable[..., object]


def _common(command: Command) -> Command:
    """Options of both trials."""
    for option in (
        click.option("--target", "-t", "targets", multiple=True, metavar="SPEC", help="[default: reference]"),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw."),
        click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/trial-<id>]"),
        click.option(
            "--limit",
            default=cleaning.RUN_LIMIT,
            show_default=True,
            callback=seconds,
            help="Seconds for one run.",
        ),
        click.option(
            "--record",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Put what comes of it into this record, such as ci/trials.json.",
        ),
        json_option,
    ):
        command = option(command)
    return command


@click.group("trial")
def trial_group() -> None:
    """Try the harness itself."""


@trial_group.command("clean")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--runs", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@_common
@click.pass_context
def clean_command(
    context: click.Context,
    cases: tuple[str, ...],
    runs: int,
    targets: tuple[str, ...],
    seed: int,
    out: Path | None,
    limit: float,
    record: Path | None,
    as_json: bool,
) -> None:
    """Run the quick cases (or CASES of them) again and again with no fault, and list every alarm.

    Threads, processes, the order of cases, PYTHONHASHSEED and the seed of sampling differ from run
    to run. Exits with 1 if a case fails, or does not come out as it did before. Known failures are no alarms.
    """
    plan = cleaning.CleanPlan(cases, targets or _DEFAULT_TARGET, out or _folder(), runs, seed, limit)
    made = _begun(plan, record)
    found = cleaning.clean(plan, progress=lambda run: click.echo(_told(run), err=True))
    if record is not None:
        records.keep(record, made, found)
    bad = cleaning.alarming(found)
    if as_json:
        output.emit_json(CleanOutput(runs=tuple(found), alarming=len(bad)))
    else:
        for run in bad:
            for alarm in run.alarms:
                usual = f", usually {alarm.usual}" if alarm.usual not in (None, alarm.verdict) else ""
                verdict = alarm.verdict or "no result"
                click.echo(f"{alarm.address} [{alarm.target}]: {verdict}{usual}: {alarm.reason}")
            click.echo(f"repeat: {run.repeat}")
        click.echo(f"{len(found)} runs, {len(bad)} of them with an alarm")
    context.exit(1 if bad else 0)


@trial_group.command("kill")
@click.argument("cases", nargs=-1, metavar="[CASE]...")
@click.option("--times", type=click.IntRange(min=1), default=20, show_default=True, help="How often.")
@click.option("-n", "workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes.")
@_common
@click.pass_context
def kill_command(
    context: click.Context,
    cases: tuple[str, ...],
    times: int,
    workers: int,
    targets: tuple[str, ...],
    seed: int,
    out: Path | None,
    limit: float,
    record: Path | None,
    as_json: bool,
) -> None:
    """Kill a run of the quick cases (or CASES of them) at random points, and resume it each time.

    Exits with 1 if a result that was shown is not in the run file, if one was thrown away, or if a verdict is
    not that of an undisturbed run; else with 3 if the run came to its end before it was killed so often.
    """
    targets = targets or _DEFAULT_TARGET
    plan = killing.KillPlan(cases, targets, out or _folder(), times, seed, workers, limit)
    made = _begun(plan, record)
    found = killing.kill(plan, progress=lambda kill: click.echo(_told_kill(kill), err=True))
    if record is not None:
        records.keep(record, made, found)
    if as_json:
        output.emit_json(KillOutput(trial=found, sound=found.sound))
    else:
        for lost in dict.fromkeys(name for kill in found.kills for name in kill.lost):
            click.echo(f"LOST: {lost}")
        for name in found.differing:
            click.echo(f"DIFFERS: {name}")
        for name in found.twice:
            click.echo(f"RUN AGAIN: {name}")
        words = "nothing was lost, and all verdicts are the same" if found.sound else "not sound"
        fewer = f" of {times}" if len(found.kills) < times else ""
        click.echo(f"{found.planned} cases, killed {len(found.kills)}{fewer} times: {words}")
    context.exit(1 if not found.sound else 3 if len(found.kills) < times else 0)


@trial_group.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@json_option
@click.pass_context
def check_command(context: click.Context, file: Path | None, as_json: bool) -> None:
    """Check whether a record (default: the committed one) is long enough and still holds; nothing is run.

    Exits with 1 if a recorded trial went wrong, with 3 if one is to be made again.
    """
    path = file or records.default_path()
    found = records.read(path)
    stale = records.stale(found, lambda selection: select(selection, quick=True).cases)
    bad = records.bad(found)
    rows = tuple(TrialRow(trial=name, stale=stale.get(name, ""), bad=name in bad) for name in records.NAMES)
    if as_json:
        output.emit_json(TrialCheckOutput(file=str(path), trials=rows))
    else:
        for row in rows:
            words = (f"to be made again: {row.stale}",) if row.stale else ()
            click.echo(f"{row.trial}: {'; '.join((*('it went wrong',) * row.bad, *words)) or 'holds'}")
    context.exit(1 if bad else 3 if stale else 0)


def _begun(plan: cleaning.CleanPlan | killing.KillPlan, record: Path | None) -> records.Made:
    """Refuse what is wrong before anything starts."""
    if record is not None and record.exists():
        records.read(record)
    return records.begun(plan, select(plan.arguments, quick=True).cases)


def _folder() -> Path:
    return Path("runs") / f"trial-{new_run_id()}"


def _told(run: cleaning.CleanRun) -> str:
    words = ", ".join(counted(Counter(run.counts))) or "no results"
    alarms = f"; {len(run.alarms)} ALARMS" if run.alarms else ""
    reason = f"; {run.reason}" if run.reason else ""
    c = run.circumstances
    how = f"{c.threads} threads, {c.workers} processes, order {c.order}, sampling {c.sampling}"
    return f"{how}: {words} in {run.seconds:.0f} s{alarms}{reason}"


def _told_kill(kill: killing.Killed) -> str:
    lost = f", {len(kill.lost)} LOST" if kill.lost else ""
    torn = ", the last line torn" if kill.torn else ""
    return f"killed after {kill.after} more results: {kill.shown} shown, {kill.stored} stored{lost}{torn}"
