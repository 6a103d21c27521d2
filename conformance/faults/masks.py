"""Faults of what tokens of images see (catalogue class 5, fact sheet, section 3.6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conformance.faults.base import Collection, Patch, replace
from model_impl import config, multimodal, text
from model_impl.config import AttentionKind, TextConfig
from model_impl.layers import backends
from model_impl.layers.backends import Mask
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media
from model_impl.runtime import masks
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import NO_BLOCK, BlockMode, Blocks, visible
from model_impl.runtime.paged import PagedView
from model_impl.text import SoftTokens, TextModel

faults = Collection("mask")
mask = partial(faults, area="masks")

Rule = Callable[[TextModel, Tensor, Tensor], Mask]
"""Positions and blocks to what a layer's tokens see."""


def _masks_of(kind: AttentionKind, rule: Rule) -> Patch:
    """A patch of the masks of one kind of layers, where there are images."""
    original = TextModel._mask

    def changed_mask(self: TextModel, own: AttentionKind, positions: Tensor, blocks: Tensor | None) -> Mask:
        if own != kind or blocks is None:
            return original(self, own, positions, blocks)
        return rule(self, positions, blocks)

    return replace(TextModel, "_mask", changed_mask)


def _same_image(blocks: Tensor) -> Tensor:
    """Pairs of tokens of one image, bool [B, 1, T, T]."""
    return (blocks[:, None, :, None] == blocks[:, None, None, :]) & (blocks != NO_BLOCK)[:, None, :, None]


@mask("both-ways-in-full-layers", source=("spec 3.6",), module=text)
def _in_full_layers() -> tuple[Patch, ...]:
    """Full layers see images both ways too."""

    def both_ways(_self: TextModel, positions: Tensor, blocks: Tensor) -> Mask:
        return Mask(visible(positions, positions, None, Blocks(blocks, blocks)))

    def of_cache(self: KVCache, _positions: Tensor) -> Tensor:
        after = [length + count for length, count in zip(self.lengths, self._pending, strict=True)]
        return self._slot_positions(max(after), None, after)

    def of_view(self: PagedView, _positions: Tensor) -> Tensor:
        return self._cache.slots("full_attention", self._places)[1]

    def begins(original: Any, keys_of: Callable[[Any, Tensor], Tensor]) -> Any:
        def begin(
            self: Any, width: int, counts: Any, blocks: Tensor | None = None, mode: BlockMode = "clamp_past"
        ) -> tuple[Tensor, dict[AttentionKind, Mask]]:
            positions, found = original(self, width, counts, blocks, mode)
            if blocks is not None:
                keys = keys_of(self, positions)
                column = keys - positions[:, :1]  # kept keys are in no block
                own = blocks.gather(1, column.clamp(0, width - 1))
                own = torch.where((column >= 0) & (column < width) & (keys >= 0), own, NO_BLOCK)
                found["full_attention"] = Mask(visible(positions, keys, None, Blocks(blocks, own)))
            return positions, found

        return begin

    return (
        _masks_of("full_attention", both_ways),
        replace(KVCache, "begin", begins(KVCache.begin, of_cache)),
        replace(PagedView, "begin", begins(PagedView.begin, of_view)),
    )


@mask("images-seen-causally", source=("M05",), module=text)
def _causally() -> tuple[Patch, ...]:
    """Sliding layers see images causally, like text."""

    def causal(self: TextModel, positions: Tensor, _blocks: Tensor) -> Mask:
        return Mask(visible(positions, positions, self.config.sliding_window))

    def begins(original: Any) -> Any:
        def begin(
            self: Any, width: int, counts: Any, blocks: Tensor | None = None, mode: BlockMode = "clamp_past"
        ) -> tuple[Tensor, dict[AttentionKind, Mask]]:
            found: tuple[Tensor, dict[AttentionKind, Mask]] = original(self, width, counts, None, mode)
            return found

        return begin

    return (
        _masks_of("sliding_attention", causal),
        replace(KVCache, "begin", begins(KVCache.begin)),
        replace(PagedView, "begin", begins(PagedView.begin)),
    )


@mask("guard-in-full-layers", source=("vllm-project/vllm#40534",), module=text)
def _guard_in_full_layers() -> Patch:
    """The guard that keeps images within the window stands in full layers, where it hides what is far."""

    def clamped(self: TextModel, positions: Tensor, _blocks: Tensor) -> Mask:
        return Mask(visible(positions, positions, self.config.sliding_window))

    return _masks_of("full_attention", clamped)


@mask("window-does-not-hold-in-images", source=("M07",), module=text)
def _beyond_the_window() -> Patch:
    """Tokens of an image see all of it, however far beyond the window."""

    def everything(self: TextModel, positions: Tensor, blocks: Tensor) -> Mask:
        return Mask(visible(positions, positions, self.config.sliding_window) | _same_image(blocks))

    return _masks_of("sliding_attention", everything)


@mask("flex-not-clamped", source=("spec 10",), module=text)
def _flex_not_clamped() -> Patch:
    """With FlexAttention alone, tokens of an image see all of it, however far beyond the window."""

    def of_flex_alone(self: TextModel, positions: Tensor, blocks: Tensor) -> Mask:
        own = Blocks(blocks, blocks, self.long_blocks)
        right = visible(positions, positions, self.config.sliding_window, own)
        wrong = right | _same_image(blocks)
        return Mask(right, derived={"blocks": backends._blocks(wrong, wrong, wrong)})

    return _masks_of("sliding_attention", of_flex_alone)


def _mode(old: BlockMode, new: BlockMode) -> Patch:
    original = TextModel.__init__

    def init(
        self: TextModel,
        config: TextConfig,
        attention: str | None = None,
        device: Any = "cpu",
        long_blocks: BlockMode = "clamp_past",
    ) -> None:
        original(self, config, attention, device, new if long_blocks == old else long_blocks)

    return replace(TextModel, "__init__", init)


@mask("long-images-dropped", source=("M06", "vllm-project/vllm#47217"), module=text)
def _dropped() -> Patch:
    """An image that is longer than the window is seen causally, where the window should clamp it."""
    return _mode("clamp_past", "drop")


@mask("future-clamped", source=("X23",), module=text)
def _future_clamped() -> Patch:
    """The window hides what is far behind in an image, where only what is far before it should be hidden."""
    return _mode("clamp_past", "clamp_both")


@mask("both-ways-without-leave", source=("M10",), module=config)
def _without_leave() -> Patch:
    """Images are seen both ways, whatever `use_bidirectional_attention` says."""
    from_dict = TextConfig.from_dict.__func__  # type: ignore[attr-defined]

    def read(cls: type[TextConfig], raw: Any) -> TextConfig:
        made: TextConfig = from_dict(cls, raw)
        return changed(made, bidirectional_images=True)

    return replace(TextConfig, "from_dict", classmethod(read))


@mask("window-one-more", source=("spec 12.10",), module=masks)
def _window_one_more() -> Patch:
    """A token sees one key more than the window holds."""

    def wider(queries: Tensor, keys: Tensor, window: int | None, blocks: Blocks | None = None) -> Tensor:
        return visible(queries, keys, None if window is None else window + 1, blocks)

    return replace(text, "visible", wider)


def _blocks(change: Callable[[Gemma4ForConditionalGeneration, Tensor, Tensor], Tensor]) -> Patch:
    """A patch of the blocks: `change` gets the model, the token ids, and the blocks, a copy."""
    original = Gemma4ForConditionalGeneration.soft_tokens

    def soft_tokens(self: Gemma4ForConditionalGeneration, ids: Tensor, given: Media) -> SoftTokens | None:
        soft = original(self, ids, given)
        return soft and changed(soft, blocks=change(self, ids, soft.blocks.clone()))

    return replace(Gemma4ForConditionalGeneration, "soft_tokens", soft_tokens)


@mask("adjacent-images-merged", source=("spec 12.11",), module=multimodal)
def _merged() -> Patch:
    """Images with nothing but their markers between them are one block."""

    def merged(self: Gemma4ForConditionalGeneration, ids: Tensor, blocks: Tensor) -> Tensor:
        tokens = self.config.tokens
        markers = torch.tensor([tokens.image_begin, tokens.image_end])
        part = torch.isin(ids, markers) | (blocks != NO_BLOCK)
        starts = part & ~torch.nn.functional.pad(part, (1, 0))[:, :-1]
        runs = starts.flatten().cumsum(0).view_as(ids)
        return torch.where(blocks != NO_BLOCK, runs, NO_BLOCK)

    return _blocks(merged)


@mask("frames-merged", source=("spec 3.6",), module=multimodal)
def _frames_merged() -> Patch:
    """All frames of a row are one block."""

    def merged(self: Gemma4ForConditionalGeneration, ids: Tensor, blocks: Tensor) -> Tensor:
        rows = torch.arange(len(ids))[:, None].expand_as(ids)
        video = self.config.tokens.video
        seen = torch.isin(ids, torch.tensor([] if video is None else [video]))
        return torch.where(seen, 1_000_000 + rows, blocks)

    return _blocks(merged)


@mask("sounds-both-ways", source=("spec 12.11",), module=multimodal)
def _sounds_both_ways() -> Patch:
    """A sound is a block, as an image is."""

    def with_sounds(self: Gemma4ForConditionalGeneration, ids: Tensor, blocks: Tensor) -> Tensor:
        rows = torch.arange(len(ids))[:, None].expand_as(ids)
        audio = self.config.tokens.audio
        heard = torch.isin(ids, torch.tensor([] if audio is None else [audio]))
        return torch.where(heard, 1_000_000 + rows, blocks)

    return _blocks(with_sounds)
