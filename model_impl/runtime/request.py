"""What an engine is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from model_impl.runtime.generate import FinishReason
from model_impl.runtime.sampling import Sampling
from model_impl.speculative.verify import Acceptance
from model_impl.text import SoftTokens

GREEDY = Sampling.greedy()


@dataclass(frozen=True)
class Request:
    """A prompt, and how to go on from it."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    """At least 1."""
    soft: SoftTokens | None = None
    """What stands in the place of tokens of the prompt, as one row: `where` and `blocks` are
    [1, len(prompt)]."""
    sampling: Sampling = GREEDY
    """Greedy unless given."""
    seed: int = 0
    """Decides all that is random about this request."""
    stop_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    top_logprobs: int = 0
    """How many of the likeliest tokens to give with their log-probabilities at each position."""
    adapter: str | None = None


@dataclass(frozen=True)
class Output:
    """One new token of a request."""

    request: int
    """Its number, as `Engine.add` gave it."""
    id: int
    logprob: float | None
    """As `generate.Token.logprob`."""
    top: dict[int, float] | None
    """As `generate.Token.top`."""
    finish_reason: FinishReason | None
    """Why this is the request's last token; None if it is not."""


@dataclass(frozen=True)
class Result:
    """All that was generated for a request, and what it took."""

    ids: tuple[int, ...]
    """With the stop token, if there is one."""
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    top: tuple[dict[int, float], ...] | None
    cached_tokens: int
    """Leading tokens of the prompt that were found in the cache when the request was first run."""
    preemptions: int
    """How often it gave up its blocks and was computed again."""
    acceptance: Acceptance
    """Of drafted tokens; empty without a draft model."""
