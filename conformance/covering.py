"""A few cells of many, so that every combination of so many values occurs that occurs at all.

`covertable` makes the covering. It asks for constraints; here the cells themselves say what is possible, so
what is not possible is derived from them: the smallest combinations of values that no cell has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from covertable import Controller

from conformance.errors import ConformanceError

Row = Mapping[str, str]
"""Axis to value."""


def covering(rows: Sequence[Row], strength: int) -> list[Row]:
    """Rows among which every combination of `strength` values occurs that occurs among all of them.

    The same rows in the same order give the same answer.

    Args:
        rows: All that are possible, with the same axes each.
        strength: How many values a combination has; with as many as there are axes, all rows are given back.

    Returns:
        Some of the rows, in their order.

    Raises:
        ConformanceError: the library left something out.
    """
    axes = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in (rows[0] if rows else ())}
    varied = {axis: values for axis, values in axes.items() if len(values) > 1}
    if strength >= len(varied):
        return list(rows)
    made: list[Row] = Controller(
        varied, strength=strength, constraints=list(_constraints(rows, varied))
    ).make()
    chosen = {_values(row, varied) for row in made}
    found = [row for row in rows if _values(row, varied) in chosen]
    missing = combinations(rows, strength) - combinations(found, strength)
    if missing:
        raise ConformanceError(
            f"covertable left out {len(missing)} combinations of {strength} values, among them "
            f"{dict(min(missing))}; install the version that pyproject.toml names"
        )
    return found


def combinations(rows: Sequence[Row], strength: int) -> set[tuple[tuple[str, str], ...]]:
    """Every combination of `strength` values, as (axis, value) in the order of the axes, that a row has."""
    return {some for row in rows for some in itertools.combinations(row.items(), strength)}


def _values(row: Row, axes: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[axis] for axis in axes)


def _constraints(rows: Sequence[Row], axes: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Constraints that forbid every combination that no row has and all of whose parts some row has."""
    names = list(axes)
    for size in range(2, len(names) + 1):
        for some in itertools.combinations(names, size):
            known = {_values(row, dict.fromkeys(some)) for row in rows}
            parts = [
                {values[:at] + values[at + 1 :] for values in known} for at in range(size)
            ]  # of the same rows, one axis left out
            forbidden = {
                values
                for values in itertools.product(*(axes[name] for name in some))
                if values not in known
                and all(values[:at] + values[at + 1 :] in parts[at] for at in range(size))
            }
            if forbidden:
                yield {
                    "operator": "fn",
                    "requires": list(some),
                    "evaluate": lambda row, some=some, forbidden=forbidden: (
                        tuple(row[name] for name in some) not in forbidden
                    ),
                }
