"""Judge what a target's scoring makes of answers that are given.

What is right stands in the suite, by hand: nothing of what scores is used to judge it.

Rules:
  outcome    an answer is of another class: `correct`, `wrong`, `unparsable`, `truncated`, …
  extracted  something else is read in it, or something where there is nothing
  prompt     the model is given another text
  budget     an answer may have more tokens, or fewer
  alone      a question has another prompt when it is asked without the others
  raised     the request is refused
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import cast

from conformance.checks.base import CheckOutcome
from conformance.errors import EngineError
from conformance.results import Evidence, Problem
from conformance.scoring_suite import ScoredAnswer, ScoringCase
from conformance.targets.protocol import Target
from conformance.targets.scores import Scored, Scorer, ScoreRequest


def judge(case: ScoringCase, target: Target) -> CheckOutcome:
    """Have the answers scored, and compare.

    Raises:
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    if "score" not in target.describe().capabilities:
        return CheckOutcome("skip", reason=f"{target.spec} has no capability `score`")
    scorer = cast(Scorer, target)
    try:
        scored = scorer.score(_request(case, case.answers)).scored
        alone = [scorer.score(_request(case, [one])).scored[0] for one in case.answers] if case.alone else []
    except EngineError as error:
        problem = Problem(rule="raised", message=f"scoring raised {error}", got=str(error))
        return CheckOutcome.from_problems([problem], _evidence(case, ()))
    problems = [
        problem
        for number, (answer, found) in enumerate(zip(case.answers, scored, strict=True), start=1)
        for problem in _problems(number, answer, found, case.budget)
    ]
    problems += _alone_problems(scored, alone)
    return CheckOutcome.from_problems(problems, _evidence(case, scored))


def _request(case: ScoringCase, answers: Sequence[ScoredAnswer]) -> ScoreRequest:
    return ScoreRequest(
        task=case.task,
        documents=tuple(answer.document for answer in answers),
        answers=tuple(None if answer.refused else answer.says for answer in answers),
        examples=case.examples,
        shots=case.shots,
        thinking=case.thinking,
        chat_template=case.chat_template,
        filter=case.filter,
        max_new_tokens=case.max_new_tokens,
    )


def _problems(number: int, answer: ScoredAnswer, found: Scored, budget: int | None) -> Iterator[Problem]:
    if found.outcome != answer.outcome:
        yield _problem("outcome", f"answer {number} is {found.outcome}", answer.outcome, found.outcome)
    if found.extracted != answer.extracted:
        read = "nothing" if found.extracted is None else repr(found.extracted)
        yield _problem("extracted", f"in answer {number}, {read} is read", answer.extracted, found.extracted)
    if answer.prompt is not None and found.prompt != answer.prompt:
        yield _problem("prompt", f"question {number} is put otherwise", answer.prompt, found.prompt)
    if budget is not None and found.budget != budget:
        yield _problem("budget", f"answer {number} may have {found.budget} tokens", budget, found.budget)


def _alone_problems(scored: Sequence[Scored], alone: Sequence[Scored]) -> Iterator[Problem]:
    for number, (found, one) in enumerate(zip(scored, alone, strict=False), start=1):
        if found.prompt != one.prompt:
            message = f"question {number} is put otherwise when it is asked without the others"
            yield _problem("alone", message, found.prompt, one.prompt)


def _problem(rule: str, message: str, expected: str | int | None, got: str | int | None) -> Problem:
    return Problem(rule=rule, message=message, expected=expected, got=got)


def _evidence(case: ScoringCase, scored: Sequence[Scored]) -> Evidence:
    asked = case.model_dump(
        mode="json", exclude={"id", "title", "source", "tags", "control_of"}, exclude_defaults=True
    )
    return Evidence(
        input=json.dumps(asked, ensure_ascii=False, indent=2),
        expected=[{"outcome": answer.outcome, "extracted": answer.extracted} for answer in case.answers],
        got=[found.model_dump(mode="json") for found in scored] or None,
    )
