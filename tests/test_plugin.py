"""`pytest suites/`: items, outcomes, exit codes, options and workers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance import expectations, runfile, runner
from conformance.loading import load_suite, load_suites
from conformance.scheduling import TargetScheduling
from conformance.session import SuiteSession
from tests.conftest import Run, Suites

HONEST, LYING = "lying_targets:Honest", "lying_targets:Lying"
EXPECTED_FAILURE = """\
  - cases: [parser/demo::case-hello]
    rules: [{rule}]
    reason: It always lies.
    source: R02
    repeat: conformance run parser/demo::case-hello
    review: {review}
"""


def quiet(result: object) -> str:
    return f"{result.stdout}\n{result.stderr}"  # type: ignore[attr-defined]


def test_one_item_per_case_and_target(run_pytest: Run, suites: Suites) -> None:
    suites.write("hello", "bye")
    done = run_pytest("suites", "--collect-only", "-q", "--target", HONEST, "--target", LYING)
    assert done.stdout.splitlines()[:4] == [
        f"suites/parser/demo.yaml::case-hello[{HONEST}]",
        f"suites/parser/demo.yaml::case-bye[{HONEST}]",
        f"suites/parser/demo.yaml::case-hello[{LYING}]",
        f"suites/parser/demo.yaml::case-bye[{LYING}]",
    ]
    assert done.returncode == 0


def test_a_failure_is_explained_shortly(run_pytest: Run, suites: Suites) -> None:
    suites.write("hello")
    done = run_pytest("suites", "--target", LYING)
    assert done.returncode == 1
    text = done.stdout
    assert f"parser/demo::case-hello on {LYING} failed" in text
    assert "[expected] content differs" in text
    assert '-   "content": "hello"' in text
    assert '+   "content": "a lie"' in text
    assert f"repeat: conformance run suites/parser/demo.yaml::case-hello --target {LYING}" in text
    assert "Traceback" not in text
    assert "conformance/plugin.py" not in text


@pytest.mark.parametrize(
    ("target", "outputs", "expectation", "code", "summary"),
    [
        (HONEST, ["hello", "bye"], None, 0, "2 passed"),
        (LYING, ["hello"], None, 1, "1 failed"),
        (LYING, ["hello"], "expected", 0, "1 xfailed"),
        (LYING, ["hello", "bye"], "expected", 1, "1 failed, 1 xfailed"),
        (LYING, ["hello"], "indices", 1, "1 failed"),
        (HONEST, ["hello"], "expected", 1, "1 failed"),
        ("lying_targets:unsure", ["hello"], None, 3, "1 inconclusive"),
        ("lying_targets:Exiting", ["hello", "bye"], None, 1, "2 failed"),
        ("lying_targets:Gone", ["hello"], None, 1, "1 failed"),
    ],
)
def test_outcomes_and_exit_codes_agree_with_conformance_run(
    run_pytest: Run,
    run_conformance: Run,
    suites: Suites,
    target: str,
    outputs: list[str],
    expectation: str | None,
    code: int,
    summary: str,
) -> None:
    suites.write(*outputs)
    if expectation is not None:
        suites.expect(EXPECTED_FAILURE.format(rule=expectation, review="2099-01-01"), target)
    done = run_pytest("suites", "--target", target)
    assert summary in done.stdout.splitlines()[-1]
    assert done.returncode == code, quiet(done)
    ran = run_conformance("run", "suites", "--target", target, "--no-report")
    assert ran.returncode == code, quiet(ran)


def test_nothing_collected_is_wrong_use(run_pytest: Run, run_conformance: Run, suites: Suites) -> None:
    (suites.root / "empty").mkdir()
    assert run_pytest("suites").returncode == 2
    assert run_conformance("run", "suites").returncode == 2
    suites.write("hello")
    done = run_pytest("suites", "--target", HONEST, "-k", "nothing")
    assert done.returncode == 2, quiet(done)


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_a_broken_suite_names_its_line(run_pytest: Run, suites: Suites, workers: tuple[str, ...]) -> None:
    suites.write("hello", suite="parser/good")
    path = suites.write("hello", suite="parser/bad")
    path.write_text(path.read_text().replace("expect:", "expcet:"))
    done = run_pytest("suites", "--target", HONEST, *workers)
    assert done.returncode == 2, quiet(done)
    assert "bad.yaml:11: cases[0].expcet: unknown key; did you mean `expect`?" in done.stdout
    assert "Traceback" not in quiet(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "nowhere"), "nowhere"),
        (("--target", "no_such_module:Thing"), "no_such_module"),
        (("--target", "os:getcwd"), "os:getcwd: returned str, which is not a target"),
        (("--resume", "nothing.jsonl"), "nothing.jsonl"),
        (("--resume", "a.jsonl", "--conformance-run", "b.jsonl"), "--resume appends"),
    ],
)
def test_wrong_options_end_before_collection(
    run_pytest: Run, suites: Suites, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    suites.write("hello")
    run_pytest("suites", "--target", HONEST, "--conformance-run", "a.jsonl")
    done = run_pytest("suites", *(() if "--target" in arguments else ("--target", HONEST)), *arguments)
    assert done.returncode == 2, quiet(done)
    assert message in quiet(done)
    assert "Traceback" not in quiet(done)
    assert "1 passed" not in done.stdout


def test_keywords_single_cases_and_last_failed(run_pytest: Run, suites: Suites) -> None:
    path = suites.write("hello", "bye", "other")
    lies = {"LIES": "bye"}
    assert "1 passed, 2 deselected" in run_pytest("suites", "--target", HONEST, "-k", "hello").stdout
    assert "1 passed" in run_pytest(f"{path}::case-hello", "--target", HONEST).stdout
    assert "1 passed" in run_pytest(f"{path}::case-hello[{HONEST}]", "--target", HONEST).stdout
    assert "1 failed, 2 passed" in run_pytest("suites", "--target", HONEST, env=lies).stdout
    again = run_pytest("suites", "--target", HONEST, "--lf", env=lies)
    assert "1 failed" in again.stdout.splitlines()[-1]
    assert "passed" not in again.stdout.splitlines()[-1]
    stopped = run_pytest("suites", "--target", HONEST, "-x", env=lies)
    assert "1 failed, 1 passed" in stopped.stdout
    assert stopped.returncode == 1


def test_workers_give_the_same_run_and_last_failed_crosses_over(
    run_pytest: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello", "bye", "other", "more")
    lies = {"LIES": "bye"}
    arguments = ("suites", "--target", HONEST, "--target", LYING)
    one = run_pytest(*arguments, "--conformance-run", "one.jsonl", env=lies)
    two = run_pytest(*arguments, "--conformance-run", "two.jsonl", "-n", "2", env=lies)
    assert one.returncode == two.returncode == 1
    assert verdicts(tmp_path / "one.jsonl") == verdicts(tmp_path / "two.jsonl")
    first, second = runfile.read(tmp_path / "one.jsonl"), runfile.read(tmp_path / "two.jsonl")
    assert first.header.manifest == second.header.manifest
    assert first.header.targets == second.header.targets
    assert set(first.header.targets) == {HONEST, LYING}
    assert first.footer is not None
    assert second.footer is not None
    assert first.footer.counts == second.footer.counts
    with_workers = run_pytest("suites", "--target", HONEST, "--lf", "-n", "2", env=lies).stdout
    assert "1 failed" in with_workers.splitlines()[-1]
    assert "passed" not in with_workers.splitlines()[-1]


def verdicts(path: Path) -> dict[tuple[str, str, str], str]:
    return {key: result.verdict for key, result in runfile.read(path).latest().items()}


def test_stopping_early_agrees_with_workers(run_pytest: Run, suites: Suites) -> None:
    suites.write(*(f"out{n}" for n in range(12)))
    done = run_pytest("suites", "--target", LYING, "-x", "-n", "2")
    assert done.returncode == 1, quiet(done)


def test_a_crash_costs_one_case(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "crash", "other")
    done = run_pytest(
        "suites", "--target", "lying_targets:Crashing", "-n", "2", "--conformance-run", "run.jsonl"
    )
    assert done.returncode == 1, quiet(done)
    results = runfile.read(tmp_path / "run.jsonl").latest()
    by_case = {key[1]: result for key, result in results.items()}
    assert {case: r.verdict for case, r in by_case.items()} == {
        "case-hello": "pass",
        "case-crash": "error",
        "case-other": "pass",
    }
    assert "crashed" in by_case["case-crash"].reason


def test_a_hang_costs_one_case(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello")
    done = run_pytest(
        *("suites", "--target", "lying_targets:Hanging", "--conformance-timeout", "0.2"),
        *("--conformance-run", "run.jsonl"),
    )
    assert done.returncode == 1, quiet(done)
    (result,) = runfile.read(tmp_path / "run.jsonl").results
    assert (result.verdict, result.reason) == ("timeout", "no verdict within 1.2 s")


def test_a_target_that_does_not_start_is_started_once(
    run_pytest: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello", "bye", "other")
    log = tmp_path / "log"
    done = run_pytest("suites", "--target", "lying_targets:Unstartable", env={"FAKE_LOG": str(log)})
    assert "3 failed" in done.stdout
    assert "ImportError: no engine" in done.stdout
    assert log.read_text() == "start\n"


def test_the_last_words_of_a_dead_worker_are_shown(run_pytest: Run, suites: Suites) -> None:
    suites.write("hello")
    done = run_pytest("suites", "--target", "lying_targets:Gone")
    assert "ended in an error: the worker was killed by signal 11" in done.stdout
    assert "Segmentation fault: last words" in done.stdout


def test_model_output_cannot_drive_the_terminal(run_pytest: Run, suites: Suites) -> None:
    suites.write("hello")
    text = run_pytest("suites", "--target", "lying_targets:Terminal").stdout
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "\\u001b[2Jgone\\u202e" in text


def test_expected_failures_can_be_turned_into_failures(run_pytest: Run, suites: Suites) -> None:
    suites.write("hello")
    suites.expect(EXPECTED_FAILURE.format(rule="expected", review="2099-01-01"), LYING)
    assert run_pytest("suites", "--target", LYING).returncode == 0
    assert run_pytest("suites", "--target", LYING, "--runxfail").returncode == 1


def test_a_past_review_warns_and_a_broken_expectation_stops(
    run_pytest: Run, run_conformance: Run, suites: Suites
) -> None:
    suites.write("hello")
    path = suites.expect(EXPECTED_FAILURE.format(rule="expected", review="2020-01-01"), LYING)
    done = run_pytest("suites", "--target", LYING)
    assert done.returncode == 0
    note = f"suites/expectations/{path.name}:3: review was due on 2020-01-01"
    assert note in done.stdout
    ran = run_conformance("run", "suites", "--target", LYING, "--no-report")
    assert (ran.returncode, f"warning: {note}" in ran.stderr) == (0, True)
    path.write_text(path.read_text().replace("case-hello", "case-gone"))
    done = run_pytest("suites", "--target", LYING)
    assert done.returncode == 2
    assert "'parser/demo::case-gone' matches no case" in done.stdout


def test_ordinary_tests_keep_their_semantics(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello")
    test = tmp_path / "test_it.py"
    test.write_text("def test_it(): assert True\n")
    target = ("--target", "lying_targets:unsure")
    assert run_pytest("suites", "test_it.py", "--target", HONEST).returncode == 0
    assert run_pytest("suites", "test_it.py", *target).returncode == 3
    test.write_text("def test_it(): assert False\n")
    assert run_pytest("suites", "test_it.py", *target).returncode == 1
    assert run_pytest("suites", "test_it.py", *target, "-n", "2").returncode == 1


def test_a_project_without_suites_is_left_alone(run_pytest: Run, tmp_path: Path) -> None:
    (tmp_path / "deploy.yaml").write_text("kind: Deployment\nmetadata: {}\n")
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it():\n"
        "    assert not {'pydantic', 'yaml', 'torch', 'conformance.loading'} & set(sys.modules)\n"
    )
    done = run_pytest(".", "-p", "no:hypothesispytest", "-p", "no:anyio")
    assert "1 passed" in done.stdout, quiet(done)
    (tmp_path / "test_it.py").unlink()
    assert run_pytest(".").returncode == 5


def test_suites_outside_a_suites_folder_are_found_by_their_head(run_pytest: Run, suites: Suites) -> None:
    suites.write("hello")
    suites.root.rename(suites.root.parent / "cases")
    assert "1 passed" in run_pytest("cases", "--target", HONEST).stdout


def lines_of(path: Path) -> list[str]:
    """The case of each result line, in order."""
    return [r.case for r in runfile.read(path).results]


def test_a_resumed_session_runs_only_what_is_open(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "bye")
    path = tmp_path / "run.jsonl"
    run_pytest("suites", "--target", "reference", "--conformance-run", "run.jsonl")
    before = path.read_bytes()
    done = run_pytest("suites", "--target", "reference", "--resume", "run.jsonl")
    assert "2 passed" in done.stdout
    assert done.returncode == 0
    assert path.read_bytes().startswith(before)
    assert lines_of(path) == ["case-hello", "case-bye"]
    suites.write("hello", "bye", "new")
    run_pytest("suites", "--target", "reference", "--resume", "run.jsonl", "-n", "2")
    assert lines_of(path) == ["case-hello", "case-bye", "case-new"]
    path.write_text(path.read_text().replace(runfile.harness_digest(), "0" * 64))
    run_pytest("suites", "--target", "reference", "--resume", "run.jsonl", "-n", "2")
    assert sorted(lines_of(path)[3:]) == ["case-bye", "case-hello", "case-new"]


def test_a_factory_is_asked_again(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "bye")
    run_pytest("suites", "--target", HONEST, "--conformance-run", "run.jsonl")
    done = run_pytest("suites", "--target", HONEST, "--resume", "run.jsonl", env={"LIES": "bye"})
    assert done.returncode == 1
    assert [r.verdict for r in runfile.read(tmp_path / "run.jsonl").latest().values()] == ["pass", "fail"]


def test_a_resumed_part_does_not_turn_the_run_green(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    demo = suites.write("hello", "bye")
    path = tmp_path / "run.jsonl"
    run_pytest("suites", "--target", HONEST, "--conformance-run", "run.jsonl", env={"LIES": "bye"})
    part = (f"{demo}::case-hello", "--target", HONEST, "--resume", "run.jsonl")
    done = run_pytest(*part)
    assert done.returncode == 1, quiet(done)
    assert "whole run, with earlier sessions: 1 passed, 1 failed" in done.stdout
    footer = runfile.read(path).footer
    assert footer is not None
    assert (footer.counts, footer.exit_code) == ({HONEST: {"pass": 1, "fail": 1}}, 1)
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert run_pytest(*part).returncode == 3
    assert runfile.read(path).footer is None


def test_verdicts_of_a_target_that_is_gone_are_not_replaced_by_skips(
    run_pytest: Run, suites: Suites, tmp_path: Path
) -> None:
    demo = suites.write("hello")
    run_pytest("suites", "--target", "reference", "--conformance-run", "run.jsonl")
    session = SuiteSession(["reference"], None, str(tmp_path / "run.jsonl"))
    session.unavailable = {"reference": "it is gone"}
    suites.write("hello", "bye")
    cases = load_suite(demo).cases
    assert [session.run(case, "reference").result.verdict for case in cases] == ["pass", "skip"]


def test_a_known_timeout_is_one_again_without_its_expectation(suites: Suites) -> None:
    spec = "tests.lying_targets:Hanging"
    case = load_suite(suites.write("hello")).cases[0]
    suites.expect(EXPECTED_FAILURE.format(rule="timeout", review="2099-01-01"), spec)
    known = expectations.load(load_suites([suites.root]))
    pool = runner.TargetPool(timeout=0.05)
    try:
        info = pool.get(spec).info
        stored = runner.run_case(case, spec, pool, known)
    finally:
        pool.close()
    assert (stored.verdict, stored.reason) == ("xfail", "It always lies.")
    again = runner.rejudge(case, stored, info, expectations.Expectations())
    assert (again.verdict, again.reason) == ("timeout", "no verdict within 0.3 s")
    assert runner.rejudge(case, again, info, known).verdict == "xfail"
    assert runner.rejudge(case, stored, info, known) == stored


def test_the_help_names_the_limit_that_holds(run_pytest: Run, suites: Suites) -> None:
    help_text = " ".join(run_pytest("--help").stdout.split())
    assert f"limit of one request to a target (default: {runner.DEFAULT_TIMEOUT:g})" in help_text
    suites.write("hello")
    for wrong in ("0", "-1", "nan", "soon"):
        done = run_pytest("suites", "--target", HONEST, "--conformance-timeout", wrong)
        assert (done.returncode, "--conformance-timeout" in done.stderr) == (4, True), wrong


def test_resuming_applies_the_expectations_of_today(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello")
    assert run_pytest("suites", "--target", LYING, "--conformance-run", "run.jsonl").returncode == 1
    path = suites.expect(EXPECTED_FAILURE.format(rule="expected", review="2099-01-01"), LYING)
    assert run_pytest("suites", "--target", LYING, "--resume", "run.jsonl").returncode == 0
    assert list(verdicts(tmp_path / "run.jsonl").values()) == ["xfail"]
    path.unlink()
    assert run_pytest("suites", "--target", LYING, "--resume", "run.jsonl").returncode == 1
    assert list(verdicts(tmp_path / "run.jsonl").values()) == ["fail"]


def test_header_holds_manifest_and_no_secrets(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello", "bye")
    run_pytest(
        *("suites", "--target", HONEST, "--conformance-run", "run.jsonl", "-k", "hello"),
        env={"SECRET_TOKEN": "hunter2", "OMP_NUM_THREADS": "1"},
    )
    text = (tmp_path / "run.jsonl").read_text()
    assert "hunter2" not in text
    first = json.loads(text.splitlines()[0])
    assert [entry["case"] for entry in first["manifest"]] == ["case-hello"]
    assert first["environment"]["env:OMP_NUM_THREADS"] == "1"
    assert first["argv"][0] == "pytest"


def test_an_engine_stays_on_one_worker_and_cheap_targets_are_spread() -> None:
    scope = TargetScheduling._split_scope
    node = "suites/parser/demo.yaml::case-hello[{}]"
    assert scope(SCHEDULER, node.format("vllm@0.32.0")) == "vllm@0.32.0"
    SCHEDULER.config = SimpleNamespace(rootpath=Path("/nowhere"))
    for cheap in ("reference", HONEST):
        assert scope(SCHEDULER, node.format(cheap)) == node.format(cheap)
    assert scope(SCHEDULER, "tests/test_it.py::test_it[a]") == "tests/test_it.py::test_it[a]"
    assert scope(SCHEDULER, "tests/test_it.py::test_it@group") == "group"


def test_cases_compared_with_an_oracle_are_its_group() -> None:
    SCHEDULER.config = SimpleNamespace(rootpath=Path(__file__).parents[1])
    scope = TargetScheduling._split_scope
    node = "suites/parity/e2b-like.yaml::whole[{}]"
    assert scope(SCHEDULER, node.format("reference")) == "oracle transformers@5.19.0"
    assert scope(SCHEDULER, node.format(HONEST)) == "oracle transformers@5.19.0"
    assert scope(SCHEDULER, node.format("vllm@0.32.0")) == "vllm@0.32.0"


SCHEDULER = object.__new__(TargetScheduling)
"""Grouping looks at node ids alone, so it needs no session."""
