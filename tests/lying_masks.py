"""Targets that give masks of attention and nothing else: an honest one, and some that lie in one way each.

They read the checkpoint's configuration and the token ids alone, and work masks out with the bundled
implementation's functions, which the check does not use.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from conformance.targets.protocol import ForwardRequest, ForwardResult, TargetInfo
from model_impl.config import AttentionKind, LayerConfig, TextConfig
from model_impl.runtime.masks import NO_BLOCK, BlockMode, Blocks, visible, without_long

FULL: AttentionKind = "full_attention"
SLIDING: AttentionKind = "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Row:
    """What stands at each place of a row: the number of its image, frame or sound, or `NO_BLOCK`."""

    images: Tensor
    """int [1, T]; frames too."""
    sounds: Tensor
    markers: Tensor
    """int [1, T]: a delimiter has the number of the image or frame that it begins or ends."""


class Honest:
    """By the rule; subclasses change one thing."""

    rules: frozenset[str] = frozenset()
    """What the lie breaks, all of it or a part in any one suite, and nothing else."""
    spec = "masks"

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name="masks", version="1", capabilities=("forward",), features=("media", "long-blocks")
        )

    def close(self) -> None:
        pass

    def forward(self, request: ForwardRequest) -> ForwardResult:
        raw = json.loads((Path(request.checkpoint) / "config.json").read_text(encoding="utf-8"))
        config = self.config(TextConfig.from_dict(raw))
        mode = self.mode(request.long_blocks or "clamp_past")
        longest = max(map(len, request.input_ids))
        rows = [read(ids, raw) for ids in request.input_ids]
        made = {}
        for layer in config.layers:
            name = f"layers.{layer.index}.self_attn.mask"
            assert name in request.capture
            parts = [self.mask(layer, config, row, mode)[0, 0] for row in rows]
            made[name] = torch.cat([F.pad(part, (0, longest - len(part))) for part in parts]).float()
        self.change(made, request)
        save_file(made, request.output)
        return ForwardResult(
            path=request.output, order=tuple(made), effective={"attention": request.attention or "sdpa"}
        )

    # What a lie changes: the configuration, the mode, what is open, or a layer's mask.

    def config(self, config: TextConfig) -> TextConfig:
        return config

    def mode(self, asked: BlockMode) -> BlockMode:
        return asked

    def open(self, row: Row) -> Tensor:
        """Blocks of tokens that see each other both ways."""
        return row.images

    def mask(self, layer: LayerConfig, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        """bool [1, 1, T, T]."""
        if layer.kind == FULL:
            return self.full(config, row, mode)
        return self.sliding(config, row, mode)

    def full(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        places = torch.arange(row.images.shape[1])[None]
        return visible(places, places, None)

    def sliding(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        return clamped(config, self.open(row), mode)

    def change(self, made: dict[str, Tensor], request: ForwardRequest) -> None:
        """Change the tensors."""


def read(ids: Sequence[int], raw: dict[str, Any]) -> Row:
    """Runs of placeholders are pieces: there is a delimiter between any two."""

    def numbers(*names: str) -> list[int]:
        soft = {raw[name] for name in names if raw.get(name) is not None}
        made: list[int] = []
        for number, (inside, run) in enumerate(itertools.groupby(ids, lambda token: token in soft)):
            made += [number if inside else NO_BLOCK for _ in run]
        return made

    images = numbers("image_token_id", "video_token_id")
    ends = {raw.get("boi_token_id"), raw.get("eoi_token_id")}
    markers = [
        max(images[max(at - 1, 0) : at + 2]) if token in ends else NO_BLOCK for at, token in enumerate(ids)
    ]
    return Row(*(torch.tensor([one]) for one in (images, numbers("audio_token_id"), markers)))


def clamped(config: TextConfig, blocks: Tensor, mode: BlockMode) -> Tensor:
    """The mask of a sliding layer."""
    places = torch.arange(blocks.shape[1])[None]
    if not config.bidirectional_images:
        return visible(places, places, config.sliding_window)
    if mode == "drop":
        blocks = without_long(blocks, config.sliding_window)
    return visible(places, places, config.sliding_window, Blocks(blocks, blocks, mode))


def within(blocks: Tensor) -> Tensor:
    """Pairs of tokens of one block, bool [1, 1, T, T]."""
    same = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] != NO_BLOCK)
    return same[:, None]


class OpensFullLayers(Honest):
    """Images are open in full layers too."""

    rules = frozenset({"full-layer"})

    def full(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        made = super().full(config, row, mode)
        return made | within(row.images) if config.bidirectional_images else made


class OpensFullLayersUpToTheWindow(Honest):
    """The guard against long images stands before full layers, which open all others."""

    rules = frozenset({"full-layer"})

    def full(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        made = super().full(config, row, mode)
        short = without_long(row.images, config.sliding_window)
        return made | within(short) if config.bidirectional_images else made


class ClampsFullLayers(Honest):
    """Tokens of images see no farther back in full layers than the window."""

    rules = frozenset({"full-window"})

    def full(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        made = super().full(config, row, mode)
        places = torch.arange(row.images.shape[1])[None]
        image = (row.images != NO_BLOCK)[:, None, :, None]
        return torch.where(image, visible(places, places, config.sliding_window), made)


class NeverOpens(Honest):
    """All is read causally."""

    rules = frozenset({"block-closed", "long-block"})

    def config(self, config: TextConfig) -> TextConfig:
        return dataclasses.replace(config, bidirectional_images=False)


class DropsLongImages(Honest):
    """Images longer than the window are read causally, unless something else is asked for."""

    rules = frozenset({"long-block"})

    def mode(self, asked: BlockMode) -> BlockMode:
        return "drop" if asked == "clamp_past" else asked


class ClampsDropped(Honest):
    """Images longer than the window are clamped where they are to be dropped."""

    rules = frozenset({"long-block"})

    def mode(self, asked: BlockMode) -> BlockMode:
        return "clamp_past" if asked == "drop" else asked


class ClampsTheFuture(Honest):
    """The window hides later tokens as well."""

    rules = frozenset({"future-clamp"})

    def mode(self, asked: BlockMode) -> BlockMode:
        return "clamp_both" if asked == "clamp_past" else asked


class NeverClampsTheFuture(Honest):
    """The window hides no later tokens where it must."""

    rules = frozenset({"future-clamp"})

    def mode(self, asked: BlockMode) -> BlockMode:
        return "clamp_past" if asked == "clamp_both" else asked


class CrossesTheWindow(Honest):
    """Tokens of an image see each other at any distance."""

    rules = frozenset({"block-window"})

    def sliding(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        made = super().sliding(config, row, mode)
        if not config.bidirectional_images or mode == "drop":
            return made
        later = made.new_ones(made.shape).triu(1)
        return made | (within(row.images) & ~later)


class MergesNeighbours(Honest):
    """Images with nothing but delimiters between them are one."""

    rules = frozenset({"merged-blocks"})

    def open(self, row: Row) -> Tensor:
        images, markers = row.images.clone()[0], row.markers[0]
        last = NO_BLOCK
        for at, number in enumerate(row.images[0].tolist()):
            if number == NO_BLOCK:
                if markers[at] == NO_BLOCK:
                    last = NO_BLOCK
                continue
            if last == NO_BLOCK:
                last = number
            images[at] = last
        return images[None]


class OpensEverywhere(Honest):
    """Images are open in models that have no such attention."""

    rules = frozenset({"causal-model"})

    def config(self, config: TextConfig) -> TextConfig:
        return dataclasses.replace(config, bidirectional_images=True)


class OpensSounds(Honest):
    """Sounds are open as images are, in all models."""

    rules = frozenset({"sound"})

    def sliding(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        opened = dataclasses.replace(config, bidirectional_images=True)
        return super().sliding(config, row, mode) | clamped(opened, row.sounds, mode)


class OpensDelimiters(Honest):
    """The delimiters of an image are part of it, and count for its length."""

    rules = frozenset({"future", "block-closed"})

    def open(self, row: Row) -> Tensor:
        return torch.where(row.markers != NO_BLOCK, row.markers, row.images)


class WindowTooLong(Honest):
    """It is one token longer, for the length of images and for later tokens too."""

    rules = frozenset({"window", "block-window", "long-block", "future-clamp"})

    def config(self, config: TextConfig) -> TextConfig:
        return dataclasses.replace(config, sliding_window=config.sliding_window + 1)


class WindowTooShort(Honest):
    """One token less is seen."""

    rules = frozenset({"window"})

    def sliding(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        edge = torch.arange(row.images.shape[1])
        far = edge[:, None] - edge[None, :] == config.sliding_window - 1
        return super().sliding(config, row, mode) & ~far


class ForgetsTheWindow(Honest):
    """In a row that holds an image, text of sliding layers sees all that is earlier."""

    rules = frozenset({"window"})

    def sliding(self, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        made = super().sliding(config, row, mode)
        if (row.images == NO_BLOCK).all():
            return made
        text = (row.images == NO_BLOCK)[:, None, :, None]
        return torch.where(text, self.full(config, row, mode), made)


class LastLayerSlides(Honest):
    """The last layer is like the first."""

    rules = frozenset({"full-window", "full-layer"})

    def mask(self, layer: LayerConfig, config: TextConfig, row: Row, mode: BlockMode) -> Tensor:
        if layer.index == len(config.layers) - 1:
            return self.sliding(config, row, mode)
        return super().mask(layer, config, row, mode)


class SeesPadding(Honest):
    """Each token of a batch sees the last place of the longest row."""

    rules = frozenset({"padding", "future"})

    def change(self, made: dict[str, Tensor], request: ForwardRequest) -> None:
        if len(request.input_ids) > 1:
            for mask in made.values():
                mask[:, -1] = 1


LIARS: tuple[type[Honest], ...] = tuple(Honest.__subclasses__())
