"""Ranks of one stage as threads of one process, for tests that compare numbers and start no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from model_impl.parallel.layout import Layout, Place
from model_impl.parallel.loading import stage_of
from model_impl.parallel.payload import Payload
from model_impl.parallel.stage import Pass, Stage
from model_impl.runtime.cache import KVCache
from model_impl.text import States, TextModel

Result = TypeVar("Result")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.given: list[Tensor] = [torch.empty(0)] * size


class InThreads:
    """One of the ranks of a stage."""

    def __init__(self, meeting: _Meeting, index: int) -> None:
        self._meeting, self._index = meeting, index
        self.size = len(meeting.given)

    def _all(self, x: Tensor) -> list[Tensor]:
        self._meeting.given[self._index] = x
        self._meeting.barrier.wait()
        everyone = [tensor.clone() for tensor in self._meeting.given]
        self._meeting.barrier.wait()
        return everyone

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(dim=0)

    def gather(self, x: Tensor, total: int) -> Tensor:
        return torch.cat(self._all(x), dim=-1)[..., :total]


class Divided:
    """All ranks of a layout, with the weights of a model in memory."""

    def __init__(self, model: TextModel, layout: Layout) -> None:
        self.layout = layout
        self._pool = ThreadPoolExecutor(max(1, layout.tensor))
        self.stages: list[list[Stage]] = []
        for stage in range(layout.stages):
            meeting = _Meeting(layout.tensor)
            self.stages.append(
                [
                    stage_of(model, layout, Place(stage, t), InThreads(meeting, t))
                    for t in range(layout.tensor)
                ]
            )

    def new_caches(self, rows: int) -> list[list[KVCache]]:
        return [[shard.new_cache(rows) for shard in shards] for shards in self.stages]

    def run(
        self, work: Pass, caches: Sequence[Sequence[KVCache | None]] | None = None
    ) -> tuple[list[list[Payload]], list[States]]:
        """The payloads of every boundary and shard, and the states of every shard of the last stage."""
        payloads: list[list[Payload]] = []
        before: Sequence[Payload | None] = [None] * self.layout.tensor
        for index, shards in enumerate(self.stages):
            own = [None] * len(shards) if caches is None else caches[index]
            results = self._together(
                [
                    lambda shard=shard, given=given, cache=cache: shard.run(work, given, cache)
                    for shard, given, cache in zip(shards, before, own, strict=True)
                ]
            )
            if index == len(self.stages) - 1:
                states = [result for result in results if isinstance(result, States)]
                return payloads, states
            before = [result for result in results if isinstance(result, Payload)]
            payloads.append(list(before))
        raise AssertionError("a layout has a stage")

    def logits(self, hidden: Tensor) -> list[Tensor]:
        """Of every shard of the last stage."""
        return self._together([lambda shard=shard: shard.logits(hidden) for shard in self.stages[-1]])

    def _together(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        def guarded(call: Callable[[], Result]) -> Result:
            with torch.inference_mode():
                return call()

        return list(self._pool.map(guarded, calls))
