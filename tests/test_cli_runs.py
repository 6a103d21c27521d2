"""`conformance run`: killed, interrupted and resumed runs, and what it shows of a result."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conformance import runfile
from conformance.explain import explain_problem
from conformance.loading import load_suites
from conformance.results import Problem
from conformance.targets.protocol import Chunking
from tests.conftest import Run, Suites
from tests.test_cli import HONEST, LYING, SLOW, assert_one_clear_error, validated

# ---------------------------------------------------------------------------- interrupted runs


def wait_for(condition: object, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def processes_of_session(session: int) -> list[str]:
    """Command lines of the live processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(command)
    return found


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_resumes_and_equals_an_undisturbed_one(
    run_conformance: Run, suites: Suites, tmp_path: Path, environment: dict[str, str], workers: str
) -> None:
    suites.write(*(f"out{n}" for n in range(14)))
    common = ["run", "suites", "-t", "reference", "-t", SLOW, "-t", LYING, "--no-report"]
    lies = {"LIES": "out3,out9"}
    undisturbed = run_conformance(*common, "--out", "whole.jsonl", env=lies | {"FAKE_SECONDS": "0"})
    assert undisturbed.returncode == 1

    cut = tmp_path / "cut.jsonl"
    running = subprocess.Popen(
        [sys.executable, "-m", "conformance", *common, "--out", str(cut), "-n", workers, "-v"],
        cwd=tmp_path,
        env=environment | lies | {"FAKE_SECONDS": "0.3"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert running.stderr is not None
    printed = []
    for line in running.stderr:
        if line.startswith("pass "):
            printed.append(line.split()[1])
        if len(printed) == 18:  # the reference's 14, which come first, and some of the slow target's
            break
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stderr.close()
    wait_for(lambda: not processes_of_session(running.pid), 30)

    before = runfile.read(cut)
    assert set(printed) <= {f"{r.suite}::{r.case}" for r in before.results}
    kept = [r.key for r in before.results if r.target == "reference"]
    assert kept
    assert before.footer is None
    with cut.open("ab") as file:
        file.write(b'{"type": "result", "suite": "parser/de')  # as a crash in mid-line leaves it
    env = lies | {"FAKE_SECONDS": "0"}
    resumed = run_conformance(*common, "--resume", "cut.jsonl", "-n", workers, env=env)
    assert resumed.returncode == 1, resumed.stderr
    written = [r.key for r in runfile.read(cut).results]
    assert all(written.count(key) == 1 for key in kept)
    whole, again = runfile.read(tmp_path / "whole.jsonl"), runfile.read(cut)
    assert again.torn == ""
    assert comparable(whole) == comparable(again)
    assert again.footer is not None
    assert whole.footer is not None
    assert again.footer.counts == whole.footer.counts


def comparable(run: runfile.Run) -> dict[object, object]:
    return {key: r.model_dump(exclude={"duration"}) for key, r in sorted(run.latest().items())}


def test_resume_without_arguments_repeats_the_selection(run_conformance: Run, tmp_path: Path) -> None:
    address = next(case.address for case in load_suites().cases if case.suite.suite.kind == "parser")
    first = run_conformance("run", address, "-t", "reference", "--out", "r.jsonl", "--no-report")
    path = tmp_path / "r.jsonl"
    header = path.read_text().splitlines(keepends=True)[0]
    path.write_text(header)
    done = run_conformance("run", "--resume", "r.jsonl", "--no-report", "--json")
    assert done.returncode == first.returncode
    assert validated("run", done)["planned"] == 1
    assert [f"{r.suite}::{r.case}" for r in runfile.read(path).results] == [address]


def test_resume_without_arguments_finds_own_suites(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    demo = suites.write("hello", "bye")
    first = run_conformance("run", f"{demo}::case-hello", "-t", HONEST, "--out", "r/r.jsonl", "--no-report")
    assert first.returncode == 0, first.stderr
    path = tmp_path / "r" / "r.jsonl"
    assert "paths" in json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "r").rename(moved / "r")
    suites.root.rename(moved / "suites")
    again = ("run", "--resume", "moved/r/r.jsonl", "--no-report")
    done = run_conformance(*again, "--json")
    assert done.returncode == 0, done.stderr
    summary = validated("run", done)
    assert (summary["planned"], summary["complete"]) == (1, True)
    assert [row["target"] for row in summary["areas"]] == [HONEST]
    file = moved / "suites" / "parser" / "demo.yaml"
    file.write_text(file.read_text().replace("Made by a test.", "Changed by a test."))
    refused = run_conformance(*again)
    assert_one_clear_error(refused, f"the suite parser/demo ({file}) has changed since the run")
    assert "conformance run CASES --resume moved/r/r.jsonl" in refused.stderr
    assert run_conformance("run", "moved/suites", *again[1:]).returncode == 0
    file.unlink()
    assert_one_clear_error(run_conformance(*again), "which is gone; name the cases")


def test_a_resumed_part_does_not_turn_the_run_green(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    demo = suites.write("hello", "bye")
    common = ("-t", HONEST, "--no-report", "--json")
    run_conformance("run", "suites", *common, "--out", "r.jsonl", env={"LIES": "bye"})
    done = run_conformance("run", f"{demo}::case-hello", *common, "--resume", "r.jsonl")
    summary = validated("run", done)
    assert done.returncode == summary["exit_code"] == 1
    assert summary["areas"][0]["counts"] == {"pass": 1, "fail": 1}


OWN_TARGETS = """
from pathlib import Path
from lying_targets import Honest
from conformance.targets.protocol import ParseResult

class Huge(Honest):
    def parse(self, request):
        return ParseResult(content="x" * (34 * 2**20))

class Sabotage(Honest):
    def parse(self, request):
        Path("site").mkdir(exist_ok=True)
        Path("site/mine.txt").touch()
        return super().parse(request)
"""


def test_a_huge_answer_leaves_the_run_readable(run_conformance: Run, suites: Suites, tmp_path: Path) -> None:
    demo = suites.write("hello")
    (tmp_path / "own_targets.py").write_text(OWN_TARGETS)
    done = run_conformance("run", "suites", "-t", "own_targets:Huge", "--out", "r.jsonl")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr) < 20_000
    assert (tmp_path / "r.jsonl").stat().st_size < 1_000_000
    (result,) = runfile.read(tmp_path / "r.jsonl").results
    assert {s.length for s in result.shortened} == {34 * 2**20}
    shown = run_conformance("show", f"{demo}::case-hello", "--run", "r.jsonl")
    assert shown.returncode == 0
    assert len(shown.stdout) < 20_000


def test_the_summary_does_not_depend_on_the_site(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello")
    (tmp_path / "own_targets.py").write_text(OWN_TARGETS)
    common = ("run", "suites", "-t", "own_targets:Sabotage", "--site", "site")
    done = run_conformance(*common)
    assert done.returncode == 2
    assert "exit code 0: 1 passed" in done.stdout
    assert "holds files that are not a dashboard" in done.stderr
    (tmp_path / "site" / "mine.txt").unlink()
    summary = validated("run", run_conformance(*common, "--json"))
    assert (summary["site"], summary["areas"][0]["counts"]) == (None, {"pass": 1})


def test_the_console_script_finds_modules_of_the_folder(
    suites: Suites, tmp_path: Path, environment: dict[str, str]
) -> None:
    suites.write("hello")
    (tmp_path / "own_targets.py").write_text(OWN_TARGETS)
    script = tmp_path / "bin" / "conformance"
    script.parent.mkdir()
    script.write_text("from conformance.cli import main\nmain()\n")
    for workers in ("0", "2"):
        done = subprocess.run(
            [sys.executable, script, "run", "suites", "-t", "own_targets:Huge", "-n", workers, "--no-report"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "exit code 1: 1 failed" in done.stdout


def test_a_named_known_failure_is_explained(run_conformance: Run, suites: Suites) -> None:
    demo = suites.write("hello", "bye")
    where = suites.expect(
        "  - cases: [parser/demo::case-hello, parser/demo::case-bye]\n    rules: [expected]\n"
        "    reason: It always lies.\n    source: R02\n    repeat: conformance run …\n"
        "    review: 2099-01-01\n",
        LYING,
    )
    options = ("-t", LYING, "--no-report")
    one = run_conformance("run", f"{demo}::case-hello", *options)
    assert one.returncode == 0
    assert one.stdout.splitlines()[-1] == "exit code 0: 1 expected failure"
    assert one.stderr.splitlines()[0] == f"1 case on {LYING}"
    assert f"parser/demo::case-hello on {LYING} failed as expected: It always lies." in one.stderr
    assert "[expected] content differs (whole answer)" in one.stderr
    assert f"expectation: suites/expectations/{where.name}:3" in one.stderr
    assert "failed as expected" not in run_conformance("run", "suites", *options).stderr
    both = run_conformance("run", "suites", *options, "-v")
    assert both.stderr.count("failed as expected: It always lies.") == 2
    assert both.stdout.splitlines()[-1] == "exit code 0: 2 expected failures"


def test_a_streamed_problem_says_so() -> None:
    cut = Chunking(name="one", unit="characters", cuts=(1,))
    streamed = Problem(rule="indices", message="wrong", chunking=cut, chunks=("a", "b"))
    assert explain_problem(streamed, "parser")[0] == "[indices] wrong (streamed by characters: one)"
    assert explain_problem(streamed.model_copy(update={"chunking": None}), "template")[0] == "[indices] wrong"


def test_the_dashboard_links_its_numbers_of_cases(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("hello", "bye")
    run_conformance("run", "suites", "-t", HONEST, "--site", "site", env={"LIES": "bye"})
    index = (tmp_path / "site" / "index.html").read_text()
    assert '<a href="#suites">2 cases</a>' in index
    assert re.search(r'<a href="suites/[a-z-]+\.html#cases">1 pass</a>, <a href="suites/', index)


def test_an_interrupt_says_how_to_go_on(suites: Suites, tmp_path: Path, environment: dict[str, str]) -> None:
    cases = [f"case-{number}" for number in range(20)]  # more than a busy machine gets through meanwhile
    suites.write(*cases)
    running = subprocess.Popen(
        [sys.executable, "-m", "conformance", "run", "suites", "-t", SLOW, "--no-report", "-v"],
        cwd=tmp_path,
        env=environment | {"FAKE_SECONDS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("pass "):
            break
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 2
    (path,) = (tmp_path / "runs").iterdir()
    again = f"go on with: conformance run --resume runs/{path.name}\n"
    assert f"interrupted; {again}" in err
    assert f"The run is not complete; {again}" in out
    done = len(runfile.read(path).results)
    assert f"exit code 2: {done} passed, {len(cases) - done} not run" in out
    assert "Traceback" not in err


def test_a_terminal_gets_a_live_display(suites: Suites, tmp_path: Path, environment: dict[str, str]) -> None:
    suites.write("hello", "bye")
    controller, terminal = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-m", "conformance", "run", "suites", "-t", SLOW, "--no-report"],
        cwd=tmp_path,
        env=environment | {"TERM": "xterm", "FAKE_SECONDS": "0.4"},
        stderr=terminal,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(controller, 65536)
        except OSError:  # the terminal closes with its last process
            break
    out, _ = running.communicate(timeout=60)
    os.close(controller)
    assert running.returncode == 0
    text = shown.decode(errors="replace")
    assert "2/2" in text
    assert "case-bye" in text
    assert "2 passed" in text
    assert "2 passed" in out


# ---------------------------------------------------------------------------- order and seeds


def test_a_shuffled_run_has_another_order_and_the_same_verdicts(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write(*(f"out{n}" for n in range(8)))
    common = ["run", "suites", "-t", HONEST, "-t", LYING, "--no-report"]
    orders = []
    for name, options in {
        "a": [],
        "b": ["--shuffle", 1],
        "c": ["--shuffle", 1],
        "d": ["--shuffle", 2],
    }.items():
        done = run_conformance(*common, *options, "--out", f"{name}.jsonl")
        assert done.returncode == 1
        run = runfile.read(tmp_path / f"{name}.jsonl")
        orders.append([result.key for result in run.results])
        assert {r.key: r.verdict for r in run.results} == {
            (suite, case, target): "fail" if target == LYING else "pass" for suite, case, target in orders[0]
        }
    plain, first, again, second = orders
    assert first == again
    assert len({tuple(order) for order in (plain, first, second)}) == 3
    targets = [target for _, _, target in first]
    assert targets == sorted(targets, key=targets.index), "one engine after the other"


def test_a_failure_under_a_seed_is_repeated_with_it(
    run_conformance: Run, suites: Suites, tmp_path: Path
) -> None:
    suites.write("one")
    run_conformance("run", "suites", "-t", LYING, "--no-report", "--out", "r.jsonl", "--seed", 7)
    (result,) = runfile.read(tmp_path / "r.jsonl").results
    assert result.repeat.endswith(" --seed 7")
