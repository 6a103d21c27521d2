"""The check of invariance: each rule, on engines that lie in one way each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from conformance import resources
from conformance.checks import judge
from conformance.checks.base import refuses
from conformance.errors import EngineError, SuiteError
from conformance.invariance.pairs import repeats
from conformance.invariance_suite import (
    DrawnPrompts,
    InvarianceSuite,
    ScriptedPrompts,
    Way,
)
from conformance.loading import case_digest, load_suite, load_suites
from conformance.oracles import Oracles
from conformance.targets.protocol import EngineOptions, GenerateRequest, Speculation
from tests.invariance_cases import (
    CHUNKS,
    LENGTHS,
    at,
    case_of,
    chunked,
    judged,
    other_token,
    rules,
    suite_of,
    tie,
)
from tests.lying_engines import FEATURES, VOCABULARY, Asked, Change, Engine, Logits, raised


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


# -------------------------------------------------------------------------------------------- honest engines


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"change": Way(given="alone")},
        {"change": Way(given="reversed")},
        {"change": Way(given="twice")},
        {"change": Way(repeat=3)},
        {"change": Way(tensor_parallel=2)},
        {"change": Way(pipeline_parallel=3)},
        {"change": Way(attention="eager"), "base": Way(attention="sdpa")},
        {"change": Way(cache="static")},
        {"change": {"threads": 2}},
        {"change": {"eagle3": {}}, "acceptance": {"at_least": 2.0}},
        {"change": {"assistant": {"guesses": False}}},
        {"change": Way(prefix_cache=True, repeat=2, block_size=4), "finds": True},
        {"base": Way(dtype="bfloat16")},
    ],
)
def test_an_honest_engine_passes(fields: dict[str, Any], oracles: Oracles) -> None:
    outcome = judged(Engine(), oracles, **fields)
    assert (outcome.verdict, outcome.problems, outcome.reason) == ("pass", (), "")


def test_what_is_measured_is_told(oracles: Oracles) -> None:
    got = judged(Engine(), oracles).evidence.got
    assert got["noise"] == {"alone": 0.0, "threads": 0.0}
    assert got["noise_floor"] == 1e-5
    assert got["control"]["farthest"] > 1e-3
    assert (got["prompts"], got["repeating"], got["near_ties"]) == (4, 0, 0)
    assert got["effective"]["prefill_chunk"] == "7"


def test_the_baseline_is_asked_once_for_several_cases(oracles: Oracles) -> None:
    target = Engine()
    judged(target, oracles)
    before = len(target.requests)
    case = case_of(id="two", change=Way(cache="static"))
    suite = suite_of(case)
    assert judge(case, suite, target, oracles=oracles).verdict == "pass"
    assert [request.options.cache for request in target.requests[before:]] == ["static"]


# -------------------------------------------------------------------------------------------- each rule, once


def test_another_token_fails_with_its_place_and_layer(oracles: Oracles) -> None:
    outcome = judged(Engine(other_token(), wrong_layer=3), oracles)
    assert outcome.verdict == "fail"
    assert set(rules(outcome)) == {"tokens", "logprobs"}
    first = outcome.problems[0]
    assert "at place 4" in first.message
    assert "layer 3 is the first that differs" in first.message


def test_what_comes_behind_a_failure_is_not_compared(oracles: Oracles) -> None:
    found = judged(Engine(other_token()), oracles)
    assert rules(found).count("tokens") <= 4
    assert found.evidence.got["places"] < len(LENGTHS) * 12


def test_numbers_that_change_no_token_fail(oracles: Oracles) -> None:
    def nearly(asked: Asked, logits: Logits) -> Logits:
        # The least likely token, so that no choice depends on it.
        least = logits.index(min(logits))
        return tuple(value - 0.01 * (chunked(asked) and each == least) for each, value in enumerate(logits))

    def all_of_them(asked: Asked, logits: Logits) -> Logits:
        return tuple(value * (1.001 if chunked(asked) else 1) for value in logits)

    assert rules(judged(Engine(all_of_them), oracles)) == ["logprobs"]
    assert judged(Engine(nearly), oracles).verdict == "pass", "below what twenty alternatives show"


def test_a_number_that_is_none_fails(oracles: Oracles) -> None:
    class Broken(Engine):
        def generate(self, request: GenerateRequest) -> Any:
            result = super().generate(request)
            if request.options.prefill_chunk is None:
                return result
            rows = list(result.generations)
            top = dict.fromkeys(rows[0].top[0], math.nan)
            rows[0] = rows[0].model_copy(update={"top": (top, *rows[0].top[1:])})
            return result.model_copy(update={"generations": tuple(rows)})

    outcome = judged(Broken(), oracles)
    assert rules(outcome) == ["logprobs"]
    assert outcome.problems[0].got == "not a number"


def both(*changes: Change) -> Change:
    def change(asked: Asked, logits: Logits) -> Logits:
        for each in changes:
            logits = each(asked, logits)
        return logits

    return change


def test_a_near_tie_is_no_failure_but_many_are_inconclusive(oracles: Oracles) -> None:
    outcome = judged(Engine(tie(8, 4)), oracles)
    assert outcome.verdict == "inconclusive"
    assert "1 of 4 prompts end in near ties" in outcome.reason
    assert outcome.evidence.got["near_ties"] == 1


def test_few_near_ties_pass(oracles: Oracles) -> None:
    lengths = tuple(range(3, 63))
    outcome = judged(Engine(tie(20, 3)), oracles, prompts=DrawnPrompts(lengths=lengths), max_new_tokens=6)
    assert (outcome.verdict, outcome.reason) == ("pass", "")
    assert outcome.evidence.got["near_ties"] == 1


def test_a_gap_above_the_noise_is_no_near_tie(oracles: Oracles) -> None:
    outcome = judged(Engine(tie(8, 4, gap=3e-5)), oracles)
    assert "tokens" in rules(outcome)


def test_after_a_near_tie_comparison_goes_on_with_the_tokens_of_the_baseline(oracles: Oracles) -> None:
    later = at(8, 9)

    def wrong(asked: Asked, logits: Logits) -> Logits:
        return raised(logits, 3, 0.7) if later(asked) and chunked(asked) else logits

    outcome = judged(Engine(both(tie(8, 4), wrong)), oracles)
    assert outcome.verdict == "fail"
    assert "at place 9" in outcome.problems[0].message
    twice = judged(Engine(both(tie(8, 4), tie(8, 7))), oracles)
    assert (twice.verdict, twice.evidence.got["near_ties"]) == ("inconclusive", 1), "one prompt, two ties"
    assert twice.evidence.got["places"] == len(LENGTHS) * 12


def test_answers_that_repeat_one_token_do_not_count(oracles: Oracles) -> None:
    def everywhere(asked: Asked, logits: Logits) -> Logits:
        return raised(logits, 2, 5.0)

    def elsewhere(asked: Asked, logits: Logits) -> Logits:
        return raised(logits, 4, 9.0) if chunked(asked) and len(asked.context) > 20 else logits

    outcome = judged(Engine(everywhere), oracles)
    assert (outcome.verdict, outcome.reason) == ("inconclusive", "every answer repeats one token")
    assert judged(Engine(both(everywhere, elsewhere)), oracles).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("tokens", "does"),
    [
        ((1, 2, 3, 4), False),
        ((5, 5, 5, 5), True),
        ((1, 5, 5, 5, 2), True),
        ((1, 5, 5, 2), False),
        ((1, 2, 1, 2), False),
        ((5, 5), False),
        ((), False),
    ],
)
def test_what_repeats(tokens: tuple[int, ...], does: bool) -> None:
    assert repeats(tokens) == does


def test_an_engine_that_differs_from_itself_is_an_error(oracles: Oracles) -> None:
    def by_neighbours(asked: Asked, logits: Logits) -> Logits:
        return tuple(value * (1 + 0.01 * (asked.together > 1)) for value in logits)

    outcome = judged(Engine(by_neighbours), oracles)
    assert outcome.verdict == "error"
    assert "differs from itself" in outcome.reason
    assert "each prompt alone against all together" in outcome.reason


def test_what_a_case_judges_is_no_noise(oracles: Oracles) -> None:
    def by_neighbours(asked: Asked, logits: Logits) -> Logits:
        return tuple(value * (1 + 0.01 * (asked.together > 1)) for value in logits)

    def by_threads(asked: Asked, logits: Logits) -> Logits:
        return tuple(value * (1 + 0.01 * (asked.options.threads == 2)) for value in logits)

    assert judged(Engine(by_neighbours), oracles, change=Way(given="alone")).verdict == "fail"
    assert judged(Engine(by_threads), oracles, change={"threads": 2}).verdict == "fail"
    assert judged(Engine(by_threads), oracles).verdict == "error"


def test_noise_below_the_cap_widens_what_is_a_near_tie(oracles: Oracles) -> None:
    def a_little(asked: Asked, logits: Logits) -> Logits:
        return tuple(value + 1e-4 * (each == 7) * (asked.together > 1) for each, value in enumerate(logits))

    outcome = judged(Engine(both(a_little, tie(8, 4, gap=1.5e-4))), oracles)
    assert outcome.evidence.got["noise_floor"] == pytest.approx(1e-4, rel=0.2)
    assert outcome.verdict == "inconclusive"


def test_a_control_that_is_not_noticed_is_an_error(oracles: Oracles) -> None:
    outcome = judged(Engine(perturbable=False), oracles)
    assert outcome.verdict == "error"
    assert "the control was not noticed: with one layer 1% off" in outcome.reason


@pytest.mark.parametrize(
    ("change", "lie", "rule"),
    [
        (CHUNKS, {"prefill_chunk": "8192"}, "wrong-prefill-chunk"),
        ({"tensor_parallel": 2}, {"tensor_parallel": "1"}, "wrong-tensor-parallel"),
        ({"attention": "eager"}, {"attention": "sdpa"}, "wrong-attention"),
        ({"cache": "static"}, {"cache": "dynamic"}, "wrong-cache"),
        ({"eagle3": {}}, {"speculation": "none"}, "wrong-speculation"),
        ({"prefix_cache": True}, {"prefix_cache": "off"}, "wrong-prefix-cache"),
    ],
)
def test_a_setting_that_did_not_run_is_an_error(
    change: Any, lie: dict[str, str], rule: str, oracles: Oracles
) -> None:
    outcome = judged(Engine(effective=lambda said: said | lie), oracles, change=change)
    assert outcome.verdict == "error"
    assert rules(outcome) == [rule]
    assert "another configuration ran" in outcome.reason


def test_a_baseline_of_another_dtype_is_an_error(oracles: Oracles) -> None:
    outcome = judged(Engine(effective=lambda said: said | {"dtype": "bfloat16"}), oracles)
    assert (outcome.verdict, rules(outcome)) == ("error", ["wrong-dtype"])


def refuses_chunks(request: GenerateRequest) -> str:
    return "ValueError: prompts come in no chunks" if request.options.prefill_chunk is not None else ""


def test_a_refusal_fails_unless_it_is_allowed(oracles: Oracles) -> None:
    outcome = judged(Engine(refuses=refuses_chunks), oracles)
    assert rules(outcome) == ["raised"]
    assert "no chunks" in outcome.problems[0].message
    allowed = judged(Engine(refuses=refuses_chunks), oracles, or_refused="(?i)chunks")
    assert (allowed.verdict, allowed.evidence.got["refused"]) == (
        "pass",
        "ValueError: prompts come in no chunks",
    )
    assert judged(Engine(other_token()), oracles, or_refused="chunks").verdict == "fail"


def test_a_crash_is_no_refusal(oracles: Oracles) -> None:
    crashed = judged(Engine(refuses=refuses_chunks), oracles, or_refused="pipeline")
    assert rules(crashed) == ["raised"]
    assert "no refusal in words such as 'pipeline'" in crashed.problems[0].message

    class Exiting(Engine):
        def generate(self, request: GenerateRequest) -> Any:
            if request.options.prefill_chunk is not None:
                raise EngineError("SystemExit: chunks", exited=True)
            return super().generate(request)

    left = judged(Exiting(), oracles, or_refused="chunks")
    assert rules(left) == ["raised"]
    assert "meant to end its process" in left.problems[0].message


def test_a_baseline_that_is_refused_is_the_engines_error(oracles: Oracles) -> None:
    with pytest.raises(EngineError, match="out of memory"):
        judged(Engine(refuses=lambda _request: "out of memory"), oracles)


def test_answers_that_are_missing_are_the_engines_error(oracles: Oracles) -> None:
    class Short(Engine):
        def generate(self, request: GenerateRequest) -> Any:
            result = super().generate(request)
            return result.model_copy(update={"generations": result.generations[1:]})

    with pytest.raises(EngineError, match="3 answers came where 4 were asked for"):
        judged(Short(), oracles)


def test_without_alternatives_nothing_could_be_decided(oracles: Oracles) -> None:
    outcome = judged(Engine(alternatives=1), oracles)
    assert (outcome.verdict, rules(outcome)) == ("fail", ["alternatives"])


def test_a_later_repetition_is_judged_too(oracles: Oracles) -> None:
    def stale(asked: Asked, logits: Logits) -> Logits:
        return raised(logits, 5, 1.0) if asked.turn == 1 and asked.place == 2 else logits

    outcome = judged(Engine(stale), oracles, change=Way(prefix_cache=True, repeat=2))
    assert "tokens" in rules(outcome)
    assert "when asked for time 2" in outcome.problems[0].message


# ------------------------------------------------------------------------------------------- what is skipped


@pytest.mark.parametrize(
    ("target", "fields", "reason"),
    [
        (Engine(capabilities=()), {}, "lying has no capability `generate`: run `install lying`"),
        (Engine(features=()), {}, "lying cannot generate with prefill-chunk"),
        (Engine(features=("repeat",)), {"change": Way(repeat=2, tensor_parallel=2)},
         "lying cannot generate with tensor-parallel"),
        (Engine(), {"change": Way(attention="flex")}, "lying has no attention 'flex'; it has eager, sdpa"),
        (Engine(choices={}), {"change": Way(cache="static")},
         "lying has no cache 'static'; it has no choice of it"),
        (Engine(), {"model": "scripted", "prompts": {"pictures": [{"line": "colour"}]}},
         "lying cannot generate with images"),
        (Engine(features=("prefill-chunk",)), {"sampling": {"top_k": 4}},
         "lying cannot generate with sampling"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_do_is_skipped(
    target: Engine, fields: dict[str, Any], reason: str, oracles: Oracles
) -> None:
    outcome = judged(target, oracles, **fields)
    assert (outcome.verdict, outcome.reason) == ("skip", reason)
    assert target.requests == []


# ------------------------------------------------------------------------------------------- files and models


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"change": Way()}, "changes nothing"),
        ({"base": CHUNKS, "change": CHUNKS}, "changes nothing"),
        ({"change": {"dtype": "bfloat16"}}, "two dtypes differ by right"),
        ({"change": {"kv_dtype": "fp8_e4m3"}}, "two dtypes differ by right; set `kv_dtype` in `base`"),
        ({"model": "scripted"}, "for the scripted checkpoint"),
        ({"prompts": {"lines": ["plain"]}}, "for the scripted checkpoint"),
        ({"sampling": {"top_p": 0.9}}, "needs a `top_k` of 2 to 8"),
        ({"sampling": {"top_k": 20}}, "needs a `top_k` of 2 to 8"),
        ({"sampling": {"top_k": 4}, "change": {"given": "alone"}}, "`given` would be ignored"),
        ({"sampling": {"top_k": 4}, "base": {"repeat": 2}, "change": {"threads": 2}}, "`repeat` would be"),
        ({"sampling": {"top_k": 4}, "max_new_tokens": 20}, "`max_new_tokens` would be"),
        ({"sampling": {"top_k": 4}, "factor": 5}, "`factor` would be"),
        ({"sampling": {"top_k": 4}, "prompts": {"stops": 3}}, "`stops` would be"),
        ({"draws": 20_000}, "`draws` is of what `sampling` draws"),
        ({"shift": 0.1}, "`shift` is of what `sampling` draws"),
        (
            {"sampling": {"temperature": 0.8, "top_k": 4}, "draws": 2_500},
            "2500 draws do not tell a shift of 0.03; take more draws, or a `shift` of 0.060",
        ),
        ({"acceptance": {"at_least": 1.5}}, "is of a draft"),
        (
            {"change": {"eagle3": {"tokens": 1}}, "acceptance": {"at_least": 1.5, "by_place": [0.5, 0.1]}},
            "`by_place` has 2 places, and 1 are drafted",
        ),
        ({"finds": True}, "needs `prefix_cache: true`"),
        ({"or_refused": "(chunks"}, "is no regular expression"),
        ({"or_refused": True}, "valid string"),
        ({"change": {"eagle3": {}, "assistant": {}}}, "one draft model"),
        ({"change": {"pipeline_parallel": 2, "pipeline_split": [1, 1, 1]}}, "as many numbers"),
    ],
)
def test_a_case_that_says_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        case_of(**fields)


def test_what_is_changed_is_all_that_differs() -> None:
    case = case_of(base={"dtype": "bfloat16", "eagle3": {}}, change={"prefill_chunk": 7, "eagle3": None})
    assert case.changed == Way(dtype="bfloat16", prefill_chunk=7)


def test_an_unknown_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "suites" / "invariance" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        "kind: invariance\nid: invariance/mine\ntitle: Mine\ndescription: Mine.\narea: invariance-caches\n"
        "cases:\n  - {id: one, title: A line that is not there, source: [spec 1.6], model: scripted,\n"
        "     prompts: {lines: [plain, nothing]}, change: {prefill_chunk: 4}}\n"
    )
    with pytest.raises(SuiteError, match=r"mine\.yaml:8.*the script has no line 'nothing'"):
        load_suite(file)


def test_the_digest_holds_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from conformance.invariance.models import MODELS

    case = case_of()
    suite = suite_of(case)
    before = case_digest(case, suite)
    monkeypatch.setitem(MODELS, "dense", MODELS["dense"] | {"rms_norm_eps": 1e-5})
    assert case_digest(case, suite) != before


SUITES = [
    suite.suite for suite in load_suites([resources.suites_dir()]) if isinstance(suite.suite, InvarianceSuite)
]


def test_the_suites_ask_for_every_option() -> None:
    cases = [case for suite in SUITES for case in suite.cases]
    asked = {feature for case in cases for feature in case.changed.options("draft").features}
    assert asked == {
        *("tensor-parallel", "pipeline-parallel", "pipeline-split", "expert-parallel", "eagle3", "assistant"),
        *("prefill-chunk", "prefix-cache", "block-size", "kv-dtype", "max-sequences", "threads"),
    }
    assert {case.changed.given for case in cases} == {"together", "alone", "reversed", "twice"}
    models = {"e2b-like", "dense", "moe", "scripted", "nano-a", "nano-d", "nano-e"}
    assert {case.model for case in cases} == models
    assert any(isinstance(case.prompts, ScriptedPrompts) and case.prompts.pictures for case in cases)
    assert {suite.area for suite in SUITES} == {
        *("invariance-layouts", "invariance-speculation", "invariance-caches", "invariance-backends"),
        "invariance-again",
    }


def test_every_stage_boundary_of_a_model_with_shared_keys_has_a_case() -> None:
    splits = {
        case.change.pipeline_split
        for suite in SUITES
        for case in suite.cases
        if case.model == "e2b-like" and case.change.pipeline_parallel == 2
    }
    boundaries = {split[0] for split in splits if split is not None}
    assert {1, 3, 4, 5} <= boundaries


def test_what_finds_prefixes_is_compared_with_an_engine_that_keeps_none() -> None:
    finding = [case for suite in SUITES for case in suite.cases if case.finds]
    assert len(finding) > 8
    assert {case.base.prefix_cache for case in finding} == {False}


def test_a_lack_of_shared_memory_is_no_refusal_to_share_keys() -> None:
    words = {
        case.or_refused
        for suite in SUITES
        for case in suite.cases
        if case.or_refused is not None and case.model == "e2b-like" and case.base.draft is None
    }
    assert words
    for pattern in words:
        assert refuses(EngineError("ValueError: KV sharing target layer of layers.5 is not valid"), pattern)
        assert not refuses(EngineError("RuntimeError: no shared memory block, no shared_memory"), pattern)


@pytest.mark.parametrize(
    "message",
    [
        "ParallelError: rank 1 (stage 0, layers 3 to 5, shard 0 of 2): was ended by SIGSEGV",
        "ParallelError: no answer within 60 seconds: rank 3 (stage 1, layer 6, shard 1 of 2)",
        "RuntimeError: pipeline parallel worker VllmWorker-1 died unexpectedly (exit code: -11)",
        "AttributeError: 'NoneType' object has no attribute 'pipeline_parallel_size'",
    ],
)
def test_a_rank_that_died_has_refused_nothing(message: str) -> None:
    words = {case.or_refused for suite in SUITES for case in suite.cases} - {None}
    assert len(words) > 2
    for pattern in words:
        assert not refuses(EngineError(message), str(pattern)), pattern


def test_options_say_what_must_have_run() -> None:
    options = EngineOptions(
        tensor_parallel=2,
        pipeline_parallel=2,
        pipeline_split=(2, 4),
        expert_parallel=True,
        prefix_cache=False,
        block_size=8,
        threads=1,
        speculation=Speculation(method="assistant", checkpoint="x"),
    )
    assert options.asked == {
        "dtype": "float32",
        "tensor_parallel": "2",
        "pipeline_parallel": "2",
        "speculation": "assistant",
        "expert_parallel": "on",
        "pipeline_split": "2,4",
        "prefix_cache": "off",
        "block_size": "8",
        "threads": "1",
    }
    assert set(options.features) <= set(FEATURES) | {"pipeline-split", "expert-parallel"}
    with pytest.raises(ValidationError, match="pipeline_split has 2 stages"):
        EngineOptions(pipeline_parallel=3, pipeline_split=(2, 4))


def test_the_engine_of_these_tests_has_a_vocabulary_that_alternatives_do_not_exhaust() -> None:
    assert VOCABULARY > 20
