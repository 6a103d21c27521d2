"""Asks transformers, in its own environment, and compares what it says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.targets import environments, registry

TRANSFORMERS = "transformers@5.19.0"
_SCRIPTS = Path(__file__).parent


def ask(
    factory: pytest.TempPathFactory,
    script: str,
    name: str,
    request: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
    processors: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run the tasks of a request in one process, once for all workers of a test session.

    Args:
        factory: pytest's.
        script: Beginning of the name of the module beside this one that runs there: `vision`, `audio`, ...
        name: Of the request, unique in the session.
        request: Task to its arguments.
        tensors: What the tasks read.
        files: Images that the request names.
        processors: Whether torchvision and Pillow are needed too.

    Returns:
        Task to answer, and tensors by name.
    """
    if reason := registry.unavailable(TRANSFORMERS):
        pytest.skip(reason)
    status = environments.status(TRANSFORMERS)
    if processors and status.lacking:
        pytest.skip("; ".join(status.lacking.values()))
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"transformers-{script}-{name}"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            for file, data in (files or {}).items():
                (folder / file).write_bytes(data)
            (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
            given = {key: tensor.contiguous() for key, tensor in (tensors or {}).items()}
            save_file(given, folder / "input.safetensors")
            _run(script, folder, status)
            (folder / "done").touch()
    answers = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answers, load_file(folder / "output.safetensors")


def _run(script: str, folder: Path, status: environments.EnvironmentStatus) -> None:
    path = [*map(str, status.import_paths), str(_SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [status.python, _SCRIPTS / f"{script}_in_transformers.py", folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def assert_parity(got: Tensor, expected: Tensor) -> None:
    """The parity measure of the text model: 1e-5 in the norm, 1e-4 of the largest at any place."""
    assert got.shape == expected.shape
    assert torch.isfinite(expected).all()
    difference, scale = (got - expected).double(), expected.double()
    assert difference.norm() <= 1e-5 * scale.norm()
    assert difference.abs().max() <= 1e-4 * scale.abs().max()


def noise(samples: int, seed: int = 0, level: float = 0.3) -> Tensor:
    """Noise that swells and fades, so that no two stretches of it are alike."""
    generator = torch.Generator().manual_seed(1000 * seed + samples)
    swell = torch.linspace(0, 9, samples).sin()
    return level * swell * torch.randn(samples, generator=generator)


def tone(samples: int, hertz: float, level: float = 0.9) -> Tensor:
    """A sine."""
    return level * torch.sin(2 * torch.pi * hertz / 16_000 * torch.arange(samples))
