"""The statistics of invariance: distributions of drawn answers, and how many tokens a round brings."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from conformance.checks import judge
from conformance.invariance import acceptance, drawing
from conformance.invariance_suite import DrawnPrompts
from conformance.oracles import Oracles
from conformance.targets.protocol import GenerateRequest, GenerateResult, Generation, Sampling
from tests.invariance_cases import case_of, judged, rules, suite_of
from tests.lying_engines import Engine


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


DRAWN: dict[str, Any] = {
    "sampling": {"temperature": 0.8, "top_k": 4, "seed": 3},
    "prompts": DrawnPrompts(lengths=(3,)),
}


def test_draws_of_the_right_distribution_pass(oracles: Oracles) -> None:
    outcome = judged(Engine(), oracles, **DRAWN)
    assert (outcome.verdict, outcome.problems, outcome.reason) == ("pass", (), "")
    assert len(outcome.evidence.got["distribution"]) == 3


def test_the_seed_of_a_run_draws_other_answers(oracles: Oracles) -> None:
    """So that repeated clean runs say something of the statistics and not of one draw."""
    seeds: list[set[int]] = []

    class Listening(Engine):
        def generate(self, request: GenerateRequest) -> GenerateResult:
            if request.sampling is not None:
                seeds[-1].add(request.sampling.seed)
            return super().generate(request)

    found = []
    for seed in (0, 1):
        seeds.append(set())
        oracles.forget()
        case = case_of(**DRAWN)
        found.append(judge(case, suite_of(case), Listening(), oracles=oracles, seed=seed))
    assert [outcome.verdict for outcome in found] == ["pass", "pass"]
    assert seeds == [{3}, {4}]
    told = [outcome.evidence.got["distribution"] for outcome in found]
    assert told[0] != told[1]


def test_draws_of_another_distribution_fail(oracles: Oracles) -> None:
    def biased(_kept: list[int], weights: list[float], request: GenerateRequest) -> list[float]:
        share = 0.06 if request.options.prefill_chunk is not None else 0
        total = sum(weights)
        return [weights[0] - share * total, *weights[1:-1], weights[-1] + share * total]

    outcome = judged(Engine(drawn=biased), oracles, **DRAWN)
    assert set(rules(outcome)) == {"distribution"}


@pytest.mark.parametrize(("share", "verdict"), [(0.0, "pass"), (0.25, "fail")])
def test_few_draws_tell_what_is_far_off(oracles: Oracles, share: float, verdict: str) -> None:
    def biased(_kept: list[int], weights: list[float], request: GenerateRequest) -> list[float]:
        moved = share * weights[0] if request.options.prefill_chunk is not None else 0
        return [weights[0] - moved, *weights[1:-1], weights[-1] + moved]

    assert judged(Engine(drawn=biased), oracles, draws=1_600, shift=0.075, **DRAWN).verdict == verdict


def test_a_baseline_that_draws_wrongly_is_told_apart(oracles: Oracles) -> None:
    def flat(_kept: list[int], weights: list[float], _request: GenerateRequest) -> list[float]:
        return [1.0] * len(weights)

    assert {"base-distribution", "distribution"} <= set(rules(judged(Engine(drawn=flat), oracles, **DRAWN)))


def test_a_token_that_cannot_be_drawn_fails_by_itself(oracles: Oracles) -> None:
    nucleus = DRAWN | {"sampling": DRAWN["sampling"] | {"top_p": 0.6}}
    outcome = judged(Engine(), oracles, **nucleus)  # this engine ignores `top_p`
    assert any("top_k and top_p leave it out" in problem.message for problem in outcome.problems)


def test_the_rule_of_sampling() -> None:
    logprobs = {token: math.log(part) for token, part in ((5, 0.4), (6, 0.3), (7, 0.2), (8, 0.1))}
    found = drawing.probabilities(logprobs, Sampling(top_k=3))
    assert found == pytest.approx({5: 4 / 9, 6: 3 / 9, 7: 2 / 9})
    assert drawing.probabilities(logprobs, Sampling(top_k=3, top_p=0.7)) == pytest.approx(
        {5: 4 / 7, 6: 3 / 7}
    )
    assert drawing.probabilities(logprobs, Sampling(top_k=4, top_p=0.01)) == {5: 1.0}
    cold = drawing.probabilities(logprobs, Sampling(top_k=2, temperature=0.5))
    assert cold == pytest.approx({5: 16 / 25, 6: 9 / 25})


def test_the_alarm_is_as_rare_as_it_says() -> None:
    """Right draws of both sides are rejected once in a thousand: in 300 repetitions, hardly ever.

    At a fifth for each case of two tests, about 57 of 300 are: the smaller of two p-values is below a tenth.
    """
    law = {(): {1: 0.5, 2: 0.3, 3: 0.2}}
    rejected = often = 0
    for seed in range(300):
        source = random.Random(seed)
        sides = []
        for _ in ("base", "changed"):
            drawn = source.choices([1, 2, 3], [0.5, 0.3, 0.2], k=400)
            rounds = [
                (Generation(token_ids=(token,), finish_reason="length", logprobs=(0.0,)),) for token in drawn
            ]
            sides.append(drawing.compare_draws([law], rounds, 1))
        alpha = drawing.alpha_of_each(sides)
        assert alpha == drawing.ALPHA / 2
        rejected += any(side.rejected(alpha) for side in sides)
        often += any(side.rejected(0.2 / 2) for side in sides)
    assert rejected <= 2
    assert 35 <= often <= 80


def test_every_test_of_both_sides_has_its_part_of_alpha(oracles: Oracles) -> None:
    def flat(_kept: list[int], weights: list[float], _request: GenerateRequest) -> list[float]:
        return [1.0] * len(weights)

    outcome = judged(Engine(drawn=flat), oracles, **DRAWN)
    got = outcome.evidence.got
    tests = len(got["base-distribution"]) + len(got["distribution"])
    assert tests == 6
    assert f"below {drawing.ALPHA / tests:.2g}" in outcome.problems[0].message


def test_rare_cells_are_pooled() -> None:
    cells = [(50, 48.0), (30, 32.0), (3, 2.0), (1, 1.5), (2, 2.5)]
    assert drawing._pooled(cells) == [(50, 48.0), (30, 32.0), (6, 6.0)]
    assert drawing._pooled([(50, 48.0), (30, 32.0), (1, 1.0)]) == [(50, 48.0), (31, 33.0)]
    assert drawing._pooled([(1, 1.0)]) == [(1, 1.0)]


def test_the_interval_of_a_rounds_length_is_by_prompt() -> None:
    def answer(accepted: tuple[int, ...]) -> Generation:
        return Generation(
            token_ids=(1,),
            finish_reason="length",
            logprobs=(0.0,),
            accepted=accepted,
            drafted=(3,) * len(accepted),
        )

    made = [answer((3, 0)), answer((0, 0)), answer((1, 2)), answer((2, 2))]
    found = acceptance.length(made)
    assert found is not None
    assert found.mean == 1 + 10 / 8
    assert found.by_place == (5 / 8, 4 / 8, 1 / 8)
    limits = acceptance.interval(made)
    assert limits is not None
    assert limits[0] < found.mean < limits[1]
    assert acceptance.interval(made[:1]) is None
    assert acceptance.length([]) is None


def test_draws_are_looked_through_for_hits_in_the_prefix_cache(oracles: Oracles) -> None:
    fields = DRAWN | {"change": {"prefix_cache": True}, "finds": True}
    assert rules(judged(Engine(cached=0), oracles, **fields)) == ["no-hits"]
    assert judged(Engine(cached=4), oracles, **fields).evidence.got["cached_tokens"] == 40_000


def test_no_interval_is_worked_out_that_nobody_judges(
    oracles: Oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(_answers: object) -> None:
        pytest.fail("an interval of ten thousand answers takes half a gigabyte")

    monkeypatch.setattr(acceptance, "interval", unwanted)
    outcome = judged(Engine(), oracles, **DRAWN | {"change": {"eagle3": {}}})
    assert outcome.verdict == "pass"
    assert outcome.evidence.got["tokens_a_round"] == 2.5
