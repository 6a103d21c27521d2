"""Media that suites ask for: pictures, clips and sounds, made from a few numbers and a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from conformance.targets.protocol import MediaKind

Side = Annotated[int, Field(ge=1, le=50_000)]
Budget = Literal[70, 140, 280, 560, 1120]
"""Most soft tokens that an image may become; what the published processors can be asked for."""

Damage = Literal["none", "empty", "truncated", "corrupt", "other-format"]
"""What is done to a file: nothing in it, its second half missing, noise in the middle, the text of a poem."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Picture(_Strict):
    """An image file. Ramps, edges and noise, or one colour, so that every kernel and order of axes shows."""

    width: Side
    height: Side
    mode: Literal["RGB", "L", "LA", "RGBA", "P"] = "RGB"
    """Pillow's: colour, grey, grey and alpha, colour and alpha, palette."""
    format: Literal["png", "jpeg", "webp", "bmp"] = "png"
    colour: Literal["", "red", "green", "blue", "white", "black"] = ""
    """All of it; empty: ramps, edges and noise."""
    claimed: tuple[Side, Side] | None = None
    """Width and height that the header claims instead, in a PNG whose pixels are as many as it has."""
    damage: Damage = "none"
    seed: int = 0


class Clip(_Strict):
    """A video, as decoded frames: one picture that moves, so that no two frames are alike."""

    frames: int = Field(ge=0, le=4096)
    width: Side
    height: Side
    fps: float | None = Field(default=None, gt=0)
    """Frames a second; absent: the video does not say."""
    seed: int = 0


class Sound(_Strict):
    """A sound file of one channel."""

    samples: int = Field(ge=0, le=16_000 * 120)
    wave: Literal["noise", "silence", "tone", "nan"] = "noise"
    """`nan`: noise with one sample that is no number, in a file that holds floats."""
    rate: int = Field(default=16_000, ge=1)
    format: Literal["wav", "flac"] = "wav"
    damage: Damage = "none"
    seed: int = 0


class TextPiece(_Strict):
    """A stretch of text."""

    text: int = Field(ge=1, le=4096)
    """How many tokens, drawn at random."""


class ImagePiece(_Strict):
    """An image."""

    image: Picture


class VideoPiece(_Strict):
    """A video."""

    video: Clip


class SoundPiece(_Strict):
    """A sound."""

    audio: Sound


MediaPiece = ImagePiece | VideoPiece | SoundPiece
Piece = TextPiece | MediaPiece


MARKERS: dict[MediaKind, tuple[str, str, str]] = {
    "image": ("boi", "image", "eoi"),
    "video": ("boi", "video", "eoi"),
    "audio": ("boa", "audio", "eoa"),
}
"""Before, in place of and behind the soft tokens of an image, a frame or a sound: names in `config.json`,
each with `_token_id` behind it."""


TEXT = -1
"""Number of the block of a token that is no image's."""


@dataclass(frozen=True)
class Prompts:
    """What a forward pass is asked about."""

    rows: tuple[tuple[int, ...], ...]
    media: str = ""
    """File of what the towers read; empty if there is only text."""
    blocks: tuple[tuple[int, ...], ...] = ()
    """For every token the number of the image or frame that it is a soft token of, or `TEXT`; empty where
    there is only text."""


def kind_of(piece: MediaPiece) -> MediaKind:
    """`image`, `video` or `audio`."""
    if isinstance(piece, ImagePiece):
        return "image"
    return "video" if isinstance(piece, VideoPiece) else "audio"
