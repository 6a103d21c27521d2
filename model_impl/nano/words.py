"""Lessons as text, and a tokenizer for them: every word of a lesson one token, every digit another."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache

from tokenizers import Tokenizer

from model_impl.chat.render import Family, render
from model_impl.nano.lesson import Generator, Lesson
from model_impl.nano.vocabulary import learned_tokenizer

WORDS = 1800
"""Characters and merged tokens at most: more than there are."""
_MARKER = re.compile(r'<[|a-z_"]+>')


def prompt(lesson: Lesson, family: Family) -> str:
    """What a model reads before it answers, as its template renders it."""
    return render(list(lesson.messages), tools=list(lesson.tools), thinking=lesson.thinking, family=family)


@cache
def lesson_tokenizer(samples: tuple[tuple[Generator, int], ...]) -> Tokenizer:
    """The tokenizer of what some generators say; the same on every machine.

    Args:
        samples: Generators, and how many lessons of each to look at.
    """
    return learned_tokenizer(_texts(samples), WORDS)


def _texts(samples: Sequence[tuple[Generator, int]]) -> Iterator[str]:
    for number, (generator, count) in enumerate(samples):
        rng = random.Random(number)  # noqa: S311 - not a secret
        for _ in range(count):
            drawn = generator(rng, "train")
            # Behind a marker a word has no blank before it.
            yield _MARKER.sub("\n", prompt(drawn, "large") + drawn.answer)
