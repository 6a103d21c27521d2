"""An engine in a process of its own below the worker: ended and started anew without importing it again.

The worker imports the engine's package once; each engine is a fork of it. So an engine can be thrown away
whole, with its global state and all processes it started, and one that crashes costs a request and not the
worker. What an engine prints goes where the worker's own output goes, and its end is part of every error.

Standard library only; POSIX.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from conformance.worker import guardian
from conformance.worker.adapter import Json

_PR_SET_PDEATHSIG = 1
_GRACE = 1.5
"""Seconds that an engine has to end by itself: less than the worker has, by `conformance.worker.guardian`."""
_LOG = 64 * 1024
_SHOWN = 12_000
"""Characters of the log that an error shows."""
_RAISED = re.compile(r"^(?:[\w.]+\.)?(?P<name>[A-Z]\w*(?:Error|Exception|Exit))(?:: ?(?P<message>.*))?$")
_PREFIX = re.compile(r"^\([^)]*pid=\d+\) (?:(?P<level>[A-Z]+) \d\S* \S+ \[\S+\] )?")
"""What vLLM puts before a line of its log."""
_DIED = re.compile(r"Worker proc \S+ died unexpectedly \(exit code: -?\d+\)")
"""What vLLM says of a rank that raised nothing: its own exception is then just that it stops waiting."""


class Engine(Protocol):
    """What runs in the fork."""

    def answer(self, request: Json) -> Json:
        """Answer one request."""
        ...

    def close(self) -> None:
        """Put things in order."""
        ...


class EngineProcessError(Exception):
    """An engine's process ended. What an engine raises comes as a subclass that bears its type's name."""


class EngineProcess:
    """A fork of this process that holds an engine.

    Args:
        start: Starts the engine in the fork; returns it.

    Raises:
        EngineProcessError: the engine did not start.
    """

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._log = bytearray()
        self._code: int | None = None
        self._silent = False
        """Nothing can print to its output any more."""
        self._connection, theirs = Pipe()
        self._output, output = os.pipe()
        _flush()
        parent = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                self._connection.close()
                os.close(self._output)
                code = _run(start, theirs, output, parent)
            finally:
                os._exit(code)
        with contextlib.suppress(OSError):  # the fork does the same; whoever comes first
            os.setpgid(self._pid, self._pid)
        theirs.close()
        os.close(output)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the fork, which leads a process group of its own."""
        return self._pid

    def ask(self, request: Json) -> Json:
        """Let the engine answer a request.

        Raises:
            EngineProcessError: it raised, or ended; it cannot be asked any more then.
        """
        self._log.clear()
        try:
            self._connection.send(request)
        except BrokenPipeError:  # waiting for the answer tells why
            pass
        except BaseException:
            self.close()
            raise
        try:
            return self._wait()
        except BaseException:
            # An engine that raised may hold half of a batch.
            self.close()
            raise

    def close(self) -> None:
        """End the engine and all that it started. Safe to call twice."""
        if self._connection.closed:
            return
        self._connection.close()
        end = time.monotonic() + _GRACE
        while not self._reaped() and time.monotonic() < end:
            self._read(0.02)
        _kill_group(self._pid)
        while not self._reaped():
            time.sleep(0.01)
        os.close(self._output)

    def _wait(self) -> Json:
        while True:
            ready = wait([self._connection, *([] if self._silent else [self._output])])
            if self._output in ready:
                self._read(0)
            if self._connection in ready:
                break
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if "error" in answer:
            self._read(0)  # it was printed before the answer was sent
            raise self._error(answer["error"])
        result: Json = answer["result"]
        return result

    def _read(self, seconds: float) -> None:
        """Pass on what the engine printed, and keep the end of it."""
        if self._silent:
            time.sleep(seconds)
        while not self._silent and wait([self._output], seconds):
            data = os.read(self._output, 1 << 16)
            self._silent = not data
            sys.stderr.buffer.write(data)
            sys.stderr.flush()
            self._log += data
            del self._log[:-_LOG]
            seconds = 0

    def _reaped(self) -> bool:
        """Whether the engine's process is gone; its code is kept."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def _death(self) -> EngineProcessError:
        end = time.monotonic() + _GRACE
        while not self._reaped() and time.monotonic() < end:
            self._read(0.02)
        self._read(0)
        how = "closed its connection" if self._code is None else f"ended with exit code {self._code}"
        if self._code is not None and self._code < 0:
            how = f"was killed by {signal.Signals(-self._code).name}"
        return self._error({"name": "", "message": f"the engine's process {how}", "traceback": ""})

    def _error(self, error: dict[str, str]) -> EngineProcessError:
        log = self._log.decode(errors="replace")
        name, message = error["name"], error["message"]
        cause = root_cause(log)
        if cause is not None and (cause[0] != name or cause[1] not in message):
            # Another process of the engine raised first, and what came here is an echo of it.
            then = f"raised {name}: {message}" if name else f"ended: {message}"
            name, message = cause[0], f"{cause[1]}; the engine then {then}"
        kind = type(name, (EngineProcessError,), {}) if name else EngineProcessError
        raised: EngineProcessError = kind(message)
        if log.strip():
            raised.add_note(f"The end of its log:\n{log[-_SHOWN:].strip()}")
        if error["traceback"]:
            raised.add_note(f"In the engine's process:\n{error['traceback'].strip()}")
        return raised


def _kill_group(group: int) -> None:
    """Kill the processes of a group, but for the one that deletes the others' shared memory and then ends."""
    if not Path("/proc/self/stat").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        return
    for _ in range(100):  # new ones may be forked while the old ones are killed
        members = _members(group)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _members(group: int) -> list[int]:
    """Processes of a group that can be killed, from /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        pid = int(entry.parent.name)
        try:
            text = entry.read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        state, _, its_group = text.rpartition(")")[2].split()[:3]
        if int(its_group) == group and state != "Z" and not guardian.is_tracker(pid):
            found.append(pid)
    return found


def root_cause(log: str) -> tuple[str, str] | None:
    """Name and message of the first exception, or death of a rank, that an engine's log reports as an error.

    An exception without a message is told by the line of code that raised it.
    """
    before = ""
    for line in log.splitlines():
        prefix = _PREFIX.match(line)
        if prefix is not None and prefix["level"] not in (None, "ERROR", "CRITICAL"):
            continue
        text = line[prefix.end() :] if prefix is not None else line
        raised = _RAISED.match(text)
        if raised is not None:
            return raised["name"], raised["message"] or f"at `{before}`"
        if (died := _DIED.search(text)) is not None:
            return "RuntimeError", died[0]
        if text.strip(" ^~"):
            before = text.strip()
    return None


def _run(start: Callable[[], Engine], connection: Connection, output: int, parent: int) -> int:
    """Be the engine's process; return its exit code."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
        if os.getppid() != parent:
            return 1
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    engine: Engine | None = None
    code = 1
    try:
        engine = start()
        connection.send({"result": {}})
        while (request := _next_request(connection)) is not None:
            connection.send({"result": engine.answer(request)})
        code = 0
    except BaseException as error:  # noqa: BLE001 - whatever the engine raises is its answer
        _flush()  # what it printed belongs to the error
        with contextlib.suppress(OSError):
            connection.send({"error": _description(error)})
    if engine is not None:
        engine.close()
    _flush()
    return code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # an engine may have closed them
            stream.flush()


def _next_request(connection: Connection) -> Json | None:
    try:
        request: Json = connection.recv()
    except (EOFError, ConnectionResetError):  # nobody asks any more
        return None
    return request


def _description(error: BaseException) -> dict[str, str]:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an engine's exception may not even have a text
        message = ""
    text = "".join(traceback.format_exception(error))
    return {"name": type(error).__name__, "message": message, "traceback": text}
