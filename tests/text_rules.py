"""The rules of the text decoder, on small random models.

Each rule is a function `check_*` that raises AssertionError where the implementation breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from model_impl.config import MoEConfig
from model_impl.layers import backends
from model_impl.layers.backends import BACKENDS, Mask
from model_impl.layers.mlp import MLP
from model_impl.layers.moe import Experts
from model_impl.layers.norm import RMSNorm
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import visible
from model_impl.text import DecoderLayer, TextModel
from tests.model_configs import (
    DENSE,
    E2B,
    FULL,
    MOE,
    SLIDING,
    TINY,
    attention_inputs,
    build,
    distance,
    jittered,
    random_ids,
    tapped,
    tensors,
)

EPS = 1e-6
SAME = 5e-5
"""Relative: float32 results of different orders of summation. Measured: up to 6e-6."""
MOVED = 1e-3


def normed64(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMS normalisation in float64."""
    x = x.double()
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight.double()


def gelu64(x: Tensor) -> Tensor:
    """The tanh approximation of GELU in float64, written out."""
    x = x.double()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def logits(model: TextModel, ids: Tensor) -> Tensor:
    return model.logits(model(ids))


# ------------------------------------------------------------------------------------------------- norm


def check_zero_norm_weights_silence_every_branch(kind: str) -> None:
    weights = tensors(TINY[kind])
    zeroed = {
        name: torch.zeros_like(weight) for name, weight in weights.items() if "norm" in name.split(".")[-2]
    }
    assert len(zeroed) > 20
    model = build(TINY[kind], edits=zeroed)
    with tapped(model) as taps:
        final = model(random_ids(2, 12))
    for index, layer in enumerate(model.layers):
        assert torch.equal(taps.output(f"layers.{index}"), taps.input(f"layers.{index}") * layer.layer_scalar)
    assert not final.any()


def check_norm_of_outliers_in_bfloat16(largest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 512, generator=generator)
    x[:, 17] = largest
    x[:, 400] *= largest
    x = x.bfloat16()
    norm = RMSNorm(512, EPS)
    norm.weight = torch.nn.Parameter(torch.rand(512, generator=generator).bfloat16() + 0.5)
    expected = normed64(x, norm.weight.detach()).bfloat16()
    same = (norm(x) == expected).double().mean()
    # float32 against float64 may differ where a result lies between two bfloat16 numbers.
    assert same > 0.999


# ------------------------------------------------------------------------------------------------- rope

POSITIONS = (0, 1, 17, 4095)
ROPE_CONFIG = {
    **DENSE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": [SLIDING, FULL],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
}


def check_rotation(layer: int) -> None:
    """Queries and keys against complex rotation in float64, at the real head dimensions."""
    model = build(ROPE_CONFIG)
    with tapped(model) as taps, attention_inputs(compute=False) as seen:
        model(random_ids(1, POSITIONS[-1] + 1))
    d, theta, rotating = [(256, 1e4, 128), (512, 1e6, 64)][layer]
    frequencies = torch.zeros(d // 2, dtype=torch.float64)
    frequencies[:rotating] = theta ** (-2 * torch.arange(rotating, dtype=torch.float64) / d)
    at = torch.tensor(POSITIONS)
    for which, got in (("q", seen[layer][0]), ("k", seen[layer][1])):
        before = taps.output(f"layers.{layer}.self_attn.{which}_norm")[:, at].double()
        turn = torch.polar(torch.ones(1, dtype=torch.float64), at[:, None] * frequencies)[None, :, None]
        after = torch.complex(before[..., : d // 2], before[..., d // 2 :]) * turn
        expected = torch.cat([after.real, after.imag], dim=-1)
        rotated = got.transpose(1, 2)[:, at]
        # An angle of 4095 radians is known to 2e-4 in float32.
        assert distance(rotated, expected) < 1e-3
        assert torch.equal(rotated[:, 0].double(), before[:, 0])
        still = [*range(rotating, d // 2), *range(d // 2 + rotating, d)]
        assert torch.equal(rotated[..., still].double(), before[..., still])
        moving = [*range(rotating), *range(d // 2, d // 2 + rotating)]
        assert (rotated[:, -1][..., moving].double() != before[:, -1][..., moving]).any(dim=1).all()


# -------------------------------------------------------------------------------------------- attention


def attend64(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Attention in float64, one head at a time."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for j in range(q.shape[1]):
        scores = scale * q[:, j].double() @ k[:, j // group].double().transpose(1, 2)
        scores = scores.masked_fill(~allowed[:, 0], -math.inf)
        heads.append(torch.softmax(scores, dim=-1) @ v[:, j // group].double())
    return torch.stack(heads, dim=1)


def check_scale_at_each_call_site(attention: str, scale: float) -> None:
    """Prefill with a causal and with a dense mask, decoding with and without one: each site applies it."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, heads, 11, 16, generator=generator) for heads in (4, 2, 2))
    positions = torch.arange(11).expand(2, 11)
    causal, window = visible(positions, positions, None), visible(positions, positions, 4)
    last, everything = q[:, :, -1:], torch.ones(2, 1, 1, 11, dtype=torch.bool)
    sites = [
        (q, Mask(None, causal=True), causal),
        (q, Mask(window), window),
        (last, Mask(None), everything),
        (last, Mask(window[:, :, -1:]), window[:, :, -1:]),
    ]
    with mock.patch.object(backends, "SCALE", scale):
        for queries, mask, allowed in sites:
            got = BACKENDS[attention](queries, k, v, mask)
            assert distance(got, attend64(queries, k, v, allowed, scale)) < SAME


def check_scale_of_the_model(attention: str) -> None:
    """Logits on the way of a prompt and of a single token equal those with the scale written as 1."""
    ids = random_ids(1, 11)
    model = build(DENSE, attention=attention)

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        if allowed is None:
            allowed = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
        return attend64(q, k, v, allowed.expand(len(q), -1, -1, -1), 1.0).float()

    with mock.patch.dict(BACKENDS, {attention: plain}):
        expected = logits(model, ids)
    assert distance(logits(model, ids), expected) < SAME
    cache = KVCache(model.config, 1)
    model(ids[:, :10], cache=cache)
    assert distance(model.logits(model(ids[:, 10:], cache=cache)), expected[:, 10:]) < SAME


def check_keys_are_values() -> None:
    """The value is v_norm of the raw key projection: no key norm, no rotation."""
    model = build(DENSE)
    ids = random_ids(2, 13)
    with tapped(model) as taps, attention_inputs() as seen:
        model(ids)
    full = [layer.index for layer in model.config.layers if layer.kind == FULL]
    for index in full:
        raw = taps.output(f"layers.{index}.self_attn.k_proj").view(2, 13, 2, 32)
        _, k, v = seen[index]
        assert distance(v.transpose(1, 2), normed64(raw)) < SAME
        # Also where nothing rotates the two differ, by the key norm's weight.
        assert distance(k[:, :, 0], v[:, :, 0]) > 0.05
        assert not hasattr(model.layers[index].self_attn, "v_proj")
    first = full[0]
    name = f"layers.{first}.self_attn.k_norm.weight"
    flat = build(DENSE, edits={name: torch.zeros(32)})
    with tapped(flat) as flat_taps, attention_inputs() as flat_seen:
        flat(ids)
    _, k, v = flat_seen[first]
    assert not k.any()
    assert torch.equal(v, seen[first][2])
    # Without keys every visible value weighs the same; query head j has key-value head j // 2.
    means = v.cumsum(dim=2) / torch.arange(1, 14)[:, None]
    expected = means.repeat_interleave(2, dim=1).transpose(1, 2).flatten(2)
    assert distance(flat_taps.input(f"layers.{first}.self_attn.o_proj"), expected) < SAME


# ------------------------------------------------------------------------------------------- KV sharing

E2B_LAYOUT = {
    **E2B,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 35,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
    "num_kv_shared_layers": 20,
    "hidden_size_per_layer_input": 4,
}


def layers_that_read(name: str) -> set[int]:
    """Layers whose output changes with a tensor while the input of every layer is held."""
    ids = random_ids(1, 12)
    model = build(E2B_LAYOUT)
    with tapped(model) as before:
        model(ids)
    changed = build(E2B_LAYOUT, edits={name: jittered(tensors(E2B_LAYOUT)[name], name)})
    for index, layer in enumerate(changed.layers):
        held = before.input(f"layers.{index}")
        layer.register_forward_pre_hook(lambda _, args, held=held: (held, *args[1:]))
    with tapped(changed) as after:
        changed(ids)
    names = [f"layers.{index}" for index in range(35)]
    return {i for i, layer in enumerate(names) if not torch.equal(after.output(layer), before.output(layer))}


def check_shared_layers_read_their_source() -> None:
    sliding = {i for i in range(15, 35) if i % 5 != 4}
    for layer, part, readers in (
        (12, "k_proj", {12}),
        (13, "k_proj", {13} | sliding),
        (13, "v_proj", {13} | sliding),
        (14, "v_proj", {14, 19, 24, 29, 34}),
        (14, "k_norm", {14, 19, 24, 29, 34}),
        (20, "q_proj", {20}),
    ):
        assert layers_that_read(f"layers.{layer}.self_attn.{part}.weight") == readers


# ------------------------------------------------------------------------------------- per-layer inputs


def check_per_layer_inputs() -> None:
    model = build(E2B)
    ids = random_ids(2, 9)
    weights = tensors(E2B)
    with tapped(model) as taps:
        model(ids)
    h0 = weights["embed_tokens.weight"].double()[ids] * math.sqrt(48)
    assert distance(taps.input("layers.0"), h0) < SAME
    for index in range(10):
        block = slice(12 * index, 12 * (index + 1))
        identity = weights["embed_tokens_per_layer.weight"].double()[ids][..., block] * math.sqrt(12)
        projected = h0 @ weights["per_layer_model_projection.weight"].double()[block].T / math.sqrt(48)
        context = normed64(projected, weights["per_layer_projection_norm.weight"])
        assert distance(taps.inputs[f"layers.{index}"][1], (identity + context) / math.sqrt(2)) < SAME


def check_the_norm_of_the_context_sees_its_projection_scaled() -> None:
    """Where the projection is tiny, eps counts, and with it the factor before the norm."""
    weights = tensors(E2B)
    name = "per_layer_model_projection.weight"
    small = weights[name] * 1e-3
    model = build(E2B, edits={name: small})
    ids = random_ids(1, 5)
    got = model.per_layer_inputs(ids, model.embed_tokens(ids))
    assert got is not None
    h0 = weights["embed_tokens.weight"].double()[ids] * math.sqrt(48)
    projected = (h0 @ small.double().T / math.sqrt(48)).view(1, 5, 10, 12)
    context = normed64(projected, weights["per_layer_projection_norm.weight"])
    identity = weights["embed_tokens_per_layer.weight"].double()[ids].view(1, 5, 10, 12) * math.sqrt(12)
    assert distance(got, (identity + context) / math.sqrt(2)) < SAME


def check_the_token_s_own_row_counts() -> None:
    """Two tokens with one embedding differ by their per-layer rows, and by those alone."""
    weights = tensors(E2B)
    names = "embed_tokens.weight", "embed_tokens_per_layer.weight"
    for name in names:
        weights[name][5] = weights[name][4]
    ids = random_ids(1, 9)
    twins = [ids.index_fill(1, torch.tensor([6]), token) for token in (4, 5)]
    equal = build(E2B, edits={name: weights[name] for name in names})
    assert torch.equal(logits(equal, twins[0]), logits(equal, twins[1]))
    unequal = build(E2B, edits={names[0]: weights[names[0]]})
    one, other = (logits(unequal, twin) for twin in twins)
    assert torch.equal(one[:, :6], other[:, :6])
    assert distance(one[:, 6], other[:, 6]) > MOVED


def check_zeroing_the_table_changes_logits() -> None:
    name = "embed_tokens_per_layer.weight"
    ids = random_ids(1, 9)
    without = build(E2B, edits={name: torch.zeros_like(tensors(E2B)[name])})
    assert distance(logits(without, ids), logits(build(E2B), ids)) > MOVED


# ------------------------------------------------------------------------------ layers and layer_scalar


def check_a_layer_is_the_sum_of_its_parts(kind: str) -> None:
    model = build(TINY[kind])
    with tapped(model) as taps:
        model(random_ids(2, 12))
    for index, layer in enumerate(model.layers):
        at = f"layers.{index}."
        x, y = taps.input(at[:-1]), taps.output(at[:-1])
        assert torch.equal(taps.input(at + "input_layernorm"), x)
        h = x + taps.output(at + "post_attention_layernorm")
        assert torch.equal(taps.input(at + "pre_feedforward_layernorm"), h)
        feed = taps.output(at + "mlp")
        if kind == "moe":
            assert torch.equal(taps.input(at + "post_feedforward_layernorm_1"), feed)
            assert torch.equal(taps.input(at + "router"), h.flatten(0, 1))
            assert torch.equal(taps.input(at + "pre_feedforward_layernorm_2"), h.flatten(0, 1))
            assert torch.equal(taps.input(at + "experts"), taps.output(at + "pre_feedforward_layernorm_2"))
            experts = taps.output(at + "post_feedforward_layernorm_2").view_as(h)
            feed = taps.output(at + "post_feedforward_layernorm_1") + experts
        assert torch.equal(taps.input(at + "post_feedforward_layernorm"), feed)
        h = h + taps.output(at + "post_feedforward_layernorm")
        if kind == "e2b":
            assert torch.equal(taps.input(at + "per_layer_input_gate"), h)
            gated = gelu64(taps.output(at + "per_layer_input_gate")) * taps.inputs[at[:-1]][1].double()
            assert distance(taps.input(at + "per_layer_projection"), gated) < 1e-6
            h = h + taps.output(at + "post_per_layer_input_norm")
        assert layer.layer_scalar != 1
        assert distance(y, h.double() * layer.layer_scalar.double()) < 1e-6


def check_a_zero_scalar_ends_the_stream(kind: str) -> None:
    """It multiplies the whole stream after everything else: the layers behind it see zeros."""
    model = build(TINY[kind], edits={"layers.1.layer_scalar": torch.zeros(1)})
    with tapped(model) as taps:
        final = model(random_ids(2, 12))
    assert taps.input("layers.1").any()
    for index in range(2, len(model.layers)):
        assert not taps.input(f"layers.{index}").any()
    assert not model.logits(final).any()


def check_gelu_is_the_tanh_form(where: str) -> None:
    """Around |x| = 1 to 3 the two forms of GELU differ by up to 5e-4."""
    x = torch.cat([torch.linspace(-3, -1, 32), torch.linspace(1, 3, 32)]).double()
    eye = torch.eye(64, dtype=torch.float64)
    if where == "mlp":
        mlp = MLP(64, 64).double().requires_grad_(False)
        for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            part.weight.data = eye
        got = mlp(x)
    else:
        experts = Experts(64, MoEConfig(num_experts=2, top_k=1, intermediate_size=64)).requires_grad_(False)
        experts.gate_up_proj.data = torch.cat([eye, eye]).repeat(2, 1, 1)
        experts.down_proj.data = eye.repeat(2, 1, 1)
        got = experts(x[None], torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64))[0]
    assert float((got - gelu64(x) * x).abs().max()) < 1e-9


# --------------------------------------------------------------------------------------------- experts


def check_experts_equal_a_naive_loop(tokens: int) -> None:
    """Routing and experts for one token at a time, in float64, from the published weights."""
    model, weights = build(MOE), tensors(MOE)
    h = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(5)) * 3
    for index, layer in enumerate(model.layers):
        at = f"layers.{index}."
        w = {name.removeprefix(at): x.double() for name, x in weights.items() if name.startswith(at)}
        expected = torch.zeros(tokens, 48, dtype=torch.float64)
        for t, row in enumerate(h[0]):
            scores = w["router.proj.weight"] @ (normed64(row) * w["router.scale"] / math.sqrt(48))
            p = torch.exp(scores) / torch.exp(scores).sum()
            chosen = sorted(range(8), key=lambda e: -p[e])[:3]
            z = normed64(row, w["pre_feedforward_layernorm_2.weight"])
            for e in chosen:
                weight = p[e] / sum(p[c] for c in chosen) * w["router.per_expert_scale"][e]
                gate, up = (w["experts.gate_up_proj"][e] @ z).split(20)
                expected[t] += weight * (w["experts.down_proj"][e] @ (gelu64(gate) * up))
        assert isinstance(layer, DecoderLayer)
        assert distance(layer.route(h)[0], expected) < SAME


def check_each_branch_has_its_own_norm() -> None:
    ids = random_ids(1, 6)
    with tapped(model := build(MOE)) as before:
        model(ids)
    for norm, moves, stays in (
        ("pre_feedforward_layernorm", "mlp", "experts"),
        ("pre_feedforward_layernorm_2", "experts", "mlp"),
    ):
        name = f"layers.0.{norm}.weight"
        with tapped(model := build(MOE, edits={name: jittered(tensors(MOE)[name], name)})) as after:
            model(ids)
        assert torch.equal(after.output(f"layers.0.{stays}"), before.output(f"layers.0.{stays}"))
        assert distance(after.output(f"layers.0.{moves}"), before.output(f"layers.0.{moves}")) > MOVED


def check_expert_scales_are_not_renormalised() -> None:
    name = "layers.0.router.per_expert_scale"
    h = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(6))
    plain, doubled = build(MOE), build(MOE, edits={name: tensors(MOE)[name] * 2})
    assert torch.equal(doubled.layers[0].route(h), plain.layers[0].route(h) * 2)


# ------------------------------------------------------------------------------------------------ head


def check_soft_cap() -> None:
    capped, open_ended = build(E2B), build({**E2B, "final_logit_softcapping": None})
    hidden = capped(random_ids(2, 12))
    raw = open_ended.logits(hidden)
    assert torch.equal(raw, hidden @ tensors(E2B)["embed_tokens.weight"].T)
    # Random logits are small; times 30 the cap bends them.
    for factor in (1, 30):
        got, uncapped = capped.logits(hidden * factor), open_ended.logits(hidden * factor)
        assert distance(got, 30 * torch.tanh(uncapped.double() / 30)) < SAME
        assert got.abs().max() < 30
        assert torch.equal(got.argmax(-1), uncapped.argmax(-1))
    assert distance(F.log_softmax(got, dim=-1), F.log_softmax(uncapped, dim=-1)) > MOVED


Check = Callable[[], None]

CHECKS: dict[str, Check] = {
    **{f"norm-zero-{kind}": partial(check_zero_norm_weights_silence_every_branch, kind) for kind in TINY},
    "norm-outliers": partial(check_norm_of_outliers_in_bfloat16, 1e4),
    "norm-outliers-small": partial(check_norm_of_outliers_in_bfloat16, 1e3),
    "rope-sliding": partial(check_rotation, 0),
    "rope-full": partial(check_rotation, 1),
    **{
        f"scale-{attention}-{scale:.2f}": partial(check_scale_at_each_call_site, attention, scale)
        for attention in BACKENDS
        for scale in (1.0, 0.25, 0.3)
    },
    **{f"scale-of-the-model-{a}": partial(check_scale_of_the_model, a) for a in BACKENDS},
    "keys-are-values": check_keys_are_values,
    "kv-sharing": check_shared_layers_read_their_source,
    "per-layer-inputs": check_per_layer_inputs,
    "per-layer-eps": check_the_norm_of_the_context_sees_its_projection_scaled,
    "per-layer-rows": check_the_token_s_own_row_counts,
    "per-layer-table": check_zeroing_the_table_changes_logits,
    **{f"parts-{kind}": partial(check_a_layer_is_the_sum_of_its_parts, kind) for kind in TINY},
    **{f"zero-scalar-{kind}": partial(check_a_zero_scalar_ends_the_stream, kind) for kind in TINY},
    "gelu-mlp": partial(check_gelu_is_the_tanh_form, "mlp"),
    "gelu-experts": partial(check_gelu_is_the_tanh_form, "experts"),
    "experts-naive": partial(check_experts_equal_a_naive_loop, 17),
    "experts-naive-one-token": partial(check_experts_equal_a_naive_loop, 1),
    "experts-norms": check_each_branch_has_its_own_norm,
    "experts-scales": check_expert_scales_are_not_renormalised,
    "soft-cap": check_soft_cap,
}
