"""Adapters of the bundled model.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from torch import Tensor

from model_impl.config import read_config
from model_impl.lora import Adapter, Adapters, Sites
from model_impl.lora import media as lora_media
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media
from model_impl.text import SoftTokens, TextModel

Wanted = Sequence[str | None]
Encode = Callable[[Tensor, Media], SoftTokens | None]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is of more than a text model.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    raw = read_config(checkpoint / "config.json")
    return bool(raw.get("vision_config") or raw.get("audio_config"))


def attached(
    model: TextModel | Gemma4ForConditionalGeneration, checkpoint: Path, wanted: Wanted
) -> Adapters | None:
    """A model's adapters, each read once and named by its folder; None where none is wanted.

    Raises:
        ConfigError, CheckpointError: one of them does not fit the checkpoint.
    """
    folders = list(dict.fromkeys(folder for folder in wanted if folder is not None))
    if not folders:
        return None
    sites = Sites.of_checkpoint(checkpoint)
    loaded = {folder: Adapter.load(Path(folder), sites) for folder in folders}
    adapters = Adapters(model)
    for folder, adapter in loaded.items():
        adapters.add(folder, adapter)
    return adapters


def rows_of(
    adapters: Adapters | None, wanted: Wanted
) -> Callable[[Sequence[int]], AbstractContextManager[object]] | None:
    """Lets the rows of a pass use their adapters."""
    if adapters is None:
        return None
    return lambda rows: adapters.rows([wanted[row] for row in rows])


def encoder(adapters: Adapters | None, wanted: Wanted) -> Encode | None:
    """Makes soft tokens with the adapter of each row."""
    if adapters is None:
        return None
    return partial(_encode, adapters, wanted)


def _encode(adapters: Adapters, wanted: Wanted, ids: Tensor, media: Media) -> SoftTokens | None:
    return lora_media.soft_tokens(adapters, ids, media, wanted)


def acted(adapters: Adapters | None, wanted: Wanted) -> dict[str, tuple[str, ...]]:
    """By adapter, the modules whose output it has changed."""
    if adapters is None:
        return {}
    return {folder: adapters.acted(folder) for folder in dict.fromkeys(wanted) if folder is not None}


def summary(adapters: Adapters | None, wanted: Wanted) -> str:
    """All these modules, for `GenerateResult.effective`."""
    modules = sorted({module for own in acted(adapters, wanted).values() for module in own})
    return ", ".join(modules) or "none"
