"""What processes that work side by side are told of the machine they share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conformance import shares
from conformance.execute import Job, LocalExecutor
from tests.conftest import Run, Suites

NAMES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS")
TEST = """\
import json, os, pathlib, pytest

def test_it(request):
    config = request.config
    seen = {name: os.environ.get(name) for name in %r}
    pathlib.Path("worker.json").write_text(json.dumps(seen))
"""
AFTERWARDS = """\
import json, os, pathlib, pytest

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        pathlib.Path("controller.json").write_text(os.environ["OMP_NUM_THREADS"])

@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        pathlib.Path("afterwards.json").write_text(json.dumps([name for name in %r if name in os.environ]))
"""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(("workers", "threads"), [(1, None), (2, "1"), (9, "1")])
def test_who_is_not_alone_has_one_thread(workers: int, threads: str | None) -> None:
    found = shares.variables(workers)
    assert found.get("OMP_NUM_THREADS") == threads
    assert set(found) - {"OMP_NUM_THREADS"} == set(NAMES) - {"OMP_NUM_THREADS"}


@pytest.mark.usefixtures("unset")
def test_what_is_set_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert list(shares.variables(2)) == ["MALLOC_MMAP_THRESHOLD_"]


@pytest.mark.usefixtures("unset")
def test_workers_of_pytest_get_their_share(run_pytest: Run, suites: Suites, tmp_path: Path) -> None:
    suites.write("hello")
    (tmp_path / "test_it.py").write_text(TEST % (NAMES,))
    (tmp_path / "conftest.py").write_text(AFTERWARDS % (NAMES,))
    arguments = ("suites", "test_it.py", "--target", "lying_targets:Honest")
    done = run_pytest(*arguments, "-n", "2", "--conformance-run", "run.jsonl")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "worker.json").read_text()) == shares.variables(2)
    assert (tmp_path / "controller.json").read_text() == "1"
    assert json.loads((tmp_path / "afterwards.json").read_text()) == []
    header = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])
    assert header["environment"]["env:OMP_NUM_THREADS"] == "1"

    # Neither a process that is alone nor a project without suites.
    for others in ((*arguments,), ("test_it.py", "-n", "2")):
        (tmp_path / "conftest.py").unlink(missing_ok=True)
        assert run_pytest(*others).returncode == 0
        assert set(json.loads((tmp_path / "worker.json").read_text()).values()) == {None}, others

    # With another number of processes it is the same run all the same.
    resumed = run_pytest("suites", "--target", "reference", "-n", "2", "--conformance-run", "many.jsonl")
    assert resumed.returncode == 0
    assert run_pytest("suites", "--target", "reference", "--resume", "many.jsonl").returncode == 0
    results = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
    assert [line["type"] for line in results].count("result") == 1


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_get_their_share_and_keep_what_is_theirs(workers: int, tmp_path: Path) -> None:
    class Printing(Job):
        def command(self, run_file: Path | None = None) -> list[str]:
            return [sys.executable, "-c", f"import os; print([os.environ.get(n) for n in {NAMES!r}])"]

    jobs = [
        Printing("as-it-is", (), tmp_path / "a"),
        Printing("its-own", (), tmp_path / "b", environment=(("OMP_NUM_THREADS", "5"),)),
    ]
    found = {ended.job.name: ended.tail.strip() for ended in LocalExecutor(workers).run(jobs)}
    wanted = shares.variables(workers)
    assert found["as-it-is"] == str([wanted.get(name) for name in NAMES])
    assert found["its-own"] == str([(wanted | {"OMP_NUM_THREADS": "5"}).get(name) for name in NAMES])
