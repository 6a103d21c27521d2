"""Hybrid key-value cache: full-attention layers keep everything, sliding layers only their window.

A sliding layer's buffer is a ring: position p lies in slot p mod window. Rows of a batch may have
different lengths. Layers that share another layer's keys and values own no buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_impl.config import AttentionKind, LayerConfig, TextConfig
from model_impl.errors import CacheError
from model_impl.layers.backends import Mask
from model_impl.runtime.masks import NO_BLOCK, BlockMode, Blocks, visible

_FIRST_CAPACITY = 256
FULL: AttentionKind = "full_attention"


@dataclass
class _Buffer:
    """Keys and values of one layer: [B, g, slots, d]."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class _Plan:
    """How the new tokens of one pass meet the kept ones; the same for all layers of a kind."""

    rows: Tensor
    """Rows of the new tokens that are kept, int [M]."""
    columns: Tensor
    """Their columns among the new tokens."""
    slots: Tensor
    """Where they go."""
    write_first: bool
    """Attend to the buffer after writing; else to the buffer as it was, followed by the new tokens."""
    kept: int
    """Leading slots of the buffer that are attended to."""
    uniform_slot: int | None
    """The one slot that every row's single new token goes to, if there is one."""
    mask: Mask


class KVCache:
    """Keys and values of a batch, for one model.

    Args:
        config: The model's.
        batch_size: Rows.
        dtype: Of keys and values.
        device: Where they live.
    """

    def __init__(
        self,
        config: TextConfig,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.lengths = [0] * batch_size
        """Tokens so far, of each row."""
        self._config = config
        self._device = torch.device(device)
        self._dtype = dtype
        self._buffers: dict[int, _Buffer] = {}
        self._plans: dict[AttentionKind, _Plan] = {}
        self._pending = [0] * batch_size

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    def check(self, config: TextConfig, dtype: torch.dtype) -> None:
        """Refuse a model that this cache was not made for.

        Raises:
            CacheError: another configuration, or another dtype.
        """
        if config != self._config:
            raise CacheError("the cache was made for another configuration; make one for this model")
        if dtype != self._dtype:
            raise CacheError(
                f"the cache holds {self._dtype}, the model computes in {dtype}; pass dtype={dtype}"
            )

    def begin(
        self, width: int, counts: Sequence[int], blocks: Tensor | None = None, mode: BlockMode = "clamp_past"
    ) -> tuple[Tensor, dict[AttentionKind, Mask]]:
        """Prepare a pass with `counts[row]` new tokens in each row, right-padded to `width`.

        Args:
            width: Columns.
            counts: New tokens of each row.
            blocks: int [B, width]: which new tokens see each other both ways in sliding layers. A block must
                be whole: its tokens come in one pass.
            mode: What becomes of blocks that are longer than the window.

        Returns:
            Positions of the new tokens, int [B, width], and what they see, for each kind of layer.

        Raises:
            CacheError: the number of rows or a count does not fit.
        """
        self.expect(width, counts)
        first = torch.tensor(self.lengths, device=self._device)[:, None]
        column = torch.arange(width, device=self._device)[None]
        new = torch.tensor(list(counts), device=self._device)[:, None]
        positions = first + column
        valid = column < new
        uniform = len(set(self.lengths)) == 1 and all(count == width for count in counts)
        self._plans = {
            kind: self._plan(
                kind, width, positions, valid, first, new, uniform, None if kind == FULL else blocks, mode
            )
            for kind in self._config.kinds
        }
        return positions, {kind: plan.mask for kind, plan in self._plans.items()}

    def expect(self, width: int, counts: Sequence[int]) -> None:
        """Note how many new tokens each row gets in the pass that begins.

        Raises:
            CacheError: as `begin`.
        """
        if len(counts) != self.batch_size or not all(0 <= count <= width for count in counts):
            raise CacheError(
                f"the cache holds {self.batch_size} rows; {len(counts)} rows with {list(counts)} new tokens "
                f"in {width} columns do not fit"
            )
        if not all(length + count for length, count in zip(self.lengths, counts, strict=True)):
            raise CacheError(
                f"row {[*map(sum, zip(self.lengths, counts, strict=True))].index(0)} has no token"
            )
        self._pending = list(counts)

    def commit(self) -> None:
        """End a pass: its tokens count as kept from now on."""
        self.lengths = [length + count for length, count in zip(self.lengths, self._pending, strict=True)]
        self._plans = {}

    def extend(self, layer: LayerConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values [B, g, T, d]; return all that they attend to."""
        plan = self._plans[layer.kind]
        buffer = self._buffer(layer, k, v)
        if plan.write_first:
            self._write(buffer, plan, k, v)
            return buffer.k[:, :, : plan.kept], buffer.v[:, :, : plan.kept]
        seen = k, v
        if plan.kept:
            seen = (
                torch.cat([buffer.k[:, :, : plan.kept], k], dim=2),
                torch.cat([buffer.v[:, :, : plan.kept], v], dim=2),
            )
        self._write(buffer, plan, k, v)
        return seen

    def _plan(
        self,
        kind: AttentionKind,
        width: int,
        positions: Tensor,
        valid: Tensor,
        first: Tensor,
        new: Tensor,
        uniform: bool,
        blocks: Tensor | None,
        mode: BlockMode,
    ) -> _Plan:
        window = self._config.sliding_window if kind == "sliding_attention" else None
        after = [length + count for length, count in zip(self.lengths, self._pending, strict=True)]
        # Of a long chunk a ring keeps the last tokens only.
        keep = valid if window is None else valid & (positions >= first + new - window)
        rows, columns = keep.nonzero(as_tuple=True)
        slots = positions[rows, columns]
        if window is not None:
            slots = slots % window
        longest = max(after) if window is None else min(window, max(after))
        # A single token overwrites only what has just left its window; a longer chunk still needs it.
        if window is None or width == 1:
            kept = longest
            mask = Mask(None)
            if uniform and width > 1 and self.lengths[0] == 0:
                mask = Mask(None, causal=True)
            elif not (uniform and width == 1):
                mask = Mask(visible(positions, self._slot_positions(kept, window, after), window))
            slot = int(slots[0]) if uniform and width == 1 else None
            return _Plan(rows, columns, slots, True, kept, slot, mask)
        kept = min(window, max(self.lengths))
        if uniform and kept == 0 and width <= window and blocks is None:
            mask = Mask(None, causal=True)
        else:
            old = self._slot_positions(kept, window, self.lengths)
            # Padding comes behind a row's valid tokens, so causality hides it from them.
            keys = torch.cat([old, positions], dim=1)
            mask = Mask(visible(positions, keys, window, _with_kept(blocks, old, mode)))
        return _Plan(rows, columns, slots, False, kept, None, mask)

    def _slot_positions(self, slots: int, window: int | None, lengths: Sequence[int]) -> Tensor:
        """Position of the token in each slot, int [B, slots]; negative where there is none."""
        slot = torch.arange(slots, device=self._device)[None]
        last = torch.tensor(list(lengths), device=self._device)[:, None] - 1
        if window is None:
            return torch.where(slot <= last, slot, -1)
        return last - (last - slot) % window

    def _buffer(self, layer: LayerConfig, k: Tensor, v: Tensor) -> _Buffer:
        """The layer's buffer, made or grown to hold what this pass writes."""
        buffer = self._buffers.get(layer.index)
        longest = max(length + count for length, count in zip(self.lengths, self._pending, strict=True))
        needed = self._config.sliding_window if layer.kind == "sliding_attention" else longest
        have = buffer.k.shape[2] if buffer is not None else 0
        if buffer is None or have < needed:
            slots = needed if layer.kind == "sliding_attention" else max(needed, 2 * have, _FIRST_CAPACITY)
            grown = _Buffer(*(self._empty(x, slots) for x in (k, v)))
            if buffer is not None:
                grown.k[:, :, :have], grown.v[:, :, :have] = buffer.k, buffer.v
            self._buffers[layer.index] = buffer = grown
        return buffer

    def _empty(self, like: Tensor, slots: int) -> Tensor:
        batch, heads, _, d = like.shape
        return torch.zeros(batch, heads, slots, d, dtype=self._dtype, device=self._device)

    @staticmethod
    def _write(buffer: _Buffer, plan: _Plan, k: Tensor, v: Tensor) -> None:
        for kept, new in ((buffer.k, k), (buffer.v, v)):
            if plan.uniform_slot is not None:
                kept[:, :, plan.uniform_slot] = new[:, :, 0]
            else:
                kept[plan.rows, :, plan.slots] = new[plan.rows, :, plan.columns]


def _with_kept(blocks: Tensor | None, kept: Tensor, mode: BlockMode) -> Blocks | None:
    """The blocks of the new tokens, when kept tokens stand before them, which are in none."""
    if blocks is None:
        return None
    return Blocks(blocks, torch.cat([torch.full_like(kept, NO_BLOCK), blocks], dim=1), mode)
