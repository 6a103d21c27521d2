"""What the layers of one forward pass share: positions, masks, and keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model_impl.config import AttentionKind, LayerConfig, TextConfig
from model_impl.layers.backends import Mask
from model_impl.runtime.masks import BlockMode

RopeAngles = tuple[Tensor, Tensor]


class KeyValueStore(Protocol):
    """Keeps keys and values of earlier passes."""

    def extend(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the new tokens [B, g, T, d]; return all that this pass attends to [B, g, S, d]."""
        ...


class Cache(KeyValueStore, Protocol):
    """What a model asks of a key-value cache in each pass: `check`, `begin`, `extend` by layer, `commit`."""

    def check(self, config: TextConfig, dtype: torch.dtype) -> None:
        """Refuse a model that the cache was not made for.

        Raises:
            CacheError: another configuration, or another dtype.
        """
        ...

    def begin(
        self, width: int, counts: Sequence[int], blocks: Tensor | None = None, mode: BlockMode = "clamp_past"
    ) -> tuple[Tensor, dict[AttentionKind, Mask]]:
        """Prepare a pass with `counts[row]` new tokens in each row, right-padded to `width`.

        Args:
            width: Columns.
            counts: New tokens of each row.
            blocks: int [B, width]: which new tokens see each other both ways in sliding layers.
            mode: What becomes of blocks that are longer than the window.

        Returns:
            Positions of the new tokens, int [B, width], and what they see, for each kind of layer.

        Raises:
            CacheError: the number of rows or a count does not fit.
        """
        ...

    def commit(self) -> None:
        """End the pass: all layers have handed over theirs."""
        ...


class Step:
    """One forward pass.

    Args:
        rope: Angles of the new tokens, for each kind of layer.
        masks: What the new tokens see of the keys that `store` returns, for each kind of layer.
        store: Where keys and values come from and go to; None when nothing is kept.
        given: Keys and values of another model, for layers that have no source in this one.
    """

    def __init__(
        self,
        rope: Mapping[AttentionKind, RopeAngles],
        masks: Mapping[AttentionKind, Mask],
        store: KeyValueStore | None,
        given: Mapping[AttentionKind, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.rope = rope
        self.masks = masks
        self.store = store
        self._given = given or {}
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: LayerConfig, k: Tensor, v: Tensor) -> None:
        """Hand over a layer's keys and values of the new tokens."""
        self._found[layer.index] = (k, v) if self.store is None else self.store.extend(layer, k, v)

    def keys_values(self, layer: LayerConfig) -> tuple[Tensor, Tensor]:
        """All keys and values that a layer attends to, whosever they are.

        Sharing layers read what their source attended to in this very pass, as the cache of a sliding
        layer may hold less by then.
        """
        return self._given[layer.kind] if layer.kv_source is None else self._found[layer.kv_source]
