"""Lessons in hearing: what is in a sound, said tone by tone. As those in seeing, they are only learned."""

from __future__ import annotations

import random

from model_impl.nano.lesson import Lesson, Split
from model_impl.nano.subjects.exercise import held_out
from model_impl.nano.subjects.sounding import LOUDNESS, played
from model_impl.nano.subjects.tones import LONG, SHORT, draw_tone

_MOST = 6
_ASKED = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is there to hear?"}]}


def listening(rng: random.Random, split: Split) -> Lesson:
    """Draw a lesson that names all tones of a sound, one after the other.

    There is but one template, so that it occurs in both splits.
    """
    while True:
        lengths = {"short": SHORT, "long": LONG}
        words = rng.choices(tuple(lengths), k=rng.randint(1, _MOST))
        tones = [draw_tone(rng, lengths=lengths[word]) for word in words]
        loudness = rng.randrange(len(LOUDNESS))
        drawn = (loudness, *(number for tone in tones for number in tone.numbers))
        if held_out(drawn) == (split == "test"):
            break
    return Lesson(
        messages=(_ASKED,),
        answer=" ".join(f"{tone.height} {word}" for tone, word in zip(tones, words, strict=True)),
        key=listening.__name__,
        numbers=drawn,
        sounds=(played(tones, loudness),),
    )
