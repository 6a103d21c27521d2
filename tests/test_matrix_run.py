"""Cells through the front door: what runs, what cannot, what did not get its layout, dies or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conformance import matrix as matrices
from conformance import runfile
from conformance.cli import invoke
from conformance.commands.schema import schemas
from conformance.errors import RunFileError
from conformance.execute import CellRunner, Ended, Job
from conformance.results import Run
from tests.conftest import ROOT, TESTS
from tests.processes import survivors

pytestmark = pytest.mark.xdist_group("matrix-run")  # its fixtures take long: one process makes them

MATRIX = """
title: Targets of a test
targets:
  matrix_targets:Obedient: {features: [tensor-parallel, pipeline-parallel]}
  matrix_targets:Deaf: {features: [pipeline-parallel]}
  matrix_targets:Single: {}
  matrix_targets:Dies: {features: [pipeline-parallel]}
  matrix_targets:Hangs: {features: [pipeline-parallel]}
checkpoints:
  scripted: {cases: ["generation/scripted::one-alone", "generation/scripted::cut"]}
axes:
  attention:
    own: {}
    cuda-attn: {attention: FLASH_ATTN, of: ["*:Obedient"], needs: cuda}
  layout:
    single: {}
    pp2: {pipeline_parallel: 2}
tiers:
  all: {}
"""
CASES = {"one-alone", "cut"}
CELLS = ("Obedient+scripted+pp2", "Obedient+scripted+cuda-attn", "Deaf+scripted+pp2", "Single+scripted+pp2")
Ran = tuple[Path, dict[str, Any]]


def arguments(*more: object) -> list[str]:
    return [sys.executable, "-m", "conformance", "matrix", "run", *map(str, more)]


def unique(mark: str) -> str:
    """Another test process may run the same fixture at the same time."""
    return f"{mark}-{os.getpid()}"


def variables(mark: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_"))}
    return kept | {
        "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
        "TEST_MARK": unique(mark),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Cells that run, cannot run, are not obeyed, and die: their folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "matrix.yaml").write_text(MATRIX)
    cells = [*(f"*:{name}" for name in CELLS), "*:Dies+scripted"]
    done = subprocess.run(
        arguments(*cells, "--matrix", "matrix.yaml", "--out", "cells", "--json"),
        cwd=folder,
        env=variables("ran"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    jsonschema.Draft202012Validator(schemas()["matrix-run"]()).validate(found)
    rows = {row["id"].partition(":")[2]: row for row in found["cells"]}
    assert list(rows) == [*CELLS[:1], CELLS[1], *CELLS[2:], "Dies+scripted"]  # in the order of the file
    return folder, rows


def run_of(ran: Ran, cell: str) -> Run:
    return runfile.read(ran[0] / ran[1][cell]["run_file"])


def test_a_cell_runs_its_cases_with_its_settings(ran: Ran) -> None:
    row = ran[1]["Obedient+scripted+pp2"]
    assert (row["verdict"], row["counts"], row["reason"]) == ("pass", {"pass": 2}, "")
    run = run_of(ran, "Obedient+scripted+pp2")
    assert run.header.cell is not None
    assert run.header.cell.id == "matrix_targets:Obedient+scripted+pp2"
    assert run.header.cell.axes["layout"] == "pp2"
    assert run.header.cell.settings == {"pipeline_parallel": 2}
    assert {result.case for result in run.results} == CASES
    for result in run.results:
        assert result.evidence.got["effective"]["pipeline_parallel"] == "2"
        assert "--cell matrix_targets:Obedient+scripted+pp2 --matrix " in result.repeat
    assert run.footer is not None


def test_a_layout_that_was_asked_for_and_not_used_is_an_error(ran: Ran) -> None:
    row = ran[1]["Deaf+scripted+pp2"]
    assert (row["verdict"], row["counts"]) == ("error", {"error": 2})
    assert row["reason"] == "pipeline_parallel '2' was asked for and '1' ran"


def test_a_backend_without_its_gpu_is_counted_as_not_run(ran: Ran) -> None:
    row = ran[1]["Obedient+scripted+cuda-attn"]
    assert (row["verdict"], row["counts"]) == ("not run", {"skip": 2})
    assert row["reason"] == "needs CUDA, and PyTorch finds none here"
    run = run_of(ran, "Obedient+scripted+cuda-attn")
    assert {result.verdict for result in run.results} == {"skip"}
    assert run.footer is not None
    assert run.footer.exit_code == 0


def test_what_a_target_cannot_do_is_not_run_by_its_own_word(ran: Ran) -> None:
    row = ran[1]["Single+scripted+pp2"]
    assert (row["verdict"], row["counts"]) == ("not run", {"skip": 2})
    assert row["reason"] == "matrix_targets:Single cannot generate with pipeline-parallel"


def test_every_case_of_a_cell_that_died_is_an_error(ran: Ran) -> None:
    row = ran[1]["Dies+scripted"]
    assert (row["verdict"], row["counts"]) == ("error", {"error": 2})
    assert "the cell's process ended with exit code 7" in row["reason"]
    run = run_of(ran, "Dies+scripted")
    assert {result.case for result in run.results} == CASES
    assert run.footer is not None
    assert run.footer.exit_code == 1


def test_nothing_stays_running(ran: Ran) -> None:
    assert survivors(unique("ran")) == set()


def test_complete_cells_are_kept_and_others_gone_on_with(ran: Ran) -> None:
    """One file loses its last two lines, as if it had been killed: only that case runs again."""
    folder, rows = ran
    path = folder / rows["Obedient+scripted+pp2"]["run_file"]
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    done = subprocess.run(
        arguments(*(f"*:{n}" for n in CELLS), "--matrix", "matrix.yaml", "--out", "cells", "--resume"),
        cwd=folder,
        env=variables("resumed"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1  # the deaf one
    assert "Obedient+scripted+pp2: pass (2 passed" in done.stdout
    run = runfile.read(path)
    assert run.header.resumed_from == run.header.run_id
    assert {result.case for result in run.results} == CASES
    assert run.footer is not None


def test_a_cell_over_its_limit_is_a_timeout_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    done = subprocess.run(
        arguments("*:Hangs+scripted", "--matrix", "matrix.yaml", "--out", "cells", "--limit", 20, "--json"),
        cwd=tmp_path,
        env=variables("hangs"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (row,) = json.loads(done.stdout)["cells"]
    assert (row["verdict"], row["counts"]) == ("timeout", {"timeout": 2})
    assert row["reason"] == "the cell was not done within 20 s"
    assert survivors(unique("hangs")) == set()


def test_nothing_stays_when_the_command_is_killed(tmp_path: Path) -> None:
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    process = subprocess.Popen(
        arguments("*:Hangs+scripted", "--matrix", "matrix.yaml", "--out", "cells"),
        cwd=tmp_path,
        env=variables("killed"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        path = tmp_path / "cells" / "matrix_targets_Hangs+scripted.jsonl"
        deadline = time.monotonic() + 120
        while not (path.exists() and path.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.kill()
        process.wait(30)
    finally:
        process.kill()
        process.communicate()
    assert survivors(unique("killed")) == set()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["nothing*"], "'nothing*' matches no cell"),
        (["--tier", "pr"], "no tier 'pr'; there are all"),
        (["--shard", "2"], "--shard 2: write it as 1/4"),
        (["--shard", "3/2"], "shard 3/2: the number is between 1 and 2"),
        (["--resume"], "--resume goes on in a folder; name it with --out"),
        (["--out", "here"], "exists; go on with it by --resume"),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TESTS)
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "matrix_targets_Single+scripted.jsonl").write_text("")
    assert invoke(["matrix", "run", "--matrix", "matrix.yaml", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Failing:
    """Runs nothing; every process ends with exit code 9."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        for job in jobs:
            self.jobs.append(job)
            yield Ended(job, 9, 1.0, "")


Single = tuple[Path, Callable[[], tuple[str, str, int]]]


@pytest.fixture
def single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Single:
    """The run file of a cell, and how to resume it: how its process is begun, verdict, number of jobs."""
    monkeypatch.syspath_prepend(TESTS)
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    loaded = matrices.load(tmp_path / "matrix.yaml")
    (cell,) = loaded.select(["*:Single+scripted"])
    path = tmp_path / cell.file_name

    def resume() -> tuple[str, str, int]:
        executor = Failing()
        (found,) = CellRunner(loaded, tmp_path, lambda: executor, resume=True).run([cell])
        begun = {option for job in executor.jobs for option in job.arguments} & {"--out", "--resume"}
        return "".join(begun), found.verdict, len(executor.jobs)

    return path, resume


def test_resuming_leaves_a_file_that_it_cannot_read(single: Single) -> None:
    """One line in its middle is of another harness: what the other lines hold must not be lost."""
    path, resume = single
    assert resume() == ("--out", "error", 1)
    header, *results = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([header, b'{"type": "new"}\n', *results])
    path.write_bytes(damaged)
    with pytest.raises(RunFileError, match=r"Single\+scripted\.jsonl:2: .*not a run file of this version"):
        resume()
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"", b'{"type": "header", "run_i'])
def test_a_file_in_which_no_run_has_begun_is_begun_anew(single: Single, content: bytes) -> None:
    path, resume = single
    path.write_bytes(content)
    assert resume() == ("--out", "error", 1)
    assert runfile.read(path).footer is not None


def test_resuming_leaves_a_file_that_another_run_begins(single: Single) -> None:
    path, resume = single
    with runfile.RunWriter(path):
        with pytest.raises(RunFileError, match="is being written by another run"):
            resume()
        assert path.exists()


def test_a_cell_that_could_not_run_is_asked_again_once_it_can(
    single: Single, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, resume = single
    with monkeypatch.context() as patched:
        patched.setattr("conformance.execute.cannot_run", lambda cell: "it is not installed")
        assert resume() == ("", "not run", 0)
        assert resume() == ("", "not run", 0)
    assert resume()[::2] == ("--resume", 1)


def test_check_names_the_cells_that_were_lost(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran[0])
    assert invoke(["matrix", "check", "cells", "--matrix", "matrix.yaml", "--tier", "all", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schemas()["matrix-check"]()).validate(found)
    missing = {cell.partition(":")[2] for cell in found["missing"]}
    assert missing.isdisjoint(ran[1])
    assert {"Hangs+scripted", "Hangs+scripted+pp2"} <= missing
    assert found["cells"] == len(missing) + len(ran[1])


def test_measured_cells_are_written_down_and_those_that_did_not_run_are_not(
    ran: Ran, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran[0])
    assert invoke(["matrix", "measure", "cells", "--matrix", "matrix.yaml"]) == 0
    kept = json.loads((ran[0] / "durations.json").read_text())
    assert set(kept) == {
        f"matrix_targets:{name}" for name in ("Obedient+scripted+pp2", "Deaf+scripted+pp2", "Dies+scripted")
    }
    assert "3 cells measured" in capsys.readouterr().out
