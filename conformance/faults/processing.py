"""Faults of the processors of images, videos and sounds (catalogue class 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from conformance.faults.base import Collection, Patch, replace
from model_impl.errors import MediaError
from model_impl.preprocess import audio, images, prompt, video
from model_impl.preprocess.audio import AudioBatch
from model_impl.preprocess.images import BUDGETS, ImageBatch
from model_impl.preprocess.video import Video, VideoBatch

faults = Collection("processor")
of_images = partial(faults, area="image-input")
of_videos = partial(faults, area="video-input")
of_sounds = partial(faults, area="sound-input")


# ---------------------------------------------------------------------------------------------- images


@faults("processor-exits", source=("M14",), area="malformed-input", module=images)
def _exits() -> Patch:
    """A budget that there is not ends the process."""
    original = images.target_size

    def target_size(height: int, width: int, budget: int, **options: Any) -> tuple[int, int]:
        if budget not in BUDGETS:
            raise SystemExit(1)
        return original(height, width, budget, **options)

    return replace(images, "target_size", target_size)


@of_images("never-scaled-up", source=("M12",), module=images)
def _never_scaled_up() -> Patch:
    """Images are never scaled up, so that small ones do not fill the budget."""
    original = images.target_size

    def target_size(height: int, width: int, budget: int, **options: Any) -> tuple[int, int]:
        rows, columns = original(height, width, budget, **options)
        return min(rows, max(48, height // 48 * 48)), min(columns, max(48, width // 48 * 48))

    return replace(images, "target_size", target_size)


@of_images("bilinear", source=("M13",), module=images)
def _bilinear() -> Patch:
    """Images are resized bilinearly, not bicubically."""

    def resized(image: Tensor, number: int, budget: int, patch_size: int, pooling: int) -> Tensor:
        del number
        height, width = image.shape[1:]
        size = images.target_size(height, width, budget, patch_size=patch_size, pooling=pooling)
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]

    return replace(images, "_resized", resized)


def _budget(change: Callable[[int], int]) -> Patch:
    original = images.prepare_images

    def prepare(pictures: Sequence[Tensor], budget: int = 280, **options: Any) -> ImageBatch:
        return original(pictures, change(budget), **options)

    return replace(images, "prepare_images", prepare)


@of_images("budget-always-280", source=("M13", "M14"), module=images)
def _always_280() -> Patch:
    """Whatever budget is asked for, an image gets 280 soft tokens."""
    return _budget(lambda budget: 280 if budget in BUDGETS else budget)


@of_images("always-256-placeholders", source=("M10",), module=prompt)
def _always_256() -> Patch:
    """Every image gets 256 placeholders."""
    original = prompt._image
    return replace(prompt, "_image", lambda _count, token=prompt.IMAGE: original(256, token))


def _batch(change: Callable[[ImageBatch], ImageBatch]) -> Patch:
    original = images.prepare_images

    def prepare(*given: Any, **options: Any) -> ImageBatch:
        return change(original(*given, **options))

    return replace(images, "prepare_images", prepare)


@of_images("positions-row-first", source=("spec 3.1",), module=images)
def _row_first() -> Patch:
    """Positions give the row first, and then the column."""
    return _batch(lambda batch: changed(batch, positions=batch.positions.flip(-1)))


@of_images("pixels-centred-twice", source=("spec 3.1",), module=images)
def _centred() -> Patch:
    """The processor centres pixels, which the tower does too."""
    return _batch(lambda batch: changed(batch, pixels=(batch.pixels - 0.5) / 0.5))


@of_images("colours-apart", source=("spec 3.1",), module=images)
def _colours_apart() -> Patch:
    """A patch holds all its red values first, then green, then blue."""
    original = images._squares

    def squares(image: Tensor, side: int) -> Tensor:
        made = original(image, side)
        return made.permute(0, 1, 4, 2, 3).reshape(made.shape)

    return replace(images, "_squares", squares)


@of_images("rows-and-columns-of-a-patch-swapped", source=("spec 3.1",), module=images)
def _transposed() -> Patch:
    """The pixels of a patch are written down column by column."""
    original = images._squares
    return replace(images, "_squares", lambda image, side: original(image, side).transpose(2, 3))


@of_images("transparency-on-black", source=("spec 3.1",), module=images)
def _on_black() -> Patch:
    """What is transparent becomes black, where its colour should come out."""
    original = images.load_image

    def load(source: Any, name: str, **options: Any) -> Tensor:
        decoded = original(source, name, **options)
        with Image.open(source) as image:
            if not image.has_transparency_data:
                return decoded
            bands = bytearray(image.convert("RGBA").getchannel("A").tobytes())
        alpha = torch.frombuffer(bands, dtype=torch.uint8)
        return (decoded * (alpha.view(decoded.shape[1:]) / 255)).to(torch.uint8)

    return replace(images, "load_image", load)


@of_images("images-in-reverse-order", source=("spec 3.4",), module=images)
def _in_reverse() -> Patch:
    """The images of a prompt come out in reverse order."""
    original = images.prepare_images

    def prepare(pictures: Sequence[Tensor], *given: Any, **options: Any) -> ImageBatch:
        return original(pictures[::-1], *given, **options)

    return replace(images, "prepare_images", prepare)


# ---------------------------------------------------------------------------------------------- videos


@of_videos("frames-are-images", source=("M18",), module=video)
def _frames_are_images() -> Patch:
    """Frames get the budget of images."""
    original = video.prepare_videos

    def prepare(videos: Sequence[Video], _budget: int = 70, **options: Any) -> VideoBatch:
        return original(videos, 280, **options)

    return replace(video, "prepare_videos", prepare)


@of_videos("timestamps-of-kept-frames", source=("M18",), module=video)
def _kept_frames() -> Patch:
    """A frame's time is told from its number among those kept, not from that in the video."""

    def seconds(self: Video) -> tuple[float, ...]:
        return tuple(number / (self.fps or video.DEFAULT_FPS) for number in range(len(self.indices)))

    return replace(Video, "seconds", property(seconds))


@of_videos("last-frame-sampled", source=("spec 3.4",), module=video)
def _last_frame() -> Patch:
    """Frames are sampled from the first to the last, both included."""
    original = video.sample_indices

    def sample(total: int, name: str, *, count: int = video.FRAMES) -> tuple[int, ...]:
        original(total, name, count=count)
        return tuple(round(i * (total - 1) / (count - 1)) for i in range(count))

    return replace(video, "sample_indices", sample)


@of_videos("thirty-frames-a-second", source=("spec 3.4",), module=video)
def _thirty() -> Patch:
    """A video that does not say how fast it is is taken to have thirty frames a second."""
    return replace(video, "DEFAULT_FPS", 30.0)


@of_videos("minutes-wrap", source=("spec 3.4",), module=video)
def _minutes_wrap() -> Patch:
    """After an hour, minutes begin anew."""

    def stamps(self: Video) -> tuple[str, ...]:
        return tuple(f"{int(s // 60) % 60:02d}:{int(s % 60):02d}" for s in self.seconds)

    return replace(Video, "timestamps", property(stamps))


# ---------------------------------------------------------------------------------------------- sounds


@of_sounds("no-silence-before", source=("spec 3.7",), module=audio)
def _no_silence_before() -> Patch:
    """No half frame of silence stands before a sound."""
    original = audio.log_mel

    def log_mel(waves: Tensor) -> Tensor:
        return original(F.pad(waves, (0, audio._FRAME // 2))[:, audio._FRAME // 2 :])

    return replace(audio, "log_mel", log_mel)


@of_sounds("symmetric-window", source=("spec 3.7",), module=audio)
def _symmetric_window() -> Patch:
    """The window's last value is its first, as for a filter, not for a spectrum."""
    window = torch.hann_window(audio._FRAME, periodic=False)
    return replace(audio, "_window", lambda: window)


@of_sounds("power-spectrum", source=("spec 3.7",), module=audio)
def _power() -> Patch:
    """Filters are applied to powers, not to magnitudes."""

    def log_mel(waves: Tensor) -> Tensor:
        if audio.frame_count(waves.shape[-1]) == 0:
            return waves.new_zeros(waves.shape[0], 0, audio.MEL_BINS)
        padded = F.pad(waves, (audio._FRAME // 2, 0))
        frames = padded.unfold(-1, audio._FRAME + 1, audio._HOP)[..., :-1]
        powers = torch.fft.rfft((frames * audio._window()).double(), n=audio._FFT).abs().square()
        return torch.log(powers @ audio._mel_filters() + audio._MEL_FLOOR).float()

    return replace(audio, "log_mel", log_mel)


@of_sounds("padding-is-sound", source=("M16",), module=audio)
def _padding_is_sound() -> Patch:
    """The frames behind a shorter sound count as valid."""
    original = audio.prepare_audio

    def prepare(clips: Sequence[Tensor], **options: Any) -> AudioBatch:
        batch = original(clips, **options)
        return changed(batch, mask=torch.ones_like(batch.mask))

    return replace(audio, "prepare_audio", prepare)


@of_sounds("last-token-cut", source=("spec 12.14",), module=audio)
def _last_token_cut() -> Patch:
    """A sound's soft tokens are counted by whole fours of frames."""
    return replace(audio, "soft_token_count", lambda samples: audio.frame_count(samples) // 4)


@of_sounds("no-limit-of-length", source=("spec 12.14",), module=audio)
def _no_limit() -> Patch:
    """A sound of more than thirty seconds is not cut."""
    return replace(audio, "MAX_SAMPLES", 10**9)


@faults("mel-for-the-unified-model", source=("M22",), area="unified-input", module=audio)
def _mel_for_unified() -> Patch:
    """The model without encoders gets the mel features of the others."""

    def prepare(clips: Sequence[Tensor], _samples: int, **options: Any) -> AudioBatch:
        return audio.prepare_audio(clips, **options)

    return replace(audio, "prepare_waves", prepare)


@faults("last-stretch-dropped", source=("M22",), area="unified-input", module=audio)
def _last_stretch() -> Patch:
    """In the model without encoders, what does not fill a stretch is dropped."""
    original = audio.prepare_waves

    def prepare(clips: Sequence[Tensor], samples: int, **options: Any) -> AudioBatch:
        whole = [clip[: max(samples, len(clip) // samples * samples)] for clip in clips]
        return original(whole, samples, **options)

    return replace(audio, "prepare_waves", prepare)


@faults("tiles-normed", source=("spec 4.1",), area="unified-input", module=images)
def _tiles_normed() -> Patch:
    """In the model without encoders, pixels are centred as for the tower."""
    original = images.prepare_images

    def prepare(*given: Any, **options: Any) -> ImageBatch:
        batch = original(*given, **options)
        tiles = options.get("cut") == "tiles"
        return changed(batch, pixels=2 * batch.pixels - 1) if tiles else batch

    return replace(images, "prepare_images", prepare)


@faults(
    "damage-unnoticed",
    source=("spec 3.1",),
    area="malformed-input",
    module=images,
)
def _damage_unnoticed() -> Patch:
    """A file that cannot be read becomes a grey picture."""
    original = images.load_image

    def load(source: Any, name: str, **options: Any) -> Tensor:
        try:
            return original(source, name, **options)
        except MediaError:
            return torch.full((3, 48, 48), 127, dtype=torch.uint8)

    return replace(images, "load_image", load)


@faults(
    "no-pixel-limit",
    source=("https://cwe.mitre.org/data/definitions/409.html",),
    area="malformed-input",
    module=images,
)
def _no_pixel_limit() -> Patch:
    """An image may have any number of pixels."""
    original = images.load_image

    def load(source: Any, name: str, **options: Any) -> Tensor:
        return original(source, name, **options | {"pixel_limit": 10**18})

    return replace(images, "load_image", load)


@faults("error-without-a-name", source=("spec 3.1",), area="malformed-input", module=images)
def _without_a_name() -> Patch:
    """What is wrong with a file is said, and not with which."""
    original = images.load_image

    def load(source: Any, _name: str, **options: Any) -> Tensor:
        return original(source, "an image", **options)

    return replace(images, "load_image", load)


__all__ = ["faults"]
