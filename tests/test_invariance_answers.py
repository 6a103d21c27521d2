"""The check of invariance: how answers end, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conformance import resources
from conformance.checks.base import refuses
from conformance.errors import EngineError
from conformance.invariance.asking import Asker
from conformance.invariance.pairs import compare
from conformance.invariance.prompting import checkpoint_of, prompts_of
from conformance.invariance_suite import DrawnPrompts, InvarianceCase
from conformance.loading import load_suites
from conformance.oracles import Oracles
from conformance.targets.protocol import GenerateRequest, Generation
from conformance.targets.reference import ReferenceTarget
from tests.invariance_cases import LENGTHS, judged, rules
from tests.lying_engines import Engine


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


STOPS = {"prompts": DrawnPrompts(lengths=LENGTHS, stops=40)}
"""Of which the engine's vocabulary of 24 holds some."""


def altered(answer: Callable[[Generation], Generation]) -> type[Engine]:
    """An engine whose answers come out otherwise where prompts come in chunks."""

    class Altering(Engine):
        def generate(self, request: GenerateRequest) -> Any:
            result = super().generate(request)
            if request.options.prefill_chunk is None:
                return result
            return result.model_copy(update={"generations": tuple(map(answer, result.generations))})

    return Altering


def longer(answer: Generation) -> Generation:
    return answer.model_copy(
        update={
            "token_ids": (*answer.token_ids, 5),
            "logprobs": (*answer.logprobs, 0.0),
            "top": (*answer.top, answer.top[-1]),
        }
    )


def shorter(answer: Generation) -> Generation:
    return answer.model_copy(update={"token_ids": answer.token_ids[:-1]})


@pytest.mark.parametrize("fields", [{}, STOPS])
@pytest.mark.parametrize(
    ("alter", "says"), [(longer, r"has token 5 at place \d+, not the end"), (shorter, "has the end at place")]
)
def test_an_answer_of_another_length_fails(
    fields: dict[str, Any], alter: Any, says: str, oracles: Oracles
) -> None:
    outcome = judged(altered(alter)(), oracles, **fields)
    assert set(rules(outcome)) == {"tokens"}
    assert re.search(says, outcome.problems[0].message)


def test_stop_tokens_end_the_answers_of_drawn_prompts(oracles: Oracles) -> None:
    target = Engine()
    outcome = judged(target, oracles, **STOPS)
    assert outcome.verdict == "pass"
    assert len(set(target.requests[0].stop_ids)) == 40
    assert outcome.evidence.got["places"] < len(LENGTHS) * 12


def test_an_end_for_another_reason_fails(oracles: Oracles) -> None:
    def other(answer: Generation) -> Generation:
        return answer.model_copy(
            update={"finish_reason": "length" if answer.finish_reason == "stop" else "stop"}
        )

    outcome = judged(altered(other)(), oracles, **STOPS)
    assert set(rules(outcome)) == {"ending"}
    assert {problem.expected for problem in outcome.problems} <= {"stop", "length"}


def generation(*tokens: int, reason: str = "length") -> Generation:
    return Generation.model_validate(
        {
            "token_ids": tokens,
            "finish_reason": reason,
            "logprobs": (0.0,) * len(tokens),
            "top": tuple({token: -0.7, 23: -0.70001} for token in tokens),
        }
    )


def test_what_goes_on_after_a_near_tie_ends_where_a_stop_token_does() -> None:
    def resumed(base: Generation, rest: Generation) -> tuple[list[int | None], int]:
        other = [generation(1, 23, 9, 9)]
        found = compare([base], other, 1e-3, lambda _places: [rest])
        return [each.got for each in found.failures], len(found.endings)

    by_limit = generation(1, 2, 3, 4)
    assert resumed(by_limit, generation(3, 4, 5, 6)) == ([], 0), "it was asked for as many as the whole"
    stopped = generation(1, 2, 3, 4, reason="stop")
    assert resumed(stopped, generation(3, 4, reason="stop")) == ([], 0)
    assert resumed(stopped, generation(3, 4, 5, 6)) == ([5], 0)
    assert resumed(stopped, generation(3, 4)) == ([], 1)


MAY_BE_REFUSED = [
    loaded.case
    for loaded in load_suites([resources.suites_dir() / "invariance"]).cases
    if isinstance(loaded.case, InvarianceCase) and loaded.case.or_refused is not None
]


@pytest.mark.parametrize("case", MAY_BE_REFUSED, ids=lambda case: case.id)
def test_the_reference_refuses_nothing_that_it_can_do(case: InvarianceCase, oracles: Oracles) -> None:
    asker = Asker(ReferenceTarget(), oracles, checkpoint_of(case, oracles))
    prompt = prompts_of(case, oracles).pick([0])
    if case.id != "tp-3":
        assert asker.greedy(case.changed, prompt, 2).wrong == ()
        return
    with pytest.raises(EngineError) as caught:
        asker.greedy(case.changed, prompt, 2)
    assert case.or_refused is not None
    assert refuses(caught.value, case.or_refused)
