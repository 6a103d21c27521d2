"""What the processors of the transformers target make of files, in its worker."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import soundfile  # type: ignore[import-untyped]
import torch
from safetensors.torch import load_file
from torch import Tensor

from conformance import media_files
from conformance.errors import EngineError, NotAskedError
from conformance.media import Clip, Damage, ImagePiece, MediaPiece, Picture, Sound, SoundPiece, VideoPiece
from conformance.targets import environments, reference_media, registry
from conformance.targets.protocol import MediaFile, PreprocessRequest, Target

SPEC = "transformers@5.19.0"
PLACEHOLDERS = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}


@pytest.fixture(scope="module")
def processing() -> Iterator[Target]:
    if reason := registry.unavailable(SPEC):
        pytest.skip(reason)
    if lacking := environments.status(SPEC).lacking:
        pytest.skip("; ".join(lacking.values()))
    target = registry.open_target(SPEC)
    yield target
    target.close()


def image(width: int, height: int, damage: Damage = "none") -> ImagePiece:
    return ImagePiece(image=Picture(width=width, height=height, damage=damage))


def video(frames: int) -> VideoPiece:
    return VideoPiece(video=Clip(frames=frames, width=96, height=64))


def sound(samples: int, damage: Damage = "none") -> SoundPiece:
    return SoundPiece(audio=Sound(samples=samples, damage=damage))


def asked(pieces: Sequence[MediaPiece], folder: Path, **changes: Any) -> PreprocessRequest:
    """A prompt with text between the placeholders of the pieces."""
    folder.mkdir(exist_ok=True)
    files = [media_files.write(piece, folder, f"piece-{number}") for number, piece in enumerate(pieces)]
    return of_files(files, folder, **changes)


def of_files(files: Sequence[MediaFile], folder: Path, **changes: Any) -> PreprocessRequest:
    prompt = "<bos><|turn>user\nAt 1:20 " + " and\n".join(PLACEHOLDERS[file.kind] for file in files)
    values = {
        "form": "tower",
        "prompt": prompt + "?<turn|>\n<|turn>model\n",
        "media": tuple(files),
        "output": str(folder / "out.safetensors"),
    }
    return PreprocessRequest.model_validate(values | changes)


def assert_as_bundled(target: Target, request: PreprocessRequest) -> dict[str, Tensor]:
    """The processors make what the bundled preprocessing makes, and it is there at all."""
    result = target.preprocess(request)
    assert result.path == request.output
    theirs = load_file(result.path)
    ours_request = request.model_copy(update={"output": f"{request.output}.ours"})
    expected = reference_media.preprocess(ours_request)
    ours = load_file(expected.path)
    assert result.prompt == expected.prompt
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape), name
        if tensor.is_floating_point():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=2e-6)
        else:
            assert torch.equal(theirs[name], tensor), name
    return theirs


def test_it_says_that_it_processes(processing: Target) -> None:
    info = registry.describe(processing)
    assert "preprocess" in info.capabilities
    assert info.unavailable == {}
    assert {"package:torchvision", "package:pillow"} <= set(info.environment)


@pytest.mark.parametrize("form", ["tower", "unified"])
def test_everything_in_one_prompt(form: str, processing: Target, tmp_path: Path) -> None:
    pieces = (
        image(300, 100),
        sound(20_000),
        VideoPiece(video=Clip(frames=70, width=64, height=80, fps=0.5)),  # beyond two minutes
        ImagePiece(image=Picture(width=3, height=900, mode="LA")),
        sound(161),
        ImagePiece(image=Picture(width=60, height=50, mode="P", format="bmp")),
    )
    made = assert_as_bundled(processing, asked(pieces, tmp_path, form=form))
    assert set(made) == {
        *("image.pixels", "image.positions", "video.pixels", "video.positions", "video.frames"),
        *("audio.features", "audio.mask"),
    }
    assert made["video.frames"].tolist() == [32]


@pytest.mark.parametrize("form", ["tower", "unified"])
def test_videos_that_are_not_sampled(form: str, processing: Target, tmp_path: Path) -> None:
    """Of several lengths, one without a rate."""
    pieces = (video(3), VideoPiece(video=Clip(frames=2, width=640, height=80, fps=0.01)))
    request = asked(pieces, tmp_path, form=form, sample_frames=False, frame_budget=140)
    made = assert_as_bundled(processing, request)
    assert made["video.frames"].tolist() == [3, 2]
    result = processing.preprocess(request)
    assert "00:00 <|image>" in result.prompt
    assert "01:40 <|image>" in result.prompt


@pytest.mark.parametrize("budget", [70, 140, 280, 560, 1120])
def test_budgets(budget: int, processing: Target, tmp_path: Path) -> None:
    made = assert_as_bundled(processing, asked([image(671, 483)], tmp_path, image_budget=budget))
    assert made["image.pixels"].shape[1] == 9 * budget


def test_a_prompt_without_media(processing: Target, tmp_path: Path) -> None:
    assert assert_as_bundled(processing, asked([], tmp_path)) == {}


REFUSED: dict[str, tuple[Sequence[MediaPiece], dict[str, Any], str]] = {
    "a budget that is none": ([image(30, 30)], {"image_budget": 100}, "ValueError: `max_soft_tokens`"),
    "too few frames": ([video(31)], {}, "ValueError: .*num_frames=32.* exceeds total_num_frames=31"),
    "more placeholders": (
        [image(30, 30)],
        {"prompt": "<|image|><|image|>"},
        "ValueError: .*same as the number",
    ),
    "fewer placeholders": (
        [image(30, 30)],
        {"prompt": "hello"},
        "ValueError: .*same as the number of images",
    ),
    "an empty file": ([image(30, 30, "empty")], {}, "UnidentifiedImageError: .*piece-0.png"),
    "half a file": ([image(30, 30, "truncated")], {}, "OSError: image file is truncated"),
    "noise in a file": ([image(30, 30, "corrupt")], {}, "OSError: "),
    "a poem": ([image(30, 30, "other-format")], {}, "UnidentifiedImageError: .*piece-0.png"),
    "a bomb": (
        [ImagePiece(image=Picture(width=30, height=30, claimed=(50_000, 50_000)))],
        {},
        "DecompressionBombError: ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_processor_raises_is_its_answer(name: str, processing: Target, tmp_path: Path) -> None:
    pieces, changes, message = REFUSED[name]
    with pytest.raises(EngineError, match=message):
        processing.preprocess(asked(pieces, tmp_path, **changes))
    assert_as_bundled(processing, asked([image(30, 30)], tmp_path / "next"))


def wav(samples: Tensor, folder: Path, **options: Any) -> MediaFile:
    path = folder / "sound.wav"
    soundfile.write(path, samples.numpy(), options.pop("rate", 16_000), **options)
    return MediaFile(kind="audio", path=str(path))


def test_floats_reach_the_processor_as_they_are(processing: Target, tmp_path: Path) -> None:
    """Also those beyond one, and those that are no numbers: refusing them would be the processor's part."""
    wave = torch.linspace(-3, 3, 2_000)
    file = wav(wave, tmp_path, subtype="FLOAT")
    made = assert_as_bundled(processing, of_files([file], tmp_path, form="unified"))
    assert torch.equal(made["audio.features"].flatten()[:2_000], wave)
    wave[7] = float("nan")
    request = of_files([wav(wave, tmp_path, subtype="FLOAT")], tmp_path, form="unified")
    made = load_file(processing.preprocess(request).path)
    assert made["audio.features"].isnan().nonzero().tolist() == [[0, 0, 7]]


def test_channels_are_averaged_and_other_parts_passed_over(processing: Target, tmp_path: Path) -> None:
    left = torch.linspace(-0.9, 0.9, 1_000)
    file = wav(torch.stack([left, left.flip(0) / 3], dim=1), tmp_path, subtype="PCM_16")
    path = Path(file.path)
    data = path.read_bytes()
    # A part of odd length before the samples, and the byte that makes its end even.
    with_note = data[:12] + b"note" + struct.pack("<I", 3) + b"abc\0" + data[12:]
    path.write_bytes(with_note[:4] + struct.pack("<I", len(with_note) - 8) + with_note[8:])
    assert_as_bundled(processing, of_files([file], tmp_path, form="unified"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subtype": "PCM_24"}, "sound.wav: samples of format 1 in 24 bits"),
        ({"rate": 8_000}, "sound.wav: 8000 samples a second"),
        ({"format": "FLAC"}, "sound.wav: no WAV file, and this environment has no decoder"),
    ],
)
def test_sounds_that_cannot_be_decoded_here(
    change: dict[str, Any], message: str, processing: Target, tmp_path: Path
) -> None:
    file = wav(torch.zeros(900), tmp_path, **change)
    with pytest.raises(NotAskedError, match=f"^{message}"):
        processing.preprocess(of_files([file], tmp_path))


@pytest.mark.parametrize("damage", ["empty", "truncated", "other-format"])
def test_damaged_sounds(damage: Damage, processing: Target, tmp_path: Path) -> None:
    with pytest.raises(NotAskedError, match=r"^piece-0\.wav: "):
        processing.preprocess(asked([sound(900, damage)], tmp_path))
