"""Which drafted tokens stay (fact sheet, section 9.1).

Greedily the ones that the target would have chosen; at random by rejection (Leviathan et al. 2023), such that
every token has the target's own distribution, whatever the draft's. Behind the ones that stay comes one more
token of the target's, so that a round always gives one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_impl.runtime.sampling import Sampling, draw


@dataclass(frozen=True)
class Draft:
    """Tokens that a draft model thinks come next."""

    ids: tuple[int, ...] = ()
    probabilities: Tensor | None = None
    """What each was drawn from, float64 [len(ids), V]; None if each was its model's first choice."""


@dataclass(frozen=True)
class Acceptance:
    """Statistics of the rounds of a request, or of several."""

    drafted: tuple[int, ...] = ()
    """Tokens that were drafted in each round that had any."""
    accepted: tuple[int, ...] = ()
    """Of these, tokens that stayed."""

    @property
    def mean_length(self) -> float:
        """Mean number of tokens that a round gives, the target's own included; 1 without any round."""
        return 1 + (sum(self.accepted) / len(self.accepted) if self.accepted else 0)

    @property
    def by_position(self) -> tuple[float, ...]:
        """Part of the tokens drafted at each place of a round that stayed."""
        places = range(max(self.drafted, default=0))
        return tuple(
            sum(count > place for count in self.accepted) / sum(count > place for count in self.drafted)
            for place in places
        )

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(self.drafted + other.drafted, self.accepted + other.accepted)


def target_distribution(sampling: Sampling, logits: Tensor) -> Tensor:
    """What the target's tokens are drawn from, float64 [N, V], from its logits [N, V]."""
    return sampling.distribution(logits)


def draft_distribution(sampling: Sampling, logits: Tensor) -> Tensor:
    """What the draft's tokens are drawn from: warped as the target's are, or fewer of them would stay."""
    return sampling.distribution(logits)


def verify_greedy(chosen: Sequence[int], drafted: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a round: drafted ones as long as they are the target's choice, then that choice.

    Args:
        chosen: The target's choice at each place, one more than was drafted.
        drafted: Tokens.
    """
    agreed = next((n for n, (a, b) in enumerate(zip(chosen, drafted, strict=False)) if a != b), len(drafted))
    return tuple(chosen[: agreed + 1])


def verify_sampled(p: Tensor, draft: Draft, source: random.Random) -> tuple[int, ...]:
    """Tokens of a round: drafted ones as long as chance keeps them, then one of the target's.

    Args:
        p: The target's distribution at each place, float64 [len(draft.ids) + 1, V].
        draft: Tokens and their distributions.
        source: Of randomness: a number for each token that is judged, and one for the last token.
    """
    places = list(range(len(draft.ids)))
    chances = p[places, list(draft.ids)].tolist()
    guesses = [1.0] * len(places)
    if draft.probabilities is not None:
        guesses = draft.probabilities[places, list(draft.ids)].tolist()
    for place, token in enumerate(draft.ids):
        if source.random() >= kept(chances[place], guesses[place]):
            q = _certain(p[place], token) if draft.probabilities is None else draft.probabilities[place]
            return (*draft.ids[:place], _one(residual(p[place], q), source))
    return (*draft.ids, _one(p[-1], source))


def kept(p: float, q: float) -> float:
    """The probability that a token stays: `min(1, p / q)`; the target gives it `p`, the draft gave it `q`."""
    return min(1.0, p / q)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a token is drawn from in the place of one that did not stay: `max(p - q, 0)`, its sum made 1."""
    rest = (p - q).clamp(min=0)
    total = rest.sum()
    # Equal up to rounding: nothing is left where q exceeds p.
    return rest / total if total > 0 else p


def _certain(like: Tensor, token: int) -> Tensor:
    return torch.zeros_like(like).index_fill(0, torch.tensor([token], device=like.device), 1.0)


def _one(probabilities: Tensor, source: random.Random) -> int:
    uniform = torch.tensor([source.random()], dtype=torch.float64, device=probabilities.device)
    return int(draw(probabilities[None], uniform)[0])
