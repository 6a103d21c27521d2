"""The check of invariance: what a target tells of its prefix cache and its drafts, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from conformance.invariance_suite import DrawnPrompts, Way
from conformance.oracles import Oracles
from conformance.targets.protocol import GenerateRequest
from tests.invariance_cases import chunked, judged, other_token, rules, tie
from tests.lying_engines import Asked, Engine


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


# ---------------------------------------------------------------------------------------- the prefix cache


def test_a_prefix_cache_that_finds_nothing(oracles: Oracles) -> None:
    change = Way(prefix_cache=True, repeat=2)
    assert rules(judged(Engine(cached=0), oracles, change=change, finds=True)) == ["no-hits"]
    assert judged(Engine(cached=0), oracles, change=change).verdict == "pass"


def test_a_prefix_cache_of_which_nothing_is_told(oracles: Oracles) -> None:
    change = Way(prefix_cache=True, repeat=2)
    untold = judged(Engine(cached=None), oracles, change=change, finds=True)
    what = "how many tokens of a prompt were found in the prefix cache"
    reason = f"lying does not tell {what}, in 8 of 8 answers"
    assert (untold.verdict, untold.reason) == ("inconclusive", reason)
    assert untold.evidence.got["cached_tokens"] == "not told"
    assert judged(Engine(cached=None), oracles, change=change).verdict == "pass"


def test_where_answers_are_drawn_what_is_not_told_is_missing_too(oracles: Oracles) -> None:
    outcome = judged(
        Engine(cached=None),
        oracles,
        change=Way(prefix_cache=True),
        finds=True,
        prompts=DrawnPrompts(lengths=(5,)),
        sampling={"top_k": 4, "seed": 1},
    )
    assert (outcome.verdict, "in 10000 of 10000 answers" in outcome.reason) == ("inconclusive", True)


def told_of_the_first(count: int) -> Engine:
    """A prefix cache of which the first answer alone tells anything."""

    class Partly(Engine):
        def generate(self, request: GenerateRequest) -> Any:
            result = super().generate(request)
            first, *rest = result.generations
            return result.model_copy(
                update={"generations": (first.model_copy(update={"cached_tokens": count}), *rest)}
            )

    return Partly(cached=None)


def test_a_prefix_cache_of_which_some_is_told(oracles: Oracles) -> None:
    change = Way(prefix_cache=True, repeat=2)
    assert judged(told_of_the_first(4), oracles, change=change, finds=True).verdict == "pass"
    nothing = judged(told_of_the_first(0), oracles, change=change, finds=True)
    assert (nothing.verdict, "in 7 of 8 answers" in nothing.reason) == ("inconclusive", True)


def test_what_is_not_told_excuses_no_failure(oracles: Oracles) -> None:
    change = Way(prefill_chunk=7, prefix_cache=True, repeat=2)
    outcome = judged(Engine(other_token(), cached=None), oracles, change=change, finds=True)
    assert outcome.verdict == "fail"
    assert set(rules(outcome)) == {"tokens", "logprobs"}


# ------------------------------------------------------------------------------------------------- drafts


def test_a_draft_that_is_right_too_seldom(oracles: Oracles) -> None:
    change, floor = {"eagle3": {}}, {"at_least": 1.5}
    seldom = Engine(accepted=lambda _asked: (0, 0, 1, 0))
    outcome = judged(seldom, oracles, change=change, acceptance=floor)
    assert rules(outcome) == ["acceptance"]
    assert outcome.evidence.got["tokens_a_round"] == 1.25
    assert outcome.evidence.got["tokens_a_round_interval"] == [1.25, 1.25]


def test_the_mean_itself_must_reach_the_floor(oracles: Oracles) -> None:
    change, floor = {"eagle3": {}}, {"at_least": 1.5}
    below = Engine(accepted=lambda asked: (2, 1) if asked.prompt == 0 else (0, 0))
    outcome = judged(below, oracles, change=change, acceptance=floor)
    mean, (low, high) = (outcome.evidence.got[f"tokens_a_round{of}"] for of in ("", "_interval"))
    assert (mean, low < mean < floor["at_least"] < high) == (1.38, True)
    assert rules(outcome) == ["acceptance"]
    above = Engine(accepted=lambda asked: (2, 2) if asked.prompt < 2 else (0, 0))
    assert judged(above, oracles, change=change, acceptance=floor).verdict == "pass"
    low, high = judged(above, oracles, change=change, acceptance=floor).evidence.got[
        "tokens_a_round_interval"
    ]
    assert low < floor["at_least"] < high, "wide as it is, what counts is the mean"


def test_a_floor_by_place(oracles: Oracles) -> None:
    change = {"eagle3": {}}
    asked: dict[str, Any] = {"change": change, "acceptance": {"at_least": 1.2, "by_place": [0.5, 0.5, 0.1]}}
    never_third = judged(Engine(accepted=lambda _asked: (2, 2, 1, 0)), oracles, **asked)
    assert rules(never_third) == ["acceptance-by-place"]
    assert "at place 3 of a round 0 were accepted" in never_third.problems[0].message
    assert judged(Engine(accepted=lambda _asked: (3, 2, 1, 0)), oracles, **asked).verdict == "pass"


def test_a_draft_of_which_nothing_is_told(oracles: Oracles) -> None:
    change, floor = {"eagle3": {}}, {"at_least": 1.5}
    silent = Engine(accepted=lambda _asked: None)
    untold = judged(silent, oracles, change=change, acceptance=floor)
    reason = "lying does not tell what was accepted of drafts, in 4 of 4 answers"
    assert (untold.verdict, untold.reason) == ("inconclusive", reason)
    assert untold.evidence.got["rounds_with_a_draft"] == "not told"
    # Without a floor it is tokens that the case is about.
    assert judged(silent, oracles, change=change).verdict == "pass"
    partly = Engine(accepted=lambda asked: (2, 1) if asked.prompt else None)
    assert "in 1 of 4 answers" in judged(partly, oracles, change=change, acceptance=floor).reason


def test_rounds_of_one_answer_alone_decide_nothing(oracles: Oracles) -> None:
    alone = Engine(accepted=lambda asked: (2, 1) if asked.prompt == 1 else ())
    outcome = judged(alone, oracles, change={"eagle3": {}}, acceptance={"at_least": 1.5})
    assert (outcome.verdict, "a single answer had drafts" in outcome.reason) == ("inconclusive", True)


@pytest.mark.parametrize("fields", [{}, {"acceptance": {"at_least": 1.5}}])
def test_a_target_that_tells_that_it_never_drafts_fails(fields: dict[str, Any], oracles: Oracles) -> None:
    never = judged(Engine(accepted=lambda _asked: ()), oracles, change={"eagle3": {}}, **fields)
    assert rules(never) == ["no-drafts"]
    some = Engine(accepted=lambda asked: (2, 1) if asked.prompt % 2 else ())
    assert judged(some, oracles, change={"eagle3": {}}, **fields).verdict == "pass"


def test_the_same_draft_guesses_the_same(oracles: Oracles) -> None:
    def fewer(asked: Asked) -> tuple[int, ...]:
        return (2, 0) if chunked(asked) and asked.prompt == 2 else (2, 1)

    outcome = judged(Engine(accepted=fewer), oracles, base={"eagle3": {}})
    assert rules(outcome) == ["rounds"]
    assert (outcome.problems[0].expected, outcome.problems[0].got) == ([2, 1], [2, 0])


def test_guesses_of_which_nothing_is_told_are_not_the_same(oracles: Oracles) -> None:
    outcome = judged(Engine(accepted=lambda _asked: None), oracles, base={"eagle3": {}})
    reason = "lying does not tell what was accepted of drafts, in 8 of 8 answers"
    assert (outcome.verdict, outcome.reason) == ("inconclusive", reason)


def test_guesses_are_compared_beside_a_near_tie(oracles: Oracles) -> None:
    lengths = tuple(range(3, 63))

    def fewer_for(prompt: int) -> Engine:
        return Engine(
            tie(20, 3),
            accepted=lambda asked: (2, 0) if chunked(asked) and asked.prompt == prompt else (2, 1),
        )

    asked: dict[str, Any] = {
        "base": {"eagle3": {}},
        "prompts": DrawnPrompts(lengths=lengths),
        "max_new_tokens": 6,
    }
    assert rules(judged(fewer_for(4), oracles, **asked)) == ["rounds"]
    tied = judged(fewer_for(lengths.index(20)), oracles, **asked)
    assert (tied.verdict, tied.evidence.got["near_ties"]) == ("pass", 1)
