"""The bundled preprocessing of images, videos and sounds, for the reference target and for suites' own rows.

Kept from `reference`, because importing it loads torch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.errors import EngineError
from conformance.targets.protocol import (
    MediaFile,
    MediaForm,
    MediaKind,
    PreprocessRequest,
    PreprocessResult,
)
from model_impl.errors import MediaError, ModelError
from model_impl.multimodal import Media
from model_impl.preprocess import audio, images, prompt, video
from model_impl.preprocess.audio import AudioBatch
from model_impl.preprocess.images import Cut, ImageBatch
from model_impl.preprocess.video import VideoBatch

_SAMPLES = 640
"""Of a soft token of the encoder-free model."""

_Piece = TypeVar("_Piece")


def preprocess(request: PreprocessRequest) -> PreprocessResult:
    """Answer a `PreprocessRequest`.

    Raises:
        EngineError: the processor refuses a piece, or the prompt.
    """
    try:
        media = prepare(
            request.media,
            request.form,
            image_budget=request.image_budget,
            frame_budget=request.frame_budget,
            sample_frames=request.sample_frames,
        )
        expanded = prompt.expand(
            request.prompt,
            images=media.images.soft_tokens if media.images else (),
            videos=media.videos,
            sounds=media.audio.soft_tokens if media.audio else (),
        )
    except ModelError as error:
        raise EngineError(f"{type(error).__name__}: {error}", traceback=traceback.format_exc()) from error
    save(media, Path(request.output))
    return PreprocessResult(path=request.output, prompt=expanded)


def prepare(
    files: Sequence[MediaFile],
    form: MediaForm,
    *,
    image_budget: int,
    frame_budget: int,
    sample_frames: bool,
) -> Media:
    """Files to tensors, all of a kind in one batch.

    Raises:
        MediaError: one of the files is none, or is damaged, or there is no such budget.
    """
    cut: Cut = "patches" if form == "tower" else "tiles"
    pictures = _loaded(files, "image", lambda file: images.load_image(Path(file.path), _name(file)))
    clips = _loaded(
        files,
        "video",
        lambda file: video.video_from_frames(_frames(file), _name(file), fps=file.fps, sample=sample_frames),
    )
    sounds = _loaded(files, "audio", lambda file: audio.load_audio(Path(file.path), _name(file)))
    named = [_name(file) for file in files if file.kind == "audio"]
    prepared = None
    if sounds:
        prepared = (
            audio.prepare_audio(sounds, names=named)
            if form == "tower"
            else audio.prepare_waves(sounds, _SAMPLES, names=named)
        )
    return Media(
        images=images.prepare_images(pictures, image_budget, cut=cut) if pictures else None,
        videos=video.prepare_videos(clips, frame_budget, cut=cut) if clips else None,
        audio=prepared,
    )


def save(media: Media, path: Path) -> None:
    """Write the tensors that `PreprocessResult` describes."""
    tensors: dict[str, Tensor] = {}
    videos = media.videos
    for name, batch in (("image", media.images), ("video", None if videos is None else videos.images)):
        if batch is not None:
            tensors |= {f"{name}.pixels": batch.pixels, f"{name}.positions": batch.positions}
    if videos is not None:
        tensors["video.frames"] = torch.tensor(videos.frames)
    if media.audio is not None:
        tensors |= {"audio.features": media.audio.features, "audio.mask": media.audio.mask}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load(path: Path, per_token: int, soft_frames: Callable[[int], int]) -> Media:
    """Read such tensors.

    Args:
        path: The file.
        per_token: Squares of an image that become one soft token.
        soft_frames: Valid frames of a sound to its soft tokens.

    Raises:
        EngineError: the file cannot be read, or a tensor that belongs to another is missing.
    """
    try:
        tensors = load_file(path)
        pictures, frames = (_images(tensors, name, per_token) for name in ("image", "video"))
        videos = None
        if frames is not None:
            numbers = tuple(tensors["video.frames"].tolist())
            videos = VideoBatch(frames, numbers, tuple(("",) * number for number in numbers))
        sounds = None
        if "audio.features" in tensors:
            mask = tensors["audio.mask"].bool()
            counts = tuple(soft_frames(int(row.sum())) for row in mask)
            sounds = AudioBatch(tensors["audio.features"], mask, counts, (0,) * len(mask))
    except (OSError, SafetensorError, KeyError) as error:
        raise EngineError(f"{path}: no tensors of media: {type(error).__name__}: {error}") from error
    return Media(images=pictures, videos=videos, audio=sounds)


def _images(tensors: Mapping[str, Tensor], name: str, per_token: int) -> ImageBatch | None:
    if f"{name}.pixels" not in tensors:
        return None
    positions = tensors[f"{name}.positions"]
    counts = (positions[..., 0] >= 0).sum(dim=1) // per_token
    return ImageBatch(tensors[f"{name}.pixels"], positions, tuple(counts.tolist()))


def _loaded(files: Sequence[MediaFile], kind: MediaKind, read: Callable[[MediaFile], _Piece]) -> list[_Piece]:
    return [read(file) for file in files if file.kind == kind]


def _frames(file: MediaFile) -> Tensor:
    try:
        tensors = load_file(file.path)
    except (OSError, SafetensorError) as error:
        raise MediaError(f"{_name(file)}: cannot be read ({type(error).__name__}: {error})") from error
    if "frames" not in tensors:
        raise MediaError(f"{_name(file)}: a decoded video has no tensor `frames`; it has {sorted(tensors)}")
    return tensors["frames"]


def _name(file: MediaFile) -> str:
    return Path(file.path).name
