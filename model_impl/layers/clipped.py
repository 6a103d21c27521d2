"""A linear map between stored bounds (fact sheet, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ClippedLinear(nn.Module):
    """`clamp(W · clamp(x, input), output)`; without bounds a plain linear under the same name.

    The bounds are scalars that belong to the weights: they are stored, and infinite until loaded.
    """

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, in_features: int, out_features: int, *, clipped: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.clipped = clipped
        if clipped:
            for name in ("input", "output"):
                self.register_buffer(f"{name}_min", torch.tensor(-math.inf))
                self.register_buffer(f"{name}_max", torch.tensor(math.inf))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if not self.clipped:
            plain: Tensor = self.linear(x)
            return plain
        y: Tensor = self.linear(torch.clamp(x, self.input_min, self.input_max))
        return y.clamp_(self.output_min, self.output_max)
