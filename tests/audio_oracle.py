"""Asks transformers, in its own environment, about sounds; and the sounds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.targets import environments, registry

TRANSFORMERS = "transformers@5.19.0"
SCRIPT = Path(__file__).with_name("audio_in_transformers.py")


def ask(
    folder: Path, request: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run the tasks of a request in one process: task to answer, and tensors by name."""
    if reason := registry.unavailable(TRANSFORMERS):
        pytest.skip(reason)
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "input.safetensors")
    done = subprocess.run(
        [environments.status(TRANSFORMERS).python, SCRIPT, folder],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answers, load_file(folder / "output.safetensors")


def noise(samples: int, seed: int = 0, level: float = 0.3) -> Tensor:
    """Noise that swells and fades, so that no two stretches of it are alike."""
    generator = torch.Generator().manual_seed(1000 * seed + samples)
    swell = torch.linspace(0, 9, samples).sin()
    return level * swell * torch.randn(samples, generator=generator)


def tone(samples: int, hertz: float, level: float = 0.9) -> Tensor:
    """A sine."""
    return level * torch.sin(2 * torch.pi * hertz / 16_000 * torch.arange(samples))
