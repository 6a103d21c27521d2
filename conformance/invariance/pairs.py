"""Compare two runs of one request: tokens first, then log-probabilities.

1. Tokens are compared up to the first that differ. There the gap between the baseline's two likeliest tokens
   decides: where rounding explains it, it is a near tie, and comparison goes on with the baseline's token in
   both; else it is a failure, and nothing behind it is compared.
2. An answer must end where the baseline's does, and for the same reason; no rounding explains another end.
3. At all places that were compared, and so have the same tokens before them, log-probabilities must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from conformance.targets.protocol import Generation

FinishReason = Literal["stop", "length"]

Resume = Callable[[Sequence[tuple[int, int]]], Sequence[Generation]]
"""Prompts, each with how many of the baseline's tokens are given, to the answers that go on from there."""


@dataclass(frozen=True)
class Difference:
    """The first token that differs, in one prompt."""

    prompt: int
    place: int
    """Among the tokens of the answer."""
    expected: int | None
    """None: the baseline's answer has ended there."""
    got: int | None
    """None: the answer has ended there."""
    gap: float
    """Between the log-probabilities of the baseline's two likeliest tokens; infinite where either answer has
    ended, as one that ends by a token shows that token."""


@dataclass(frozen=True)
class Ending:
    """An answer of the baseline's tokens that has ended for another reason."""

    prompt: int
    expected: FinishReason
    got: FinishReason


@dataclass(frozen=True)
class Distance:
    """The two log-probabilities that are farthest apart."""

    value: float = 0.0
    prompt: int = 0
    place: int = 0
    token: int = 0


@dataclass
class Comparison:
    """What came of it."""

    failures: list[Difference] = field(default_factory=list)
    near_ties: list[Difference] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    farthest: Distance = field(default_factory=Distance)
    places: int = 0
    """At which tokens were compared."""

    @property
    def tied(self) -> set[int]:
        """Prompts with a near tie."""
        return {tie.prompt for tie in self.near_ties}


def compare(
    base: Sequence[Generation],
    other: Sequence[Generation],
    near: float,
    resume: Resume,
    only: Collection[int] | None = None,
) -> Comparison:
    """Compare the answers to the same prompts.

    Args:
        base: The baseline's, each with alternatives at every place.
        other: The other run's.
        near: Gaps up to this are near ties.
        resume: Asks the other run to go on.
        only: Numbers of the prompts that count; None: all.
    """
    found = Comparison()
    left = [(number, 0, answer) for number, answer in enumerate(other) if only is None or number in only]
    while left:
        tied: list[tuple[int, int]] = []
        for number, start, answer in left:
            difference = _follow(found, number, base[number], start, answer)
            if difference is None:
                found.endings += _other_reason(number, base[number], start, answer)
                continue
            if not difference.gap <= near:  # NaN is no near tie
                found.failures.append(difference)
                continue
            found.near_ties.append(difference)
            if difference.place + 1 < len(base[number].token_ids):
                tied.append((number, difference.place + 1))
        answers = resume(tied) if tied else ()
        left = [(*which, answer) for which, answer in zip(tied, answers, strict=True)]
    return found


def _follow(
    found: Comparison, number: int, base: Generation, start: int, other: Generation
) -> Difference | None:
    """Compare from a place on, up to and including the first token that differs."""
    for place in range(start, len(base.token_ids)):
        own = place - start
        found.places += 1
        ended = own >= len(other.token_ids)
        if not ended:
            _measure(found, number, place, base, other, own)
        got = None if ended else other.token_ids[own]
        if got != base.token_ids[place]:
            gap = math.inf if ended else _gap(base, place)
            return Difference(number, place, base.token_ids[place], got, gap)
    end = len(base.token_ids)
    if len(other.token_ids) > end - start and _ends_with(base, start):
        return Difference(number, end, None, other.token_ids[end - start], math.inf)
    return None


def _ends_with(base: Generation, start: int) -> bool:
    """Whether an answer that was asked for from a place on must end with the baseline's.

    One that goes on after a near tie has as many tokens as the whole, so only a stop token ends it there.
    """
    return start == 0 or base.finish_reason == "stop"


def _other_reason(number: int, base: Generation, start: int, other: Generation) -> Iterator[Ending]:
    if _ends_with(base, start) and other.finish_reason != base.finish_reason:
        yield Ending(number, base.finish_reason, other.finish_reason)


def _measure(
    found: Comparison, number: int, place: int, base: Generation, other: Generation, own: int
) -> None:
    """The largest difference of the log-probabilities of tokens that both tell of."""
    mine = base.top[place] if place < len(base.top) else {}
    theirs = other.top[own] if own < len(other.top) else {}
    common = mine.keys() & theirs.keys()
    if not common:  # twenty alternatives of which none is the same
        found.farthest = Distance(math.inf, number, place, base.token_ids[place])
    for token in common:
        value = abs(mine[token] - theirs[token])
        value = math.inf if math.isnan(value) else value
        if value > found.farthest.value:
            found.farthest = Distance(value, number, place, token)


def _gap(answer: Generation, place: int) -> float:
    """Infinite where the target does not tell the second."""
    top = sorted(answer.top[place].values(), reverse=True) if place < len(answer.top) else []
    return top[0] - top[1] if len(top) > 1 else math.inf


def repeats(tokens: Sequence[int]) -> bool:
    """Whether an answer says one token over and over: a run of it is more than half of the answer."""
    longest = max((sum(1 for _ in run) for _, run in groupby(tokens)), default=0)
    return len(tokens) > 2 and 2 * longest > len(tokens)
