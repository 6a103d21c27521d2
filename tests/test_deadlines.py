"""The alarm of tests that start processes: who gets it, and what it does."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.deadlines import ENGINES, OWN, limit_of

RANKS = [sys.executable, "-P", "-m", "model_impl.parallel.starter", "5", "6"]
WORKER = "conformance.worker"


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        (RANKS, OWN),
        ([sys.executable, "-m", WORKER], OWN),
        ([Path(sys.executable), "-m", f"{WORKER}.guardian"], OWN),
        (["/elsewhere/bin/python", "-m", WORKER], ENGINES),
        ([sys.executable, "-m", "conformance", "run"], None),
        (["git", "status"], None),
        ("python -m model_impl.parallel.starter", None),
    ],
)
def test_what_has_a_deadline(command: list[object] | str, limit: float | None) -> None:
    assert limit_of(command) == limit


HANGING = """
import subprocess, sys, time
import pytest

def start():
    sleep = "import time; time.sleep(20)"
    return subprocess.Popen([sys.executable, "-c", sleep, "model_impl.parallel.starter"])
"""
SESSION = "from tests import deadlines\ndeadlines.OWN = 2.0\nfrom tests.conftest import pytest_configure\n"


def outcomes(run_pytest: Run, folder: Path, tests: str) -> tuple[list[str], str]:
    """PASSED or FAILED of each test, in order, in a session whose limit is two seconds."""
    (folder / "conftest.py").write_text(SESSION)
    (folder / "test_it.py").write_text(HANGING + textwrap.dedent(tests))
    done = run_pytest("-p", "pytest_timeout", "-rA", ".")
    lines = [
        line.split(" ")[0] for line in done.stdout.splitlines() if line.startswith(("PASSED ", "FAILED "))
    ]
    return sorted(lines), done.stdout


def test_a_test_that_waits_for_ranks_is_ended_and_others_go_on(run_pytest: Run, tmp_path: Path) -> None:
    tests = """
    def test_waits():
        with start() as process:
            try:
                process.wait()
            finally:
                process.kill()

    def test_behind_it():
        assert True
    """
    found, said = outcomes(run_pytest, tmp_path, tests)
    assert found == ["FAILED", "PASSED"], said
    assert "Timeout" in said


def test_processes_of_a_fixture_count_for_every_test_that_has_them(run_pytest: Run, tmp_path: Path) -> None:
    tests = """
    @pytest.fixture(scope="module")
    def ranks():
        process = start()
        yield process
        process.kill()
        process.wait()

    def test_first(ranks):
        assert ranks.poll() is None

    def test_second(ranks):
        ranks.wait()
    """
    found, said = outcomes(run_pytest, tmp_path, tests)
    assert found == ["FAILED", "PASSED"], said


def test_a_limit_of_its_own_counts(run_pytest: Run, tmp_path: Path) -> None:
    tests = """
    @pytest.mark.timeout(60)
    def test_takes_long():
        with start() as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3)
            process.kill()

    def test_without_processes_takes_long():
        time.sleep(0.1)
    """
    found, said = outcomes(run_pytest, tmp_path, tests)
    assert found == ["PASSED", "PASSED"], said
