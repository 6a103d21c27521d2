"""What scoring makes of answers is judged by what the suite says, whoever scores."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pydantic import ValidationError

from conformance.checks import scoring
from conformance.checks.base import CheckOutcome
from conformance.errors import EngineError
from conformance.scoring_suite import ScoringCase
from conformance.targets.protocol import Target, TargetInfo
from conformance.targets.reference import ReferenceTarget
from conformance.targets.scores import Scored, ScoreRequest, ScoreResult

QUESTIONS = ("How many are two and two?", "How many are six and six?")
RIGHT = (
    Scored(outcome="correct", extracted="4", prompt="2?", budget=9),
    Scored(outcome="unparsable", extracted=None, prompt="6?", budget=9),
)
ANSWERS: list[dict[str, Any]] = [
    {"document": {"question": QUESTIONS[0]}, "says": "4<turn|>", "outcome": "correct", "extracted": "4"},
    {"document": {"question": QUESTIONS[1]}, "says": "?<turn|>", "outcome": "unparsable", "prompt": "6?"},
]


class Scores:
    """Gives each question the same, but for the changes."""

    spec = "scores"

    def __init__(self, *, alone: dict[str, Any] | None = None, **changed: Any) -> None:
        self.changed = changed
        self.alone = alone or {}
        self.asked: list[ScoreRequest] = []

    def describe(self) -> TargetInfo:
        return TargetInfo(name="scores", version="1", capabilities=("score",))

    def score(self, request: ScoreRequest) -> ScoreResult:
        self.asked.append(request)
        by_question = dict(zip(QUESTIONS, RIGHT, strict=True))
        found = [by_question[doc["question"]] for doc in request.documents]
        changes = self.alone if len(found) == 1 else self.changed
        return ScoreResult(scored=(*found[:-1], found[-1].model_copy(update=changes)))

    def close(self) -> None:
        pass


def case(**fields: Any) -> ScoringCase:
    known = {"id": "demo", "title": "A case for the tests.", "source": ["check 23"], "task": "nano_gsm8k"}
    return ScoringCase.model_validate(known | {"answers": ANSWERS} | fields)


def judged(target: object, **fields: Any) -> CheckOutcome:
    return scoring.judge(case(**fields), cast(Target, target))


def test_what_is_as_it_is_written_passes() -> None:
    target = Scores()
    outcome = judged(target, budget=9, alone=True, shots=1, examples=[{"question": "?"}], thinking=True)
    assert (outcome.verdict, outcome.problems) == ("pass", ())
    whole, *alone = target.asked
    assert whole.answers == ("4<turn|>", "?<turn|>")
    assert (whole.shots, whole.thinking, whole.chat_template) == (1, True, True)
    assert [request.documents for request in alone] == [(doc,) for doc in whole.documents]


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"outcome": "wrong"}, "outcome"),
        ({"extracted": "7"}, "extracted"),
        ({"prompt": "7?"}, "prompt"),
        ({"budget": 256}, "budget"),
        ({"alone": {"prompt": "as ever: 6?"}}, "alone"),
    ],
)
def test_each_rule(changed: dict[str, Any], rule: str) -> None:
    outcome = judged(Scores(**changed), budget=9, alone=True)
    assert outcome.verdict == "fail"
    assert {problem.rule for problem in outcome.problems} >= {rule}
    assert {problem.rule for problem in outcome.problems} <= {rule, "alone"}, (
        "a lie about all is one alone too"
    )


def test_a_refused_answer_is_handed_on_as_none() -> None:
    target = Scores()
    judged(
        target,
        answers=[ANSWERS[0], {"document": {"question": QUESTIONS[1]}, "refused": True, "outcome": "refused"}],
    )
    assert target.asked[0].answers == ("4<turn|>", None)


def test_scoring_that_raises_fails_and_targets_that_score_nothing_are_skipped() -> None:
    class Raises(Scores):
        def score(self, request: ScoreRequest) -> ScoreResult:
            raise EngineError("no such task")

    (problem,) = judged(Raises()).problems
    assert (problem.rule, problem.got) == ("raised", "no such task")

    class Parses(Scores):
        def describe(self) -> TargetInfo:
            return TargetInfo(name="scores", version="1", capabilities=("parse",))

    outcome = judged(Parses())
    assert (outcome.verdict, outcome.reason) == ("skip", "scores has no capability `score`")


def test_the_harness_names_a_task_that_is_not_there() -> None:
    (problem,) = judged(ReferenceTarget(), task="no_such_task").problems
    assert problem.rule == "raised"
    assert "there is no task 'no_such_task'" in problem.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"answers": [ANSWERS[0] | {"document": {}}]}, "needs a `question`"),
        ({"answers": [ANSWERS[0] | {"refused": True}]}, "what is `refused` says nothing"),
        ({"answers": [ANSWERS[0], ANSWERS[0]]}, "stands in another one"),
        ({"shots": 2, "examples": [{"question": "?"}]}, "2 `shots` need as many `examples`; there are 1"),
        ({"answers": ANSWERS[:1], "alone": True}, "is asked `alone` anyway"),
    ],
)
def test_cases_that_contradict_themselves_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        case(**fields)
