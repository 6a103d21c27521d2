"""Sounds to features, as transformers' processors make them (fact sheet, sections 3.7 and 4.1)."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.nn import functional as F

from model_impl.errors import MediaError

SAMPLING_RATE = 16_000
"""Samples of a second that the models were trained on."""
MAX_SAMPLES = 480_000
"""Of a clip for the audio tower, 30 seconds; what is beyond is dropped."""
MAX_SOFT_TOKENS = 750
"""That such a clip can become."""
MEL_BINS = 128

SAMPLE_LIMIT = 1 << 26
"""Most samples of a file, of all channels, unless asked for otherwise: over an hour at 16 kHz, 256 MB."""
BYTE_LIMIT = 1 << 29
"""Most bytes of a file: what a file of so many samples takes when each is a float64."""
FORMATS = ("WAV", "WAVEX", "FLAC")
"""What is decoded: formats that tell when their end is missing."""

_HOP = 160
_FRAME = 320
_FFT = 512
_PAD_MULTIPLE = 128
_MEL_FLOOR = 1e-3
_UNKNOWN_RIFF_SIZES = (0, 0xFFFF_FFFF)
"""What is written where a file's length is not known when it begins."""


@dataclass(frozen=True)
class AudioBatch:
    """Clips as features, padded behind with zeros to one length."""

    features: Tensor
    """float32 [N, T, 128] for the tower, [N, tokens, samples of a token] for the unified model."""
    mask: Tensor
    """bool [N, T]; false at padding."""
    soft_tokens: tuple[int, ...]
    """Of each clip. For the tower, one of at most 160 samples has none: there is no whole frame in it."""
    dropped: tuple[int, ...]
    """Samples of each clip beyond what the model takes."""


def load_audio(
    source: bytes | Path, name: str, *, resample: bool = False, sample_limit: int = SAMPLE_LIMIT
) -> Tensor:
    """Decode a sound file; channels are averaged.

    Args:
        source: An encoded sound in one of `FORMATS`, or its file.
        name: What an error calls it.
        resample: Convert other sampling rates, by libsoxr; without it they are an error.
        sample_limit: Most samples, at its own rate and at the model's; checked before anything is decoded.

    Returns:
        float32 [samples] at `SAMPLING_RATE`, in [-1, 1] unless the file holds other floats.

    Raises:
        MediaError: it is empty, in no such format, longer than the limit, corrupt or truncated, at another
            rate, without samples, holds NaN or infinity, or cannot be read.
    """
    data = source if isinstance(source, bytes) else _read(source, name)
    _check_bytes(data, name)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, name, resample, sample_limit)
            rate, expected = file.samplerate, file.frames
            samples = torch.from_numpy(file.read(expected, dtype="float32", always_2d=True))
    except soundfile.LibsndfileError as error:
        raise MediaError(
            f"{name}: no sound that can be read, or corrupt ({error.error_string}); formats: "
            f"{', '.join(FORMATS)}"
        ) from error
    if len(samples) != expected:
        raise MediaError(f"{name}: truncated, {len(samples)} of {expected} samples are there; encode it anew")
    mono = samples.mean(dim=1)
    _check_clip(mono, name)
    return mono if rate == SAMPLING_RATE else torch.from_numpy(soxr.resample(mono, rate, SAMPLING_RATE))


def prepare_audio(
    clips: Sequence[Tensor], *, names: Sequence[str] | None = None, sampling_rate: int = SAMPLING_RATE
) -> AudioBatch:
    """Mel features for the audio tower: 100 frames a second, padded to the longest clip.

    Args:
        clips: Floats [samples] each, of any lengths; of more than `MAX_SAMPLES` the beginning is taken.
        names: What errors call them; "audio 1" and so on if left out.
        sampling_rate: Of all clips.

    Raises:
        MediaError: there are no clips, the rate is not `SAMPLING_RATE`, or one of them is not of that form,
            has no samples, or has NaN or infinity among them.
    """
    waves = _checked(clips, names, sampling_rate)
    kept = [wave[:MAX_SAMPLES] for wave in waves]
    longest = max(len(wave) for wave in kept)
    padded = torch.zeros(len(kept), longest + -longest % _PAD_MULTIPLE)
    for row, wave in zip(padded, kept, strict=True):
        row[: len(wave)] = wave
    features = log_mel(padded)
    counts = torch.tensor([frame_count(len(wave)) for wave in kept])
    mask = torch.arange(features.shape[1]) < counts[:, None]
    return AudioBatch(
        features=features * mask[..., None],
        mask=mask,
        soft_tokens=tuple(soft_token_count(len(wave)) for wave in kept),
        dropped=tuple(len(wave) - len(part) for wave, part in zip(waves, kept, strict=True)),
    )


def prepare_waves(
    clips: Sequence[Tensor],
    samples: int,
    *,
    names: Sequence[str] | None = None,
    sampling_rate: int = SAMPLING_RATE,
) -> AudioBatch:
    """Stretches of the waveform for the unified model, a soft token each; zeros fill up the last.

    Args:
        clips: Floats [samples] each, of any lengths; nothing is dropped.
        samples: Of a soft token; 640 in the published model.
        names: What errors call them; "audio 1" and so on if left out.
        sampling_rate: Of all clips.

    Raises:
        MediaError: as `prepare_audio`.
    """
    waves = _checked(clips, names, sampling_rate)
    counts = [-(-len(wave) // samples) for wave in waves]
    features = torch.zeros(len(waves), max(counts), samples)
    for row, wave in zip(features, waves, strict=True):
        row.view(-1)[: len(wave)] = wave
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return AudioBatch(features, mask, tuple(counts), (0,) * len(waves))


def frame_count(samples: int) -> int:
    """Valid mel frames of a clip: those whose 320 samples and the one behind them are in it.

    Half a frame of zeros stands before the clip, so that the first frame is valid from 161 samples on.
    """
    return max(0, (min(samples, MAX_SAMPLES) + _FRAME // 2 - (_FRAME + 1)) // _HOP + 1)


def soft_token_count(samples: int) -> int:
    """Soft tokens that the tower makes of a clip: a fourth of its frames, as two convolutions halve them."""
    return -(-frame_count(samples) // 4)


def log_mel(waves: Tensor) -> Tensor:
    """Logarithms of mel magnitudes: float32 [N, samples] to [N, frames, 128].

    The transform is in float64, as transformers': beside a loud tone, the faint bins of a float32 transform
    are off by several thousandths.
    """
    if frame_count(waves.shape[-1]) == 0:
        return waves.new_zeros(waves.shape[0], 0, MEL_BINS)
    frames = F.pad(waves, (_FRAME // 2, 0)).unfold(-1, _FRAME + 1, _HOP)[..., :-1]
    magnitudes = torch.fft.rfft((frames * _window()).double(), n=_FFT).abs()
    return torch.log(magnitudes @ _mel_filters() + _MEL_FLOOR).float()


@functools.cache
def _window() -> Tensor:
    """Hann's, periodic: the value that would follow the last is the first."""
    return torch.hann_window(_FRAME, periodic=True, dtype=torch.float64).float()


@functools.cache
def _mel_filters() -> Tensor:
    """[257, 128]: triangles, each from its left neighbour's peak to its right one's, equally spaced in mel.

    `mel = 2595 · log10(1 + hertz / 700)`. The topmost lies between two frequencies of the transform, and is
    empty.
    """
    nyquist = SAMPLING_RATE / 2
    mels = torch.linspace(0, 2595 * math.log10(1 + nyquist / 700), MEL_BINS + 2, dtype=torch.float64)
    left, peak, right = (700 * (10 ** (mels / 2595) - 1)).unfold(0, 3, 1).unbind(-1)
    hertz = torch.linspace(0, nyquist, _FFT // 2 + 1, dtype=torch.float64)[:, None]
    rising, falling = (hertz - left) / (peak - left), (right - hertz) / (right - peak)
    return torch.minimum(rising, falling).clamp(min=0)


def _checked(clips: Sequence[Tensor], names: Sequence[str] | None, sampling_rate: int) -> list[Tensor]:
    if not clips:
        raise MediaError("there are no audio clips to prepare")
    called = [f"audio {number}" for number in range(1, len(clips) + 1)] if names is None else names
    if len(called) != len(clips):
        raise MediaError(f"{len(clips)} audio clips have {len(called)} names; give each its own")
    if sampling_rate != SAMPLING_RATE:
        raise MediaError(
            f"{', '.join(called)}: {sampling_rate} samples a second, and the models take {SAMPLING_RATE}; "
            "resample first"
        )
    for clip, name in zip(clips, called, strict=True):
        _check_clip(clip, name)
    return [clip.to("cpu", torch.float32) for clip in clips]


def _check_clip(clip: Tensor, name: str) -> None:
    if not clip.is_floating_point() or clip.ndim != 1:
        raise MediaError(
            f"{name}: {clip.dtype} of shape {list(clip.shape)}, and must be floats of shape [samples]; "
            "average channels, and scale integers to [-1, 1]"
        )
    if len(clip) == 0:
        raise MediaError(f"{name}: has no samples; leave it out")
    if not (finite := clip.float().isfinite()).all():
        where = int((~finite).nonzero()[0])
        raise MediaError(
            f"{name}: {int((~finite).sum())} of {len(clip)} samples are not finite, the first, "
            f"{clip[where].item()}, at {where}; mend the recording"
        )


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(BYTE_LIMIT + 1)
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error


def _check_bytes(data: bytes, name: str) -> None:
    if not data:
        raise MediaError(f"{name}: is empty, zero bytes long")
    if len(data) > BYTE_LIMIT:
        raise MediaError(f"{name}: more than the limit of {BYTE_LIMIT} bytes; cut it")
    # The decoder takes what there is of a WAV file and does not say that more was promised.
    promised = int.from_bytes(data[4:8], "little")
    if data[:4] == b"RIFF" and promised not in _UNKNOWN_RIFF_SIZES and promised + 8 > len(data):
        raise MediaError(
            f"{name}: truncated, {len(data)} of {promised + 8} bytes are there; encode or copy it anew"
        )


def _check_header(file: soundfile.SoundFile, name: str, resample: bool, sample_limit: int) -> None:
    if file.format not in FORMATS:
        raise MediaError(f"{name}: a sound in {file.format_info}; convert it to one of {', '.join(FORMATS)}")
    decoded = file.frames * max(file.channels, SAMPLING_RATE / file.samplerate)
    if decoded > sample_limit:
        raise MediaError(
            f"{name}: {file.frames} samples of {file.channels} channels at {file.samplerate} Hz are more "
            f"than the limit of {sample_limit}; cut it, or raise `sample_limit`"
        )
    if file.samplerate != SAMPLING_RATE and not resample:
        raise MediaError(
            f"{name}: {file.samplerate} samples a second, and the models take {SAMPLING_RATE}; resample it, "
            "or ask for that with `resample`"
        )
