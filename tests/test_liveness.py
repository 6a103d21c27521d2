"""Every tensor of a checkpoint matters, except those that no computation reads; these matter not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.checkpoint import PREFIX, is_dead, load_text_model
from model_impl.config import TextConfig
from model_impl.random_weights import write_checkpoint
from model_impl.text import TextModel
from tests.model_configs import E2B, TINY, build, jittered, random_ids, tensors

BOUND = 1e-3
IDS = random_ids(2, 40)
"""Long enough for every expert of every layer to get tokens, and for windows to matter."""


def logits(model: TextModel) -> Tensor:
    return model.logits(model(IDS)).double()


def live(kind: str) -> list[str]:
    config = TextConfig.from_dict(TINY[kind])
    return [name for name in tensors(TINY[kind]) if not is_dead(name, config)]


def changed(name: str, tensor: Tensor, last_layer: int) -> Tensor:
    """The tensor with ten percent of change.

    Noise where the tensor has several elements: a pure factor on, say, a key projection is normed away. The
    last layer's scalar is a pure factor in front of the final norm; only its sign reaches the logits.
    """
    if name == f"layers.{last_layer}.layer_scalar":
        return -tensor
    return tensor * 1.1 if tensor.numel() == 1 else jittered(tensor, name)


@pytest.mark.parametrize("kind", TINY)
def test_every_live_tensor_moves_the_logits(kind: str) -> None:
    config = TINY[kind]
    model = build(config)
    before = logits(model)
    state = model.state_dict()
    assert sorted(state) == sorted(live(kind))
    moved = {}
    for name, tensor in state.items():
        kept = tensor.clone()
        tensor.copy_(changed(name, kept, len(model.layers) - 1))
        moved[name] = float((logits(model) - before).norm() / before.norm())
        tensor.copy_(kept)
    assert torch.equal(logits(model), before)
    assert {name: part for name, part in moved.items() if not part >= BOUND} == {}


@pytest.mark.parametrize("kind", TINY)
def test_the_last_scalar_s_size_is_normed_away(kind: str) -> None:
    """The reason for the exception in `changed`: a live tensor whose size hardly shows."""
    name = f"layers.{TINY[kind]['num_hidden_layers'] - 1}.layer_scalar"
    before = logits(build(TINY[kind]))
    after = logits(build(TINY[kind], edits={name: tensors(TINY[kind])[name] * 1.1}))
    assert float((after - before).norm() / before.norm()) < 1e-4


def test_dead_tensors_move_nothing(tmp_path: Path) -> None:
    write_checkpoint(E2B, tmp_path, seed=7)
    before = logits(load_text_model(tmp_path))
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    config = TextConfig.from_dict(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    dead = [name for name in stored if is_dead(name.removeprefix(PREFIX), config)]
    assert len(dead) == 5 * 3
    for name in dead:
        stored[name] = torch.full_like(stored[name], torch.nan)
    save_file(stored, file)
    assert torch.equal(logits(load_text_model(tmp_path)), before)
    for name in dead:
        del stored[name]
    save_file(stored, file)
    assert torch.equal(logits(load_text_model(tmp_path)), before)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_without_sharing_nothing_is_dead(kind: str) -> None:
    assert live(kind) == list(tensors(TINY[kind]))


def test_liveness_sees_a_tensor_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that drops its per-layer scalars, as engines have done, fails the test above."""
    layer = type(build(E2B).layers[0])
    forward = layer.forward

    def without_scalar(self: torch.nn.Module, *args: object) -> object:
        scalar, self.layer_scalar = self.layer_scalar, torch.ones(1)
        try:
            return forward(self, *args)
        finally:
            self.layer_scalar = scalar

    monkeypatch.setattr(layer, "forward", without_scalar)
    with pytest.raises(AssertionError, match=r"layers\.0\.layer_scalar"):
        test_every_live_tensor_moves_the_logits("e2b")
