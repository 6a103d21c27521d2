"""Questions about tones, for checkpoints that hear."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from model_impl.nano.subjects.exercise import Media, Scene, Subject, four
from model_impl.nano.subjects.sounding import FREQUENCIES, LOUDNESS, Tone, played

SHORT, LONG = range(4, 7), range(12, 16)
"""Lengths of tones, in units."""
_GAPS = range(4, 7)
_COUNTS = range(1, 7)
_ORDINALS = ("first", "second", "third", "fourth")
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
    odd, usual = rng.sample(("low", "high"), 2)
    return _odd_one(rng, odd, lambda is_odd: draw_tone(rng, odd if is_odd else usual))


def _rhythm(rng: random.Random) -> Scene:
    lengths = {"short": SHORT, "long": LONG}
    odd, usual = rng.sample(tuple(lengths), 2)
    frequency = rng.randrange(len(FREQUENCIES))

    def tone(is_odd: bool) -> Tone:
        return Tone(frequency, rng.choice(lengths[odd if is_odd else usual]), rng.choice(_GAPS))

    return _odd_one(rng, odd, tone)


def _odd_one(rng: random.Random, odd: str, tone: Callable[[bool], Tone]) -> Scene:
    options, right = four(rng, _ORDINALS)
    tones = [tone(ordinal == options[right]) for ordinal in _ORDINALS]
    return _scene(rng, options, right, f"{odd}: {options[right]}", tones, odd=odd)


def _scene(
    rng: random.Random, options: Sequence[str], right: int, heard: str, tones: list[Tone], **slots: str
) -> Scene:
    loudness = rng.randrange(len(LOUDNESS))
    numbers = (loudness, *(number for tone in tones for number in tone.numbers))

    def make() -> Media:
        return Media(sounds=(played(tones, loudness),))

    return Scene(tuple(options), right, heard, numbers, make, slots)


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
            "Which tone is {odd}?",
            "Which one is the {odd} tone?",
            "When does the {odd} tone come?",
            "Name the place of the {odd} tone.",
        ),
        _melody,
        pictures=0,
        sounds=1,
    ),
)
"""The subjects that are examined."""

RHYTHM = Subject(
    "rhythm",
    _LEADS,
    (
        "Which tone is {odd}?",
        "Which one is the {odd} tone?",
        "When does the {odd} tone come?",
        "Name the place of the {odd} tone.",
    ),
    _rhythm,
    pictures=0,
    sounds=1,
)
"""Which tone is longer or shorter than the others. It is taught, since a model must hear where tones end, and
not examined: no training within the limit has learned to answer it (docs/nano.md)."""
