"""The processes of a layout, and what becomes of them when one goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from model_impl.errors import ModelError
from model_impl.parallel.layout import Layout
from model_impl.parallel.loading import Weights, check_folder
from model_impl.parallel.messages import Close, Done, Failed, Loaded, Preparation, Reply, Request, Start
from model_impl.parallel.wire import Board

DEADLINE = 60.0
"""Seconds, unless given: for the start, and for each request."""
PREPARATION: Preparation | None = None
"""What ranks do first, of groups that are made from now on; a harness sets it."""
_GRACE = 2.0
"""Seconds for the rank that went wrong to say so, once another has lost touch with it."""


class ParallelError(ModelError):
    """A rank has died, raised, or hangs: which one, and what it said. All others have been ended."""


class _Processes:
    """The ranks, and the process that starts them: what has to be ended, however the driver ends."""

    def __init__(self, ranks: int, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        pairs = [Pipe() for _ in range(ranks + 1)]
        (self.control, *self.connections), others = zip(*pairs, strict=True)
        descriptors = [other.fileno() for other in others]
        # Ranks import what the driver can import, and start no more threads than they may.
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
        self._starter = subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-P", "-m", "model_impl.parallel.starter", *map(str, descriptors)],
            env=os.environ | environment,
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for other in others:
            other.close()
        self._sockets = [socket.socket(fileno=os.dup(own.fileno())) for own in self.connections]
        self.ids: tuple[int, ...] = ()
        """Process ids of the ranks."""
        self._statuses: dict[int, int] = {}
        """How ranks ended, in the order in which they did."""

    def started(self, deadline: float) -> None:
        """Wait until the ranks are there.

        Raises:
            ParallelError: they do not come.
        """
        try:
            if not self.control.poll(deadline):
                raise ParallelError(f"no process has started within {deadline:g} seconds")
            self.ids = self.control.recv()
        except (EOFError, OSError):
            status = self._starter.wait()
            raise ParallelError(
                f"the process that starts the ranks ended with exit code {status}; its error output says why"
            ) from None

    def within(self, rank: int, until: float) -> Connection[Any, Any]:
        """The connection to a rank; what blocks on it raises `BlockingIOError` at some time of the clock.

        A message may be larger than what the system takes or has, so that a rank that stands still would
        hold whoever sends or receives it.
        """
        left = max(0.001, until - time.monotonic())
        limit = struct.pack("@ll", int(left), int(left % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._sockets[rank].setsockopt(socket.SOL_SOCKET, option, limit)
        connection: Connection[Any, Any] = self.connections[rank]
        return connection

    def status(self, rank: int) -> int | None:
        """How a rank has ended, as `subprocess` tells it; None if that is not to be learned."""
        until = time.monotonic() + _GRACE
        while rank not in self._statuses and self.control.poll(max(0.0, until - time.monotonic())):
            try:
                ended, status = self.control.recv()
            except (EOFError, OSError):
                return None
            self._statuses[ended] = status
        return self._statuses.get(rank)

    def first_killed(self) -> int | None:
        """The first rank that ended otherwise than by its own will; the others were killed for that."""
        return next((rank for rank, status in self._statuses.items() if status != 0), None)

    def finished(self) -> None:
        """Give the ranks, which have been told to end, a moment for it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._starter.wait(_GRACE)

    def end(self) -> None:
        """Kill all and wait for them."""
        self.control.close()
        try:
            self._starter.wait(_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self._starter.pid, signal.SIGKILL)
            self._starter.wait()
        for connection in (*self.connections, *self._sockets):
            connection.close()
        self.folder.cleanup()


class Group:
    """Starts one process for each rank, asks them, and ends them.

    Args:
        layout: Fits the model.
        weights: Each rank reads its own part.
        threads: Of each rank; several ranks on few cores are slower with more.
        deadline: Seconds for the start and for each request, and for a rank to wait for another.

    Raises:
        LayoutError, ConfigError, CheckpointError, BackendError: before any process is started.
        ParallelError: a rank could not start.
    """

    def __init__(
        self, layout: Layout, weights: Weights, *, threads: int = 1, deadline: float = DEADLINE
    ) -> None:
        self.config = weights.config
        self.layout = layout
        layout.check(self.config)
        check_folder(weights)
        self._deadline = deadline
        self._ended: str | None = None
        self._processes = _Processes(layout.ranks, threads)
        self._finalizer = weakref.finalize(self, self._processes.end)
        folder = self._processes.folder.name
        self._board = Board(Path(folder) / "board", layout.ranks)
        self._ranks = range(layout.ranks)
        try:
            self._processes.started(deadline)
            starts = {
                rank: Start(layout, rank, weights, folder, threads, deadline, PREPARATION)
                for rank in self._ranks
            }
            answers = self._answers(starts)
        except BaseException:
            self._finalizer()
            raise
        self.loaded = {rank: loaded for rank, loaded in answers.items() if isinstance(loaded, Loaded)}
        """What each rank holds."""

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of all ranks."""
        return self._processes.ids

    def ask(self, requests: Mapping[int, Request]) -> dict[int, bytes]:
        """Send requests to some ranks, and wait for all that they answer.

        Returns:
            What ranks had to send, by rank.

        Raises:
            ParallelError: a rank went wrong, now or before.
        """
        if self._ended is not None:
            raise ParallelError(f"these processes have ended: {self._ended}")
        try:
            answers = self._answers(requests)
        except BaseException as error:
            self._ended = self._ended or f"{type(error).__name__}: {error}"
            self._finalizer()
            raise
        return {rank: answer for rank, answer in answers.items() if isinstance(answer, bytes)}

    def close(self) -> None:
        """End all processes; harmless when they have ended."""
        if self._ended is None:
            self._ended = "they were closed"
            for rank in self._ranks:
                with contextlib.suppress(OSError):
                    self._processes.within(rank, time.monotonic() + _GRACE).send(Close())
            self._processes.finished()
        self._finalizer()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self, messages: Mapping[int, Start | Request]) -> dict[int, bytes | Loaded | None]:
        """What ranks say to messages, by rank.

        Raises:
            ParallelError: a rank failed or died, whether it was asked or not, or does not take its message or
                answer it in time.
        """
        until = time.monotonic() + self._deadline
        for rank, message in messages.items():
            try:
                self._processes.within(rank, until).send(message)
            except BlockingIOError:
                raise self._silence({rank}) from None
            except OSError:
                raise self._failure(dict([self._death(rank)])) from None
        return self._collect(set(messages), until)

    def _collect(self, pending: set[int], until: float) -> dict[int, bytes | Loaded | None]:
        """Replies of all of `pending`; errors as `_answers`."""
        answers: dict[int, bytes | Loaded | None] = {}
        failures: dict[int, Failed] = {}
        while pending - answers.keys() and (not failures or all(x.lost_touch for x in failures.values())):
            for rank, reply in self._replies(failures, until):
                if isinstance(reply, Failed):
                    until = until if failures else time.monotonic() + _GRACE
                    failures[rank] = reply
                else:
                    answers[rank] = reply.answer
            if time.monotonic() >= until:
                break
        if failures:
            raise self._failure(failures)
        if silent := pending - answers.keys():
            raise self._silence(silent)
        return answers

    def _replies(self, failures: Mapping[int, Failed], until: float) -> list[tuple[int, Reply]]:
        """What has come in, at once if something has, from ranks that have not failed."""
        ranks = {
            connection: rank
            for rank, connection in enumerate(self._processes.connections)
            if rank not in failures
        }
        found: list[tuple[int, Reply]] = []
        for ready in wait(list(ranks), max(0.0, until - time.monotonic())):
            assert isinstance(ready, Connection)
            rank = ranks[ready]
            try:
                reply = self._processes.within(rank, until).recv()
                assert isinstance(reply, Done | Failed)
                found.append((rank, reply))
            except BlockingIOError:
                raise (self._failure(failures) if failures else self._silence({rank})) from None
            except (EOFError, OSError):
                found.append(self._death(rank))
        return found

    def _death(self, rank: int) -> tuple[int, Failed]:
        """How a rank has ended; of one that was killed because another was: that other."""
        status = self._processes.status(rank)
        first = self._processes.first_killed()
        if first is not None:
            rank, status = first, self._processes.status(first)
        if status is None:
            how = "is gone"
        elif status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        else:
            how = f"ended with exit code {status}"
        return rank, Failed(how, lost_touch=False)

    def _failure(self, failures: Mapping[int, Failed]) -> ParallelError:
        """The rank that went wrong by itself, or the first that lost touch with others."""
        rank, failed = min(failures.items(), key=lambda item: item[1].lost_touch)
        return ParallelError(f"{self._name(rank)}: {failed.error}")

    def _silence(self, silent: set[int]) -> ParallelError:
        """Which ranks do not answer: those that do not wait for others, if there are any."""
        hanging = {rank for rank in silent if not self._board.waits(rank)} or silent
        named = ", ".join(self._name(rank) for rank in sorted(hanging))
        return ParallelError(f"no answer within {self._deadline:g} seconds: {named}")

    def _name(self, rank: int) -> str:
        place = self.layout.place(rank)
        span = self.layout.spans(len(self.config.layers))[place.stage]
        layers = f"layers {span.start} to {span.stop - 1}" if len(span) > 1 else f"layer {span.start}"
        return f"rank {rank} (stage {place.stage}, {layers}, shard {place.shard} of {self.layout.tensor})"
