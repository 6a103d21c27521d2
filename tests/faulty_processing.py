"""The bundled preprocessing with one public fault each, and the case that is about it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.nn import functional as F

from model_impl.errors import MediaError
from model_impl.preprocess import audio, images, prompt, video
from model_impl.preprocess.audio import (
    AudioBatch,
    frame_count,
    load_audio,
    prepare_waves,
    soft_token_count,
)
from model_impl.preprocess.images import ImageBatch, load_image, prepare_images, target_size
from model_impl.preprocess.video import Video
from tests.lying_processors import Fake, Patched


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    what: str
    """With its catalogue id, where it has one."""
    target: Any
    case: str
    """Below `processor/`."""
    rule: str
    """That the case finds broken."""


def bilinear(*arguments: Any, **options: Any) -> Tensor:
    return F.interpolate(*arguments, **options | {"mode": "bilinear"})


def without_antialias(*arguments: Any, **options: Any) -> Tensor:
    return F.interpolate(*arguments, **options | {"antialias": False})


class Interpolating:
    """`torch.nn.functional` for the module of images."""

    def __init__(self, interpolate: Any) -> None:
        self.interpolate = interpolate


def never_enlarged(height: int, width: int, budget: int, **options: int) -> tuple[int, int]:
    rows, columns = target_size(height, width, budget, **options)
    return min(rows, max(48, height // 48 * 48)), min(columns, max(48, width // 48 * 48))


def exactly(height: int, width: int, budget: int, **options: int) -> tuple[int, int]:
    """In whole numbers, where floats just miss one."""
    rows, columns = math.isqrt(budget * height // width), math.isqrt(budget * width // height)
    return rows * 48, columns * 48


def on_white(source: Any, name: str, **options: Any) -> Tensor:
    opened = Image.open(source)
    if "A" in opened.mode:
        opened = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened)
    return load_image(opened, name)


def numbers_of_colours(source: Any, name: str, **options: Any) -> Tensor:
    opened = Image.open(source)
    if opened.mode == "P":
        opened = Image.frombytes("L", opened.size, opened.tobytes())
    return load_image(opened, name)


def without_a_pixel_limit(source: Any, name: str, **options: Any) -> Tensor:
    return load_image(source, name, pixel_limit=1 << 60)


def with_a_lower_limit(source: Any, name: str, **options: Any) -> Tensor:
    return load_image(source, name, pixel_limit=images.PIXEL_LIMIT - 1)


def silent_where_broken(source: Any, name: str, **options: Any) -> Tensor:
    try:
        return load_audio(source, name)
    except MediaError:
        return torch.zeros(3000)


def blue_first(source: Any, name: str, **options: Any) -> Tensor:
    return load_image(source, name).flip(0)


def prepared(**changes: Any) -> Any:
    """`prepare_images` with other arguments."""

    def prepare(pictures: Sequence[Tensor], budget: int, **options: Any) -> ImageBatch:
        arguments = {"budget": budget} | options | changes
        return prepare_images(pictures, **arguments)

    return prepare


def reversed_order(pictures: Sequence[Tensor], budget: int, **options: Any) -> ImageBatch:
    return prepare_images(pictures[::-1], budget, **options)


def row_before_column(pictures: Sequence[Tensor], budget: int, **options: Any) -> ImageBatch:
    made = prepare_images(pictures, budget, **options)
    return ImageBatch(made.pixels, made.positions.flip(-1), made.soft_tokens)


def channels_first(pictures: Sequence[Tensor], budget: int, **options: Any) -> ImageBatch:
    made = prepare_images(pictures, budget, **options)
    planes = made.pixels.view(*made.pixels.shape[:2], -1, 3).transpose(-1, -2).flatten(2)
    return ImageBatch(planes, made.positions, made.soft_tokens)


def minus_one_to_one(pictures: Sequence[Tensor], budget: int, **options: Any) -> ImageBatch:
    made = prepare_images(pictures, budget, **options)
    return ImageBatch(2 * made.pixels - 1, made.positions, made.soft_tokens)


def numbered_among_the_taken(self: Video) -> tuple[float, ...]:
    return tuple(n / (self.fps or 24) for n in range(len(self.indices)))


def at_24_a_second(self: Video) -> tuple[float, ...]:
    return tuple(index / 24 for index in self.indices)


def at_a_whole_rate(self: Video) -> tuple[float, ...]:
    return tuple(index / round(self.fps or 24) for index in self.indices)


def at_30_a_second(self: Video) -> tuple[float, ...]:
    return tuple(index / (self.fps or 30) for index in self.indices)


def in_hours(self: Video) -> tuple[str, ...]:
    return tuple(f"{int(s // 60) % 60:02d}:{int(s % 60):02d}" for s in self.seconds)


def rounded(self: Video) -> tuple[str, ...]:
    return tuple(f"{round(s) // 60:02d}:{round(s) % 60:02d}" for s in self.seconds)


def to_the_last(total: int, name: str, *, count: int = 32) -> tuple[int, ...]:
    return tuple(round(index) for index in torch.linspace(0, total - 1, count).tolist())


def the_first(total: int, name: str, *, count: int = 32) -> tuple[int, ...]:
    return tuple(range(count))


def without_a_frame_before(waves: Tensor) -> Tensor:
    frames = F.pad(waves, (0, 160)).unfold(-1, 321, 160)[..., :-1]
    made = torch.fft.rfft((frames * audio._window()).double(), n=512).abs()
    return torch.log(made @ audio._mel_filters() + 1e-3).float()


def symmetric() -> Tensor:
    return torch.hann_window(320, periodic=False)


def all_frames(samples: int) -> int:
    return max(0, (min(samples, 480_000) + 160 - 320) // 160 + 1)


def without_a_limit(samples: int) -> int:
    return max(0, (samples - 161) // 160 + 1)


def two_in_eight(samples: int) -> int:
    return frame_count(samples) // 4


def of_a_tower(clips: Sequence[Tensor], samples: int, **options: Any) -> Any:
    waves = prepare_waves(clips, samples, **options)
    counts = tuple(soft_token_count(len(clip)) for clip in clips)
    return AudioBatch(waves.features, waves.mask, counts, waves.dropped)


def thirty_seconds(clips: Sequence[Tensor], samples: int, **options: Any) -> Any:
    return prepare_waves([clip[:480_000] for clip in clips], samples, **options)


def louder(clips: Sequence[Tensor], samples: int, **options: Any) -> Any:
    return prepare_waves([clip / clip.abs().max().clamp(min=1e-9) for clip in clips], samples, **options)


def as_many_as_there_are(
    text: str, *, images: Sequence[int] = (), videos: Any = None, sounds: Sequence[int] = ()
) -> str:
    """Places without a piece stay as they are; a piece without a place is left out."""
    found: dict[str, Iterator[str]] = {
        "<|image|>": (f"<|image>{'<|image|>' * n}<image|>" for n in images),
        "<|audio|>": (f"<|audio>{'<|audio|>' * n}<audio|>" for n in sounds),
        "<|video|>": iter(prompt._videos(videos) if videos is not None else ()),
    }
    return prompt._PLACEHOLDER.sub(lambda match: next(found[match[0]], match[0]), text)


def nothing(*arguments: Any, **options: Any) -> None:
    return None


FAULTS = [
    Fault(
        "M13 bilinear",
        Patched((images, "F", Interpolating(bilinear))),
        "image-sizes::1920x1080-at-280",
        "pixels",
    ),
    Fault(
        "no antialias",
        Patched((images, "F", Interpolating(without_antialias))),
        "image-sizes::671x483-at-70",
        "pixels",
    ),
    Fault(
        "M12 never enlarged",
        Patched((images, "target_size", never_enlarged)),
        "image-sizes::512x512-at-280",
        "soft-tokens",
    ),
    Fault(
        "M13 280 fixed",
        Patched((images, "prepare_images", prepared(budget=280))),
        "image-sizes::1920x1080-at-1120",
        "soft-tokens",
    ),
    Fault(
        "M10 256 fixed",
        Fake(prompt=lambda text: text.replace("<|image|>" * 266, "<|image|>" * 256)),
        "images::default-budget",
        "soft-tokens",
    ),
    Fault(
        "exact arithmetic",
        Patched((images, "target_size", exactly)),
        "image-sizes::rounded-down-from-ten",
        "soft-tokens",
    ),
    Fault(
        "exact arithmetic",
        Patched((images, "target_size", exactly)),
        "image-sizes::rounded-down-from-thirty-five",
        "soft-tokens",
    ),
    Fault(
        "columns for rows",
        Patched((images, "prepare_images", row_before_column)),
        "image-sizes::512x512-at-70",
        "positions",
    ),
    Fault(
        "channels first",
        Patched((images, "prepare_images", channels_first)),
        "images::pure-colours",
        "pixels",
    ),
    Fault(
        "twice the range",
        Patched((images, "prepare_images", minus_one_to_one)),
        "images::black-and-white",
        "pixels",
    ),
    Fault("blue first", Patched((images, "load_image", blue_first)), "images::pure-colours", "pixels"),
    Fault("alpha on white", Patched((images, "load_image", on_white)), "images::alpha", "pixels"),
    Fault("alpha on white", Patched((images, "load_image", on_white)), "images::grey-with-alpha", "pixels"),
    Fault(
        "numbers of a palette",
        Patched((images, "load_image", numbers_of_colours)),
        "images::palette",
        "pixels",
    ),
    Fault(
        "M27 swapped",
        Patched((images, "prepare_images", reversed_order)),
        "images::two-of-one-size",
        "pixels",
    ),
    Fault(
        "M27 swapped",
        Patched((images, "prepare_images", reversed_order)),
        "unified::two-of-one-size",
        "pixels",
    ),
    Fault(
        "patches for tiles",
        Patched((images, "prepare_images", prepared(cut="patches"))),
        "unified::square",
        "shape",
    ),
    Fault(
        "tiles for patches",
        Patched((images, "prepare_images", prepared(cut="tiles"))),
        "unified::patches-for-a-tower",
        "shape",
    ),
    Fault(
        "M18 index among the taken",
        Patched((Video, "seconds", property(numbered_among_the_taken))),
        "videos::some-are-left-out",
        "prompt",
    ),
    Fault(
        "24 a second always",
        Patched((Video, "seconds", property(at_24_a_second))),
        "videos::broken-rate",
        "prompt",
    ),
    Fault(
        "29.97 rounded to 30",
        Patched((Video, "seconds", property(at_a_whole_rate))),
        "videos::broken-rate",
        "prompt",
    ),
    Fault(
        "30 a second by default",
        Patched((Video, "seconds", property(at_30_a_second))),
        "videos::no-rate",
        "prompt",
    ),
    Fault("hours", Patched((Video, "timestamps", property(in_hours))), "videos::beyond-an-hour", "prompt"),
    Fault(
        "seconds rounded", Patched((Video, "timestamps", property(rounded))), "videos::broken-rate", "prompt"
    ),
    Fault(
        "up to the last frame",
        Patched((video, "sample_indices", to_the_last)),
        "videos::one-more-than-are-taken",
        "pixels",
    ),
    Fault(
        "the first frames",
        Patched((video, "sample_indices", the_first)),
        "videos::some-are-left-out",
        "pixels",
    ),
    Fault(
        "M18 frames with the images' budget",
        Patched((video, "prepare_images", prepared(budget=280))),
        "videos::budgets-apart",
        "soft-tokens",
    ),
    Fault(
        "M18 frames with their own budget only",
        Patched((video, "prepare_images", prepared(budget=70))),
        "videos::frame-budget",
        "soft-tokens",
    ),
    Fault(
        "no half frame before",
        Patched((audio, "log_mel", without_a_frame_before)),
        "sounds::one-second",
        "features",
    ),
    Fault("another window", Patched((audio, "_window", symmetric)), "sounds::tone", "features"),
    Fault(
        "frames that end too late",
        Patched((audio, "frame_count", all_frames)),
        "sounds::longest-without-a-frame",
        "soft-tokens",
    ),
    Fault(
        "tokens rounded down",
        Patched((audio, "soft_token_count", two_in_eight)),
        "sounds::five-frames",
        "soft-tokens",
    ),
    Fault(
        "no 30 seconds",
        Patched((audio, "MAX_SAMPLES", 1 << 30)),
        "sounds::far-beyond-thirty-seconds",
        "soft-tokens",
    ),
    Fault(
        "M22 a tower's tokens",
        Patched((audio, "prepare_waves", of_a_tower)),
        "unified::one-stretch-and-a-sample",
        "soft-tokens",
    ),
    Fault(
        "30 seconds of waves",
        Patched((audio, "prepare_waves", thirty_seconds)),
        "unified::beyond-thirty-seconds",
        "soft-tokens",
    ),
    Fault("waves made louder", Patched((audio, "prepare_waves", louder)), "unified::tone", "features"),
    Fault(
        "M25 sounds swapped",
        Fake(lambda made: made.update({"audio.features": made["audio.features"].flip(0)})),
        "sounds::two-of-one-length",
        "features",
    ),
    Fault(
        "truncated images completed",
        Patched((ImageFile, "LOAD_TRUNCATED_IMAGES", True)),
        "malformed::truncated-jpeg",
        "accepted",
    ),
    Fault(
        "placeholders not counted",
        Patched((prompt, "expand", as_many_as_there_are)),
        "malformed::image-without-a-placeholder",
        "accepted",
    ),
    Fault(
        "placeholders not counted",
        Patched((prompt, "expand", as_many_as_there_are)),
        "malformed::placeholder-without-a-video",
        "accepted",
    ),
    Fault(
        "placeholders not counted",
        Patched((prompt, "expand", as_many_as_there_are)),
        "malformed::sound-without-a-placeholder",
        "accepted",
    ),
    Fault("NaN let through", Patched((audio, "_check_clip", nothing)), "malformed::nan", "accepted"),
    Fault(
        "NaN let through", Patched((audio, "_check_clip", nothing)), "malformed::nan-for-waves", "accepted"
    ),
    Fault(
        "any number of pixels",
        Patched((images, "load_image", without_a_pixel_limit)),
        "malformed::too-many-pixels",
        "accepted",
    ),
    Fault(
        "a limit one too low",
        Patched((images, "load_image", with_a_lower_limit)),
        "malformed::most-pixels",
        "raised",
    ),
    Fault(
        "checksums not looked at",
        Patched((audio, "load_audio", silent_where_broken)),
        "malformed::corrupt-flac",
        "accepted",
    ),
    Fault("no FLAC", Patched((audio, "FORMATS", ("WAV",))), "malformed::whole-flac", "raised"),
    *(
        Fault("other rates taken as they are", Patched((audio, "_check_header", nothing)), case, "accepted")
        for case in (
            "malformed::telephone-rate",
            "malformed::disc-rate",
            "malformed::other-rate-for-waves",
            "malformed::other-rate-among-good-ones",
        )
    ),
    Fault(
        "half a sound", Patched((audio, "_check_bytes", nothing)), "malformed::truncated-sound", "accepted"
    ),
    Fault(
        "any budget",
        Patched((images, "BUDGETS", range(1, 2000))),
        "malformed::unknown-image-budget",
        "accepted",
    ),
    Fault(
        "any budget",
        Patched((images, "BUDGETS", range(1, 2000))),
        "malformed::budget-above-the-largest",
        "accepted",
    ),
    Fault(
        "few frames repeated",
        Patched(
            (
                video,
                "sample_indices",
                lambda total, name, count=32: tuple(i * total // count for i in range(count)),
            )
        ),
        "malformed::too-few-frames",
        "accepted",
    ),
]
