"""The bundled text model, for the reference target, for making tiny checkpoints, and as an oracle.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from conformance import shares
from conformance.errors import EngineError
from conformance.targets import reference_forward, reference_stages
from conformance.targets.protocol import (
    ForwardRequest,
    ForwardResult,
)
from conformance.targets.stages import StagesRequest, StagesResult
from model_impl import lora, random_weights, speaking_weights
from model_impl.config import TextConfig
from model_impl.errors import ModelError
from model_impl.speculative import guessing


def write_checkpoint(config: dict[str, Any], folder: Path, *, seed: int) -> None:
    """Write `config.json` and seeded `model.safetensors` under the published names.

    Raises:
        EngineError: the configuration is none of a Gemma 4 text model.
    """
    try:
        random_weights.write_checkpoint(config, folder, seed=seed)
    except ModelError as error:
        raise EngineError(f"{type(error).__name__}: {error}", traceback=traceback.format_exc()) from error


def forward(request: ForwardRequest) -> ForwardResult:
    """Answer a `ForwardRequest`; see `reference_forward.forward`.

    Raises:
        EngineError: the model refuses the request, or a computation in it fails.
    """
    with engine():
        return reference_forward.forward(request)


def stages(request: StagesRequest) -> StagesResult:
    """Answer a `StagesRequest`; see `reference_stages.stages`.

    Raises:
        EngineError: the model refuses the request, or a computation in it fails.
    """
    with engine():
        return reference_stages.stages(request)


def write_adapter(checkpoint: Path, folder: Path, **options: Any) -> None:
    """Write a random LoRA adapter; see `model_impl.lora.write_random_adapter`.

    Raises:
        EngineError: it does not fit the checkpoint.
    """
    with engine():
        lora.write_random_adapter(checkpoint, folder, **options)


def merge_adapter(checkpoint: Path, adapter: Path, folder: Path) -> None:
    """Write the checkpoint that an adapter makes of another; see `model_impl.lora.merge_adapter`.

    Raises:
        EngineError: the two do not fit together.
    """
    with engine():
        lora.merge_adapter(checkpoint, adapter, folder)


def write_draft(checkpoint: Path, folder: Path, *, seed: int, layers: Sequence[int]) -> None:
    """Write a random Eagle3 head; see `model_impl.random_weights.write_eagle3`.

    Raises:
        EngineError: it does not fit the checkpoint.
    """
    with engine():
        config = TextConfig.from_file(checkpoint / "config.json")
        random_weights.write_eagle3(config, folder, seed=seed, layers=layers)


def write_speaking(config: dict[str, Any], folder: Path, *, seed: int) -> None:
    """Write a random checkpoint that says something; see `model_impl.speaking_weights.write_speaking`.

    Raises:
        EngineError: the configuration is none of a Gemma 4 text model.
    """
    with engine():
        speaking_weights.write_speaking(config, folder, seed=seed)


def write_perturbed(checkpoint: Path, folder: Path, *, part: float) -> None:
    """Write a copy of which the layer in the middle is wrong; see `speaking_weights.write_perturbed`.

    Raises:
        EngineError: the checkpoint cannot be perturbed.
    """
    with engine():
        layers = len(TextConfig.from_file(checkpoint / "config.json").layers)
        speaking_weights.write_perturbed(checkpoint, folder, layer=layers // 2, part=part, seed=0)


def write_speaking_draft(
    checkpoint: Path, folder: Path, kind: str, *, guesses: bool, seed: int, layers: Sequence[int]
) -> None:
    """Write a draft for a checkpoint; see `model_impl.speculative.guessing`.

    Raises:
        EngineError: it does not fit the checkpoint.
    """
    with engine():
        if kind == "eagle3":
            guessing.write_eagle3(checkpoint, folder, guesses=guesses, seed=seed, layers=layers)
        else:
            guessing.write_assistant(checkpoint, folder, guesses=guesses, seed=seed)


@contextlib.contextmanager
def engine(own_threads: int | None = None) -> Iterator[None]:
    """What runs here is an engine: its exceptions are its answers, and it has one thread.

    As in a worker: small models wait for threads more than they gain, and sums keep their order.

    Args:
        own_threads: How many it has if more are asked for; else `CONFORMANCE_THREADS` says. Trials vary it.
    """
    threads = torch.get_num_threads()
    usual = os.environ.get(shares.THREADS, "1")
    torch.set_num_threads(own_threads or (int(usual) if usual.isdecimal() and int(usual) else 1))
    try:
        yield
    except (ModelError, RuntimeError, ValueError) as error:
        raise EngineError(f"{type(error).__name__}: {error}", traceback=traceback.format_exc()) from error
    finally:
        torch.set_num_threads(threads)
