"""Hidden states for a draft: which, how many, and refusals."""

from __future__ import annotations

import pytest
import torch

from model_impl.errors import ModelError
from model_impl.text import TextModel
from tests.model_configs import DENSE, E2B, build


@pytest.mark.parametrize("raw", [E2B, DENSE], ids=["e2b", "dense"])
def test_states_are_the_residual_stream_after_so_many_layers(raw: dict[str, object]) -> None:
    model = build(raw)
    ids = torch.tensor([[2, 5, 7, 11, 13]])
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _module, _args, out, at=index + 1: seen.update({at: out}))
    last = len(model.layers)
    with torch.inference_mode():
        states = model.states(ids, aux_layers=(0, 2, last))
        assert torch.equal(states.aux[0], model.embed_tokens(ids))
        assert torch.equal(states.aux[1], seen[2])
        assert torch.equal(states.hidden, model.norm(states.aux[2]))
        assert torch.equal(model(ids), states.hidden)


@pytest.mark.parametrize("asked", [(), (3,), (1, 2)], ids=len)
def test_as_many_come_as_were_asked_for_always_in_a_tuple(asked: tuple[int, ...]) -> None:
    model: TextModel = build(DENSE)
    aux = model.states(torch.tensor([[2, 3]]), aux_layers=asked).aux
    assert isinstance(aux, tuple)
    assert len(aux) == len(asked)


@pytest.mark.parametrize("asked", [(1, 1), (2, 1), (-1,), (7,)], ids=str)
def test_states_that_a_model_cannot_give_are_refused(asked: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="distinct, ascending numbers from 0 to 6"):
        build(DENSE).states(torch.tensor([[2, 3]]), aux_layers=asked)
