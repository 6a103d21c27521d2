"""Generation from sounds and pictures together: a small hearing checkpoint under several implementations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from PIL import Image
from pydantic import ValidationError

from conformance.errors import EngineError
from conformance.targets import bundled, registry
from conformance.targets.protocol import (
    EngineOptions,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    Target,
)
from conformance.targets.reference import ReferenceTarget
from model_impl.nano.families import FAMILIES
from model_impl.nano.settings import write_texts
from model_impl.nano.vocabulary import vocabulary_size
from model_impl.random_weights import write_checkpoint


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of nano-e's shape with random weights."""
    folder = tmp_path_factory.mktemp("hearing")
    family, tokenizer = FAMILIES["nano-e"], bundled.tokenizer()
    config = family.config(vocabulary_size(tokenizer))
    write_checkpoint(config, folder, seed=3)
    write_texts(folder, tokenizer, config, family.template)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sounds of different lengths and a picture."""
    folder = tmp_path_factory.mktemp("media")
    for name, samples, pitch in (("low", 9000, 200), ("high", 14_000, 900)):
        wave = 0.4 * np.sin(2 * np.pi * pitch * np.arange(samples) / 16_000)
        soundfile.write(folder / f"{name}.wav", wave.astype(np.float32), 16_000, subtype="FLOAT")
    Image.new("RGB", (70, 50), (250, 20, 20)).save(folder / "red.png")
    return {path.stem: str(path) for path in folder.iterdir()}


def ids(text: str) -> tuple[int, ...]:
    return tuple(bundled.tokenizer().encode(text, add_special_tokens=False).ids)


def ask(target: Target, checkpoint: Path, media: dict[str, str], **changes: Any) -> GenerateResult:
    """Prompts with one sound, with two and a picture, and with nothing."""
    request: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "prompts": (
            ids("<bos>Hear <|audio|>."),
            ids("<bos><|audio|> and <|audio|> and <|image|> say"),
            ids("<bos>Nothing at all"),
        ),
        "sounds": ((media["low"],), (media["high"], media["low"]), ()),
        "images": ((), (media["red"],), ()),
        "max_new_tokens": 6,
        "top_logprobs": 2,
    }
    return target.generate(GenerateRequest(**(request | changes)))


def numbers(result: GenerateResult) -> list[list[float]]:
    return [list(made.logprobs) for made in result.generations]


@pytest.fixture(params=["transformers@5.19.0"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    if reason := registry.unavailable(request.param):
        pytest.skip(reason)
    opened = registry.open_target(request.param)
    yield opened
    opened.close()


def test_implementations_agree(target: Target, hearing: Path, media: dict[str, str]) -> None:
    expected = ask(ReferenceTarget(), hearing, media)
    result = ask(target, hearing, media)
    assert [made.token_ids for made in result.generations] == [m.token_ids for m in expected.generations]
    for mine, theirs in zip(numbers(result), numbers(expected), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_what_is_heard_decides(hearing: Path, media: dict[str, str]) -> None:
    target = ReferenceTarget()
    first, second, third = numbers(ask(target, hearing, media))
    other = numbers(ask(target, hearing, media, sounds=((media["high"],), (media["low"], media["high"]), ())))
    assert other[0] != pytest.approx(first, abs=1e-3)
    assert other[1] != pytest.approx(second, abs=1e-3), "their order counts"
    assert other[2] == pytest.approx(third, abs=1e-4)


def test_a_row_is_the_same_alone(hearing: Path, media: dict[str, str]) -> None:
    target = ReferenceTarget()
    alone = ask(
        target,
        hearing,
        media,
        prompts=(ids("<bos>Hear <|audio|>."),),
        sounds=((media["low"],),),
        images=(),
    )
    assert numbers(alone)[0] == pytest.approx(numbers(ask(target, hearing, media))[0], abs=1e-4)


def test_places_and_sounds_must_match(hearing: Path, media: dict[str, str]) -> None:
    with pytest.raises(EngineError, match="prompt 0 has 1 placeholders and 2 sounds"):
        ask(ReferenceTarget(), hearing, media, sounds=((media["low"],) * 2, (), ()))
    with pytest.raises(EngineError, match="this model has no audio tower"):
        ask(ReferenceTarget(), bundled.checkpoint(), media)
    with pytest.raises(ValidationError, match="sounds for 1 prompts, and 3 prompts"):
        ask(ReferenceTarget(), hearing, media, sounds=((),))


# ------------------------------------------------------------------------------------------ likelihoods


def test_pairs_must_be_whole() -> None:
    checkpoint = str(bundled.checkpoint())
    with pytest.raises(ValidationError, match="2 contexts and 1 continuations"):
        LoglikelihoodRequest(checkpoint=checkpoint, contexts=((2,), (2,)), continuations=((3,),))
    for empty in ({"contexts": ((),)}, {"continuations": ((),)}):
        with pytest.raises(ValidationError, match="a context or a continuation is empty"):
            LoglikelihoodRequest(
                **({"checkpoint": checkpoint, "contexts": ((2,),), "continuations": ((3,),)} | empty)
            )


@pytest.mark.parametrize("name", ["reference", "transformers@5.19.0"])
def test_what_no_likelihood_can_be_given_of_is_refused(name: str) -> None:
    if reason := registry.unavailable(name):
        pytest.skip(reason)
    target = registry.open_target(name)
    request = LoglikelihoodRequest(
        checkpoint=str(bundled.checkpoint()), contexts=((2,) * 30,), continuations=((3,) * 30,)
    )
    try:
        for options in ({"max_model_len": 59}, {"tensor_parallel": 2}):
            asked = request.model_copy(update={"options": EngineOptions(**options)})
            with pytest.raises(EngineError, match=r"max_model_len|tensor.parallel"):
                target.loglikelihood(asked)
        assert target.loglikelihood(request).likelihoods[0].logprob < 0
    finally:
        target.close()
