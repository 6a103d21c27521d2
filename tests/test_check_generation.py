"""The generation check: each rule, on targets that change one thing of what the bundled model says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from conformance import media_files, resources
from conformance.checks import CheckOutcome, judge
from conformance.errors import EngineError, SuiteError
from conformance.loading import case_digest, load_suite
from conformance.media import Picture
from conformance.oracles import Oracles
from conformance.suites import GenerationCase, GenerationSuite, PicturePrompt, RandomAdapter, RandomDraft
from conformance.targets import bundled, reference_generate
from conformance.targets.protocol import (
    Capability,
    EngineOptions,
    Feature,
    GenerateRequest,
    GenerateResult,
    Generation,
    TargetInfo,
)
from model_impl.nano.script import load_script
from model_impl.preprocess.images import load_image
from tests.test_scripted_checkpoint import MANIFEST

LINES = ("plain", "call", "unicode")
FEATURES: tuple[Feature, ...] = (
    *("tensor-parallel", "pipeline-parallel", "eagle3", "kv-dtype", "lora", "images"),
)
Change = Callable[[GenerateResult], GenerateResult]


@pytest.fixture(scope="module")
def oracles() -> Iterator[Oracles]:
    made = Oracles(lambda spec: pytest.fail(f"{spec} was opened"))
    yield made
    made.close()


class Fake:
    """The bundled implementation with every feature: what it cannot do it does by other means."""

    def __init__(
        self,
        change: Change = lambda result: result,
        *,
        capabilities: tuple[Capability, ...] = ("generate",),
        features: tuple[Feature, ...] = FEATURES,
        merged: Path | None = None,
        ask: Callable[[GenerateRequest], GenerateRequest] = lambda request: request,
    ) -> None:
        self.spec = "fake"
        self.change = change
        self.capabilities = capabilities
        self.features = features
        self.merged = merged
        self.ask = ask
        self.requests: list[GenerateRequest] = []

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name="fake",
            version="1",
            capabilities=self.capabilities,
            features=self.features,
            unavailable={} if "generate" in self.capabilities else {"generate": "run `install fake`"},
        )

    def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        options = request.options
        alone = {"tensor_parallel": 1, "pipeline_parallel": 1, "speculation": None}
        plain = self.ask(request).options.model_copy(update=alone)
        answered = self.ask(request).model_copy(
            update={
                "options": plain,
                "adapter": None,
                "checkpoint": str(self.merged) if self.merged else request.checkpoint,
            }
        )
        result = reference_generate.generate(answered)
        effective = result.effective | {
            "tensor_parallel": str(options.tensor_parallel),
            "pipeline_parallel": str(options.pipeline_parallel),
            "speculation": options.speculation.method if options.speculation else "none",
            "adapter": "4 modules" if request.adapter else "none",
        }
        return self.change(result.model_copy(update={"effective": effective}))

    def close(self) -> None:
        pass


def case_of(**fields: Any) -> GenerationCase:
    return GenerationCase(
        **({"id": "one", "title": "A case of the tests.", "source": ("spec 1.6",), "lines": LINES} | fields)
    )


def judged(case: GenerationCase, target: Any, oracles: Oracles) -> CheckOutcome:
    suite = GenerationSuite(
        kind="generation",
        id="tests/one",
        title="Tests",
        description="For tests.",
        area="generation",
        checkpoint="scripted",
        cases=(case,),
    )
    return judge(case, suite, target, oracles=oracles)


def rules(outcome: CheckOutcome) -> list[str]:
    return [problem.rule for problem in outcome.problems]


def with_row(number: int, **fields: Any) -> Change:
    """Change fields of one answer; a function makes the new value from the answer."""

    def change(result: GenerateResult) -> GenerateResult:
        rows = list(result.generations)
        row = rows[number]
        values = {key: value(row) if callable(value) else value for key, value in fields.items()}
        rows[number] = row.model_copy(update=values)
        return result.model_copy(update={"generations": tuple(rows)})

    return change


def effective(**fields: str) -> Change:
    return lambda result: result.model_copy(update={"effective": result.effective | fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lines": ()},
        {"asked": "all", "copies": 2},
        {"max_new_tokens": 7},
        {"max_new_tokens": 12, "lines": ()},
        {"dtype": "bfloat16"},
        {"tensor_parallel": 2},
        {"eagle3": RandomDraft(layers=(1, 2, 3))},
        {"top_logprobs": 0},
        {"kv_dtype": "bfloat16"},
        {"kv_dtype": "fp8_e4m3"},
        {"kv_dtype": "fp8_e5m2", "dtype": "bfloat16"},
    ],
)
def test_the_bundled_model_passes(fields: dict[str, Any], oracles: Oracles) -> None:
    outcome = judged(case_of(**fields), Fake(), oracles)
    assert (outcome.verdict, outcome.problems) == ("pass", ())


def shifted(row: Generation) -> tuple[float, ...]:
    return (*row.logprobs[:-1], row.logprobs[-1] - 0.002)


def shifted_top(row: Generation) -> tuple[dict[int, float], ...]:
    least = min(row.top[-1], key=row.top[-1].__getitem__)
    return (*row.top[:-1], row.top[-1] | {least: row.top[-1][least] + 0.002})


def other_token(row: Generation) -> tuple[int, ...]:
    return (*row.token_ids[:3], 9, *row.token_ids[4:])


def backwards(result: GenerateResult) -> GenerateResult:
    return result.model_copy(update={"generations": result.generations[::-1]})


@pytest.mark.parametrize(
    ("change", "fields", "found"),
    [
        (with_row(1, token_ids=other_token), {}, {"tokens", "logprobs"}),
        (with_row(2, finish_reason="length"), {}, {"finish-reason"}),
        (with_row(0, finish_reason="stop"), {"max_new_tokens": 2}, {"finish-reason"}),
        (with_row(2, logprobs=shifted), {}, {"logprobs"}),
        (with_row(2, logprobs=lambda row: (math.nan, *row.logprobs[1:])), {}, {"logprobs"}),
        (with_row(2, logprobs=lambda row: row.logprobs[1:]), {}, {"logprobs"}),
        (with_row(0, top=shifted_top), {}, {"logprobs"}),
        (with_row(0, top=()), {}, {"logprobs"}),
        (with_row(0, top=lambda row: tuple({} for _ in row.top)), {}, {"logprobs"}),
        (with_row(0, top=lambda row: ({}, *row.top[1:])), {}, {"logprobs"}),
        (lambda result: result.model_copy(update={"generations": result.generations[1:]}), {}, {"answers"}),
        (backwards, {}, {"tokens", "logprobs"}),
        (effective(dtype="bfloat16"), {}, {"wrong-dtype"}),
        (effective(attention="eager"), {"attention": "sdpa"}, {"wrong-attention"}),
        (effective(tensor_parallel="1"), {"tensor_parallel": 2}, {"wrong-tensor-parallel"}),
        (effective(pipeline_parallel="1"), {"pipeline_parallel": 2}, {"wrong-pipeline-parallel"}),
        (effective(kv_dtype="float32"), {"kv_dtype": "fp8_e4m3"}, {"wrong-kv-dtype"}),
        (effective(speculation="none"), {"eagle3": RandomDraft(layers=(1, 2, 3))}, {"wrong-speculation"}),
        (effective(speculation="eagle3"), {}, {"wrong-speculation"}),
        (effective(adapter="4 modules"), {}, {"wrong-adapter"}),
        (lambda result: result.model_copy(update={"effective": {}}), {}, {
            "wrong-dtype", "wrong-tensor-parallel", "wrong-pipeline-parallel", "wrong-speculation"
        }),
    ],
)  # fmt: skip
def test_each_lie_breaks_its_rule(
    change: Change, fields: dict[str, Any], found: set[str], oracles: Oracles
) -> None:
    outcome = judged(case_of(**fields), Fake(change), oracles)
    assert outcome.verdict == "fail"
    assert set(rules(outcome)) == found


def test_many_differences_are_told_in_few_words(oracles: Oracles) -> None:
    def other(result: GenerateResult) -> GenerateResult:
        rows = tuple(
            row.model_copy(update={"token_ids": (9, *row.token_ids[1:])}) for row in result.generations
        )
        return result.model_copy(update={"generations": rows})

    outcome = judged(case_of(lines=()), Fake(other), oracles)
    assert rules(outcome) == ["tokens"] * 4 + ["logprobs"] * 2
    assert "'plain' differs from its token 0 on" in outcome.problems[0].message
    count = len(bundled.lines()) - 3
    assert outcome.problems[3].message == f"{count} more such differences"


def test_bfloat16_numbers_that_are_no_rounding(oracles: Oracles) -> None:
    def far(result: GenerateResult) -> GenerateResult:
        return with_row(0, logprobs=lambda row: tuple(value - 0.01 for value in row.logprobs))(result)

    assert rules(judged(case_of(dtype="bfloat16"), Fake(far), oracles)) == ["logprobs"]


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("fp8_e4m3", None),
        ("fp8_e4m3", "bfloat16"),
        ("fp8_e4m3", "fp8_e5m2"),
        ("fp8_e5m2", "fp8_e4m3"),
        ("bfloat16", "float16"),
    ],
)
def test_an_engine_that_stores_something_else_than_it_says(
    asked: str, used: str | None, oracles: Oracles
) -> None:
    def other(request: GenerateRequest) -> GenerateRequest:
        options = request.options.model_copy(update={"kv_dtype": used})
        return request.model_copy(update={"options": options})

    outcome = judged(case_of(kv_dtype=asked), Fake(effective(kv_dtype=asked), ask=other), oracles)
    assert rules(outcome) == ["logprobs"]


ADAPTER = RandomAdapter(seed=1, modules=("q_proj", "k_proj", "v_proj", "o_proj"))


def test_an_adapter_must_act_as_if_merged(oracles: Oracles) -> None:
    case = case_of(adapter=ADAPTER)
    merged = oracles.merged(bundled.checkpoint(), ADAPTER)
    assert judged(case, Fake(merged=merged), oracles).verdict == "pass"
    ignored = judged(case, Fake(), oracles)
    assert rules(ignored) == ["logprobs"]
    silent = judged(case, Fake(effective(adapter="none"), merged=merged), oracles)
    assert rules(silent) == ["wrong-adapter"]


@pytest.mark.parametrize("module", ADAPTER.modules)
def test_an_adapter_of_which_one_module_is_lost_is_noticed(module: str, oracles: Oracles) -> None:
    """The weights of the suite's adapter are strong enough for each of its modules."""
    kept = ADAPTER.model_copy(update={"modules": tuple(name for name in ADAPTER.modules if name != module)})
    merged = oracles.merged(bundled.checkpoint(), kept)
    outcome = judged(case_of(adapter=ADAPTER, lines=()), Fake(merged=merged), oracles)
    assert "logprobs" in rules(outcome)


def test_what_a_target_cannot_do_is_skipped_with_what_to_do(oracles: Oracles) -> None:
    outcome = judged(case_of(), Fake(capabilities=()), oracles)
    assert (outcome.verdict, outcome.reason) == (
        "skip",
        "fake has no capability `generate`: run `install fake`",
    )
    target = Fake(features=("lora",))
    outcome = judged(case_of(tensor_parallel=2, adapter=ADAPTER), target, oracles)
    assert (outcome.verdict, outcome.reason) == ("skip", "fake cannot generate with tensor-parallel")
    assert target.requests == []


def test_an_exception_of_the_engine_is_its_answer(oracles: Oracles) -> None:
    class Refusing(Fake):
        def generate(self, request: GenerateRequest) -> GenerateResult:
            raise EngineError("ValueError: no such layout")

    outcome = judged(case_of(), Refusing(), oracles)
    assert rules(outcome) == ["raised"]
    assert "no such layout" in outcome.problems[0].message


def test_the_bundled_model_refuses_what_it_cannot_do() -> None:
    request = GenerateRequest(
        checkpoint=str(bundled.checkpoint()),
        prompts=((2, 105),),
        max_new_tokens=2,
        options=EngineOptions(cache="contiguous", block_size=16, prefix_cache=True),
    )
    with pytest.raises(
        EngineError, match="a contiguous cache has no block-size, prefix-cache; ask for 'paged'"
    ):
        reference_generate.generate(request)


# ------------------------------------------------------------------------------------------------ pictures


def about(line: str, *colours: str, width: int = 96) -> PicturePrompt:
    shows = [{"width": width, "height": 96, "colour": colour} for colour in colours]
    return PicturePrompt.model_validate({"line": line, "shows": shows})


SEEN = (
    about("colours", "red", "blue"),
    about("colour", "green", width=300),
    about("sight", "white"),
    about("colour"),
)


def pictured(**fields: Any) -> GenerationCase:
    return case_of(**({"lines": (), "pictures": SEEN} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lines": LINES, "copies": 2},
        {"asked": "all"},
        {"causal_images": True},
        {"dtype": "bfloat16"},
        {"max_new_tokens": 3},
        {"pictures": (about("colour"),)},
    ],
)
def test_the_bundled_model_sees_pictures(fields: dict[str, Any], oracles: Oracles) -> None:
    target = Fake()
    outcome = judged(pictured(**fields), target, oracles)
    assert (outcome.verdict, outcome.problems) == ("pass", ())
    (request,) = target.requests
    shown = [len(prompt.shows) for prompt in fields.get("pictures", SEEN)] * fields.get("copies", 1)
    assert sorted(map(len, request.images)) == sorted([*shown, *[0] * (len(request.prompts) - len(shown))])


def test_prompts_without_pictures_stand_between_those_with_some(oracles: Oracles) -> None:
    target = Fake()
    assert judged(pictured(lines=LINES), target, oracles).verdict == "pass"
    assert [len(files) for files in target.requests[0].images] == [0, 2, 0, 1, 0, 1, 0]


def swapped(request: GenerateRequest) -> GenerateRequest:
    return request.model_copy(update={"images": tuple(files[::-1] for files in request.images)})


def of_another_prompt(request: GenerateRequest) -> GenerateRequest:
    one = [files for files in request.images if len(files) == 1]
    others = iter(one[::-1])
    images = tuple(next(others) if len(files) == 1 else files for files in request.images)
    return request.model_copy(update={"images": images})


def without(request: GenerateRequest) -> GenerateRequest:
    image = bundled.tokenizer().token_to_id("<|image|>")
    prompts = tuple(tuple(token for token in prompt if token != image) for prompt in request.prompts)
    return request.model_copy(update={"images": (), "prompts": prompts})


@pytest.mark.parametrize(
    ("ask", "wrong"),
    [
        (swapped, {"colours (red, blue)"}),
        (of_another_prompt, {"colour (green)"}),
        (without, {"colours (red, blue)", "colour (green)", "sight (white)"}),
    ],
)
def test_other_pictures_than_those_asked_about(
    ask: Callable[[GenerateRequest], GenerateRequest], wrong: set[str], oracles: Oracles
) -> None:
    outcome = judged(pictured(), Fake(ask=ask), oracles)
    assert set(rules(outcome)) == {"tokens", "logprobs"}
    told = {p.message.split("'")[1] for p in outcome.problems if p.rule == "tokens"}
    assert told == wrong


@pytest.mark.parametrize("causal", [False, True])
def test_soft_tokens_that_are_masked_by_the_other_rule(causal: bool, oracles: Oracles) -> None:
    other = bundled.checkpoint(causal_images=not causal)
    outcome = judged(pictured(causal_images=causal), Fake(merged=other), oracles)
    assert set(rules(outcome)) == {"tokens", "logprobs"}
    words = [problem for problem in outcome.problems if problem.rule == "tokens"]
    assert ["'sight (white)'" in problem.message for problem in words] == [True]
    quiet = judged(pictured(causal_images=causal, pictures=SEEN[:2]), Fake(merged=other), oracles)
    assert set(rules(quiet)) == {"logprobs"}, "words come out right, numbers do not"


def test_the_evidence_names_the_pictures(oracles: Oracles) -> None:
    evidence = judged(pictured(pictures=SEEN[:1]), Fake(), oracles).evidence
    assert '"colour": "blue"' in str(evidence.input)
    assert "<|image|><|image|>Say #colours." in str(evidence.input)
    assert evidence.expected == {"colours (red, blue)": "The first is red, the second is blue.<turn|>"}


def test_a_target_that_sees_no_pictures_is_skipped(oracles: Oracles) -> None:
    target = Fake(features=("lora",))
    outcome = judged(pictured(), target, oracles)
    assert (outcome.verdict, outcome.reason) == ("skip", "fake cannot generate with images")
    assert target.requests == []


def test_placeholders_that_do_not_match_the_pictures() -> None:
    request = GenerateRequest(
        checkpoint=str(bundled.checkpoint()),
        prompts=((2, 105), (2, 55, 105)),
        images=((), ("nowhere.png",)),
        max_new_tokens=2,
    )
    with pytest.raises(EngineError, match=r"nowhere\.png: cannot be read"):
        reference_generate.generate(request)
    with pytest.raises(EngineError, match="prompt 0 has 0 placeholders and 1 pictures"):
        reference_generate.generate(request.model_copy(update={"images": (("nowhere.png",), ())}))


@pytest.mark.parametrize("fields", [{"damage": "empty"}, {"claimed": (9, 9)}, {"mode": "L"}])
def test_pictures_that_have_no_known_colour_are_refused(fields: dict[str, Any]) -> None:
    picture = Picture(width=9, height=9, colour="red", **fields)
    with pytest.raises(ValidationError, match="must be whole, and keep its colour"):
        PicturePrompt(line="colour", shows=(picture,))


def test_the_script_has_words_for_what_cases_can_ask() -> None:
    script = load_script().pictures
    fields = PicturePrompt.model_fields
    assert {line.id for line in script.lines} == set(get_args(fields["line"].annotation))
    (most,) = (limit.max_length for limit in fields["shows"].metadata if hasattr(limit, "max_length"))
    assert most == len(script.ordinals)
    known = {name for name in get_args(Picture.model_fields["colour"].annotation) if name}
    assert known == set(script.colours)
    for name, colour in script.colours.items():
        data = media_files.picture_bytes(Picture(width=1, height=1, colour=name))  # type: ignore[arg-type]
        assert load_image(data, name).flatten().tolist() == list(colour)


# ---------------------------------------------------------------------------------------- the suite's file


def test_the_suite_covers_every_option_and_line() -> None:
    suite = load_suite(resources.suites_dir() / "generation" / "scripted.yaml").suite
    assert isinstance(suite, GenerationSuite)
    assert {feature for case in suite.cases for feature in case.options().features} == {
        "tensor-parallel",
        "pipeline-parallel",
        "eagle3",
        "kv-dtype",
    }
    assert {name for case in suite.cases if case.adapter for name in case.adapter.modules} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {case.asked for case in suite.cases} >= {"alone", "thinking", "all"}
    seen = load_suite(resources.suites_dir() / "generation" / "scripted-vision.yaml").suite
    assert isinstance(seen, GenerationSuite)
    assert {prompt.line for case in seen.cases for prompt in case.pictures} == {"colour", "colours", "sight"}
    assert {case.causal_images for case in seen.cases} == {False, True}
    assert len(bundled.lines()) >= 30


def test_an_unknown_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "suites" / "generation" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        "kind: generation\nid: generation/mine\ntitle: Mine\ndescription: Mine.\narea: generation\n"
        "checkpoint: scripted\ncases:\n"
        "  - {id: one, title: A line that is not there, source: [spec 1.6], lines: [plain, nothing]}\n"
    )
    with pytest.raises(
        SuiteError, match=r"mine\.yaml:8.*the script has no line 'nothing'; its lines are plain"
    ):
        load_suite(file)


def test_the_digest_holds_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite(resources.suites_dir() / "generation" / "scripted.yaml").suite
    assert bundled.digests() == MANIFEST["sha256"]
    before = case_digest(suite.cases[0], suite)
    monkeypatch.setattr(bundled, "digests", lambda: {"model.safetensors": "other"})
    assert case_digest(suite.cases[0], suite) != before
