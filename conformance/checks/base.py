"""What a check returns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from conformance.errors import EngineError
from conformance.results import Evidence, Problem, Verdict

Search = Literal["none", "bounded", "full"]
"""How much is spent on certificates: nothing, what `TargetInfo.search_feeds` allows, or all it takes."""


@dataclass(frozen=True)
class CheckOutcome:
    """Judgement of one case on one target, before expectations are applied.

    A check never raises on bad target output: whatever the engine said becomes a `Problem`. Errors of
    the transport (`WorkerDiedError`, `TargetTimeoutError`) pass through; the runner turns them into verdicts.
    """

    verdict: Verdict
    problems: tuple[Problem, ...] = ()
    evidence: Evidence = field(default_factory=Evidence)
    reason: str = ""

    @classmethod
    def from_problems(cls, problems: list[Problem], evidence: Evidence) -> CheckOutcome:
        """`fail` if any rule is broken, else `pass`."""
        return cls("fail" if problems else "pass", tuple(problems), evidence)


def refuses(error: EngineError, words: str) -> bool:
    """Whether an error is a refusal in words that hold a pattern, and not a crash or an attempt to exit."""
    return not error.exited and re.search(words, str(error)) is not None


def no_refusal(error: EngineError, words: str | None) -> str:
    """Why an error is not the refusal that was allowed, as the end of a sentence; empty if none was."""
    if words is None:
        return ""
    if error.exited:
        return ", and meant to end its process"
    return f", which is no refusal in words such as {words!r}"
