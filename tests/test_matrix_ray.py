"""Cells on a local Ray cluster, one of whose workers is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance import runfile
from conformance.cli import invoke
from conformance.execute import Ended, Job
from conformance.ray_executor import RayExecutor, _Files, _run_cell
from tests.conftest import ROOT, TESTS
from tests.processes import survivors

MATRIX = """
title: Cells on a cluster
targets:
  matrix_targets:Waits: {features: [pipeline-parallel]}
  matrix_targets:Deaf: {features: [pipeline-parallel]}
checkpoints:
  scripted: {cases: ["generation/scripted::one-alone"]}
axes:
  attention: {own: {}}
  layout: {single: {}, pp2: {pipeline_parallel: 2}}
tiers: {all: {}}
"""


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ray_worker_above(pid: int) -> int:
    """The Ray worker that a process descends from."""
    while pid > 1:
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            return pid
        pid = parent(pid)
    raise AssertionError("the cell does not run in a Ray worker")


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is missing: the extra [dev] brings it, and this skip is permitted nowhere",
)
def test_cells_run_on_a_cluster_and_a_killed_worker_costs_an_attempt(tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    flag = tmp_path / "flag"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_", "RAY_"))}
    variables = kept | {
        "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
        "TEST_MARK": "ray",
        "OMP_NUM_THREADS": "1",
        "WAITS_FOR_ITS_END": str(flag),
        # Ray ends workers where memory is short; here one is to be killed by the test alone.
        "RAY_memory_monitor_refresh_ms": "0",
    }
    cells = ["*Waits+scripted", "*Deaf+scripted+pp2"]
    command = [sys.executable, "-m", "conformance", "matrix", "run", *cells, "--matrix", "matrix.yaml"]
    command += ["--out", "cells", "--executor", "ray", "-n", "1", "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while not flag.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(ray_worker_above(int(flag.read_text())), signal.SIGKILL)
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1, errors  # the deaf one
    rows = {row["id"].partition(":")[2]: row for row in json.loads(output)["cells"]}
    assert (rows["Waits+scripted"]["verdict"], rows["Waits+scripted"]["attempts"]) == ("pass", 2)
    deaf = rows["Deaf+scripted+pp2"]
    assert (deaf["verdict"], deaf["attempts"]) == ("error", 1)
    assert deaf["reason"] == "pipeline_parallel '2' was asked for and '1' ran"
    for row in rows.values():
        run = runfile.read(tmp_path / row["run_file"])
        assert run.footer is not None
        assert run.header.cell is not None
    assert survivors("ray") == set()


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


def fake_ray(outcomes: list[object]) -> SimpleNamespace:
    """A cluster on which every task ends at once, as the next of these says: an error, or what it returns."""
    return SimpleNamespace(
        init=lambda **options: None,
        shutdown=lambda: None,
        remote=lambda **options: lambda function: SimpleNamespace(remote=lambda *arguments: object()),
        wait=lambda references, **options: (references[:1], references[1:]),
        get=lambda reference: raised_or_given(outcomes.pop(0)),
        exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
    )


def raised_or_given(outcome: object) -> object:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.mark.parametrize(
    ("outcomes", "lost", "attempts"),
    [
        (
            [RayTaskError("ray::_run_cell()\nOSError: no space is left")],
            "could not run it: OSError: no space",
            1,
        ),
        ([RayError("gone"), RayError("gone again\nmore")], "its worker died 2 times: gone again", 2),
    ],
)
def test_an_error_of_a_worker_is_told_from_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list[object], lost: str, attempts: int
) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake_ray(outcomes))
    (ended,) = RayExecutor().run([Job("a", (), tmp_path / "a.jsonl")])
    assert lost in ended.lost
    assert (ended.attempts, outcomes) == (attempts, [])


def test_a_cell_that_waits_for_a_worker_is_not_over_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster runs one at a time, each nearly up to its limit; of the last one nothing is heard."""
    now = [0.0]
    jobs = [Job(name, (), tmp_path / name, limit=1000.0) for name in "abc"]
    answered = [(Ended(job, 0, 900.0, ""), None) for job in jobs[:2]]
    ray = fake_ray(list(answered))
    ray.cancel = lambda reference, force: None

    def wait(references: list[object], **options: object) -> tuple[list[object], list[object]]:
        now[0] += 900.0
        return (references[:1], references[1:]) if len(references) > 1 else ([], references)

    ray.wait = wait
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("conformance.ray_executor.time", SimpleNamespace(monotonic=lambda: now[0]))
    first, second, last = RayExecutor(3).run(jobs)
    assert (first.lost, second.lost) == ("", "")
    assert last.lost == "no worker answered for the cell, nor for another one, for 1800 s"


def test_the_matrix_goes_with_the_task_and_repeat_lines_name_it_as_it_is_called_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = tmp_path / "of mine" / "matrix.yaml"
    matrix.parent.mkdir()
    matrix.write_text(MATRIX)
    arguments = ("run", "--cell", "a", "--matrix", "{matrix}", "--out", "{}")
    job = Job("a", arguments, tmp_path / "a.jsonl", matrix=matrix)
    files = _Files.of(job)
    matrix.unlink()  # a worker has no such file

    def run_process(there: Job) -> Ended:
        named = there.command()[there.command().index("--matrix") + 1]
        assert Path(named).read_text() == MATRIX
        there.run_file.write_text(json.dumps({"repeat": f"conformance run --matrix {named}"}))
        return Ended(there, 0, 1.0, "")

    monkeypatch.setattr("conformance.ray_executor.run_process", run_process)
    ended, content = _run_cell(job, files)
    assert ended.job == job
    assert content is not None
    assert json.loads(content) == {"repeat": f"conformance run --matrix '{matrix}'"}


def test_without_ray_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what `import` takes for missing
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.setenv("WAITS_FOR_ITS_END", str(tmp_path / "flag"))
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    command = ["matrix", "run", "*Waits+scripted", "--matrix", "matrix.yaml", "--out", "cells"]
    assert invoke([*command, "--executor", "ray"]) == 2
    assert "Ray is not installed; pip install 'gemma4-conformance[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()
