"""How well a nano model answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from tokenizers import Tokenizer

from model_impl.chat.render import Family
from model_impl.multimodal import Gemma4ForConditionalGeneration
from model_impl.nano.batches import Course, Encoded, answer_logits, encode, media
from model_impl.nano.lesson import Generator, Lesson
from model_impl.nano.vocabulary import STOP_IDS
from model_impl.runtime.generate import generate

MOST_TOKENS = 160
"""Of an answer."""
_AT_ONCE = 64
_THOUGHT_END = "<channel|>"


@torch.inference_mode()
def exactly_right(model: Gemma4ForConditionalGeneration, encoded: Sequence[Encoded]) -> list[bool]:
    """For each lesson, whether greedy generation gives its answer, token by token.

    One pass decides: as long as all tokens before were right, the model has read the very answer.
    """
    found: dict[int, bool] = {}
    order = sorted(range(len(encoded)), key=lambda index: encoded[index].length)
    for start in range(0, len(order), _AT_ONCE):
        chosen = order[start : start + _AT_ONCE]
        batch = [encoded[index] for index in chosen]
        logits, targets = answer_logits(model, batch)
        right = torch.split(logits.argmax(dim=-1) == targets, [len(one.answer) for one in batch])
        found |= {index: bool(own.all()) for index, own in zip(chosen, right, strict=True)}
    return [found[index] for index in range(len(encoded))]


def answered(
    model: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, encoded: Sequence[Encoded]
) -> list[str]:
    """What the model generates greedily for each lesson, without the token that stops it."""
    said: dict[int, str] = {}
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].prompt))
    for start in range(0, len(order), _AT_ONCE):
        chosen = order[start : start + _AT_ONCE]
        batch = [encoded[index] for index in chosen]
        width = max(len(one.prompt) for one in batch)
        device = model.language_model.embed_tokens.weight.device
        ids = torch.tensor([[*one.prompt, *[0] * (width - len(one.prompt))] for one in batch], device=device)
        with torch.inference_mode():
            soft = model.soft_tokens(ids, media(batch))
        generated = generate(
            model.language_model,
            [one.prompt for one in batch],
            max_new_tokens=MOST_TOKENS,
            stop_ids=STOP_IDS,
            soft=soft,
        )
        for index, row in zip(chosen, generated, strict=True):
            ids_said = [token for token in row.ids if token not in STOP_IDS]
            said[index] = tokenizer.decode(ids_said, skip_special_tokens=False)
    return [said[index] for index in range(len(encoded))]


def same_answer(said: str, lesson: Lesson) -> bool:
    """Whether what is said behind the thought is the lesson's answer."""
    return said.rpartition(_THOUGHT_END)[2].strip() == lesson.answer.rpartition(_THOUGHT_END)[2].strip()


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = NormalDist().inv_cdf(0.975), right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def examine(
    model: Gemma4ForConditionalGeneration, tokenizer: Tokenizer, lessons: Sequence[Lesson], family: Family
) -> dict[str, Any]:
    """How many lessons are answered right, by generating."""
    said = answered(model, tokenizer, [encode(lesson, tokenizer, family) for lesson in lessons])
    right = sum(same_answer(text, lesson) for text, lesson in zip(said, lessons, strict=True))
    low, high = wilson(right, len(lessons))
    return {"right": right, "of": len(lessons), "interval": [round(low, 4), round(high, 4)]}


def name_of(generator: Generator) -> str:
    """A generator's name: its subject's, its own, or its module's where each has one called `lesson`."""
    if (subject := getattr(generator, "__self__", None)) is not None:
        return str(subject.name)
    own = str(generator.__name__)
    return generator.__module__.rpartition(".")[2] if own == "lesson" else own


def look(
    model: Gemma4ForConditionalGeneration,
    tokenizer: Tokenizer,
    course: Course,
    family: Family,
    count: int = 32,
) -> dict[str, float]:
    """For each generator of a course, the part of unseen lessons whose whole answer is right."""
    shares = {}
    for generator in course.generators:
        name = name_of(generator)
        lessons = Course((generator,), (1,), "test").lessons(count, f"look:{name}")
        encoded = [encode(lesson, tokenizer, family) for lesson in lessons]
        right = exactly_right(model, encoded)
        shares[name] = sum(right) / len(right)
    return shares
