"""Charts over time, worked out here and drawn by a template as SVG: no script, no picture file.

Runs stand at equal steps, oldest first, because nights differ less in time than in what happened. Everything
is in units of the drawing; its text keeps its size because a narrow window scrolls instead of shrinking it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 34.0
"""Margins around the plot."""
WIDTH, HEIGHT = 860.0, 270.0
MOST_LABELS = 8
"""Dates under the horizontal axis."""
MOST_STEPS = 6
"""Lines across the plot."""


@dataclass(frozen=True)
class Reading:
    """What one run has to say: a value with its limits, and the lines that it is held against."""

    name: str
    """Of the run, under the axis."""
    words: str
    """The whole reading for people, shown on the mark."""
    shape: str
    """What became of it: `pass`, `fail`, `inconclusive`, or empty."""
    value: float | None = None
    """None where the run gave none."""
    low: float | None = None
    high: float | None = None
    lines: tuple[float | None, ...] = ()
    """One value for each line of the chart."""
    own: bool = False
    """It is of the run of this dashboard."""


@dataclass(frozen=True)
class Mark:
    """A reading, drawn."""

    x: float
    y: float
    top: float
    bottom: float
    """Ends of the interval; equal to `y` where there is none."""
    reading: Reading


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A drawing, in its own units."""

    marks: list[Mark]
    lines: list[list[str]]
    """For each line its stretches, as points of a polyline."""
    rows: list[Tick]
    """Lines across, with their values."""
    columns: list[Tick]
    """Runs that are named under the axis."""
    zero: float | None
    """Where zero is, if inside and not at the bottom."""
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    bottom: float = HEIGHT - BOTTOM


def chart(readings: Sequence[Reading], *, percent: bool = True) -> Chart | None:
    """Lay out readings; None where no run has a value.

    Args:
        readings: One for each run, oldest first.
        percent: Values are shares; otherwise they are differences of shares, told in points.
    """
    values = [v for r in readings for v in (r.value, r.low, r.high, *r.lines) if v is not None]
    if not any(reading.value is not None for reading in readings):
        return None
    steps = _steps(min(values), max(values), ends=(0.0, 1.0) if percent else (-1.0, 1.0))
    low, high = steps[0], steps[-1]

    def x(number: int) -> float:
        return LEFT + (number + 0.5) / len(readings) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def placed(number: int) -> list[tuple[float, float | None]]:
        return [(x(number), None if line is None else y(line)) for line in readings[number].lines]

    marks = [
        Mark(
            x=x(number),
            y=y(reading.value),
            top=y(reading.value if reading.high is None else reading.high),
            bottom=y(reading.value if reading.low is None else reading.low),
            reading=reading,
        )
        for number, reading in enumerate(readings)
        if reading.value is not None
    ]
    every = math.ceil(len(readings) / MOST_LABELS)
    half = (WIDTH - LEFT - RIGHT) / len(readings) / 2
    return Chart(
        marks=marks,
        lines=[_stretches(marked, half) for marked in zip(*map(placed, range(len(readings))), strict=True)],
        rows=[Tick(y(step), _label(step, steps, percent=percent)) for step in steps],
        columns=[Tick(x(n), r.name) for n, r in enumerate(readings) if (len(readings) - 1 - n) % every == 0],
        zero=y(0.0) if low < 0 < high else None,
    )


def _steps(low: float, high: float, ends: tuple[float, float]) -> list[float]:
    """Round values that hold all of these, some room besides, and no more than there can be."""
    room = max((high - low) * 0.05, 0.002)
    low, high = max(low - room, ends[0]), min(high + room, ends[1])
    wanted = (high - low) / (MOST_STEPS - 1)
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 9) for number in range(first, last + 1)]


def _label(value: float, steps: Sequence[float], *, percent: bool) -> str:
    digits = max(0, -math.floor(math.log10((steps[1] - steps[0]) * 100) + 1e-9))
    text = f"{100 * value:.{digits}f}"
    return f"{text} %" if percent else f"{'+' if value > 0 else ''}{text}".replace("-", "\u2212")


def _stretches(places: Sequence[tuple[float, float | None]], half: float) -> list[str]:
    """A line that is level within each run's step; broken where there is nothing."""
    found: list[list[str]] = [[]]
    for x, y in places:
        if y is None:
            found.append([])
        else:
            found[-1] += [f"{x - half:.1f},{y:.1f}", f"{x + half:.1f},{y:.1f}"]
    return [" ".join(points) for points in found if points]
