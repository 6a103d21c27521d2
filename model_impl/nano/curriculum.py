"""What each nano checkpoint learns, in which order, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer

from model_impl.nano import dialogues, problems
from model_impl.nano.batches import Course
from model_impl.nano.lesson import Generator
from model_impl.nano.subjects import (
    RHYTHM,
    SOUND_SUBJECTS,
    SUBJECTS,
    glance,
    glimpse,
    listening,
    reciting,
    telling,
)
from model_impl.nano.words import lesson_tokenizer

_PICTURES: tuple[Generator, ...] = tuple(subject.lesson for subject in SUBJECTS)
_SOUNDS: tuple[Generator, ...] = tuple(subject.lesson for subject in (*SOUND_SUBJECTS, RHYTHM))
_SAMPLES: tuple[tuple[Generator, int], ...] = (
    (problems.lesson, 1500),
    (dialogues.lesson, 1500),
    *((generator, 40) for generator in (*_PICTURES, *_SOUNDS, glance, glimpse, listening, reciting, telling)),
)

_TALK: tuple[Generator, ...] = (problems.lesson, dialogues.lesson, telling)

TEXT = Course((*_TALK, reciting), (50, 22, 12, 16))
"""Reading, copying and reckoning: all else builds on them, and text is cheap."""
GLANCES = Course((*_TALK, glance), (22, 6, 4, 68))
"""One tile a picture: with several from the start, the tower does not find out what there is to see."""
NAMING = Course((*_TALK, glance, glimpse, *_PICTURES), (22, 8, 5, 8, 37, *(2,) * len(_PICTURES)))
"""All tiles of a picture: a question teaches one letter, a list teaches many words and places."""
SIGHT = Course((*_TALK, glimpse, *_PICTURES), (30, 10, 4, 8, *(5,) * len(_PICTURES)))
"""All about text and pictures."""
GLANCES_AND_TONES = Course((*GLANCES.generators, listening), (*GLANCES.weights, 30))
NAMING_AND_TONES = Course(
    (*NAMING.generators, listening, *_SOUNDS), (*NAMING.weights, 24, *(4,) * len(_SOUNDS))
)
SENSES = Course((*SIGHT.generators, listening, *_SOUNDS), (*SIGHT.weights, 12, 10, 12, 2))
"""Everything. Which of four tones is high or low is learned last."""


def nano_tokenizer() -> Tokenizer:
    """The tokenizer of all nano checkpoints; the same on every machine, as long as the lessons are."""
    return lesson_tokenizer(_SAMPLES)


@dataclass(frozen=True)
class Stage:
    """Some steps of one course."""

    course: Course
    steps: int


@dataclass(frozen=True)
class Recipe:
    """All that decides a checkpoint, beside its shape and the code."""

    stages: tuple[Stage, ...]
    batch: int = 64
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 40
    cooldown: float = 0.5
    """Part of the steps at whose end the rates come down to zero."""
    seed: int = 1

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step, counted from 0."""
        left = (self.steps - step) / (self.steps * self.cooldown)
        return min(1.0, (step + 1) / self.warmup, left)

    def stage(self, step: int) -> tuple[int, int]:
        """Which stage a step belongs to, and its number there."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise IndexError("the step is beyond the last stage")


_SIGHTED = (Stage(TEXT, 600), Stage(GLANCES, 80), Stage(NAMING, 220), Stage(SIGHT, 700))
RECIPES: Mapping[str, Recipe] = {
    "nano-e": Recipe(
        (Stage(TEXT, 600), Stage(GLANCES_AND_TONES, 100), Stage(NAMING_AND_TONES, 250), Stage(SENSES, 1100))
    ),
    "nano-a": Recipe(_SIGHTED),
    "nano-d": Recipe(_SIGHTED),
}
