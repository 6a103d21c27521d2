"""Eagle3 draft heads: passes with and without a cache, and draft ids."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model_impl.checkpoint import assign_exactly
from model_impl.errors import CacheError, ModelError
from model_impl.runtime.cache import KVCache
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import Eagle3Config
from tests.draft_models import (
    TINY_EAGLE3,
    attend,
    eagle3_on_meta,
    heads,
    norm,
    random_weights,
    target_states,
    tiny_eagle3,
    turn,
)
from tests.model_configs import distance, random_ids
from tests.text_rules import SAME

AUX = "eagle_aux_hidden_state_layer_ids"


def draft(
    config: Mapping[str, Any] = TINY_EAGLE3,
    *,
    attention: str | None = None,
    edits: Mapping[str, Tensor] | None = None,
) -> Eagle3:
    with torch.device("meta"):
        model = Eagle3(Eagle3Config.from_dict(config), attention)
    assign_exactly(model, {**random_weights(model), **(edits or {})}, "the test")
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- one pass


def naive(model: Eagle3, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, draft vocabulary] and features [T, H] of one row, position by position."""
    w = {name.removeprefix("layers.0."): tensor.double() for name, tensor in model.state_dict().items()}
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    all_logits, outputs = [], []
    for p, (token, f) in enumerate(zip(ids.tolist(), features.double(), strict=True)):
        g = norm(f, w["hidden_norm.weight"])
        x = torch.cat([norm(w["embed_tokens.weight"][token], w["input_layernorm.weight"]), g])
        keys.append([turn(k, p, 1e4) for k in heads(w["self_attn.k_proj.weight"] @ x, 8)])
        values.append(heads(w["self_attn.v_proj.weight"] @ x, 8))
        parts = [
            attend(turn(q, p, 1e4) / 8**0.5, [k[j // 2] for k in keys], [v[j // 2] for v in values])
            for j, q in enumerate(heads(w["self_attn.q_proj.weight"] @ x, 8))
        ]
        r = w["self_attn.o_proj.weight"] @ torch.cat(parts)
        r = r + (g if model.config.norm_before_residual else f)
        x = norm(r, w["post_attention_layernorm.weight"])
        gate = w["mlp.gate_proj.weight"] @ x
        m = w["mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * (w["mlp.up_proj.weight"] @ x))
        outputs.append(r + m)
        all_logits.append(w["lm_head.weight"] @ norm(r + m, w["norm.weight"]))
    return torch.stack(all_logits), torch.stack(outputs)


def naive_features(model: Eagle3, states: list[Tensor]) -> Tensor:
    """The target's states [T, Ht] of one row, projected."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rows = []
    for parts in zip(*states, strict=True):
        a = torch.cat([part.double() for part in parts])
        if model.config.norm_before_fc:
            a = norm(a, w["input_norm.weight"])
        rows.append(w["fc.weight"] @ a)
    return torch.stack(rows)


VARIANTS = {
    "published": {},
    "norm-after-residual": {"norm_before_residual": False},
    "norm-before-fc": {"norm_before_fc": True},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_pass_is_what_the_equations_say(variant: dict[str, Any], attention: str) -> None:
    model = draft(tiny_eagle3(**variant), attention=attention)
    ids, states = random_ids(2, 9), target_states(2, 9)
    features = model.features(states)
    hidden, out = model(ids, features)
    for row in range(2):
        f = naive_features(model, [state[row] for state in states])
        logits, outputs = naive(model, ids[row], f)
        assert distance(features[row], f) < SAME
        assert distance(model.logits(hidden)[row], logits) < SAME
        assert distance(out[row], outputs) < SAME


def test_the_variants_differ() -> None:
    ids, states = random_ids(1, 6), target_states(1, 6)
    outs = []
    for variant in VARIANTS.values():
        model = draft(tiny_eagle3(**variant))
        outs.append(model(ids, model.features(states))[1])
    assert all(distance(a, b) > 1e-2 for a, b in pairwise(outs))


def test_the_order_of_the_target_s_states_matters_and_their_number() -> None:
    model = draft()
    states = target_states(1, 4)
    assert distance(model.features(states[::-1]), model.features(states)) > 1e-2
    with pytest.raises(ModelError, match=r"states after \[1, 3, 4\] of its layers; 2 were given"):
        model.features(states[:2])


def test_the_embedding_is_not_scaled() -> None:
    """Its norm hides a scale up to eps, so that only small embeddings tell."""
    table = random_weights(eagle3_on_meta(TINY_EAGLE3))["embed_tokens.weight"] * 1e-3
    model = draft(edits={"embed_tokens.weight": table})
    ids, features = random_ids(1, 6), model.features(target_states(1, 6))
    assert distance(model(ids, features)[1][0], naive(model, ids[0], features[0])[1]) < SAME


# ----------------------------------------------------------------------------------------------- with a cache


@pytest.mark.parametrize("cut", [[1] * 11, [7, 1, 1, 1, 1], [4, 7], [11]], ids=str)
def test_pieces_equal_the_whole(cut: list[int]) -> None:
    model = draft()
    ids = random_ids(2, 11)
    features = model.features(target_states(2, 11))
    hidden, out = model(ids, features)
    cache = model.make_cache(2)
    pieces = [
        model(i, f, cache=cache)
        for i, f in zip(ids.split(cut, dim=1), features.split(cut, dim=1), strict=True)
    ]
    assert cache.lengths == [11, 11]
    assert distance(torch.cat([h for h, _ in pieces], dim=1), hidden) < SAME
    assert distance(torch.cat([o for _, o in pieces], dim=1), out) < SAME


def test_drafting_feeds_its_own_features_and_positions_advance() -> None:
    """Rows of different lengths, then three steps on what the pass before returned."""
    model, counts = draft(), [4, 7]
    ids = random_ids(2, 7)
    given = model.features(target_states(2, 7))
    cache = model.make_cache(2)
    hidden, out = model(ids, given, cache=cache, lengths=counts)
    last = torch.tensor(counts) - 1
    tokens = [ids[row, :n] for row, n in enumerate(counts)]
    fed = [given[row, :n] for row, n in enumerate(counts)]
    state, features = (x[torch.arange(2), last][:, None] for x in (hidden, out))
    for step in range(4):
        for row in range(2):
            logits, outputs = naive(model, tokens[row], fed[row])
            assert distance(model.logits(state)[row, 0], logits[-1]) < SAME
            assert distance(features[row, 0], outputs[-1]) < SAME
        token = model.target_ids(model.logits(state).argmax(dim=-1))
        tokens = [torch.cat([tokens[row], token[row]]) for row in range(2)]
        fed = [torch.cat([fed[row], features[row]]) for row in range(2)]
        state, features = model(token, features, cache=cache)
        assert cache.lengths == [n + step + 1 for n in counts]


def test_rejected_drafts_are_forgotten() -> None:
    model = draft()
    ids, features = random_ids(1, 8), model.features(target_states(1, 8))
    whole, _ = model(ids, features)
    cache = model.make_cache(1)
    model(ids[:, :5], features[:, :5], cache=cache)
    model(random_ids(1, 3, seed=9), features[:, 5:] + 1, cache=cache)
    cache.lengths = [5]
    again, _ = model(ids[:, 5:], features[:, 5:], cache=cache)
    assert distance(again, whole[:, 5:]) < SAME


def test_a_cache_of_another_model_is_refused() -> None:
    model = draft()
    features = model.features(target_states(1, 3))
    other = Eagle3Config.from_dict(tiny_eagle3(intermediate_size=44)).decoder
    with pytest.raises(CacheError, match="another configuration"):
        model(random_ids(1, 3), features, cache=KVCache(other, 1))
    with pytest.raises(CacheError, match="holds 2 rows"):
        model(random_ids(1, 3), features, cache=model.make_cache(2))
    assert model.make_cache(3).batch_size == 3


# -------------------------------------------------------------------------------------------------- draft ids


def test_draft_ids_lead_to_target_ids_by_offset() -> None:
    """Offsets that grow, that stay and that fall."""
    targets = torch.tensor([3, 4, 90, 95, *range(10, 26)])
    offsets = targets - torch.arange(20)
    assert {int(offset) for offset in offsets} >= {3, 88, 92, 6}
    model = draft(edits={"d2t": offsets})
    ids = torch.tensor([[0, 3, 2], [19, 4, 1]])
    assert model.target_ids(ids).tolist() == [[3, 95, 90], [25, 10, 4]]
    logits = torch.arange(40.0).view(2, 20) - 7
    full = model.target_logits(logits)
    assert full.shape == (2, 96)
    for row in range(2):
        kept = {token: float(value) for token, value in enumerate(full[row]) if value != -torch.inf}
        assert kept == {int(t): float(logits[row, j]) for j, t in enumerate(targets)}
    assert full.argmax(dim=-1).tolist() == model.target_ids(logits.argmax(dim=-1)).tolist() == [25, 25]
