"""Runs under the interpreter of a transformers environment: its image and video code on given inputs.

Reads a folder: `request.json`, `input.safetensors` and images; writes `answer.json` and `output.safetensors`
there. torchvision and Pillow are imported only by what processes images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

BACKENDS = {
    "torchvision": ("image_processing_gemma4", "Gemma4ImageProcessor"),
    "pil": ("image_processing_pil_gemma4", "Gemma4ImageProcessorPil"),
    "unified": ("image_processing_gemma4_unified", "Gemma4UnifiedImageProcessor"),
}


def sizes(asked: dict[str, Any], given: Tensors, folder: Path) -> tuple[Any, Tensors]:
    """Target sizes of [height, width, budget]."""
    from transformers.models.gemma4.image_processing_gemma4 import get_aspect_ratio_preserving_size

    return [get_aspect_ratio_preserving_size(h, w, 16, budget * 9, 3) for h, w, budget in asked["sizes"]], {}


def images(asked: dict[str, Any], given: Tensors, folder: Path) -> tuple[Any, Tensors]:
    """Files, each processed at a budget by a backend; loaded as transformers loads images."""
    import importlib

    from transformers.image_utils import load_image

    counts, made = [], {}
    for number, (name, budget, backend) in enumerate(asked["images"]):
        module, cls = BACKENDS[backend]
        package = "gemma4_unified" if backend == "unified" else "gemma4"
        processor = getattr(importlib.import_module(f"transformers.models.{package}.{module}"), cls)()
        image = load_image(str(folder / name))
        batch = processor(images=[image], max_soft_tokens=budget, return_tensors="pt")
        counts.append(int(batch["num_soft_tokens_per_image"][0]))
        made[f"{number}.pixels"] = batch["pixel_values"][0].contiguous()
        made[f"{number}.positions"] = batch["image_position_ids"][0].contiguous()
    return counts, made


def videos(asked: dict[str, Any], given: Tensors, folder: Path) -> tuple[Any, Tensors]:
    """Clips of frames [F, 3, H, W], sampled or not; an error is an answer."""
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
    from transformers.models.gemma4_unified.video_processing_gemma4_unified import Gemma4UnifiedVideoProcessor
    from transformers.video_utils import VideoMetadata

    class Stamps(Gemma4Processor):
        """Has what the text of a video is made of, and no tokenizer."""

        boi_token, video_token, eoi_token = "[", "v", "]"

        def __init__(self) -> None:
            pass

    answers: list[dict[str, Any]] = []
    made: Tensors = {}
    for clip in asked["videos"]:
        name, unified = clip["name"], clip["unified"]
        frames = given[name]
        metadata = VideoMetadata(
            total_num_frames=len(frames), fps=clip["fps"], frames_indices=list(range(len(frames)))
        )
        processor = (Gemma4UnifiedVideoProcessor if unified else Gemma4VideoProcessor)()
        try:
            batch = processor(
                videos=[frames],
                video_metadata=[metadata],
                do_sample_frames=clip["sample"],
                return_metadata=True,
                return_tensors="pt",
            )
        except ValueError as error:
            answers.append({"error": str(error)})
            continue
        made[f"{clip['key']}.pixels"] = batch["pixel_values_videos"].contiguous()
        made[f"{clip['key']}.positions"] = batch["video_position_ids"].contiguous()
        answers.append(
            {
                "frames": int(batch["num_frames_per_video"][0]),
                "soft_tokens": int(batch["num_soft_tokens_per_video"][0]),
                "text": Stamps().replace_video_token(batch, 0),
            }
        )
    return answers, made


def towers(asked: dict[str, Any], given: Tensors, folder: Path) -> tuple[Any, Tensors]:
    """Vision towers and their projectors on patches: each image of a batch, all in one call."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig, Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4MultimodalEmbedder, Gemma4VisionModel

    made = {}
    for run in asked["towers"]:
        config = Gemma4VisionConfig(**run["config"])
        tower = Gemma4VisionModel._from_config(config).eval()
        tower.load_state_dict(part(given, f"{run['weights']}.tower."), strict=True)
        projector = Gemma4MultimodalEmbedder(config, Gemma4TextConfig(hidden_size=run["text_width"]))
        projector.load_state_dict(part(given, f"{run['weights']}.projector."), strict=True)
        with torch.inference_mode():
            features = tower(given[f"{run['batch']}.pixels"], given[f"{run['batch']}.positions"])
            made[f"{run['key']}.features"] = features.last_hidden_state
            made[f"{run['key']}.soft"] = projector(features.last_hidden_state)
    return None, made


def unified(asked: dict[str, Any], given: Tensors, folder: Path) -> tuple[Any, Tensors]:
    """The encoder-free embedder on tiles, its projector included."""
    from transformers.models.gemma4_unified.configuration_gemma4_unified import (
        Gemma4UnifiedTextConfig,
        Gemma4UnifiedVisionConfig,
    )
    from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

    run = asked["unified"]
    text = Gemma4UnifiedTextConfig(hidden_size=run["text_width"])
    embedder = Gemma4UnifiedVisionEmbedder(Gemma4UnifiedVisionConfig(**run["config"]), text).eval()
    weights = part(given, "unified.tower.")
    projector = part(given, "unified.projector.")
    embedder.load_state_dict(
        weights | {f"multimodal_embedder.{name}": tensor for name, tensor in projector.items()}, strict=True
    )
    positions = given["unified.positions"]
    valid = (positions != -1).all(dim=-1)
    with torch.inference_mode():
        out = embedder(given["unified.pixels"], positions)
    return None, {
        "unified.features": out.last_hidden_state[valid],
        "unified.soft": out.pooler_output[valid],
    }


def part(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names start so, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    given = load_file(folder / "input.safetensors")
    answers: dict[str, Any] = {}
    made: Tensors = {}
    for task in (sizes, images, videos, towers, unified):
        if task.__name__ in asked:
            answers[task.__name__], tensors = task(asked, given, folder)
            made |= tensors
    save_file(made, folder / "output.safetensors")
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
