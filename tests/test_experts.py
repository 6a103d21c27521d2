"""Experts by their equations, token by token, however many of their rows run at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_impl.config import MoEConfig
from model_impl.layers import moe
from model_impl.layers.moe import Experts, Rows

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 8, 12, 6, 3, 40


@pytest.fixture(scope="module")
def experts() -> Experts:
    config = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, intermediate_size=INNER)
    made = Experts(HIDDEN, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [N, H], their experts and weights [N, K]; expert 5 is chosen by nobody."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, 5] = -1
    weights, chosen = scores.topk(TOP_K)
    return z, chosen, weights


def one_by_one(experts: Experts, z: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for token, own, parts in zip(z, chosen.tolist(), weights, strict=True):
        outputs = []
        for expert in own:
            gate, up = (experts.gate_up_proj[expert] @ token).split(INNER)
            outputs.append(experts.down_proj[expert] @ (F.gelu(gate, approximate="tanh") * up))
        rows.append(parts @ torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("rows", [1, 7, 30, 64, 10_000])
def test_any_number_of_rows_at_a_time_gives_the_same(
    experts: Experts, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    z, chosen, weights = drawn()
    whole = experts(z, chosen, weights)
    assert torch.allclose(whole, one_by_one(experts, z, chosen, weights), atol=1e-5)
    seen: list[Rows] = []

    def change(_name: str, _x: Tensor, y: Tensor, part: Rows) -> Tensor:
        seen.append(part)
        return y

    monkeypatch.setattr(moe, "_ROWS", rows)
    monkeypatch.setattr(experts, "change", change)
    assert torch.equal(experts(z, chosen, weights), whole)
    parts = seen[::2]
    assert [expert for part in parts for expert in part.hit] == [0, 1, 2, 3, 4, 6, 7]
    assert sum(len(part.tokens) for part in parts) == TOKENS * TOP_K
    for part in parts:
        assert part.total == TOKENS
        assert sum(part.counts) == len(part.tokens)
        assert len(part.tokens) <= rows or len(part.hit) == 1


def test_what_is_learned_does_not_hang_on_it(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    z, chosen, weights = drawn()
    gradients = []
    for rows in (10_000, 16):
        monkeypatch.setattr(moe, "_ROWS", rows)
        loss = experts(z, chosen, weights).square().sum()
        gradients.append(torch.autograd.grad(loss, list(experts.parameters())))
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, atol=1e-5)
