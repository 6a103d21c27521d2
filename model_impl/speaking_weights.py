"""Random checkpoints that say something, drafts that guess it, and copies of checkpoints with a small fault.

A random model with tied embeddings says its last token again and again: nothing is closer to a token's vector
than that vector. Here the final norm's weights have random signs, so that the nearest token is another one,
which follows from the last one and, less strongly, from all before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.checkpoint import PREFIX
from model_impl.config import TextConfig
from model_impl.errors import CheckpointError
from model_impl.random_weights import write_checkpoint

_SHARPNESS = 2.0
"""Of the final norm: the likeliest token has a probability of about a third."""
_CONTEXT = 0.6
"""Of what layers add, so that the last token counts for more than all before it."""
_WEIGHTS = "model.safetensors"


def write_speaking(config: Mapping[str, Any], folder: Path, *, seed: int) -> None:
    """Write `config.json` and `model.safetensors` (float32).

    Args:
        config: As published; written as it is.
        folder: Must exist.
        seed: Decides the weights.

    Raises:
        ConfigError: as `model_impl.random_weights.write_checkpoint`.
    """
    write_checkpoint(config, folder, seed=seed)
    tensors = load_file(folder / _WEIGHTS)
    norm = f"{PREFIX}norm.weight"
    signs = torch.randint(0, 2, tensors[norm].shape, generator=torch.Generator().manual_seed(seed))
    tensors[norm] = tensors[norm] * (2 * signs - 1) * _SHARPNESS
    for name in tensors:
        if ".post_" in name and name.startswith(f"{PREFIX}layers.") and name.endswith("norm.weight"):
            tensors[name] *= _CONTEXT
    _save(tensors, folder)


def write_perturbed(source: Path, folder: Path, *, layer: int, part: float, seed: int) -> None:
    """Write a copy of a checkpoint in which one layer of the text model is slightly wrong.

    Args:
        source: The checkpoint, with one file of weights.
        folder: Must exist.
        layer: Which.
        part: Of a tensor's norm, what is added to each floating-point tensor of the layer.
        seed: Decides what is added.

    Raises:
        CheckpointError: the checkpoint has no such layer, or not one file of weights.
    """
    if not (source / _WEIGHTS).is_file():
        raise CheckpointError(f"{source}: has no {_WEIGHTS}; a checkpoint in parts cannot be perturbed")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / _WEIGHTS)
    prefix = f"{PREFIX}layers.{layer}."
    names = sorted(name for name in tensors if name.startswith(prefix) and tensors[name].is_floating_point())
    if not names:
        count = len(TextConfig.from_file(source / "config.json").layers)
        raise CheckpointError(f"{source}: there is no layer {layer} among {count}")
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        tensor = tensors[name].float()
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = (tensor + part * noise * tensor.norm() / noise.norm()).to(tensors[name].dtype)
    _save(tensors, folder)


def successors(target: Path) -> Tensor:
    """How likely each token follows another if nothing but the last one counts.

    Returns:
        Scores without a soft cap, float32 [last token, next token].
    """
    embedding, norm = embedding_and_norm(target)
    unit = embedding * embedding.pow(2).mean(dim=-1, keepdim=True).rsqrt()
    return (unit * norm) @ embedding.T


def embedding_and_norm(target: Path) -> tuple[Tensor, Tensor]:
    """A checkpoint's table and the weights of its final norm, float32 [vocabulary, H] and [H]."""
    tensors = load_file(target / _WEIGHTS)
    return tensors[f"{PREFIX}embed_tokens.weight"].float(), tensors[f"{PREFIX}norm.weight"].float()


def _save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    (folder / _WEIGHTS).unlink(missing_ok=True)  # a copy may be read-only
    save_file(dict(tensors), folder / _WEIGHTS, metadata={"format": "pt"})
