"""`generate` of the transformers target, in its worker: what it says is what the bundled model computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.errors import EngineError
from conformance.targets import bundled, reference_generate, registry
from conformance.targets.protocol import (
    EngineOptions,
    GenerateRequest,
    GenerateResult,
    Speculation,
    Target,
)
from tests.lora_adapters import pair, write

LINES = ("plain", "unicode", "thought", "call-nested")
DIALOGUES = bundled.dialogues("alone", LINES) + bundled.dialogues("all", LINES)


@pytest.fixture(scope="module", params=["transformers@5.19.0", "transformers@5.18.0"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if reason := registry.unavailable(request.param):
        pytest.skip(reason)
    opened = registry.open_target(request.param)
    yield opened
    opened.close()


def ask(target: Target, **changes: Any) -> GenerateResult:
    request = {
        "checkpoint": str(bundled.checkpoint()),
        "prompts": tuple(dialogue.prompt for dialogue in DIALOGUES),
        "max_new_tokens": 200,
        "stop_ids": bundled.STOP_IDS,
    }
    return target.generate(GenerateRequest(**(request | changes)))


def test_it_says_so(target: Target) -> None:
    info = registry.describe(target)
    assert "generate" in info.capabilities
    assert info.features[0] == "media"  # of forward passes
    images = "preprocess" in info.capabilities
    always = {"assistant", "prefill-chunk", "threads", "sampling", "repeat", "states"}
    media = {"images", "sounds"} if images else set()
    adapters = {"lora", "mixed-adapters"} if "lora" in info.features else set()  # where PEFT is installed
    assert set(info.features[1:]) == always | media | adapters


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_tokens_and_numbers_are_the_bundled_model_s(target: Target, attention: str | None) -> None:
    result = ask(target, top_logprobs=3, options=EngineOptions(attention=attention))
    assert len({len(dialogue.prompt) for dialogue in DIALOGUES}) > 1  # so that some are padded
    answers = [made.token_ids for made in result.generations]
    assert answers == [dialogue.answer for dialogue in DIALOGUES]
    assert {made.finish_reason for made in result.generations} == {"stop"}
    prompts = [dialogue.prompt for dialogue in DIALOGUES]
    truth = reference_generate.logprobs(bundled.checkpoint(), prompts, (), answers, "float32")
    for made, row in zip(result.generations, truth, strict=True):
        own = row.gather(1, torch.tensor(made.token_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(made.logprobs), own, atol=1e-4)
        for place, best in enumerate(made.top):
            assert set(best) == set(row[place].topk(3).indices.tolist())
            assert all(abs(value - float(row[place, token])) < 1e-3 for token, value in best.items())
    assert result.effective == {
        "attention": attention or "sdpa",
        "dtype": "float32",
        "tensor_parallel": "1",
        "pipeline_parallel": "1",
        "speculation": "none",
        "adapter": "none",
        "cache": "dynamic",
        "threads": result.effective["threads"],
    }


def test_it_stops_at_the_limit(target: Target) -> None:
    result = ask(target, max_new_tokens=2, options=EngineOptions(dtype="bfloat16"))
    assert [made.token_ids for made in result.generations] == [d.answer[:2] for d in DIALOGUES]
    assert {made.finish_reason for made in result.generations} == {"length"}
    assert {(len(made.logprobs), made.top) for made in result.generations} == {(2, ())}
    assert result.effective["dtype"] == "bfloat16"


def test_without_stop_tokens_only_the_limit_ends_an_answer(target: Target) -> None:
    dialogue = next(d for d in DIALOGUES if d.line == "plain")
    limit = len(dialogue.answer) + 3
    result = ask(target, prompts=(dialogue.prompt,), max_new_tokens=limit, stop_ids=())
    (made,) = result.generations
    assert (len(made.token_ids), made.finish_reason) == (limit, "length")
    assert made.token_ids[: len(dialogue.answer)] == dialogue.answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": EngineOptions(tensor_parallel=2)}, "without tensor parallelism"),
        ({"options": EngineOptions(pipeline_parallel=2)}, "without pipeline parallelism"),
        (
            {"options": EngineOptions(speculation=Speculation(method="eagle3", checkpoint="x"))},
            "without speculative decoding by an Eagle3 head",
        ),
        ({"adapter": "somewhere"}, "."),
        ({"prompts": ((2, 3),), "images": (("a.png",),)}, "."),
        ({"options": EngineOptions(max_model_len=100)}, "max_model_len is 100"),
        ({"checkpoint": str(Path(__file__).parent)}, "."),
    ],
)
def test_what_it_cannot_do_is_refused(target: Target, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        ask(target, **changes)


def test_whose_a_picture_is_cannot_be_told_if_some_prompts_have_none(target: Target, tmp_path: Path) -> None:
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"
    adapter = write(tmp_path / "adapter", pair(name, 48, 48), target_modules=[name])
    has_peft = "mixed-adapters" in registry.describe(target).features
    with pytest.raises(EngineError, match="by its place; give each prompt exactly one" if has_peft else "."):
        ask(
            target,
            prompts=((2, 5), (2, 5)),
            images=((), ("unread.png",)),
            adapters=(str(adapter), None),
            mixed=True,
        )
