"""Sounds for engines whose environments have no decoder: WAV files at the models' rate.

16-bit integers or floats are read, as they are. An engine is not asked about other sounds or damaged ones, as
the refusal would be this module's.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from conformance.errors import NotAskedError

_RATE = 16_000
"""Samples a second that the models take; nothing here converts others."""
_PCM, _FLOAT = 1, 3
"""Formats of samples in WAV."""


def read_sound(path: Path) -> Any:
    """Samples of a WAV file, float32 [samples]; channels are averaged.

    Raises:
        NotAskedError: it is none, it is not whole, or it has another rate or other samples.
    """
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise NotAskedError(f"{path.name}: no WAV file, and this environment has no decoder of other sounds")
    chunks = _chunks(data, path.name)
    try:
        kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunks[b"fmt "])
        samples = chunks[b"data"]
    except (KeyError, struct.error) as error:
        raise NotAskedError(f"{path.name}: a WAV file without a whole header or without samples") from error
    if rate != _RATE:
        raise NotAskedError(f"{path.name}: {rate} samples a second; nothing here makes {_RATE} of them")
    if (kind, bits) not in ((_PCM, 16), (_FLOAT, 32)) or len(samples) % (channels * bits // 8):
        raise NotAskedError(
            f"{path.name}: samples of format {kind} in {bits} bits; 16-bit integers and floats are read"
        )
    if kind == _PCM:
        wave = np.frombuffer(samples, dtype="<i2").astype(np.float32) / 32768
    else:
        wave = np.frombuffer(samples, dtype="<f4").astype(np.float32)
    return wave.reshape(-1, channels).mean(axis=1)


def _chunks(data: bytes, name: str) -> dict[bytes, bytes]:
    """The parts of a WAV file by their names; each has its size before it, and an even place."""
    chunks: dict[bytes, bytes] = {}
    place = 12
    while place + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, place + 4)
        chunk = data[place + 8 : place + 8 + size]
        if len(chunk) < size:
            raise NotAskedError(f"{name}: truncated; {len(chunk)} of {size} bytes of a part are there")
        chunks[data[place : place + 4]] = chunk
        place += 8 + size + size % 2
    return chunks
