"""`conformance store`: the history of runs, in a database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from conformance import runfile
from conformance.commands import output
from conformance.commands.output import (
    MergedRow,
    StoreCompareOutput,
    StoreHistoryOutput,
    StoreListOutput,
    StoreMergeOutput,
    StoreShowOutput,
    json_option,
)
from conformance.errors import ConformanceError, UsageError
from conformance.scoring import OUTCOMES
from conformance.store import StoredRun, StorePoint
from conformance.verdicts import counted

Command = Callable[..., object]
_WHERE = "`conformance store list --latest` names the cases that it has"


def database_option(text: str) -> Callable[[Command], Command]:
    """The option `--database`.

    Args:
        text: What it is for, and what happens without it.
    """
    return click.option(
        "--database", metavar="URL", envvar="CONFORMANCE_DATABASE", show_envvar=True, help=text
    )


_database = database_option(
    "Such as sqlite:///history.sqlite or postgresql+psycopg://user@host/name.  "
    "[default: a file in the user's data folder]"
)


@click.group("store")
def store_group() -> None:
    """Keep the history of runs in a database, and ask it."""


@store_group.command("merge")
@click.argument("run_files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@_database
@json_option
@click.pass_context
def merge_command(
    context: click.Context, run_files: tuple[Path, ...], database: str | None, as_json: bool
) -> None:
    """Merge run files into the database, which is made if it is not there.

    A file may be merged again: nothing changes, unless it has grown. What can be merged is merged; exits
    with 2 if some file could not be.
    """
    from conformance.store.history import Store

    rows = []
    with Store(database, create=True) as store:
        for path in run_files:
            try:
                rows.append(MergedRow(run_file=str(path), merged=store.merge_file(path)))
            except ConformanceError as error:
                rows.append(MergedRow(run_file=str(path), error=str(error)))
            if not as_json:
                _tell(rows[-1])
        name = store.name
    if as_json:
        output.emit_json(StoreMergeOutput(database=name, files=tuple(rows)))
    else:
        click.echo(f"database: {name}")
    context.exit(2 if any(row.error for row in rows) else 0)


def _tell(row: MergedRow) -> None:
    merged = row.merged
    if merged is None:
        click.echo(f"error: {row.error}", err=True)
        return
    if merged.torn:
        click.echo(f"note: {row.run_file}: {merged.torn}", err=True)
    what = (
        f"{merged.added} results added, {merged.updated} updated, {merged.unchanged} unchanged"
        if merged.changed
        else "nothing new"
    )
    click.echo(f"{row.run_file}: run {merged.run_id}: {what}")


@store_group.command("compare")
@click.argument("run_files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@_database
@json_option
@click.pass_context
def compare_command(
    context: click.Context, run_files: tuple[Path, ...], database: str | None, as_json: bool
) -> None:
    """Say what broke in run files, and since when, beside what the database has of before they began.

    The files are of one night or one job, with all its cells; whether they are merged already does not
    matter. What can be read is compared; exits with 2 if some file could not be, else with 0, whatever broke.
    """
    from conformance.comparison import compare
    from conformance.nightly.text import told_of_changes
    from conformance.store.history import Store

    runs, unread = [], False
    for path in run_files:
        try:
            runs.append(runfile.read(path))
        except ConformanceError as error:
            unread = True
            click.echo(f"error: {error}", err=True)
    with Store(database) as store:
        found = compare(store, runs)
    text = told_of_changes(found)
    if as_json:
        output.emit_json(StoreCompareOutput(comparison=found, text=text))
    else:
        click.echo(text, nl=False)
    context.exit(2 if unread else 0)


@store_group.command("remove")
@click.argument("run_ids", nargs=-1, required=True, metavar="RUN...")
@_database
def remove_command(run_ids: tuple[str, ...], database: str | None) -> None:
    """Remove runs, by their ids, with all their results.

    Merging their run files brings them back.
    """
    from conformance.store.history import Store

    with Store(database) as store:
        for run_id in run_ids:
            store.remove(run_id)
            click.echo(f"run {run_id}: removed")


@store_group.command("list")
@click.option("--latest", is_flag=True, help="List the newest result of each case on each target instead.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many runs.")
@_database
@json_option
def list_runs_command(latest: bool, limit: int | None, database: str | None, as_json: bool) -> None:
    """List the runs, newest first."""
    from conformance.store.history import Store

    if latest and limit is not None:
        raise UsageError("--limit is a number of runs; leave it out with --latest")
    with Store(database) as store:
        if latest:
            newest = store.latest()
        else:
            runs = store.runs(limit=limit)
    if as_json:
        output.emit_json(
            StoreListOutput(latest=tuple(newest)) if latest else StoreListOutput(runs=tuple(runs))
        )
        return
    if latest:
        judged = [(f"{v.suite}::{v.case}", v.cell or v.target, str(v.verdict), v.run_id) for v in newest]
        shown = output.table("newest results", ("case", "target or cell", "verdict", "run"), judged)
    else:
        rows = [(r.run_id, r.started[:19], r.commit or "", r.cell or "", _how(r)) for r in runs]
        shown = output.table("runs", ("run", "started (UTC)", "commit", "cell", "results"), rows)
    output.console().print(shown)


def _how(run: StoredRun) -> str:
    missing = run.planned - sum(run.counts.values())
    words = counted(Counter(run.counts)) + ([f"{missing} not run"] if missing > 0 else [])
    return ", ".join([*words, *([] if run.finished is not None else ["not finished"])])


@store_group.command("show")
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option(
    "--since", metavar="RUN", help="Run to compare with.  [default: the one before of the same cell]"
)
@_database
@json_option
def show_run_command(run_id: str | None, since: str | None, database: str | None, as_json: bool) -> None:
    """Show RUN, by its id (default: the newest), and the verdicts that changed since another run."""
    from conformance.store.history import Store

    with Store(database) as store:
        runs = store.runs()
        found = _find(runs, run_id, store.name)
        earlier = [run for run in runs[runs.index(found) + 1 :] if run.cell == found.cell]
        before = _find(runs, since, store.name) if since is not None else next(iter(earlier), None)
        changes = store.changes(before.run_id, found.run_id) if before is not None else []
    if as_json:
        name = before.run_id if before is not None else None
        output.emit_json(StoreShowOutput(run=found, since=name, changes=tuple(changes)))
        return
    click.echo(f"run {found.run_id}, started {found.started[:19]} UTC, harness {found.harness}")
    click.echo(f"commit {found.commit or 'unknown'}; exit code {found.exit_code}")
    if found.cell is not None:
        click.echo(f"cell {found.cell}")
    click.echo(_how(found) or "no results")
    if before is None:
        click.echo("there is no earlier run to compare with")
        return
    rows = [
        (
            f"{change.suite}::{change.case}",
            change.target,
            change.before or "no result",
            change.after or "no result",
            "the case was edited" if change.edited else "",
        )
        for change in changes
    ]
    words = "verdict differs" if len(rows) == 1 else "verdicts differ"
    click.echo(f"{len(rows)} {words} from run {before.run_id}")
    if rows:
        output.console().print(output.table("", ("case", "target", "before", "after", ""), rows))


def _find(runs: Sequence[StoredRun], run_id: str | None, name: str) -> StoredRun:
    found = next((run for run in runs if run_id in (None, run.run_id)), None)
    if found is None:
        what = "no runs" if run_id is None else f"no run {run_id}; `conformance store list` names them"
        raise UsageError(f"{name} holds {what}")
    return found


@store_group.command("history")
@click.argument("case")
@click.option("--target", "-t", metavar="SPEC", help="Only this target.")
@click.option("--cell", metavar="ID", help="Only this cell of the matrix; '' for what ran outside it.")
@_database
@json_option
def history_command(
    case: str, target: str | None, cell: str | None, database: str | None, as_json: bool
) -> None:
    """Show how CASE, named `suite-id::case-id`, was judged over time: verdicts, and scores if it has any."""
    from conformance.store.history import Store

    suite, separator, name = case.partition("::")
    if not separator or not suite or not name:
        raise UsageError(
            f"{case}: name a case as suite-id::case-id; `conformance store list --latest` has them"
        )
    with Store(database) as store:
        points, _ = store.points(suite, name, target, cell)
        where = store.name
    if not points:
        on = f" on {target}" if target is not None else ""
        raise UsageError(
            f"{where} holds no result of {case}{on}; `conformance store list --latest` names them"
        )
    if as_json:
        output.emit_json(StoreHistoryOutput(address=case, points=tuple(points)))
        return
    rows = [
        (
            p.verdict.started[:19],
            p.verdict.cell or p.verdict.target,
            p.verdict.verdict,
            _score(p),
            _classes(p.outcomes),
        )
        for p in points
    ]
    columns = ("started (UTC)", "target or cell", "verdict", "score", "outcomes")
    output.console().print(output.table(case, columns, rows))


def _score(point: StorePoint) -> str:
    if point.decision is None:
        return ""
    rate = point.decision.score
    low, high = (f"{100 * limit:.1f}" for limit in (rate.interval.low, rate.interval.high))
    return f"{100 * rate.share:.1f} % ({low} to {high})"


def _classes(outcomes: dict[str, int]) -> str:
    return ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES if name in outcomes)
