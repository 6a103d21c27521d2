"""A rank reads its own tensors, and of each its own part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model_impl.checkpoint import assign_exactly, is_dead, stored_names
from model_impl.config import TextConfig
from model_impl.errors import CheckpointError
from model_impl.layout import lay_out
from model_impl.parallel.layout import Layout, Place
from model_impl.parallel.ranks import Ranks
from model_impl.parallel.shards import Cut, cut_of
from model_impl.parallel.stage import Stage
from model_impl.runtime.masks import BlockMode
from model_impl.text import TextModel


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from, and how it computes; plain data that another process can be sent."""

    folder: str
    """Holds `config.json`, and one or several safetensors files."""
    dtype: torch.dtype = torch.float32
    """Of parameters and of the computation."""
    attention: str | None = None
    """Backend of all layers; None is the first that can serve them."""
    long_blocks: BlockMode = "clamp_past"
    """What becomes of an image that is longer than the window."""

    @property
    def config(self) -> TextConfig:
        """Of the whole model.

        Raises:
            ConfigError: as `TextConfig.from_file`.
        """
        return TextConfig.from_file(Path(self.folder) / "config.json")


def load_stage(weights: Weights, layout: Layout, place: Place, ranks: Ranks | None = None) -> Stage:
    """Build what one rank holds, and load it.

    Raises:
        LayoutError, BackendError, ConfigError: as `Stage`.
        CheckpointError: as `load_text_model`; of tensors of other ranks nothing is looked at.
    """
    config = weights.config
    with torch.device("meta"):
        stage = Stage(config, layout, place, ranks, weights.attention, long_blocks=weights.long_blocks)
    assign_exactly(stage, _read(weights, config, stage), weights.folder)
    lay_out(stage)
    return stage.eval().requires_grad_(False)


def stage_of(model: TextModel, layout: Layout, place: Place, ranks: Ranks | None = None) -> Stage:
    """What one rank holds of a model that is in memory; whole tensors are shared with it, not copied.

    Raises:
        LayoutError: the layout does not fit the model.
    """
    with torch.device("meta"):
        stage = Stage(model.config, layout, place, ranks, model.backend, long_blocks=model.long_blocks)
    held = set(stage.state_dict())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in held}
    assign_exactly(stage, cut_all(tensors, model.config, layout, place.shard), "the model")
    return stage.eval().requires_grad_(False)


def cut_all(
    tensors: Mapping[str, Tensor], config: TextConfig, layout: Layout, shard: int
) -> dict[str, Tensor]:
    """A rank's part of each tensor, by the same names."""
    cuts = {name: cut_of(name, config, layout, shard) for name in tensors}
    return {
        name: tensor if (cut := cuts[name]) is None else cut.of(tensor) for name, tensor in tensors.items()
    }


def check_folder(weights: Weights) -> None:
    """Refuse a checkpoint that does not fit its configuration, from its names and shapes alone.

    Raises:
        ConfigError: as `TextConfig.from_file`.
        CheckpointError: no weights, a broken file, or tensors that do not fit.
    """
    config = weights.config
    with torch.device("meta"):
        model = TextModel(config, weights.attention)
        found = {
            name: torch.empty(shape)
            for name, (_file, _stored, shape) in stored_names(Path(weights.folder)).items()
            if not is_dead(name, config)
        }
    assign_exactly(model, found, weights.folder)


def _read(weights: Weights, config: TextConfig, stage: Stage) -> dict[str, Tensor]:
    held = stage.state_dict()
    found = stored_names(Path(weights.folder))
    return {
        name: _part(file, stored, cut_of(name, config, stage.layout, stage.place.shard)).to(weights.dtype)
        for name, (file, stored, _shape) in found.items()
        if name in held
    }


def _part(file: Path, stored: str, cut: Cut | None) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        whole = opened.get_slice(stored)
        tensor: Tensor = whole[:] if cut is None else cut.of(whole)
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{file}: {stored} is {tensor.dtype}; quantised weights are not supported, load the bfloat16 "
            "checkpoint"
        )
    return tensor
