"""Questions about tones: three subjects, for checkpoints that hear."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from model_impl.nano.subjects.exercise import Media, Scene, Subject, four
from model_impl.nano.subjects.sounding import FREQUENCIES, LOUDNESS, Tone, played

SHORT, LONG = range(4, 7), range(12, 16)
"""Lengths of tones, in units."""
_GAPS = range(4, 7)
_COUNTS = range(1, 7)
_NOTES = 3
"""Tones of a melody or a rhythm."""
_LEADS = ("Listen to the tones.", "Here is a sound.", "Hear this recording.", "Listen closely.")


def draw_tone(rng: random.Random, height: str | None = None, lengths: Sequence[int] = SHORT) -> Tone:
    """A tone at random, of a height if one is given."""
    half = len(FREQUENCIES) // 2
    start, stop = {"low": (0, half), "high": (half, 2 * half), None: (0, 2 * half)}[height]
    return Tone(rng.randrange(start, stop), rng.choice(lengths), rng.choice(_GAPS))


def _count(rng: random.Random) -> Scene:
    counts, right = four(rng, _COUNTS)
    tones = [draw_tone(rng) for _ in range(counts[right])]
    heard = " ".join(f"{tone.height} {number}" for number, tone in enumerate(tones, 1))
    return _scene(rng, [str(count) for count in counts], right, heard, tones)


def _melody(rng: random.Random) -> Scene:
    options, right = four(rng, list(itertools.product(("low", "high"), repeat=_NOTES)))
    tones = [draw_tone(rng, height) for height in options[right]]
    return _named(rng, options, right, tones)


def _rhythm(rng: random.Random) -> Scene:
    options, right = four(rng, list(itertools.product(("short", "long"), repeat=_NOTES)))
    frequency = rng.randrange(len(FREQUENCIES))
    lengths = [rng.choice(LONG if word == "long" else SHORT) for word in options[right]]
    tones = [Tone(frequency, length, rng.choice(_GAPS)) for length in lengths]
    return _named(rng, options, right, tones)


def _named(rng: random.Random, options: Sequence[Sequence[str]], right: int, tones: list[Tone]) -> Scene:
    words = [" ".join(option) for option in options]
    return _scene(rng, words, right, words[right], tones)


def _scene(rng: random.Random, options: Sequence[str], right: int, heard: str, tones: list[Tone]) -> Scene:
    loudness = rng.randrange(len(LOUDNESS))
    numbers = (loudness, *(number for tone in tones for number in tone.numbers))
    return Scene(tuple(options), right, heard, numbers, lambda: Media(sounds=(played(tones, loudness),)))


TONES = (
    Subject(
        "count",
        _LEADS,
        (
            "How many tones are there?",
            "What is the number of tones?",
            "Count the tones.",
            "How often does it sound?",
        ),
        _count,
        pictures=0,
        sounds=1,
    ),
    Subject(
        "melody",
        _LEADS,
        (
            "Which tones are low and which are high?",
            "How do the tones go?",
            "Name the height of each tone.",
            "Which melody is it?",
        ),
        _melody,
        pictures=0,
        sounds=1,
    ),
    Subject(
        "rhythm",
        _LEADS,
        (
            "Which tones are short and which are long?",
            "What is the rhythm?",
            "Name the length of each tone.",
            "How long is each tone?",
        ),
        _rhythm,
        pictures=0,
        sounds=1,
    ),
)
"""The subjects."""
