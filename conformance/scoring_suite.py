"""Suite files of kind `scoring`: answers that are given, and what must become of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from conformance.gates.suite import TaskName
from conformance.scoring import OutcomeClass
from conformance.suitebase import CaseBase, Strict, SuiteBase


class ScoredAnswer(Strict):
    """A document of a task, an answer to it, and what must become of that."""

    document: dict[str, Any]
    """In the task's form, with a `question`."""
    says: str = ""
    """The whole answer, with the markers around a thought and the token that ends it. Without that token it
    broke off."""
    refused: bool = False
    """The engine refuses the prompt, so that there is no answer."""
    outcome: OutcomeClass
    extracted: str | None = None
    """What must be read in it; absent: nothing."""
    prompt: str | None = None
    """What the model must be given, to the letter."""

    @model_validator(mode="after")
    def _fits_together(self) -> ScoredAnswer:
        question = self.document.get("question")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("`document` needs a `question`, by which its prompt is known")
        if self.refused and (self.says or self.outcome != "refused"):
            raise ValueError("what is `refused` says nothing, and its `outcome` is `refused`")
        return self


class ScoringCase(CaseBase):
    """Judge what scoring makes of answers to a task."""

    task: TaskName
    """As lm-eval or `conformance/tasks/` names it."""
    answers: tuple[ScoredAnswer, ...] = Field(min_length=1)
    examples: tuple[dict[str, Any], ...] = ()
    """Documents with their solutions."""
    shots: int = Field(default=0, ge=0)
    """Of these, how many stand before each question."""
    thinking: bool = False
    chat_template: bool = True
    filter: str | None = None
    """lm-eval's filter that reads the answers; absent: the task's first."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Absent: as the task says."""
    budget: int | None = None
    """Tokens that an answer must be allowed."""
    alone: bool = False
    """Each question is asked alone besides, and its prompt must be the same."""

    @model_validator(mode="after")
    def _fits_together(self) -> ScoringCase:
        questions = [str(answer.document["question"]) for answer in self.answers]
        for place, question in enumerate(questions):
            if any(question in other for number, other in enumerate(questions) if number != place):
                raise ValueError(f"the question {question!r} stands in another one; say it otherwise")
        if self.shots > len(self.examples):
            raise ValueError(f"{self.shots} `shots` need as many `examples`; there are {len(self.examples)}")
        if self.alone and len(self.answers) < 2:
            raise ValueError("one question is asked `alone` anyway; add another")
        return self


class ScoringSuite(SuiteBase):
    """Suite of kind `scoring`."""

    kind: Literal["scoring"]
    cases: tuple[ScoringCase, ...] = Field(min_length=1)
