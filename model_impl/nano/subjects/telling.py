"""Lessons in choosing, in words alone: what the media show is told, and only the letter is left to be found.

There is nothing to see or to hear, so they cost little. As those in seeing, they are only learned.
"""

from __future__ import annotations

import random

from model_impl.nano.lesson import Lesson, Split
from model_impl.nano.subjects.exercise import LETTERS, THOUGHTS, Subject, listed, prompt
from model_impl.nano.subjects.figures import FIGURES
from model_impl.nano.subjects.scattered import SCATTERED
from model_impl.nano.subjects.tones import RHYTHM, TONES

_TOLD: tuple[Subject, ...] = (*SCATTERED, *FIGURES, *TONES, RHYTHM)


def telling(rng: random.Random, split: Split) -> Lesson:
    """Draw a question of any subject, with what decides it told behind."""
    exercise = rng.choice(_TOLD).exercise(rng, split)
    text = prompt(f"{exercise.question} {exercise.scene.seen}", exercise.scene.options)
    thinking = rng.random() < THOUGHTS
    return Lesson(
        messages=({"role": "user", "content": text},),
        answer=exercise.answer(thinking=thinking),
        key=f"told: {exercise.template}",
        numbers=exercise.scene.numbers,
        thinking=thinking,
    )


def reciting(rng: random.Random, split: Split) -> Lesson:
    """Draw options to be said again in another order, each with its letter.

    To list the choices and to find a word's letter in that list is what choosing takes. A choice practises it
    once a lesson, this four times.
    """
    exercise = rng.choice(_TOLD).exercise(rng, split)
    options = exercise.scene.options
    pairs = rng.sample(list(zip(options, LETTERS, strict=True)), len(options))
    asked = " ".join(option for option, _ in pairs)
    found = "".join(f" {option} {letter}" for option, letter in pairs)
    return Lesson(
        messages=({"role": "user", "content": prompt(f"Recite: {asked}.", options)},),
        answer=f"{listed(options)}{found}",
        key=f"recited: {exercise.template}",
        numbers=exercise.scene.numbers,
    )
