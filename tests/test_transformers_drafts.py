"""`generate` of the transformers target with an assistant, once `generate` can start one (F-334)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conformance.invariance.models import MODELS
from conformance.targets import reference_model
from conformance.targets.generation import EngineOptions, GenerateRequest, Generation, Sampling, Speculation
from model_impl.speculative import guessing
from tests.media_oracle import ask
from tests.model_configs import random_ids

PROMPTS = tuple(tuple(random_ids(1, length, seed=length)[0].tolist()) for length in (3, 15, 17))
"""The target's window is 16."""
ANSWER = 22
TOKENS = (1, 3, 5)
"""That the assistant drafts a round."""
WIDE = 5
"""Alternatives at each place."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A target that says something, an assistant that guesses part of it, and one that guesses nothing."""
    target, good, bad = (tmp_path_factory.mktemp(part) for part in ("target", "good", "bad"))
    reference_model.write_speaking(MODELS["dense"], target, seed=1)
    guessing.write_assistant(target, good, guesses=True, seed=1)
    guessing.write_assistant(target, bad, guesses=False, seed=2)
    return target, good, bad


def request(
    target: Path, draft: Path | None, tokens: int = 3, method: Any = "assistant", **changes: Any
) -> dict[str, Any]:
    """One as it goes to the worker."""
    speculation = None
    if draft is not None:
        speculation = Speculation(method=method, checkpoint=str(draft), tokens=tokens)
    options = EngineOptions(speculation=speculation, threads=1, **changes.pop("options", {}))
    asked = {"prompts": PROMPTS, "max_new_tokens": ANSWER, "top_logprobs": WIDE} | changes
    return GenerateRequest(checkpoint=str(target), options=options, **asked).model_dump(mode="json")


def answers_of(found: dict[str, Any]) -> list[Generation]:
    return [Generation.model_validate(made) for made in found["generations"]]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path, Path]
) -> dict[str, dict[str, Any]]:
    """Results by name; `passes` is how many the target made."""
    target, good, bad = folders
    requests = {
        "alone": request(target, None),
        **{f"good-{tokens}": request(target, good, tokens) for tokens in TOKENS},
        "bad": request(target, bad),
        "chunked": request(target, good, options={"prefill_chunk": 4}),
        "drawn": request(target, good, sampling=Sampling(seed=3), samples=2),
    }
    # A token in the middle of the first answer, where the others may have it or not.
    stop = _middle(tmp_path_factory, requests["alone"])
    requests["alone-stops"] = request(target, None, stop_ids=(stop,))
    requests["good-stops"] = request(target, good, stop_ids=(stop,))
    refused = {
        "as it is": request(target, good),
        "eagle3": request(target, good, method="eagle3"),
        "mixed": request(target, good, adapters=("one", "other", None), mixed=True),
    }
    made, _ = _ask(tmp_path_factory, "all", list(requests.values()), refused)
    results = {
        name: answer | {"passes": passes}
        for name, answer, passes in zip(requests, made["answers"], made["passes"], strict=True)
    }
    return results | {"refused": made["refused"], "inside": made["inside"]}


def _ask(
    factory: pytest.TempPathFactory, name: str, requests: Sequence[Any], refused: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    asked = {"adapter": {"requests": requests, "refused": refused}}
    answers, tensors = ask(factory, "assistant", f"drafts-{name}", asked)
    return answers["adapter"], tensors


def _middle(factory: pytest.TempPathFactory, alone: Any) -> int:
    made, _ = _ask(factory, "alone", [alone], {})
    first = answers_of(made["answers"][0])[0].token_ids
    return next(token for place, token in enumerate(first) if place > 4 and token not in first[:place])


def assert_same(made: Sequence[Generation], alone: Sequence[Generation]) -> None:
    for one, other in zip(made, alone, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        for ours, theirs in zip(one.top, other.top, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", [*(f"good-{tokens}" for tokens in TOKENS), "bad", "chunked"])
def test_drafts_change_neither_tokens_nor_numbers(found: dict[str, Any], name: str) -> None:
    assert_same(answers_of(found[name]), answers_of(found["alone"]))


def test_a_stop_token_within_a_draft_ends_the_answer(found: dict[str, Any]) -> None:
    made = answers_of(found["good-stops"])
    assert made[0].finish_reason == "stop"
    assert len(made[0].token_ids) < ANSWER
    assert_same(made, answers_of(found["alone-stops"]))


@pytest.mark.parametrize("name", [*(f"good-{tokens}" for tokens in TOKENS), "good-stops", "bad", "drawn"])
def test_rounds_are_told(found: dict[str, Any], name: str) -> None:
    """The first token comes without a draft; each pass of the target brings one token besides what stayed."""
    made = answers_of(found[name])
    tokens = int(name.split("-")[1]) if name.split("-")[1:] and name != "good-stops" else 3
    passes = 0
    for answer in made:
        assert answer.accepted is not None
        assert len(answer.accepted) == len(answer.drafted)
        assert all(
            0 <= stayed <= drafted <= tokens
            for stayed, drafted in zip(answer.accepted, answer.drafted, strict=True)
        )
        passes += len(answer.token_ids) - sum(answer.accepted)
    assert passes == found[name]["passes"]
    assert found[name]["effective"]["speculation"] == "assistant"


def test_a_good_assistant_saves_passes_and_a_bad_one_few(found: dict[str, Any]) -> None:
    good, bad = found["good-3"]["passes"], found["bad"]["passes"]
    assert good < bad <= len(PROMPTS) * ANSWER
    every = itertools.chain.from_iterable(made.accepted or () for made in answers_of(found["good-3"]))
    assert max(every) > 1


def test_without_an_assistant_nothing_is_told_of_rounds(found: dict[str, Any]) -> None:
    assert {made.accepted for made in answers_of(found["alone"])} == {None}
    assert found["alone"]["effective"]["speculation"] == "none"
    assert found["alone"]["passes"] == ANSWER


def test_an_assistant_is_no_part_of_its_target(found: dict[str, Any]) -> None:
    """An adapter for the target would adapt it too, as their modules have the same names."""
    assert "Gemma4ForCausalLM" in found["inside"]
    assert not [name for name in found["inside"] if "Assistant" in name]


def test_a_chunk_that_is_not_obeyed_is_not_claimed(found: dict[str, Any]) -> None:
    assert "prefill_chunk" not in found["chunked"]["effective"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("as it is", "TypeError: SinglePositionMultiTokenCandidateGenerator.__init__() missing 2 required"),
        (
            "eagle3",
            "RequestError: the transformers adapter generates without speculative decoding by an Eagle3",
        ),
        ("mixed", "RequestError: an assistant drafts for one row"),
    ],
)
def test_what_cannot_be_answered_is_an_error(found: dict[str, Any], name: str, message: str) -> None:
    """The first is transformers' own: when it is mended, so are the expectations of F-334."""
    assert found["refused"][name].startswith(message)
