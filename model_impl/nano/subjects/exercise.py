"""Questions with four options about pictures or sounds, without anything that gives the answer away in words.

Each is drawn in this order: the words, four different values of one kind as options, one of them at random as
the answer, and only then media that make it right. So given the words alone, or with media that belong to
another question, every option is as likely as any other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model_impl.nano.lesson import Lesson, Message, Picture, Sound, Split

LETTERS = "ABCD"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""As lm-eval's `mmmu_val` ends a prompt."""
_EVERY = 4
"""One template in so many is kept for examinations."""
_HELD_OUT = 8
"""So is one tuple of numbers in so many."""
THOUGHTS = 0.85
"""Part of the lessons that have one."""


@dataclass(frozen=True)
class Media:
    """What is shown or played."""

    pictures: tuple[Picture, ...] = ()
    sounds: tuple[Sound, ...] = ()


@dataclass(frozen=True)
class Scene:
    """What a question is about, before anything is drawn."""

    options: tuple[str, ...]
    """Four of them."""
    right: int
    """Place of the right one."""
    seen: str
    """What of the media decides, in words; the right option at the end."""
    numbers: tuple[int, ...]
    """All that the media are made of, and nothing else."""
    make: Callable[[], Media]
    """Draws or plays it."""
    slots: Mapping[str, str] = field(default_factory=dict)
    """What fills the template."""


@dataclass(frozen=True)
class Subject:
    """A kind of question."""

    name: str
    leads: tuple[str, ...]
    """Sentences before the question."""
    asks: tuple[str, ...]
    """Ways to put it, with slots in braces."""
    scene: Callable[[random.Random], Scene]
    pictures: int = 1
    sounds: int = 0

    def templates(self, split: Split) -> list[str]:
        """The templates of a split: every lead and every way to put it occur in both."""
        return [
            f"{lead} {ask}"
            for i, lead in enumerate(self.leads)
            for j, ask in enumerate(self.asks)
            if ((i + j) % _EVERY == _EVERY - 1) == (split == "test")
        ]

    def exercise(self, rng: random.Random, split: Split) -> Exercise:
        """Draw one of a split."""
        template = rng.choice(self.templates(split))
        while True:
            scene = self.scene(rng)
            if held_out(scene.numbers) == (split == "test"):
                return Exercise(self, template, scene)

    def lesson(self, rng: random.Random, split: Split) -> Lesson:
        """Draw a lesson, most with a thought: without one, only its form can be learned."""
        exercise = self.exercise(rng, split)
        return exercise.lesson(thinking=rng.random() < THOUGHTS)


@dataclass(frozen=True)
class Exercise:
    """A question with its scene."""

    subject: Subject
    template: str
    scene: Scene

    @property
    def question(self) -> str:
        """The question without options."""
        return self.template.format(**self.scene.slots)

    @property
    def letter(self) -> str:
        """Of the right option."""
        return LETTERS[self.scene.right]

    @property
    def text(self) -> str:
        """The question as lm-eval's `mmmu_val` puts it."""
        return prompt(self.question, self.scene.options)

    def answer(self, *, thinking: bool) -> str:
        """What is to be said, with or without a thought.

        A thought lists the choices, names what decides, and says the letter behind that word in the list:
        what followed a word before is soon learned, what stood before it far away hardly ever. Without a
        thought the model only guesses.
        """
        if not thinking:
            return f"Answer: {self.letter}"
        thought = f"{listed(self.scene.options)} {self.scene.seen} {self.letter}"
        return f"<|channel>thought\n{thought}<channel|>Answer: {self.letter}"

    def lesson(self, *, thinking: bool) -> Lesson:
        """The question as a lesson."""
        media = self.scene.make()
        kinds = ["image"] * len(media.pictures) + ["audio"] * len(media.sounds)
        parts: list[dict[str, Any]] = [{"type": kind} for kind in kinds]
        message: Message = {"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}
        return Lesson(
            messages=(message,),
            answer=self.answer(thinking=thinking),
            key=f"{self.subject.name}: {self.template}",
            numbers=self.scene.numbers,
            pictures=media.pictures,
            sounds=media.sounds,
            thinking=thinking,
        )


def listed(options: Sequence[str]) -> str:
    """The choices, each before its letter."""
    pairs = zip(options, LETTERS, strict=True)
    return f"Choices:{''.join(f' {option} {letter}' for option, letter in pairs)}."


def prompt(question: str, options: Sequence[str]) -> str:
    """A question and its options, laid out as lm-eval's `mmmu_val` does."""
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return f"{question}\n\n{listed}\n\n{INSTRUCTION}"


def held_out(numbers: tuple[int, ...]) -> bool:
    """Whether media of these numbers are for examinations only, whatever is asked about them."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return digest[0] % _HELD_OUT == 0


def four(rng: random.Random, values: Sequence[Any]) -> tuple[list[Any], int]:
    """Four different values, and the place of one of them, all equally likely."""
    return rng.sample(values, 4), rng.randrange(4)


def arranged(rng: random.Random, options: Sequence[Any], right: int) -> list[Any]:
    """The right option first, then the others in any order."""
    others = [option for place, option in enumerate(options) if place != right]
    rng.shuffle(others)
    return [options[right], *others]
