"""`conformance probe`: the verdict on a live server, area by area."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from conformance import runfile
from conformance.commands import output
from conformance.commands.output import (
    AreaVerdict,
    ProbeOutput,
    RunOutput,
    json_option,
)
from conformance.commands.report import DEFAULT_SITE
from conformance.commands.run import execute, print_summary, seconds, summarise
from conformance.commands.selection import Selected, select
from conformance.errors import UsageError
from conformance.loading import load_suites
from conformance.recording import new_run_id
from conformance.results import Preflight
from conformance.targets.endpoint import KEY_SETTING, KEY_VARIABLE, Endpoint, checked_endpoint, key_of
from conformance.targets.protocol import ServeAnswer, ServeRequest
from conformance.verdicts import BAD, verdict_counts

_HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 8}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_time", "description": "The time.", "parameters": {"type": "object"}},
}
_REFUSED = (401, 403)


@click.command("probe")
@click.argument("url")
@click.option("--model", required=True, help="Name under which the server serves the model.")
@click.option(
    "--key-variable",
    metavar="NAME",
    help=f"Environment variable that holds the key.  [default: {KEY_VARIABLE}, if it is set]",
)
@click.option("--suites", "cases", multiple=True, help="Cases to run.  [default: all of kind `server`]")
@click.option(
    "--timeout", default=120.0, show_default=True, callback=seconds, help="Seconds for one request."
)
@click.option("--out", type=click.Path(path_type=Path), help="Run file to write.  [default: runs/<id>.jsonl]")
@click.option("--report/--no-report", default=True, help="Write the dashboard.  [default: --report]")
@click.option("--site", type=click.Path(path_type=Path), default=DEFAULT_SITE, show_default=True)
@click.option("--verbose", "-v", is_flag=True, help="Show every result, not only failures.")
@json_option
@click.pass_context
def probe_command(
    context: click.Context,
    url: str,
    model: str,
    key_variable: str | None,
    cases: tuple[str, ...],
    timeout: float,
    out: Path | None,
    report: bool,
    site: Path,
    verbose: bool,
    as_json: bool,
) -> None:
    """Judge the server at URL (up to its version: http://127.0.0.1:8000/v1).

    First three cheap questions: is the model listed, does a chat work, are tools accepted. Then the suites.

    Exits with 2 if the server cannot be reached or does not know the model or the key; else with 1 for any
    failure, error or timeout; else with 3 for anything inconclusive; else with 0.
    """
    where = checked_endpoint(url, model)
    path = out or Path("runs") / f"{new_run_id()}.jsonl"
    runfile.check_new(path)
    if report:
        from conformance.report import check_site, write_site

        check_site(site)
    selected = _server_cases(cases)
    key_of(key_variable)  # wrong use shows before anything is sent
    context.with_resource(_key_variable(key_variable))
    rows = tuple(_preflight(where, timeout))
    if not as_json:
        _print_preflight(rows)
    answer = ProbeOutput(url=where.url, model=model, preflight=rows, areas=(), exit_code=1, run=None)
    if not rows[1].ok:
        if as_json:
            output.emit_json(answer)
        context.exit(answer.exit_code)
    code = execute(selected, [where.spec], path, timeout=timeout, verbose=verbose, preflight=rows)
    if not path.exists():
        context.exit(code)
    run = runfile.read(path)
    summary = summarise(run, path, code)
    areas = tuple(_area_verdicts(summary))
    if not as_json:  # the site may fail, or take long
        print_summary(summary)
        _print_areas(areas)
    try:
        if report:
            write_site(run, site, suites=selected.suites)
            summary = summary.model_copy(update={"site": str(site / "index.html")})
    finally:
        if as_json:
            found = {"areas": areas, "exit_code": code, "run": summary}
            output.emit_json(answer.model_copy(update=found))
    if summary.site is not None and not as_json:
        output.console().print(f"dashboard: {summary.site}", markup=False, soft_wrap=True)
    context.exit(code)


@contextlib.contextmanager
def _key_variable(name: str | None) -> Iterator[None]:
    """Tell the target, here and in other processes, which variable holds the key."""
    before = os.environ.get(KEY_SETTING)
    if name:
        os.environ[KEY_SETTING] = name
    try:
        yield
    finally:
        os.environ.pop(KEY_SETTING, None)
        if before is not None:
            os.environ[KEY_SETTING] = before


def _server_cases(arguments: tuple[str, ...]) -> Selected:
    """The cases that were named, or all bundled ones of kind `server`.

    Raises:
        UsageError: one is of another kind.
    """
    if not arguments:
        arguments = tuple(str(suite.path) for suite in load_suites() if suite.suite.kind == "server")
    selected = select(arguments)
    for case in selected.cases:
        if case.suite.suite.kind != "server":
            raise UsageError(f"{case.address} is of kind {case.suite.suite.kind}; a probe runs kind server")
    return selected


# ---------------------------------------------------------------------------- preflight


def _preflight(where: Endpoint, timeout: float) -> Iterator[Preflight]:
    """Ask three cheap questions, as far as it makes sense to go on.

    Raises:
        UsageError: the server cannot be reached, or does not know the key or the model.
    """
    # It loads the HTTP client, which other commands need not spend time on.
    from conformance.targets.openai import open_endpoint

    target = open_endpoint(where.spec, timeout=timeout)
    try:
        yield _model_row(target.models(), where)
        chat = target.serve(ServeRequest(bodies=(_HELLO,)))[0]
        row = _chat_row("a chat works", chat, where)
        yield row
        if row.ok:
            tools = target.serve(ServeRequest(bodies=(_HELLO | {"tools": [_TOOL]},)))[0]
            yield _chat_row("tools are accepted", tools, where)
    finally:
        target.close()


def _model_row(answer: ServeAnswer, where: Endpoint) -> Preflight:
    name = "the model is listed"
    if answer.failure == "connection" or (answer.failure == "timeout" and answer.status is None):
        raise UsageError(f"{where.url} cannot be reached: {answer.detail}")
    _check_key(answer, where)
    if answer.failure or answer.status != 200:
        return Preflight(name=name, ok=False, detail=answer.detail or f"HTTP {answer.status} at /models")
    data = answer.body.get("data") if isinstance(answer.body, dict) else None
    entries = data if isinstance(data, list) else []
    ids = [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]
    if where.model not in ids:
        known = ", ".join(ids[:20]) or "no model at all"
        raise UsageError(f"{where.url} does not list the model {where.model!r}; it lists {known}")
    return Preflight(name=name, ok=True, detail=f"with {len(ids) - 1} others" if ids[1:] else "alone")


def _chat_row(name: str, answer: ServeAnswer, where: Endpoint) -> Preflight:
    _check_key(answer, where)
    good = not answer.failure and answer.status == 200 and isinstance(answer.body, dict)
    detail = "HTTP 200" if good else answer.detail or f"HTTP {answer.status}: {_excerpt(answer.body)}"
    return Preflight(name=name, ok=good, detail=detail)


def _check_key(answer: ServeAnswer, where: Endpoint) -> None:
    if answer.status in _REFUSED:
        raise UsageError(
            f"{where.url} answers HTTP {answer.status}: it wants another key; put one into {KEY_VARIABLE}, "
            "or name its variable with --key-variable"
        )


def _excerpt(body: Any) -> str:
    return str(body)[:300]


# ---------------------------------------------------------------------------- verdict


def _area_verdicts(summary: RunOutput) -> Iterator[AreaVerdict]:
    for row in summary.areas:
        found = {verdict for verdict, count in row.counts.items() if count}
        if found & set(BAD):
            yield AreaVerdict(area=row.area, verdict="fail", counts=row.counts)
        elif "inconclusive" in found:
            yield AreaVerdict(area=row.area, verdict="inconclusive", counts=row.counts)
        else:
            passed = "pass" in found and found <= {"pass", "xfail"} and not row.not_run
            yield AreaVerdict(area=row.area, verdict="pass" if passed else "not run", counts=row.counts)


def _print_preflight(rows: tuple[Preflight, ...]) -> None:
    cells = [(row.name, "yes" if row.ok else "NO", row.detail) for row in rows]
    output.console().print(output.table("preflight", ("question", "answer", "detail"), cells))


def _print_areas(areas: tuple[AreaVerdict, ...]) -> None:
    cells = [(area.area, area.verdict, str(verdict_counts(Counter(area.counts)))) for area in areas]
    output.console().print(output.table("verdict", ("area", "verdict", "cases"), cells))
