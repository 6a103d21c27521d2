"""`conformance store`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conformance.cli import invoke
from conformance.commands.schema import schemas
from conformance.results import CellRecord
from tests.history_runs import (
    CASE,
    SUITE,
    accuracy_result,
    decision,
    footer,
    header,
    items_of,
    planned,
    result,
    sheet,
    write,
)

Ask = Callable[..., Any]


@dataclass
class Done:
    """What a command printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`conformance store …` in an empty folder, with a database there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONFORMANCE_DATABASE", "sqlite:///h.sqlite")

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        code = invoke(["store", *arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def ask(command: Command) -> Ask:
    """Runs a subcommand with `--json`, checked against its schema; gives the document."""

    def run(name: str, *arguments: str, code: int = 0) -> Any:
        done = command(name, *arguments, "--json")
        assert done.code == code, done.err
        found = json.loads(done.out)
        jsonschema.Draft202012Validator(schemas()[f"store-{name}"]()).validate(found)
        return found

    return run


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two nights: a gate fails in the second, and one planned case has not run."""
    names = []
    for night, right in ((1, 96), (2, 80)):
        answers = sheet(items_of({"correct": right, "wrong": 100 - right}))
        made = decision(answers, verdict="pass" if right > 90 else "fail")
        results = [accuracy_result(answers, made), result("other", kind="parser")]
        head = header(
            f"n{night}", f"2026-11-0{night}T02:00:00Z", manifest=planned(*results, result("not-run"))
        )
        names.append(f"{night}.jsonl")
        write(tmp_path / names[-1], head, *results, *([footer()] if night == 1 else []))
    return names


def test_merge_says_what_it_did_and_a_bad_file_holds_up_no_other(
    ask: Ask, files: list[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("hello\n")
    found = ask("merge", files[0], "bad.jsonl", files[1], code=2)
    assert found["database"] == "sqlite:///h.sqlite"
    assert [row["error"] == "" for row in found["files"]] == [True, False, True]
    assert found["files"][1]["merged"] is None
    assert "bad.jsonl:1: " in found["files"][1]["error"]
    merged = found["files"][2]["merged"]
    assert (merged["run_id"], merged["added"], merged["newer"]) == ("n2", 2, True)
    again = ask("merge", *files)
    assert [(row["merged"]["added"], row["merged"]["newer"]) for row in again["files"]] == [(0, False)] * 2


def test_merge_for_people(command: Command, files: list[str], tmp_path: Path) -> None:
    data = (tmp_path / files[1]).read_bytes()
    (tmp_path / files[1]).write_bytes(data[:-40])
    url = "sqlite:///deep/h.sqlite"
    done = command("merge", *files, "gone.jsonl", "--database", url)
    assert done.code == 2
    assert done.out.splitlines() == [
        "1.jsonl: run n1: 2 results added, 0 updated, 0 unchanged",
        "2.jsonl: run n2: 1 results added, 0 updated, 0 unchanged",
        "database: sqlite:///deep/h.sqlite",
    ]
    note, error = done.err.splitlines()
    assert note.startswith("note: 2.jsonl: line 3 was cut off after ")
    assert error == "error: gone.jsonl: cannot be read: No such file or directory"
    again = command("merge", files[0], "--database", url)
    assert again.out.splitlines()[0] == "1.jsonl: run n1: nothing new"


def test_list_shows_runs_or_the_latest_results(ask: Ask, files: list[str]) -> None:
    ask("merge", *files)
    found = ask("list")
    assert set(found) == {"runs"}
    assert [(run["run_id"], run["counts"]) for run in found["runs"]] == [
        ("n2", {"fail": 1, "pass": 1}),
        ("n1", {"pass": 2}),
    ]
    assert [run["planned"] for run in ask("list", "--limit", "1")["runs"]] == [3]
    latest = ask("list", "--latest")
    assert set(latest) == {"latest"}
    assert [(row["case"], row["verdict"], row["run_id"]) for row in latest["latest"]] == [
        (CASE, "fail", "n2"),
        ("other", "pass", "n2"),
    ]


def test_show_compares_with_the_run_before(ask: Ask, files: list[str]) -> None:
    ask("merge", *files)
    found = ask("show")
    assert (found["run"]["run_id"], found["since"]) == ("n2", "n1")
    assert [(c["case"], c["before"], c["after"]) for c in found["changes"]] == [(CASE, "pass", "fail")]
    assert ask("show", "n1") == {"run": found["run"] | ask("show", "n1")["run"], "since": None, "changes": []}
    back = ask("show", "n1", "--since", "n2")
    assert [(c["before"], c["after"]) for c in back["changes"]] == [("fail", "pass")]


def test_compare_says_what_broke_in_cells_too_and_since_when(
    ask: Ask, command: Command, tmp_path: Path
) -> None:
    """Three nights of a suite and of a cell, merged before they are compared."""
    cell = CellRecord(id="fake+pp2", axes={"layout": "pp2"}, settings={})
    for night, verdict in ((1, "pass"), (2, "fail"), (3, "fail")):
        started = f"2026-11-0{night}T02:00:00Z"
        plain, other = result("one", kind="parser"), result("two", kind="parser", verdict=verdict)
        write(tmp_path / f"{night}.jsonl", header(f"n{night}", started, manifest=planned(plain)), plain)
        head = header(f"c{night}", started, manifest=planned(other), cell=cell)
        write(tmp_path / f"c{night}.jsonl", head, other)
        ask("merge", f"{night}.jsonl", f"c{night}.jsonl")
    first = ask("compare", "1.jsonl", "c1.jsonl")
    assert [entry["state"] for entry in first["comparison"]["entries"]] == ["new", "new"]
    second = command("compare", "2.jsonl", "c2.jsonl")
    assert second.code == 0
    assert second.out.splitlines()[:3] == [
        "1 broken, 0 still broken, 0 mended, 0 new",
        "BROKEN: 1",
        "  accuracy/nano::two [fake+pp2]: pass -> fail",
    ]
    third = ask("compare", "3.jsonl", "gone.jsonl", "c3.jsonl", code=2)
    assert "since 2026-11-02T02:00 (run c2, commit abc123); last good in run c1" in third["text"]
    assert "error: gone.jsonl: cannot be read" in command("compare", "gone.jsonl").err


def test_history_has_scores_and_outcomes(ask: Ask, files: list[str]) -> None:
    ask("merge", *files)
    points = ask("history", f"{SUITE}::{CASE}", "--target", "fake")["points"]
    assert [point["verdict"]["run_id"] for point in points] == ["n1", "n2"]
    assert [point["decision"]["score"]["count"] for point in points] == [96, 80]
    assert [point["outcomes"] for point in points] == [
        {"correct": 96, "wrong": 4},
        {"correct": 80, "wrong": 20},
    ]
    plain = ask("history", f"{SUITE}::other")["points"]
    assert [(point["decision"], point["outcomes"]) for point in plain] == [(None, {})] * 2


def test_for_people(command: Command, files: list[str]) -> None:
    assert command("merge", *files).code == 0

    def shown(*arguments: str) -> str:
        done = command(*arguments)
        assert done.code == 0, done.err
        return done.out

    runs = shown("list")
    assert "1 passed, 1 failed, 1 not run, not finished" in runs
    assert runs.index("n2") < runs.index("n1")
    assert "the case was edited" not in shown("show", "n2")
    assert "1 verdict differs from run n1" in shown("show", "n2")
    assert "there is no earlier run to compare with" in shown("show", "n1")
    history = shown("history", f"{SUITE}::{CASE}")
    assert "96.0 % (94.0 to 98.0)" in history
    assert "80 correct, 20 wrong" in history
    assert f"{SUITE}::other" in shown("list", "--latest")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "n9"], "holds no run n9; `conformance store list` names them"),
        (["show", "n1", "--since", "n9"], "holds no run n9"),
        (
            ["history", "no-such"],
            "no-such: name a case as suite-id::case-id; `conformance store list ",
        ),
        (["history", "a::b"], "holds no result of a::b; "),
        (["history", f"{SUITE}::{CASE}", "-t", "other"], f"holds no result of {SUITE}::{CASE} on other; "),
        (["list", "--latest", "--limit", "2"], "--limit is a number of runs; leave it out with --latest"),
        (["merge"], "Missing argument 'RUN...'"),
        (["list", "--limit", "0"], "0 is not in the range x>=1"),
    ],
)
def test_what_is_refused(command: Command, files: list[str], arguments: list[str], said: str) -> None:
    command("merge", *files)
    done = command(*arguments)
    assert done.code == 2
    assert said in done.err
    assert done.out == ""


def test_without_a_url_the_history_lies_in_the_users_data_folder(
    command: Command, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONFORMANCE_DATABASE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    missing = command("list")
    assert missing.code == 2
    assert "gemma4-conformance/history.sqlite: there is no history" in missing.err
    assert command("merge", *files).code == 0
    assert (tmp_path / "data" / "gemma4-conformance" / "history.sqlite").is_file()
    assert "n2" in command("list").out


def test_a_run_is_removed(command: Command, ask: Ask, files: list[str]) -> None:
    assert command("merge", *files).code == 0
    assert command("remove", "n2").out == "run n2: removed\n"
    assert [run["run_id"] for run in ask("list")["runs"]] == ["n1"]
    again = command("remove", "n2")
    assert again.code == 2
    assert "holds no run n2; `conformance store list` names them" in again.err
