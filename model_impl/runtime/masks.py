"""Which keys a query sees (fact sheet, sections 2.4 and 3.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BlockMode = Literal["drop", "clamp_past", "clamp_both"]
"""What becomes of a block that is longer than the window.

`clamp_past`: the window hides keys W or more before the query, and nothing behind it (transformers, vLLM).
`clamp_both`: it hides keys W or more away on either side (first-party implementation).
`drop`: such a block is attended to causally, like text (what vLLM's runner does for other models).
The three differ for no block that fits the window.
"""
NO_BLOCK = -1


@dataclass(frozen=True)
class Blocks:
    """Tokens of one image, which see each other in both directions in sliding layers."""

    queries: Tensor
    """int [B, T]: the same number for tokens of one block; `NO_BLOCK` for all others."""
    keys: Tensor
    """int [B, S]."""
    mode: BlockMode = "clamp_past"


def visible(
    query_positions: Tensor, key_positions: Tensor, window: int | None, blocks: Blocks | None = None
) -> Tensor:
    """Causal visibility, within a sliding window if there is one, and within blocks both ways.

    Args:
        query_positions: int [B, T].
        key_positions: int [B, S]; negative where there is no key.
        window: A query at q sees keys q - window + 1 .. q.
        blocks: Of sliding layers; a layer that attends to everything has none.

    Returns:
        bool [B, 1, T, S].
    """
    q, k = query_positions[:, None, :, None], key_positions[:, None, None, :]
    seen = k <= q
    if blocks is not None:
        of_query, of_key = blocks.queries[:, None, :, None], blocks.keys[:, None, None, :]
        seen = seen | ((of_query == of_key) & (of_query != NO_BLOCK))
        if window is not None and blocks.mode == "clamp_both":
            seen = seen & (k - q < window)
    seen = seen & (k >= 0)
    return seen if window is None else seen & (q - k < window)


def without_long(blocks: Tensor, window: int) -> Tensor:
    """Blocks int [B, T] without those that are longer than the window."""
    same = (blocks[:, :, None] == blocks[:, None, :]).sum(dim=-1)
    return torch.where(same > window, NO_BLOCK, blocks)
