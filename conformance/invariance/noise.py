"""The noise floor of a target: how far it is from itself where nothing that matters has changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from conformance.invariance.asking import Answers, Asker, Prompts
from conformance.invariance.pairs import Comparison, compare
from conformance.invariance_suite import Way
from conformance.targets.protocol import DType, Feature, Generation

Benign = Literal["threads", "alone"]
"""Two threads instead of one; each prompt in a batch of its own."""

LEAST: dict[DType, float] = {"float32": 1e-5, "bfloat16": 0.05}
"""Rounding that may not show in the few sums that benign variants change: some units in the last place of a
logit, which the soft cap keeps below 30 (bfloat16: of a hidden state)."""
CAP: dict[DType, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""Above it no comparison would say anything."""


@dataclass(frozen=True)
class Noise:
    """What was measured."""

    dtype: DType
    measured: dict[Benign, float]
    """The largest difference of a log-probability, for each benign variant that the target has."""

    @property
    def floor(self) -> float:
        """The largest, and never less than what rounding alone can do."""
        return max(LEAST[self.dtype], *self.measured.values()) if self.measured else LEAST[self.dtype]

    @property
    def near(self) -> float:
        """Gaps up to this are near ties: either logit may have moved by the floor."""
        return 2 * self.floor

    @property
    def too_high(self) -> str:
        """Why nothing can be compared; empty if it can."""
        worst = max(self.measured, key=lambda name: self.measured[name], default=None)
        if worst is None or self.measured[worst] <= CAP[self.dtype]:
            return ""
        return (
            f"the target differs from itself by {self.measured[worst]:.3g} ({_WORDS[worst]}), above "
            f"{CAP[self.dtype]:g} of {self.dtype}: no comparison says anything"
        )


_WITH_THREADS = 2
"""Tokens, of the longest prompt alone."""
_ALONE = 24
"""Most prompts that are asked one by one: of more, so many at equal distances."""

_WORDS: dict[Benign, str] = {
    "threads": "two threads against one",
    "alone": "each prompt alone against all together",
}


def measure(
    asker: Asker, way: Way, prompts: Prompts, limit: int, features: tuple[Feature, ...], judged: Way
) -> Noise:
    """Measure a target against itself.

    Args:
        asker: Asks it.
        way: How it is set up.
        prompts: At least one.
        limit: Most tokens of an answer.
        features: What the target can do.
        judged: The other side of the pair: what it changes is judged, and so is no benign variant.

    Raises:
        EngineError, WorkerDiedError, TargetTimeoutError: from the target.
    """
    base = asker.greedy(way, prompts, limit)
    variants: dict[Benign, Way] = {}
    if judged.given == way.given:
        variants["alone"] = way.model_copy(update={"given": "alone"})
    if "threads" in features and judged.threads == way.threads:
        variants["threads"] = way.model_copy(update={"threads": 2})
    measured = {}
    for name, variant in variants.items():
        asked, own, most = prompts, base, limit
        if name == "threads":
            # Small models wait for threads a hundred times longer than they compute.
            asked, most = prompts.pick([longest(prompts)]), min(limit, _WITH_THREADS)
            own = asker.greedy(way, asked, most)
        elif len(prompts.ids) > _ALONE:
            chosen = [number * len(prompts.ids) // _ALONE for number in range(_ALONE)]
            asked = prompts.pick(chosen)
            own = Answers(tuple(tuple(turn[number] for number in chosen) for turn in base.rounds))
        # Whatever differs counts as a near tie, and is followed teacher-forced on the baseline's tokens.
        (found, *_), _ = follow(asker, variant, asked, most, own, float("inf"))
        measured[name] = found.farthest.value
    return Noise(way.rounded_to, measured)


def longest(prompts: Prompts) -> int:
    """Number of the longest prompt."""
    return max(range(len(prompts.ids)), key=lambda number: len(prompts.ids[number]))


def follow(
    asker: Asker,
    way: Way,
    prompts: Prompts,
    limit: int,
    base: Answers,
    near: float,
    only: Collection[int] | None = None,
) -> tuple[list[Comparison], Answers]:
    """Ask in another way and compare with the baseline, each time that the prompts were asked.

    Raises:
        EngineError, WorkerDiedError, TargetTimeoutError: from the target.
    """
    expected = base.rounds[0]
    answers = asker.greedy(way, prompts, limit)

    def resume(places: Sequence[tuple[int, int]]) -> tuple[Generation, ...]:
        rest = prompts.pick([number for number, _ in places])
        given = rest.followed_by([expected[number].token_ids[:count] for number, count in places])
        return asker.greedy(way.model_copy(update={"repeat": 1}), given, limit).rounds[0]

    return [compare(expected, each, near, resume, only) for each in answers.rounds], answers
