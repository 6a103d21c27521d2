"""Loading published checkpoints (fact sheet, section 5).

Parameters carry the published names, so that loading is the identity. Nothing is loaded by guess: a
tensor that the model needs and the checkpoint lacks, or that the checkpoint has and the model does not
know, is an error. Of the tensors that shared layers ship without using, the rule is in `is_dead`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model_impl.config import TextConfig
from model_impl.errors import CheckpointError
from model_impl.text import TextModel

PREFIX = "model.language_model."
"""Of the text decoder's tensors in a published checkpoint."""
_TEXT_ONLY_PREFIX = "model."
_OTHER_PARTS = (
    "model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.",
    "model.vision_embedder.",
)  # fmt: skip
_DEAD = re.compile(r"layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm)\.weight")
_LISTED = 8


def load_text_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> TextModel:
    """Build the text decoder of a checkpoint folder and load its weights.

    Args:
        folder: Holds `config.json`, and one or several safetensors files.
        dtype: Of parameters and of the computation.
        attention: Backend of all layers; left out, the first that can serve them.

    Raises:
        BackendError: the backend asked for cannot serve the model.
        ConfigError: as `TextConfig.from_file`.
        CheckpointError: no weights, a broken file, or tensors that do not fit.
    """
    config = TextConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = TextModel(config, attention)
    tensors = _text_tensors(folder, dtype)
    assign(model, tensors, str(folder))
    return model.eval().requires_grad_(False)


def assign(model: TextModel, tensors: Mapping[str, Tensor], where: str) -> None:
    """Make `tensors` the model's parameters and buffers, without copying.

    Args:
        model: May be on the meta device.
        tensors: By name, without prefix.
        where: For errors.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    unknown = sorted(name for name in set(tensors) - set(wanted) if not is_dead(name, model.config))
    shapes = sorted(
        f"{name} is {list(tensors[name].shape)}, the configuration asks for {list(wanted[name].shape)}"
        for name in set(wanted) & set(tensors)
        if tensors[name].shape != wanted[name].shape
    )
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for what, found in (("missing", missing), ("unused", unknown), ("misshapen", shapes))
        if found
    ]
    if problems:
        raise CheckpointError(f"{where}: tensors do not fit config.json: {'; '.join(problems)}")
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=True, assign=True)


def is_dead(name: str, config: TextConfig) -> bool:
    """Whether a tensor is a shared layer's own key or value tensor, which no computation reads."""
    match = _DEAD.fullmatch(name)
    return match is not None and int(match[1]) < len(config.layers) and config.layers[int(match[1])].shares_kv


def parameter_count(model: nn.Module) -> int:
    """Number of trained scalars, buffers left out; works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def _text_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The text decoder's tensors, by name without prefix."""
    files = _files(folder)
    names = [name for file in files for name in _names(file)]
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else _TEXT_ONLY_PREFIX
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118 - not a dictionary
                if stored.startswith(_OTHER_PARTS):
                    continue
                name = stored.removeprefix(prefix)
                tensor = opened.get_tensor(stored)
                if name in tensors:
                    raise CheckpointError(f"{file}: {stored} is there twice; keep one of the two")
                if not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{file}: {stored} is {tensor.dtype}; quantised weights are not supported, "
                        "load the bfloat16 checkpoint"
                    )
                tensors[name] = tensor.to(dtype)
    return tensors


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: is no index of safetensors files: {error}") from error
    else:
        parts = ["model.safetensors"]
    files = [folder / str(part) for part in parts]
    absent = [str(file) for file in files if not file.is_file() or file.parent != folder]
    if absent:
        raise CheckpointError(f"{folder}: weights are missing: {', '.join(absent)}")
    return files


def _some(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
