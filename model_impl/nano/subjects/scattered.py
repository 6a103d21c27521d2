"""Questions about tiles that lie scattered over a picture: six subjects."""

from __future__ import annotations

import random
from collections.abc import Sequence

from model_impl.nano.subjects.drawing import COLOUR_NAMES, TEXTURE_NAMES, Canvas, Tile
from model_impl.nano.subjects.exercise import Media, Scene, Subject, arranged, four

ROWS, COLUMNS = 7, 8
LEADS = ("Look at the picture.", "Here is a picture.", "See this drawing.", "Look closely.")
_CELLS = tuple((row, column) for row in range(ROWS) for column in range(COLUMNS))
_MOST = (8, 12)
"""Fewest and most tiles of the commonest colour."""
_FEW = (1, 2)
"""Of each other one."""
_CORNERS = {"northwest": (0, 0), "northeast": (0, 4), "southwest": (4, 0), "southeast": (4, 4)}
"""Row and column of the first cell of each corner, which has `_CORNER` rows and columns of cells."""
_CORNER = (3, 4)
_BLOCKS = ((3, 3), (2, 2), (1, 2), (1, 1))
"""Rows and columns of blocks, the largest first."""
_ALONE = ((2, 2), (2, 3), (3, 2), (3, 3))
"""Those of a block with nothing beside it."""


def painted(pictures: Sequence[Sequence[Tile]]) -> Media:
    """Pictures of tiles."""
    drawn = []
    for tiles in pictures:
        canvas = Canvas(ROWS, COLUMNS)
        canvas.put(tiles)
        drawn.append(canvas.pixels)
    return Media(tuple(drawn))


def numbers(pictures: Sequence[Sequence[Tile]]) -> tuple[int, ...]:
    """What the pictures are made of, in the order of rows and columns."""
    found: list[int] = []
    for tiles in pictures:
        found.append(len(tiles))
        for tile in in_order(tiles):
            found += tile.numbers
    return tuple(found)


def in_order(tiles: Sequence[Tile]) -> list[Tile]:
    """As they are read: row by row."""
    return sorted(tiles, key=lambda tile: (tile.row, tile.column))


def scatter(rng: random.Random, colours: Sequence[str], textures: Sequence[str]) -> list[Tile]:
    """Tiles of these colours and textures, in cells at random."""
    cells = rng.sample(_CELLS, len(colours))
    return [Tile(c, s, *cell) for c, s, cell in zip(colours, textures, cells, strict=True)]


def block(rng: random.Random, corner: str, shape: tuple[int, int], colour: str, texture: str) -> list[Tile]:
    """Tiles side by side, somewhere in a corner."""
    (first, left), (rows, columns) = _CORNERS[corner], shape
    top = first + rng.randint(0, _CORNER[0] - rows)
    start = left + rng.randint(0, _CORNER[1] - columns)
    return [Tile(colour, texture, top + r, start + c) for r in range(rows) for c in range(columns)]


def _majority(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    commonest, *others = arranged(rng, options, right)
    colours = [commonest] * rng.randint(*_MOST)
    for other in others:
        colours += [other] * rng.randint(*_FEW)
    tiles = scatter(rng, colours, rng.choices(TEXTURE_NAMES, k=len(colours)))
    return _scene(options, right, f"commonest: {commonest}", [tiles])


def _colour(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    textures = rng.sample(TEXTURE_NAMES, 4)
    tiles = scatter(rng, arranged(rng, options, right), textures)
    return _scene(options, right, f"{textures[0]} {options[right]}", [tiles], texture=textures[0])


def _texture(rng: random.Random) -> Scene:
    options, right = four(rng, TEXTURE_NAMES)
    colours = rng.sample(COLOUR_NAMES, 4)
    tiles = scatter(rng, colours, arranged(rng, options, right))
    return _scene(options, right, f"{colours[0]} {options[right]}", [tiles], colour=colours[0])


def _position(rng: random.Random) -> Scene:
    options, right = four(rng, tuple(_CORNERS))
    colour, texture = rng.choice(COLOUR_NAMES), rng.choice(TEXTURE_NAMES)
    tiles = block(rng, options[right], rng.choice(_ALONE), colour, texture)
    return _scene(options, right, f"{colour}: {options[right]}", [tiles])


def _comparison(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    textures = rng.sample(TEXTURE_NAMES, 4)
    other = rng.choice([colour for colour in COLOUR_NAMES if colour not in options])
    first = scatter(rng, [other], textures[:1])
    second = scatter(rng, arranged(rng, options, right), textures)
    seen = f"{textures[0]} {other}, {textures[0]} {options[right]}"
    return _scene(options, right, seen, [first, second])


def _size(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    corners = rng.sample(tuple(_CORNERS), 4)
    colours = arranged(rng, options, right)
    tiles = [
        tile
        for corner, shape, colour in zip(corners, _BLOCKS, colours, strict=True)
        for tile in block(rng, corner, shape, colour, rng.choice(TEXTURE_NAMES))
    ]
    return _scene(options, right, f"largest: {options[right]}", [tiles])


def _scene(options: Sequence[str], right: int, seen: str, pictures: list[list[Tile]], **slots: str) -> Scene:
    return Scene(tuple(options), right, seen, numbers(pictures), lambda: painted(pictures), slots)


SCATTERED = (
    Subject(
        "majority",
        LEADS,
        (
            "Which colour is the commonest?",
            "What colour have most tiles?",
            "Most tiles are of which colour?",
            "Name the commonest colour.",
        ),
        _majority,
    ),
    Subject(
        "colour",
        LEADS,
        (
            "What colour is the {texture} tile?",
            "Which colour has the {texture} one?",
            "The {texture} tile has which colour?",
            "Name the colour of the {texture} one.",
        ),
        _colour,
    ),
    Subject(
        "texture",
        LEADS,
        (
            "What texture has the {colour} tile?",
            "Which texture is the {colour} one of?",
            "The {colour} tile has which texture?",
            "Name the texture of the {colour} one.",
        ),
        _texture,
    ),
    Subject(
        "position",
        LEADS,
        (
            "Where is the block?",
            "In which corner is the block?",
            "The block is where?",
            "Name the corner of the block.",
        ),
        _position,
    ),
    Subject(
        "comparison",
        ("Look at both pictures.", "Here are two pictures.", "See these drawings.", "Compare them closely."),
        (
            "What colour has the first one's texture in the second?",
            "The texture of the first has which colour in the second?",
            "Find the first one's texture in the second: which colour?",
            "In the second, what colour has the texture of the first?",
        ),
        _comparison,
        pictures=2,
    ),
    Subject(
        "size",
        LEADS,
        (
            "What colour is the largest block?",
            "Which colour has the largest one?",
            "The largest block has which colour?",
            "Name the colour of the largest one.",
        ),
        _size,
    ),
)
"""The subjects."""
