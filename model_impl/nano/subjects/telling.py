"""Lessons in choosing: what the media show is told in words, and only the letter is left to be found.

There is nothing to see or to hear, so they cost little. As those in seeing, they are only learned.
"""

from __future__ import annotations

import random

from model_impl.nano.lesson import Lesson, Split
from model_impl.nano.subjects.exercise import Subject, prompt
from model_impl.nano.subjects.figures import FIGURES
from model_impl.nano.subjects.scattered import SCATTERED
from model_impl.nano.subjects.tones import TONES

_TOLD: tuple[Subject, ...] = (*SCATTERED, *FIGURES, *TONES)


def telling(rng: random.Random, split: Split) -> Lesson:
    """Draw a question of any subject, with what decides it told behind."""
    exercise = rng.choice(_TOLD).exercise(rng, split)
    text = prompt(f"{exercise.question} {exercise.scene.seen}", exercise.scene.options)
    thinking = rng.random() < 0.5
    return Lesson(
        messages=({"role": "user", "content": text},),
        answer=exercise.answer(thinking=thinking),
        key=f"told: {exercise.template}",
        numbers=exercise.scene.numbers,
        thinking=thinking,
    )
