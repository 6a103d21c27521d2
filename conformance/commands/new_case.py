"""`conformance new-case`: add a parser case, with what the bundled implementation makes of it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import click

from conformance import resources, yamlfile
from conformance.commands import output
from conformance.commands.output import NewCaseOutput, json_option
from conformance.errors import ConformanceError, SuiteError, UsageError
from conformance.expectations import Expectations
from conformance.loading import load_suite
from conformance.results import Result
from conformance.runner import TargetPool, run_case

_HEAD = """\
# How to write a suite: docs/writing-a-suite.md
id: {suite}
kind: parser
# One line for the dashboard, then what the suite is about.
title: {title}
description: >-
  Say here which rules these cases check, and why.
# Row of the dashboard: reasoning, tool-calls, recovery, typing, …
area: {area}
# Tools that cases name with `tools: NAME`, in OpenAI's form.
toolsets: {{}}
cases:
"""

_CASE = """\
{indent}- id: {id}
{indent}  # The rule, in one sentence.
{indent}  title: {title}
{indent}  # Where it comes from: a catalogue id, `spec 6.5`, owner/repo#123, or a URL.
{indent}  source: [{source}]
{indent}  output: {output}
{options}{indent}  # What the bundled implementation answers. Keep it only if the specification says so too.
{indent}  expect: {expect}
"""


@click.command("new-case")
@click.option(
    "--suite", required=True, metavar="ID", help="Suite id, such as parser/reasoning; new or existing."
)
@click.option("--id", "case_id", required=True, help="Case id: lower case, digits and dashes.")
@click.option(
    "--output", "model_output", required=True, help="Model output, verbatim; in most shells $'…' takes \\n."
)
@click.option("--title", required=True, help="The rule that the case checks, in one sentence.")
@click.option("--source", required=True, multiple=True, help="Where it comes from; may be repeated.")
@click.option("--prompt", help="Name of the prompt's end, such as closed-channel.")
@click.option("--toolset", help="Name of one of the suite's toolsets.")
@click.option("--root", type=click.Path(path_type=Path), help="Suites folder.  [default: the bundled one]")
@json_option
def new_case_command(
    suite: str,
    case_id: str,
    model_output: str,
    title: str,
    source: tuple[str, ...],
    prompt: str | None,
    toolset: str | None,
    root: Path | None,
    as_json: bool,
) -> None:
    """Add a parser case to a suite file; the file is made if it does not exist.

    The expectation is filled with what the bundled implementation answers, for you to check.
    """
    try:
        model_output.encode()
    except UnicodeEncodeError:
        raise UsageError("--output is not UTF-8") from None
    path = _suite_path(suite, root)
    created = not path.exists()
    options = {"prompt": prompt, "tools": toolset}
    text = _head(suite) if created else path.read_text(encoding="utf-8")
    indent = "  " if created else _indent_of_cases(path)

    def with_expectation(expect: dict[str, Any]) -> str:
        return (
            text.rstrip("\n")
            + "\n"
            + _case_text(indent, case_id, title, source, model_output, options, expect)
        )

    answer = _judge(suite, case_id, with_expectation({}))
    expect = _expectation(answer)
    final = with_expectation(expect)
    _judge(suite, case_id, final)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(final, encoding="utf-8")
    if as_json:
        row = NewCaseOutput(address=f"{suite}::{case_id}", path=str(path), created=created, reference=expect)
        output.emit_json(row)
        return
    click.echo(f"{'made' if created else 'added to'} {path}: {suite}::{case_id}")
    click.echo(f"the bundled implementation answers: {_flow(expect)}")
    click.echo("check `expect` against the specification before you keep it")


def _suite_path(suite: str, root: Path | None) -> Path:
    if re.fullmatch(r"[a-z0-9][a-z0-9-]*(/[a-z0-9][a-z0-9-]*)+", suite) is None:
        raise UsageError(f"{suite!r} is no suite id; write a path like parser/reasoning")
    if root is None and resources.checkout_root() is None:
        raise UsageError(
            "the bundled suites of an installed package are not for editing; name a folder with --root"
        )
    return (root or resources.suites_dir()) / f"{suite}.yaml"


def _head(suite: str) -> str:
    name = suite.rpartition("/")[2]
    return _HEAD.format(suite=suite, title=json.dumps(name), area=name)


def _indent_of_cases(path: Path) -> str:
    """Indentation of the list items under `cases`, which must be the file's last key."""
    loaded = load_suite(path)
    document = yamlfile.read(path)
    keys = sorted((line, str(loc[0])) for loc, line in document.lines.items() if len(loc) == 1)
    item = re.match(r"( *)- ", document.text.splitlines()[loaded.lines[-1] - 1])
    if keys[-1][1] != "cases" or item is None:
        raise SuiteError(
            f"{path}: to append a case, `cases:` must be the last key and a list of `- id:` items"
        )
    return item[1]


def _case_text(
    indent: str,
    case_id: str,
    title: str,
    source: tuple[str, ...],
    model_output: str,
    options: dict[str, str | None],
    expect: dict[str, Any],
) -> str:
    return _CASE.format(
        indent=indent,
        id=case_id,
        title=_flow(title),
        source=", ".join(_flow(s) for s in source),
        output=_flow(model_output),
        options="".join(f"{indent}  {name}: {_flow(value)}\n" for name, value in options.items() if value),
        expect=_flow(expect),
    )


def _flow(value: Any) -> str:
    """JSON, which is YAML in flow style once the characters that YAML takes for line ends are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _judge(suite: str, case_id: str, text: str) -> Result:
    """Load the text as that suite, and run its case on the bundled implementation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{suite}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
        try:
            loaded = load_suite(path).case(case_id)
        except SuiteError as error:
            raise SuiteError(f"with the new case the suite would be broken:\n{error}") from None
        pool = TargetPool()
        try:
            return run_case(loaded, "reference", pool, Expectations())
        finally:
            pool.close()


def _expectation(result: Result) -> dict[str, Any]:
    got = result.evidence.got
    if not isinstance(got, dict):
        raise ConformanceError(f"the bundled implementation gives no answer: {result.reason}")
    expect: dict[str, Any] = {name: got[name] for name in ("reasoning", "content") if got.get(name)}
    calls = got.get("tool_calls") or ()
    if calls:
        expect["tool_calls"] = [
            {"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls
        ]
    return expect
