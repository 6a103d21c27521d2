"""The command line through its front door: outputs fit their schemas, errors are one clear message."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest

from conformance import runfile
from conformance.commands.schema import schemas
from conformance.loading import load_suites
from tests.conftest import Run, Suites

HONEST, LYING, SLOW = "lying_targets:Honest", "lying_targets:Lying", "lying_targets:Slow"


def validated(name: str, done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    value = json.loads(done.stdout)
    jsonschema.Draft202012Validator(schemas()[name]()).validate(value)
    return value


def assert_one_clear_error(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# ---------------------------------------------------------------------------- run


def test_run_writes_file_site_and_summary(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "bye")
    suites.write("hello", suite="parser/more", area="other")
    done = run_conformance("run", "suites", "--target", HONEST, "--target", LYING, "--json")
    assert done.returncode == 1
    summary = validated("run", done)
    run = runfile.read(tmp_path / str(summary["run_file"]))
    assert (summary["complete"], summary["planned"], summary["exit_code"]) == (True, 6, 1)
    assert {(row["target"], row["area"]): row["counts"] for row in summary["areas"]} == {
        (HONEST, "demo"): {"pass": 2},
        (HONEST, "other"): {"pass": 1},
        (LYING, "demo"): {"fail": 2},
        (LYING, "other"): {"fail": 1},
    }
    assert len(summary["problems"]) == 3
    assert run.footer is not None
    assert run.footer.counts == {HONEST: {"pass": 3}, LYING: {"fail": 3}}
    assert (tmp_path / str(summary["site"])).is_file()
    assert Path(str(summary["site"])).parts[:2] == ("reports", "site")


def test_run_prints_a_table_and_where_things_are(run_conformance: Run, suites: Suites) -> None:
    suites.write("hello", "bye")
    done = run_conformance("run", "suites", "--target", HONEST, "--out", "r.jsonl", env={"LIES": "bye"})
    assert done.returncode == 1
    assert "1 passed, 1 failed" in done.stdout
    assert "run file: r.jsonl" in done.stdout
    assert "dashboard: " in done.stdout
    assert done.stdout.splitlines()[-2] == "exit code 1: 1 passed, 1 failed"
    assert f"parser/demo::case-bye on {HONEST} failed" in done.stderr
    assert "test session starts" not in done.stdout + done.stderr


def test_many_failures_do_not_bury_the_summary(run_conformance: Run, suites: Suites) -> None:
    suites.write(*(f"out{n}" for n in range(8)))
    short = run_conformance("run", "suites", "-t", LYING, "--no-report").stderr
    assert short.count(f"on {LYING} failed: expected") == 8
    assert short.count("repeat: ") == 5
    full = run_conformance("run", "suites", "-t", LYING, "--no-report", "-v").stderr
    assert full.count("repeat: ") == 8


def test_the_repeat_line_repeats_the_failure(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "bye")
    done = run_conformance("run", "suites", "-t", HONEST, "--no-report", "--json", env={"LIES": "bye"})
    (problem,) = json.loads(done.stdout)["problems"]
    program, *arguments = shlex.split(problem["repeat"])
    assert program == "conformance"
    again = run_conformance(*arguments, "--no-report", "--json", env={"LIES": "bye"})
    summary = validated("run", again)
    assert summary["planned"] == 1
    assert [p["address"] for p in summary["problems"]] == ["parser/demo::case-bye"]


def test_bundled_cases_are_named_by_address_suite_or_pattern(run_conformance: Run) -> None:
    # A suite of another kind takes much longer.
    parsers = [suite for suite in load_suites() if suite.suite.kind == "parser"]
    suite = min(parsers, key=lambda suite: len(suite.cases))
    first = suite.cases[0].address
    for name, planned in [(first, 1), (suite.suite.id, len(suite.cases)), (f"{first}*", None)]:
        done = run_conformance("run", name, "--target", "reference", "--no-report", "--json")
        summary = validated("run", done)
        assert summary["complete"]
        assert planned in (None, summary["planned"])
        noun = "case" if summary["planned"] == 1 else "cases"
        assert done.stderr.startswith(f"{summary['planned']} {noun} on reference")


def test_quick_leaves_out_what_is_tagged_slow(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    path = suites.write("hello", "hallo")
    plain = {case.address: case.digest for case in load_suites([path]).cases}
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("  - id: case-hallo\n", "  - id: case-hallo\n    tags: [slow]\n"), encoding="utf-8"
    )
    tagged = {case.address: case.digest for case in load_suites([path]).cases}
    assert tagged == plain, "a tag changes no verdict"
    arguments = ("run", "suites", "-t", "reference", "--no-report", "--quick")
    done = run_conformance(*arguments, "--out", "quick.jsonl")
    assert done.returncode == 0, done.stderr
    run = runfile.read(tmp_path / "quick.jsonl")
    assert [entry.case for entry in run.header.manifest] == ["case-hello"]
    refused = run_conformance("run", f"{path}::case-hallo", "-t", "reference", "--no-report", "--quick")
    assert_one_clear_error(refused, "leave out --quick")


def test_settings_of_the_folder_and_the_user_do_not_matter(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello")
    (tmp_path / "conftest.py").write_text("raise RuntimeError('conftest')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    done = run_conformance(
        *("run", "suites", "-t", HONEST, "--no-report", "-n", "2"),
        env={"PYTEST_ADDOPTS": "-k nothing", "PYTEST_PLUGINS": "no_such_plugin"},
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".pytest_cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "'nowhere' is no path, and matches no case or suite"),
        (["run", "suites::x"], "no case 'x'"),
        (["run", "suites/parser/demo.yaml::case-gone"], "no case 'case-gone'; `conformance list cases`"),
        (["run", "suites", "--target", "nowhere"], "nowhere"),
        (["run", "suites", "--resume", "no.jsonl"], "no.jsonl"),
        (["run", "suites", "--resume", "a", "--out", "b"], "--resume appends"),
        (["run", "suites", "--no-such-option"], "No such option"),
        (["run", "suites", "-t", HONEST, "--out", "taken.jsonl"], "taken.jsonl exists; go on with it"),
        (["run", "suites", "-t", HONEST, "--out", "suites"], "suites is a folder; name a file in it"),
        (["run", "suites", "-t", HONEST, "--out", "taken.jsonl/r.jsonl"], "is no folder; name another path"),
        (["run", "suites", "-t", HONEST, "--out", "/proc/r.jsonl"], "/proc/r.jsonl: cannot be written"),
        (["run", "suites", "-t", HONEST, "--site", "taken.jsonl"], "is a file; name a folder"),
        (["run", "suites", "-t", HONEST, "--site", "taken.jsonl/site"], "is no folder; name another folder"),
        (["run", "suites", "-t", HONEST, "--site", "suites"], "holds files that are not a dashboard"),
        (["run", "suites", "-t", HONEST, "--timeout", "0"], "expected a number of seconds above 0"),
        (["run", "suites", "-t", HONEST, "--timeout", "nan"], "expected a number of seconds above 0"),
        (["run", "suites", "-t", HONEST, "-n", "-1"], "expected a number of processes"),
        (["run", "suites", "-t", HONEST, "-n", "many"], "expected a number of processes"),
        (["run", "suites", "-t", "os:getcwd"], "os:getcwd: returned str, which is not a target"),
        (["run", "suites", "-t", "os:no_such"], "os:no_such: cannot be imported"),
        (["show", "suites/parser/demo.yaml"], "names 2 cases"),
        (["report", "no.jsonl"], "no.jsonl: cannot be read"),
        (["report", "taken.jsonl"], "holds no complete header"),
        (["schema", "nothing"], "Invalid value"),
        (["faults", "run", "no-such-fault"], "no-such-fault"),
        (["frobnicate"], "No such command"),
    ],
)
def test_wrong_use_is_one_clear_error(
    run_conformance: Run, suites: Suites, tmp_path: Path, arguments: list[str], message: str
) -> None:
    suites.write("hello", "bye")
    (tmp_path / "taken.jsonl").touch()
    done = run_conformance(*arguments)
    assert_one_clear_error(done, message)
    assert "interrupted" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_broken_suite_or_expectation_names_its_line(run_conformance: Run, suites: Suites) -> None:
    path = suites.write("hello")
    expectations = suites.expect("  - {}\n", LYING)
    assert_one_clear_error(run_conformance("run", "suites", "-t", LYING), f"{expectations}:3: ")
    path.write_text(path.read_text().replace("expect:", "expcet:"))
    for command in (["run", "suites", "-t", LYING], ["list", "--suites", "suites"]):
        assert_one_clear_error(run_conformance(*command), f"{path}:11: cases[0].expcet: unknown key")


# ---------------------------------------------------------------------------- other commands


def test_list(run_conformance: Run, suites: Suites) -> None:
    suites.write("hello", "bye")
    everything = validated("list", run_conformance("list", "--json"))
    assert set(everything) == {"suites", "cases", "targets", "sources"}
    assert len(everything["cases"]) == sum(suite["cases"] for suite in everything["suites"])
    assert "reference" in [target["spec"] for target in everything["targets"]]
    own = validated("list", run_conformance("list", "sources", "--suites", "suites", "--json"))
    addresses = ["parser/demo::case-hello", "parser/demo::case-bye"]
    assert own == {"sources": [{"source": "R02", "cases": addresses}]}
    table = run_conformance("list", "cases", "--suites", "suites").stdout
    assert "parser/demo::case-bye" in table


def test_show(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    path = suites.write("hello", "bye")
    suites.expect(
        "  - cases: [parser/demo::case-bye]\n    versions: '<2'\n    rules: [expected]\n"
        "    reason: It lies.\n    source: R02\n    repeat: conformance run …\n    review: 2099-01-01\n",
        LYING,
    )
    run_conformance("run", "suites", "-t", LYING, "--out", "r.jsonl", "--no-report")
    name = "suites/parser/demo.yaml::case-bye"
    shown = validated("show", run_conformance("show", name, "--run", "r.jsonl", "--json"))
    assert (shown["address"], shown["line"], shown["path"]) == ("parser/demo::case-bye", 12, str(path))
    assert [r["verdict"] for r in shown["results"]] == ["xfail"]
    assert shown["expectations"][0]["where"] == f"suites/expectations/{LYING}.yaml:3"
    text = run_conformance("show", name, "--run", "r.jsonl").stdout
    assert 'output: "bye"' in text
    assert f"expected to fail on {LYING} (<2): It lies." in text
    assert '+   "content": "a lie"' in text


def test_report(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello")
    run_conformance("run", "suites", "-t", HONEST, "--out", "r.jsonl", "--no-report")
    assert not (tmp_path / "reports").exists()
    done = run_conformance("report", "r.jsonl", "--out", "site", "--suites", "suites", "--json")
    made = validated("report", done)
    assert made["results"] == 1
    assert (tmp_path / str(made["index"])).is_file()


@pytest.mark.parametrize("name", sorted(schemas()))
def test_schema_prints_what_is_committed(run_conformance: Run, name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(run_conformance("schema", name).stdout))


def test_targets(run_conformance: Run) -> None:
    listed = validated("targets", run_conformance("targets", "--json"))
    reference = next(row for row in listed["targets"] if row["spec"] == "reference")
    assert (reference["default"], reference["usable"], reference["reason"]) == (True, True, "")
    assert "reference" in run_conformance("targets", "list").stdout


def test_environments_of_targets(run_conformance: Run, tmp_path: Path) -> None:
    home = {"CONFORMANCE_HOME": str(tmp_path / "home")}
    listed = validated("targets", run_conformance("targets", "--json", env=home))
    engine = next(row for row in listed["targets"] if row["spec"] != "reference")
    assert not engine["usable"]
    assert f"conformance targets install {engine['spec']}" in engine["reason"]
    refused = run_conformance("run", "-t", engine["spec"], env=home)
    assert_one_clear_error(refused, f"conformance targets install {engine['spec']}")
    removed = run_conformance("targets", "remove", engine["spec"], "--json", env=home)
    assert removed.returncode == 0
    assert f"{engine['spec']}: was not installed" in removed.stderr
    validated("targets", removed)
    assert_one_clear_error(run_conformance("targets", "install", env=home), "name a target such as")
    assert_one_clear_error(run_conformance("targets", "install", "reference"), "no environment of its own")
    healthy = run_conformance("targets", "doctor", "reference", "--json", env=home)
    assert healthy.returncode == 0
    assert [check["ok"] for check in validated("doctor", healthy)["checks"]] == [True]
    ill = run_conformance("targets", "doctor", engine["spec"], "--json", env=home)
    assert ill.returncode == 1
    assert [check["ok"] for check in validated("doctor", ill)["checks"]] == [False]


def test_one_target_that_cannot_be_installed_does_not_stop_the_others(
    run_conformance: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    home = {"CONFORMANCE_HOME": str(tmp_path / "file" / "home")}
    done = run_conformance("targets", "install", "--default", "--json", env=home)
    assert done.returncode == 1
    defaults = [row["spec"] for row in validated("targets", done)["targets"] if row["default"]]
    tried = [line.split(":")[0] for line in done.stderr.splitlines() if "cannot be created" in line]
    assert sorted(tried) == sorted(spec for spec in defaults if spec != "reference")
    assert len(tried) > 1


def test_defaults_that_are_not_installed_are_skipped_with_the_command(
    run_conformance: Run, run_pytest: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello")
    home = {"CONFORMANCE_HOME": str(tmp_path / "home")}
    done = run_conformance("run", "suites", "--no-report", "--json", env=home)
    summary = validated("run", done)
    assert done.returncode == 0
    assert {row["target"]: row["counts"] for row in summary["areas"]} == {
        target: {"pass" if target == "reference" else "skip": 1}
        for target in {"reference", *summary["unavailable"]}
    }
    for spec, reason in summary["unavailable"].items():
        assert f"is not installed; run `conformance targets install {spec}`" in reason
    listed = run_pytest("suites", "-rs", env=home)
    assert "SKIPPED" in listed.stdout
    assert "suites/parser/demo.yaml:7: " in listed.stdout


def test_new_case_makes_a_suite_then_adds_to_it(run_conformance: Run, tmp_path: Path) -> None:
    arguments = ["--root", "own", "--title", "A rule that holds.", "--source", "spec 6.5", "--source", "R02"]
    made = run_conformance(
        *("new-case", "--suite", "parser/own", "--id", "first-case", *arguments, "--json"),
        *("--output", '<|channel>thought\nplan<channel|>a "quoted"\u2028answer'),
    )
    first = validated("new-case", made)
    assert first["created"] is True
    assert first["reference"] == {"reasoning": "plan", "content": 'a "quoted"\u2028answer'}
    call = '<|tool_call>call:get{city:<|"|>Köln<|"|>,n:007}<tool_call|>'
    added = run_conformance(
        *("new-case", "--suite", "parser/own", "--id", "second-case", *arguments, "--output", call),
        *("--prompt", "closed-channel"),
    )
    assert added.returncode == 0, added.stderr
    cases = load_suites([tmp_path / "own"]).cases
    assert [case.case.id for case in cases] == ["first-case", "second-case"]
    assert cases[1].case.output == call
    done = run_conformance("run", "own", "-t", "reference", "--no-report")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--id": "case-hello"}, "duplicate case id 'case-hello'"),
        ({"--id": "Bad Id"}, "cases[1].id"),
        ({"--suite": "../outside"}, "is no suite id"),
        ({"--source": "nowhere"}, "cases[1].source[0]"),
        ({"--toolset": "none-such"}, "no toolset 'none-such'"),
    ],
)
def test_new_case_changes_nothing_on_wrong_use(
    run_conformance: Run, unchanged: Path, changes: dict[str, str], message: str
) -> None:
    options = {
        "--suite": "parser/demo",
        "--root": "suites",
        "--id": "new-case",
        "--title": "A rule that holds.",
        "--source": "R02",
        "--output": "hi",
    } | changes
    done = run_conformance("new-case", *(part for option in options.items() for part in option))
    assert_one_clear_error(done, message)


def test_faults(run_conformance: Run) -> None:
    listed = validated("faults", run_conformance("faults", "list", "--json"))
    first = listed["faults"][0]
    assert first["source"]
    suite = next(suite for suite in load_suites() if suite.suite.kind == first["kind"])
    done = run_conformance("faults", "run", first["id"], "--suites", suite.path, "--json")
    ran = validated("faults", done)
    row = ran["faults"][0]
    assert done.returncode == (0 if row["detected"] and row["localised"] else 1)
    assert ran["faults"][0]["cases"] == len(suite.cases)
