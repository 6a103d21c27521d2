"""The parity suites' checkpoints are alive: every tensor reaches the logits, except those that nothing reads.

A suite says something about a tensor only if the tensor's value shows in what is compared. So each pair of
configuration and seed that cases of the committed suites use is tried with the rows of those cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conformance.loading import load_suites, resolve_rows
from conformance.suites import ParitySuite
from model_impl.checkpoint import PREFIX, is_dead, load_text_model
from model_impl.config import TextConfig
from model_impl.random_weights import write_checkpoint
from model_impl.text import TextModel
from tests.model_configs import jittered

BOUND = 1e-3
Rows = tuple[tuple[int, ...], ...]


@dataclass
class Checkpoint:
    """Weights of the suites."""

    config: dict[str, Any]
    seed: int
    rows: list[Rows]
    """Of each case that runs them, in the suite's order."""


def checkpoints() -> dict[str, Checkpoint]:
    """By suite, configuration and seed."""
    found: dict[str, Checkpoint] = {}
    for suite in (loaded.suite for loaded in load_suites()):
        if not isinstance(suite, ParitySuite) or suite.area != "text-model":
            continue
        for case in suite.cases:
            name = f"{suite.id.removeprefix('parity/')}-{case.config}-{case.weights}"
            made = found.setdefault(name, Checkpoint(suite.configs[case.config], case.weights, []))
            rows = resolve_rows(case.rows, suite.configs[case.config])
            if rows not in made.rows:
                made.rows.append(rows)
    return found


CHECKPOINTS = checkpoints()


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return CHECKPOINTS[request.param]


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    write_checkpoint(checkpoint.config, tmp_path, seed=checkpoint.seed)
    return tmp_path


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def logits(model: TextModel, rows: Rows) -> Tensor:
    """Of every token, in float64."""
    lengths = [len(row) for row in rows]
    ids = torch.tensor([[*row, *[0] * (max(lengths) - len(row))] for row in rows])
    found = model.logits(model(ids, lengths=lengths)).double()
    return torch.cat([row[:length] for row, length in zip(found, lengths, strict=True)])


def moved(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def changed(name: str, tensor: Tensor, last_layer: int) -> Tensor:
    """The tensor with ten percent of change.

    Noise where the tensor has several elements: a pure factor on, say, a key projection is normed away. The
    last layer's scalar is a pure factor in front of the final norm; only its sign reaches the logits.
    """
    if name == f"layers.{last_layer}.layer_scalar":
        return -tensor
    return tensor * 1.1 if tensor.numel() == 1 else jittered(tensor, name)


def too_still(model: TextModel, cases: list[Rows]) -> dict[str, float]:
    """The tensors that move the logits of no case by the bound, with the most that they do move them."""
    before = [logits(model, rows) for rows in cases]
    still = {}
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor.copy_(changed(name, kept, len(model.layers) - 1))
        most = 0.0
        for rows, clean in zip(cases, before, strict=True):
            most = max(most, moved(logits(model, rows), clean))
            if most >= BOUND:
                break
        else:
            still[name] = most
        tensor.copy_(kept)
    assert torch.equal(logits(model, cases[0]), before[0])
    return still


def test_every_live_tensor_moves_the_logits(checkpoint: Checkpoint, folder: Path) -> None:
    model = load_text_model(folder)
    stored = {name.removeprefix(PREFIX) for name in load_file(folder / "model.safetensors")}
    assert set(model.state_dict()) == {name for name in stored if not is_dead(name, model.config)}
    assert too_still(model, checkpoint.rows) == {}


def test_dead_tensors_move_nothing(checkpoint: Checkpoint, folder: Path) -> None:
    config = checkpoint.config
    before = logits(load_text_model(folder), checkpoint.rows[0])
    file = folder / "model.safetensors"
    stored = load_file(file)
    dead = [name for name in stored if is_dead(name.removeprefix(PREFIX), TextConfig.from_dict(config))]
    sharing = config["layer_types"][len(config["layer_types"]) - (config.get("num_kv_shared_layers") or 0) :]
    lack_values = bool(config.get("attention_k_eq_v")) * sharing.count("full_attention")
    assert len(dead) == 3 * len(sharing) - lack_values
    for name in dead:
        stored[name] = torch.full_like(stored[name], torch.nan)
    save_file(stored, file)
    assert torch.equal(logits(load_text_model(folder), checkpoint.rows[0]), before)
    for name in dead:
        del stored[name]
    save_file(stored, file)
    assert torch.equal(logits(load_text_model(folder), checkpoint.rows[0]), before)


def test_the_last_scalar_s_size_is_normed_away(checkpoint: Checkpoint, folder: Path) -> None:
    """The reason for the exception in `changed`: a live tensor whose size hardly shows."""
    model = load_text_model(folder)
    before = logits(model, checkpoint.rows[0])
    model.layers[-1].layer_scalar *= 1.1
    assert moved(logits(model, checkpoint.rows[0]), before) < 1e-4


def test_every_expert_gets_tokens(tmp_path: Path) -> None:
    """The experts of a layer are one tensor, which moves the logits even if some of them never run.

    Of each configuration one checkpoint must run all; the others may be there to leave some idle.
    """
    idle: dict[str, dict[str, set[int]]] = {}
    for name, made in CHECKPOINTS.items():
        if made.config.get("enable_moe_block"):
            write_checkpoint(made.config, tmp_path, seed=made.seed)
            missed = idle_experts(load_text_model(tmp_path), made.rows)
            config = name.rpartition("-")[0]
            idle[config] = missed if config not in idle or not missed else idle[config]
    assert idle
    assert {config: missed for config, missed in idle.items() if missed} == {}


def idle_experts(model: TextModel, cases: list[Rows]) -> dict[str, set[int]]:
    """By router, the experts that no token of any case goes to."""
    experts = set(range(model.config.moe.num_experts)) if model.config.moe else set()
    routers = {name: module for name, module in model.named_modules() if name.endswith(".router")}
    left = {name: set(experts) for name in routers}

    def watch(name: str) -> Callable[[nn.Module, object, tuple[Tensor, Tensor, Tensor]], None]:
        return lambda _router, _inputs, output: left[name].difference_update(output[2].flatten().tolist())

    for name, router in routers.items():
        router.register_forward_hook(watch(name))
    for row in (row for rows in cases for row in rows):  # alone, so that no padding is counted
        logits(model, (row,))
    return {name: missed for name, missed in left.items() if missed}


def test_suites_cover_experts_and_sharing() -> None:
    configs = [checkpoint.config for checkpoint in CHECKPOINTS.values()]
    assert len(CHECKPOINTS) >= 6
    assert any(config.get("enable_moe_block") for config in configs)
    assert any(config.get("num_kv_shared_layers") for config in configs)


def test_liveness_sees_a_tensor_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that drops its per-layer scalars, as engines have done, is found out."""
    checkpoint = next(made for made in CHECKPOINTS.values() if made.config.get("num_kv_shared_layers"))
    write_checkpoint(checkpoint.config, tmp_path, seed=checkpoint.seed)
    model = load_text_model(tmp_path)
    layer = type(model.layers[0])
    forward = layer.forward

    def without_scalar(self: nn.Module, *args: object) -> object:
        scalar, self.layer_scalar = self.layer_scalar, torch.ones(1)
        try:
            return forward(self, *args)
        finally:
            self.layer_scalar = scalar

    monkeypatch.setattr(layer, "forward", without_scalar)
    still = too_still(model, checkpoint.rows[:1])
    assert still == {f"layers.{index}.layer_scalar": 0.0 for index in range(len(model.layers))}
