"""What the layers of one forward pass share: positions, masks, and keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from model_impl.config import AttentionKind, LayerConfig
from model_impl.layers.backends import Mask

RopeAngles = tuple[Tensor, Tensor]


class KeyValueStore(Protocol):
    """Keeps keys and values of earlier passes."""

    def extend(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the new tokens [B, g, T, d]; return all that this pass attends to [B, g, S, d]."""
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
