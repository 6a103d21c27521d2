"""Adapters of the bundled model.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from torch import Tensor

from conformance.targets.protocol import Parts
from model_impl.config import read_config
from model_impl.lora import Adapter, Adapters, Sites
from model_impl.lora import media as lora_media
from model_impl.lora.sites import is_text
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media
from model_impl.parallel.model import ParallelModel
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


class Attached:
    """The adapters of a request on a model, each read once and named by its folder.

    Args:
        model: In this process: it encodes media, and runs the text as well where that is not spread.
        checkpoint: Of the model.
        wanted: Folders, some of them named twice.
        spread: The text model in several processes; None where it is not.

    Raises:
        ConfigError, CheckpointError: one of the adapters does not fit the checkpoint.
    """

    def __init__(
        self,
        model: TextModel | Gemma4ForConditionalGeneration,
        checkpoint: Path,
        wanted: Wanted,
        spread: ParallelModel | None = None,
    ) -> None:
        self.here = Adapters(model)
        """Of this process."""
        self._spread = spread
        self._folders = list(dict.fromkeys(folder for folder in wanted if folder is not None))
        self._sites = Sites.of_checkpoint(checkpoint)
        for folder, adapter in [
            (folder, Adapter.load(Path(folder), self._sites)) for folder in self._folders
        ]:
            self.here.add(folder, adapter)
            if spread is not None:
                spread.adapters.add(folder, adapter.only(is_text))

    def rows(self, wanted: Wanted) -> AbstractContextManager[None]:
        """Lets the rows of a pass of the text model use adapters."""
        return self.here.rows(wanted) if self._spread is None else self._spread.adapters.rows(wanted)

    def acted(self) -> dict[str, tuple[str, ...]]:
        """By adapter, the modules whose output it has changed."""
        found = {folder: set(self.here.acted(folder)) for folder in self._folders}
        if self._spread is not None:
            for folder, sites in found.items():
                sites |= set(self._spread.adapters.acted(folder))
        return {folder: tuple(sorted(sites)) for folder, sites in found.items()}

    def parts(self) -> Parts:
        """What is there beside the language model."""
        mapping = self._sites.mapping
        return Parts(connectors=mapping.connectors, towers=mapping.towers)

    def summary(self) -> str:
        """All these modules, for `GenerateResult.effective`."""
        return ", ".join(sorted({module for own in self.acted().values() for module in own})) or "none"


def attached(
    model: TextModel | Gemma4ForConditionalGeneration,
    checkpoint: Path,
    wanted: Wanted,
    spread: ParallelModel | None = None,
) -> Attached | None:
    """As `Attached`; None where no adapter is wanted.

    Raises:
        ConfigError, CheckpointError: as `Attached`.
    """
    return Attached(model, checkpoint, wanted, spread) if any(wanted) else None


def rows_of(
    adapters: Attached | None, wanted: Wanted
) -> Callable[[Sequence[int]], AbstractContextManager[object]] | None:
    """Lets the rows of a pass use their adapters."""
    if adapters is None:
        return None
    return lambda rows: adapters.rows([wanted[row] for row in rows])


def encoder(adapters: Attached | None, wanted: Wanted) -> Encode | None:
    """Makes soft tokens with the adapter of each row."""
    if adapters is None:
        return None
    return partial(_encode, adapters.here, wanted)


def _encode(adapters: Adapters, wanted: Wanted, ids: Tensor, media: Media) -> SoftTokens | None:
    return lora_media.soft_tokens(adapters, ids, media, wanted)
