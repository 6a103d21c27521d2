"""Files of media that suites ask for: the same at every call, unlike each other, and damaged as asked."""

from __future__ import annotations

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError
from safetensors.torch import load_file

from conformance.media import Clip, ImagePiece, Picture, Sound, SoundPiece, VideoPiece
from conformance.media_files import clip_frames, damaged, picture_bytes, sound_bytes, write


def opened(**fields: Any) -> Image.Image:
    image = Image.open(io.BytesIO(picture_bytes(Picture(**{"width": 40, "height": 30} | fields))))
    image.load()
    return image


def samples(**fields: Any) -> torch.Tensor:
    data, rate = soundfile.read(io.BytesIO(sound_bytes(Sound(**fields))), dtype="float32")
    assert rate == fields.get("rate", 16_000)
    return torch.from_numpy(data)


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P"])
def test_a_picture_is_of_its_size_and_mode(mode: str) -> None:
    image = opened(mode=mode)
    assert (image.size, image.mode, image.format) == ((40, 30), mode, "PNG")


@pytest.mark.parametrize("kind", ["png", "webp", "bmp"])
def test_these_formats_lose_nothing(kind: str) -> None:
    expected = opened().tobytes()
    image = opened(format=kind)
    assert image.format == kind.upper()
    assert image.tobytes() == expected


def test_jpeg_is_nearly_the_picture() -> None:
    image = opened(format="jpeg", width=400, height=300)
    assert image.format == "JPEG"
    assert opened(format="jpeg").tobytes() != opened().tobytes()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparency_hides_colours_and_keeps_them(kind: str) -> None:
    image = opened(mode="RGBA", format=kind)
    assert image.convert("RGB").tobytes() == opened().tobytes()
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    assert low < 60
    assert high > 200
    behind = Image.new("RGBA", image.size, "white")
    assert Image.alpha_composite(behind, image).convert("RGB").tobytes() != opened().tobytes()


def test_pictures_are_repeatable_and_unlike_each_other() -> None:
    made = {picture_bytes(Picture(width=40, height=30, seed=seed)) for seed in range(4)}
    made |= {picture_bytes(Picture(width=30, height=40)), picture_bytes(Picture(width=41, height=30))}
    assert len(made) == 6
    assert picture_bytes(Picture(width=40, height=30, seed=2)) in made


def test_a_picture_has_no_symmetry() -> None:
    """Else a wrong order of axes or of colours would not show."""
    image = opened(width=32, height=32)
    turned = [image.transpose(method) for method in Image.Transpose]
    red, green, blue = image.split()
    turned += [Image.merge("RGB", (blue, green, red)), Image.merge("RGB", (green, red, blue))]
    assert all(other.tobytes() != image.tobytes() for other in turned)


@pytest.mark.parametrize(
    ("colour", "expected"), [("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("white", (255, 255, 255))]
)
def test_a_picture_of_one_colour(colour: str, expected: tuple[int, int, int]) -> None:
    assert opened(colour=colour).getcolors() == [(1200, expected)]


def test_a_claimed_size_stands_in_the_header() -> None:
    data = picture_bytes(Picture(width=40, height=30, claimed=(9000, 8000)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))  # it checks the header's checksum
    assert image.size == (9000, 8000)
    assert len(data) == len(picture_bytes(Picture(width=40, height=30)))
    with pytest.raises(OSError, match=r"truncated|unrecognized|broken"):
        image.load()


def test_only_a_png_claims_a_size() -> None:
    with pytest.raises(ValueError, match="for pictures in png"):
        picture_bytes(Picture(width=40, height=30, format="jpeg", claimed=(9, 9)))


# ------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_turned_picture_says_so_and_keeps_its_pixels(kind: Any) -> None:
    straight = Picture(width=40, height=20, format=kind)
    turned = Image.open(io.BytesIO(picture_bytes(straight.model_copy(update={"orientation": 6}))))
    assert turned.getexif()[274] == 6
    assert turned.size == (40, 20)
    assert turned.tobytes() == Image.open(io.BytesIO(picture_bytes(straight))).tobytes()
    assert ImageOps.exif_transpose(turned).size == (20, 40)


def test_bmp_holds_no_orientation() -> None:
    with pytest.raises(ValidationError, match="bmp holds no EXIF"):
        Picture(width=4, height=4, format="bmp", orientation=3)


def test_no_two_frames_are_alike() -> None:
    frames = clip_frames(Clip(frames=40, width=64, height=48))
    assert frames.shape == (40, 3, 48, 64)
    assert frames.dtype == torch.uint8
    assert len({frame.numpy().tobytes() for frame in frames}) == 40


def test_clips_are_repeatable_and_unlike_each_other() -> None:
    one, same, other = (clip_frames(Clip(frames=2, width=8, height=6, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_clip_without_frames_has_a_size() -> None:
    assert clip_frames(Clip(frames=0, width=8, height=6)).shape == (0, 3, 6, 8)


# ------------------------------------------------------------------------------------------------ sounds


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("wave", ["noise", "silence", "tone"])
def test_a_sound_has_its_samples(kind: str, wave: str) -> None:
    made = samples(samples=3000, wave=wave, format=kind)
    assert made.shape == (3000,)
    assert made.abs().max() <= 1
    assert (made == 0).all() == (wave == "silence")


def test_flac_holds_the_samples_of_wav() -> None:
    assert torch.equal(samples(samples=2000, format="flac"), samples(samples=2000))


def test_a_tone_is_one_frequency() -> None:
    spectrum = torch.fft.rfft(samples(samples=16_000, wave="tone", seed=2)).abs()
    assert int(spectrum.argmax()) == 220 + 2 * 110


def test_a_tone_keeps_its_pitch_at_another_rate() -> None:
    spectrum = torch.fft.rfft(samples(samples=8_000, wave="tone", rate=8_000)).abs()
    assert int(spectrum.argmax()) == 220


def test_one_sample_is_no_number() -> None:
    made = samples(samples=300, wave="nan")
    assert [math.isnan(value) for value in made.tolist()].index(True) == 100
    assert int(made.isnan().sum()) == 1


def test_sounds_are_repeatable_and_unlike_each_other() -> None:
    made = {sound_bytes(Sound(samples=500, seed=seed)) for seed in (0, 1, 2, 1)}
    assert len(made) == 3


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_channels_differ_in_loudness(kind: Any) -> None:
    samples, _ = soundfile.read(io.BytesIO(sound_bytes(Sound(samples=900, channels=3, format=kind))))
    assert samples.shape == (900, 3)
    loudness = abs(samples).max(axis=0)
    assert loudness[1:] / loudness[:-1] == pytest.approx([0.6, 0.6], abs=1e-3)


def test_a_sound_without_samples() -> None:
    assert samples(samples=0).shape == (0,)


def test_a_sound_is_in_sixteen_bits() -> None:
    header = sound_bytes(Sound(samples=10))[:44]
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", header, 20)
    assert (kind, channels, rate, bits) == (1, 1, 16_000, 16)


# ------------------------------------------------------------------------------------------------ damage


def test_what_damage_does() -> None:
    data = bytes(range(200)) * 5
    assert damaged(data, "none") == data
    assert damaged(data, "empty") == b""
    assert damaged(data, "truncated") == data[:500]
    corrupt = damaged(data, "corrupt")
    assert len(corrupt) == len(data)
    assert [n for n, (a, b) in enumerate(zip(corrupt, data, strict=True)) if a != b] == list(range(500, 564))
    assert damaged(data, "other-format").decode().isprintable() is False  # lines of text
    assert damaged(data, "other-format").isascii()


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "other-format", "empty"])
def test_a_damaged_picture_is_none(damage: str) -> None:
    with pytest.raises((OSError, UnidentifiedImageError)):
        opened(width=200, height=100, damage=damage)


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "other-format", "empty"])
def test_a_damaged_sound_is_none(damage: str) -> None:
    with pytest.raises(soundfile.LibsndfileError):
        samples(samples=3000, format="flac", damage=damage)


# ------------------------------------------------------------------------------------------------- files


def test_files_are_named_after_what_they_hold(tmp_path: Path) -> None:
    image = write(ImagePiece(image=Picture(width=4, height=3, format="jpeg")), tmp_path, "image-1")
    video = write(VideoPiece(video=Clip(frames=2, width=4, height=3, fps=2.5)), tmp_path, "video-2")
    sound = write(SoundPiece(audio=Sound(samples=9, format="flac")), tmp_path, "audio-3")
    assert [Path(file.path).name for file in (image, video, sound)] == [
        "image-1.jpeg",
        "video-2.safetensors",
        "audio-3.flac",
    ]
    assert [(file.kind, file.fps) for file in (image, video, sound)] == [
        ("image", None),
        ("video", 2.5),
        ("audio", None),
    ]
    assert Image.open(image.path).size == (4, 3)
    assert load_file(video.path)["frames"].shape == (2, 3, 3, 4)
    assert len(soundfile.read(sound.path)[0]) == 9
