"""What an honest server makes of the pictures in a request. It needs no torch, so that it starts at once."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, UnidentifiedImageError

from model_impl.nano.script import load_script

BUDGET = 70
_NEAR = 40
"""How far each of red, green and blue may be from a colour that has a name."""


class BadPictureError(Exception):
    """A part of a message that is no picture."""


def parts_of(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All parts of all contents that are pictures."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "image_url":
                yield part


def opened(part: dict[str, Any]) -> Image.Image:
    """Decode a data URL."""
    head, _, data = part["image_url"]["url"].partition(";base64,")
    if not head.startswith("data:image/"):
        raise BadPictureError(f"no picture of a kind that is known: {head[:40]}")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
    except (binascii.Error, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadPictureError(f"the picture cannot be read: {error}") from error
    return image.convert("RGB")


def colour(image: Image.Image) -> str:
    """As the script calls it."""
    pictures = load_script().pictures
    extremes = image.getextrema()
    for name, wanted in pictures.colours.items():
        if all(
            abs(end - value) < _NEAR for span, value in zip(extremes, wanted, strict=True) for end in span
        ):
            return name
    return pictures.motley


def soft_tokens(image: Image.Image) -> int:
    """How many an image of ordinary proportions takes."""
    scale = math.sqrt(BUDGET * 48 * 48 / (image.width * image.height))
    return math.floor(scale * image.width / 48) * math.floor(scale * image.height / 48)
