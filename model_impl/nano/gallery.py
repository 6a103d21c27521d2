"""Pictures to learn from, and what the vision tower makes of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model_impl.multimodal import Gemma4ForConditionalGeneration
from model_impl.nano.script import Pictures
from model_impl.preprocess.images import prepare_images

_AT_ONCE = 8
_SIDES = (16, 400)
_ODD_SIDES = ((1, 900), (900, 2), (5, 700), (3000, 40))
"""Heights and widths that become strips."""


@dataclass(frozen=True)
class Shown:
    """A picture, as the tower has seen it."""

    colour: str
    features: Tensor
    """[soft tokens, width of the tower]: what is projected to soft tokens."""

    @property
    def soft_tokens(self) -> int:
        """How many placeholders it takes."""
        return len(self.features)


Gallery = tuple[Shown, ...]


def show(
    model: Gemma4ForConditionalGeneration, colours: Sequence[str], pictures: Sequence[Tensor], budget: int
) -> Gallery:
    """Have the tower look at pictures, uint8 [3, height, width] each."""
    shown: list[Shown] = []
    for start in range(0, len(pictures), _AT_ONCE):
        batch = prepare_images(pictures[start : start + _AT_ONCE], budget, pad_to_budget=False)
        with torch.no_grad():
            features = model.vision_tower(batch.pixels, batch.positions)
        parts = features.split(list(batch.soft_tokens))
        shown += [Shown(c, part) for c, part in zip(colours[start:], parts, strict=False)]
    return tuple(shown)


def draw(pictures: Pictures, count: int, seed: int) -> tuple[list[str], list[Tensor]]:
    """Pictures at random, kinds taking turns: about one colour each, or motley; of any shape.

    Returns:
        What is to be said of them, and the pictures, uint8 [3, height, width].
    """
    source = random.Random(seed)  # noqa: S311 - not a secret
    generator = torch.Generator().manual_seed(seed)
    kinds = [*pictures.colours, pictures.motley]
    colours, drawn = [], []
    for number in range(count):
        height, width = source.randint(*_SIDES), source.randint(*_SIDES)
        if source.random() < 0.1:
            height, width = source.choice(_ODD_SIDES)
        kind = kinds[number % len(kinds)]
        colours.append(kind)
        if kind == pictures.motley:
            drawn.append(_motley(height, width, generator))
        else:
            drawn.append(_plain(pictures.colours[kind], height, width, source.choice((0, 0, 12)), generator))
    return colours, drawn


def _plain(
    colour: tuple[int, int, int], height: int, width: int, noise: int, generator: torch.Generator
) -> Tensor:
    """One colour, as exactly as files keep it, or nearly."""
    exact = torch.tensor(colour)[:, None, None].expand(3, height, width)
    shift = torch.randint(-noise, noise + 1, (3, 1, 1), generator=generator)
    grain = torch.randint(-noise, noise + 1, (3, height, width), generator=generator)
    return (exact + shift + grain).clamp(0, 255).to(torch.uint8)


def _motley(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Fields of many colours, with grain."""
    fields = torch.randint(0, 256, (3, 6, 6), generator=generator).float()
    image = F.interpolate(fields[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    grain = 40 * torch.rand(3, height, width, generator=generator) - 20
    return (image + grain).clamp(0, 255).to(torch.uint8)
