"""`conformance matrix`: the cells of CI, shown, run, measured, and written as workflows."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import click

from conformance import execute, runfile, workflows
from conformance import matrix as matrices
from conformance.commands import output
from conformance.commands.output import (
    CellRow,
    MatrixCheckOutput,
    MatrixMeasureOutput,
    MatrixRunOutput,
    MatrixShowOutput,
    RanRow,
    json_option,
)
from conformance.commands.run import matrix_option, seconds
from conformance.errors import RunFileError, UsageError
from conformance.execute import CellResult, CellRunner, Executor, LocalExecutor
from conformance.matrix import Cell, Matrix
from conformance.recording import new_run_id
from conformance.runner import DEFAULT_TIMEOUT
from conformance.targets import environments, registry
from conformance.verdicts import counted

_tier = click.option("--tier", metavar="NAME", help="Only the cells of this tier.")
_shard = click.option("--shard", metavar="K/N", help="Only job K of N that take about as long.")


@click.group("matrix")
def matrix_group() -> None:
    """Run the suites as cells of a matrix: every backend, layout and option, on every target."""


@matrix_group.command("show")
@click.argument("cells", nargs=-1, metavar="[CELL]...")
@_tier
@_shard
@matrix_option
@json_option
def show_command(
    cells: tuple[str, ...], tier: str | None, shard: str | None, matrix: Path | None, as_json: bool
) -> None:
    """Show cells, by id or pattern (default: all), and whether they can run.

    One cell is shown with its cases, and with those that are not applicable.
    """
    loaded, chosen = _select(matrix, cells, tier, shard)
    rows = tuple(_cell_row(loaded, cell) for cell in chosen)
    if as_json:
        output.emit_json(MatrixShowOutput(matrix=str(loaded.path), tier=tier, cells=rows))
        return
    screen = output.console()
    columns = ("cell", "cases", "expected", "")
    table = [(r.id, str(len(r.cases)), f"{r.seconds:.0f} s", r.note) for r in rows]
    screen.print(output.table(loaded.file.title, columns, table))
    if len(rows) == 1:
        for address in rows[0].cases:
            screen.print(address, markup=False)
        for address, reason in rows[0].left_out.items():
            screen.print(f"{address}: {reason}", markup=False, soft_wrap=True)
    able = sum(cell.may_run for cell in chosen)
    screen.print(f"{len(rows)} cells, {able} of them can run without a GPU", markup=False)


@matrix_group.command("run")
@click.argument("cells", nargs=-1, metavar="[CELL]...")
@_tier
@_shard
@matrix_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of run files.  [default: runs/matrix-<id>]"
)
@click.option("--resume", is_flag=True, help="Go on in the folder --out: what is complete there is kept.")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option(
    "-n", "workers", type=click.IntRange(min=1), default=1, show_default=True, help="Cells at a time."
)
@click.option(
    "--timeout", default=DEFAULT_TIMEOUT, show_default=True, callback=seconds, help="Seconds for one request."
)
@click.option(
    "--limit",
    default=execute.CELL_LIMIT,
    show_default=True,
    callback=seconds,
    help="Seconds for one cell.",
)
@json_option
@click.pass_context
def run_command(
    context: click.Context,
    cells: tuple[str, ...],
    tier: str | None,
    shard: str | None,
    matrix: Path | None,
    out: Path | None,
    resume: bool,
    executor: str,
    workers: int,
    timeout: float,
    limit: float,
    as_json: bool,
) -> None:
    """Run cells, by id or pattern (default: all of the tier), each in a process and a run file of its own.

    A cell that cannot run here is reported as not run, with the reason. One that did not get the backend,
    layout or option it asked for is an error.

    Exits with 1 for any failure, unexpected pass, error or timeout; else with 3 for anything inconclusive;
    else with 0. A shard that has no cells is done at once.
    """
    if resume and out is None:
        raise UsageError("--resume goes on in a folder; name it with --out")
    loaded, chosen = _select(matrix, cells, tier, shard)
    folder = out or Path("runs") / f"matrix-{new_run_id()}"
    started = time.monotonic()
    runner = CellRunner(
        loaded,
        folder,
        lambda: _executor(executor, workers),
        resume=resume,
        options=("--timeout", str(timeout)),
        limit=limit,
    )
    done: dict[str, CellResult] = {}
    screen = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # where Ray says what becomes of its workers
        for result in runner.run(chosen):
            done[result.cell] = result
            if not as_json:
                click.echo(_told(result, len(done), len(chosen)), file=screen)
    results = [done[cell.id] for cell in chosen]
    codes = [result.exit_code for result in results]
    code = next((code for code in (1, 3) if code in codes), 0)
    if as_json:
        rows = tuple(_ran_row(result) for result in results)
        answer = MatrixRunOutput(folder=str(folder), tier=tier, shard=shard, cells=rows, exit_code=code)
        output.emit_json(answer)
    else:
        tally = Counter(result.verdict for result in results)
        words = ", ".join(f"{count} {verdict}" for verdict, count in tally.most_common())
        click.echo(f"{len(results)} cells in {time.monotonic() - started:.0f} s: {words or 'none'}")
        click.echo(f"run files: {folder}")
        click.echo(f"exit code {code}")
    context.exit(code)


@matrix_group.command("install")
@click.argument("cells", nargs=-1, metavar="[CELL]...")
@_tier
@_shard
@matrix_option
def install_command(cells: tuple[str, ...], tier: str | None, shard: str | None, matrix: Path | None) -> None:
    """Install the environments of the engines that cells run in, where they are not there."""
    _, chosen = _select(matrix, cells, tier, shard)
    with_environment = {found.spec for found in environments.environments()}
    wanted = {registry.environment_of(cell.target) for cell in chosen if cell.may_run} & with_environment
    for spec in sorted(wanted):
        environments.install(spec, progress=lambda line: click.echo(line, err=True))
        click.echo(f"{spec}: installed")


@matrix_group.command("check")
@click.argument("run_files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@_tier
@matrix_option
@json_option
@click.pass_context
def check_command(
    context: click.Context,
    run_files: tuple[Path, ...],
    tier: str | None,
    matrix: Path | None,
    as_json: bool,
) -> None:
    """Check that every cell (of the tier) came to its end in one of these run files, or folders of them.

    Exits with 1 if one did not: a job that was lost must not look like one that found nothing.
    """
    _, wanted = _select(matrix, (), tier, None)
    ended: set[str] = set()
    for path in runfile.files(run_files):
        try:
            run = runfile.read(path)
        except RunFileError as error:
            click.echo(f"note: {error}", err=True)  # its cell is among those that are missing
            continue
        if run.header.cell is not None and run.footer is not None:
            ended.add(run.header.cell.id)
    missing = tuple(cell.id for cell in wanted if cell.id not in ended)
    if as_json:
        output.emit_json(MatrixCheckOutput(cells=len(wanted), missing=missing))
    else:
        for cell_id in missing:
            click.echo(f"{cell_id}: has no complete run")
        click.echo(f"{len(wanted) - len(missing)} of {len(wanted)} cells came to their end")
    context.exit(1 if missing else 0)


@matrix_group.command("render")
@click.argument("system", type=click.Choice(get_args(workflows.System)))
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: that of the matrix file]")
@matrix_option
def render_command(system: workflows.System, out: Path | None, matrix: Path | None) -> None:
    """Write the workflows of a CI system: one for each tier."""
    loaded = matrices.load(matrix)
    for name, text in workflows.render(system, loaded.file).items():
        path = (loaded.path.parent if out is None else out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        click.echo(str(path))


@matrix_group.command("measure")
@click.argument("run_files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@matrix_option
@json_option
def measure_command(run_files: tuple[Path, ...], matrix: Path | None, as_json: bool) -> None:
    """Write down how long cells took, from their run files: shards are made with it.

    It is kept in `durations.json` beside the matrix. Cells that did not run are left out.
    """
    loaded = matrices.load(matrix)
    results = [execute.summarise(runfile.read(path), path) for path in runfile.files(run_files)]
    measured = {result.cell: result.seconds for result in results if result.verdict != "not run"}
    path = matrices.write_durations(loaded, measured)
    if as_json:
        output.emit_json(MatrixMeasureOutput(file=str(path), cells=measured))
    else:
        click.echo(f"{path}: {len(measured)} cells measured")


def _executor(name: str, workers: int) -> Executor:
    if name == "ray":
        from conformance.ray_executor import RayExecutor  # it starts a cluster, and need not be installed

        return RayExecutor(workers)
    return LocalExecutor(workers)


def _select(
    path: Path | None, names: tuple[str, ...], tier: str | None, shard: str | None
) -> tuple[Matrix, tuple[Cell, ...]]:
    loaded = matrices.load(path)
    chosen = loaded.select(names, tier)
    if shard is None:
        return loaded, chosen
    number, slash, count = shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard {shard}: write it as 1/4")
    measured = matrices.durations(loaded)
    return loaded, matrices.shard(chosen, measured, int(number), int(count), _installs(chosen))


def _installs(cells: tuple[Cell, ...]) -> dict[str, float]:
    """Seconds that the installation of a target took where its environment was locked."""
    known = {found.spec: float(found.lock.seconds) for found in environments.environments()}
    wanted = {cell.target: registry.environment_of(cell.target) for cell in cells}
    return {target: known[spec] for target, spec in wanted.items() if spec in known}


def _cell_row(loaded: Matrix, cell: Cell) -> CellRow:
    known = matrices.durations(loaded)
    return CellRow(
        id=cell.id,
        axes=dict(cell.labels),
        settings=cell.settings.imposed,
        cases=tuple(case.address for case in loaded.placed(cell)),
        left_out=loaded.left_out(cell),
        needs=cell.needs,
        lacks=cell.lacks,
        note=_note(cell),
        seconds=matrices.expected_seconds(cell, loaded.cells, known),
    )


def _note(cell: Cell) -> str:
    if cell.needs:
        return "needs " + ", ".join(need.upper() for need in cell.needs)
    return f"{cell.target} cannot generate with {', '.join(cell.lacks)}" if cell.lacks else ""


def _ran_row(result: CellResult) -> RanRow:
    return RanRow(
        id=result.cell,
        verdict=result.verdict,
        reason=result.reason,
        counts=result.counts,
        seconds=round(result.seconds, 3),
        run_file=str(result.run_file),
        attempts=result.attempts,
    )


def _told(result: CellResult, number: int, total: int) -> str:
    cases = ", ".join(counted(Counter(result.counts)))
    why = f": {result.reason}" if result.reason else ""
    why += f"; attempt {result.attempts}, its worker had died" if result.attempts > 1 else ""
    return f"[{number}/{total}] {result.cell}: {result.verdict} ({cases}, {result.seconds:.0f} s){why}"
