"""Questions about tiles that lie scattered over a picture: six subjects."""

from __future__ import annotations

import random
from collections.abc import Sequence

from model_impl.nano.subjects.drawing import COLOUR_NAMES, TEXTURE_NAMES, Canvas, Tile
from model_impl.nano.subjects.exercise import Media, Scene, Subject, arranged, four

ROWS, COLUMNS = 7, 8
LEADS = ("Look at the picture.", "Here is a picture.", "See this drawing.", "Look closely.")
_CELLS = tuple((row, column) for row in range(ROWS) for column in range(COLUMNS))
_COUNTS = range(1, 7)
_OTHERS = (3, 8)
"""Fewest and most tiles beside those that are counted."""
_SIZES = (8, 16, 24, 34, 46)
_REGIONS = {
    "northwest": (0, 0),
    "north": (0, 3),
    "northeast": (0, 6),
    "west": (3, 0),
    "centre": (3, 3),
    "east": (3, 6),
    "southwest": (5, 0),
    "south": (5, 3),
    "southeast": (5, 6),
}
"""Row and column of the first cell of each."""
_REGION_ROWS = {0: 2, 3: 1, 5: 2}
"""How many rows of cells a region has, by its first."""


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


def _counting(rng: random.Random) -> Scene:
    options, right = four(rng, _COUNTS)
    asked = rng.choice(COLOUR_NAMES)
    rest = [colour for colour in COLOUR_NAMES if colour != asked]
    colours = [asked] * options[right] + rng.choices(rest, k=rng.randint(*_OTHERS))
    tiles = scatter(rng, colours, rng.choices(TEXTURE_NAMES, k=len(colours)))
    counted = [tile for tile in in_order(tiles) if tile.colour == asked]
    seen = " ".join(f"{tile.texture} {number}" for number, tile in enumerate(counted, 1))
    return _scene([str(count) for count in options], right, f"{asked}: {seen}", [tiles], colour=asked)


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
    options, right = four(rng, tuple(_REGIONS))
    colours = rng.sample(COLOUR_NAMES, 4)
    tiles = [
        Tile(colour, rng.choice(TEXTURE_NAMES), *_cell_of(rng, region))
        for colour, region in zip(colours, arranged(rng, options, right), strict=True)
    ]
    return _scene(options, right, f"{colours[0]}: {options[right]}", [tiles], colour=colours[0])


def _comparison(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    textures = rng.sample(TEXTURE_NAMES, 4)
    other = rng.choice([colour for colour in COLOUR_NAMES if colour not in options])
    first = scatter(rng, [other], textures[:1])
    second = scatter(rng, arranged(rng, options, right), textures)
    seen = f"{textures[0]} {other}, {textures[0]} {options[right]}"
    return _scene(options, right, seen, [first, second])


def _size(rng: random.Random, *, largest: bool) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    sizes = sorted(rng.sample(_SIZES, 4), reverse=largest)
    colours = arranged(rng, options, right)
    cells = rng.sample(_CELLS, 4)
    tiles = [Tile(c, "plain", *cell, size) for c, cell, size in zip(colours, cells, sizes, strict=True)]
    word = "largest" if largest else "smallest"
    return _scene(options, right, f"{word}: {options[right]}", [tiles], extreme=word)


def _either_size(rng: random.Random) -> Scene:
    return _size(rng, largest=rng.random() < 0.5)


def _cell_of(rng: random.Random, region: str) -> tuple[int, int]:
    row, column = _REGIONS[region]
    return row + rng.randrange(_REGION_ROWS[row]), column + rng.randrange(2)


def _scene(options: Sequence[str], right: int, seen: str, pictures: list[list[Tile]], **slots: str) -> Scene:
    return Scene(tuple(options), right, seen, numbers(pictures), lambda: painted(pictures), slots)


SCATTERED = (
    Subject(
        "counting",
        LEADS,
        (
            "How many tiles are {colour}?",
            "What is the number of {colour} tiles?",
            "Count the {colour} tiles.",
            "How often is there a {colour} tile?",
        ),
        _counting,
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
            "Where is the {colour} tile?",
            "In which place is the {colour} one?",
            "The {colour} tile is where?",
            "Name the place of the {colour} tile.",
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
            "What colour is the {extreme} tile?",
            "Which colour has the {extreme} one?",
            "The {extreme} tile has which colour?",
            "Name the colour of the {extreme} one.",
        ),
        _either_size,
    ),
)
"""The subjects."""
