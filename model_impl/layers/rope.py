"""Rotary position embedding (fact sheet, section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from model_impl.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair (j, j + head_dim/2): float32 [head_dim/2].

    `theta^(-2j/head_dim)` for the pairs that rotate, zero for the others. The denominator is the whole
    head dimension even where only a part rotates ("proportional").
    """
    pairs = head_dim // 2
    rotating = int(config.rotated * head_dim // 2)
    exponents = torch.arange(0, 2 * rotating, 2, dtype=torch.float32) / head_dim
    return torch.cat([1.0 / (config.theta**exponents), torch.zeros(pairs - rotating)])


def angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, computed in float32 and cast once.

    Args:
        positions: int [B, T].
        frequencies: float32 [d/2].
        dtype: The model's.

    Returns:
        Two tensors [B, T, 1, d], to broadcast over heads.
    """
    half = positions[..., None].float() * frequencies
    full = torch.cat([half, half], dim=-1)[:, :, None]
    return full.cos().to(dtype), full.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (j, j + d/2) of `x` [B, T, heads, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
