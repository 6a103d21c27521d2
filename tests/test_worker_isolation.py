"""Whatever an engine does in its worker costs one request, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import conformance
from conformance.errors import EngineError, TargetError, TargetTimeoutError, WorkerDiedError
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import Chunking, ParseRequest, StreamRequest, Target
from tests.processes import children, survivors

TESTS = Path(__file__).parent
ROOT = TESTS.parent


@pytest.fixture
def mark() -> Iterator[str]:
    """A value in the environment of every process of a test, by which survivors are found."""
    value = uuid.uuid4().hex
    yield value
    assert not survivors(value), "the test left processes behind"


@pytest.fixture
def liar(mark: str) -> Iterator[Callable[..., WorkerTarget]]:
    """Opens the lying adapter."""
    opened: list[WorkerTarget] = []

    def open_target(adapter: str = "adapters.lying_adapter", **options: object) -> WorkerTarget:
        arguments = {"python": Path(sys.executable), "timeout": 20.0, "import_paths": [TESTS], **options}
        target = WorkerTarget("liar@1", adapter=adapter, environment={"TEST_MARK": mark}, **arguments)  # type: ignore[arg-type]
        opened.append(target)
        return target

    yield open_target
    for target in opened:
        target.close()


def _request(output: str) -> ParseRequest:
    return ParseRequest(output=output, pieces=(), prompt="")


def _echo(target: WorkerTarget) -> None:
    assert target.parse(_request("echo still here")).content == "still here"


def test_it_is_a_target(liar: Callable[..., WorkerTarget]) -> None:
    assert isinstance(liar(), Target)


def test_a_request_is_answered_by_one_worker(liar: Callable[..., WorkerTarget]) -> None:
    target = liar()
    _echo(target)
    first = target.pid
    _echo(target)
    assert target.pid == first
    assert target.describe().version == "1.0"


@pytest.mark.parametrize("python", [sys.executable, f"{sys.base_prefix}/bin/python3"])
def test_the_worker_sees_its_own_environment_only(
    liar: Callable[..., WorkerTarget], monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    facts = liar(python=Path(python)).describe().environment
    variables, path = json.loads(facts["variables"]), json.loads(facts["path"])
    assert "SECRET_TOKEN" not in variables
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["PATH"] == os.environ["PATH"]
    assert "/nowhere" not in path
    assert path[1] == str(TESTS)
    scratch = Path(facts["cwd"])
    assert Path(variables["TMPDIR"]).parent == Path(variables["VLLM_RPC_BASE_PATH"]).parent == scratch
    assert "CONFORMANCE_SCRATCH" not in variables, "that is the guardian's affair"
    if python != sys.executable:
        assert str(ROOT) not in path
        assert sysconfig.get_path("purelib") not in path
    assert json.loads(facts["import"]) == ["conformance"]


@pytest.mark.parametrize(("set_to", "seen"), [(None, "0"), ("7", "7")])
def test_sets_have_the_same_order_in_every_worker_unless_somebody_varies_it(
    liar: Callable[..., WorkerTarget], monkeypatch: pytest.MonkeyPatch, set_to: str | None, seen: str
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if set_to is not None:
        monkeypatch.setenv("PYTHONHASHSEED", set_to)
    variables = json.loads(liar().describe().environment["variables"])
    assert variables["PYTHONHASHSEED"] == seen


def test_prints_do_no_harm(liar: Callable[..., WorkerTarget]) -> None:
    target = liar()
    assert target.parse(_request("print hello")).content == "printed"
    assert target.parse(_request("flood_then_answer")).content == "after the flood"
    assert target.parse(_request("stdin")).content == ""


@pytest.mark.parametrize(
    ("output", "message", "trace"),
    [
        ("raise out of range", "ValueError: out of range", "in _raise"),
        ("exit", "SystemExit: 3", "in _exit"),
        ("interrupt", "KeyboardInterrupt: ", "in _interrupt"),
        ("not_json", "TypeError: Object of type set is not JSON serializable", "json"),
        ("no_such_word", "AttributeError: 'Liar' object has no attribute '_no_such_word'", "in parse"),
    ],
)
def test_what_an_engine_raises_costs_one_request(
    liar: Callable[..., WorkerTarget], output: str, message: str, trace: str
) -> None:
    target = liar()
    _echo(target)
    worker = target.pid
    with pytest.raises(EngineError) as caught:
        target.parse(_request(output))
    assert str(caught.value) == message
    assert trace in caught.value.traceback
    _echo(target)
    assert target.pid == worker, "an exception does not end the worker"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("kill", "was killed by SIGKILL"),
        ("segfault", "was killed by SIGSEGV"),
        ("quit 4", "ended with exit code 4"),
        ("quit 0", "ended with exit code 0"),
        ("rubbish", "wrote what is no answer: 'INFO 11-21 loading weights'"),
        ("two_answers", "wrote what is no answer"),
        ("wrong_schema", "does not fit the protocol"),
        ("long 70000", "wrote an answer of more than 65536 bytes"),
        ("endless_line", "wrote an answer of more than 65536 bytes"),
    ],
)
def test_a_worker_that_dies_or_lies_costs_one_request(
    liar: Callable[..., WorkerTarget], output: str, message: str
) -> None:
    target = liar(max_line=65536)
    _echo(target)
    with pytest.raises(WorkerDiedError, match=r"^liar@1") as caught:
        target.parse(_request(output))
    assert message in str(caught.value)
    assert f"standard error says: {output}" in caught.value.stderr_tail
    _echo(target)


def test_a_native_crash_shows_where(liar: Callable[..., WorkerTarget]) -> None:
    with pytest.raises(WorkerDiedError) as caught:
        liar().parse(_request("segfault"))
    assert "Fatal Python error: Segmentation fault" in caught.value.stderr_tail
    assert "in _segfault" in caught.value.stderr_tail


@pytest.mark.parametrize("output", ["hang", "hang_deaf", "flood"])
def test_a_worker_that_hangs_or_floods_costs_one_deadline(
    liar: Callable[..., WorkerTarget], output: str
) -> None:
    target = liar(timeout=1.0)
    _echo(target)
    started = time.monotonic()
    with pytest.raises(TargetTimeoutError, match=r"^liar@1: it did not answer 'parse' within 1 s$") as caught:
        target.parse(_request(output))
    assert time.monotonic() - started >= 1.0, "it was given its time"
    assert len(caught.value.stderr_tail.encode()) <= 8192
    assert ("flood" if output == "flood" else output) in caught.value.stderr_tail
    _echo(target)


def test_a_request_larger_than_a_pipe(liar: Callable[..., WorkerTarget]) -> None:
    text = "echo " + "é" * 500_000
    assert liar().parse(_request(text)).content == text.removeprefix("echo ")


def test_a_hung_worker_does_not_block_a_large_request(liar: Callable[..., WorkerTarget]) -> None:
    target = liar(timeout=1.0)
    _echo(target)
    (worker,) = children(target.pid)
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(TargetTimeoutError):
        target.parse(_request("echo " + "x" * 500_000))
    _echo(target)


def test_rubbish_between_requests_costs_nothing(liar: Callable[..., WorkerTarget]) -> None:
    target = liar()
    assert target.parse(_request("rubbish_later")).content == "now"
    time.sleep(0.6)
    _echo(target)


def test_a_worker_that_died_between_requests_costs_nothing(liar: Callable[..., WorkerTarget]) -> None:
    target = liar()
    _echo(target)
    assert target.pid is not None
    os.killpg(target.pid, signal.SIGKILL)
    time.sleep(0.2)
    _echo(target)


@pytest.mark.parametrize("output", ["fork_and_die", "fork_and_hang", "daemon_and_die"])
def test_descendants_end_with_their_worker(
    liar: Callable[..., WorkerTarget], mark: str, tmp_path: Path, output: str
) -> None:
    target = liar(timeout=2.0)
    pid_file = tmp_path / "pid"
    with pytest.raises((WorkerDiedError, TargetTimeoutError)):
        target.parse(_request(f"{output} {pid_file}"))
    descendant = pid_file.read_text()
    assert _gone(descendant), "the engine's own process lives on"
    _echo(target)
    target.close()


def test_descendants_end_when_the_target_is_closed(liar: Callable[..., WorkerTarget], tmp_path: Path) -> None:
    target = liar()
    pid_file = tmp_path / "pid"
    assert target.parse(_request(f"fork_and_answer {pid_file}")).content == "left a process"
    target.close()
    assert _gone(pid_file.read_text())


def _gone(pid: str) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


PARENT = """
import sys
from pathlib import Path
from conformance.targets.process import WorkerTarget
from conformance.targets.protocol import ParseRequest
target = WorkerTarget(
    "liar@1", python=Path(sys.executable), adapter="adapters.lying_adapter", import_paths=[Path(sys.argv[1])],
    environment={"TEST_MARK": sys.argv[2]},
)
target.parse(ParseRequest(output="echo x", pieces=(), prompt=""))
print("ready", flush=True)
if sys.argv[3] == "exit":
    raise SystemExit(0)
if sys.argv[3] != "idle":
    target.parse(ParseRequest(output=sys.argv[3], pieces=(), prompt=""))
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", ["idle", "hang", "hang_deaf", "fork_and_hang {}", "exit"])
def test_nothing_outlives_a_killed_harness(mark: str, tmp_path: Path, doing: str) -> None:
    command = [sys.executable, "-c", PARENT, str(TESTS), mark, doing.format(tmp_path / "pid")]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        if doing == "exit":
            assert parent.wait(10) == 0
        else:
            assert [folder.name.partition("-")[0] for folder in temporary.iterdir()] == ["conformance"]
            time.sleep(0.3)
            parent.kill()
    assert not survivors(mark)
    assert list(temporary.iterdir()) == []


def test_a_guardian_that_is_killed_takes_its_worker_along(
    liar: Callable[..., WorkerTarget], mark: str
) -> None:
    target = liar()
    _echo(target)
    assert target.pid is not None
    os.kill(target.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert not survivors(mark)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("adapters.broken_adapter", "ModuleNotFoundError: No module named 'no_such_engine'"),
        ("adapters.exiting_adapter", "SystemExit: this engine needs a GPU"),
        ("adapters.no_such_adapter", "ModuleNotFoundError"),
        ("no_such_name", "No module named 'conformance.worker.adapters.no_such_name'"),
    ],
)
def test_an_engine_that_cannot_start(liar: Callable[..., WorkerTarget], adapter: str, message: str) -> None:
    target = liar(adapter)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"^liar@1 could not start: ") as caught:
            target.describe()
        assert message in str(caught.value)


def test_an_engine_that_takes_too_long_to_start(liar: Callable[..., WorkerTarget]) -> None:
    with pytest.raises(TargetTimeoutError, match=r"it did not start within 0\.5 s"):
        liar("adapters.slow_adapter", start_timeout=0.5).describe()


def test_an_interpreter_that_is_not_there(liar: Callable[..., WorkerTarget]) -> None:
    with pytest.raises(TargetError, match="cannot be started: No such file or directory"):
        liar(python=Path("/no/such/python")).describe()


def test_a_result_for_every_chunking(liar: Callable[..., WorkerTarget]) -> None:
    chunkings = (Chunking(name="one"), Chunking(name="two", cuts=(1,)))
    target = liar()
    with pytest.raises(WorkerDiedError, match="1 results for 2 chunkings"):
        target.parse_stream(StreamRequest(request=_request("x"), chunkings=chunkings))
    assert len(target.parse_stream(StreamRequest(request=_request("x"), chunkings=chunkings[:1]))) == 1


def test_a_closed_target_stays_closed(liar: Callable[..., WorkerTarget]) -> None:
    target = liar()
    _echo(target)
    target.close()
    target.close()
    with pytest.raises(WorkerDiedError, match="is closed"):
        target.parse(_request("echo x"))


def test_the_scratch_folder_goes_with_the_target(liar: Callable[..., WorkerTarget]) -> None:
    with liar() as target:
        folder = Path(target.describe().environment["cwd"])
        assert folder.is_dir()
    assert not folder.exists()


def test_the_scratch_folder_goes_with_the_worker(liar: Callable[..., WorkerTarget]) -> None:
    target = liar()
    folder = Path(target.describe().environment["cwd"])
    (folder / "tmp" / "left").write_text("by the engine")
    (worker,) = children(target.pid)
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
    assert not folder.exists(), "the harness may be killed before it looks"
    assert Path(conformance.__file__).exists(), "the package is only linked there"
    _echo(target)
