"""`conformance run`: select, run through pytest, summarise."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import expectations, placing, resources, results, runfile
from conformance import matrix as matrices
from conformance.commands import output
from conformance.commands.output import AreaCounts, ProblemRow, RunOutput, json_option
from conformance.commands.report import DEFAULT_SITE
from conformance.commands.selection import Selected, select
from conformance.errors import UsageError
from conformance.loading import LoadedSuites, load_suite
from conformance.progress import ProgressPlugin
from conformance.recording import new_run_id
from conformance.results import Preflight, Result, Run
from conformance.runner import DEFAULT_TIMEOUT
from conformance.session import select_cell, select_targets
from conformance.targets import registry
from conformance.verdicts import BAD, counted, verdict_counts

_ISOLATION = (
    "--noconftest",
    "--disable-warnings",
    # Our entry point may be absent (a plain folder on the path), so the plugin is named by module.
    *("-p", "no:conformance", "-p", "conformance.plugin", "-p", "xdist.plugin"),
    *("-p", "no:terminalreporter", "-p", "no:cacheprovider"),
)
"""The run depends on the suites and the targets, not on pytest's settings in the folder."""

_PYTEST_VARIABLES = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")
_WRONG_USE = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)


matrix_option = click.option(
    "--matrix", type=click.Path(path_type=Path), help="Matrix file.  [default: the bundled ci/matrix.yaml]"
)


def _workers(_context: click.Context, _option: click.Parameter, value: str) -> str:
    if value == "auto" or (value.isascii() and value.isdigit()):
        return str(int(value)) if value != "auto" else value
    raise click.BadParameter("expected a number of processes, 0 or more, or `auto`")


def seconds(_context: click.Context, _option: click.Parameter, value: float) -> float:
    """Check an option that takes seconds."""
    if 0 < value < math.inf:
        return value
    raise click.BadParameter("expected a number of seconds above 0")


@click.command("run")
@click.argument("cases", nargs=-1)
@click.option("--target", "-t", "targets", multiple=True, metavar="SPEC", help="Target; may be repeated.")
@click.option(
    "-n", "workers", default="0", show_default=True, callback=_workers, help="Worker processes, or `auto`."
)
@click.option("--cell", metavar="ID", help="Run as this cell of the matrix: its target, settings and cases.")
@matrix_option
@click.option("--quick", is_flag=True, help="Leave out the cases that are tagged `slow`.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this run file.")
@click.option("--out", type=click.Path(path_type=Path), help="Run file to write.  [default: runs/<id>.jsonl]")
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Write the target's answers to this new file, for --target replay@FILE.",
)
@click.option("--report/--no-report", default=True, help="Write the dashboard.  [default: --report]")
@click.option("--site", type=click.Path(path_type=Path), default=DEFAULT_SITE, show_default=True)
@click.option(
    "--timeout",
    default=DEFAULT_TIMEOUT,
    show_default=True,
    callback=seconds,
    help="Seconds for one request.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of sampled stream chunkings and drawn answers.",
)
@click.option("--shuffle", type=click.IntRange(min=0), metavar="SEED", help="In an order drawn from it.")
@click.option("--exitfirst", "-x", is_flag=True, help="Stop at the first failure.")
@click.option("--verbose", "-v", is_flag=True, help="Show every result, not only failures.")
@json_option
@click.pass_context
def run_command(
    context: click.Context,
    cases: tuple[str, ...],
    targets: tuple[str, ...],
    workers: str,
    cell: str | None,
    matrix: Path | None,
    quick: bool,
    resume: Path | None,
    out: Path | None,
    record: Path | None,
    report: bool,
    site: Path,
    timeout: float,
    seed: int,
    shuffle: int | None,
    exitfirst: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run CASES (paths, suite ids, `suite-id::case-id`, or patterns; default: all bundled suites).

    Exits with 1 for any failure, unexpected pass, error or timeout; else with 3 for anything
    inconclusive, or planned and not run; else with 0. Wrong use, or nothing to run, exits with 2.

    With --resume, CASES and targets are by default those of the run that is resumed, and the exit code and
    the summary are those of the whole run.
    """
    if resume is not None and out is not None:
        raise UsageError("--resume appends to the run it names; leave out --out")
    if record is not None:
        _check_record(record, targets, workers, resume)
    path = resume or out or Path("runs") / f"{new_run_id()}.jsonl"
    if resume is None:
        runfile.check_new(path)
    else:
        earlier = runfile.read(resume)
        cell = _cell_of(earlier, resume, cell)
        cases = cases or _cases_of(earlier, resume)
        targets = targets or (_targets_of(earlier) if cell is None else ())
    if report:
        from conformance.report import check_site, write_site

        check_site(site)
    selected = select(cases, quick=quick) if cell is None else _of_cell(cell, matrix, cases, targets, quick)
    if cell is None:
        select_targets(targets)  # all refuse what is wrong before anything starts
    known = expectations.beside(selected.suites)
    for note in known.overdue():
        click.echo(f"warning: {note}", err=True)
    options = [
        *(("-n", workers) if workers != "0" else ()),
        *(("-x",) if exitfirst else ()),
        *(("--conformance-seed", str(seed)) if seed else ()),
        *(("--conformance-shuffle", str(shuffle)) if shuffle is not None else ()),
        *(("--conformance-record", str(record)) if record is not None else ()),
        *(("--conformance-cell", cell) if cell is not None else ()),
        *(("--conformance-matrix", str(matrix)) if matrix is not None else ()),
    ]
    code = execute(
        selected, targets, path, timeout=timeout, resume=resume is not None, options=options, verbose=verbose
    )
    if not path.exists():
        context.exit(code)
    run = runfile.read(path)
    summary = summarise(run, path, code)
    if not as_json:  # the site may fail, or take long
        print_summary(summary)
    try:
        if report:
            write_site(run, site, suites=selected.suites)
            summary = summary.model_copy(update={"site": str(site / "index.html")})
    finally:
        if as_json:
            output.emit_json(summary)
    if summary.site is not None and not as_json:
        output.console().print(f"dashboard: {summary.site}", markup=False, soft_wrap=True)
    context.exit(code)


def _cell_of(run: Run, path: Path, cell: str | None) -> str | None:
    """The cell of a run that is resumed.

    Raises:
        UsageError: another one was asked for.
    """
    own = run.header.cell.id if run.header.cell is not None else None
    if cell not in (None, own):
        what = f"of the cell {own}" if own is not None else "of no cell"
        raise UsageError(f"{path} is a run {what}; leave out --cell to go on with it")
    return own


def _of_cell(
    name: str, path: Path | None, cases: Sequence[str], targets: Sequence[str], quick: bool
) -> Selected:
    """The cases of a cell, or those of them that were named.

    Raises:
        UsageError: no such cell, or none of the cases takes its settings.
    """
    loaded = matrices.load(path)
    cell = loaded.cell(name)
    select_cell(cell, targets)
    selected = select(cases or cell.cases, quick=quick)
    placed = [placing.place(case, cell.settings, cell.id) for case in selected.cases]
    kept = tuple(c for c, p in zip(selected.cases, placed, strict=True) if not isinstance(p, str))
    if not kept:
        raise UsageError(f"no case that was named can be run in the cell {name}: {placed[0]}")
    return Selected(selected.suites, kept)


def _check_record(record: Path, targets: Sequence[str], workers: str, resume: Path | None) -> None:
    """Refuse what cannot be recorded.

    Raises:
        UsageError: not one target, several processes, a run that goes on, or a file that exists.
    """
    if len(set(targets)) != 1:
        raise UsageError("--record writes the answers of one target; name it with --target")
    if workers != "0":
        raise UsageError("--record works in one process; leave out -n")
    if resume is not None:
        raise UsageError("--record wants all answers, and --resume asks for few; leave out one of them")
    if record.exists():
        raise UsageError(f"{record} exists; name a new file for the recording")
    runfile.check_parent(record)


def execute(
    selected: Selected,
    targets: Sequence[str],
    path: Path,
    *,
    timeout: float,
    resume: bool = False,
    options: Sequence[str] = (),
    verbose: bool = False,
    preflight: tuple[Preflight, ...] = (),
) -> int:
    """Run cases through pytest, write the run file, and return the exit code."""
    arguments = [
        *_ISOLATION,
        *("-c", os.devnull, "--rootdir", str(_root(selected.suites))),
        *(part for target in targets for part in ("--target", target)),
        *("--resume" if resume else "--conformance-run", str(path)),
        *("--conformance-timeout", str(timeout)),
        *options,
        *selected.pytest_arguments(),
    ]
    known = len(selected.cases) == 1
    return _run_pytest(arguments, path, verbose=verbose, explain_known=known, preflight=preflight)


def summarise(run: Run, path: Path, exit_code: int) -> RunOutput:
    """What `--json` prints, and the table is made from. The manifest decides on rows and columns."""
    latest = run.latest()
    counts: dict[tuple[str, str], Counter[results.Verdict]] = {}
    not_run: Counter[tuple[str, str]] = Counter()
    for entry in run.header.manifest:
        counts.setdefault((entry.target, entry.area), Counter())
        not_run[entry.target, entry.area] += (entry.suite, entry.case, entry.target) not in latest
    for result in latest.values():
        counts.setdefault((result.target, result.area), Counter())[result.verdict] += 1
    return RunOutput(
        run_file=str(path),
        site=None,
        exit_code=exit_code,
        complete=run.footer is not None,
        planned=len(run.header.manifest),
        areas=tuple(
            AreaCounts(
                target=target,
                area=area,
                counts=dict(counts[target, area]),
                not_run=not_run[target, area],
            )
            for target, area in sorted(counts)
        ),
        problems=tuple(
            _problem(r) for r in latest.values() if r.verdict in BAD or r.verdict == "inconclusive"
        ),
        unavailable=run.header.unavailable,
    )


def _problem(result: Result) -> ProblemRow:
    return ProblemRow(
        address=f"{result.suite}::{result.case}",
        target=result.target,
        verdict=result.verdict,
        reason=result.reason,
        rules=tuple(dict.fromkeys(problem.rule for problem in result.problems)),
        repeat=result.repeat,
    )


def _cases_of(run: Run, path: Path) -> tuple[str, ...]:
    """The cases that a run set out to do, as arguments that name them.

    Raises:
        UsageError: a suite's file is gone, or is not the one that ran.
    """
    advice = f"name the cases to go on with: `conformance run CASES --resume {path}`"
    files: dict[str, Path] = {}
    for suite_id, digest in run.header.suites.items():
        stored = run.header.paths.get(suite_id)
        if stored is None:
            file = resources.suites_dir() / f"{suite_id}.yaml"
        else:
            file = (path.parent.resolve() / stored).resolve()
        if not file.is_file():
            raise UsageError(f"{path}: the suite {suite_id} was read from {file}, which is gone; {advice}")
        if load_suite(file).digest != digest:
            raise UsageError(f"{path}: the suite {suite_id} ({file}) has changed since the run; {advice}")
        files[suite_id] = file
    return tuple(dict.fromkeys(f"{files[entry.suite]}::{entry.case}" for entry in run.header.manifest))


def _targets_of(run: Run) -> tuple[str, ...]:
    """The targets of a run, less those that could not be used then and cannot be used now."""
    specs = dict.fromkeys(entry.target for entry in run.header.manifest)
    return tuple(
        spec for spec in specs if spec not in run.header.unavailable or not registry.unavailable(spec)
    )


def _root(suites: LoadedSuites) -> Path:
    return Path(os.path.commonpath([str(suite.root) for suite in suites]))


def _run_pytest(arguments: list[str], path: Path, **shown: Any) -> int:
    # pytest redirects descriptor 2 while tests run; the live display needs one of its own.
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as screen:
        console = Console(file=screen, highlight=False, markup=False)
        progress = ProgressPlugin(console, **shown)
        with _without_user_settings():
            code = int(pytest.main(arguments, plugins=[progress]))
        for error in progress.errors:
            console.print(error, soft_wrap=True)
        if progress.interrupted:
            again = f"; go on with: {_resume_line(path)}" if path.exists() else ""
            console.print(f"interrupted{again}", soft_wrap=True)
    return 2 if code in _WRONG_USE else code


def _resume_line(path: Path) -> str:
    return f"conformance run --resume {shlex.quote(str(path))}"


@contextlib.contextmanager
def _without_user_settings() -> Iterator[None]:
    """Keep plugins and options that the user has for other projects out of pytest."""
    saved = {name: os.environ.pop(name, None) for name in _PYTEST_VARIABLES}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def print_summary(summary: RunOutput) -> None:
    """The table of a run and where its file lies, for people."""
    screen = output.console()
    targets = list(dict.fromkeys(row.target for row in summary.areas))
    areas = list(dict.fromkeys(row.area for row in summary.areas))
    cells = {(row.target, row.area): Counter(row.counts) for row in summary.areas}
    not_run = {(row.target, row.area): row.not_run for row in summary.areas}
    table = Table(title="targets x areas", title_justify="left", title_style="bold")
    table.add_column("area")
    for target in targets:
        table.add_column(escape(target), overflow="fold")
    for area in areas:
        table.add_row(
            area,
            *(
                verdict_counts(cells[t, area], not_run[t, area]) if (t, area) in cells else "not planned"
                for t in targets
            ),
        )
    totals = {t: sum((cells[t, a] for a in areas if (t, a) in cells), Counter()) for t in targets}
    table.add_section()
    table.add_row(
        "all",
        *(verdict_counts(totals[t], sum(not_run[t, a] for a in areas if (t, a) in cells)) for t in targets),
    )
    screen.print(table)
    for spec, reason in summary.unavailable.items():
        screen.print(f"{spec} did not run: {reason}", markup=False, soft_wrap=True)
    if not summary.complete:
        again = _resume_line(Path(summary.run_file))
        screen.print(f"The run is not complete; go on with: {again}", markup=False, soft_wrap=True)
    screen.print(f"run file: {summary.run_file}", markup=False, soft_wrap=True)
    screen.print(_verdict_line(summary), markup=False)


def _verdict_line(summary: RunOutput) -> str:
    total = sum((Counter(row.counts) for row in summary.areas), Counter())
    not_run = sum(row.not_run for row in summary.areas)
    words = counted(total) + ([f"{not_run} not run"] if not_run else [])
    return f"exit code {summary.exit_code}: {', '.join(words) or 'nothing ran'}"
