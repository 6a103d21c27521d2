"""A small process that ends a worker, and all that the worker started, when nobody needs it any more.

An engine may fork, start servers, detach them from its session, or hang in native code. So the process
that the harness starts is this guardian; the engine runs in its child. The guardian ends everything when

1. the harness closes the worker's standard input, or dies (which closes it too);
2. the harness sends SIGTERM;
3. the worker itself ends: what it started ends with it.

Then it deletes the worker's scratch folder, which the variable `CONFORMANCE_SCRATCH` names: where the harness
was killed, nobody else would.

Standard library only; Linux and macOS. Detached descendants are found on Linux only.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SCRATCH = "CONFORMANCE_SCRATCH"
_GRACE = 2.0
"""Seconds that the worker has to end by itself once its input is closed."""
_PROCESSES = Path("/proc/self/stat")
"""Where it is missing, descendants cannot be told from others."""
_TRACKER_ATTEMPTS = 50
"""So many hundredths of a second what cleans up after the others may go on."""


def split() -> int | None:
    """Fork. In the child, return None; in the guardian, return the child's exit code when all is over.

    Call it before anything else: a fork must not copy threads, locks or engines.
    """
    guardian = os.getpid()
    scratch = os.environ.pop(_SCRATCH, None)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    worker = os.fork()
    if worker:
        return _watch(worker, wake, scratch)
    signal.set_wakeup_fd(-1)
    os.close(wake)
    os.close(wakeup)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def _watch(worker: int, wake: int, scratch: str | None) -> int:
    """Wait for one of the three ends, and clear away; return the worker's exit code as a shell gives it."""
    # Only one process may hold the pipes of the protocol, or their ends would never be seen.
    os.close(1)
    poll = select.poll()
    poll.register(0, 0)  # asks for nothing, so that it wakes for a closed pipe only
    poll.register(wake, select.POLLIN)
    code: int | None = None
    deadline: float | None = None
    while code is None:
        left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
        ready = dict(poll.poll(left))
        code = _reap(worker)
        if wake in ready and any(n != signal.SIGCHLD for n in os.read(wake, 4096)):
            break
        if 0 in ready:
            poll.unregister(0)
            deadline = time.monotonic() + _GRACE
        elif not ready and deadline is not None:
            break
    if not _PROCESSES.exists():  # what follows kills this process too
        _delete(scratch)
    _kill_all(worker)
    _delete(scratch)
    return code if code is not None else 128 + signal.SIGKILL


def _reap(worker: int) -> int | None:
    """Exit code of the worker, or None while it runs; other descendants are only cleared away."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code


def _delete(scratch: str | None) -> None:
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)


def _kill_all(worker: int) -> None:
    """Kill the worker and every descendant."""
    me = os.getpid()
    if not _PROCESSES.exists():
        os.killpg(0, signal.SIGKILL)
    for attempt in range(100):  # new ones may be forked while the old ones are killed
        for pid in _descendants(me):
            if attempt < _TRACKER_ATTEMPTS and is_tracker(pid):
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap(worker)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        time.sleep(0.01)


def is_tracker(pid: int) -> bool:
    """Whether a process is Python's resource tracker.

    It deletes the shared memory of the others when they are gone, and ends then by itself.
    """
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return False


def _descendants(root: int) -> set[int]:
    """Processes below one, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: set[int] = set()
    todo = [root]
    while todo:
        new = [pid for pid in children.get(todo.pop(), ()) if pid not in found]
        found.update(new)
        todo += new
    return found
