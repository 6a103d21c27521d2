"""Run cells on Ray: one task a cell, on a cluster that `RAY_ADDRESS` names, or one of this machine.

1. Workers have the harness and its engines installed. They share no files: what there is of a run file goes
   with the task, and what became of it comes back.
2. A worker that dies is the cluster's doing, so its cell is run once more, on another one; how often it was
   tried is told with its result. Whatever the cell's own process does is no such thing.
3. So many cells run at a time as there are workers; one that is long over its limit is given up.
"""

from __future__ import annotations

import os
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


@dataclass
class _Task:
    """A job that was handed out."""

    job: Job
    attempt: int
    started: float


def _run_cell(job: Job, before: bytes | None) -> tuple[Ended, bytes | None]:
    """What a worker does: run a job in a folder of its own, and give the run file back."""
    with tempfile.TemporaryDirectory(prefix="conformance-cell-") as folder:
        path = Path(folder) / job.run_file.name
        if before is not None:
            path.write_bytes(before)
        ended = run_process(replace(job, run_file=path))
        return replace(ended, job=job), path.read_bytes() if path.exists() else None


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
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    job, attempt = waiting.popleft()
                    before = job.run_file.read_bytes() if job.run_file.exists() else None
                    running[self._remote.remote(job, before)] = _Task(job, attempt, time.monotonic())
                done, _ = self._ray.wait(list(running), num_returns=1, timeout=1.0)
                for reference in done:
                    task = running.pop(reference)
                    ended = self._ended(reference, task)
                    if ended is None:
                        waiting.append((task.job, task.attempt + 1))
                    else:
                        yield ended
                for reference, task in list(running.items()):
                    if time.monotonic() - task.started > task.job.limit + _GRACE:
                        del running[reference]
                        self._ray.cancel(reference, force=True)
                        yield Ended(task.job, None, task.job.limit, "", task.attempt)
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)
            self._ray.shutdown()

    def _ended(self, reference: Any, task: _Task) -> Ended | None:
        """What became of a task; None where it is to be tried again."""
        try:
            ended, content = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if task.attempt < _ATTEMPTS:
                return None
            last = str(error).strip().splitlines()[0]
            said = f"its worker died {task.attempt} times: {last}"
            return Ended(task.job, -9, time.monotonic() - task.started, said, task.attempt)
        if content is not None:
            task.job.run_file.parent.mkdir(parents=True, exist_ok=True)
            task.job.run_file.write_bytes(content)
        made: Ended = replace(ended, attempts=task.attempt)
        return made
