"""Small text configurations with published keys, and seeded models of them with every buffer off neutral."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model_impl.checkpoint import PREFIX, assign
from model_impl.config import TextConfig
from model_impl.layers import backends
from model_impl.layers.backends import Mask
from model_impl.random_weights import write_checkpoint
from model_impl.text import TextModel

# Threads that wait for each other cost these small tensors a hundredfold when several test processes run.
torch.set_num_threads(1)

SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = 8

_COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
}

E2B: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 10,
    "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 5,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 96,
}
"""Per-layer embeddings; layers 5 to 9 share the keys and values of 3 and 4, and have MLPs of double width."""

DENSE: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, SLIDING, FULL] * 2,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}
"""As 31B: keys are values in full layers, which have fewer key-value heads."""

MOE: dict[str, Any] = {
    **DENSE,
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 20,
}
"""As 26B-A4B: experts beside the dense MLP."""

TINY = {"e2b": E2B, "dense": DENSE, "moe": MOE}


def tensors(config: Mapping[str, Any], seed: int = 7) -> dict[str, Tensor]:
    """A fresh copy of a random checkpoint's tensors, by name without prefix; dead ones included."""
    return {name: tensor.clone() for name, tensor in _written(json.dumps(config), seed).items()}


@functools.cache
def _written(config: str, seed: int) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(json.loads(config), Path(folder), seed=seed)
        loaded = load_file(Path(folder) / "model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in loaded.items()}


def build(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    edits: Mapping[str, Tensor] | None = None,
) -> TextModel:
    """A model with random weights; `edits` replace tensors by name."""
    with torch.device("meta"):
        model = TextModel(TextConfig.from_dict(config), attention)
    weights = {**tensors(config), **(edits or {})}
    assign(model, {name: tensor.to(dtype) for name, tensor in weights.items()}, "the test")
    return model.eval().requires_grad_(False)


def random_ids(rows: int, width: int, seed: int = 3) -> Tensor:
    """Token ids [rows, width] of the small vocabulary."""
    return torch.randint(
        0, _COMMON["vocab_size"], (rows, width), generator=torch.Generator().manual_seed(seed)
    )


def jittered(tensor: Tensor, name: str, part: float = 0.1) -> Tensor:
    """Relative noise of size `part` on every element, none left as it was; seeded by the name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5 + 0.5
    sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return tensor * (1 + part * noise * sign)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest element of `b`."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


class Taps:
    """Inputs and outputs of a model's modules, by name, from its latest pass."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, Any] = {}

    def input(self, name: str) -> Tensor:
        """First argument of a module."""
        tensor = self.inputs[name][0]
        assert isinstance(tensor, Tensor)
        return tensor

    def output(self, name: str) -> Tensor:
        """What a module returned."""
        tensor = self.outputs[name]
        assert isinstance(tensor, Tensor)
        return tensor


@contextmanager
def tapped(model: nn.Module) -> Iterator[Taps]:
    """Record every module's inputs and output."""
    taps = Taps()

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            taps.inputs[name], taps.outputs[name] = inputs, output

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_inputs(*, compute: bool = True) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Record q, k and v of every call of a backend; a pass calls it once per layer, in order.

    Args:
        compute: Call the backend; else let attention return zeros, for long inputs.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def spying(attend: backends.Attend) -> backends.Attend:
        def spy(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
            seen.append((q, k, v))
            return attend(q, k, v, mask) if compute else torch.zeros_like(q)

        return spy

    with mock.patch.dict(backends.BACKENDS, {name: spying(f) for name, f in backends.BACKENDS.items()}):
        yield seen
