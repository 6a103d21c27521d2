"""Sounds to features, beside transformers: counts exactly, numbers within a tolerance, bad input by name."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_impl.errors import MediaError
from model_impl.preprocess import audio
from model_impl.preprocess.audio import (
    MAX_SAMPLES,
    MAX_SOFT_TOKENS,
    frame_count,
    load_audio,
    log_mel,
    prepare_audio,
    prepare_waves,
    soft_token_count,
)
from tests.media_oracle import ask, noise, tone

pytestmark = pytest.mark.xdist_group("preprocess-audio")  # its fixtures take long: one process makes them

torch.set_num_threads(1)

TOLERANCE = 1e-5
"""Of mel features, which are between -7 and some 5; seen: 1e-6."""

LENGTHS = (0, 1, 159, 160, 161, 320, 321, 480, 481, 640, 641, 16_000, 479_999, 480_000, 480_001)
CLIPS = {
    "noise": noise(16_007),
    "tone": tone(9_000, 1000.0),
    "square": tone(5_000, 97.0).sign(),
    "faint": noise(4_000, level=1e-5),
    "silence": torch.zeros(8_000),
    "one": torch.ones(1),
    "frameless": noise(160),
    "frame": noise(161),
    "two": noise(321),
    "half minute": noise(MAX_SAMPLES),
    "too long": noise(MAX_SAMPLES + 1),
}
BATCHES = {
    **{name: [name] for name in CLIPS},
    "mixed": ["two", "noise", "frameless", "silence", "tone", "one", "square", "faint"],
    "all too short": ["one", "frameless"],
    "long and short": ["too long", "noise"],
}


def clips_of(batch: str) -> list[Tensor]:
    return [CLIPS[name] for name in BATCHES[batch]]


Answer = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    request = {
        "counts": LENGTHS,
        "features": BATCHES,
        "waves": {f"waves of {name}": clips for name, clips in BATCHES.items()},
    }
    return ask(tmp_path_factory, "audio", "sounds", request, tensors=CLIPS)


# ------------------------------------------------------------------------------------------- counts


def test_counts_are_transformers(oracle: Answer) -> None:
    found = oracle[0]["counts"]
    assert [soft_token_count(samples) for samples in LENGTHS] == [placed for _, placed in found]
    # transformers' own formula, which vLLM reads too, knows of no truncation: its cap stands in for that.
    assert [soft_token_count(samples) for samples in LENGTHS] == [computed for computed, _ in found]


def test_counts_at_edges() -> None:
    assert [frame_count(samples) for samples in (0, 160, 161, 320, 321, 480, 481)] == [0, 0, 1, 1, 2, 2, 3]
    assert [soft_token_count(samples) for samples in (161, 641, 801, 1441)] == [1, 1, 2, 3]
    assert {soft_token_count(samples) for samples in (479_999, 480_000, 480_001, 10**9)} == {MAX_SOFT_TOKENS}


@settings(max_examples=60)
@given(st.integers(1, 6_000))
def test_counts_are_the_sums_of_masks(samples: int) -> None:
    batch = prepare_audio([torch.zeros(samples), torch.zeros(1_000)])
    assert int(batch.mask[0].sum()) == frame_count(samples)
    halved_twice = batch.mask[0, ::2][::2]
    assert batch.soft_tokens[0] == int(halved_twice.sum()) == soft_token_count(samples)


# ----------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", BATCHES)
def test_features_are_transformers(oracle: Answer, name: str) -> None:
    made = oracle[1]
    batch = prepare_audio(clips_of(name))
    assert torch.equal(batch.mask, made[f"{name}.mask"])
    torch.testing.assert_close(batch.features, made[f"{name}.features"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mixed", "long and short"])
def test_features_do_not_depend_on_the_batch(name: str) -> None:
    together = prepare_audio(clips_of(name))
    for number, clip in enumerate(clips_of(name)):
        alone = prepare_audio([clip])
        assert alone.soft_tokens == together.soft_tokens[number : number + 1]
        assert torch.equal(together.features[number][together.mask[number]], alone.features[0][alone.mask[0]])
        assert not together.features[number][~together.mask[number]].any()


def test_silence_is_the_logarithm_of_the_floor() -> None:
    batch = prepare_audio([CLIPS["silence"]])
    valid = batch.features[0][batch.mask[0]]
    torch.testing.assert_close(valid, torch.full_like(valid, math.log(1e-3)), rtol=1e-6, atol=0)


def test_a_tone_is_in_its_bin() -> None:
    mel = log_mel(tone(8_000, 1000.0)[None])[0, 10:-10]
    top = 2595 * math.log10(1 + 8000 / 700)
    peak = 2595 * math.log10(1 + 1000 / 700) / top * 129 - 1  # of the triangles that lie between 0 and 8 kHz
    assert {int(row.argmax()) for row in mel} <= {math.floor(peak), math.ceil(peak)}


def test_the_first_frame_is_half_silence() -> None:
    """Frame 0 has sample 0 in its middle; frame 1 begins with it, where the window is zero."""
    clip = torch.zeros(1_000)
    clip[0] = 1.0
    loud = (log_mel(clip[None])[0] > math.log(1e-3) + 0.5).any(dim=-1)
    assert loud.nonzero().flatten().tolist() == [0]
    clip[0], clip[250] = 0.0, 1.0
    loud = (log_mel(clip[None])[0] > math.log(1e-3) + 0.5).any(dim=-1)
    assert loud.nonzero().flatten().tolist() == [1, 2]


def test_what_is_beyond_the_cap_is_counted() -> None:
    batch = prepare_audio([torch.ones(MAX_SAMPLES + 7), torch.ones(500), torch.ones(MAX_SAMPLES)])
    assert batch.dropped == (7, 0, 0)
    assert batch.soft_tokens == (MAX_SOFT_TOKENS, 1, MAX_SOFT_TOKENS)
    assert batch.features.shape == (3, 2_999, 128)


def test_other_floats_are_taken() -> None:
    expected = prepare_audio([CLIPS["two"]]).features
    assert torch.equal(prepare_audio([CLIPS["two"].double()]).features, expected)
    assert prepare_audio([CLIPS["two"].half()]).features.dtype == torch.float32


# ---------------------------------------------------------------------------------- the unified model


@pytest.mark.parametrize("name", BATCHES)
def test_waves_are_transformers(oracle: Answer, name: str) -> None:
    made = oracle[1]
    batch = prepare_waves(clips_of(name), 640)
    assert torch.equal(batch.mask, made[f"waves of {name}.mask"])
    assert torch.equal(batch.features, made[f"waves of {name}.features"])
    assert batch.soft_tokens == tuple(made[f"waves of {name}.mask"].sum(dim=1).tolist())
    assert not any(batch.dropped)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 20))
def test_waves_hold_every_sample_once(lengths: list[int], samples: int) -> None:
    clips = [torch.rand(length) + 0.5 for length in lengths]
    batch = prepare_waves(clips, samples)
    for clip, features, mask, count in zip(clips, batch.features, batch.mask, batch.soft_tokens, strict=True):
        assert count == math.ceil(len(clip) / samples) == int(mask.sum())
        assert torch.equal(features.flatten()[: len(clip)], clip)
        assert not features.flatten()[len(clip) :].any()


# ------------------------------------------------------------------------------------------ bad clips


def with_sample(value: float) -> Tensor:
    clip = torch.zeros(500)
    clip[123] = value
    return clip


BAD_CLIPS = {
    "zero length": (torch.zeros(0), "has no samples"),
    "nan": (with_sample(math.nan), "1 of 500 samples are not finite, the first, nan, at 123"),
    "infinite": (with_sample(-math.inf), "the first, -inf, at 123"),
    "infinite in float32": (with_sample(1.0).double() * 1e300, "the first, 1e.300, at 123"),
    "stereo": (torch.zeros(2, 500), r"float32 of shape \[2, 500\]"),
    "integers": (torch.zeros(500, dtype=torch.int16), r"int16 of shape \[500\]"),
}


@pytest.mark.parametrize("kind", BAD_CLIPS)
@pytest.mark.parametrize("named", [True, False])
def test_bad_clips_are_named(kind: str, named: bool) -> None:
    clip, why = BAD_CLIPS[kind]
    clips, names = [CLIPS["two"], clip], ["a.wav", "b.wav"] if named else None
    for prepare in (prepare_audio, lambda clips, names: prepare_waves(clips, 640, names=names)):
        with pytest.raises(MediaError, match=f"^{'b.wav' if named else 'audio 2'}: .*{why}"):
            prepare(clips, names=names)  # type: ignore[operator]
        assert prepare(clips[:1], names=None).soft_tokens == (1,)  # type: ignore[operator]


def test_bad_requests() -> None:
    with pytest.raises(MediaError, match="no audio clips"):
        prepare_audio([])
    with pytest.raises(MediaError, match="no audio clips"):
        prepare_waves([], 640)
    with pytest.raises(MediaError, match="2 audio clips have 1 names"):
        prepare_audio([CLIPS["one"]] * 2, names=["a"])
    with pytest.raises(MediaError, match=r"^a, b: 44100 samples a second, and the models take 16000"):
        prepare_audio([CLIPS["one"]] * 2, names=["a", "b"], sampling_rate=44_100)
    with pytest.raises(MediaError, match=r"^audio 1: 8000 samples a second"):
        prepare_waves([CLIPS["one"]], 640, sampling_rate=8_000)


# ---------------------------------------------------------------------------------------------- files

ENCODINGS = [("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("FLAC", "PCM_16")]
ROUNDING = {"PCM_16": 2**-15, "PCM_U8": 2**-7, "FLOAT": 0.0, "PCM_24": 2**-23}


def encoded(
    wave: Tensor | Sequence[float], form: str = "WAV", subtype: str = "PCM_16", rate: int = 16_000
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(wave), rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("form", "subtype"), ENCODINGS)
def test_files_are_decoded(tmp_path: Path, form: str, subtype: str) -> None:
    wave = tone(1_601, 440.0, level=0.7)
    data = encoded(wave, form, subtype)
    (tmp_path / "sound").write_bytes(data)
    decoded = load_audio(data, "a")
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, wave, rtol=0, atol=ROUNDING[subtype])
    assert torch.equal(load_audio(tmp_path / "sound", "a"), decoded)


def test_channels_are_averaged() -> None:
    left, right = tone(1_000, 300.0), noise(1_000)
    decoded = load_audio(encoded(torch.stack([left, right], dim=1), subtype="FLOAT"), "a")
    torch.testing.assert_close(decoded, (left + right) / 2)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_converted_only_when_asked(rate: int) -> None:
    seconds = torch.arange(rate, dtype=torch.float64) / rate
    data = encoded(0.5 * torch.sin(2 * torch.pi * 440 * seconds), subtype="FLOAT", rate=rate)
    with pytest.raises(MediaError, match=f"^a: {rate} samples a second, and the models take 16000"):
        load_audio(data, "a")
    decoded = load_audio(data, "a", resample=True)
    assert len(decoded) == 16_000
    inner = slice(500, -500)  # at its ends a resampler sees an abrupt start and stop
    torch.testing.assert_close(decoded[inner], tone(16_000, 440.0, level=0.5)[inner], rtol=0, atol=5e-4)


@pytest.mark.parametrize(("form", "subtype"), ENCODINGS)
def test_every_truncation_is_noticed(form: str, subtype: str) -> None:
    data = encoded(noise(300), form, subtype)
    for end in range(len(data)):
        with pytest.raises(MediaError, match=r"^a\.wav: .*(truncated|is empty|no sound that can be read)"):
            load_audio(data[:end], "a.wav")
    assert len(load_audio(data, "a.wav")) == 300


@pytest.mark.parametrize("unknown", [0, 0xFFFF_FFFF])
def test_files_of_unknown_length_are_read(unknown: int) -> None:
    data = bytearray(encoded(noise(300)))
    data[4:8] = unknown.to_bytes(4, "little")
    assert len(load_audio(bytes(data), "a")) == 300


@pytest.mark.parametrize(("form", "subtype"), ENCODINGS)
def test_damage_gives_a_clip_or_a_media_error(form: str, subtype: str) -> None:
    data, dice = encoded(noise(300), form, subtype), random.Random(5)
    errors = []
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(120)] = dice.choice([0, 1, 255, dice.randrange(256)])
        try:
            clip = load_audio(bytes(damaged), "a", resample=True, sample_limit=1 << 16)
        except MediaError as error:
            errors.append(str(error))
        else:
            assert clip.ndim == 1
            assert clip.isfinite().all()
    assert len(errors) > 40
    assert all(error.startswith("a: ") for error in errors)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "not a sound": (b"<html>not found</html>" * 9, "no sound that can be read"),
    "another format": (encoded(noise(2_000), "OGG", "VORBIS"), "a sound in OGG"),
    "no samples": (encoded([]), "has no samples"),
    "nan": (encoded(with_sample(math.nan), subtype="FLOAT"), "not finite, the first, nan, at 123"),
    "infinite": (encoded(with_sample(math.inf), subtype="FLOAT"), "the first, inf, at 123"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(kind: str) -> None:
    data, why = BAD_FILES[kind]
    with pytest.raises(MediaError, match=f"^b: .*{why}"):
        load_audio(data, "b")
    assert len(load_audio(encoded(noise(9)), "c")) == 9


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^b: cannot be read \(FileNotFoundError"):
        load_audio(tmp_path / "none.wav", "b")


def test_limits_hold_before_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stereo = encoded(torch.zeros(600, 2))
    assert len(load_audio(stereo, "a", sample_limit=1_200)) == 600
    slow = encoded(torch.zeros(600), rate=8_000)
    assert len(load_audio(slow, "a", sample_limit=1_200, resample=True)) == 1_200

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded in spite of the limit")

    monkeypatch.setattr(soundfile.SoundFile, "read", decoded)
    with pytest.raises(MediaError, match=r"^a: 600 samples of 2 channels .* limit of 1199"):
        load_audio(stereo, "a", sample_limit=1_199)
    with pytest.raises(MediaError, match=r"^a: 600 samples of 1 channels .* limit of 1199"):
        load_audio(slow, "a", sample_limit=1_199, resample=True)
    monkeypatch.setattr(audio, "BYTE_LIMIT", 500)
    (tmp_path / "long.wav").write_bytes(stereo)
    for source in (stereo, tmp_path / "long.wav"):
        with pytest.raises(MediaError, match=r"^a: more than the limit of 500 bytes"):
            load_audio(source, "a")
