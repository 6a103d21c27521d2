"""Root-mean-square normalisation (fact sheet, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x · (mean(x²) + eps)^(-1/2) · w`, in float32 with one cast back at the end.

    The weight multiplies as it is; it is not an offset from one. Without `scale` there is no weight.
    """

    def __init__(self, width: int, eps: float, *, scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x` [..., width]."""
        x32 = x.float()
        normed = x32 * torch.pow(x32.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)
        if self.weight is not None:
            normed = normed * self.weight.float()
        return normed.to(x.dtype)
