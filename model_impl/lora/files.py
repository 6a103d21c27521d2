"""Adapters beside checkpoints: writing a random one, and merging one into a copy of the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.checkpoint import PREFIX, weight_files
from model_impl.errors import CheckpointError, ConfigError
from model_impl.lora import adapter as reading
from model_impl.lora import config as configuring
from model_impl.lora.adapter import Adapter
from model_impl.lora.apply import check_head, merged_weights
from model_impl.lora.sites import HEAD, TEXT, Sites

_ALPHA = 2
"""alpha / r of random adapters: not one, so that leaving it out shows."""
_TOWERS = r".*(vision_tower|audio_tower)\..*"
"""Modules of these have the same names as those of the text model, in which alone random adapters act: PEFT
would wrap them too, and knows no linears that clip."""


def write_random_adapter(
    checkpoint: Path, folder: Path, *, seed: int, rank: int, scale: float, modules: Collection[str]
) -> None:
    """Write an adapter with random weights for a checkpoint.

    Args:
        checkpoint: Folder of the model.
        folder: Must exist.
        seed: Decides the weights.
        rank: r.
        scale: ||(alpha / r) B A|| relative to ||W||, in every module.
        modules: Ends of the names of the linear modules that are adapted, such as `q_proj`.

    Raises:
        ConfigError: one of `modules` is no module of the checkpoint.
        CheckpointError: the checkpoint has no weights.
    """
    sites = Sites.of_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    found = set()
    for name, weight in sorted(_weights(checkpoint)):
        module = name.removesuffix(".weight")
        site = sites.get(_site_name(module))
        if site is None or site.kind != "linear" or module.rpartition(".")[2] not in modules:
            continue
        found.add(module.rpartition(".")[2])
        rows, columns = weight.shape
        a = torch.randn(rank, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator)
        b *= scale * weight.float().norm() / (_ALPHA * (b @ a).norm())
        tensors[f"{reading.WRAPPED}{module}.lora_A.weight"] = a
        tensors[f"{reading.WRAPPED}{module}.lora_B.weight"] = b
    if found != set(modules):
        absent = ", ".join(sorted(set(modules) - found))
        raise ConfigError(f"{checkpoint}: there is no module {absent} that an adapter could be for")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _ALPHA * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "target_modules": sorted(modules),
        "exclude_modules": _TOWERS,
        "inference_mode": True,
    }
    (folder / configuring.FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / reading.FILE, metadata={"format": "pt"})


def merge_adapter(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Write a copy of a checkpoint, in float32, whose weights hold what an adapter adds to them.

    Args:
        checkpoint: Folder of the model.
        adapter: Folder of the adapter.
        folder: Must exist.

    Raises:
        ConfigError: as `AdapterConfig.from_folder` and `check_head`.
        CheckpointError: as `Adapter.load`, or the checkpoint has no such tensor.
    """
    sites = Sites.of_checkpoint(checkpoint)
    loaded = Adapter.load(adapter, sites)
    check_head(loaded, tied=sites.config.tie_word_embeddings)
    merged = {name: weight.float() for name, weight in _weights(checkpoint)}
    stored = {_site_name(name): name for name in merged}
    changed = merged_weights(loaded, lambda key: merged[stored[key]] if key in stored else torch.zeros(()))
    absent = sorted(key for key in changed if key not in stored)
    if absent:
        raise CheckpointError(f"{checkpoint}: there is no tensor {absent[0]}, which {adapter} changes")
    merged |= {stored[key]: weight.contiguous() for key, weight in changed.items()}
    for file in checkpoint.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, folder)
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})


def _site_name(stored: str) -> str:
    """The name of a site, or of a parameter, of a stored tensor's name."""
    if stored.startswith((PREFIX, HEAD)):
        return stored.removeprefix("model.")
    inner = stored.removeprefix("model.")
    return f"{TEXT}{inner}" if inner.startswith(_TEXT_PARTS) else inner


_TEXT_PARTS = ("layers.", "norm.", "embed_tokens", "per_layer_")
"""What tensors of a text model's own checkpoint begin with, behind `model.`."""


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(checkpoint):
        yield from load_file(file).items()
