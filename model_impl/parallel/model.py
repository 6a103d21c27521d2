"""A text model whose layers run in other processes, used as one in this process is."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from model_impl.errors import CacheError, ModelError
from model_impl.parallel.adapters import ParallelAdapters
from model_impl.parallel.group import DEADLINE, Group, ParallelError
from model_impl.parallel.layout import Layout
from model_impl.parallel.loading import Weights
from model_impl.parallel.messages import Forget, Forward, Head, Loaded, packed, packed_soft, unpacked
from model_impl.runtime.cache import KVCache
from model_impl.runtime.generate import Generated, generate
from model_impl.runtime.masks import BlockMode
from model_impl.runtime.paged import Place
from model_impl.text import SoftTokens, States, check_aux_layers


class RemoteCache(KVCache):
    """Stands for the caches of all ranks: knows how long its rows are, and holds no keys or values."""

    def __init__(self, owner: ParallelModel, number: int, rows: int) -> None:
        super().__init__(owner.config, rows, owner.dtype)
        self.owner = owner
        """Whose ranks hold it, under a number that others may have too."""
        self.number = number


class ParallelModel:
    """What `TextModel` offers, from several processes; this one keeps no weights.

    Args:
        folder: Of a checkpoint: `config.json`, and one or several safetensors files.
        layout: How the model is divided.
        dtype: Of parameters and of the computation.
        attention: Backend of all layers; left out, the first that can serve them.
        long_blocks: What becomes of an image that is longer than the window.
        threads: Of each rank.
        deadline: Seconds for the start and for each request.

    Raises:
        LayoutError: the layout does not fit the model.
        BackendError, ConfigError, CheckpointError: as `load_text_model`.
        ParallelError: a rank could not start.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str | None = None,
        long_blocks: BlockMode = "clamp_past",
        threads: int = 1,
        deadline: float = DEADLINE,
    ) -> None:
        weights = Weights(str(folder), dtype, attention, long_blocks)
        self.group = Group(layout, weights, threads=threads, deadline=deadline)
        self.config = self.group.config
        self.layout = layout
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.adapters = ParallelAdapters(self.group)
        """Those of its rows, as `model_impl.lora.Adapters`."""
        self._numbers = itertools.count()
        self._unneeded: list[int] = []

    @property
    def loaded(self) -> dict[int, Loaded]:
        """What each rank holds, as it said itself."""
        return self.group.loaded

    @property
    def attention_backend(self) -> str:
        """The backend that the layers run, read back from them."""
        return ", ".join(sorted({loaded.attention for loaded in self.loaded.values()}))

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache of so many rows, for this model."""
        cache = RemoteCache(self, self.new_number(), rows)
        weakref.finalize(cache, self._unneeded.append, cache.number).atexit = False
        return cache

    def new_number(self) -> int:
        """For a cache that the ranks will hold."""
        return next(self._numbers)

    def forget(self, number: int) -> None:
        """Let the ranks drop a cache before the next pass."""
        self._unneeded.append(number)

    def __call__(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
        soft: SoftTokens | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H]; arguments and errors as `states`."""
        return self.states(input_ids, cache=cache, lengths=lengths, soft=soft).hidden

    def states(
        self,
        input_ids: Tensor,
        *,
        aux_layers: Sequence[int] = (),
        cache: KVCache | None = None,
        lengths: Sequence[int] | None = None,
        soft: SoftTokens | None = None,
    ) -> States:
        """One pass over new tokens, as `TextModel.states`; the cache is one that `new_cache` made.

        Raises:
            CacheError, ModelError: as `TextModel.states`; the processes go on.
            ParallelError: a rank went wrong; the processes have ended.
        """
        check_aux_layers(aux_layers, len(self.config.layers))
        rows, width = input_ids.shape
        counts = [width] * rows if lengths is None else list(lengths)
        if len(counts) != rows or not all(0 <= count <= width for count in counts):
            raise CacheError(f"lengths {counts} do not fit input_ids of {rows} rows and {width} columns")
        number = None
        if cache is not None:
            if not isinstance(cache, RemoteCache) or cache.owner is not self:
                raise CacheError("the cache is not of these processes; make it with `new_cache`")
            cache.check(self.config, self.dtype)
            cache.expect(width, counts)
            number = cache.number
        states = self.run(input_ids, tuple(counts), soft, tuple(aux_layers), number)
        if cache is not None:
            cache.commit()
        return states

    def run(
        self,
        ids: Tensor,
        counts: tuple[int, ...],
        soft: SoftTokens | None,
        aux_layers: tuple[int, ...],
        cache: int | None,
        places: tuple[Place, ...] | None = None,
    ) -> States:
        """One pass through all stages; arguments must have been judged, as what a rank refuses ends it.

        Raises:
            AdapterError: other rows than those of the pass were said to use adapters; the processes go on.
            ParallelError: a rank went wrong; the processes have ended.
        """
        adapters = self.adapters.of_pass(len(ids))
        self._forget()
        rows: tuple[tuple[int, ...], ...] = tuple(map(tuple, ids.tolist()))
        requests = {}
        for rank in range(self.layout.ranks):
            first = self.layout.place(rank).stage == 0
            sent = None if soft is None else packed_soft(soft, features=first)
            requests[rank] = Forward(rows, counts, sent, aux_layers, cache, places, adapters)
        answer = self.one(self.group.ask(requests))
        return States(answer["hidden"], tuple(answer[f"aux.{i}"] for i in range(len(aux_layers))))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary], soft-capped.

        Raises:
            AdapterError: other rows than those of `hidden` were said to use adapters; the processes go on.
            ParallelError: a rank went wrong; the processes have ended.
        """
        if hidden.shape[-1] != self.config.hidden_size or hidden.dtype != self.dtype:
            raise ModelError(
                f"hidden states of width {hidden.shape[-1]} in {hidden.dtype} do not fit a model of width "
                f"{self.config.hidden_size} in {self.dtype}"
            )
        last = range(self.layout.ranks - self.layout.tensor, self.layout.ranks)
        request = Head(packed({"hidden": hidden}), self.adapters.of_pass(len(hidden)))
        return self.one(self.group.ask(dict.fromkeys(last, request)))["logits"]

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generated]:
        """As `model_impl.runtime.generate.generate`, with its options."""
        return generate(self, prompts, **options)

    def close(self) -> None:
        """End all processes."""
        self.group.close()

    def __enter__(self) -> ParallelModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self) -> None:
        """Let the ranks drop the caches that are no longer in use here."""
        if self._unneeded:
            caches = tuple(self._unneeded)
            self._unneeded.clear()
            self.group.ask(dict.fromkeys(range(self.layout.ranks), Forget(caches)))

    @staticmethod
    def one(answers: dict[int, bytes]) -> dict[str, Tensor]:
        """The tensors that one of the ranks sent."""
        (answer,) = answers.values()
        return unpacked(answer)


__all__ = ["Layout", "ParallelError", "ParallelModel", "RemoteCache"]
