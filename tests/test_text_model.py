"""What the text decoder computes, rule by rule, and mutants of it that the rules must find."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import model_impl.config
from model_impl import text
from model_impl.config import RopeConfig
from model_impl.layers import backends, mlp, moe, rope
from model_impl.layers.attention import Attention
from model_impl.layers.backends import BACKENDS, Mask
from model_impl.layers.moe import Router
from model_impl.layers.norm import RMSNorm
from model_impl.text import DecoderLayer, TextModel
from tests.model_configs import MOE, TINY, build, distance, random_ids, tensors
from tests.text_rules import CHECKS, EPS, Check, logits

Patch = AbstractContextManager[object]


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_rule(check: Check) -> None:
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_scale_invariant_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = RMSNorm(64, EPS, scale=False)(x)
    assert y.dtype == dtype
    assert distance(y.double().square().mean(-1), torch.ones(4)) < 0.01
    assert torch.equal(RMSNorm(64, EPS, scale=False)(x * 1024), y) or dtype == torch.float32
    assert not RMSNorm(64, EPS, scale=False)(torch.zeros(1, 64)).any()


def test_ties_between_experts_are_broken_the_same_way_every_time() -> None:
    router = build(MOE, edits={"layers.0.router.proj.weight": torch.zeros(8, 48)}).layers[0].router
    assert isinstance(router, Router)
    h = torch.randn(33, 48, generator=torch.Generator().manual_seed(7))
    p, weights, experts = router(h)
    assert torch.equal(p, torch.full((33, 8), 1 / 8))
    assert torch.equal(experts, experts[:1].expand(33, 3))
    assert distance(weights, router.per_expert_scale[experts] / 3) < 1e-6
    for row in h.split(1):
        assert torch.equal(router(row)[2], experts[:1])
    assert torch.equal(router(h)[2], experts)


def test_experts_without_tokens_are_not_read() -> None:
    model = build(MOE)
    layer = model.layers[0]
    h = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(8))
    before = layer.route(h)
    hit = set(layer.router(h[0])[2].flatten().tolist())
    for other in set(range(8)) - hit:
        layer.experts.down_proj[other] = math.nan
        layer.experts.gate_up_proj[other] = math.nan
    assert torch.equal(layer.route(h), before)


def saturated(values: Tensor, cap: float) -> float:
    """Part of the logits that lie within five percent of the cap."""
    return float((values.abs() > 0.95 * cap).double().mean())


@pytest.mark.parametrize("kind", TINY)
def test_a_healthy_model_does_not_saturate_and_a_broken_one_does(kind: str) -> None:
    ids = random_ids(2, 30)
    assert saturated(logits(build(TINY[kind]), ids), 30) == 0
    # A weight scale applied twice, as a doubled activation scale would do.
    loud = build(TINY[kind], edits={"norm.weight": tensors(TINY[kind])["norm.weight"] * 100})
    assert saturated(logits(loud, ids), 30) > 0.5
    assert logits(loud, ids).abs().max() <= 30


# ------------------------------------------------------------------------------------------- mutants


def _norm(compute: Callable[[Tensor, Tensor | None, float], Tensor]) -> Patch:
    return mock.patch.object(RMSNorm, "forward", lambda self, x: compute(x, self.weight, self.eps))


def _offset_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, eps) * (1.0 if weight is None else 1 + weight)


def _narrow_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _twice_rounded_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
    return y if weight is None else y * weight


def _rope(frequencies: Callable[[RopeConfig, int], Tensor]) -> Patch:
    return mock.patch.object(rope, "inverse_frequencies", frequencies)


def _narrow_denominator(config: RopeConfig, head_dim: int) -> Tensor:
    rotating = int(config.rotated * head_dim // 2)
    turning = config.theta ** -(torch.arange(rotating) / rotating)
    return torch.cat([turning, torch.zeros(head_dim // 2 - rotating)])


def _rotate_prefix(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (j, j + d/8): the rotated quarter by itself, as if it were a head of its own."""
    d = x.shape[-1]
    moving = torch.cat([cos[..., : d // 8]] * 2, dim=-1), torch.cat([sin[..., : d // 8]] * 2, dim=-1)
    return torch.cat([ROTATE(x[..., : d // 4], *moving), x[..., d // 4 :]], dim=-1)


def _rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2j, 2j + 1)."""
    half = x.shape[-1] // 2
    a, b, c, s = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)


def _attention(backend: str) -> Patch:
    original = BACKENDS[backend]

    def scaled(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return original(q * q.shape[-1] ** -0.5, k, v, mask)

    return mock.patch.dict(BACKENDS, {backend: scaled})


def _other_groups(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Query head j reads key-value head j % g."""
    repeats = q.shape[1] // k.shape[1]
    return SDPA(q, k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1), mask)


def _values(value: Callable[[Attention, Tensor, Tensor], Tensor]) -> Patch:
    def keys_values(self: Attention, x: Tensor, step: Any) -> tuple[Tensor, Tensor]:
        k, v = KEYS_VALUES(self, x, step)
        return k, value(self, k, v) if self.layer.keys_are_values else v

    return mock.patch.object(Attention, "keys_values", keys_values)


def _unnormed_values(self: Attention, x: Tensor, step: Any) -> tuple[Tensor, Tensor]:
    k, _ = KEYS_VALUES(self, x, step)
    projection = self.k_proj if self.layer.keys_are_values else self.v_proj
    return k, self._heads(projection(x)).transpose(1, 2)


def _source_by_distance(kinds: list[str], index: int, first_shared: int) -> int:
    return index if index < first_shared else (index - first_shared) % first_shared


def _first_source(kinds: list[str], index: int, first_shared: int) -> int:
    return index if index < first_shared else kinds.index(kinds[index])


def _per_layer(
    *, identity: float = 1.0, before: float = 1.0, packing: bool = False, norm: bool = True, pair: float = 1.0
) -> Patch:
    def inputs(self: TextModel, ids: Tensor, x: Tensor) -> Tensor | None:
        if self.config.per_layer_inputs is None:
            return None
        count, width = len(self.layers), self.config.per_layer_inputs.width
        own = self.embed_tokens_per_layer(ids) * identity
        own = own.view(*ids.shape, width, count).mT if packing else own.view(*ids.shape, count, width)
        context = self.per_layer_model_projection(x) * self.config.hidden_size**-0.5 * before
        context = context.view(*ids.shape, count, width)
        context = self.per_layer_projection_norm(context) if norm else context
        return (context + own) * self.PAIR_SCALE * pair

    return mock.patch.object(TextModel, "per_layer_inputs", inputs)


def _layer(scale: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Patch:
    """Replace the last multiplication, given the layer's input, its sum of parts, and the scalar."""

    def forward(self: DecoderLayer, x: Tensor, per_layer_input: Tensor | None, step: Any) -> Tensor:
        scalar = self.layer_scalar
        self.layer_scalar = torch.ones(1)
        try:
            return scale(x, LAYER(self, x, per_layer_input, step), scalar)
        finally:
            self.layer_scalar = scalar

    return mock.patch.object(DecoderLayer, "forward", forward)


def _router(change: Callable[[Router, Tensor, tuple[Tensor, Tensor, Tensor]], Any]) -> Patch:
    return mock.patch.object(Router, "forward", lambda self, h: change(self, h, ROUTER(self, h)))


def _renormalised(router: Router, h: Tensor, routed: tuple[Tensor, Tensor, Tensor]) -> Any:
    p, weights, experts = routed
    return p, weights / weights.sum(dim=-1, keepdim=True), experts


def _route(change: Callable[[DecoderLayer, Tensor], Tensor]) -> Patch:
    return mock.patch.object(DecoderLayer, "route", change)


def _router_behind_the_norm(self: DecoderLayer, h: Tensor) -> Tensor:
    z = self.pre_feedforward_layernorm_2(h.flatten(0, 1))
    _, weights, experts = self.router(z)
    return self.experts(z, experts, weights).view_as(h)


def _one_norm_for_both(self: DecoderLayer, h: Tensor) -> Tensor:
    tokens = h.flatten(0, 1)
    _, weights, experts = self.router(tokens)
    return self.experts(self.pre_feedforward_layernorm(tokens), experts, weights).view_as(h)


def _up_half_first(x: Tensor, matrices: Tensor, hit: list[int], counts: list[int]) -> Tensor:
    y = GROUPED(x, matrices, hit, counts)
    first = x.shape[-1] == MOE["hidden_size"]
    return y.roll(y.shape[-1] // 2, dims=-1) if first else y


GROUPED = moe.grouped_linear
ROTATE, FREQUENCIES, SDPA, KEYS_VALUES = (
    rope.rotate,
    rope.inverse_frequencies,
    backends.sdpa,
    Attention.keys_values,
)
LAYER, ROUTER = DecoderLayer.forward, Router.forward
ERF = {"gelu_tanh": F.gelu}

MUTANTS: dict[str, tuple[Callable[[], Patch], list[str]]] = {
    "norm: 1 + w": (lambda: _norm(_offset_norm), ["norm-zero-e2b", "norm-zero-dense", "norm-zero-moe"]),
    "norm: in bfloat16": (lambda: _norm(_narrow_norm), ["norm-outliers", "norm-outliers-small"]),
    "norm: two roundings": (lambda: _norm(_twice_rounded_norm), ["norm-outliers"]),
    "rope: rotated width in the exponent": (lambda: _rope(_narrow_denominator), ["rope-full"]),
    "rope: everything rotates": (
        lambda: _rope(lambda config, d: FREQUENCIES(replace(config, rotated=1.0), d)),
        ["rope-full"],
    ),
    "rope: prefix as a head": (lambda: mock.patch.object(rope, "rotate", _rotate_prefix), ["rope-full"]),
    "rope: neighbours": (
        lambda: mock.patch.object(rope, "rotate", _rotate_neighbours),
        ["rope-sliding", "rope-full"],
    ),
    **{
        f"attention: 1/sqrt(d) in {name}": (
            partial(_attention, name),
            [f"scale-{name}-1.00", f"scale-{name}-0.25", f"scale-{name}-0.30", f"scale-of-the-model-{name}"],
        )
        for name in BACKENDS
    },
    "attention: scale fixed at 1": (
        lambda: mock.patch.dict(
            BACKENDS, {"sdpa": lambda q, k, v, mask: SDPA(q / backends.SCALE, k, v, mask)}
        ),
        ["scale-sdpa-0.25", "scale-sdpa-0.30"],
    ),
    "attention: heads in turn": (
        lambda: mock.patch.dict(BACKENDS, {"sdpa": _other_groups}),
        ["scale-sdpa-1.00", "scale-of-the-model-sdpa", "keys-are-values"],
    ),
    "values: the cached key": (lambda: _values(lambda _, k, v: k), ["keys-are-values"]),
    "values: the normed key": (
        lambda: _values(lambda self, k, v: v * self.k_norm.weight),
        ["keys-are-values"],
    ),
    "values: not normed": (
        lambda: mock.patch.object(Attention, "keys_values", _unnormed_values),
        ["keys-are-values"],
    ),
    "sharing: first of the kind": (
        lambda: mock.patch.object(model_impl.config, "_kv_source", _first_source),
        ["kv-sharing"],
    ),
    "sharing: as many layers back": (
        lambda: mock.patch.object(model_impl.config, "_kv_source", _source_by_distance),
        ["kv-sharing"],
    ),
    "per-layer: packed by feature": (partial(_per_layer, packing=True), ["per-layer-inputs"]),
    "per-layer: lookup not scaled": (partial(_per_layer, identity=12**-0.5), ["per-layer-inputs"]),
    "per-layer: projection not scaled": (partial(_per_layer, before=48**0.5), ["per-layer-eps"]),
    "per-layer: sum not scaled": (partial(_per_layer, pair=2**0.5), ["per-layer-inputs"]),
    "per-layer: no norm": (partial(_per_layer, norm=False), ["per-layer-inputs"]),
    "per-layer: no table": (
        partial(_per_layer, identity=0.0),
        ["per-layer-inputs", "per-layer-rows", "per-layer-table"],
    ),
    "scalar: left out": (
        lambda: _layer(lambda x, y, s: y),
        ["parts-e2b", "parts-dense", "parts-moe", "zero-scalar-e2b", "zero-scalar-dense", "zero-scalar-moe"],
    ),
    "scalar: of the delta": (
        lambda: _layer(lambda x, y, s: x + (y - x) * s),
        ["parts-e2b", "parts-dense", "parts-moe", "zero-scalar-e2b", "zero-scalar-dense", "zero-scalar-moe"],
    ),
    "gelu: erf in the MLP": (lambda: mock.patch.multiple(mlp, **ERF), ["gelu-mlp"]),
    "gelu: erf in the experts": (
        lambda: mock.patch.multiple(moe, **ERF),
        ["gelu-experts"],
    ),
    "gelu: erf in the per-layer gate": (lambda: mock.patch.multiple(text, **ERF), ["parts-e2b"]),
    "router: no expert scale": (
        lambda: _router(lambda self, h, r: (r[0], r[1] / self.per_expert_scale[r[2]], r[2])),
        ["experts-naive", "experts-naive-one-token", "experts-scales"],
    ),
    "router: renormalised after the scale": (
        lambda: _router(_renormalised),
        ["experts-naive", "experts-scales"],
    ),
    "router: not renormalised": (
        lambda: _router(lambda self, h, r: (r[0], r[0].gather(1, r[2]) * self.per_expert_scale[r[2]], r[2])),
        ["experts-naive"],
    ),
    "router: sees the normed stream": (
        lambda: _route(_router_behind_the_norm),
        ["experts-naive", "parts-moe"],
    ),
    "experts: the dense norm": (
        lambda: _route(_one_norm_for_both),
        ["experts-naive", "experts-norms"],
    ),
    "experts: up half first": (
        lambda: mock.patch.object(moe, "grouped_linear", _up_half_first),
        ["experts-naive"],
    ),
    "head: no cap": (
        lambda: mock.patch.object(torch, "tanh", lambda x: x),
        ["soft-cap"],
    ),
}


@pytest.mark.parametrize(
    ("patch", "rule"),
    [
        pytest.param(patch, CHECKS[rule], id=f"{name} ({rule})")
        for name, (patch, rules) in MUTANTS.items()
        for rule in rules
    ],
)
def test_each_check_fails_on_its_mutant(patch: Callable[[], Patch], rule: Check) -> None:
    with patch(), pytest.raises(AssertionError):
        rule()
