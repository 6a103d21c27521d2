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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer  # type: ignore[import-not-found]
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

from conformance.worker.adapter import Json
from conformance.worker.adapters.wave import read_sound

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


def checkpoint_processor(checkpoint: Path) -> Any:
    """A checkpoint's own processor. Loading it takes longer than preparing a picture."""
    return AutoProcessor.from_pretrained(checkpoint)


def prepare(processor: Any, images: Sequence[str], sounds: Sequence[str]) -> dict[str, Tensor]:
    """Files as a processor prepares them, named as in a `PreprocessResult`.

    Raises:
        NotAskedError: a sound cannot be decoded here.
    """
    made: Json = {}
    if images:
        made |= processor.image_processor([[load_image(path) for path in images]], return_tensors="pt")
    if sounds:
        waves = [read_sound(Path(path)) for path in sounds]
        made |= processor.feature_extractor(waves, return_tensors="pt")
    return {
        ours: made[theirs].to(dtype).contiguous()
        for theirs, (ours, dtype) in _TENSORS.items()
        if theirs in made
    }


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
