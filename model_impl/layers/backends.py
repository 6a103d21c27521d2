"""Attention backends: one function each, behind one signature.

`softmax(scale · q kᵀ + mask) v` with grouped heads: query head j reads key-value head j // (n / g).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = 1.0
"""Queries and keys are normed with learned weights; there is no 1/sqrt(d) (fact sheet, section 2.4)."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys each query sees, in all layers of a kind."""

    allowed: Tensor | None
    """bool [B, 1, T, S], or None where nothing is hidden but what `causal` says."""
    causal: bool = False
    """Query t sees keys 0..t, and T = S; `allowed` is None then."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False)
    """What a backend makes of the mask, kept for the next layer."""

    def dense(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """As a bool tensor that broadcasts to [B, 1, T, S]; None if nothing is hidden."""
        if self.causal:
            return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]
        return self.allowed


Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
"""q [B, n, T, d], k and v [B, g, S, d] and a mask to [B, n, T, d]."""


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """The equations as they stand; softmax in float32, probabilities in the dtype of `q`."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * SCALE
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """PyTorch's fused attention."""
    if q.shape[2] == 1 and mask.allowed is None:
        # One query sees everything: its heads of one group are so many queries, and no key is copied.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, scale=SCALE).flatten(1, 2)[:, :, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.allowed, is_causal=mask.causal, scale=SCALE, enable_gqa=True
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """PyTorch's FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    if "blocks" not in mask.derived:
        mask.derived["blocks"] = _blocks(mask.dense(q.shape[2], k.shape[2], q.device), q, k)
    output = flex_attention(q, k, v, block_mask=mask.derived["blocks"], scale=SCALE, enable_gqa=True)
    assert isinstance(output, Tensor)
    return output


def _blocks(allowed: Tensor | None, q: Tensor, k: Tensor) -> object:
    """FlexAttention's form of a mask: which blocks of it are empty, and a function for the others."""
    from torch.nn.attention.flex_attention import create_block_mask

    if allowed is None:
        return None
    visible = allowed.expand(q.shape[0], 1, q.shape[2], k.shape[2])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return visible[batch, 0, query, key]

    return create_block_mask(sees, q.shape[0], None, q.shape[2], k.shape[2], device=q.device.type)


BACKENDS: dict[str, Attend] = {"eager": eager, "sdpa": sdpa, "flex": flex}
"""By the names of their rows in the capability table."""
