"""Gated feed-forward network (fact sheet, section 2.6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, in the dense MLP, the experts and the per-layer gate alike."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """`W_down · (gelu_tanh(W_gate · x) * (W_up · x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        gate, up = gelu_tanh(self.gate_proj(x)), self.up_proj(x)
        # Of all that a layer makes these are the widest: one buffer less, where no gradient will read `gate`.
        down: Tensor = self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))
        return down
