"""Lessons in seeing: what is in a picture, said tile by tile.

They are no questions and nobody is examined on them. A question teaches one letter; naming everything teaches
the tower and its projector many words at once, and all subjects build on those. They begin with pictures of
one tile: attention finds it by itself, and what it learns there makes all else many times faster.
"""

from __future__ import annotations

import random

from model_impl.nano.lesson import Lesson, Split
from model_impl.nano.subjects.drawing import COLOUR_NAMES, TEXTURE_NAMES
from model_impl.nano.subjects.exercise import held_out
from model_impl.nano.subjects.scattered import in_order, numbers, painted, scatter

_COUNTS, _WEIGHTS = (2, 3, 4, 6), (4, 2, 2, 1)
_ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}


def glance(rng: random.Random, split: Split) -> Lesson:
    """Draw a lesson that names the only tile of a picture."""
    return _named(rng, split, 1)


def glimpse(rng: random.Random, split: Split) -> Lesson:
    """Draw a lesson that names all tiles of a picture, row by row."""
    (count,) = rng.choices(_COUNTS, _WEIGHTS)
    return _named(rng, split, count)


def _named(rng: random.Random, split: Split, count: int) -> Lesson:
    """There is but one template, so that it occurs in both splits."""
    while True:
        colours, textures = rng.choices(COLOUR_NAMES, k=count), rng.choices(TEXTURE_NAMES, k=count)
        tiles = in_order(scatter(rng, colours, textures))
        drawn = numbers([tiles])
        if held_out(drawn) == (split == "test"):
            break
    said = [f"row {tile.row + 1} column {tile.column + 1}: {tile.colour} {tile.texture}" for tile in tiles]
    return Lesson(
        messages=(_ASKED,),
        answer=", ".join(said),
        key=glimpse.__name__,
        numbers=drawn,
        pictures=painted([tiles]).pictures,
    )
