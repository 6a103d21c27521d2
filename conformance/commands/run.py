"""`conformance run`: select, run through pytest, summarise."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import expectations, resources, results, runfile
from conformance.commands import output
from conformance.commands.output import AreaCounts, ProblemRow, RunOutput, json_option
from conformance.commands.report import DEFAULT_SITE
from conformance.commands.selection import select
from conformance.errors import UsageError
from conformance.loading import LoadedSuites, load_suites
from conformance.progress import BAD, SHORT, ProgressPlugin, verdict_counts
from conformance.recording import new_run_id
from conformance.results import Result, Run
from conformance.runner import DEFAULT_TIMEOUT
from conformance.session import select_targets

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


@click.command("run")
@click.argument("cases", nargs=-1)
@click.option("--target", "-t", "targets", multiple=True, metavar="SPEC", help="Target; may be repeated.")
@click.option("-n", "workers", default="0", show_default=True, help="Worker processes, or `auto`.")
@click.option("--resume", type=click.Path(path_type=Path), help="Go on with this run file.")
@click.option("--out", type=click.Path(path_type=Path), help="Run file to write.  [default: runs/<id>.jsonl]")
@click.option("--report/--no-report", default=True, help="Write the dashboard.  [default: --report]")
@click.option("--site", type=click.Path(path_type=Path), default=DEFAULT_SITE, show_default=True)
@click.option("--timeout", default=DEFAULT_TIMEOUT, show_default=True, help="Seconds for one request.")
@click.option("--exitfirst", "-x", is_flag=True, help="Stop at the first failure.")
@click.option("--verbose", "-v", is_flag=True, help="Show every result, not only failures.")
@json_option
@click.pass_context
def run_command(
    context: click.Context,
    cases: tuple[str, ...],
    targets: tuple[str, ...],
    workers: str,
    resume: Path | None,
    out: Path | None,
    report: bool,
    site: Path,
    timeout: float,
    exitfirst: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run CASES (paths, suite ids, `suite-id::case-id`, or patterns; default: all bundled suites).

    Exits with 1 for any failure, unexpected pass, error or timeout; else with 3 for anything
    inconclusive; else with 0. Wrong use, or nothing to run, exits with 2.
    """
    if resume is not None and out is not None:
        raise UsageError("--resume appends to the run it names; leave out --out")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists; go on with it by --resume {out}, or name another file")
    if resume is not None and not cases and not targets:
        cases, targets = _of_manifest(runfile.read(resume))
    selected = select(cases)
    select_targets(targets)  # both refuse what is wrong before anything starts
    known = expectations.load(load_suites(sorted({suite.root for suite in selected.suites})))
    for note in known.overdue():
        click.echo(f"warning: {note}", err=True)
    path = resume or out or Path("runs") / f"{new_run_id()}.jsonl"
    arguments = [
        *_ISOLATION,
        *("-c", os.devnull, "--rootdir", str(_root(selected.suites))),
        *(part for target in targets for part in ("--target", target)),
        *("--resume" if resume is not None else "--conformance-run", str(path)),
        *("--conformance-timeout", str(timeout)),
        *(("-n", workers) if workers != "0" else ()),
        *(("-x",) if exitfirst else ()),
        *selected.pytest_arguments(),
    ]
    code = _run_pytest(arguments, verbose=verbose)
    if not path.exists():
        context.exit(code)
    run = runfile.read(path)
    index = None
    if report:
        from conformance.report import write_site

        write_site(run, site, suites=selected.suites)
        index = site / "index.html"
    summary = summarise(run, path, index, code)
    if as_json:
        output.emit_json(summary)
    else:
        _print(summary)
    context.exit(code)


def summarise(run: Run, path: Path, index: Path | None, exit_code: int) -> RunOutput:
    """What `--json` prints, and the table is made from."""
    latest = run.latest()
    counts: dict[tuple[str, str], Counter[results.Verdict]] = {}
    for result in latest.values():
        counts.setdefault((result.target, result.area), Counter())[result.verdict] += 1
    planned = {(p.suite, p.case, p.target) for p in run.header.manifest}
    return RunOutput(
        run_file=str(path),
        site=str(index) if index is not None else None,
        exit_code=exit_code,
        complete=planned <= set(latest),
        planned=len(planned),
        areas=tuple(
            AreaCounts(target=target, area=area, counts=dict(counts[target, area]))
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


def _of_manifest(run: Run) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cases and targets that a run set out to do."""
    manifest = run.header.manifest
    bundled = resources.suites_dir()
    known = {suite.suite.id for suite in load_suites([bundled])}
    foreign = sorted({entry.suite for entry in manifest} - known)
    if foreign:
        raise UsageError(
            f"{foreign[0]} is none of the bundled suites; name the suites' path to resume the run"
        )
    cases = dict.fromkeys(f"{entry.suite}::{entry.case}" for entry in manifest)
    targets = dict.fromkeys(entry.target for entry in manifest if entry.target not in run.header.unavailable)
    return tuple(cases), tuple(targets)


def _root(suites: LoadedSuites) -> Path:
    return Path(os.path.commonpath([str(suite.root) for suite in suites]))


def _run_pytest(arguments: list[str], *, verbose: bool) -> int:
    # pytest redirects descriptor 2 while tests run; the live display needs one of its own.
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as screen:
        console = Console(file=screen, highlight=False, markup=False)
        progress = ProgressPlugin(console, verbose=verbose)
        with _without_user_settings():
            code = int(pytest.main(arguments, plugins=[progress]))
        for error in progress.errors:
            console.print(error, soft_wrap=True)
        if code == int(pytest.ExitCode.INTERRUPTED) and not progress.errors:
            console.print("interrupted; go on with `conformance run --resume`")
    return 2 if code in _WRONG_USE else code


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


def _print(summary: RunOutput) -> None:
    screen = output.console()
    targets = list(dict.fromkeys(row.target for row in summary.areas))
    areas = list(dict.fromkeys(row.area for row in summary.areas))
    cells = {(row.target, row.area): Counter(row.counts) for row in summary.areas}
    table = Table(title="targets x areas", title_justify="left", title_style="bold")
    table.add_column("area")
    for target in targets:
        table.add_column(escape(target), overflow="fold")
    for area in areas:
        table.add_row(
            area,
            *(verdict_counts(cells[t, area]) if (t, area) in cells else "not planned" for t in targets),
        )
    totals = {t: sum((cells[t, a] for a in areas if (t, a) in cells), Counter()) for t in targets}
    table.add_section()
    table.add_row("all", *(verdict_counts(totals[target]) for target in targets))
    screen.print(table)
    for spec, reason in summary.unavailable.items():
        screen.print(f"{spec} did not run: {reason}", markup=False, soft_wrap=True)
    if not summary.complete:
        screen.print(
            f"The run is not complete; go on with: conformance run --resume {summary.run_file}", markup=False
        )
    screen.print(f"run file: {summary.run_file}", markup=False, soft_wrap=True)
    if summary.site is not None:
        screen.print(f"dashboard: {summary.site}", markup=False, soft_wrap=True)
    screen.print(_verdict_line(summary), markup=False)


def _verdict_line(summary: RunOutput) -> str:
    total = sum((Counter(row.counts) for row in summary.areas), Counter())
    words = ", ".join(f"{total[verdict]} {word}" for verdict, (word, _) in SHORT.items() if total[verdict])
    return f"exit code {summary.exit_code}: {words or 'nothing ran'}"
