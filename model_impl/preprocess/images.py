"""Images to patches, as transformers' processors make them (fact sheet, sections 3.1 and 4.1)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from model_impl.errors import MediaError

BUDGETS = (70, 140, 280, 560, 1120)
"""Most soft tokens that an image may become; what a request can choose from."""
PIXEL_LIMIT = 1 << 26
"""Most pixels of an image, unless asked for otherwise: 8192 x 8192, some 200 MB when decoded."""
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Pillow knows more formats; one of them starts an interpreter of PostScript."""

Cut = Literal["patches", "tiles"]
"""Patches of 16 x 16 pixels for the tower; tiles of 48 x 48, one per soft token, for the unified model."""


@dataclass(frozen=True)
class ImageBatch:
    """Images cut into squares, padded behind with zeros to one number of squares."""

    pixels: Tensor
    """float32 [N, P, side · side · 3] in [0, 1]; each square row by row, the colours of a pixel together."""
    positions: Tensor
    """int64 [N, P, 2]: column and row of each square; -1 at padding."""
    soft_tokens: tuple[int, ...]
    """Of each image."""


def target_size(
    height: int, width: int, budget: int, *, patch_size: int = 16, pooling: int = 3
) -> tuple[int, int]:
    """Height and width that an image is resized to: it fills the budget and about keeps its proportions.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        budget: Most soft tokens; one of `BUDGETS`.
        patch_size: Pixels of a patch along each side.
        pooling: Patches of a soft token along each side.

    Returns:
        Multiples of `patch_size · pooling`, together of at most `budget` soft tokens. An image that is longer
        than the budget allows becomes one soft token high or wide, and is squeezed along the other side.

    Raises:
        MediaError: there is no such budget, or the image has no pixels.
    """
    if budget not in BUDGETS:
        raise MediaError(f"there is no budget of {budget} soft tokens; choose one of {BUDGETS}")
    if height < 1 or width < 1:
        raise MediaError(f"an image of {width} x {height} pixels has nothing to see")
    unit = patch_size * pooling
    # The order of these operations is transformers': another one rounds differently now and then.
    scale = math.sqrt(budget * pooling**2 * patch_size**2 / (height * width))
    rows, columns = math.floor(scale * height / unit), math.floor(scale * width / unit)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return rows * unit, columns * unit


def load_image(source: bytes | Path | Image.Image, name: str, *, pixel_limit: int = PIXEL_LIMIT) -> Tensor:
    """Decode an image, upright as its EXIF orientation says, in RGB; transparency is dropped.

    Args:
        source: An encoded image, its file, or one that Pillow has opened.
        name: What an error calls it.
        pixel_limit: Most pixels; checked before anything is decoded.

    Returns:
        uint8 [3, height, width].

    Raises:
        MediaError: it is empty, no image in one of `FORMATS`, larger than the limit, corrupt or truncated,
            or cannot be read.
    """
    image = source if isinstance(source, Image.Image) else _open(source, name)
    if image.width * image.height > pixel_limit:
        raise MediaError(
            f"{name}: {image.width} x {image.height} pixels are more than the limit of {pixel_limit}; "
            "scale it down, or raise `pixel_limit`"
        )
    try:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        # What a decoder raises at damaged data is anything, from OSError to struct.error.
        raise _damaged(name, error) from error
    if upright.width == 0 or upright.height == 0:
        raise MediaError(f"{name}: an image of {upright.width} x {upright.height} pixels has nothing to see")
    data = torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8)
    return data.view(upright.height, upright.width, 3).permute(2, 0, 1)


def _open(source: bytes | Path, name: str) -> Image.Image:
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({_why(error)})") from error
    if not data:
        raise MediaError(f"{name}: is empty, zero bytes long")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name}: has too many pixels ({_why(error)}); scale it down") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name}: is no image that can be read; these formats can: {', '.join(FORMATS)}"
        ) from error
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> MediaError:
    return MediaError(f"{name}: is corrupt or truncated ({_why(error)}); encode it anew")


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def prepare_images(
    images: Sequence[Tensor],
    budget: int,
    *,
    cut: Cut = "patches",
    pad_to_budget: bool = True,
    patch_size: int = 16,
    pooling: int = 3,
) -> ImageBatch:
    """Resize images, up or down, and cut them into squares.

    Args:
        images: uint8 [3, height, width] each, of any sizes.
        budget: Most soft tokens of an image; one of `BUDGETS`.
        cut: What the squares are.
        pad_to_budget: As many squares as the budget allows, as transformers does it; else as many as the
            largest image has. Towers give the same numbers.
        patch_size: Pixels of a patch along each side.
        pooling: Patches of a soft token along each side.

    Raises:
        MediaError: there are no images, one is not of that form, or as in `target_size`.
    """
    if not images:
        raise MediaError("there are no images to prepare")
    side = patch_size if cut == "patches" else patch_size * pooling
    squares = [
        _squares(_resized(image, number, budget, patch_size, pooling), side)
        for number, image in enumerate(images, 1)
    ]
    per_token = (patch_size * pooling // side) ** 2
    counts = [rows * columns for rows, columns in (square.shape[:2] for square in squares)]
    length = budget * per_token if pad_to_budget else max(counts)
    pixels = torch.zeros(len(squares), length, side * side * 3)
    positions = torch.full((len(squares), length, 2), -1)
    for number, (square, count) in enumerate(zip(squares, counts, strict=True)):
        rows, columns = square.shape[:2]
        pixels[number, :count].view(square.shape).copy_(square).mul_(1 / 255)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        positions[number, :count] = grid.flip(-1)
    return ImageBatch(pixels, positions, tuple(count // per_token for count in counts))


def _resized(image: Tensor, number: int, budget: int, patch_size: int, pooling: int) -> Tensor:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise MediaError(
            f"image {number} is {image.dtype} of shape {list(image.shape)}, and must be uint8 of shape "
            "[3, height, width] with at least one pixel"
        )
    height, width = image.shape[1:]
    size = target_size(height, width, budget, patch_size=patch_size, pooling=pooling)
    if size == (height, width):
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0]


def _squares(image: Tensor, side: int) -> Tensor:
    """[3, H, W] to [H / side, W / side, side, side, 3]."""
    _, height, width = image.shape
    return image.reshape(3, height // side, side, width // side, side).permute(1, 3, 2, 4, 0)
