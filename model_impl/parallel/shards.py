"""Which part of each tensor a rank holds (fact sheet, section 8.3).

Heads, the width of MLPs and the rows of tables are divided; norms, routers, and the small projections of
per-layer inputs inside a layer are on every rank. Tables are divided too: those of per-layer inputs are
more than half of E2B. A lookup then adds zeros of the other ranks, which changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model_impl.config import TextConfig
from model_impl.parallel.layout import Layout
from model_impl.parallel.ranks import even_part


class _Sliceable(Protocol):
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Cut:
    """A part of a tensor: ranges of one axis, side by side."""

    axis: int
    ranges: tuple[tuple[int, int], ...]

    def of(self, tensor: _Sliceable) -> Tensor:
        """Cut a tensor, or a stored one of which only the part is read."""
        ahead = (slice(None),) * self.axis
        parts = [tensor[(*ahead, slice(start, stop))] for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axis)


_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_COLUMNS = ("mlp.down_proj.weight",)
_ROWS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def cut_of(name: str, config: TextConfig, layout: Layout, shard: int) -> Cut | None:
    """The part of a tensor that a rank of a stage holds; None for all of it.

    Args:
        name: As published, without prefix.
        config: Of the whole model.
        layout: Fits it.
        shard: Which rank of its stage.
    """
    if layout.tensor == 1:
        return None
    if (match := _LAYER.fullmatch(name)) is None:
        return _of_table(name, config, layout, shard)
    layer, part = config.layers[int(match[1])], match[2]
    if part in ("self_attn.q_proj.weight", "self_attn.o_proj.weight"):
        heads = _even(config.num_heads, layout, shard, layer.head_dim)
        return Cut(0 if "q_proj" in part else 1, (heads,))
    if part in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        first, stop = kv_heads(layer.num_kv_heads, layout.tensor, shard)
        return Cut(0, ((first * layer.head_dim, stop * layer.head_dim),))
    if part in _ROWS or part in _COLUMNS:
        return Cut(0 if part in _ROWS else 1, (_even(layer.intermediate_size, layout, shard),))
    if part.startswith("experts.") and config.moe is not None:
        if layout.expert:
            return Cut(0, (_even(config.moe.num_experts, layout, shard),))
        start, stop = _even(config.moe.intermediate_size, layout, shard)
        if part == "experts.down_proj":
            return Cut(2, ((start, stop),))
        half = config.moe.intermediate_size  # the gate's rows, then the up-projection's
        return Cut(1, ((start, stop), (half + start, half + stop)))
    return None


def kv_heads(heads: int, ranks: int, shard: int) -> tuple[int, int]:
    """The key-value heads that the query heads of a rank read: the first, and the one after the last.

    With fewer heads than ranks, `ranks / heads` neighbours hold the same one.
    """
    if heads >= ranks:
        return shard * heads // ranks, (shard + 1) * heads // ranks
    one = shard * heads // ranks
    return one, one + 1


def _of_table(name: str, config: TextConfig, layout: Layout, shard: int) -> Cut | None:
    rows = {"embed_tokens.weight": config.vocab_size, "lm_head.weight": config.vocab_size}
    if (ple := config.per_layer_inputs) is not None:
        rows["embed_tokens_per_layer.weight"] = ple.vocab_size
        rows["per_layer_model_projection.weight"] = len(config.layers) * ple.width
    return Cut(0, (even_part(rows[name], layout.tensor, shard),)) if name in rows else None


def _even(size: int, layout: Layout, shard: int, width: int = 1) -> tuple[int, int]:
    each = size // layout.tensor
    return shard * each * width, (shard + 1) * each * width


def cut_shape(shape: Sequence[int], cut: Cut | None) -> tuple[int, ...]:
    """Shape of a part."""
    if cut is None:
        return tuple(shape)
    length = sum(stop - start for start, stop in cut.ranges)
    return (*shape[: cut.axis], length, *shape[cut.axis + 1 :])
