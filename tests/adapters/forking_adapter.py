"""An adapter whose engine is a fork of the worker, as vLLM's is; `checkpoint` says what it does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from conformance.worker.engine_process import EngineProcess

HELPER = "import time; time.sleep(600)"
LOG = """\
(Main pid=1) WARNING 11-21 14:12:41 [base.py:413] ValueError: nothing to worry about
(Worker_PP1 pid=2) ERROR 11-21 14:12:41 [executor.py:1063] Traceback (most recent call last):
(Worker_PP1 pid=2) ERROR 11-21 14:12:41 [executor.py:1063]     assert tensors is not None
(Worker_PP1 pid=2) ERROR 11-21 14:12:41 [executor.py:1063]            ^^^^^^^^^^^^^^^^^^^
(Worker_PP1 pid=2) ERROR 11-21 14:12:41 [executor.py:1063] AssertionError
RuntimeError: see above
"""


def create() -> Forking:
    return Forking()


class Forking:
    def __init__(self) -> None:
        self._engine: EngineProcess | None = None

    def describe(self) -> dict[str, Any]:
        return {"name": "forking", "version": "1", "capabilities": ["generate"]}

    def generate(self, request: dict[str, Any]) -> Any:
        if request["checkpoint"] == "close":
            assert self._engine is not None
            self._engine.close()
            self._engine.close()
            self._engine = None
            return _answer(self="gone")
        if self._engine is not None and request["checkpoint"].startswith("start"):
            self._engine.close()
            self._engine = None
        if self._engine is None:
            self._engine = EngineProcess(lambda: Engine(request["checkpoint"]))
        engine, self._engine = self._engine, None
        answer = engine.ask(request)
        self._engine = engine
        return answer | {"effective": answer["effective"] | {"worker": str(os.getpid())}}


class Engine:
    def __init__(self, word: str) -> None:
        self._helpers = [subprocess.Popen([sys.executable, "-c", HELPER])]
        self._count = 0
        if word == "start-raises":
            raise ValueError("no such backend")
        if word == "start-hangs":
            time.sleep(600)

    def answer(self, request: dict[str, Any]) -> Any:
        self._count += 1
        word = request["checkpoint"]
        if word == "raise":
            raise KeyError("out of range")
        if word == "end-of-file":
            raise EOFError("the engine's own")
        if word == "log":
            print(LOG, end="")
            raise KeyError("0-a4f7")
        if word == "crash":
            print("about to crash")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "exit":
            os._exit(3)
        if word == "kill-worker":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        if word == "hang":
            time.sleep(600)
        if word == "silent":
            os.close(1)
            os.close(2)
        if word == "socket":
            # Where vLLM's processes meet.
            name = f"{os.environ['VLLM_RPC_BASE_PATH']}/{uuid.uuid4()}"
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(name)
            return _answer(socket=name)
        if word == "flood":
            for _ in range(3):
                print("x" * (1 << 17))
        return _answer(
            self=str(os.getpid()),
            group=str(os.getpgrp()),
            helper=str(self._helpers[0].pid),
            count=str(self._count),
            temporary=tempfile.gettempdir(),
        )

    def close(self) -> None:
        Path(os.environ["TEST_CLOSED"]).write_text(str(os.getpid()))


def _answer(**effective: str) -> dict[str, Any]:
    return {
        "generations": [{"token_ids": [1], "finish_reason": "stop", "logprobs": [0.0]}],
        "effective": effective,
    }
