"""Lessons to batches of tokens, and batches to what the model says of them.

Step n of a course is a function of the course and n alone, so that a training that was interrupted goes on
exactly where it stopped, without any state of a source of chance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model_impl.chat.render import Family
from model_impl.multimodal import Gemma4ForConditionalGeneration, Media
from model_impl.nano.lesson import Generator, Lesson, Picture, Split
from model_impl.nano.settings import SOFT_TOKENS
from model_impl.nano.words import prompt
from model_impl.preprocess.audio import prepare_audio, soft_token_count
from model_impl.preprocess.images import prepare_images, target_size
from model_impl.preprocess.prompt import expand

_POOL = 8
"""Batches whose lessons are drawn together, and sorted by length, as padding costs time."""
_SOFT_TOKEN = 48
"""Pixels of a soft token along each side."""


@dataclass(frozen=True)
class Course:
    """What is learned: generators, and how often each has its turn."""

    generators: tuple[Generator, ...]
    weights: tuple[int, ...]
    split: Split = "train"

    def lessons(self, count: int, seed: str) -> list[Lesson]:
        """Draw so many."""
        rng = random.Random(seed)  # noqa: S311 - not a secret
        chosen = rng.choices(self.generators, self.weights, k=count)
        return [generator(rng, self.split) for generator in chosen]


@dataclass(frozen=True)
class Encoded:
    """A lesson as the model gets it."""

    lesson: Lesson
    prompt: tuple[int, ...]
    """With a placeholder for each soft token."""
    answer: tuple[int, ...]
    """With the token that stops it."""

    @property
    def length(self) -> int:
        """Of both together, without the last token, which nothing follows."""
        return len(self.prompt) + len(self.answer) - 1


def encode(lesson: Lesson, tokenizer: Tokenizer, family: Family) -> Encoded:
    """Render a lesson, with as many placeholders as its media take."""
    text = expand(
        prompt(lesson, family),
        images=[_soft_tokens(picture) for picture in lesson.pictures],
        sounds=[soft_token_count(len(sound)) for sound in lesson.sounds],
    )
    return Encoded(lesson, _ids(tokenizer, text), _ids(tokenizer, lesson.answer + lesson.stop))


def _soft_tokens(picture: Picture) -> int:
    height, width = target_size(picture.shape[0], picture.shape[1], SOFT_TOKENS)
    return height * width // _SOFT_TOKEN**2


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


class Timetable:
    """The batches of a course, by number.

    Args:
        course: What is learned.
        tokenizer: The checkpoint's.
        family: Its chat template's.
        size: Lessons of a batch.
        seed: The same seed, the same batches.
    """

    def __init__(self, course: Course, tokenizer: Tokenizer, family: Family, size: int, seed: str) -> None:
        self._course, self._tokenizer, self._family = course, tokenizer, family
        self._size, self._seed = size, seed
        self._pool: tuple[int, list[list[Encoded]]] = (-1, [])

    def batch(self, number: int) -> list[Encoded]:
        """The batch of that number, from 0."""
        pool, place = divmod(number, _POOL)
        if self._pool[0] != pool:
            self._pool = (pool, self._drawn(pool))
        return self._pool[1][place]

    def _drawn(self, pool: int) -> list[list[Encoded]]:
        seed = f"{self._seed}:{pool}"
        lessons = self._course.lessons(_POOL * self._size, seed)
        encoded = [encode(lesson, self._tokenizer, self._family) for lesson in lessons]
        encoded.sort(key=lambda one: one.length)
        batches = [encoded[start : start + self._size] for start in range(0, len(encoded), self._size)]
        random.Random(seed).shuffle(batches)  # noqa: S311 - not a secret
        return batches


def answer_logits(model: Gemma4ForConditionalGeneration, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] where answers are generated, and the tokens [N] that belong there."""
    device = model.language_model.embed_tokens.weight.device
    width = max(one.length for one in batch)
    rows = [[*one.prompt, *one.answer[:-1]] for one in batch]
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    hidden = model(ids, media(batch), lengths=[one.length for one in batch])
    column = torch.arange(width)
    first = torch.tensor([len(one.prompt) - 1 for one in batch])[:, None]
    last = torch.tensor([one.length for one in batch])[:, None]
    where = ((column >= first) & (column < last)).to(device)
    targets = torch.tensor([token for one in batch for token in one.answer], device=device)
    return model.logits(hidden[where]).float(), targets


def media(batch: Sequence[Encoded]) -> Media:
    """All pictures and sounds of a batch, in its order, as the towers get them."""
    pixels = [torch.from_numpy(one).permute(2, 0, 1) for each in batch for one in each.lesson.pictures]
    clips = [torch.from_numpy(sound) for each in batch for sound in each.lesson.sounds]
    return Media(
        images=prepare_images(pixels, SOFT_TOKENS, pad_to_budget=False) if pixels else None,
        audio=prepare_audio(clips) if clips else None,
    )
