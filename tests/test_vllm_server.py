"""vLLM's OpenAI server as a target: start, health, log, and an end that leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance import checks, runfile
from conformance.errors import EngineError, TargetError, TargetTimeoutError, WorkerDiedError
from conformance.loading import load_suites
from conformance.scheduling import TargetScheduling
from conformance.targets import environments, registry, vllm_server
from conformance.targets.protocol import ServeRequest
from conformance.targets.vllm_server import VllmServer
from model_impl.nano.script import ADAPTER, ADAPTER_SAYS, adapter_folder, checkpoint_folder, load_script
from tests.conftest import Run
from tests.fake_vllm import VERSION
from tests.lying_server import LyingServer
from tests.processes import survivors

ROOT = Path(__file__).parents[1]
SPEC = "vllm-server@0.32.0"
CASES = {case.address: case for suite in load_suites() for case in suite.cases}


class Fake:
    """Opens targets on the fake server, and knows what it was started with."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.starts_file = folder / "starts"
        self.segment_file = folder / "segment"
        self.mark = mark
        self.opened: list[VllmServer] = []

    def __call__(self, mode: str = "good", **options: Any) -> VllmServer:
        variables = {
            "FAKE_MODE": mode,
            "FAKE_STARTS": str(self.starts_file),
            "FAKE_SEGMENT": str(self.segment_file),
            "TEST_MARK": self.mark,
        }
        arguments: dict[str, Any] = {
            "python": Path(sys.executable),
            "checkpoint": checkpoint_folder(),
            "timeout": 5.0,
            "start_timeout": 30.0,
            "environment": variables,
            "import_paths": [ROOT],
            "module": "tests.fake_vllm",
        }
        target = VllmServer(SPEC, **(arguments | options))
        self.opened.append(target)
        return target

    @property
    def starts(self) -> list[dict[str, Any]]:
        if not self.starts_file.exists():
            return []
        return [json.loads(line) for line in self.starts_file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    made = Fake(tmp_path, uuid.uuid4().hex)
    yield made
    for target in made.opened:
        target.close()
    assert not survivors(made.mark), "the test left processes behind"


def ask(target: VllmServer, *texts: str) -> list[str]:
    bodies = tuple({"messages": [{"role": "user", "content": text}]} for text in texts or ("Say #plain.",))
    answers = target.serve(ServeRequest(bodies=bodies))
    assert [answer.status for answer in answers] == [200] * len(answers)
    return [answer.body["choices"][0]["message"]["content"] for answer in answers]


# ---------------------------------------------------------------------------- while all is well


def test_it_serves_and_is_started_once(fake: Fake) -> None:
    target = fake()
    info = registry.describe(target)  # type: ignore[arg-type]
    assert (info.name, info.version, info.capabilities) == ("vllm-server", VERSION, ("serve",))
    assert info.environment == {"model": "scripted", "checkpoint": "scripted", "max_model_len": "4096"}
    assert target.url is not None
    assert target.url.startswith("http://127.0.0.1:")
    assert ask(target, "Say #plain.", "Say #eos.") == ["The lamp is on.", "This is the end."]
    case = CASES["server/tools::nested"]
    assert checks.judge(case.case, case.suite.suite, target).verdict == "pass"  # type: ignore[arg-type]
    assert len(fake.starts) == 1


def test_what_it_is_started_with(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    target = fake()
    target.describe()
    (start,) = fake.starts
    options, variables = start["options"], start["variables"]
    assert options["model"] == str(checkpoint_folder())
    assert options["served_model_name"][0] == "scripted"
    assert options["host"] == "127.0.0.1"
    assert f":{options['port']}/v1" in str(target.url)
    text = " ".join(options["others"])
    assert "--enforce-eager --enable-auto-tool-choice" in text
    assert "--dtype float32" in text
    assert "--tool-call-parser gemma4 --reasoning-parser gemma4" in text
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert variables["HF_HUB_OFFLINE"] == variables["VLLM_NO_USAGE_STATS"] == "1"
    assert "SECRET_TOKEN" not in variables
    assert start["input"] == ""
    scratch = Path(start["cwd"])
    assert Path(variables["TMPDIR"]).parent == Path(variables["VLLM_RPC_BASE_PATH"]).parent == scratch
    target.close()
    assert not scratch.exists()


def test_the_adapter_is_served_from_the_first_request_for_it_on(fake: Fake) -> None:
    target = fake(adapter=adapter_folder())
    assert target.describe().features == ("lora",)
    assert ask(target, "Hello!") == [load_script().default.output]
    bodies = tuple(
        {"model": name, "messages": [{"role": "user", "content": "Hello!"}]} for name in (ADAPTER, "scripted")
    )
    for _ in range(2):
        answers = target.serve(ServeRequest(bodies=bodies))
        said = [answer.body["choices"][0]["message"]["content"] for answer in answers]
        assert said == [ADAPTER_SAYS, load_script().default.output]
    plain, adapted = (" ".join(start["options"]["others"]) for start in fake.starts)
    assert "lora" not in plain
    assert f"--enable-lora --max-lora-rank 8 --lora-modules {ADAPTER}={adapter_folder()}" in adapted


def test_progress_is_logged(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_server, "_REPORT", 0.2)
    caplog.set_level(logging.INFO, "conformance.targets")
    fake("slow").describe()
    assert "starting, which takes a minute or two" in caplog.messages[0]
    assert any("s: loading " in message for message in caplog.messages)
    assert f"{SPEC}: ready after" in caplog.messages[-1]


def test_another_server_on_its_port_is_not_taken_for_it(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    free = vllm_server._free_port
    with LyingServer() as other:
        taken = int(other.url.partition("127.0.0.1:")[2].partition("/")[0])
        ports = iter([taken])
        monkeypatch.setattr(vllm_server, "_free_port", lambda: next(ports, None) or free())
        target = fake()
        assert target.describe().version == VERSION
        assert str(taken) not in str(target.url)
        assert all(path == "/v1/models" for path, _, _ in other.seen), "nothing else was asked there"
    assert len(fake.starts) == 2


# ---------------------------------------------------------------------------- when it does not start


def test_a_crash_at_the_start_shows_the_end_of_the_log(fake: Fake) -> None:
    target = fake("crash")
    with pytest.raises(WorkerDiedError, match="ended with exit code 1 before it answered") as caught:
        target.describe()
    assert caught.value.stderr_tail.endswith("RuntimeError: the weights do not fit\n")
    assert len(caught.value.stderr_tail) <= 8192
    assert target.pid is None
    assert not survivors(fake.mark)
    assert len(fake.starts) == 1, "only a port that is taken is a reason to try again"


def test_a_server_that_never_becomes_healthy_is_ended(fake: Fake) -> None:
    target = fake("never", start_timeout=3.0)
    with pytest.raises(TargetTimeoutError, match="did not answer within 3 s of its start") as caught:
        target.serve(ServeRequest(bodies=("{}",)))
    assert "listening" in caught.value.stderr_tail
    assert target.pid is None
    assert not survivors(fake.mark)


def test_a_server_that_does_not_tell_its_version(fake: Fake) -> None:
    with pytest.raises(EngineError, match="does not tell its version") as caught:
        fake("no-version").describe()
    assert "listening" in caught.value.traceback


def test_an_interpreter_that_is_not_there(fake: Fake) -> None:
    with pytest.raises(TargetError, match="/nowhere/python cannot be started: No such file"):
        fake(python=Path("/nowhere/python")).describe()


# ---------------------------------------------------------------------------- when it fails later


def test_a_server_that_dies_costs_one_request(fake: Fake) -> None:
    target = fake()
    ask(target)
    with pytest.raises(WorkerDiedError, match="the server ended with exit code 3") as caught:
        ask(target, "Say #plain.", "dies #plain.")
    assert caught.value.stderr_tail.count("asked") >= 2
    assert ask(target) == ["The lamp is on."]
    assert len(fake.starts) == 2


def test_a_server_that_died_between_requests_is_started_anew(fake: Fake) -> None:
    target = fake()
    ask(target)
    os.kill(fake.starts[0]["pid"], signal.SIGKILL)
    assert target.pid is not None
    os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
    assert ask(target) == ["The lamp is on."]
    assert len(fake.starts) == 2


def test_a_server_that_hangs_costs_one_deadline(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "ANSWER_TIMEOUT", 1.0)
    target = fake(timeout=1.0)
    ask(target)
    with pytest.raises(TargetTimeoutError, match=r"no .* 2 s") as caught:
        ask(target, "hangs #plain.")
    assert "asked" in caught.value.stderr_tail
    assert not survivors(fake.mark)
    assert ask(target) == ["The lamp is on."]


def test_a_broken_connection_of_a_server_that_lives(fake: Fake) -> None:
    target = fake()
    ask(target)
    before = target.pid
    with pytest.raises(EngineError) as caught:
        ask(target, "breaks #plain.")
    assert "asked" in caught.value.traceback
    ask(target)
    assert target.pid == before


# ---------------------------------------------------------------------------- its end


def test_closing_ends_all_that_it_started_and_frees_what_it_shared(fake: Fake) -> None:
    target = fake("leaves")
    ask(target)
    segment = Path("/dev/shm") / fake.segment_file.read_text(encoding="utf-8")
    assert segment.exists()
    assert len(survivors(fake.mark)) >= 4  # guardian, server, resource tracker, detached process
    target.close()
    assert not survivors(fake.mark)
    assert not segment.exists()
    target.close()
    with pytest.raises(WorkerDiedError, match="is closed"):
        ask(target)


PARENT = """
import sys
from pathlib import Path
from conformance.targets.protocol import ServeRequest
from conformance.targets.vllm_server import VllmServer
root, starts, mark, mode = sys.argv[1:]
target = VllmServer(
    "vllm-server@1", python=Path(sys.executable), checkpoint=Path(root), timeout=60.0,
    import_paths=[Path(root)], module="tests.fake_vllm",
    environment={"FAKE_MODE": mode, "FAKE_STARTS": starts, "TEST_MARK": mark},
)
if mode == "good":
    target.describe()
print("ready", flush=True)
body = {"messages": [{"role": "user", "content": "hangs #plain."}]}
target.serve(ServeRequest(bodies=(body,)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", ["good", "never"])
def test_nothing_outlives_the_harness(fake: Fake, mode: str, number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(ROOT), str(fake.starts_file), fake.mark, mode]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == b"ready\n"
            while not fake.starts:
                time.sleep(0.05)
            time.sleep(0.3)
            assert Path(fake.starts[0]["cwd"]).parent == temporary
            parent.send_signal(number)
            assert parent.wait(20) != 0
        finally:
            parent.kill()
    assert not survivors(fake.mark)
    assert list(temporary.iterdir()) == []


def test_a_server_that_died_leaves_only_what_it_said(fake: Fake) -> None:
    target = fake()
    ask(target)
    (start,) = fake.starts
    os.kill(start["pid"], signal.SIGKILL)
    assert target.pid is not None
    os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
    assert not Path(start["cwd"]).exists(), "the harness may be killed before it looks"
    assert target._running is not None
    assert target._running.tail().startswith(f"loading {checkpoint_folder()}\nlistening\n")


# ---------------------------------------------------------------------------- by its name


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes an environment that holds the fake in vLLM's place, with or without the part."""
    home = tmp_path / "home"
    monkeypatch.setenv("CONFORMANCE_HOME", str(home))

    def install(*, part: bool) -> None:
        found = environments.status("vllm@0.32.0")
        (found.path / "bin").mkdir(parents=True, exist_ok=True)
        python = found.path / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        stamp = {"digest": found.lock.digest, "megabytes": 7, "seconds": 8}
        (found.path / "conformance-environment.json").write_text(json.dumps(stamp), encoding="utf-8")
        if not part:
            return
        (engine,) = (each for each in found.lock.parts if each.name == "engine")
        package = found.path / "parts" / "engine" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        program = f"""
import os, runpy, sys
sys.path.append({str(ROOT)!r})
os.environ["FAKE_STARTS"] = {str(tmp_path / "starts")!r}
runpy.run_module("tests.fake_vllm", run_name="__main__")
"""
        (package / "api_server.py").write_text(program, encoding="utf-8")
        stamp["digest"] = engine.digest
        (found.path / "parts" / "engine" / "conformance-environment.json").write_text(json.dumps(stamp))

    return install


def test_what_is_missing_is_said(installed: Callable[..., None]) -> None:
    assert registry.resolve("vllm-server") == SPEC
    assert SPEC in registry.known_targets()
    assert SPEC not in registry.default_targets()
    assert registry.unavailable(SPEC).startswith("its environment is not installed; run `conformance targets")
    installed(part=False)
    reason = registry.unavailable(SPEC)
    assert "part `engine` of its environment is not installed" in reason
    assert "`conformance targets install vllm@0.32.0`" in reason
    with pytest.raises(TargetError, match=r"vllm-server@0\.32\.0 cannot be used: part `engine`"):
        registry.open_target(SPEC)
    installed(part=True)
    assert registry.unavailable(SPEC) == ""
    assert isinstance(registry.open_target(SPEC), VllmServer)


def test_a_version_without_the_part_has_no_server() -> None:
    with pytest.raises(TargetError, match=r"unknown version; versions of vllm-server are 0\.32\.0$"):
        registry.resolve("vllm-server@0.23.0")


def test_all_cases_of_a_run_ask_one_server(
    installed: Callable[..., None], run_conformance: Run, tmp_path: Path
) -> None:
    installed(part=True)
    cases = ("server/text", "server/tools::call", "server/concurrency::three-users")
    options = ("--target", SPEC, "-n", "2", "--no-report", "--out", tmp_path / "run.jsonl")
    done = run_conformance("run", *cases, *options, env={"CONFORMANCE_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done
    run = runfile.read(tmp_path / "run.jsonl")
    assert run.header.targets[SPEC].version == VERSION
    assert run.footer is not None
    assert set(run.footer.counts[SPEC]) == {"pass"}
    assert len((tmp_path / "starts").read_text(encoding="utf-8").splitlines()) == 1


def test_workers_do_not_share_its_cases() -> None:
    scheduling = TargetScheduling.__new__(TargetScheduling)
    assert scheduling._split_scope(f"suites/server/text.yaml::plain[{SPEC}]") == SPEC


# ---------------------------------------------------------------------------- the real one


def test_the_real_server_says_its_lines() -> None:
    reason = registry.unavailable(SPEC)
    if reason:
        pytest.skip(f"{SPEC}: {reason}")
    target = registry.open_target(SPEC)
    try:
        assert registry.describe(target).version == "0.32.0"
        for address in (
            "server/text::unicode",
            "server/thinking::thought-call",
            "server/tools::three-calls",
            "server/images::two-in-order",
            "server/images::later-turn",
        ):
            case = CASES[address]
            outcome = checks.judge(case.case, case.suite.suite, target)
            assert outcome.verdict == "pass", (address, outcome.problems)
    finally:
        target.close()
