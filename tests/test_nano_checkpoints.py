"""The nano checkpoints in the repository: as their manifests say, real in shape, no buffer neutral."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from model_impl.chat.render import template_text
from model_impl.multimodal import Gemma4ForConditionalGeneration, load_multimodal_model
from model_impl.nano.curriculum import RECIPES, nano_tokenizer
from model_impl.nano.families import FAMILIES, WINDOW
from model_impl.nano.items import lessons
from model_impl.nano.lesson import Lesson
from model_impl.nano.score import examine
from model_impl.nano.scripted import digests
from model_impl.nano.settings import SOFT_TOKENS
from model_impl.nano.train import examinations
from model_impl.nano.vocabulary import vocabulary_size

torch.set_num_threads(1)

FOLDER = Path(__file__).parents[1] / "model_impl" / "nano" / "checkpoints"
NAMES = sorted(RECIPES)
MOST_BYTES = 10_000_000
LEAST = 0.9
"""Share of each task's items that is right."""
NEUTRAL = {"layer_scalar": 1.0, "per_expert_scale": 1.0, "std_scale": 1.0, "std_bias": 0.0}
SAMPLE = 20
GUESSED, MOST_GUESSED = 100, 0.35
"""Items that are asked without their media, and the share that may be right all the same; chance is 0.25."""


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / name / "manifest.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Gemma4ForConditionalGeneration:
    return load_multimodal_model(FOLDER / name)


def test_files_are_those_that_were_measured(name: str) -> None:
    assert manifest(name)["sha256"] == digests(FOLDER / name)
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < MOST_BYTES


def test_the_manifest_belongs_to_the_recipe(name: str) -> None:
    said, recipe = manifest(name), RECIPES[name]
    assert said["recipe"] == f"python -m model_impl.nano.train {name}"
    assert said["steps"] == [stage.steps for stage in recipe.stages]
    assert {key: said[key] for key in vars(recipe) if key != "stages"} == {
        key: value for key, value in vars(recipe).items() if key != "stages"
    }


def test_every_task_is_solved(name: str) -> None:
    scores = manifest(name)["scores"]
    assert scores.keys() == {
        *("nano_gsm8k", "nano_mmmu", "dialogues"),
        *(["nano_sounds"] if FAMILIES[name].audio else []),
    }
    for task, score in scores.items():
        assert score["right"] >= LEAST * score["of"], task


def test_a_sample_of_every_examination_is_solved_here_too(
    name: str, model: Gemma4ForConditionalGeneration
) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / name / "tokenizer.json"))
    family = FAMILIES[name]
    every = examinations(family)
    assert every.keys() == manifest(name)["scores"].keys()
    for task, whole in every.items():
        assert len(whole) == manifest(name)["scores"][task]["of"]
        chosen = whole[:: len(whole) // SAMPLE][:SAMPLE]
        right = examine(model, tokenizer, chosen, family.template)["right"]
        # Nine of ten are right in the long run; fifteen of twenty or fewer have a chance of one in twenty.
        assert right >= 16, task


def test_the_sampled_dialogues_are_of_every_sort() -> None:
    """Calls, what is said of a tool's result, and talk without tools."""
    whole = examinations(FAMILIES["nano-d"])["dialogues"]
    chosen = whole[:: len(whole) // SAMPLE][:SAMPLE]
    sorts = {(lesson.stop, str(lesson.messages[-1]["role"]), bool(lesson.tools)) for lesson in chosen}
    assert {sort[0] for sort in sorts} == {"<turn|>", "<|tool_response>"}
    assert {sort[1] for sort in sorts} == {"user", "tool"}


@pytest.mark.parametrize("swapped", [False, True], ids=["blank", "swapped"])
def test_without_its_own_media_a_question_is_a_guess(
    name: str, model: Gemma4ForConditionalGeneration, swapped: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / name / "tokenizer.json"))
    for task in ("nano_mmmu", *(["nano_sounds"] if FAMILIES[name].audio else [])):
        by_subject: dict[str, list[Lesson]] = defaultdict(list)
        for lesson in lessons(task):
            by_subject[lesson.key.partition(": ")[0]].append(lesson)
        each = GUESSED // len(by_subject)
        asked = [
            other if swapped else blank
            for group in by_subject.values()
            for blank, other in _without_media(group[:each])
        ]
        right = examine(model, tokenizer, asked, FAMILIES[name].template)["right"]
        assert right <= MOST_GUESSED * len(asked), task


def _without_media(group: Sequence[Lesson]) -> Iterator[tuple[Lesson, Lesson]]:
    """Each lesson with one colour or silence, as long as what was there, and with the next one's media."""
    for lesson, other in zip(group, [*group[1:], group[0]], strict=True):
        yield (
            replace(
                lesson,
                pictures=tuple(np.full_like(picture, 128) for picture in lesson.pictures),
                sounds=tuple(np.zeros_like(sound) for sound in lesson.sounds),
            ),
            replace(lesson, pictures=other.pictures, sounds=other.sounds),
        )


def test_the_architecture_is_the_familys(name: str, model: Gemma4ForConditionalGeneration) -> None:
    config = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))
    tokenizer = nano_tokenizer()
    assert config == json.loads(json.dumps(FAMILIES[name].config(vocabulary_size(tokenizer))))
    assert config["vision_config"]["default_output_length"] == SOFT_TOKENS
    text = model.config.text
    assert [layer.kind for layer in text.layers].count("full_attention") >= 2
    assert {layer.head_dim for layer in text.layers} <= {32, 64, 128}
    assert text.sliding_window == WINDOW
    assert text.bidirectional_images == (name != "nano-e")
    assert (text.per_layer_inputs is not None) == (name == "nano-e")
    assert (text.moe is not None) == (name == "nano-a")
    assert (FOLDER / name / "chat_template.jinja").read_text(encoding="utf-8") == template_text(
        FAMILIES[name].template
    )
    stored = Tokenizer.from_file(str(FOLDER / name / "tokenizer.json"))
    assert stored.to_str() == tokenizer.to_str()


def test_weights_are_stored_as_published_and_none_is_neutral(name: str) -> None:
    tensors = load_file(FOLDER / name / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for key, tensor in tensors.items():
        end = key.rpartition(".")[2]
        if end in NEUTRAL:
            assert off(tensor, NEUTRAL[end]), key
        elif "norm" in key and end == "weight":
            assert off(tensor, 1.0), key
        elif end.endswith(("_min", "_max")):
            assert tensor.isfinite().all(), key
    found = {key.rpartition(".")[2] for key in tensors}
    assert {"layer_scalar", "std_scale", "std_bias", "input_max"} <= found
    assert ("per_expert_scale" in found) == (name == "nano-a")


def off(tensor: Tensor, neutral: float) -> bool:
    """Clearly other than neutral, by more than a bfloat16's rounding."""
    return bool(((tensor.float() - neutral).abs() > 0.01).any())
