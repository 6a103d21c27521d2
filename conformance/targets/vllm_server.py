"""vLLM's own OpenAI server as a target: `vllm-server@0.32.0`.

1. It serves the scripted checkpoint, by the name `scripted`, on a free port of the loopback interface. What
   is asked there is `conformance.targets.openai`'s affair, as with any other server.
2. It starts with the first question, once a run, which takes a minute or two. It is ready when the server
   that answers lists a name that was made up for this start, so that no other one is taken for it.
3. It runs under `conformance.worker.guardian`: it ends with this target or with this process, whatever
   becomes of either, and all that it started ends with it.
4. It serves the checkpoint's adapter, by its own name, from the first request for it on: then it is started
   anew with adapters enabled. Until then it runs as most servers do.
5. Everything that it prints goes to a file, whose end is in every error about it. One that died or did not
   answer in time is started anew for the next question.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conformance.errors import EngineError, TargetError, TargetTimeoutError, WorkerDiedError
from conformance.http import Answer, Client, HttpError, Limits
from conformance.targets import guarded
from conformance.targets.bundled import ADAPTER
from conformance.targets.endpoint import Endpoint
from conformance.targets.openai import OpenAITarget
from conformance.targets.protocol import ServeAnswer, ServeRequest, TargetInfo

NAME = "vllm-server"
MODEL = "scripted"
"""Name by which the checkpoint is served: the server suites then know its answers to the letter."""

SERVER = "vllm.entrypoints.openai.api_server"
START_TIMEOUT = 280.0
"""Seconds until it must answer: three processes import the engine one after the other."""
ANSWER_TIMEOUT = 60.0
"""Seconds for an answer beyond those of an ordinary request: a model generates it."""
ATTEMPTS = 3
"""How many ports are tried: another program may take one before the server does."""

_OPTIONS = (
    "--dtype", "float32",
    "--enforce-eager",
    "--enable-auto-tool-choice",
    "--tool-call-parser", "gemma4",
    "--reasoning-parser", "gemma4",
)  # fmt: skip
_ADAPTER_OPTIONS = ("--enable-lora", "--max-lora-rank", "8")
_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
"""One gibibyte for keys and values, where vLLM would take half of the memory. Its log is wanted here."""

_PORT_TAKEN = "address already in use"
_TAIL = 8192
_PAUSE = 0.5
_REPORT = 10.0
_QUICK = Limits(connect=2.0, idle=5.0, total=5.0, max_requests=100_000)
_LOG = logging.getLogger(__name__)


class VllmServer:
    """Has what a target needs, and `serve`.

    Args:
        spec: How the user names the target.
        python: Interpreter of vLLM's environment.
        checkpoint: Folder with the model, its tokenizer and its chat template.
        adapter: Folder of an adapter of it; None if there is none.
        timeout: Seconds for an ordinary request.
        start_timeout: Seconds until the server must answer.
        environment: Variables for the server, besides the allowed ones of this process.
        import_paths: Folders that it may import from, besides its own environment.
        module: The program.
    """

    def __init__(
        self,
        spec: str,
        *,
        python: Path,
        checkpoint: Path,
        adapter: Path | None = None,
        timeout: float,
        start_timeout: float = START_TIMEOUT,
        environment: Mapping[str, str] | None = None,
        import_paths: Sequence[Path] = (),
        module: str = SERVER,
    ) -> None:
        self.spec = spec
        self._python = python
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._with_adapter = False
        self._start_timeout = start_timeout
        self._environment = _VARIABLES | dict(environment or {})
        self._import_paths = tuple(import_paths)
        self._module = module
        total = timeout + ANSWER_TIMEOUT
        self._limits = replace(Limits(), total=total, idle=total)
        self._running: _Running | None = None
        self._info: TargetInfo | None = None
        self._lock = threading.Lock()
        self._closed = False

    def describe(self) -> TargetInfo:
        """What the running server says of itself; asked once."""
        with self._lock:
            if self._info is None:
                facts = self._started().facts()
                version = facts.pop("version")
                self._info = TargetInfo(
                    name=NAME,
                    version=version,
                    capabilities=("serve",),
                    features=("lora",) if self._adapter is not None else (),
                    environment={"model": MODEL, "checkpoint": self._checkpoint.name, **facts},
                    note=f"python -m {self._module} {' '.join(_OPTIONS)}",
                )
            return self._info

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        """Post every body at the same time.

        Raises:
            WorkerDiedError: the server ended.
            TargetTimeoutError: an answer did not come in time; the server is ended.
            EngineError: it broke a connection, and lives.
        """
        with self._lock:
            if not self._with_adapter and self._adapter is not None and _asks_for_adapter(request):
                self._stop()
                self._with_adapter = True
            running = self._started()
            try:
                answers = running.target.serve(request)
                self._check(answers, running)
            except (EngineError, WorkerDiedError):
                raise
            except BaseException:
                self._stop()
                raise
        return answers

    def close(self) -> None:
        """End the server and all it started."""
        with self._lock:
            self._closed = True
            self._stop()

    @property
    def url(self) -> str | None:
        """Where it answers; None while it does not run."""
        return self._running.target.endpoint.url if self._running is not None else None

    @property
    def pid(self) -> int | None:
        """Process id of its guardian, which leads its process group; None while there is none."""
        return self._running.process.pid if self._running is not None else None

    def _check(self, answers: Sequence[ServeAnswer], running: _Running) -> None:
        """Raise what no judgement of an answer could tell: how the server fared, and what it printed."""
        for answer in answers:
            if answer.failure == "timeout":
                raise TargetTimeoutError(f"{self.spec}: {answer.detail}", stderr_tail=running.tail())
        for answer in answers:
            if answer.failure == "connection":
                if how := running.death(wait=guarded.STOP_GRACE):
                    tail = self._stop()
                    raise WorkerDiedError(f"{self.spec}: {how}; {answer.detail}", stderr_tail=tail)
                raise EngineError(f"{self.spec}: {answer.detail}", traceback=running.tail())

    def _started(self) -> _Running:
        """The server, started if need be."""
        if self._closed:
            raise WorkerDiedError(f"{self.spec} is closed; open the target again")
        if self._running is not None and self._running.death():
            self._stop()
        if self._running is None:
            self._running = self._start()
        return self._running

    def _start(self) -> _Running:
        deadline = time.monotonic() + self._start_timeout
        for attempt in range(1, ATTEMPTS + 1):
            running = _Running(self.spec, self._command, self._environment, self._import_paths, self._limits)
            try:
                running.wait_until_ready(deadline, self._start_timeout)
            except WorkerDiedError as error:
                running.stop()
                if attempt == ATTEMPTS or _PORT_TAKEN not in error.stderr_tail.lower():
                    raise
                _LOG.info("%s: its port was taken meanwhile; trying another", self.spec)
            except BaseException:
                running.stop()
                raise
            else:
                return running
        raise AssertionError("the last attempt returns or raises")

    def _command(self, port: int, name: str) -> list[str]:
        """The command line of a server on a port that serves the model by one more name."""
        return [
            *(str(self._python), "-P", "-m", "conformance.worker.guarded", self._module),
            *("--model", str(self._checkpoint), "--served-model-name", MODEL, name),
            *("--host", "127.0.0.1", "--port", str(port)),
            *_OPTIONS,
            *(
                (*_ADAPTER_OPTIONS, "--lora-modules", f"{ADAPTER}={self._adapter}")
                if self._with_adapter
                else ()
            ),
        ]

    def _stop(self) -> str:
        """End the server; return the end of its log."""
        if self._running is None:
            return ""
        running, self._running = self._running, None
        return running.stop()


class _Running:
    """One server process, its port and its log."""

    def __init__(
        self,
        spec: str,
        command: Callable[[int, str], list[str]],
        environment: Mapping[str, str],
        import_paths: Sequence[Path],
        limits: Limits,
    ) -> None:
        self._spec = spec
        self._name = f"started-{secrets.token_hex(8)}"
        port = _free_port()
        self._root = f"http://127.0.0.1:{port}"
        self.target = OpenAITarget(Endpoint(f"{self._root}/v1", MODEL), limits=limits)
        scratch = guarded.scratch_folder()
        arguments = command(port, self._name)
        # It has no name that could stay behind, and can be read when the server and its folder are gone.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it
        try:
            self.process = subprocess.Popen(  # noqa: S603 - the environment's own interpreter
                arguments,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                cwd=scratch,
                env=guarded.variables(scratch, environment, import_paths),
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            shutil.rmtree(scratch, ignore_errors=True)
            raise TargetError(f"{spec}: {arguments[0]} cannot be started: {error.strerror}") from error
        # Runs at the latest when this process exits, whatever becomes of the target.
        self._end = weakref.finalize(self, guarded.end, self.process, scratch, os.getpid())

    def wait_until_ready(self, deadline: float, seconds: float) -> None:
        """Wait until it lists the model by the name that only this start knows.

        Raises:
            WorkerDiedError: it ended.
            TargetTimeoutError: it did not do so by the deadline, which is that many seconds after the start.
        """
        began = told = time.monotonic()
        client = Client(f"{self._root}/v1", {}, _QUICK)
        _LOG.info("%s: starting, which takes a minute or two", self._spec)
        while not self._is_ours(client.get("/models")):
            if how := self.death():
                raise WorkerDiedError(f"{self._spec}: {how} before it answered", stderr_tail=self.tail())
            now = time.monotonic()
            if now > deadline:
                raise TargetTimeoutError(
                    f"{self._spec}: it did not answer within {seconds:g} s of its start",
                    stderr_tail=self.tail(),
                )
            if now - told > _REPORT:
                told = now
                _LOG.info("%s: starting for %.0f s: %s", self._spec, now - began, self._last_line())
            time.sleep(_PAUSE)
        _LOG.info("%s: ready after %.0f s", self._spec, time.monotonic() - began)

    def facts(self) -> dict[str, str]:
        """Its version, and what it lists beside the model's name.

        Raises:
            EngineError: it does not say.
        """
        said = Client(self._root, {}, _QUICK).get("/version")
        listed = Client(f"{self._root}/v1", {}, _QUICK).get("/models")
        try:
            return {
                "version": str(_body(said)["version"]),
                "max_model_len": str(_body(listed)["data"][0]["max_model_len"]),
            }
        except (LookupError, TypeError) as error:
            raise EngineError(
                f"{self._spec}: the server does not tell its version and `max_model_len`: {said}; {listed}",
                traceback=self.tail(),
            ) from error

    def death(self, *, wait: float = 0.0) -> str:
        """How it ended; empty while it runs.

        Args:
            wait: Seconds that it is given to end.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait)
        code = self.process.poll()
        return "" if code is None else f"the server {guarded.ending(code)}"

    def tail(self) -> str:
        """The end of what it printed."""
        if self._log.closed:  # it has been stopped
            return ""
        log = self._log.fileno()  # the server writes at its position, which is therefore left alone
        return os.pread(log, _TAIL, max(0, os.fstat(log).st_size - _TAIL)).decode(errors="replace")

    def stop(self) -> str:
        """End it and all it started; return the end of its log."""
        tail = self.tail()
        self.target.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._end()
        self._log.close()
        return tail

    def _is_ours(self, answer: Answer | HttpError) -> bool:
        body = _body(answer)
        data = body.get("data") if isinstance(body, dict) else None
        entries = data if isinstance(data, list) else []
        return any(isinstance(entry, dict) and entry.get("id") == self._name for entry in entries)

    def _last_line(self) -> str:
        lines = self.tail().splitlines()
        return lines[-1][:200] if lines else "nothing printed yet"


def _asks_for_adapter(request: ServeRequest) -> bool:
    return any(isinstance(body, dict) and body.get("model") == ADAPTER for body in request.bodies)


def _body(answer: Answer | HttpError) -> Any:
    return None if isinstance(answer, HttpError) else answer.body


def _free_port() -> int:
    """A port of the loopback interface that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
