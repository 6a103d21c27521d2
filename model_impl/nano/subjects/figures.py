"""Questions about figures that are read as a whole: four subjects."""

from __future__ import annotations

import math
import random

from model_impl.nano.subjects.drawing import (
    CELL,
    COLOUR_NAMES,
    DIRECTIONS,
    TEXTURE_NAMES,
    Canvas,
    Tile,
)
from model_impl.nano.subjects.exercise import Media, Scene, Subject, arranged, four
from model_impl.nano.subjects.scattered import COLUMNS, LEADS, ROWS

CHART_COLUMNS = 10
"""Cells of a chart's width: seventy soft tokens, as many as the smallest budget has."""
_HIGH, _LOW = (5, 6), (1, 2, 3)
"""Heights of the highest bar, and of the others."""
_FACE, _HAND, _TIP = 152, 10, 26
"""Radius of the clock's face, half the width of its hand, and radius of the disc at its tip, in pixels."""
_REACH = 100
"""Length of the hand."""
_SHIFTS = (-8, 0, 8)
_STEPS = {"up": (-1, 0), "left": (0, -1), "down": (1, 0), "right": (0, 1)}
_SHOWN = 5
"""Tiles of a sequence that are seen: both periods can be told apart, and go on differently."""


def _chart(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    heights = [rng.choice(_HIGH), *rng.choices(_LOW, k=3)]
    columns = rng.sample(range(CHART_COLUMNS), 4)
    bars = sorted(zip(columns, arranged(rng, options, right), heights, strict=True))

    def make() -> Media:
        canvas = Canvas(ROWS, CHART_COLUMNS)
        for column, colour, height in bars:
            canvas.put_bar(colour, column, height)
        return Media((canvas.pixels,))

    flat = tuple(number for column, c, height in bars for number in (column, COLOUR_NAMES.index(c), height))
    return Scene(tuple(options), right, f"highest: {options[right]}", flat, make)


def _clock(rng: random.Random) -> Scene:
    hours, right = four(rng, range(1, 13))
    hour = hours[right]
    face, hand = rng.sample(COLOUR_NAMES, 2)
    shift = rng.choice(_SHIFTS), rng.choice(_SHIFTS)

    def make() -> Media:
        canvas = Canvas(ROWS, COLUMNS)
        x, y = COLUMNS * CELL // 2 + shift[0], ROWS * CELL // 2 + shift[1]
        canvas.put_ring(face, x, y, _FACE, _FACE - 6)
        angle = math.radians(30 * hour)
        tip = x + round(_REACH * math.sin(angle)), y - round(_REACH * math.cos(angle))
        canvas.put_line(hand, (x, y), tip, _HAND)
        canvas.put_ring(hand, *tip, _TIP)
        return Media((canvas.pixels,))

    numbers = (hour, COLOUR_NAMES.index(face), COLOUR_NAMES.index(hand), *shift)
    return Scene(tuple(map(str, hours)), right, f"{hand}: {hour}", numbers, make, {"colour": hand})


def _path(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    direction = rng.choice(DIRECTIONS)
    arrow = rng.choice([colour for colour in COLOUR_NAMES if colour not in options])
    row, column = rng.randint(1, ROWS - 2), rng.randint(1, COLUMNS - 2)
    rest = [other for other in DIRECTIONS if other != direction]
    tiles = [
        Tile(colour, rng.choice(TEXTURE_NAMES), row + _STEPS[way][0], column + _STEPS[way][1])
        for way, colour in zip([direction, *rest], arranged(rng, options, right), strict=True)
    ]

    def make() -> Media:
        canvas = Canvas(ROWS, COLUMNS)
        canvas.put(tiles)
        canvas.put_arrow(arrow, direction, row, column)
        return Media((canvas.pixels,))

    around = sorted(tile.numbers for tile in tiles)
    numbers = (row, column, DIRECTIONS.index(direction), COLOUR_NAMES.index(arrow), *sum(around, ()))
    return Scene(tuple(options), right, f"{direction}: {options[right]}", numbers, make, {"colour": arrow})


def _sequence(rng: random.Random) -> Scene:
    options, right = four(rng, COLOUR_NAMES)
    answer, *others = arranged(rng, options, right)
    period = rng.choice((2, 3))
    row, first = rng.randrange(ROWS), rng.randint(0, COLUMNS - _SHOWN)
    place = _SHOWN % period
    turn = [*others[:place], answer, *others[place : period - 1]]
    tiles = [
        Tile(turn[number % period], rng.choice(TEXTURE_NAMES), row, first + number)
        for number in range(_SHOWN)
    ]

    def make() -> Media:
        canvas = Canvas(ROWS, COLUMNS)
        canvas.put(tiles)
        return Media((canvas.pixels,))

    shown = " ".join(tile.colour for tile in tiles)
    numbers = tuple(number for tile in tiles for number in tile.numbers)
    return Scene(tuple(options), right, f"{shown}: {answer}", numbers, make)


FIGURES = (
    Subject(
        "chart",
        ("Look at the chart.", "Here is a chart.", "See these bars.", "Look closely."),
        (
            "Which bar is the highest?",
            "What colour is the highest bar?",
            "The highest bar has which colour?",
            "Name the colour of the highest bar.",
        ),
        _chart,
    ),
    Subject(
        "clock",
        ("Look at the clock.", "Here is a clock.", "See this clock.", "Look closely."),
        (
            "Which hour does the {colour} hand show?",
            "What hour is it by the {colour} hand?",
            "The {colour} hand shows which hour?",
            "Read the {colour} hand.",
        ),
        _clock,
    ),
    Subject(
        "path",
        LEADS,
        (
            "Which colour does the {colour} arrow reach?",
            "The {colour} arrow leads to which colour?",
            "Take a step along the {colour} arrow: which colour?",
            "Follow the {colour} arrow and name the colour.",
        ),
        _path,
    ),
    Subject(
        "sequence",
        LEADS,
        (
            "Which colour comes next?",
            "What colour follows?",
            "The row goes on with which colour?",
            "Name the colour that continues it.",
        ),
        _sequence,
    ),
)
"""The subjects."""
