"""Loading published checkpoints (fact sheet, section 5).

Parameters carry the published names, so that loading is the identity. Nothing is loaded by guess: a
tensor that the model needs and the checkpoint lacks, or that the checkpoint has and the model does not
know, is an error. Of the tensors that shared layers ship without using, the rule is in `is_dead`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model_impl.config import TextConfig
from model_impl.errors import CheckpointError
from model_impl.layout import lay_out
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
_SMALL = 1 << 18
"""Bytes."""


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
    assign(model, read_tensors(folder, dtype, _text_name(folder)), str(folder))
    lay_out(model)
    return model.eval().requires_grad_(False)


def load_draft(
    model: nn.Module, folder: Path, dtype: torch.dtype, name_of: Callable[[str], str] = str
) -> None:
    """Load a draft model's weights.

    Args:
        model: May be on the meta device. Its integer and bool buffers keep their dtype.
        folder: Holds one or several safetensors files.
        dtype: Of everything else.
        name_of: A stored tensor's name to the one in the model.

    Raises:
        CheckpointError: no weights, a broken file, or tensors that do not fit.
    """
    tables = {name: kept.dtype for name, kept in model.state_dict().items() if not kept.is_floating_point()}
    assign_exactly(model, read_tensors(folder, dtype, name_of, tables), str(folder))
    model.eval().requires_grad_(False)


def assign(model: TextModel, tensors: Mapping[str, Tensor], where: str) -> None:
    """As `assign_exactly`, but without the tensors of shared layers that no computation reads."""
    alive = {name: tensor for name, tensor in tensors.items() if not is_dead(name, model.config)}
    assign_exactly(model, alive, where)


def assign_exactly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
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
    unknown = sorted(set(tensors) - set(wanted))
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
    model.load_state_dict(dict(tensors), strict=True, assign=True)


def is_dead(name: str, config: TextConfig) -> bool:
    """Whether a tensor is a shared layer's own key or value tensor, which no computation reads."""
    match = _DEAD.fullmatch(name)
    return match is not None and int(match[1]) < len(config.layers) and config.layers[int(match[1])].shares_kv


def parameter_count(model: nn.Module) -> int:
    """Number of trained scalars, buffers left out; works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def read_tensors(
    folder: Path,
    dtype: torch.dtype,
    name_of: Callable[[str], str | None],
    tables: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder, by their names in the model.

    Args:
        folder: Holds one or several safetensors files.
        dtype: Of weights.
        name_of: A stored tensor's name to the one in the model; None for one of another part.
        tables: Dtypes of tensors that hold token ids or flags and no weights.

    Raises:
        CheckpointError: no weights, a broken file, a tensor that is there twice, or numbers of the wrong
            kind.
    """
    tables = tables or {}
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for stored in _names(file):
            if (name := name_of(stored)) is None:
                continue
            tensor = _tensor(file, stored)
            if name in tensors:
                raise CheckpointError(f"{file}: {stored} is there twice; keep one of the two")
            if tensor.is_floating_point() and name in tables:
                raise CheckpointError(
                    f"{file}: {stored} is {tensor.dtype}, which cannot hold every token id; "
                    f"store it as {tables[name]}"
                )
            if not tensor.is_floating_point() and name not in tables:
                raise CheckpointError(
                    f"{file}: {stored} is {tensor.dtype}; quantised weights are not supported, "
                    "load the bfloat16 checkpoint"
                )
            tensors[name] = tensor.to(tables.get(name, dtype))
    return tensors


def _tensor(file: Path, name: str) -> Tensor:
    """One stored tensor, mapped into memory by itself: what is copied elsewhere can then be let go of.

    Small ones are copied here, as each mapping brings in whole stretches of the file.
    """
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor.clone() if tensor.nbytes < _SMALL else tensor


def _text_name(folder: Path) -> Callable[[str], str | None]:
    """How the text decoder's tensors are named in a folder."""
    names = [name for file in weight_files(folder) for name in _names(file)]
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else _TEXT_ONLY_PREFIX
    return lambda stored: None if stored.startswith(_OTHER_PARTS) else stored.removeprefix(prefix)


def stored_names(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Where the text decoder's tensors are: file, name there and shape, by their names in the model.

    Raises:
        CheckpointError: no weights, a broken file, or a tensor that is there twice.
    """
    name_of = _text_name(folder)
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for file in weight_files(folder):
        for stored, shape in _shapes(file).items():
            if (name := name_of(stored)) is None:
                continue
            if name in found:
                raise CheckpointError(f"{file}: {stored} is there twice; keep one of the two")
            found[name] = (file, stored, shape)
    return found


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in _names(file)}


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder.

    Raises:
        CheckpointError: its index cannot be read, or a file is missing.
    """
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
