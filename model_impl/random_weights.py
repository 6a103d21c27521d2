"""Seeded random checkpoints for tests: real names and shapes, every buffer off neutral.

Randomly initialised models usually keep norms, scalars and expert scales at one, and a model with such
buffers cannot tell an implementation that applies them from one that does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_impl.checkpoint import PREFIX
from model_impl.config import TextConfig
from model_impl.text import TextModel

_RANGES = {
    "q_norm.weight": (0.3, 0.7),
    "k_norm.weight": (0.3, 0.7),
    "post_attention_layernorm.weight": (0.2, 0.5),
    "post_feedforward_layernorm.weight": (0.2, 0.5),
    "post_per_layer_input_norm.weight": (0.2, 0.5),
    "layer_scalar": (0.7, 0.95),
    "per_expert_scale": (0.5, 1.6),
    "router.scale": (0.5, 2.0),
    "norm": (0.5, 1.7),
}
"""Uniform ranges by the end of a name, or for every other norm.

What makes a random stack blow up rounding is kept low, so that float32 decides: query and key norms, as there
is no 1/sqrt(d) and higher ones make attention sharp; what a layer adds; and what it takes from the stream."""


def write_checkpoint(config: Mapping[str, Any], folder: Path, *, seed: int) -> None:
    """Write `config.json` and `model.safetensors` (float32).

    Args:
        config: As published; written as it is.
        folder: Must exist.
        seed: Together with a tensor's name it decides the tensor.

    Raises:
        ConfigError: as `TextConfig.from_dict`.
    """
    tensors = {
        PREFIX + name: _tensor(name, shape, seed) for name, shape in shapes(TextConfig.from_dict(config))
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def shapes(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, dead ones of shared layers included."""
    with torch.device("meta"):
        model = TextModel(config)
    for name, tensor in model.state_dict().items():
        yield name, tuple(tensor.shape)
    for layer in config.layers:
        if layer.shares_kv:
            source = f"layers.{layer.kv_source}.self_attn."
            for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
                if source + name in model.state_dict():
                    shape = tuple(model.state_dict()[source + name].shape)
                    yield f"layers.{layer.index}.self_attn.{name}", shape


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    for part, (low, high) in _RANGES.items():
        if name.endswith(part) or (part == "norm" and "norm" in name):
            return torch.empty(shape).uniform_(low, high, generator=generator)
    # An embedding's lookup multiplies by the root of the width, so that every stream starts at variance one.
    return torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
