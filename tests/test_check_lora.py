"""The check of adapters: each known fault is noticed by a case and a rule, and the reference breaks none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from conformance.errors import EngineError
from conformance.expectations import Expectations
from conformance.faults import registry
from conformance.loading import LoadedSuites, load_suites
from conformance.lora_suite import LoraCase
from conformance.results import Result
from conformance.runner import TargetPool, run_case
from conformance.targets import reference_generate
from conformance.targets.protocol import GenerateRequest, GenerateResult, Generation
from conformance.targets.reference import ReferenceTarget
from model_impl.runtime.prefix import BlockTables

torch.set_num_threads(1)

CAUGHT = {
    "alpha-ignored": ("e2b::attention", "numbers"),
    "alpha-not-by-rank": ("e2b::attention", "numbers"),
    "rank-stabilised-ignored": ("e2b::rank-stabilised", "numbers"),
    "alpha-pattern-ignored": ("e2b::patterns", "numbers"),
    "rank-pattern-not-in-scale": ("e2b::patterns", "numbers"),
    "other-form-of-names-dropped": ("e2b::whole-names", "no-effect"),
    "feed-forward-not-adapted": ("e2b::mapping", "mapping"),
    "per-layer-projections-not-adapted": ("e2b::per-layer-inputs", "no-effect"),
    "keys-alone-where-keys-are-values": ("keys-are-values::keys", "numbers"),
    "copied-modules-ignored": ("e2b::copied-modules", "numbers"),
    "wrong-tensors-dropped": ("e2b::unknown-module", "accepted"),
    "unwrapped-names-dropped": ("e2b::unwrapped-names", "no-effect"),
    "no-tensors-taken": ("e2b::no-tensors", "accepted"),
    "every-adapter-refused": ("e2b::half-a-pair", "refused"),
    "no-logprobs-with-adapters": ("e2b::half-a-pair", "incomplete"),
    "loaded-and-never-active": ("e2b::attention", "not-applied"),
    "adapter-of-another-request": ("e2b::side-by-side", "foreign"),
    "rows-without-adapters-get-one": ("e2b::side-by-side", "foreign"),
    "inactive-when-decoding": ("e2b::attention", "numbers"),
    "stacked-experts-dropped": ("experts::at-once", "no-effect"),
    "single-experts-dropped": ("experts::one-by-one", "no-effect"),
    "one-expert-dropped": ("experts::each-expert", "no-effect"),
    "expert-columns-by-expert": ("experts::at-once", "numbers"),
    "gate-and-up-exchanged": ("experts::one-by-one", "numbers"),
    "router-not-adapted": ("experts::with-attention", "numbers"),
    "embeddings-not-adapted": ("e2b::tables", "no-effect"),
    "head-not-adapted": ("e2b::mapping-tables", "mapping"),
    "head-and-embedding-change-together": ("e2b::tables", "numbers"),
    "scale-of-another-adapter": ("e2b::side-by-side", "isolation"),
    "outputs-rounded-where-adapters-act": ("e2b::tables", "zeroed"),
    "towers-of-a-text-model": ("e2b::mapping", "parts"),
    "audio-tower-hard-coded": ("media::parts-without-audio", "parts"),
    "audio-tower-left-out": ("media::parts", "parts"),
    "tile-embedder-not-adapted": ("unified::every-module", "no-effect"),
    "towers-not-adapted": ("media::all-parts", "numbers"),
    "connectors-not-adapted": ("media::all-parts", "numbers"),
    "layers-of-towers-dropped": ("media::all-parts", "numbers"),
    "media-of-another-request": ("media::different-images", "numbers"),
    "first-stage-alone": ("beside::pipeline", "numbers"),
    "last-stage-alone": ("beside::pipeline", "numbers"),
    "first-part-of-outputs": ("beside::tensor", "numbers"),
    "first-part-of-inputs": ("beside::tensor", "numbers"),
    "parts-of-experts-not-cut": ("beside::tensor-experts", "numbers"),
    "experts-counted-within-a-rank": ("beside::tensor-whole-experts", "numbers"),
    "prefixes-of-another-adapter": ("beside::prefixes", "numbers"),
    "dropped-in-verification": ("beside::eagle3", "numbers"),
    "rows-of-the-pass-before": ("beside::prefixes", "numbers"),
}
"""Fault to the case that must notice it, and a rule that it must break."""


@pytest.fixture(scope="module")
def suites() -> LoadedSuites:
    return load_suites([Path(__file__).parents[1] / "suites" / "lora"])


@pytest.fixture(scope="module")
def pool() -> Iterator[TargetPool]:
    made = TargetPool(timeout=120)
    yield made
    made.close()


def run(name: str, suites: LoadedSuites, pool: TargetPool) -> Result:
    (case,) = suites.match(f"lora/{name}")
    return run_case(case, "reference", pool, Expectations(()))


def test_every_fault_is_looked_for() -> None:
    faults = {fault.id for fault in registry().values() if fault.kind == "lora"}
    assert faults == set(CAUGHT)


@pytest.mark.parametrize("name", sorted({case for case, _ in CAUGHT.values()}))
def test_the_reference_breaks_no_rule(name: str, suites: LoadedSuites, pool: TargetPool) -> None:
    result = run(name, suites, pool)
    assert result.verdict == "pass", result


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_fault_is_noticed_by_name(fault: str, suites: LoadedSuites, pool: TargetPool) -> None:
    name, rule = CAUGHT[fault]
    known = registry()[fault]
    with known.applied():
        result = run(name, suites, pool)
    assert result.verdict == "fail"
    assert rule in {problem.rule for problem in result.problems}, result.problems
    assert result.area == known.area
    assert run(name, suites, pool).verdict == "pass", "a fault leaves nothing behind"


@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        ("audio-tower-hard-coded", {"media::mapping-without-audio", "media::parts-without-audio"}),
        ("audio-tower-left-out", {"media::parts"}),
        ("towers-of-a-text-model", {"e2b::mapping"}),
    ],
)
def test_the_parts_of_a_model_are_told_for_each_kind_of_it(
    fault: str, noticed: set[str], suites: LoadedSuites, pool: TargetPool
) -> None:
    """Text alone, with an audio tower and without: no other rule is broken, and no other case notices it."""
    cases = ("e2b::mapping", "media::parts", "media::parts-without-audio", "media::mapping-without-audio")
    with registry()[fault].applied():
        results = {case: run(case, suites, pool) for case in cases}
    rules = {case: {problem.rule for problem in result.problems} for case, result in results.items()}
    assert rules == {case: {"parts"} if case in noticed else set() for case in cases}


# ---------------------------------------------------------------------------- settings beside adapters


def test_a_layout_that_does_not_run_is_named(
    suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_generate, "spread", lambda _request: None)
    result = run("beside::tensor", suites, pool)
    assert {problem.rule for problem in result.problems} == {"wrong-tensor-parallel"}


def test_prefixes_that_are_never_found_are_named(
    suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockTables, "longest_hit", lambda _self, _content: 0)
    result = run("beside::prefixes", suites, pool)
    assert {problem.rule for problem in result.problems} == {"nothing-found"}


def test_only_what_may_be_refused_may_be(
    suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_request: object) -> None:
        raise EngineError("keys that layers share cannot be split over stages here")

    monkeypatch.setattr(reference_generate, "spread", refuse)
    assert run("beside::pipeline-shared-keys", suites, pool).verdict == "pass"
    result = run("beside::pipeline", suites, pool)
    assert [problem.rule for problem in result.problems] == ["raised"]


def test_an_answer_without_numbers_is_no_refusal(
    suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged adapter is taken, and the answer holds nothing."""
    original = ReferenceTarget.generate

    def generate(self: ReferenceTarget, request: GenerateRequest) -> GenerateResult:
        try:
            return original(self, request)
        except EngineError:
            made = Generation(token_ids=(5, 6), finish_reason="length", logprobs=())
            return GenerateResult(generations=(made,) * len(request.prompts))

    monkeypatch.setattr(ReferenceTarget, "generate", generate)
    result = run("e2b::half-a-pair", suites, pool)
    assert [problem.rule for problem in result.problems] == ["incomplete"], result.reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probes": ["q_proj"]}, "`probes` does nothing for `numbers`"),
        ({"experts": "single"}, "`experts` does nothing for `numbers`"),
        ({"keys": "text"}, "`keys` does nothing for `numbers`"),
        ({"judge": "liveness", "adapters": [], "max_new_tokens": 2}, "`max_new_tokens` does nothing"),
        ({"judge": "refusal", "damage": "half", "adapters": [{"modules": ["a"]}] * 2}, "damages one adapter"),
        ({"judge": "refusal", "damage": "half", "rows": [[{"text": 3}], [{"text": 4}]]}, "asks one row"),
        ({"way": {"given": "alone"}}, "are given together"),
        ({"way": {"repeat": 2}, "judge": "mapping", "adapters": []}, "`repeat` is for"),
        ({"way": {"dtype": "bfloat16"}}, "are computed in float32"),
        ({"shared": 24}, "a text of more than 24 tokens"),
        ({"plain": True, "judge": "mapping", "adapters": []}, "`plain` is for `numbers`"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, Any], message: str) -> None:
    case = {
        "id": "some-case", "title": "A title.", "source": ["spec 7.1"], "config": "e2b", "judge": "numbers",
        "adapters": [{"modules": ["q_proj"]}],
    }  # fmt: skip
    LoraCase.model_validate(case)
    with pytest.raises(ValidationError, match=message):
        LoraCase.model_validate({**case, **values})


# ---------------------------------------------------------------------------- differences that are small


def shifted(made: Generation, by: float) -> Generation:
    """An answer whose numbers are all a little larger."""
    top = tuple({token: value + by for token, value in best.items()} for best in made.top)
    return made.model_copy(update={"logprobs": tuple(value + by for value in made.logprobs), "top": top})


def lying(
    monkeypatch: pytest.MonkeyPatch, by: float, is_wrong: Callable[[GenerateRequest, int], bool]
) -> list[GenerateRequest]:
    """Lets the reference shift answers, by request and row; gives the requests that it has got."""
    original = ReferenceTarget.generate
    asked: list[GenerateRequest] = []

    def generate(self: ReferenceTarget, request: GenerateRequest) -> GenerateResult:
        asked.append(request)
        result = original(self, request)
        made = [
            shifted(one, by) if is_wrong(request, place % len(request.prompts)) else one
            for place, one in enumerate(result.generations)
        ]
        return result.model_copy(update={"generations": tuple(made)})

    monkeypatch.setattr(ReferenceTarget, "generate", generate)
    return asked


def is_zeroed(request: GenerateRequest, row: int) -> bool:
    folder = request.adapter_of[row]
    return folder is not None and "zeroed" in Path(folder).name


def test_zeros_that_change_a_last_digit_are_named(
    suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(monkeypatch, 1e-9, is_zeroed)
    result = run("e2b::tables", suites, pool)
    (problem,) = result.problems
    assert problem.rule == "zeroed"
    assert set(problem.got) == {
        "language_model.embed_tokens", "language_model.embed_tokens_per_layer", "lm_head"
    }  # fmt: skip


@pytest.mark.parametrize(("by", "rules"), [(1e-6, []), (1e-4, ["zeroed"])])
def test_zeros_in_batches_of_other_sizes_may_differ_by_rounding(
    by: float, rules: list[str], suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(monkeypatch, by, is_zeroed)
    known = ReferenceTarget.generate

    def in_turn(self: ReferenceTarget, request: GenerateRequest) -> GenerateResult:
        return known(self, request).model_copy(update={"batches": len(set(request.adapter_of))})

    monkeypatch.setattr(ReferenceTarget, "generate", in_turn)
    assert [problem.rule for problem in run("e2b::tables", suites, pool).problems] == rules


def test_what_adapters_leave_behind_is_named(
    suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GenerateRequest] = []
    asked = lying(monkeypatch, 1e-9, lambda request, _row: not any(request.adapters) and len(asked) > 1)
    result = run("e2b::side-by-side", suites, pool)
    assert [problem.rule for problem in result.problems] == ["left-over"]
    assert [request.mixed for request in asked] == [False, False, True, False, False, False]


@pytest.mark.parametrize(("by", "rules"), [(1e-6, []), (1e-4, ["isolation"])])
def test_a_row_that_depends_on_its_neighbours_is_named(
    by: float, rules: list[str], suites: LoadedSuites, pool: TargetPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By less than what merged weights could tell."""
    lying(monkeypatch, by, lambda request, row: request.mixed and row == 1)
    assert [problem.rule for problem in run("e2b::side-by-side", suites, pool).problems] == rules
