"""Media that suites ask for: pictures, clips and sounds, made from a few numbers and a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from conformance.targets.protocol import MediaKind

Side = Annotated[int, Field(ge=1, le=50_000)]
Budget = Literal[70, 140, 280, 560, 1120]
"""Most soft tokens that an image may become; what the published processors can be asked for."""

Damage = Literal["none", "empty", "truncated", "corrupt", "other-format"]
"""What is done to a file: nothing in it, its second half missing, noise in the middle, the text of a poem."""


_MODES = {
    "png": ("RGB", "L", "LA", "RGBA", "P"),
    "jpeg": ("RGB", "L"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "P", "RGBA"),
}
_WEBP_SIDE = 16_383


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
    orientation: int = Field(default=1, ge=1, le=8)
    """As EXIF numbers it, how the picture is to be turned to stand upright; 1: not at all. `width` and
    `height` are those of the file."""
    claimed: tuple[Side, Side] | None = None
    """Width and height that the header claims instead, in a PNG whose pixels are as many as it has."""
    damage: Damage = "none"
    seed: int = 0

    @model_validator(mode="after")
    def _can_be_written(self) -> Picture:
        if self.mode not in _MODES[self.format]:
            raise ValueError(
                f"a picture in {self.format} has no mode {self.mode}; it has {', '.join(_MODES[self.format])}"
            )
        if self.claimed is not None and self.format != "png":
            raise ValueError("`claimed` is for pictures in png")
        if self.orientation != 1 and self.format == "bmp":
            raise ValueError("`orientation` is for pictures in png, jpeg or webp; bmp holds no EXIF")
        if self.format == "webp" and max(self.width, self.height) > _WEBP_SIDE:
            raise ValueError(f"a picture in webp has at most {_WEBP_SIDE} pixels along a side")
        return self

    @property
    def whole(self) -> bool:
        """Whether there is nothing wrong with the file."""
        return self.damage == "none" and self.claimed is None


class PicturePrompt(_Strict):
    """A message with pictures before its words."""

    line: Literal["colour", "colours", "sight"]
    """Which of the script's lines about pictures the words ask for."""
    shows: tuple[Picture, ...] = Field(default=(), max_length=4)
    """As many as the script has words for."""

    @model_validator(mode="after")
    def _colours_are_known(self) -> PicturePrompt:
        for picture in self.shows:
            if not picture.whole or picture.mode in ("L", "LA"):
                raise ValueError("a picture here must be whole, and keep its colour")
        return self


class Clip(_Strict):
    """A video, as decoded frames: one picture that moves, so that no two frames are alike."""

    frames: int = Field(ge=0, le=4096)
    width: Side
    height: Side
    fps: float | None = Field(default=None, gt=0)
    """Frames a second; absent: the video does not say."""
    seed: int = 0

    @property
    def whole(self) -> bool:
        """Whether there is something to see."""
        return self.frames > 0


class Sound(_Strict):
    """A sound file."""

    samples: int = Field(ge=0, le=16_000 * 120)
    """Of each channel."""
    channels: int = Field(default=1, ge=1, le=8)
    """Each has another loudness, so that an average differs from any one of them."""
    wave: Literal["noise", "silence", "tone", "nan"] = "noise"
    """`nan`: noise with one sample that is no number, in a file that holds floats."""
    rate: int = Field(default=16_000, ge=1)
    format: Literal["wav", "flac"] = "wav"
    damage: Damage = "none"
    seed: int = 0

    @property
    def whole(self) -> bool:
        """Whether there is nothing wrong with the file."""
        return self.damage == "none" and self.wave != "nan" and self.samples > 0


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


def marker_ids(config: Mapping[str, Any], kind: MediaKind) -> tuple[int | None, int | None, int | None]:
    """Token ids before, in place of and behind the soft tokens of a kind; None where there is none.

    The published 12B calls one of them `eoa_token_index`.
    """
    before, soft, behind = (
        config.get(f"{name}_token_id", config.get(f"{name}_token_index")) for name in MARKERS[kind]
    )
    return before, soft, behind


def kind_of(piece: MediaPiece) -> MediaKind:
    """`image`, `video` or `audio`."""
    if isinstance(piece, ImagePiece):
        return "image"
    return "video" if isinstance(piece, VideoPiece) else "audio"


def what(piece: MediaPiece) -> Picture | Clip | Sound:
    """What a piece is of."""
    if isinstance(piece, ImagePiece):
        return piece.image
    return piece.video if isinstance(piece, VideoPiece) else piece.audio
