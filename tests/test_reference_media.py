"""The bundled preprocessing as a target: tensors by the protocol's names, and no error but one that names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.errors import EngineError
from conformance.media import Clip, ImagePiece, MediaPiece, Picture, Sound, SoundPiece, VideoPiece
from conformance.media_files import write
from conformance.targets.protocol import MediaFile, MediaForm, PreprocessRequest, PreprocessResult
from conformance.targets.reference import ReferenceTarget
from conformance.targets.reference_media import load
from model_impl.preprocess.audio import soft_token_count

torch.set_num_threads(1)

IMAGE = ImagePiece(image=Picture(width=64, height=48))
VIDEO = VideoPiece(video=Clip(frames=3, width=48, height=64, fps=0.5))
SOUND = SoundPiece(audio=Sound(samples=1600))
PLACEHOLDERS = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}


def ask(tmp_path: Path, *pieces: MediaPiece | MediaFile, **changes: Any) -> PreprocessResult:
    files = [
        piece if isinstance(piece, MediaFile) else write(piece, tmp_path, f"piece-{number}")
        for number, piece in enumerate(pieces)
    ]
    values: dict[str, Any] = {
        "form": "tower",
        "prompt": "a" + "b".join(PLACEHOLDERS[file.kind] for file in files),
        "media": files,
        "image_budget": 70,
        "sample_frames": False,
        "output": str(tmp_path / "out.safetensors"),
    }
    return ReferenceTarget().preprocess(PreprocessRequest.model_validate(values | changes))


SIDE = {"tower": 16, "unified": 48}


@pytest.mark.parametrize("form", ["tower", "unified"])
def test_tensors_are_those_of_the_protocol(tmp_path: Path, form: MediaForm) -> None:
    result = ask(tmp_path, SOUND, IMAGE, VIDEO, IMAGE, form=form)
    assert result.path == str(tmp_path / "out.safetensors")
    made = load_file(result.path)
    values, squares = SIDE[form] ** 2 * 3, 70 * (48 // SIDE[form]) ** 2
    bins = 128 if form == "tower" else 640
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in made.items()} == {
        "image.pixels": (torch.float32, [2, squares, values]),
        "image.positions": (torch.int64, [2, squares, 2]),
        "video.pixels": (torch.float32, [3, squares, values]),
        "video.positions": (torch.int64, [3, squares, 2]),
        "video.frames": (torch.int64, [1]),
        "audio.features": (torch.float32, [1, made["audio.mask"].shape[1], bins]),
        "audio.mask": (torch.bool, [1, made["audio.mask"].shape[1]]),
    }
    assert made["video.frames"].tolist() == [3]
    # 64 x 48 fills 9 x 7 soft tokens, 48 x 64 likewise 7 x 9, and a tenth of a second three.
    seen = f"<|image>{'<|image|>' * 63}<image|>"
    frames = " ".join(f"00:0{second} <|image>{'<|video|>' * 63}<image|>" for second in (0, 2, 4))
    assert result.prompt == f"a<|audio>{'<|audio|>' * 3}<audio|>b{seen}b{frames}b{seen}"


def test_only_what_was_given_has_tensors(tmp_path: Path) -> None:
    assert set(load_file(ask(tmp_path, IMAGE).path)) == {"image.pixels", "image.positions"}
    assert set(load_file(ask(tmp_path, SOUND).path)) == {"audio.features", "audio.mask"}


def test_budgets_and_sampling_are_those_of_the_request(tmp_path: Path) -> None:
    long = VideoPiece(video=Clip(frames=40, width=48, height=64, fps=1))
    result = ask(tmp_path, IMAGE, long, image_budget=140, frame_budget=280, sample_frames=True)
    made = load_file(result.path)
    assert made["image.pixels"].shape[1] == 140 * 9
    assert made["video.pixels"].shape[:2] == (32, 280 * 9)
    assert "00:38 <|image>" in result.prompt
    assert "00:39 <|image>" not in result.prompt


@pytest.mark.parametrize(
    ("piece", "changes", "message"),
    [
        (
            ImagePiece(image=Picture(width=64, height=64, damage="truncated")),
            {},
            r"piece-0\.png: .*truncated",
        ),
        (ImagePiece(image=Picture(width=9, height=9, damage="empty")), {}, r"piece-0\.png: is empty"),
        (IMAGE, {"image_budget": 71}, r"budget of 71 soft tokens"),
        (IMAGE, {"prompt": "no place"}, r"0 placeholders <\|image\|>"),
        (VIDEO, {"sample_frames": True}, r"piece-0\.safetensors: 3 frames are fewer"),
        (VIDEO, {"frame_budget": 71}, r"budget of 71 soft tokens"),
        (SoundPiece(audio=Sound(samples=0)), {}, r"piece-0\.wav: has no samples"),
        (
            SoundPiece(audio=Sound(samples=99, wave="nan")),
            {},
            r"piece-0\.wav: 1 of 99 samples are not finite",
        ),
    ],
)
def test_what_is_refused_is_named(
    tmp_path: Path, piece: MediaPiece, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=f"^MediaError: .*{message}") as caught:
        ask(tmp_path, piece, **changes)
    assert "MediaError" in caught.value.traceback
    assert ask(tmp_path, IMAGE).prompt.count("<|image|>") == 63


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(1)}, "has no tensor `frames`; it has .'other'"),
        (None, "cannot be read"),
        ({"frames": torch.zeros(2, 3, 4, 4)}, "must be uint8"),
    ],
)
def test_a_video_that_is_none_is_named(
    tmp_path: Path, tensors: dict[str, Tensor] | None, message: str
) -> None:
    path = tmp_path / "clip.safetensors"
    if tensors is None:
        path.write_bytes(b"no tensors")
    else:
        save_file(tensors, path)
    with pytest.raises(EngineError, match=rf"^MediaError: clip\.safetensors: .*{message}"):
        ask(tmp_path, MediaFile(kind="video", path=str(path)))


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(EngineError, match=r"^MediaError: gone: cannot be read"):
        ask(tmp_path, MediaFile(kind=kind, path=str(tmp_path / "gone")))


@pytest.mark.parametrize("form", ["tower", "unified"])
def test_tensors_are_read_back_as_they_were_prepared(tmp_path: Path, form: MediaForm) -> None:
    short = SoundPiece(audio=Sound(samples=700))
    path = Path(ask(tmp_path, SOUND, IMAGE, VIDEO, short, form=form).path)
    tower = form == "tower"
    media = load(path, 9 if tower else 1, (lambda frames: -(-frames // 4)) if tower else (lambda n: n))
    assert media.images is not None
    assert media.videos is not None
    assert media.audio is not None
    assert media.images.soft_tokens == (63,)
    assert media.videos.images.soft_tokens == (63,) * 3
    assert media.videos.frames == (3,)
    expected = (soft_token_count(1600), soft_token_count(700)) if tower else (3, 2)
    assert media.audio.soft_tokens == expected
    made = load_file(path)
    assert torch.equal(media.audio.features, made["audio.features"])
    assert torch.equal(media.videos.images.pixels, made["video.pixels"])


def test_a_file_without_its_other_half_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({"image.pixels": torch.zeros(1, 9, 768)}, path)
    with pytest.raises(EngineError, match=r"half\.safetensors: no tensors of media: KeyError"):
        load(path, 9, lambda frames: frames)
    with pytest.raises(EngineError, match=r"gone: no tensors of media: FileNotFoundError"):
        load(tmp_path / "gone", 9, lambda frames: frames)
