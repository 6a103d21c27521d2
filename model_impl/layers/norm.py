"""Root-mean-square normalisation (fact sheet, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """`x · (mean(x²) + eps)^(-1/2) · w`, in float32 or wider, with one cast back at the end.

    The weight multiplies as it is; it is not an offset from one. Without `scale` there is no weight.
    """

    def __init__(self, width: int, eps: float, *, scale: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x` [..., width]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        return F.rms_norm(x.to(wide), x.shape[-1:], weight, self.eps).to(x.dtype)
