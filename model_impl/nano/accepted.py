"""How much of what a draft head says its target accepts, on prompts that neither has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.paged import CacheSizes
from model_impl.runtime.request import Request
from model_impl.runtime.runner import LocalRunner
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.proposer import Eagle3Proposer
from model_impl.speculative.verify import Acceptance
from model_impl.text import TextModel

MOST_TOKENS = 192
"""Of an answer."""
DRAFTED = 3
"""Tokens a round."""
CONFIDENCE = 0.99
_RESAMPLES = 2000
_BATCH = 50
"""Resamples in memory at a time."""
_AT_ONCE = 64
_BLOCK = 16


@dataclass(frozen=True)
class Accepted:
    """Statistics of a head, over the prompts whose answers had a draft."""

    prompts: int
    rounds: int
    """That had a draft."""
    tokens_a_round: float
    """Mean, the target's own token included."""
    interval: tuple[float, float]
    """Of that mean, by bootstrap over prompts: the rounds of one answer are not independent."""
    by_place: tuple[float, ...]
    """Of the tokens drafted at each place of a round, the part that was accepted."""

    def rounded(self) -> dict[str, Any]:
        """For a manifest."""
        return {
            "prompts": self.prompts,
            "rounds": self.rounds,
            "tokens_a_round": round(self.tokens_a_round, 4),
            "interval": [round(limit, 4) for limit in self.interval],
            "confidence": CONFIDENCE,
            "by_place": [round(part, 4) for part in self.by_place],
        }


def measure(
    target: TextModel, head: Eagle3, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> Accepted:
    """Let a head draft for greedy answers.

    Args:
        target: The model that it drafts for.
        head: It.
        prompts: Token ids.
        stop_ids: Tokens that end an answer.

    Raises:
        ConfigError: the head was not made for this target.
        ValueError: fewer than two answers had a draft.
    """
    return summary(_rounds(target, head, prompts, stop_ids))


def summary(found: Sequence[Acceptance]) -> Accepted:
    """Statistics of the answers to several prompts.

    Raises:
        ValueError: fewer than two of them had a draft.
    """
    told = [one for one in found if one.accepted]
    if len(told) < 2:
        raise ValueError(f"{len(told)} of {len(found)} answers had a draft; an interval needs two or more")
    whole = sum(told, Acceptance())
    return Accepted(len(told), len(whole.accepted), whole.mean_length, _interval(told), whole.by_position)


def _interval(told: Sequence[Acceptance]) -> tuple[float, float]:
    accepted = torch.tensor([float(sum(one.accepted)) for one in told], dtype=torch.float64)
    rounds = torch.tensor([float(len(one.accepted)) for one in told], dtype=torch.float64)
    source = torch.Generator().manual_seed(0)
    means = []
    for _ in range(_RESAMPLES // _BATCH):
        drawn = torch.randint(len(told), (_BATCH, len(told)), generator=source)
        means.append(1 + accepted[drawn].sum(dim=1) / rounds[drawn].sum(dim=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _rounds(
    target: TextModel, head: Eagle3, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> list[Acceptance]:
    longest = max(map(len, prompts)) + MOST_TOKENS + DRAFTED
    blocks = _AT_ONCE * (-(-longest // _BLOCK) + 1)
    sizes = CacheSizes(dict.fromkeys(target.config.kinds, _BLOCK), dict.fromkeys(target.config.kinds, blocks))
    runner = LocalRunner(target, sizes, head.config.aux_layers)
    config = EngineConfig(max_sequences=_AT_ONCE, prefix_caching=False, draft_tokens=DRAFTED)
    engine = Engine(runner, config, Eagle3Proposer(head, runner))
    asked = [Request(tuple(prompt), MOST_TOKENS, stop_ids=frozenset(stop_ids)) for prompt in prompts]
    return [result.acceptance for result in engine.run(asked)]
