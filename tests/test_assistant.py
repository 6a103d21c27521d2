"""The published draft models: one draft step, and the centroid head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from model_impl.checkpoint import assign_exactly
from model_impl.errors import CacheError
from model_impl.speculative.assistant import (
    Assistant,
    AssistantConfig,
    CentroidConfig,
    CentroidHead,
    TargetKV,
    kv_layers,
)
from tests.draft_models import (
    Inputs,
    Target,
    assistant_on_meta,
    attend,
    draft_inputs,
    heads,
    norm,
    random_weights,
    tiny_assistant,
    turn,
)
from tests.model_configs import (
    DENSE,
    E2B,
    FULL,
    SLIDING,
    WINDOW,
    attention_inputs,
    build,
    distance,
    random_ids,
)
from tests.text_rules import SAME, gelu64

ORDERED, PLAIN = tiny_assistant(ordered=True), tiny_assistant(ordered=False)
BOTH = pytest.mark.parametrize("config", [ORDERED, PLAIN], ids=["ordered", "plain"])


def drafter(
    config: Mapping[str, Any], *, attention: str | None = None, edits: Mapping[str, Tensor] | None = None
) -> Assistant:
    with torch.device("meta"):
        model = Assistant(AssistantConfig.from_dict(config), attention)
    assign_exactly(model, {**random_weights(model), **(edits or {})}, "the test")
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- a draft step


def naive(model: Assistant, step: Inputs, row: int, query: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The normed state, the full head's logits and the feedback of one query, vector by vector."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    embedding, hidden, positions, target = step
    z = w["pre_projection.weight"] @ torch.cat([embedding[row, query], hidden[row, query]]).double()
    for i, kind in enumerate((SLIDING, SLIDING, SLIDING, FULL)):
        part = {name.split(f"layers.{i}.")[1]: t for name, t in w.items() if f"layers.{i}." in name}
        d, theta, rotated = (16, 1e4, 1.0) if kind == SLIDING else (32, 1e6, 0.25)
        kv = target[kind]  # type: ignore[index]
        order = sorted((int(p), s) for s, p in enumerate(kv.positions[row]) if p >= 0)
        slots = [s for _, s in (order[-WINDOW:] if kind == SLIDING else order)]
        x = norm(z, part["input_layernorm.weight"])
        queries = heads(part["self_attn.q_proj.weight"] @ x, d)
        outputs = []
        for j, q in enumerate(queries):
            g = j * kv.k.shape[1] // len(queries)
            q = turn(norm(q, part["self_attn.q_norm.weight"]), int(positions[row, query]), theta, rotated)
            keys, values = ([t[row, g, s].double() for s in slots] for t in (kv.k, kv.v))
            outputs.append(attend(q, keys, values))
        a = part["self_attn.o_proj.weight"] @ torch.cat(outputs)
        z = z + norm(a, part["post_attention_layernorm.weight"])
        x = norm(z, part["pre_feedforward_layernorm.weight"])
        f = gelu64(part["mlp.gate_proj.weight"] @ x) * (part["mlp.up_proj.weight"] @ x)
        z = z + norm(part["mlp.down_proj.weight"] @ f, part["post_feedforward_layernorm.weight"])
        z = z * part["layer_scalar"]
    s = norm(z, w["model.norm.weight"])
    return s, w["model.embed_tokens.weight"] @ s, w["post_projection.weight"] @ s


def naive_centroids(model: Assistant, s: Tensor, full: Tensor) -> Tensor:
    """What the centroid head makes of the full head's logits."""
    head = model.masked_embedding
    scores = [float(centroid @ s) for centroid in head.centroids.weight.double()]
    size = len(full) // len(scores)
    chosen: list[int] = []
    for c in sorted(range(len(scores)), key=lambda c: -scores[c])[: head.config.top_k]:
        chosen += head.token_ordering[c * size : (c + 1) * size].tolist()
    lowest = min(float(full[token]) for token in chosen)
    return torch.tensor([float(full[t]) if t in chosen else lowest - 1 for t in range(len(full))])


@BOTH
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex"])
def test_a_draft_step_is_what_the_equations_say(config: dict[str, Any], attention: str) -> None:
    model = drafter(config, attention=attention)
    step = draft_inputs(config, [23, 5, WINDOW, WINDOW + 1])
    logits, feedback = model(*step)
    assert logits.shape == (4, 1, 96)
    assert feedback.shape == (4, 1, 48)
    for row in range(4):
        s, full, back = naive(model, step, row)
        expected = naive_centroids(model, s, full) if config is ORDERED else full
        assert distance(logits[row, 0], expected) < SAME
        assert distance(feedback[row, 0], back) < SAME


@BOTH
def test_queries_of_a_row_do_not_see_each_other(config: dict[str, Any]) -> None:
    model = drafter(config)
    step = draft_inputs(config, [14, 6], queries=3)
    logits, feedback = model(*step)
    for row in range(2):
        for query in range(3):
            s, full, back = naive(model, step, row, query)
            expected = naive_centroids(model, s, full) if config is ORDERED else full
            assert distance(logits[row, query], expected) < SAME
            assert distance(feedback[row, query], back) < SAME


@BOTH
def test_a_row_does_not_depend_on_the_others(config: dict[str, Any]) -> None:
    model = drafter(config)
    embedding, hidden, positions, target = draft_inputs(config, [23, 5])
    logits, feedback = model(embedding, hidden, positions, target)
    for row in (0, 1):
        own = {
            kind: TargetKV(*(t[row : row + 1] for t in (kv.k, kv.v, kv.positions)))
            for kind, kv in target.items()
        }
        alone = model(*(x[row : row + 1] for x in (embedding, hidden, positions)), own)
        assert distance(logits[row], alone[0][0]) < SAME
        assert distance(feedback[row], alone[1][0]) < SAME


@pytest.mark.parametrize(("target_config", "config"), [(E2B, ORDERED), (DENSE, PLAIN)], ids=["e2b", "dense"])
def test_a_round_of_drafts_on_a_real_target(target_config: dict[str, Any], config: dict[str, Any]) -> None:
    """Three steps with the target's own keys and values, each fed with the state of the one before."""
    target, model = build(target_config), drafter(config)
    ids = random_ids(2, 21)
    with attention_inputs() as seen:
        states = target(ids)
    held = torch.arange(21).expand(2, 21)
    kv: Target = {
        kind: TargetKV(*seen[source.index][1:], held) for kind, source in kv_layers(target.config).items()
    }
    token, hidden = target.logits(states[:, -1:]).argmax(dim=-1), states[:, -1:]
    expected_hidden = hidden
    for _ in range(3):
        embedding, position = target.embed_tokens(token), torch.full((2, 1), 21)
        logits, feedback = model(embedding, hidden, position, kv)
        backs = []
        for row in range(2):
            s, full, back = naive(model, (embedding, expected_hidden, position, kv), row)
            expected = naive_centroids(model, s, full) if config is ORDERED else full
            assert distance(logits[row, 0], expected) < SAME
            assert int(logits[row, 0].argmax()) == int(expected.argmax())
            backs.append(back)
        token, hidden, expected_hidden = logits.argmax(dim=-1), feedback, torch.stack(backs)[:, None]


def test_logits_are_not_capped() -> None:
    large = random_weights(assistant_on_meta(PLAIN))["model.embed_tokens.weight"] * 1000
    logits, _ = drafter(PLAIN, edits={"model.embed_tokens.weight": large})(*draft_inputs(PLAIN, [9]))
    assert logits.abs().max() > 100


def test_the_window_counts_from_the_newest_key_whatever_the_position() -> None:
    """Both engines' positions see the same keys."""
    model = drafter(PLAIN)
    embedding, hidden, positions, target = draft_inputs(PLAIN, [20])
    kv = target["sliding_attention"]
    for back, seen in ((WINDOW - 1, True), (WINDOW, False)):
        slot = int((kv.positions[0] == 19 - back).nonzero())
        moved = TargetKV(kv.k, kv.v.index_fill(2, torch.tensor([slot]), 9.0), kv.positions)
        for position in (positions, positions - 1):
            before = model(embedding, hidden, position, target)[0]
            after = model(embedding, hidden, position, {**target, "sliding_attention": moved})[0]
            assert torch.equal(before, after) is not seen


def test_keys_that_do_not_fit_are_refused() -> None:
    model = drafter(PLAIN)
    embedding, hidden, positions, target = draft_inputs(PLAIN, [20, 3])
    kv = target["full_attention"]
    with pytest.raises(CacheError, match="keys and values of full_attention layers are missing"):
        model(embedding, hidden, positions, {"sliding_attention": target["sliding_attention"]})
    wrong = {
        "heads": TargetKV(kv.k[:, :1], kv.v[:, :1], kv.positions),
        "width": TargetKV(kv.k[..., :16], kv.v[..., :16], kv.positions),
        "values": TargetKV(kv.k, kv.v[:, :, 1:], kv.positions),
        "positions": TargetKV(kv.k, kv.v, kv.positions[:, 1:]),
        "rows": TargetKV(kv.k[:1], kv.v[:1], kv.positions[:1]),
    }
    for made in wrong.values():
        with pytest.raises(CacheError, match=r"do not fit 2 rows of 2 heads of size 32; hand over those"):
            model(embedding, hidden, positions, {**target, "full_attention": made})
    empty = TargetKV(kv.k, kv.v, torch.stack([kv.positions[0], kv.positions[1] * 0 - 1]))
    with pytest.raises(CacheError, match="full_attention: a row has no key"):
        model(embedding, hidden, positions, {**target, "full_attention": empty})


# ----------------------------------------------------------------------------------------- the centroid head


def head(*, top_k: int, seed: int = 3) -> tuple[CentroidHead, Tensor]:
    """A head of 12 clusters of 8 tokens, and a table whose tokens lie near their cluster's centroid."""
    generator = torch.Generator().manual_seed(seed)
    made = CentroidHead(24, 96, CentroidConfig(12, top_k)).requires_grad_(False)
    made.centroids.weight.copy_(torch.randn(12, 24, generator=generator))
    made.token_ordering.copy_(torch.randperm(96, generator=generator))
    table = torch.empty(96, 24)
    for slot, token in enumerate(made.token_ordering.tolist()):
        table[token] = made.centroids.weight[slot // 8] + 0.2 * torch.randn(24, generator=generator)
    return made, table


def test_greedy_tokens_equal_the_full_head_s_where_their_cluster_is_chosen() -> None:
    made, table = head(top_k=2)
    states = torch.randn(40, 5, 24, generator=torch.Generator().manual_seed(4))
    full = (states @ table.T).argmax(dim=-1)
    cluster_of = made.token_ordering.argsort() // 8
    chosen = made.centroids(states).topk(2, dim=-1).indices
    inside = (chosen == cluster_of[full][..., None]).any(dim=-1)
    assert 0.5 < float(inside.double().mean()) < 1
    assert torch.equal((made(states, table).argmax(dim=-1) == full), inside)


def test_all_clusters_make_the_full_head() -> None:
    made, table = head(top_k=12)
    states = torch.randn(7, 24, generator=torch.Generator().manual_seed(4))
    assert distance(made(states, table), states @ table.T) < SAME


def test_tokens_of_other_clusters_get_the_row_s_lowest_score_minus_one() -> None:
    made, table = head(top_k=3)
    states = (
        torch.randn(6, 1, 24, generator=torch.Generator().manual_seed(4)) * torch.arange(1, 7)[:, None, None]
    )
    for logits, state in zip(made(states, table)[:, 0], states[:, 0], strict=True):
        clusters = made.centroids(state).topk(3).indices.tolist()
        scored = [t for c in clusters for t in made.token_ordering[8 * c : 8 * c + 8].tolist()]
        rest = sorted(set(range(96)) - set(scored))
        assert len(rest) == 72
        assert logits[rest].unique().tolist() == [float(logits[scored].min() - 1)]
        assert distance(logits[scored], table[scored] @ state) < SAME
