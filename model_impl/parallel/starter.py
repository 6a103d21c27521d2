"""Starts the ranks of a group: `python -m model_impl.parallel.starter CONTROL RANK...`, all descriptors.

Importing torch takes longer than anything else at the start, so it happens once here, before any tensor or
thread exists, and each rank is a fork. Ranks end with this process, and this process with the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from model_impl.parallel.worker import serve

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Fork one rank for each descriptor, tell their process ids, and tell how each of them ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver is interrupted, and closes
    control: Connection[Any, Any] = Connection(int(sys.argv[1]))
    descriptors = [int(argument) for argument in sys.argv[2:]]
    gc.freeze()
    processes = [_fork(descriptor, (control.fileno(), *descriptors)) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    control.send(tuple(processes))
    _watch(control, processes)


def _fork(descriptor: int, inherited: tuple[int, ...]) -> int:
    """Start a rank; its process id."""
    parent = os.getpid()
    if process := os.fork():
        return process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
    if os.getppid() != parent:
        os._exit(1)
    for other in inherited:
        if other != descriptor:
            os.close(other)
    status = 1
    try:
        serve(Connection(descriptor))
        status = 0
    finally:
        os._exit(status)


def _watch(control: Connection[Any, Any], processes: list[int]) -> None:
    """Wait for all ranks; kill them when one was killed or crashed, or when the driver is gone or closes."""
    watched = {os.pidfd_open(process): rank for rank, process in enumerate(processes)}
    poll = select.poll()
    for descriptor in (control.fileno(), *watched):
        poll.register(descriptor, select.POLLIN)
    while watched:
        for descriptor, _event in poll.poll():
            poll.unregister(descriptor)
            if descriptor == control.fileno():
                _kill([processes[rank] for rank in watched.values()])
                continue
            rank = watched.pop(descriptor)
            _, status = os.waitpid(processes[rank], 0)
            # If the driver does not listen any more, the others are ended for that.
            with contextlib.suppress(OSError):
                control.send((rank, os.waitstatus_to_exitcode(status)))
            if status != 0:
                _kill([processes[rank] for rank in watched.values()])


def _kill(processes: Sequence[int]) -> None:
    """End ranks that have not been waited for, so that their ids are still theirs."""
    for process in processes:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
