"""Drawing: pictures of cells, a soft token each.

A cell is what the vision tower makes one soft token of. Pictures have sizes at which they already fill the
smallest budget, so that no processor resizes them and every engine sees the same pixels. Whether a pixel
is coloured is decided with integers alone: the same pixels on every machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_impl.nano.lesson import Picture

CELL = 48
"""Pixels of a cell along each side: three patches of sixteen."""
GROUND = (128, 128, 128)
"""Half grey, which the tower's patch embedding maps to about nothing."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (240, 16, 16),
    "green": (16, 200, 16),
    "blue": (16, 16, 240),
    "yellow": (240, 240, 16),
    "purple": (200, 16, 200),
    "cyan": (16, 220, 220),
    "white": (255, 255, 255),
}
"""Corners of the colour cube, nearly: as far apart as colours get. Black is what textures are drawn in."""
_BLACK = (0, 0, 0)
DIRECTIONS = ("up", "left", "down", "right")
"""Of arrows, each a quarter turn to the left of the one before."""
FULL = 46
"""Pixels of a tile along each side: a line around it stays free."""

_CODE = np.array([1 << 16, 1 << 8, 1])
"""Three bytes to one number."""
_PATCH, _HALF = 16, 8
_Y, _X = np.indices((CELL, CELL))
"""Rows and columns of a cell's pixels."""
_PATCH_Y, _PATCH_X = _Y % _PATCH, _X % _PATCH
"""The same within each patch."""

Mask = NDArray[np.bool_]
TEXTURES: dict[str, Mask] = {
    "plain": np.ones((CELL, CELL), dtype=np.bool_),
    "striped": _PATCH_Y < _HALF,
    "barred": _PATCH_X < _HALF,
    "checked": (_X // _HALF + _Y // _HALF) % 2 == 0,
    "slanted": (_X + _Y) % _PATCH < _HALF,
    "dotted": (2 * _PATCH_X - 15) ** 2 + (2 * _PATCH_Y - 15) ** 2 <= 11**2,
}
"""Which pixels have the tile's colour; the others are black.

Textures repeat in every patch and darken it whatever the colour, so that the patch embedding alone tells them
apart: a tower learns to see outlines, or contrasts of either sign, only from far more lessons."""
_ARROWHEADS: Mask = abs(2 * _PATCH_X - 15) <= _PATCH_Y
"""Pointing up."""
COLOUR_NAMES, TEXTURE_NAMES = tuple(COLOURS), tuple(TEXTURES)


@dataclass(frozen=True)
class Tile:
    """A square in the middle of a cell."""

    colour: str
    texture: str
    row: int
    column: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of it as numbers."""
        kind = COLOUR_NAMES.index(self.colour), TEXTURE_NAMES.index(self.texture)
        return (*kind, self.row, self.column)


class Canvas:
    """A picture in the making.

    Args:
        rows: Of cells.
        columns: Of cells.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.pixels: Picture = np.full((rows * CELL, columns * CELL, 3), GROUND, dtype=np.uint8)

    def put(self, tiles: Iterable[Tile]) -> None:
        """Draw tiles."""
        for tile in tiles:
            self._fill(tile.row, tile.column, TEXTURES[tile.texture], tile.colour)

    def put_arrow(self, colour: str, direction: str, row: int, column: int) -> None:
        """Draw a tile of arrowheads."""
        self._fill(row, column, np.rot90(_ARROWHEADS, DIRECTIONS.index(direction)), colour)

    def put_bar(self, colour: str, column: int, height: int) -> None:
        """Draw a bar that stands on the lower edge, so many cells high."""
        rows = self.pixels.shape[0] // CELL
        self.put(Tile(colour, "plain", row, column) for row in range(rows - height, rows))

    def put_ring(self, colour: str, x: int, y: int, radius: int, hole: int = 0) -> None:
        """Draw a ring around a pixel; a disc if it has no hole."""
        rows, columns = self._places
        distance = (columns - x) ** 2 + (rows - y) ** 2
        self.pixels[(distance <= radius**2) & (distance >= hole**2)] = COLOURS[colour]

    def put_line(self, colour: str, start: tuple[int, int], end: tuple[int, int], width: int) -> None:
        """Draw a line from pixel to pixel, each column and row, so many pixels wide to either side."""
        rows, columns = self._places
        across, down = end[0] - start[0], end[1] - start[1]
        length = across**2 + down**2
        along = (columns - start[0]) * across + (rows - start[1]) * down
        beside = (columns - start[0]) * down - (rows - start[1]) * across
        inside = (along >= 0) & (along <= length) & (beside**2 <= width**2 * length)
        self.pixels[inside] = COLOURS[colour]

    @property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows, columns = np.ogrid[: self.pixels.shape[0], : self.pixels.shape[1]]
        return rows, columns

    def _fill(self, row: int, column: int, mask: Mask, colour: str) -> None:
        margin = (CELL - FULL) // 2
        inside = slice(margin, margin + FULL)
        cell = self.pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell[inside, inside] = _BLACK
        cell[inside, inside][mask[inside, inside]] = COLOURS[colour]


def png(picture: Picture) -> bytes:
    """A picture of at most 256 colours as a PNG file with a palette."""
    coded = picture @ _CODE
    codes = np.unique(coded)
    image = Image.fromarray(np.searchsorted(codes, coded).astype(np.uint8), mode="P")
    image.putpalette(b"".join(int(code).to_bytes(3, "big") for code in codes))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
