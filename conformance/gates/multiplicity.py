"""Many gates at once: p-values that take into account how many there are.

A target's primary gate stands alone. Where a matrix of cells is judged, some alarm by chance: cells that
decide are read by Holm's p-values, which keep the chance of any false alarm at alpha, and lists of what to
look into by Benjamini and Hochberg's, which keep the share of false alarms among them (Holm 1979; Benjamini &
Hochberg 1995).
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: those up to alpha hold together with an error of alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    ordered = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, place in enumerate(ordered):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: of those up to q, a share of q is false, on average."""
    return [float(p) for p in stats.false_discovery_control(p_values)] if p_values else []


def false_alarms_a_year(alpha: float, gates: int = 1) -> float:
    """Expected number, of a gate that runs every night where nothing is ever wrong."""
    return 365 * gates * alpha
