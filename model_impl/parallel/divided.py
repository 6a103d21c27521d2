"""Layers that the ranks of a stage hold parts of (fact sheet, section 8.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.config import MoEConfig
from model_impl.layers.moe import Experts
from model_impl.parallel.ranks import Ranks, even_part
from model_impl.text import ScaledEmbedding


class DividedEmbedding(ScaledEmbedding):
    """A table whose rows are divided over the ranks: each looks up what it has, and all add up."""

    def __init__(self, rows: int, width: int, scaled_width: int, ranks: Ranks, shard: int) -> None:
        start, stop = even_part(rows, ranks.size, shard)
        super().__init__(stop - start, width, scaled_width)
        self.start, self.stop, self._ranks = start, stop, ranks

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] to [..., width]."""
        if self._ranks.size == 1:
            return super().forward(ids)
        own = (ids >= self.start) & (ids < self.stop)
        found = super().forward(torch.where(own, ids - self.start, 0))
        return self._ranks.sum(found.masked_fill(~own[..., None], 0.0))

    def low_rank(self, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """See `LowRankModule`; `a` has the columns of this rank's rows."""
        own = (ids >= self.start) & (ids < self.stop)
        found = F.embedding(torch.where(own, ids - self.start, 0), a.T)
        found = self._ranks.sum(found.masked_fill(~own[..., None], 0.0))
        return F.linear(found, b) * self.rounded_scale(found)


class SummedLinear(nn.Linear):
    """A projection whose inputs are divided over the ranks, each of which has a part of the sum."""

    def __init__(self, inputs: int, outputs: int, ranks: Ranks) -> None:
        super().__init__(inputs, outputs, bias=False)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs of this rank] to [..., outputs]."""
        return self._ranks.sum(super().forward(x))

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """See `LowRankModule`; `a` has the columns of this rank's inputs."""
        return F.linear(self._ranks.sum(F.linear(x, a)), b)


class GatheredLinear(nn.Linear):
    """A projection whose outputs are divided over the ranks, and wanted whole on each."""

    def __init__(self, inputs: int, outputs: int, ranks: Ranks, shard: int) -> None:
        start, stop = even_part(outputs, ranks.size, shard)
        super().__init__(inputs, stop - start, bias=False)
        self._ranks, self._outputs = ranks, outputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs of all ranks]."""
        return self._ranks.gather(super().forward(x), self._outputs)

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """See `LowRankModule`; `b` has the rows of this rank's outputs."""
        return self._ranks.gather(F.linear(F.linear(x, a), b), self._outputs)


class SummedExperts(Experts):
    """A part of the width of every expert; `config` has the width of one rank."""

    def __init__(self, hidden_size: int, config: MoEConfig, ranks: Ranks, shard: int) -> None:
        del shard
        super().__init__(hidden_size, config)
        self._ranks = ranks

    def forward(self, z: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        return self._ranks.sum(super().forward(z, experts, weights))


class WholeExperts(Experts):
    """Some of the experts whole, the same number on every rank; the router has chosen among all of them."""

    def __init__(self, hidden_size: int, config: MoEConfig, ranks: Ranks, shard: int) -> None:
        own = config.num_experts // ranks.size
        super().__init__(hidden_size, MoEConfig(own, config.top_k, config.intermediate_size))
        self.first, self.stop = shard * own, (shard + 1) * own
        self._ranks = ranks

    def forward(self, z: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        tokens, choices = ((experts >= self.first) & (experts < self.stop)).nonzero(as_tuple=True)
        if not len(tokens):
            return self._ranks.sum(torch.zeros_like(z))
        own = experts[tokens, choices] - self.first
        return self._ranks.sum(self.mixed(z, tokens, own, weights[tokens, choices]))
