"""What the harness asks about its own scoring: request and answer of the capability `score`.

The answers are given, and what is asked for is what becomes of them: which text is scored, what is read in
it, and of which class it is.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from pydantic import Field

from conformance.scoring import OutcomeClass
from conformance.targets.base import Model


class ScoreRequest(Model):
    """Documents of a task with the answers that a model gives to them."""

    task: str
    """By lm-eval's name for it."""
    documents: tuple[dict[str, Any], ...] = Field(min_length=1)
    """In the task's form, in place of its own; each with a `question` that no other one holds."""
    answers: tuple[str | None, ...]
    """To each: the whole text, thoughts, markers and the token that ends it included. None: the model's
    engine refuses the prompt."""
    examples: tuple[dict[str, Any], ...] = ()
    """Solved ones, of which `shots` stand before each question."""
    shots: int = Field(default=0, ge=0)
    thinking: bool = False
    chat_template: bool = True
    filter: str | None = None
    """lm-eval's filter that reads the answers; None: the task's first."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: as the task says."""


class Scored(Model):
    """What became of one answer."""

    outcome: OutcomeClass
    extracted: str | None
    """What was read in it; None: nothing."""
    prompt: str
    """What the model was given, as text; of its tokens, where there is a tokenizer."""
    budget: int
    """Most tokens that the answer might have."""


class ScoreResult(Model):
    """What became of each answer, in the order of the documents."""

    scored: tuple[Scored, ...]


@runtime_checkable
class Scorer(Protocol):
    """The method of a target with the capability `score`."""

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Score answers; a request that it refuses raises `EngineError`."""
        ...
