"""Images become what transformers' processors make of the same bytes; what is no image is refused by name."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model_impl.errors import MediaError
from model_impl.preprocess.images import (
    BUDGETS,
    PIXEL_LIMIT,
    ImageBatch,
    load_image,
    prepare_images,
    target_size,
)
from tests.media_oracle import ask

pytestmark = pytest.mark.xdist_group("preprocess-images")  # its fixtures take long: one process makes them

torch.set_num_threads(1)

EXACT = 1e-6
"""Against torchvision, the processors' usual backend: the same levels of 255, whatever scales them."""
PILLOW = 4.01 / 255
PILLOW_MEAN = 0.25 / 255
"""Against the backend on Pillow, whose bicubic kernel rounds elsewhere: levels at most, and on average."""


# -------------------------------------------------------------------------------------------- the images


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Ramps, edges and noise, so that every kernel and every order of axes shows."""
    x = torch.arange(width, dtype=torch.float32)[None, :, None] / max(width, 2)
    y = torch.arange(height, dtype=torch.float32)[:, None, None] / max(height, 2)
    colours = torch.tensor([1.0, 2.0, 3.0])
    smooth = 110 + 90 * torch.sin(7 * colours * x + 1) * torch.cos(4 * y * colours)
    edges = 60.0 * (((x * 13).floor() + (y * 5).floor()) % 2)
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(width * height)) * 50
    data = (smooth + edges + noise - 25).clamp(0, 255).to(torch.uint8)
    return Image.frombytes("RGB", (width, height), data.numpy().tobytes()).convert(mode)


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def alpha(width: int, height: int) -> Image.Image:
    image = picture(width, height).convert("RGBA")
    image.putalpha(picture(width, height, "L"))
    return image


def rotated(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return encoded(picture(width, height), "JPEG", exif=exif, quality=95)


def wide_grey(width: int, height: int) -> bytes:
    levels = torch.arange(width * height, dtype=torch.int32) % 300
    data = struct.pack(f"<{width * height}H", *levels.tolist())
    return png(Image.frombytes("I;16", (width, height), data))


SHAPES = {
    "1x1": (1, 1),
    "20000x100": (20_000, 100),
    "100x20000": (100, 20_000),
    "20000x1": (20_000, 1),
    "1x20000": (1, 20_000),
    "3x900": (3, 900),
    "48x48": (48, 48),
    "512x512": (512, 512),
    "1920x1080": (1920, 1080),
    "671x483": (671, 483),
}
"""Width and height; ten shapes, of which six are far from square."""
FILES: dict[str, Callable[[], bytes]] = {
    **{name: lambda size=size: png(picture(*size)) for name, size in SHAPES.items()},  # type: ignore[misc]
    "grey": lambda: png(picture(200, 150, "L")),
    "one bit": lambda: png(picture(90, 150, "1")),
    "grey of sixteen bits": lambda: wide_grey(120, 80),
    "alpha": lambda: png(alpha(200, 150)),
    "grey with alpha": lambda: png(alpha(200, 150).convert("LA")),
    "palette": lambda: png(picture(200, 150).convert("P", palette=Image.Palette.ADAPTIVE)),
    "palette, one colour clear": lambda: png(
        picture(200, 150).convert("P", palette=Image.Palette.ADAPTIVE, colors=16), transparency=3
    ),
    "CMYK": lambda: encoded(picture(300, 100, "CMYK"), "JPEG"),
    "turned by EXIF": lambda: rotated(300, 100),
    "GIF": lambda: encoded(picture(60, 50), "GIF"),
    "WebP": lambda: encoded(picture(160, 50), "WEBP", lossless=True),
    "already of its size": lambda: png(picture(7 * 48, 10 * 48)),
}


@functools.cache
def file(name: str) -> bytes:
    return FILES[name]()


ORACLE: list[tuple[str, int, str]] = [
    *((name, 70, "torchvision") for name in FILES),
    *((name, 70, "unified") for name in FILES),
    *((name, 280, "torchvision") for name in ("1x20000", "671x483", "20000x100")),
    *((name, 1120, backend) for name in ("20000x1", "671x483") for backend in ("torchvision", "unified")),
    *((name, 70, "pil") for name in ("100x20000", "48x48", "512x512", "alpha", "turned by EXIF")),
]
"""File, budget, backend."""

SIZES = [
    (height, width, budget)
    for budget in BUDGETS
    for height, width in [
        *((h, w) for w, h in SHAPES.values()),
        (1000, 1),
        (1, 1000),
        (1080, 1920),
        (900, 3),
        *((random.Random(n).randint(1, 5000), random.Random(-n).randint(1, 5000)) for n in range(1, 150)),
        *((random.Random(n).randint(1, 20), random.Random(-n).randint(1, 20_000)) for n in range(200, 250)),
    ]
]

Said = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What transformers makes of all that."""
    files = {name: file(name) for name in FILES}
    asked = {"sizes": SIZES, "images": ORACLE}
    return ask(tmp_path_factory, "vision", "images", asked, files=files, processors=True)


def prepare(*names: str, budget: int = 70, **options: Any) -> ImageBatch:
    return prepare_images([load_image(file(name), name) for name in names], budget, **options)


# ---------------------------------------------------------------------------------------- transformers


def test_sizes_are_those_of_transformers(said: Said) -> None:
    answers, _ = said
    assert [target_size(*asked) for asked in SIZES] == [tuple(size) for size in answers["sizes"]]


@pytest.mark.parametrize("number", range(len(ORACLE)), ids=[f"{n}-{b}-{k}" for n, b, k in ORACLE])
def test_an_image_is_what_transformers_makes_of_it(said: Said, number: int) -> None:
    answers, tensors = said
    name, budget, backend = ORACLE[number]
    batch = prepare(name, budget=budget, cut="tiles" if backend == "unified" else "patches")
    assert batch.soft_tokens == (answers["images"][number],)
    assert batch.positions.dtype == torch.int64
    assert torch.equal(batch.positions[0], tensors[f"{number}.positions"])
    expected = tensors[f"{number}.pixels"].float()
    assert batch.pixels.dtype == torch.float32
    assert batch.pixels[0].shape == expected.shape
    difference = (batch.pixels[0] - expected).abs()
    assert difference.max() <= (PILLOW if backend == "pil" else EXACT)
    assert difference.mean() <= PILLOW_MEAN


# --------------------------------------------------------------------------------------------- by itself


@pytest.mark.parametrize("cut", ["patches", "tiles"])
def test_an_image_does_not_depend_on_its_batch(cut: Any) -> None:
    names = ["1x1", "671x483", "20000x1", "palette", "48x48"]
    together = prepare(*names, budget=140, cut=cut)
    for number, name in enumerate(names):
        alone = prepare(name, budget=140, cut=cut)
        assert torch.equal(together.pixels[number], alone.pixels[0])
        assert torch.equal(together.positions[number], alone.positions[0])
        assert together.soft_tokens[number] == alone.soft_tokens[0]


@pytest.mark.parametrize("cut", ["patches", "tiles"])
def test_padding_to_the_longest_leaves_the_rest(cut: Any) -> None:
    names = ["671x483", "20000x1", "48x48"]
    padded = prepare(*names, cut=cut)
    short = prepare(*names, cut=cut, pad_to_budget=False)
    length = short.pixels.shape[1]
    assert length == max(short.soft_tokens) * (9 if cut == "patches" else 1)
    assert padded.pixels.shape[1] == (630 if cut == "patches" else 70)
    assert torch.equal(short.pixels, padded.pixels[:, :length])
    assert torch.equal(short.positions, padded.positions[:, :length])
    assert (padded.positions[:, length:] == -1).all()
    assert (padded.pixels[:, length:] == 0).all()


def test_positions_are_column_and_row_in_reading_order() -> None:
    batch = prepare("already of its size", budget=70)
    columns, rows = 7 * 3, 10 * 3
    expected = torch.tensor([[x, y] for y in range(rows) for x in range(columns)])
    assert torch.equal(batch.positions[0], expected)


def test_squares_hold_their_pixels_row_by_row() -> None:
    image = load_image(file("already of its size"), "image")
    batch = prepare_images([image], 70)
    tiles = prepare_images([image], 70, cut="tiles")
    for squares, side in ((batch, 16), (tiles, 48)):
        for number in (0, 1, 25, 69):
            x, y = squares.positions[0, number].tolist()
            piece = image[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            got = squares.pixels[0, number].view(side, side, 3)
            assert torch.equal((got * 255).round().to(torch.uint8), piece.permute(1, 2, 0))


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_size_fills_the_budget_and_never_exceeds_it(budget: int) -> None:
    for height, width, asked in SIZES:
        if asked == budget:
            h, w = target_size(height, width, budget)
            assert h % 48 == w % 48 == 0
            tokens = (h // 48) * (w // 48)
            assert 0 < tokens <= budget
            if max(height, width) <= 2 * min(height, width):
                assert tokens > 0.7 * budget


def test_a_known_size() -> None:
    # 512 x 512 grows to 768 x 768, 256 soft tokens (catalogue M12).
    assert target_size(512, 512, 280) == (768, 768)
    assert prepare("512x512", budget=280, pad_to_budget=False).soft_tokens == (256,)


def test_the_loader_takes_bytes_files_and_opened_images(tmp_path: Path) -> None:
    data = file("turned by EXIF")
    (tmp_path / "image.jpg").write_bytes(data)
    expected = load_image(data, "bytes")
    assert expected.shape == (3, 300, 100)  # upright
    assert expected.dtype == torch.uint8
    assert torch.equal(load_image(tmp_path / "image.jpg", "file"), expected)
    assert torch.equal(load_image(Image.open(io.BytesIO(data)), "image"), expected)


# ------------------------------------------------------------------------------------------------ errors


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """A few hundred bytes; decoding them would fill memory."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def flipped(data: bytes) -> bytes:
    """One bit wrong in the middle of a PNG's data."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"<html>404</html>", "no image that can be read"),
    "random": (lambda: random.Random(1).randbytes(5000), "no image that can be read"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
    "header only": (lambda: file("671x483")[:33], "no image that can be read"),
    "truncated PNG": (lambda: file("671x483")[:20_000], "corrupt or truncated"),
    "truncated JPEG": (lambda: encoded(picture(300, 200), "JPEG")[:3000], "corrupt or truncated"),
    "truncated GIF": (lambda: file("GIF")[:900], "corrupt or truncated"),
    "truncated WebP": (lambda: file("WebP")[:900], "corrupt or truncated|no image that can be read"),
    "flipped bit": (lambda: flipped(file("671x483")), "corrupt or truncated"),
    "above the limit": (lambda: png_that_claims(8193, 8192), "more than the limit of 67108864"),
    "bomb": (lambda: png_that_claims(60_000, 60_000), "too many pixels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_by_name(name: str) -> None:
    make, says = BAD[name]
    with pytest.raises(MediaError, match=f"^photo of a cat: .*({says})"):
        load_image(make(), "photo of a cat")
    assert load_image(file("1x1"), "next").shape == (3, 1, 1)


def test_the_limit_is_stated_and_can_be_moved() -> None:
    data = png(picture(100, 50))
    with pytest.raises(MediaError, match="100 x 50 pixels are more than the limit of 4999"):
        load_image(data, "image", pixel_limit=4999)
    with pytest.raises(MediaError, match="limit of 4999"):
        load_image(Image.open(io.BytesIO(data)), "image", pixel_limit=4999)
    assert load_image(data, "image", pixel_limit=5000).shape == (3, 50, 100)
    assert PIXEL_LIMIT > 20_000 * 100


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^cat: cannot be read .*No such file"):
        load_image(tmp_path / "cat.png", "cat")
    with pytest.raises(MediaError, match=r"^folder: cannot be read"):
        load_image(tmp_path, "folder")


@pytest.mark.parametrize("budget", [0, -70, 100, 1121])
def test_an_unknown_budget_is_refused(budget: int) -> None:
    with pytest.raises(MediaError, match=rf"no budget of {budget} soft tokens; choose one of \(70, 140, 280"):
        prepare("1x1", budget=budget)


def test_tensors_that_are_no_images_are_refused() -> None:
    image = load_image(file("1x1"), "image")
    with pytest.raises(MediaError, match="no images"):
        prepare_images([], 70)
    for wrong in (image.float(), image[:1], image[None], image[:, :0]):
        with pytest.raises(MediaError, match="image 2 is torch"):
            prepare_images([image, wrong], 70)
    with pytest.raises(MediaError, match="nothing to see"):
        target_size(0, 5, 70)
