"""Faults of the text model (catalogue class 4, and the ten usual mistakes of the fact sheet).

`where` says which modules a parity case may name first: the faulty one, or the next whose output is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.faults.base import Collection, Patch, replace
from model_impl import config, text
from model_impl.config import RopeConfig
from model_impl.layers import attention, backends, mlp, moe, norm, rope
from model_impl.layers.attention import Attention
from model_impl.layers.moe import Experts, Router
from model_impl.layers.norm import RMSNorm
from model_impl.runtime import cache, masks
from model_impl.runtime.step import Step
from model_impl.text import DecoderLayer, ScaledEmbedding, TextModel

faults = Collection("parity")
architecture = partial(faults, area="text-model")

_LAYER = r"layers\.\d+"
_ATTENTION = _LAYER + r"\.self_attn"

# A patch calls a module a second time by its class's `forward`: a case counts every call of a module.


# ---------------------------------------------------------------------------- norms and attention


@architecture("scale-by-head-dim", source=("A35", "A36"), module=backends, where=_ATTENTION)
def _scale_by_head_dim() -> Patch:
    """Attention scores are divided by the root of the head dimension."""

    def scaled(attend: backends.Attend) -> backends.Attend:
        return lambda q, k, v, mask: attend(q * q.shape[-1] ** -0.5, k, v, mask)

    return replace(backends, "BACKENDS", {name: scaled(f) for name, f in backends.BACKENDS.items()})


@architecture("scale-by-head-dim-when-decoding", source=("A35",), module=backends, where=_ATTENTION)
def _scale_by_head_dim_when_decoding() -> Patch:
    """Attention scores of a single query are divided by the root of the head dimension."""

    def scaled(attend: backends.Attend) -> backends.Attend:
        def one(q: Tensor, k: Tensor, v: Tensor, mask: backends.Mask) -> Tensor:
            return attend(q * q.shape[-1] ** -0.5 if q.shape[2] == 1 else q, k, v, mask)

        return one

    return replace(backends, "BACKENDS", {name: scaled(f) for name, f in backends.BACKENDS.items()})


@architecture("norm-plus-one", source=("A04",), module=norm, where=_LAYER + r"\.input_layernorm|.*_norm")
def _norm_plus_one() -> Patch:
    """Norm weights are offsets from one."""
    original = RMSNorm.forward

    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        if self.weight is None:
            return original(self, x)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + self.weight.float())).to(x.dtype)

    return replace(RMSNorm, "forward", forward)


@architecture(
    "norm-by-mean-magnitude", source=("A22",), module=norm, where=_LAYER + r"\.input_layernorm|.*_norm"
)
def _norm_by_mean() -> Patch:
    """Norms divide by the mean magnitude instead of the root of the mean square."""

    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        normed = x.float() / x.float().abs().mean(-1, keepdim=True)
        return (normed if self.weight is None else normed * self.weight.float()).to(x.dtype)

    return replace(RMSNorm, "forward", forward)


def _values(change: Callable[[Attention, Tensor, Tensor, Step], Tensor]) -> Patch:
    """A patch of the values alone: `change` gets the layer, its input and its rotated keys."""
    original = Attention.keys_values

    def keys_values(self: Attention, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        k, v = original(self, x, step)
        return k, change(self, x, v, step)

    return replace(Attention, "keys_values", keys_values)


@architecture("no-value-norm", source=("A04",), module=attention, where=_ATTENTION)
def _no_value_norm() -> Patch:
    """Values are not normed."""

    def raw(self: Attention, x: Tensor, _v: Tensor, _step: Step) -> Tensor:
        project = self.k_proj if self.layer.keys_are_values else self.v_proj
        values: Tensor = project(x)
        return self._heads(values).transpose(1, 2)

    return _values(raw)


@architecture("value-after-key-norm", source=("A32", "spec 2.4"), module=attention, where=_ATTENTION)
def _value_after_key_norm() -> Patch:
    """Where keys are values, the value is taken after the key's norm."""

    def normed_twice(self: Attention, x: Tensor, v: Tensor, _step: Step) -> Tensor:
        if not self.layer.keys_are_values:
            return v
        keys = RMSNorm.forward(self.k_norm, self._heads(self.k_proj(x)))
        return RMSNorm.forward(self.v_norm, keys).transpose(1, 2)

    return _values(normed_twice)


@architecture("value-is-rotated-key", source=("A32",), module=attention, where=_ATTENTION)
def _value_is_rotated_key() -> Patch:
    """Where keys are values, the cached key is read as the value."""
    original = Attention.keys_values

    def keys_values(self: Attention, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        k, v = original(self, x, step)
        return k, k if self.layer.keys_are_values else v

    return replace(Attention, "keys_values", keys_values)


@architecture("no-query-norm", source=("A04",), module=attention, where=_ATTENTION)
def _no_query_norm() -> Patch:
    """Queries are used as the projection gives them."""

    def forward(self: Attention, x: Tensor, step: Step) -> Tensor:
        q = self._heads(self.q_proj(x))
        self.q_norm(q)
        q = rope.rotate(q, *step.rope[self.layer.kind]).transpose(1, 2)
        if not self.layer.shares_kv:
            step.put(self.layer, *self.keys_values(x, step))
        k, v = step.keys_values(self.layer)
        o = backends.BACKENDS[self.backend](q, k, v, step.masks[self.layer.kind])
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(2))
        return y

    return replace(Attention, "forward", forward)


def _windows(change: int) -> tuple[Patch, ...]:
    """Patches of the mask's window, where it is made with a cache and without."""

    def visible(
        query_positions: Tensor,
        key_positions: Tensor,
        window: int | None,
        blocks: masks.Blocks | None = None,
    ) -> Tensor:
        moved = None if window is None else window + change
        return masks.visible(query_positions, key_positions, moved, blocks)

    return replace(text, "visible", visible), replace(cache, "visible", visible)


@architecture("window-one-short", source=("check 14", "spec 2.4"), module=masks, where=_ATTENTION)
def _window_one_short() -> tuple[Patch, ...]:
    """The sliding window is one token too short."""
    return _windows(-1)


@architecture("window-one-long", source=("check 14", "spec 2.4"), module=masks, where=_ATTENTION)
def _window_one_long() -> tuple[Patch, ...]:
    """The sliding window is one token too long."""
    return _windows(1)


@architecture("kv-of-first-layer", source=("spec 2.5", "A05"), module=config, where=_ATTENTION)
def _kv_of_first_layer() -> Patch:
    """Sharing layers read the first layer of their kind, not the last before them."""

    def source(kinds: Sequence[str], index: int, first_shared: int) -> int:
        if index < first_shared:
            return index
        return next((i for i in range(first_shared) if kinds[i] == kinds[index]), index)

    return replace(config, "_kv_source", source)


# ---------------------------------------------------------------------------- rotary embedding


def _frequencies(change: Callable[[RopeConfig, int], Tensor]) -> Patch:
    return replace(rope, "inverse_frequencies", change)


@architecture("rope-denominator", source=("A02",), module=rope, where=_ATTENTION)
def _rope_denominator() -> Patch:
    """The exponent's denominator is the rotated width instead of the head dimension."""

    def frequencies(settings: RopeConfig, head_dim: int) -> Tensor:
        rotating = int(settings.rotated * head_dim // 2)
        exponents = torch.arange(0, 2 * rotating, 2, dtype=torch.float32) / (2 * rotating)
        return torch.cat([settings.theta**-exponents, torch.zeros(head_dim // 2 - rotating)])

    return _frequencies(frequencies)


@architecture("rope-on-every-pair", source=("A03",), module=rope, where=_ATTENTION)
def _rope_on_every_pair() -> Patch:
    """Full layers rotate all pairs."""
    original = rope.inverse_frequencies
    return _frequencies(lambda settings, d: original(RopeConfig(settings.theta, rotated=1.0), d))


@architecture("rope-pairs-within-rotated-part", source=("A01",), module=rope, where=_ATTENTION)
def _rope_pairs() -> Patch:
    """The rotated part is a block of its own: pairs (i, i + 64) instead of (i, i + 256)."""
    original = rope.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        still = (sin[..., :half] == 0).flatten(0, -2).all(dim=0) & (cos[..., :half] == 1).flatten(0, -2).all(
            dim=0
        )
        rotating = half - int(still.sum())
        if rotating in (0, half):
            return original(x, cos, sin)
        block = [*range(rotating), *range(half, half + rotating)]
        turned = original(x[..., : 2 * rotating], cos[..., block], sin[..., block])
        return torch.cat([turned, x[..., 2 * rotating :]], dim=-1)

    return replace(rope, "rotate", rotate)


@architecture("rope-interleaved", source=("A01",), module=rope, where=_ATTENTION)
def _rope_interleaved() -> Patch:
    """Neighbours are pairs, instead of the two halves of a head."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        c, s = cos[..., :half], sin[..., :half]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)

    return replace(rope, "rotate", rotate)


@architecture("one-rope-for-both-kinds", source=("spec 2.4",), module=rope, where=_ATTENTION)
def _one_rope() -> Patch:
    """Full layers use the base frequency of sliding ones."""
    original = rope.inverse_frequencies
    return _frequencies(lambda settings, d: original(RopeConfig(10_000.0, settings.rotated), d))


# ---------------------------------------------------------------------------- embeddings and head


@architecture("embedding-unscaled", source=("spec 2.2",), module=text, where="embed_tokens")
def _embedding_unscaled() -> Patch:
    """Embeddings are not multiplied by the root of the hidden size."""

    def forward(self: ScaledEmbedding, ids: Tensor) -> Tensor:
        scale = 1.0 if round(self.scale**2) == self.weight.shape[1] else self.scale
        return F.embedding(ids, self.weight) * scale

    return replace(ScaledEmbedding, "forward", forward)


@architecture(
    "per-layer-embedding-unscaled", source=("A12",), module=text,
    where=_LAYER + r"\.per_layer_projection",
)  # fmt: skip
def _per_layer_embedding_unscaled() -> Patch:
    """The per-layer table is not multiplied by the root of its width."""

    def forward(self: ScaledEmbedding, ids: Tensor) -> Tensor:
        packed = self.weight.shape[1] != round(self.scale**2)
        return F.embedding(ids, self.weight) * (1.0 if packed else self.scale)

    return replace(ScaledEmbedding, "forward", forward)


def _per_layer(change: Callable[[TextModel, Tensor, Tensor], Tensor]) -> Patch:
    """A patch of the inputs of all layers [B, T, layers, width]; models without them stay as they are."""

    def inputs(self: TextModel, ids: Tensor, x: Tensor) -> Tensor | None:
        return None if self.config.per_layer_inputs is None else change(self, ids, x)

    return replace(TextModel, "per_layer_inputs", inputs)


def _parts(self: TextModel, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Token part and normed context part, as they should be."""
    ple = self.config.per_layer_inputs
    assert ple is not None
    shape = (*ids.shape, len(self.layers), ple.width)
    context = self.per_layer_model_projection(x) * self.config.hidden_size**-0.5
    return self.embed_tokens_per_layer(ids).view(shape), self.per_layer_projection_norm(context.view(shape))


@architecture("per-layer-context-unscaled", source=("A12",), module=text, where="per_layer_projection_norm")
def _per_layer_context_unscaled() -> Patch:
    """The projected context is not divided by the root of the hidden size."""

    def inputs(self: TextModel, ids: Tensor, x: Tensor) -> Tensor:
        ple = self.config.per_layer_inputs
        assert ple is not None
        identity = self.embed_tokens_per_layer(ids).view(*ids.shape, len(self.layers), ple.width)
        projected = self.per_layer_model_projection(x).view(identity.shape)
        combined: Tensor = (self.per_layer_projection_norm(projected) + identity) * self.PAIR_SCALE
        return combined

    return _per_layer(inputs)


@architecture(
    "per-layer-sum-unscaled", source=("A12",), module=text, where=_LAYER + r"\.per_layer_projection"
)
def _per_layer_sum_unscaled() -> Patch:
    """The sum of token part and context part is not divided by the root of two."""
    return replace(TextModel, "PAIR_SCALE", 1.0)


@architecture(
    "per-layer-context-unnormed", source=("A12",), module=text, where=_LAYER + r"\.per_layer_projection"
)
def _per_layer_context_unnormed() -> Patch:
    """The projected context is not normed."""

    def inputs(self: TextModel, ids: Tensor, x: Tensor) -> Tensor:
        identity, _ = _parts(self, ids, x)
        context = F.linear(x, self.per_layer_model_projection.weight) * self.config.hidden_size**-0.5
        combined: Tensor = (context.view(identity.shape) + identity) * self.PAIR_SCALE
        return combined

    return _per_layer(inputs)


@architecture(
    "per-layer-table-packed-by-width", source=("A12",), module=text, where=_LAYER + r"\.per_layer_projection"
)
def _per_layer_packing() -> Patch:
    """The per-layer table is unpacked width by width instead of layer by layer."""

    def inputs(self: TextModel, ids: Tensor, x: Tensor) -> Tensor:
        identity, context = _parts(self, ids, x)
        layers, width = identity.shape[-2:]
        swapped = identity.flatten(-2).view(*ids.shape, width, layers).transpose(-1, -2)
        return (context + swapped) * self.PAIR_SCALE

    return _per_layer(inputs)


@architecture(
    "per-layer-table-missing", source=("A13",), module=text, where=_LAYER + r"\.per_layer_projection"
)
def _per_layer_table_missing() -> Patch:
    """The token's part of the per-layer input is left out."""
    return _per_layer(lambda self, ids, x: _parts(self, ids, x)[1] * self.PAIR_SCALE)


@architecture("no-soft-cap", source=("check 11", "spec 2.8"), module=text, where="logits")
def _no_soft_cap() -> Patch:
    """Logits are not soft-capped."""

    def logits(self: TextModel, hidden: Tensor) -> Tensor:
        tied = (self.embed_tokens.weight,) if self.config.tie_word_embeddings else ()
        raw: Tensor = self.lm_head(hidden, *tied)
        return raw

    return replace(TextModel, "logits", logits)


# ---------------------------------------------------------------------------- layers


def _layer(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Patch:
    """A patch of a layer's output: `change` gets its input, its output and its scalar."""
    original = DecoderLayer.forward

    def forward(self: DecoderLayer, x: Tensor, per_layer_input: Tensor | None, step: Step) -> Tensor:
        return change(x, original(self, x, per_layer_input, step), self.layer_scalar)

    return replace(DecoderLayer, "forward", forward)


@architecture("layer-scalar-dropped", source=("A14", "A15"), module=text, where=_LAYER)
def _layer_scalar_dropped() -> Patch:
    """The residual stream is not multiplied by the layer's scalar."""
    return _layer(lambda _x, out, scalar: out / scalar)


@architecture("layer-scalar-on-delta", source=("A37",), module=text, where=_LAYER)
def _layer_scalar_on_delta() -> Patch:
    """The layer's scalar multiplies what the layer adds, not the stream."""
    return _layer(lambda x, out, scalar: x + scalar * (out / scalar - x))


def _exact_gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


@architecture("erf-gelu-in-mlp", source=("A18",), module=mlp, where=_LAYER + r"\.mlp")
def _erf_gelu_in_mlp() -> Patch:
    """The dense MLP uses the exact GELU."""
    return replace(mlp, "gelu_tanh", _exact_gelu)


@architecture("erf-gelu-in-experts", source=("A18",), module=moe, where=_LAYER + r"\.experts")
def _erf_gelu_in_experts() -> Patch:
    """Experts use the exact GELU."""
    return replace(moe, "gelu_tanh", _exact_gelu)


@architecture("silu-experts-when-decoding", source=("A19",), module=moe, where=_LAYER + r"\.experts")
def _silu_when_decoding() -> Patch:
    """Experts use SiLU where each row has a single token."""
    original = DecoderLayer.route

    def route(self: DecoderLayer, h: Tensor) -> Tensor:
        if h.shape[1] > 1:
            return original(self, h)
        with replace(moe, "gelu_tanh", F.silu)():
            return original(self, h)

    return replace(DecoderLayer, "route", route)


@architecture("gate-and-up-swapped", source=("spec 2.7",), module=moe, where=_LAYER + r"\.experts")
def _gate_and_up_swapped() -> Patch:
    """The second half of an expert's first matrix is taken for the gate."""
    original = Experts.forward

    def forward(self: Experts, z: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        stored = self.gate_up_proj
        gate, up = stored.chunk(2, dim=1)
        self.gate_up_proj = nn.Parameter(torch.cat([up, gate], dim=1), requires_grad=False)
        try:
            return original(self, z, experts, weights)
        finally:
            self.gate_up_proj = stored

    return replace(Experts, "forward", forward)


@architecture(
    "experts-dropped", source=("A33",), module=text, where=_LAYER + r"\.(experts|router|p\w+_layernorm\w*)"
)
def _experts_dropped() -> Patch:
    """Only the dense half of the feed-forward block is computed."""
    return replace(Experts, "forward", lambda _self, z, _experts, _weights: torch.zeros_like(z))


@architecture(
    "experts-see-dense-norm", source=("A15",), module=text,
    where=_LAYER + r"\.(pre_feedforward_layernorm_2|experts)",
)  # fmt: skip
def _experts_see_dense_norm() -> Patch:
    """The experts' input is normed with the dense MLP's norm."""

    def route(self: DecoderLayer, h: Tensor) -> Tensor:
        tokens = h.flatten(0, 1)
        _, weights, experts = self.router(tokens)
        self.pre_feedforward_layernorm_2(tokens)
        normed = RMSNorm.forward(self.pre_feedforward_layernorm, tokens)
        mixed: Tensor = self.experts(normed, experts, weights)
        return mixed.view_as(h)

    return replace(DecoderLayer, "route", route)


# ---------------------------------------------------------------------------- router

Routing = tuple[Tensor, Tensor, Tensor]


def _router(change: Callable[[Router, Tensor], Any]) -> Patch:
    return replace(Router, "forward", change)


_ROUTER = _LAYER + r"\.(router|experts)"


@architecture("router-sees-normed-stream", source=("A15", "spec 2.7"), module=text, where=_ROUTER)
def _router_sees_normed_stream() -> Patch:
    """The router gets the experts' normed input instead of the stream."""

    def route(self: DecoderLayer, h: Tensor) -> Tensor:
        z = self.pre_feedforward_layernorm_2(h.flatten(0, 1))
        _, weights, experts = self.router(z)
        mixed: Tensor = self.experts(z, experts, weights)
        return mixed.view_as(h)

    return replace(DecoderLayer, "route", route)


@architecture("router-scale-dropped", source=("A15",), module=moe, where=_ROUTER)
def _router_scale_dropped() -> Patch:
    """The router's learned scale is skipped."""
    original = Router.forward

    def forward(self: Router, h: Tensor) -> Routing:
        learned = self.scale
        self.scale = torch.nn.Parameter(torch.ones_like(learned), requires_grad=False)
        try:
            return original(self, h)
        finally:
            self.scale = learned

    return _router(forward)


@architecture("expert-scale-dropped", source=("A15", "A16"), module=moe, where=_ROUTER)
def _expert_scale_dropped() -> Patch:
    """The scale of each expert is not applied."""
    original = Router.forward

    def forward(self: Router, h: Tensor) -> Routing:
        p, w, experts = original(self, h)
        return p, w / self.per_expert_scale[experts], experts

    return _router(forward)


@architecture("expert-scale-twice", source=("A16",), module=moe, where=_ROUTER)
def _expert_scale_twice() -> Patch:
    """The scale of each expert is applied twice."""
    original = Router.forward

    def forward(self: Router, h: Tensor) -> Routing:
        p, w, experts = original(self, h)
        return p, w * self.per_expert_scale[experts], experts

    return _router(forward)


@architecture("expert-scale-before-choice", source=("A16", "A17"), module=moe, where=_ROUTER)
def _expert_scale_before_choice() -> Patch:
    """The scale of each expert takes part in choosing and renormalising."""
    original = Router.forward

    def forward(self: Router, h: Tensor) -> Routing:
        p, _, _ = original(self, h)
        w, experts = torch.topk(p * self.per_expert_scale, self.top_k, dim=-1)
        return p, w / w.sum(dim=-1, keepdim=True), experts

    return _router(forward)


@architecture("weights-not-renormalised", source=("A17",), module=moe, where=_ROUTER)
def _weights_not_renormalised() -> Patch:
    """The chosen experts' probabilities are not brought to a sum of one."""
    original = Router.forward

    def forward(self: Router, h: Tensor) -> Routing:
        p, _, experts = original(self, h)
        return p, p.gather(-1, experts) * self.per_expert_scale[experts], experts

    return _router(forward)
