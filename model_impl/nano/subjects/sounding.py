"""Tones: sounds made of plain notes with silence between."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile  # type: ignore[import-untyped]

from model_impl.nano.lesson import Sound

RATE = 16_000
"""Samples a second, as the audio tower takes them."""
UNIT = RATE // 50
"""Samples of a unit of time, 20 milliseconds; the tower makes a soft token of two."""
FREQUENCIES = (300, 360, 430, 520, 1500, 1700, 1900, 2200)
"""In hertz: those of low tones, then those of high ones."""
LOUDNESS = (4000, 8000, 14000)
"""Amplitudes, of 32768."""
_LEAST = 72
"""Units that a sound has at least, but for the gap of its last tone: as many as six short tones take. The
length of a shorter one would tell how many tones it has, without any being heard."""
_FADE = 80
"""Samples over which a tone swells and dies, so that it does not click."""


@dataclass(frozen=True)
class Tone:
    """A tone, and the silence behind it."""

    frequency: int
    """Place in `FREQUENCIES`."""
    length: int
    """In units."""
    gap: int
    """In units."""

    @property
    def numbers(self) -> tuple[int, int, int]:
        """All of it as numbers."""
        return self.frequency, self.length, self.gap

    @property
    def height(self) -> str:
        """Whether it is low or high."""
        return "low" if self.frequency < len(FREQUENCIES) // 2 else "high"


def played(tones: Sequence[Tone], loudness: int) -> Sound:
    """The tones one after the other, and then silence, exactly as a file of 16 bits keeps them."""
    parts: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    # The last gap stays what it is, so that other numbers make another sound.
    rest = max(0, _LEAST - sum(tone.length + tone.gap for tone in tones) + tones[-1].gap)
    for tone in tones:
        place = np.arange(tone.length * UNIT)
        swell = np.minimum(1.0, np.minimum(place + 1, len(place) - place) / _FADE)
        wave = np.sin(2 * np.pi * FREQUENCIES[tone.frequency] * place / RATE)
        parts.append(LOUDNESS[loudness] * swell * wave)
        parts.append(np.zeros(tone.gap * UNIT))
    parts.append(np.zeros(rest * UNIT))
    return (np.concatenate(parts).round() / 32768).astype(np.float32)


def flac(sound: Sound) -> bytes:
    """The sound as a FLAC file, without loss."""
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
