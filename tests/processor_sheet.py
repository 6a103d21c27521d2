"""Soft tokens by the fact sheet's formulas alone (sections 3.1, 3.4, 3.7 and 4.1): what suites expect."""

from __future__ import annotations

import math
from collections.abc import Iterator

from conformance.media import ImagePiece, SoundPiece
from conformance.suites import ProcessorCase

LONGEST = 480_000
SAMPLED = 32


def image_tokens(width: int, height: int, budget: int) -> int:
    scale = math.sqrt(budget * 9 * 256 / (height * width))
    rows, columns = math.floor(scale * height / 48), math.floor(scale * width / 48)
    if rows == 0:
        rows, columns = 1, min(math.floor(width / height), budget)
    elif columns == 0:
        rows, columns = min(math.floor(height / width), budget), 1
    assert 0 < rows * columns <= budget
    return rows * columns


def mel_frames(samples: int) -> int:
    """Those of which every sample, and the one behind, is in the clip."""
    kept = min(samples, LONGEST)
    frames = range(max(0, (kept + 160 - 321) // 160 + 1))
    return sum(160 * frame + 320 < kept + 160 for frame in frames)


def sound_tokens(samples: int, form: str) -> int:
    if form == "unified":
        return math.ceil(samples / 640)
    frames = mel_frames(samples)
    for _ in range(2):
        frames = (frames + 2 - 3) // 2 + 1
    return min(frames, 750)


def soft_tokens(case: ProcessorCase) -> tuple[int, ...]:
    """Of each image, frame and sound in the order of the prompt."""

    def counts() -> Iterator[int]:
        for piece in case.pieces:
            if isinstance(piece, ImagePiece):
                yield image_tokens(piece.image.width, piece.image.height, case.image_budget)
            elif isinstance(piece, SoundPiece):
                yield sound_tokens(piece.audio.samples, case.form)
            else:
                clip = piece.video
                frames = SAMPLED if case.sample_frames else clip.frames
                yield from [image_tokens(clip.width, clip.height, case.frame_budget)] * frames

    return tuple(counts())
