"""Placeholders of a rendered prompt to one placeholder for each soft token (fact sheet, section 3.4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from model_impl.errors import MediaError
from model_impl.preprocess.video import VideoBatch

IMAGE, VIDEO, AUDIO = "<|image|>", "<|video|>", "<|audio|>"
_IMAGE_BEGIN, _IMAGE_END = "<|image>", "<image|>"
_AUDIO_BEGIN, _AUDIO_END = "<|audio>", "<audio|>"
_PLACEHOLDER = re.compile("|".join(map(re.escape, (IMAGE, VIDEO, AUDIO))))


def expand(
    prompt: str,
    *,
    images: Sequence[int] = (),
    videos: VideoBatch | None = None,
    sounds: Sequence[int] = (),
) -> str:
    """Write out what stands for each piece of media.

    Args:
        prompt: As the chat template renders it: one placeholder for each image, video and sound.
        images: Soft tokens of each image, in the order of the prompt.
        videos: What `prepare_videos` made of the videos, in that order too.
        sounds: Soft tokens of each sound.

    Returns:
        An image or a sound is its soft tokens between two markers; a video is its frames, each behind the
        time at which it is shown, with blanks between.

    Raises:
        MediaError: there are more or fewer placeholders of a kind than pieces.
    """
    pieces: dict[str, list[str]] = {
        IMAGE: [_image(count) for count in images],
        VIDEO: list(_videos(videos)) if videos is not None else [],
        AUDIO: [f"{_AUDIO_BEGIN}{AUDIO * count}{_AUDIO_END}" for count in sounds],
    }
    for placeholder, own in pieces.items():
        found = prompt.count(placeholder)
        if found != len(own):
            raise MediaError(
                f"the prompt has {found} placeholders {placeholder}, and {len(own)} pieces were given for "
                "them; put one placeholder for each piece, and none into text"
            )
    return _PLACEHOLDER.sub(_in_turn({kind: iter(own) for kind, own in pieces.items()}), prompt)


def _in_turn(pieces: Mapping[str, Iterator[str]]) -> Callable[[re.Match[str]], str]:
    return lambda match: next(pieces[match[0]])


def _image(count: int, token: str = IMAGE) -> str:
    return f"{_IMAGE_BEGIN}{token * count}{_IMAGE_END}"


def _videos(batch: VideoBatch) -> Iterator[str]:
    counts = iter(batch.images.soft_tokens)
    for stamps in batch.timestamps:
        yield " ".join(f"{stamp} {_image(next(counts), VIDEO)}" for stamp in stamps)
