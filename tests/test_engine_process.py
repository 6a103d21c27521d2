"""An engine in a fork of its worker: kept, ended with all it started, and no danger to the worker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.errors import EngineError, TargetTimeoutError, WorkerDiedError
from conformance.targets import process
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import GenerateRequest
from conformance.worker.engine_process import root_cause
from tests.adapters.forking_adapter import LOG
from tests.processes import survivors

TESTS = Path(__file__).parent


@pytest.fixture
def mark() -> Iterator[str]:
    value = uuid.uuid4().hex
    yield value
    assert not survivors(value), "the test left processes behind"


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """Where an engine that was closed in good order says so."""
    return tmp_path / "closed"


@pytest.fixture
def target(mark: str, closed: Path) -> Iterator[WorkerTarget]:
    opened = WorkerTarget(
        "forking@1",
        python=Path(sys.executable),
        adapter="adapters.forking_adapter",
        timeout=20.0,
        import_paths=[TESTS],
        environment={"TEST_MARK": mark, "TEST_CLOSED": str(closed)},
    )
    yield opened
    opened.close()


def request(word: str) -> GenerateRequest:
    return GenerateRequest(checkpoint=word, prompts=((1,),), max_new_tokens=1)


def ask(target: WorkerTarget, word: str = "echo") -> dict[str, str]:
    return target.generate(request(word)).effective


def alive(pid: str) -> bool:
    """Whether a process runs; one that has ended and was not asked for its code yet does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_an_engine_is_kept(target: WorkerTarget) -> None:
    first = ask(target)
    second = ask(target)
    assert first["self"] not in (first["worker"], str(os.getpid()))
    assert (second["self"], second["count"], first["count"]) == (first["self"], "2", "1")
    assert first["group"] == first["self"], "it leads a group of its own"
    assert alive(first["helper"])


def test_its_temporary_files_go_with_the_worker(target: WorkerTarget) -> None:
    folder = Path(ask(target)["temporary"])
    assert folder.is_dir()
    scratch = folder.parent
    assert scratch.name.startswith("conformance-")
    target.close()
    assert not scratch.exists()


PARENT = """
import sys
from pathlib import Path
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import GenerateRequest
folder, mark = sys.argv[1:]
target = WorkerTarget(
    "forking@1", python=Path(sys.executable), adapter="adapters.forking_adapter", import_paths=[Path(folder)],
    environment={"TEST_MARK": mark, "TEST_CLOSED": "/dev/null"},
)
request = GenerateRequest(checkpoint="socket", prompts=((1,),), max_new_tokens=1)
print(target.generate(request).effective["socket"], flush=True)
target.generate(request.model_copy(update={"checkpoint": "hang"}))
"""


def test_nothing_of_an_engine_outlives_a_killed_harness(mark: str) -> None:
    # pytest's own folders have names too long for a socket.
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:
        environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "TMPDIR": temporary}
        command = [sys.executable, "-c", PARENT, str(TESTS), mark]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
            assert parent.stdout is not None
            socket = Path(parent.stdout.readline().strip())
            assert socket.is_socket()
            assert Path(temporary) in socket.parents
            time.sleep(0.3)
            parent.kill()
        assert not survivors(mark)
        assert list(Path(temporary).iterdir()) == []


def test_closing_ends_all_it_started_and_the_worker_goes_on(target: WorkerTarget) -> None:
    first = ask(target)
    ask(target, "close")
    assert not alive(first["self"])
    assert not alive(first["helper"])
    second = ask(target)
    assert (second["worker"], second["count"]) == (first["worker"], "1")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("raise", "KeyError: 'out of range'"),
        ("end-of-file", "EOFError: the engine's own"),
        (
            "log",
            "AssertionError: at `assert tensors is not None`; the engine then raised KeyError: '0-a4f7'",
        ),
        ("crash", "EngineProcessError: the engine's process was killed by SIGSEGV"),
        ("exit", "EngineProcessError: the engine's process ended with exit code 3"),
        ("start-raises", "ValueError: no such backend"),
    ],
)
def test_what_an_engine_does_costs_one_request(target: WorkerTarget, word: str, message: str) -> None:
    first = ask(target)
    with pytest.raises(EngineError) as caught:
        ask(target, word)
    assert str(caught.value) == message
    assert not alive(first["self"])
    assert not alive(first["helper"])
    again = ask(target)
    assert (again["worker"], again["count"]) == (first["worker"], "1"), "the worker starts another engine"


def test_an_error_shows_the_log_and_where_it_was_raised(target: WorkerTarget) -> None:
    with pytest.raises(EngineError) as caught:
        ask(target, "log")
    assert "The end of its log:\n(Main pid=1) WARNING" in caught.value.traceback
    assert "raise KeyError" in caught.value.traceback
    with pytest.raises(EngineError) as caught:
        ask(target, "crash")
    assert "about to crash" in caught.value.traceback
    assert "0-a4f7" not in caught.value.traceback, "the log of an earlier request"


@pytest.mark.parametrize("word", ["silent", "flood"])
def test_what_it_prints_does_no_harm(target: WorkerTarget, word: str) -> None:
    first = ask(target, word)
    assert ask(target)["self"] == first["self"]


@pytest.mark.parametrize("word", ["hang", "start-hangs"])
def test_an_engine_that_hangs_is_ended(
    target: WorkerTarget, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(target)
    target.timeout = 1.0
    monkeypatch.setattr(process, "ENGINE_TIMEOUT", 1.0)
    with pytest.raises(TargetTimeoutError, match="did not answer 'generate' within 2 s"):
        ask(target, word)
    target.timeout = 20.0
    assert ask(target)["count"] == "1"


def test_an_engine_ends_with_its_worker(target: WorkerTarget) -> None:
    ask(target)
    with pytest.raises(WorkerDiedError, match="was killed by SIGKILL"):
        ask(target, "kill-worker")
    assert ask(target)["count"] == "1"


def test_closing_the_target_lets_the_engine_put_things_in_order(target: WorkerTarget, closed: Path) -> None:
    first = ask(target)
    target.close()
    assert closed.read_text() == first["self"]
    assert not alive(first["self"])
    assert not alive(first["helper"])


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (LOG, ("AssertionError", "at `assert tensors is not None`")),
        ("", None),
        ("all is well\nno Error here\n", None),
        ("torch.OutOfMemoryError: 3 GiB\n", ("OutOfMemoryError", "3 GiB")),
        ("(EngineCore pid=3) ValueError: first\nKeyError: 2\n", ("ValueError", "first")),
        ("(Main pid=1) INFO 11-21 14:12:41 [a.py:1] ValueError: no\n", None),
        (
            "ERROR 11-22 16:04:37 [b.py:3] Worker proc One died unexpectedly (exit code: -11)\nKeyError: 2\n",
            ("RuntimeError", "Worker proc One died unexpectedly (exit code: -11)"),
        ),
    ],
)
def test_the_first_error_of_a_log(log: str, cause: tuple[str, str] | None) -> None:
    assert root_cause(log) == cause
