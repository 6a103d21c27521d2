"""Faults of models that are spread over processes (catalogue class 6), switched on in every rank.

A rank is a process of its own: it imports this module, and nothing else of the harness, before it loads.
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from conformance.faults.base import Collection, Patch, replace
from model_impl.config import MoEConfig, TextConfig
from model_impl.parallel import divided, loading, shards, wire
from model_impl.parallel import stage as stages
from model_impl.parallel.divided import SummedLinear, WholeExperts
from model_impl.parallel.layout import Layout
from model_impl.parallel.payload import Payload
from model_impl.parallel.ranks import Ranks
from model_impl.parallel.shards import Cut
from model_impl.parallel.stage import Stage

faults = Collection("invariance")
rank = partial(faults, area="invariance-layouts", in_ranks=True)


def switch_on(fault_id: str) -> None:
    """Switch a fault on for the rest of this process's life.

    Raises:
        LookupError: there is no such fault here.
    """
    for fault in faults.faults:
        if fault.id == fault_id:
            for make in fault.patches:
                make().__enter__()
            return
    raise LookupError(f"no fault {fault_id!r} reaches ranks; those that do are in {__name__}")


@rank("parts-of-a-projection-not-summed", source=("spec 8.3",), module=divided)
def _not_summed() -> Patch:
    """Behind a projection whose inputs are divided, each rank goes on with its own part of the sum."""
    return replace(SummedLinear, "forward", nn.Linear.forward)


@rank("key-value-heads-dealt-in-turn", source=("P13",), module=shards)
def _dealt_in_turn() -> Patch:
    """With more ranks than key-value heads, ranks get these in turn, and not the one their queries read."""
    original = shards.kv_heads

    def in_turn(heads: int, ranks: int, shard: int) -> tuple[int, int]:
        return original(heads, ranks, shard) if heads >= ranks else (shard % heads, shard % heads + 1)

    return replace(shards, "kv_heads", in_turn)


@rank("key-value-heads-of-the-first-rank", source=("P06",), module=loading)
def _of_the_first_rank() -> Patch:
    """Full layers, which have few key-value heads, have those of the first rank on every rank."""
    original = shards.cut_of

    def cut_of(name: str, config: TextConfig, layout: Layout, shard: int) -> Cut | None:
        layer = re.fullmatch(r"layers\.(\d+)\.self_attn\.[kv]_proj\.weight", name)
        if layer and config.layers[int(layer[1])].kind == "full_attention":
            return original(name, config, layout, 0)
        return original(name, config, layout, shard)

    return replace(loading, "cut_of", cut_of)


@rank("unaligned-rest-left-out", source=("P05",), module=divided)
def _unaligned_rest() -> Patch:
    """A rank's part of a width that is no multiple of 32 is cut down to one, and not filled up with zeros."""

    def aligned(self: SummedLinear, x: Tensor) -> Tensor:
        width = x.shape[-1] // 32 * 32
        return self._ranks.sum(functional.linear(x[..., :width], self.weight[:, :width]))

    return replace(SummedLinear, "forward", aligned)


@rank("experts-of-the-next-rank", source=("spec 8.4",), module=divided)
def _next_ranks_experts() -> Patch:
    """A rank takes the tokens that the router sends to the experts of the next one."""
    original = WholeExperts.__init__

    def shifted(self: WholeExperts, hidden_size: int, config: MoEConfig, ranks: Ranks, shard: int) -> None:
        original(self, hidden_size, config, ranks, shard)
        own = self.stop - self.first
        self.first = (shard + 1) % ranks.size * own
        self.stop = self.first + own

    return replace(WholeExperts, "__init__", shifted)


@rank("vocabulary-in-another-order", source=("P07",), module=wire)
def _another_order() -> Patch:
    """Parts of the logits are put together with the last rank's first."""
    original = Stage.logits

    def turned(self: Stage, hidden: Tensor) -> Tensor:
        logits: Tensor = original(self, hidden)
        return logits.roll(logits.shape[-1] // self.layout.tensor, dims=-1)

    return replace(Stage, "logits", turned)


@rank("states-by-index-within-a-rank", source=("spec 8.2",), module=stages)
def _index_within_a_rank() -> Patch:
    """A rank takes the states for a draft by how many layers it has run itself, over those that were sent."""
    return replace(Stage, "layers_done", lambda self, index: index + 1 - self.span.start)


@rank("per-layer-inputs-not-read-by-later-ranks", source=("P01",), module=stages)
def _not_read() -> Patch:
    """Per-layer inputs reach the processes of later stages, which go on without."""

    def nothing(_self: Stage, _payload: Payload) -> None:
        return None

    return replace(Stage, "received_per_layer_inputs", nothing)
