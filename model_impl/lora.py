"""LoRA adapters in PEFT's form: W + (alpha / r) B A in the place of W (Hu et al. 2021, equation 3)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.checkpoint import weight_files
from model_impl.errors import CheckpointError, ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_WRAPPED = "base_model.model."
"""What PEFT puts before the name that a module has in the model it was trained on."""
_ALPHA = 2
"""alpha / r of random adapters: not one, so that leaving it out shows."""


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
        modules: Ends of the names of the modules that are adapted, such as `q_proj`.

    Raises:
        ConfigError: one of `modules` is no module of the checkpoint.
        CheckpointError: the checkpoint has no weights.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    found = set()
    for name, weight in sorted(_weights(checkpoint)):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        found.add(module.rpartition(".")[2])
        rows, columns = weight.shape
        a = torch.randn(rank, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator)
        b *= scale * weight.float().norm() / (_ALPHA * (b @ a).norm())
        tensors[f"{_WRAPPED}{module}.lora_A.weight"] = a
        tensors[f"{_WRAPPED}{module}.lora_B.weight"] = b
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
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def merge_adapter(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Write a copy of a checkpoint, in float32, whose weights hold what an adapter adds to them.

    Args:
        checkpoint: Folder of the model.
        adapter: Folder of the adapter.
        folder: Must exist.

    Raises:
        ConfigError: the adapter's configuration cannot be read, or asks for more than LoRA.
        CheckpointError: tensors of the adapter are missing, or are for no module of the checkpoint.
    """
    factor = _factor(adapter)
    parts = load_file(adapter / WEIGHTS)
    merged = {name: weight.float() for name, weight in _weights(checkpoint)}
    for module in sorted({key.removeprefix(_WRAPPED).rpartition(".lora_")[0] for key in parts}):
        pair = [parts.get(f"{_WRAPPED}{module}.lora_{part}.weight") for part in "AB"]
        name = f"{module}.weight"
        if name not in merged or pair[0] is None or pair[1] is None:
            raise CheckpointError(
                f"{adapter}: expected lora_A and lora_B for modules of {checkpoint}, and {module!r} has "
                "only one of them, or is none of its modules"
            )
        merged[name] = merged[name] + factor * (pair[1].float() @ pair[0].float())
    for file in checkpoint.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy(file, folder)
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})


def _factor(adapter: Path) -> float:
    path = adapter / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected JSON with `r` and `lora_alpha`: {error}") from error
    for key in ("use_dora", "use_rslora"):
        if config.get(key):
            raise ConfigError(f"{path}: {key} is set; only plain LoRA can be merged here")
    return alpha / rank


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(checkpoint):
        yield from load_file(file).items()
