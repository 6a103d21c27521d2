"""Videos become what transformers' processor makes of the same frames; what is none is refused by name."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch import Tensor

from model_impl.errors import MediaError
from model_impl.preprocess import video as module
from model_impl.preprocess.images import prepare_images
from model_impl.preprocess.video import (
    Video,
    load_video,
    prepare_videos,
    sample_indices,
    video_from_frames,
)
from tests.media_oracle import ask

pytestmark = pytest.mark.xdist_group("preprocess-video")  # its fixtures take long: one process makes them

torch.set_num_threads(1)

EXACT = 1e-6
"""The same levels of 255, whatever scales them: by multiplying or, as transformers does here, by dividing."""


def clip(count: int, width: int = 96, height: int = 64) -> Tensor:
    """A moving pattern with noise: uint8 [count, 3, height, width]."""
    t = torch.arange(count, dtype=torch.float32)[:, None, None, None]
    c = torch.arange(1, 4, dtype=torch.float32)[None, :, None, None]
    y = torch.arange(height, dtype=torch.float32)[None, None, :, None]
    x = torch.arange(width, dtype=torch.float32)[None, None, None, :]
    wave = 120 + 90 * torch.sin(0.2 * x + 0.3 * t + c) * torch.cos(0.1 * c * y)
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count)) * 40
    return (wave + noise - 20).clamp(0, 255).to(torch.uint8)


def encoded(frames: Tensor, *, fps: int = 25, container: str = "matroska") -> bytes:
    """Without loss."""
    out = io.BytesIO()
    codec, pixels = {"mov": ("png", "rgb24")}.get(container, ("ffv1", "bgr0"))
    with av.open(out, "w", format=container) as written:
        stream = written.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = pixels
        for frame in frames:
            array = frame.permute(1, 2, 0).contiguous().numpy()
            written.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        written.mux(stream.encode())
    return out.getvalue()


# ---------------------------------------------------------------------------------------- transformers


CLIPS: dict[str, tuple[Tensor, float | None, bool]] = {
    "as many as are sampled": (clip(32), 30.0, True),
    "some are left out": (clip(45), 2.5, True),
    "many, over a minute": (clip(333, 40, 30), 3.0, True),
    "no rate": (clip(50, 60, 100), None, True),
    "three, not sampled": (clip(3), 1.0, False),
    "one, not sampled": (clip(1, 7, 3), 24.0, False),
    "long, slow, not sampled": (clip(4), 0.01, False),
    "thin": (clip(33, 3, 900), 29.97, True),
}
SHORT = "too few to sample"

Said = tuple[dict[str, dict[str, Any]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What transformers makes of the clips, for both kinds of models."""
    asked = [
        {"key": f"{name}.{cut}", "name": name, "fps": fps, "sample": sample, "unified": cut == "tiles"}
        for name, (_, fps, sample) in CLIPS.items()
        for cut in ("patches", "tiles")
    ]
    asked.append({"key": SHORT, "name": "three, not sampled", "fps": 1.0, "sample": True, "unified": False})
    frames = {name: frames for name, (frames, _, _) in CLIPS.items()}
    request = {"videos": asked}
    answers, tensors = ask(tmp_path_factory, "vision", "videos", request, tensors=frames, processors=True)
    return {run["key"]: answer for run, answer in zip(asked, answers["videos"], strict=True)}, tensors


@pytest.mark.parametrize("cut", ["patches", "tiles"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_video_is_what_transformers_makes_of_it(said: Said, name: str, cut: Any) -> None:
    answers, tensors = said
    answer = answers[f"{name}.{cut}"]
    frames, fps, sample = CLIPS[name]
    batch = prepare_videos([video_from_frames(frames, name, fps=fps, sample=sample)], cut=cut)
    assert batch.frames == (answer["frames"],)
    assert batch.images.soft_tokens == (answer["soft_tokens"],) * answer["frames"]
    assert torch.equal(batch.images.positions, tensors[f"{name}.{cut}.positions"])
    expected = tensors[f"{name}.{cut}.pixels"]
    assert batch.images.pixels.shape == expected.shape
    assert (batch.images.pixels - expected).abs().max() <= EXACT
    text = " ".join(f"{stamp} [{'v' * answer['soft_tokens']}]" for stamp in batch.timestamps[0])
    assert text == answer["text"]


def test_too_few_frames_to_sample_are_refused_by_both(said: Said) -> None:
    answers, _ = said
    assert "num_frames" in answers[SHORT]["error"]
    with pytest.raises(MediaError, match=r"^cat: 3 frames are fewer than the 32 .* switch sampling off"):
        video_from_frames(CLIPS["three, not sampled"][0], "cat")


# --------------------------------------------------------------------------------------------- by itself


def test_frames_are_taken_evenly_and_rounded_down() -> None:
    assert sample_indices(32, "v") == tuple(range(32))
    assert sample_indices(33, "v") == tuple(range(32))
    assert sample_indices(64, "v") == tuple(range(0, 64, 2))
    assert sample_indices(45, "v")[:6] == (0, 1, 2, 4, 5, 7)


def test_timestamps_are_those_of_the_frames_in_the_video() -> None:
    video = Video(clip(4), (0, 89, 90, 100_000), 1.5)
    assert video.seconds == (0.0, pytest.approx(59.333, abs=1e-3), 60.0, pytest.approx(66_666.667, abs=1e-3))
    assert video.timestamps == ("00:00", "00:59", "01:00", "1111:06")
    assert Video(clip(2), (23, 24), None).timestamps == ("00:00", "00:01")  # 24 a second


def test_videos_do_not_depend_on_each_other() -> None:
    made = [
        video_from_frames(clip(2, 96, 64), "a", sample=False),
        video_from_frames(clip(3, 40, 90), "b", sample=False),
    ]
    batch = prepare_videos(made)
    assert batch.frames == (2, 3)
    assert batch.timestamps == (made[0].timestamps, made[1].timestamps)
    start = 0
    for video, count in zip(made, batch.frames, strict=True):
        alone = prepare_videos([video]).images
        assert torch.equal(batch.images.pixels[start : start + count], alone.pixels)
        assert torch.equal(batch.images.positions[start : start + count], alone.positions)
        assert batch.images.soft_tokens[start : start + count] == alone.soft_tokens
        start += count


def test_a_frame_is_an_image_of_its_own() -> None:
    frames = clip(3)
    batch = prepare_videos([video_from_frames(frames, "v", sample=False)], 140, pad_to_budget=False).images
    images = prepare_images(list(frames), 140, pad_to_budget=False)
    assert torch.equal(batch.pixels, images.pixels)
    assert torch.equal(batch.positions, images.positions)


# --------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("container", ["matroska", "mov", "avi"])
def test_frames_are_decoded_as_they_were(container: str) -> None:
    frames = clip(40)
    video = load_video(encoded(frames, fps=10, container=container), "v")
    assert video.fps == 10
    assert video.indices == sample_indices(40, "v")
    assert torch.equal(video.frames, frames[list(video.indices)])
    assert video.timestamps[-1] == "00:03"


def test_a_short_file_with_sampling_off(tmp_path: Path) -> None:
    frames = clip(3)
    (tmp_path / "short.mkv").write_bytes(encoded(frames))
    video = load_video(tmp_path / "short.mkv", "v", sample=False)
    assert torch.equal(video.frames, frames)
    assert video.indices == (0, 1, 2)
    with pytest.raises(MediaError, match=r"^v: 3 frames are fewer than the 32"):
        load_video(tmp_path / "short.mkv", "v")


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"<html>404</html>" * 50, "no video that can be read"),
    "playlist": (lambda: PLAYLIST, "no video that can be read"),
    "list of files": (lambda: b"ffconcat version 1.0\nfile short.mkv\n", "no video that can be read"),
    "truncated": (
        lambda: encoded(clip(40), container="mov")[:9000],
        "or is damaged",
    ),
    "fewer frames than it says": (lambda: avi_without_its_end(), "truncated: it says it has 40 frames"),
}


def avi_without_its_end() -> bytes:
    """Cut between two frames, so that those before are whole."""
    data = encoded(clip(40), container="avi")
    return data[: [found.start() for found in re.finditer(b"00dc", data)][20]]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_refused_by_name(name: str) -> None:
    make, says = BAD[name]
    with pytest.raises(MediaError, match=f"^film: .*({says})"):
        load_video(make(), "film")
    assert load_video(encoded(clip(1)), "next", sample=False).frames.shape == (1, 3, 64, 96)


def test_sound_is_no_video() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as written:
        stream = written.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 800, dtype=torch.int16).numpy(), layout="mono")
        frame.sample_rate = 16_000
        written.mux(stream.encode(frame))
        written.mux(stream.encode(None))
    with pytest.raises(MediaError, match=r"^v: has no video stream"):
        load_video(out.getvalue(), "v")


def test_limits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(clip(40))
    for limit, value in (
        ("PIXEL_LIMIT", 96 * 64 - 1),
        ("VIDEO_PIXEL_LIMIT", 32 * 96 * 64 - 1),
        ("DECODED_LIMIT", 38),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            with pytest.raises(MediaError, match=rf"^v: 32 frames of 96 x 64, .* {value}"):
                load_video(data, "v")
            patch.setattr(module, limit, value + 1)
            assert len(load_video(data, "v").frames) == 32


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^cat: cannot be read .*No such file"):
        load_video(tmp_path / "cat.mp4", "cat")


def test_tensors_that_are_no_videos_are_refused() -> None:
    frames = clip(2)
    for wrong in (frames.float(), frames[0], frames[:, :1], frames[:0]):
        with pytest.raises(MediaError, match=r"^v: the frames are torch"):
            video_from_frames(wrong, "v", sample=False)
    for fps in (0.0, -1.0, float("nan")):
        with pytest.raises(MediaError, match=r"^v: .* frames a second; give a number above zero"):
            video_from_frames(frames, "v", fps=fps, sample=False)
    with pytest.raises(MediaError, match="no videos"):
        prepare_videos([])
    with pytest.raises(MediaError, match="no budget of 71"):
        prepare_videos([video_from_frames(frames, "v", sample=False)], 71)
