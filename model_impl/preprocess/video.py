"""Videos to patches: which frames, when each of them is, one image per frame (fact sheet, section 3.4)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model_impl.errors import MediaError
from model_impl.preprocess.images import PIXEL_LIMIT, Cut, ImageBatch, prepare_images

if TYPE_CHECKING:
    from av.container import InputContainer

FRAMES = 32
"""Taken of a video, evenly."""
FRAME_BUDGET = 70
"""Most soft tokens of a frame, unless a request says otherwise."""
DEFAULT_FPS = 24.0
"""Where a video does not say."""
VIDEO_PIXEL_LIMIT = 1 << 28
"""Most pixels of all frames that are kept: 32 of 3840 x 2160 just fit, some 800 MB."""
DECODED_LIMIT = 1 << 16
"""Most frames that are decoded on the way to the last one kept: 18 minutes at 60 a second."""
CONTAINERS = ("avi", "gif", "matroska", "mov", "mpegts", "ogg")
"""What is opened, by FFmpeg's names; `matroska` reads WebM too, and `mov` MP4. None of them names other
files or addresses to be read, as playlists do."""


@dataclass(frozen=True)
class Video:
    """Frames, and where in the video they were."""

    frames: Tensor
    """uint8 [F, 3, height, width]."""
    indices: tuple[int, ...]
    """Of each frame in the video, from zero."""
    fps: float | None
    """Frames a second of the video, not of those kept."""

    @property
    def seconds(self) -> tuple[float, ...]:
        """When each frame is shown."""
        return tuple(index / (self.fps or DEFAULT_FPS) for index in self.indices)

    @property
    def timestamps(self) -> tuple[str, ...]:
        """`mm:ss` of each frame, as the prompt shows them; minutes go on beyond 59."""
        return tuple(f"{int(s // 60):02d}:{int(s % 60):02d}" for s in self.seconds)


@dataclass(frozen=True)
class VideoBatch:
    """The frames of all videos, one video after the other, each an image of its own."""

    images: ImageBatch
    frames: tuple[int, ...]
    """Of each video."""
    timestamps: tuple[tuple[str, ...], ...]
    """Of each video's frames."""


def sample_indices(total: int, name: str, *, count: int = FRAMES) -> tuple[int, ...]:
    """Which frames of a video are taken: `floor(i · total / count)`.

    Raises:
        MediaError: it has fewer frames than that.
    """
    if total < count:
        raise MediaError(
            f"{name}: {total} frames are fewer than the {count} that are sampled; switch sampling off, and "
            "all of them are taken"
        )
    return tuple(i * total // count for i in range(count))


def video_from_frames(frames: Tensor, name: str, *, fps: float | None = None, sample: bool = True) -> Video:
    """A video that is decoded already.

    Args:
        frames: uint8 [F, 3, height, width], all of them.
        name: What an error calls it.
        fps: Frames a second; `DEFAULT_FPS` is assumed where it is not known.
        sample: Take `FRAMES` of them; else all.

    Raises:
        MediaError: the frames have another form, there are too few to sample or none, or `fps` is not above
            zero.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or frames.numel() == 0:
        raise MediaError(
            f"{name}: the frames are {frames.dtype} of shape {list(frames.shape)}, and must be uint8 of "
            "shape [frames, 3, height, width] with at least one pixel"
        )
    if fps is not None and not fps > 0:
        raise MediaError(
            f"{name}: {fps} frames a second; give a number above zero, or None if it is not known"
        )
    indices = sample_indices(len(frames), name) if sample else tuple(range(len(frames)))
    return Video(frames[list(indices)], indices, fps)


def load_video(source: bytes | Path, name: str, *, sample: bool = True) -> Video:
    """Decode a video.

    Args:
        source: An encoded video, or its file.
        name: What an error calls it.
        sample: Take `FRAMES` frames; else all.

    Raises:
        MediaError: it is empty, no video in one of `CONTAINERS`, corrupt, shorter than the container says,
            too short to sample, beyond a limit, or cannot be read.
    """
    import av  # FFmpeg: who decodes no video does not load it

    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error
    if not data:
        raise MediaError(f"{name}: is empty, zero bytes long")
    try:
        with av.open(io.BytesIO(data), "r", options={"format_whitelist": ",".join(CONTAINERS)}) as container:
            return _decode(container, name, sample)
    except av.FFmpegError as error:
        raise MediaError(
            f"{name}: is no video that can be read, or is damaged ({type(error).__name__}: "
            f"{error.strerror}); these containers can: {', '.join(CONTAINERS)}"
        ) from error


def _decode(container: InputContainer, name: str, sample: bool) -> Video:
    if not container.streams.video:
        raise MediaError(f"{name}: has no video stream")
    stream = container.streams.video[0]
    total = stream.frames or _count(container)
    indices = sample_indices(total, name) if sample else tuple(range(total))
    if not indices:
        raise MediaError(f"{name}: has no frames")
    width, height, last = stream.width, stream.height, indices[-1]
    pixels = width * height
    if pixels > PIXEL_LIMIT or pixels * len(indices) > VIDEO_PIXEL_LIMIT or last >= DECODED_LIMIT:
        raise MediaError(
            f"{name}: {len(indices)} frames of {width} x {height}, the last at {last}; the limits are "
            f"{VIDEO_PIXEL_LIMIT} pixels in all, {PIXEL_LIMIT} of a frame, and {DECODED_LIMIT} frames; cut "
            "it or scale it down"
        )
    wanted, kept = set(indices), []
    for number, frame in enumerate(container.decode(video=0)):
        if number in wanted:
            if (frame.width, frame.height) != (width, height):
                raise MediaError(
                    f"{name}: frame {number} has a size of its own; encode it anew with one size"
                )
            kept.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1))
        if number == last:
            break
    if len(kept) < len(indices):
        raise MediaError(
            f"{name}: is truncated: it says it has {total} frames, and fewer can be decoded; encode it anew"
        )
    fps = stream.average_rate
    return Video(torch.stack(kept), indices, float(fps) if fps else None)


def _count(container: InputContainer) -> int:
    """Frames of a container that does not say how many it has."""
    number = sum(packet.size > 0 for packet in container.demux(video=0))
    container.seek(0)
    return number


def prepare_videos(
    videos: Sequence[Video], budget: int = FRAME_BUDGET, *, cut: Cut = "patches", pad_to_budget: bool = True
) -> VideoBatch:
    """Resize and cut all frames of all videos.

    Args:
        videos: Of any sizes and lengths.
        budget: Most soft tokens of a frame; one of `BUDGETS`.
        cut: As in `prepare_images`.
        pad_to_budget: As in `prepare_images`.

    Raises:
        MediaError: there are no videos, or as in `prepare_images`.
    """
    if not videos:
        raise MediaError("there are no videos to prepare")
    frames = [frame for video in videos for frame in video.frames]
    return VideoBatch(
        prepare_images(frames, budget, cut=cut, pad_to_budget=pad_to_budget),
        tuple(len(video.frames) for video in videos),
        tuple(video.timestamps for video in videos),
    )
