"""Choosing the next token: greedily, or at random from the model's warped distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_impl.errors import ModelError


class GenerationError(ModelError):
    """A request for generation is out of range or does not fit the model, or the model computes nonsense."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    In this order, as transformers has it: suppressed tokens go, logits are divided by the temperature, the
    `top_k` most likely tokens stay, and of these the smallest set that holds `top_p` of their probability.
    """

    temperature: float = 1.0
    """0 is greedy: the most likely token that is not suppressed, whatever `top_k` and `top_p` say."""
    top_k: int | None = None
    """Tokens as likely as the last one stay too."""
    top_p: float = 1.0
    """Above 0. The most likely token always stays; of equally likely ones at the edge, the higher ids."""
    suppress: tuple[int, ...] = ()
    """Ids that are never chosen."""

    def __post_init__(self) -> None:
        # The comparisons are written such that NaN fails them.
        if not 0 <= self.temperature < math.inf:
            raise GenerationError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k is {self.top_k}; it must be 1 or above, or None for no limit")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is {self.top_p}; it must be above 0, and at most 1")
        if any(token < 0 for token in self.suppress):
            raise GenerationError(f"suppress holds {min(self.suppress)}; token ids are not negative")

    @classmethod
    def greedy(cls, suppress: Sequence[int] = ()) -> Sampling:
        """Always the most likely token."""
        return cls(temperature=0.0, suppress=tuple(suppress))

    @classmethod
    def published(cls, suppress: Sequence[int] = ()) -> Sampling:
        """Defaults of the instruction-tuned checkpoints (fact sheet, section 1.6).

        Args:
            suppress: The 12B checkpoints ask for (258883, 258882), the ends of audio and image.
        """
        return cls(temperature=1.0, top_k=64, top_p=0.95, suppress=tuple(suppress))

    def check(self, vocab_size: int) -> None:
        """Refuse what leaves a vocabulary no token, or suppresses a token that it does not have.

        Raises:
            GenerationError: as said.
        """
        foreign = [token for token in self.suppress if token >= vocab_size]
        if foreign:
            raise GenerationError(f"suppress holds {foreign[0]}; the vocabulary has only {vocab_size} tokens")
        if len(set(self.suppress)) == vocab_size:
            raise GenerationError(f"suppress holds all {vocab_size} tokens of the vocabulary")

    def distribution(self, logits: Tensor) -> Tensor:
        """The probabilities that tokens are chosen with.

        Args:
            logits: float [N, V].

        Returns:
            float64 [N, V]; one single 1 in each row if greedy.

        Raises:
            GenerationError: as `check`.
        """
        if self.temperature == 0:
            ids = self._allowed(logits).argmax(dim=-1, keepdim=True)
            probabilities = torch.ones_like(ids, dtype=torch.float64)
        else:
            probabilities, ids = self._candidates(logits)
        return torch.zeros_like(logits, dtype=torch.float64).scatter(1, ids, probabilities)

    def choose(self, logits: Tensor, uniforms: Sequence[float]) -> Tensor:
        """One token for each row.

        Args:
            logits: float [N, V].
            uniforms: One number in [0, 1) for each row: which token it is. Not read if greedy.

        Returns:
            int64 [N].

        Raises:
            GenerationError: as `check`.
        """
        if self.temperature == 0:
            return self._allowed(logits).argmax(dim=-1)
        probabilities, ids = self._candidates(logits)
        drawn = draw(probabilities, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
        return ids.gather(1, drawn[:, None])[:, 0]

    def _allowed(self, logits: Tensor) -> Tensor:
        """Logits [N, V] in which suppressed tokens have minus infinity."""
        if not self.suppress:
            return logits
        self.check(logits.shape[-1])
        return logits.index_fill(-1, torch.tensor(self.suppress, device=logits.device), float("-inf"))

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, float64 [N, M], and ids [N, M] of all tokens that may be chosen.

        M is the vocabulary only without `top_k`; the nucleus sorts the candidates alone.
        """
        scores = self._allowed(logits).double()
        # The largest becomes 0, so that no temperature, however low, makes it overflow.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature
        scores, ids = _top_k(scores, self.top_k)
        if self.top_p < 1:
            scores = _top_p(scores, self.top_p)
        return scores.softmax(dim=-1), ids


def _top_k(scores: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Scores and ids of the tokens that are at least as likely as the k-th, in the order of their ids.

    Args:
        scores: [N, V].
        k: None for all.

    Returns:
        Two tensors [N, M], where M suits the row with most ties; in other rows, what is too much has minus
        infinity.
    """
    if k is None or k >= scores.shape[-1]:
        return scores, torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    last = scores.topk(k).values[:, -1:]
    most = int((scores >= last).sum(dim=-1).max())
    ids = scores.topk(most).indices.sort(dim=-1).values
    kept = scores.gather(1, ids)
    return kept.masked_fill(kept < last, float("-inf")), ids


def _top_p(scores: Tensor, p: float) -> Tensor:
    """Scores [N, M] with minus infinity outside the smallest set that holds `p` of the probability."""
    ascending, order = scores.sort(dim=-1, stable=True)
    # A token goes if it and all less likely ones hold no more than the rest.
    outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    outside[:, -1] = False
    return scores.masked_fill(outside.scatter(1, order, outside), float("-inf"))


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the first entry where the running sum of a row exceeds its uniform part of the total.

    Args:
        probabilities: float64 [N, M], each row with a positive sum.
        uniforms: float64 [N], in [0, 1).

    Returns:
        int64 [N]; never an entry of probability zero.
    """
    running = probabilities.cumsum(dim=-1)
    # A float64 below 1 times the total is below the total, rounded too: the index is within the row.
    parts = uniforms[:, None] * running[:, -1:]
    return torch.searchsorted(running, parts, right=True)[:, 0]
