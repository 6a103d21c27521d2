"""Files of the media that suites ask for. Needs torch and Pillow, so it is imported where it is used."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import soundfile  # type: ignore[import-untyped]
import torch
from PIL import ExifTags, Image
from safetensors.torch import save
from torch import Tensor

from conformance.media import Clip, Damage, ImagePiece, MediaPiece, Picture, Sound, VideoPiece, kind_of
from conformance.targets.protocol import MediaFile

_COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
_SAVED: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "webp": {"lossless": True, "exact": True},
}
"""Options of encoders: quickly, and so that every decoder gives the same pixels."""
_OTHER_FORMAT = b"Neither picture nor sound,\nbut lines of text all round.\n" * 8
_PNG_HEADER = 8 + 4 + 4
"""Bytes before the width in a PNG: signature, length and name of the first chunk."""


def write(piece: MediaPiece, folder: Path, name: str) -> MediaFile:
    """Write a piece's file.

    Args:
        piece: What is in it.
        folder: Must exist.
        name: Of the file, without an extension.
    """
    suffix: str
    if isinstance(piece, ImagePiece):
        data, suffix = picture_bytes(piece.image), piece.image.format
    elif isinstance(piece, VideoPiece):
        data, suffix = save({"frames": clip_frames(piece.video)}), "safetensors"
    else:
        data, suffix = sound_bytes(piece.audio), piece.audio.format
    path = folder / f"{name}.{suffix}"
    path.write_bytes(data)
    fps = piece.video.fps if isinstance(piece, VideoPiece) else None
    return MediaFile(kind=kind_of(piece), path=str(path), fps=fps)


def picture_bytes(picture: Picture) -> bytes:
    """An encoded image, whole or damaged."""
    size = (picture.width, picture.height)
    if picture.colour:
        image = Image.new("RGB", size, _COLOURS[picture.colour])
    else:
        image = _image(_ramps(*size, picture.seed))
    image = image.convert(picture.mode)
    if picture.mode in ("LA", "RGBA"):
        # Colours under what is clear are there all the same, and a background would show through.
        image.putalpha(_image(_ramps(*size, picture.seed + 1)).convert("L"))
    options = dict(_SAVED.get(picture.format, {}))
    if picture.orientation != 1:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = picture.orientation
        options["exif"] = exif
    out = io.BytesIO()
    image.save(out, picture.format, **options)
    data = out.getvalue()
    if picture.claimed is not None:
        data = _claiming(data, *picture.claimed)
    return damaged(data, picture.damage)


def clip_frames(clip: Clip) -> Tensor:
    """uint8 [F, 3, height, width]."""
    if clip.frames == 0:
        return torch.zeros(0, 3, clip.height, clip.width, dtype=torch.uint8)
    picture = _ramps(clip.width, clip.height, clip.seed).permute(2, 0, 1)
    return torch.stack([picture.roll((5 * n, 9 * n), dims=(1, 2)) for n in range(clip.frames)])


def sound_bytes(sound: Sound) -> bytes:
    """An encoded sound, whole or damaged. One with NaN is in floats, others in 16 bits."""
    wave, subtype = _wave(sound), "FLOAT"
    if sound.wave != "nan":
        # The encoder's own rounding is another one in each format.
        wave, subtype = (wave * 32_767).round().to(torch.int16), "PCM_16"
    out = io.BytesIO()
    soundfile.write(out, wave.numpy(), sound.rate, format=sound.format.upper(), subtype=subtype)
    return damaged(out.getvalue(), sound.damage)


def damaged(data: bytes, damage: Damage) -> bytes:
    """The bytes of a file after it was damaged."""
    half = len(data) // 2
    if damage == "empty":
        return b""
    if damage == "truncated":
        return data[:half]
    if damage == "corrupt":
        noise = bytes(byte ^ 0xA5 for byte in data[half : half + 64])
        return data[:half] + noise + data[half + 64 :]
    return _OTHER_FORMAT if damage == "other-format" else data


def _image(data: Tensor) -> Image.Image:
    height, width, _ = data.shape
    return Image.frombytes("RGB", (width, height), data.numpy().tobytes())


def _ramps(width: int, height: int, seed: int) -> Tensor:
    """uint8 [height, width, 3]: ramps, edges and noise."""
    x = torch.arange(width, dtype=torch.float32)[None, :, None] / max(width, 2)
    y = torch.arange(height, dtype=torch.float32)[:, None, None] / max(height, 2)
    hue = torch.tensor([1.0, 1.7, 2.6]) + 0.1 * seed
    waves = 100 * torch.sin(5 * hue * x + 3 * y + seed)
    edges = 40.0 * (((x * 11).floor() + (y * 7).floor() + seed) % 2)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width * 50_021 + height)
    noise = 45 * torch.rand(height, width, 3, generator=generator)
    return (90 + waves + edges + noise).clamp(0, 255).to(torch.uint8)


def _wave(sound: Sound) -> Tensor:
    """float32 [samples], or [samples, channels] where there are several."""
    if sound.channels > 1:
        mono = _wave(sound.model_copy(update={"channels": 1}))
        return torch.stack([mono * 0.6**channel for channel in range(sound.channels)], dim=1)
    time = torch.arange(sound.samples, dtype=torch.float32)
    if sound.wave == "silence":
        return torch.zeros(sound.samples)
    if sound.wave == "tone":
        return 0.8 * torch.sin(2 * math.pi * (220 + 110 * sound.seed) / sound.rate * time)
    generator = torch.Generator().manual_seed(sound.seed * 1_000_003 + sound.samples)
    # It swells and fades, so that no two stretches of it are alike.
    wave = 0.3 * torch.sin(time / 2_000 + sound.seed) * torch.randn(sound.samples, generator=generator)
    wave = wave.clamp(-1, 1)
    if sound.wave == "nan" and sound.samples:
        wave[sound.samples // 3] = math.nan
    return wave


def _claiming(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says that it has another size; the header's checksum is right."""
    header = struct.pack(">II", width, height) + png[_PNG_HEADER + 8 : _PNG_HEADER + 13]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return png[:_PNG_HEADER] + header + checksum + png[_PNG_HEADER + 17 :]
