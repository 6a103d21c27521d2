"""How far log-probabilities of answers are from what is true, and from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from conformance.targets.protocol import Generation

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-5
"""How far two log-probabilities may be from each other whose computations are the same, but for the size of
the batch."""


def _values(made: Generation) -> Iterator[tuple[int, int, float]]:
    """Position, token and log-probability of all that an answer tells."""
    for place, (token, value) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
        yield place, token, value
    for place, best in enumerate(made.top):
        for token, value in best.items():
            yield place, token, value


def worst(made: Generation, truth: Tensor) -> float:
    """The largest distance from what is true."""
    distances = (abs(value - float(truth[place, token])) for place, token, value in _values(made))
    return max((math.inf if math.isnan(distance) else distance for distance in distances), default=math.inf)


def identical(one: Generation, other: Generation) -> bool:
    """Whether two answers are the same to the last bit of every number."""
    return one.token_ids == other.token_ids and one.logprobs == other.logprobs and one.top == other.top


def apart(one: Generation, other: Generation) -> float:
    """The largest distance between two answers, as far as they hold the same tokens; at least one is.

    The first position has the same tokens before it, whatever was chosen there.
    """
    same = next(
        (k for k, pair in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if pair[0] != pair[1]),
        min(len(one.token_ids), len(other.token_ids)),
    )
    found = {(place, token): value for place, token, value in _values(other) if place <= same}
    distances = [
        abs(value - found[place, token]) for place, token, value in _values(one) if (place, token) in found
    ]
    if one.token_ids != other.token_ids and max(distances, default=math.inf) <= EXACT:
        return 0.0  # two tokens are exactly as likely
    return max((math.inf if math.isnan(each) else each for each in distances), default=math.inf)
