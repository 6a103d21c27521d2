"""Adapters for tests: written by hand in PEFT's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WRAPPED = "base_model.model."


def pair(name: str, rows: int, columns: int, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Both halves for one module, named as in the model it was trained on."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return {
        f"{WRAPPED}{name}.lora_A.weight": torch.randn(rank, columns, generator=generator) * columns**-0.5,
        f"{WRAPPED}{name}.lora_B.weight": torch.randn(rows, rank, generator=generator) * 0.3,
    }


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter's folder; `config` is added to a rank of 2 and an alpha of 6."""
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
