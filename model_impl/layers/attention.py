"""Self-attention of one decoder layer (fact sheet, sections 2.4 and 2.5)."""

from __future__ import annotations

from torch import Tensor, nn

from model_impl.config import LayerConfig, TextConfig
from model_impl.layers import backends, rope
from model_impl.layers.norm import RMSNorm
from model_impl.runtime.step import Step


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values.

    A layer that shares another's keys and values has only queries of its own.
    """

    def __init__(self, config: TextConfig, layer: LayerConfig, backend: str) -> None:
        super().__init__()
        hidden, heads, d, eps = config.hidden_size, config.num_heads, layer.head_dim, config.rms_norm_eps
        self.layer = layer
        self.backend = backend
        self.q_proj = nn.Linear(hidden, heads * d, bias=False)
        self.q_norm = RMSNorm(d, eps)
        self.o_proj = nn.Linear(heads * d, hidden, bias=False)
        if not layer.shares_kv:
            self.k_proj = nn.Linear(hidden, layer.num_kv_heads * d, bias=False)
            self.k_norm = RMSNorm(d, eps)
            self.v_norm = RMSNorm(d, eps, scale=False)
            if not layer.keys_are_values:
                self.v_proj = nn.Linear(hidden, layer.num_kv_heads * d, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        q = self.q_norm(self._heads(self.q_proj(x)))
        q = rope.rotate(q, *step.rope[self.layer.kind]).transpose(1, 2)
        if not self.layer.shares_kv:
            step.put(self.layer, *self.keys_values(x, step))
        k, v = step.keys_values(self.layer)
        o = backends.BACKENDS[self.backend](q, k, v, step.masks[self.layer.kind])
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(2))
        return y

    def keys_values(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values of the new tokens, each [B, g, T, d].

        Where keys are values, the value is the key projection before its norm and rotation, with the
        value's own norm: the two still differ.
        """
        k_raw = self._heads(self.k_proj(x))
        v_raw = k_raw if self.layer.keys_are_values else self._heads(self.v_proj(x))
        k = rope.rotate(self.k_norm(k_raw), *step.rope[self.layer.kind])
        return k.transpose(1, 2), self.v_norm(v_raw).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.layer.head_dim)
