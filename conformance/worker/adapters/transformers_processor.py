"""Images, videos and sounds as transformers' own processors prepare them, and the prompt that they write out.

One `Gemma4Processor` or `Gemma4UnifiedProcessor` is called as a user calls it, with the published settings,
which are its classes' defaults, and the harness's tokenizer.

* Images are read by transformers' `load_image`, with Pillow's decoders. The processor would read a path with
  torchvision's, which are native code that does not load here: its torchvision is built for CUDA.
* The processors of images are those on torchvision, as wherever it is installed.
* Frames of videos are given as tensors, with their metadata.
* transformers reads sounds with librosa or torchcodec, which the environment has not. They are decoded here,
  and only from WAV at the models' rate: 16 bits, or floats as they are. transformers is not asked about other
  sounds or damaged ones, as the refusal would be this module's.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer  # type: ignore[import-not-found]
from transformers.image_utils import load_image  # type: ignore[import-not-found]
from transformers.models.gemma4.feature_extraction_gemma4 import (  # type: ignore[import-not-found]
    Gemma4AudioFeatureExtractor,
)
from transformers.models.gemma4.image_processing_gemma4 import (  # type: ignore[import-not-found]
    Gemma4ImageProcessor,
)
from transformers.models.gemma4.processing_gemma4 import (  # type: ignore[import-not-found]
    Gemma4Processor,
)
from transformers.models.gemma4.video_processing_gemma4 import (  # type: ignore[import-not-found]
    Gemma4VideoProcessor,
)
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (  # type: ignore[import-not-found]
    Gemma4UnifiedAudioFeatureExtractor,
)
from transformers.models.gemma4_unified.image_processing_gemma4_unified import (  # type: ignore[import-not-found]
    Gemma4UnifiedImageProcessor,
)
from transformers.models.gemma4_unified.processing_gemma4_unified import (  # type: ignore[import-not-found]
    Gemma4UnifiedProcessor,
)
from transformers.models.gemma4_unified.video_processing_gemma4_unified import (  # type: ignore[import-not-found]
    Gemma4UnifiedVideoProcessor,
)
from transformers.video_utils import VideoMetadata  # type: ignore[import-not-found]

from conformance.errors import NotAskedError
from conformance.worker.adapter import Json

_RATE = 16_000
"""Samples a second that the models take; nothing here converts others."""
_TENSORS = {
    "pixel_values": ("image.pixels", torch.float32),
    "image_position_ids": ("image.positions", torch.int64),
    "pixel_values_videos": ("video.pixels", torch.float32),
    "video_position_ids": ("video.positions", torch.int64),
    "num_frames_per_video": ("video.frames", torch.int64),
    "input_features": ("audio.features", torch.float32),
    "input_features_mask": ("audio.mask", torch.bool),
}
"""Names of a processor's outputs to those of a `PreprocessResult`."""
_PCM, _FLOAT = 1, 3
"""Formats of samples in WAV."""


def preprocess(request: Json) -> Json:
    """Answer a `PreprocessRequest`. Whatever the processor raises is its answer.

    Raises:
        NotAskedError: a sound cannot be decoded here.
    """
    processor = _processor(request["form"])
    files = {
        kind: [file for file in request["media"] if file["kind"] == kind]
        for kind in ("image", "video", "audio")
    }
    arguments: Json = {}
    if files["image"]:
        arguments["images"] = [[load_image(file["path"]) for file in files["image"]]]
    if files["video"]:
        clips = [load_file(file["path"])["frames"] for file in files["video"]]
        arguments["videos"] = clips
        arguments["videos_kwargs"] = {
            "video_metadata": [
                _metadata(clip, file) for clip, file in zip(clips, files["video"], strict=True)
            ],
            "do_sample_frames": request["sample_frames"],
            "max_soft_tokens": request["frame_budget"],
        }
    if files["audio"]:
        arguments["audio"] = [read_sound(Path(file["path"])) for file in files["audio"]]
    made = processor(
        text=[request["prompt"]],
        images_kwargs={"max_soft_tokens": request["image_budget"]},
        return_tensors="pt",
        **arguments,
    )
    tensors = {
        ours: made[theirs].to(dtype).contiguous()
        for theirs, (ours, dtype) in _TENSORS.items()
        if theirs in made
    }
    save_file(tensors, Path(request["output"]))
    return {"path": request["output"], "prompt": processor.expanded}


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


def _metadata(frames: Tensor, file: Json) -> Any:
    count = len(frames)
    return VideoMetadata(total_num_frames=count, fps=file["fps"], frames_indices=list(range(count)))


class _Expanding:
    """Keeps the prompt that a processor has written out, before it is cut into tokens."""

    expanded = ""

    def get_text_with_replacements(self, text: Sequence[str], *replacements: Any) -> Any:
        """As the processor does it."""
        made = super().get_text_with_replacements(text, *replacements)  # type: ignore[misc]  # of the processor
        self.expanded = made[0][0]
        return made


class _TowerProcessor(_Expanding, Gemma4Processor):  # type: ignore[misc]  # transformers is not here when types are checked
    pass


class _UnifiedProcessor(_Expanding, Gemma4UnifiedProcessor):  # type: ignore[misc]
    pass


@functools.cache
def _processor(form: str) -> Any:
    # A tokenizer of its own, because the processor adds a token to it.
    tokenizer = AutoTokenizer.from_pretrained(os.environ["CONFORMANCE_TOKENIZER"])
    if form == "unified":
        return _UnifiedProcessor(
            feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
            image_processor=Gemma4UnifiedImageProcessor(),
            video_processor=Gemma4UnifiedVideoProcessor(),
            tokenizer=tokenizer,
        )
    return _TowerProcessor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(),
        video_processor=Gemma4VideoProcessor(),
        tokenizer=tokenizer,
    )
