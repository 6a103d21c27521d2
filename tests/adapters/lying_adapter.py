"""An adapter that does to the harness what engines have done; the request's `output` says what."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def create() -> Liar:
    return Liar()


class Liar:
    def describe(self) -> dict[str, Any]:
        return {
            "name": "liar",
            "version": "1.0",
            "capabilities": ["parse", "parse_stream"],
            "environment": {
                "path": json.dumps(sys.path),
                "variables": json.dumps(dict(os.environ)),
                "cwd": str(Path.cwd()),
                "import": json.dumps([entry.name for entry in Path(sys.path[0]).iterdir()]),
            },
        }

    def forward(self, request: dict[str, Any]) -> Any:
        word = request["capture"][0]
        if word == "elsewhere":
            return {"path": "/nowhere"}
        Path(request["output"]).write_bytes(json.dumps(request).encode())
        effective = {"dtype": request["dtype"]}
        return {"path": request["output"], "order": request["capture"], "effective": effective}

    def parse(self, request: dict[str, Any]) -> Any:
        print(f"standard error says: {request['output'][:60]}", file=sys.stderr, flush=True)
        word, _, argument = request["output"].partition(" ")
        return getattr(self, f"_{word}")(argument)

    def parse_stream(self, request: dict[str, Any]) -> Any:
        return [{"deltas": []}]

    def _echo(self, text: str) -> Any:
        return {"content": text}

    def _print(self, text: str) -> Any:
        print(text)
        os.write(1, f"{text}\n".encode())
        subprocess.run(["echo", text], check=True)
        return {"content": "printed"}

    def _stdin(self, _: str) -> Any:
        return {"content": sys.stdin.read() + os.read(0, 10).decode()}

    def _raise(self, text: str) -> Any:
        raise ValueError(text)

    def _exit(self, _: str) -> Any:
        raise SystemExit(3)

    def _interrupt(self, _: str) -> Any:
        raise KeyboardInterrupt

    def _kill(self, _: str) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def _quit(self, code: str) -> Any:
        os._exit(int(code))

    def _segfault(self, _: str) -> Any:
        ctypes.string_at(0)

    def _hang(self, _: str) -> Any:
        time.sleep(600)

    def _hang_deaf(self, _: str) -> Any:
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(600)

    def _flood(self, _: str) -> Any:
        while True:
            os.write(1, b"flood " * 10_000)

    def _flood_then_answer(self, _: str) -> Any:
        for _ in range(200):
            os.write(1, b"flood\n" * 10_000)
        return {"content": "after the flood"}

    def _long(self, size: str) -> Any:
        return {"content": "x" * int(size)}

    def _endless_line(self, _: str) -> Any:
        pipe = _protocol()
        while True:
            os.write(pipe, b"x" * 60_000)

    def _rubbish(self, _: str) -> Any:
        os.write(_protocol(), b"INFO 11-21 loading weights\n")
        return {"content": "late"}

    def _two_answers(self, _: str) -> Any:
        os.write(_protocol(), b'{"id": 999, "result": {}}\n')
        return {"content": "late"}

    def _rubbish_later(self, _: str) -> Any:
        if os.fork() == 0:
            time.sleep(0.3)
            with contextlib.suppress(OSError):
                os.write(_protocol(), b"done in 0.3 s\n")
            os._exit(0)
        return {"content": "now"}

    def _wrong_schema(self, _: str) -> Any:
        return {"content": 7, "tool_call": []}

    def _not_json(self, _: str) -> Any:
        return {"content": {1, 2}}

    def _surrogate(self, _: str) -> Any:
        return {"content": "\ud83d"}

    def _fork_and_die(self, pid_file: str) -> Any:
        _fork_sleeper(pid_file)
        os.kill(os.getpid(), signal.SIGKILL)

    def _fork_and_hang(self, pid_file: str) -> Any:
        _fork_sleeper(pid_file)
        time.sleep(600)

    def _fork_and_answer(self, pid_file: str) -> Any:
        _fork_sleeper(pid_file)
        return {"content": "left a process"}

    def _daemon_and_die(self, pid_file: str) -> Any:
        # Twice removed and in a session of its own, as servers put themselves.
        if os.fork() == 0:
            os.setsid()
            _fork_sleeper(pid_file)
            os._exit(0)
        os.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def _fork_sleeper(pid_file: str) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    Path(pid_file).write_text(str(pid))


def _protocol() -> int:
    """The descriptor of the protocol, as a library that scans descriptors would find it."""
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            writable = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
            if writable and stat.S_ISFIFO(os.fstat(number).st_mode):
                return number
    raise AssertionError("no descriptor of the protocol")
