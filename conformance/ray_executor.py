"""Run cells on Ray: one task a cell, on a cluster that `RAY_ADDRESS` names, or one of this machine.

1. Workers have the harness and its engines installed. They share no files: what there is of a run file, and
   the matrix if it is not the bundled one, go with the task, and what became of the run file comes back.
2. A worker that dies is the cluster's doing, so its cell is run once more, on another one; how often it was
   tried is told with its result. Whatever the cell's own process does is no such thing, nor is an error that
   the worker itself comes to.
3. So many cells are handed out at a time as there are workers. The worker ends a cell that is over its limit,
   and only the worker says that it was. A cell of which nothing is heard, while no other came back either, is
   given up: that is an error of the cluster, which may not have begun it.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conformance.errors import UsageError
from conformance.execute import Ended, Job, run_process

_ATTEMPTS = 2
_GRACE = 300.0
"""Seconds beyond a cell's limit in which a worker must have been found, and have answered."""


@dataclass(frozen=True)
class _Files:
    """What a worker needs of the files that are here."""

    run_file: bytes | None
    matrix: bytes | None

    @classmethod
    def of(cls, job: Job) -> _Files:
        return cls(
            job.run_file.read_bytes() if job.run_file.exists() else None,
            job.matrix.read_bytes() if job.matrix is not None else None,
        )


@dataclass
class _Task:
    """A job that was handed out."""

    job: Job
    attempt: int
    started: float


def _run_cell(job: Job, files: _Files) -> tuple[Ended, bytes | None]:
    """What a worker does: run a job in a folder of its own, and give the run file back."""
    with tempfile.TemporaryDirectory(prefix="conformance-cell-") as folder:
        here = replace(job, run_file=Path(folder) / job.run_file.name)
        if files.run_file is not None:
            here.run_file.write_bytes(files.run_file)
        if job.matrix is not None and files.matrix is not None:
            matrix = Path(folder) / "matrix.yaml"
            matrix.write_bytes(files.matrix)
            here = replace(here, matrix=matrix)
        ended = run_process(here)
        content = here.run_file.read_bytes() if here.run_file.exists() else None
        if content is not None and job.matrix is not None:
            # Lines that repeat a case must name the matrix as it is called where they are read.
            content = content.replace(_quoted(here.matrix), _quoted(job.matrix))
        return replace(ended, job=job), content


def _quoted(path: Path | None) -> bytes:
    """A path as it stands in a line for a shell, within JSON."""
    return json.dumps(shlex.quote(str(path)), ensure_ascii=False)[1:-1].encode()


class RayExecutor:
    """A Ray cluster.

    Args:
        workers: How many cells run at a time.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, workers: int = 1) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError(
                "--executor ray: Ray is not installed; pip install 'gemma4-conformance[ray]'"
            ) from None
        self._ray: Any = ray
        self._workers = workers
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False}
        if "RAY_ADDRESS" not in os.environ:
            options |= {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            self._ray.init(**options)
        except Exception as error:  # Ray raises all kinds, and Exception itself
            raise UsageError(f"--executor ray: the cluster cannot be used: {error}") from error
        self._remote = self._ray.remote(num_cpus=1, max_retries=0)(_run_cell)

    def run(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        """Run jobs; an interrupt, or leaving off early, ends all tasks."""
        waiting = deque((job, 1) for job in jobs)
        running: dict[Any, _Task] = {}
        heard = time.monotonic()  # when the last one came back
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    job, attempt = waiting.popleft()
                    reference = self._remote.remote(job, _Files.of(job))
                    running[reference] = _Task(job, attempt, time.monotonic())
                done, _ = self._ray.wait(list(running), num_returns=1, timeout=1.0)
                for reference in done:
                    task = running.pop(reference)
                    heard = time.monotonic()
                    ended = self._ended(reference, task)
                    if ended is None:
                        waiting.append((task.job, task.attempt + 1))
                    else:
                        yield ended
                for reference, task in list(running.items()):
                    # While others come back, it may be waiting for a worker.
                    silent = time.monotonic() - max(task.started, heard)
                    if silent > task.job.limit + _GRACE:
                        del running[reference]
                        self._ray.cancel(reference, force=True)
                        lost = f"no worker answered for the cell, nor for another one, for {silent:.0f} s"
                        yield Ended(task.job, None, silent, "", task.attempt, lost)
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)
            self._ray.shutdown()

    @staticmethod
    def _lost(task: _Task, why: str) -> Ended:
        return Ended(task.job, None, time.monotonic() - task.started, "", task.attempt, why)

    def _ended(self, reference: Any, task: _Task) -> Ended | None:
        """What became of a task; None where it is to be tried again."""
        try:
            ended, content = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # what `_run_cell` raised
            return self._lost(task, f"its worker could not run it: {str(error).strip().splitlines()[-1]}")
        except self._ray.exceptions.RayError as error:
            if task.attempt < _ATTEMPTS:
                return None
            last = str(error).strip().splitlines()[0]
            return self._lost(task, f"its worker died {task.attempt} times: {last}")
        if content is not None:
            task.job.run_file.parent.mkdir(parents=True, exist_ok=True)
            task.job.run_file.write_bytes(content)
        made: Ended = replace(ended, attempts=task.attempt)
        return made
