"""Mixture of experts (fact sheet, section 2.7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.config import MoEConfig
from model_impl.layers.mlp import gelu_tanh
from model_impl.layers.norm import RMSNorm

_ROWS = 4096
"""Rows that run through experts at a time, unless one expert has more: what lies between its two projections
then stays in a processor's caches, and is not the largest thing in memory."""


class Router(nn.Module):
    """Chooses `top_k` experts for each token, and their weights.

    Softmax over all experts, the largest `top_k`, renormalised to sum to one, times each expert's scale.
    The input is the residual stream itself; the router norms it on its own.
    """

    def __init__(self, hidden_size: int, config: MoEConfig, eps: float) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.norm = RMSNorm(hidden_size, eps, scale=False)
        self.proj = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, H] to probabilities of all experts [N, E], weights [N, top_k] and expert indices [N, top_k]."""
        r = self.norm(h) * self.scale * h.shape[-1] ** -0.5
        p = torch.softmax(self.proj(r), dim=-1, dtype=torch.float32)
        w, experts = torch.topk(p, self.top_k, dim=-1)
        w = w / w.sum(dim=-1, keepdim=True)
        return p, w * self.per_expert_scale[experts], experts


@dataclass(frozen=True)
class Rows:
    """What runs through the experts: each of a pass's N tokens, once for each of its experts in hand."""

    tokens: Tensor
    """int [M]: which token each row is, from 0 to N - 1; some may have no row."""
    total: int
    """N."""
    hit: list[int]
    counts: list[int]
    """Experts, and rows of each, as in `grouped_linear`."""


Change = Callable[[str, Tensor, Tensor, Rows], Tensor]
"""What an adapter makes of a projection: parameter, inputs [M, in], outputs [M, out] and what the rows are,
to outputs [M, out]."""


class Experts(nn.Module):
    """All experts; the gate half comes first in `gate_up_proj`."""

    change: Change | None = None
    """Set by an adapter, as parameters have no hooks."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        shape = (config.num_experts, 2 * config.intermediate_size, hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.intermediate_size))

    def forward(self, z: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum over each token's experts.

        Args:
            z: [N, H].
            experts: int [N, K].
            weights: [N, K].

        Returns:
            [N, H].
        """
        count = experts.shape[1]
        tokens = torch.arange(len(z), device=z.device).repeat_interleave(count)
        return self.mixed(z, tokens, experts.flatten(), weights.flatten())

    def mixed(self, z: Tensor, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum over pairs of a token and an expert, in any order.

        Args:
            z: [N, H].
            tokens: int [pairs], at least one.
            experts: int [pairs].
            weights: [pairs].

        Returns:
            [N, H]; zeros for tokens without a pair.
        """
        sorted_experts, order = experts.sort(stable=True)
        found, numbers = torch.unique_consecutive(sorted_experts, return_counts=True)
        result, start = torch.zeros_like(z), 0
        for hit, counts in _parts(found.tolist(), numbers.tolist()):
            here = order[start : start + sum(counts)]
            start += len(here)
            rows = Rows(tokens[here], len(z), hit, counts)
            gate, up = self._project("gate_up_proj", z[rows.tokens], rows).chunk(2, dim=-1)
            outputs = self._project("down_proj", gelu_tanh(gate) * up, rows)
            result.index_add_(0, rows.tokens, (outputs * weights[here, None]).to(z.dtype))
        return result

    def _project(self, name: str, x: Tensor, rows: Rows) -> Tensor:
        y = grouped_linear(x, getattr(self, name), rows.hit, rows.counts)
        return y if self.change is None else self.change(name, x, y, rows)


def _parts(hit: list[int], counts: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Experts and their numbers of rows, a few experts at a time: as many as have `_ROWS` rows together."""
    first = rows = 0
    for place, count in enumerate(counts):
        if rows and rows + count > _ROWS:
            yield hit[first:place], counts[first:place]
            first, rows = place, 0
        rows += count
    yield hit[first:], counts[first:]


def grouped_linear(x: Tensor, matrices: Tensor, hit: list[int], counts: list[int]) -> Tensor:
    """Rows of `x`, sorted by expert, each times its expert's matrix: every expert that is hit runs once.

    Args:
        x: [M, in].
        matrices: [E, out, in].
        hit: The experts with rows, ascending.
        counts: How many rows each of them has.

    Returns:
        [M, out].
    """
    groups = zip(hit, torch.split(x, counts), strict=True)
    return torch.cat([F.linear(rows, matrices[expert]) for expert, rows in groups])
