"""How many tokens a round of speculation brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conformance.targets.protocol import Generation

CONFIDENCE = 0.99
_RESAMPLES = 2000
_BATCH = 50
"""Resamples in memory at a time: a drawn case has some ten thousand answers."""


@dataclass(frozen=True)
class Length:
    """Mean tokens a round: one of the target, and those of the draft that it accepted."""

    mean: float
    by_place: tuple[float, ...]
    """Of the drafts at each place of a round, the part that was accepted."""


def rounds(answers: Sequence[Generation]) -> int | None:
    """How many rounds had a draft; None where the target does not tell."""
    told = [answer.accepted for answer in answers if answer.accepted is not None]
    return sum(map(len, told)) if told else None


def length(answers: Sequence[Generation]) -> Length | None:
    """Of all answers together; None where none tells of a round that had a draft."""
    told = [answer.accepted for answer in answers if answer.accepted]
    if not told:
        return None
    return Length(1 + sum(map(sum, told)) / sum(map(len, told)), _by_place(answers))


def interval(answers: Sequence[Generation]) -> tuple[float, float] | None:
    """Limits of the mean's bootstrap interval at 99 %; None where fewer than two answers tell of a round.

    By answer, as the rounds of one are not independent.
    """
    told = [answer for answer in answers if answer.accepted]
    if len(told) < 2:
        return None
    import numpy as np
    from scipy import stats  # it takes a while to import, and most suites have no statistics

    accepted = np.array([sum(answer.accepted or ()) for answer in told], dtype=float)
    turns = np.array([len(answer.accepted or ()) for answer in told], dtype=float)

    def mean(part: np.ndarray, whole: np.ndarray, axis: int = -1) -> np.ndarray:
        result: np.ndarray = 1 + part.sum(axis=axis) / whole.sum(axis=axis)
        return result

    found = stats.bootstrap(
        (accepted, turns),
        mean,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        rng=np.random.default_rng(0),
    )
    limits = found.confidence_interval
    return float(limits.low), float(limits.high)


def _by_place(answers: Sequence[Generation]) -> tuple[float, ...]:
    pairs = [pair for answer in answers for pair in zip(answer.accepted or (), answer.drafted, strict=False)]
    found = []
    for place in range(max((drafted for _, drafted in pairs), default=0)):
        tried = sum(drafted > place for _, drafted in pairs)
        found.append(sum(accepted > place for accepted, _ in pairs) / tried)
    return tuple(found)
