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

import pytest

from conformance import runfile
from conformance.cli import invoke
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
WITHOUT_RAY = importlib.util.find_spec("ray") is None


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ray_worker_above(pid: int) -> int:
    """The Ray worker that a process descends from."""
    while pid > 1:
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            return pid
        pid = parent(pid)
    raise AssertionError("the cell does not run in a Ray worker")


@pytest.mark.skipif(WITHOUT_RAY, reason="Ray is not installed; pip install 'gemma4-conformance[ray]'")
def test_cells_run_on_a_cluster_and_a_killed_worker_costs_an_attempt(tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    flag = tmp_path / "flag"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_", "RAY_"))}
    variables = kept | {
        "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
        "TEST_MARK": "ray",
        "OMP_NUM_THREADS": "1",
        "WAITS_FOR_ITS_END": str(flag),
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


@pytest.mark.skipif(not WITHOUT_RAY, reason="Ray is installed")
def test_without_ray_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.setenv("WAITS_FOR_ITS_END", str(tmp_path / "flag"))
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    command = ["matrix", "run", "*Waits+scripted", "--matrix", "matrix.yaml", "--out", "cells"]
    assert invoke([*command, "--executor", "ray"]) == 2
    assert "Ray is not installed; pip install 'gemma4-conformance[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()
