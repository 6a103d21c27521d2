"""What an engine asks of a model whose layers run in other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model_impl.config import AttentionKind, TextConfig
from model_impl.parallel.layout import Layout
from model_impl.parallel.messages import Embed, Kept, MakePools, packed, unpacked
from model_impl.parallel.model import ParallelModel
from model_impl.parallel.shards import kv_heads
from model_impl.runtime.paged import CacheSizes, PagedCache, Place
from model_impl.runtime.runner import Batch
from model_impl.speculative.assistant import TargetKV, kv_layers
from model_impl.text import States, check_aux_layers


class ParallelRunner:
    """As `LocalRunner`; every rank has pools for its own layers and heads, and all have the same tables.

    Args:
        model: It goes on when the runner is closed.
        sizes: Of the pools.
        aux_layers: After how many layers the residual stream is wanted as well.

    Raises:
        CacheError: sizes are missing or not positive.
        ModelError: `aux_layers` is not distinct, ascending, and within the model.
        ParallelError: a rank went wrong.
    """

    def __init__(self, model: ParallelModel, sizes: CacheSizes, aux_layers: Sequence[int] = ()) -> None:
        check_aux_layers(aux_layers, len(model.config.layers))
        self.model = model
        self.config: TextConfig = model.config
        self.sizes = sizes
        self.aux_layers = tuple(aux_layers)
        # Without pools: what it refuses is refused here, and not in the ranks.
        self._judge = PagedCache(model.config, sizes, layers=(), dtype=model.dtype)
        self._number = model.new_number()
        made = self._ask_all(MakePools(self._number, sizes))
        self.stored = ", ".join(sorted({stored.decode() for stored in made.values() if stored}))
        self._closed = False

    def run(self, batch: Batch) -> States:
        """As `Runner.run`.

        Raises:
            ModelError: as `Runner.run`; the processes go on.
            ParallelError: a rank went wrong; the processes have ended.
        """
        places = tuple(piece.place for piece in batch.pieces)
        self._judge.view(places)
        with self.model.adapters.rows(batch.adapters):
            return self.model.run(
                batch.input_ids(self.config.pad_token_id),
                tuple(batch.lengths),
                batch.soft_tokens(),
                self.aux_layers,
                self._number,
                places,
            )

    def logits(self, hidden: Tensor, adapters: Sequence[str | None] = ()) -> Tensor:
        """As `Runner.logits`."""
        with self.model.adapters.rows(adapters):
            return self.model.logits(hidden)

    def embed(self, ids: Tensor) -> Tensor:
        """As `Runner.embed`."""
        request = Embed(packed({"ids": ids.to(torch.int64)}))
        first = range(self.model.layout.tensor)
        return self.model.one(self.model.group.ask(dict.fromkeys(first, request)))["embedded"]

    def kept(self, places: Sequence[Place]) -> Mapping[AttentionKind, TargetKV]:
        """As `Runner.kept`: from the stages that hold the layers, with the heads of all their ranks."""
        layers = kv_layers(self.config)
        self._judge.view(places)
        asked = Kept(self._number, tuple(layer.index for layer in layers.values()), tuple(places))
        answers = {rank: unpacked(answer) for rank, answer in self._ask_all(asked).items()}
        found: dict[AttentionKind, TargetKV] = {}
        for kind, layer in layers.items():
            parts = [
                answers[rank]
                for rank in sorted(answers)
                if f"keys.{layer.index}" in answers[rank]
                and _holds_first(layer.num_kv_heads, self.model.layout, rank)
            ]
            k, v = (
                torch.cat([part[f"{name}.{layer.index}"] for part in parts], dim=1)
                for name in ("keys", "values")
            )
            found[kind] = TargetKV(k, v, parts[0][f"positions.{layer.index}"])
        return found

    def close(self) -> None:
        """Drop the pools, before the next pass at the latest."""
        if not self._closed:
            self._closed = True
            self.model.forget(self._number)

    def _ask_all(self, request: MakePools | Kept) -> dict[int, bytes]:
        return self.model.group.ask(dict.fromkeys(range(self.model.layout.ranks), request))


def _holds_first(heads: int, layout: Layout, rank: int) -> bool:
    """Whether a rank is the first of its stage to hold its key-value heads, which neighbours may hold too."""
    shard = layout.place(rank).shard
    return shard == 0 or kv_heads(heads, layout.tensor, shard) != kv_heads(heads, layout.tensor, shard - 1)
