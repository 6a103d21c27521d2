"""One implementation of one vision tower, for `vision.py`: answers JSON lines with times.

Runs under the interpreter of the implementation it measures; nothing but that implementation is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Prepare = Callable[[list[Tensor]], tuple[Tensor, Tensor]]
"""Images uint8 [3, height, width] to pixels and positions."""
Encode = Callable[[Tensor, Tensor], Tensor]
"""Pixels and positions to the soft tokens of all images."""


def reference(config: dict[str, Any], weights: dict[str, Tensor], budget: int) -> tuple[Prepare, Encode]:
    """The bundled implementation."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from model_impl.media_config import MultimodalConfig, VisionConfig
    from model_impl.preprocess.images import prepare_images
    from model_impl.vision import VisionTower

    vision = MultimodalConfig.from_dict(config).vision
    assert isinstance(vision, VisionConfig)
    tower = VisionTower(vision).eval()
    tower.load_state_dict(weights)

    def prepare(images: list[Tensor]) -> tuple[Tensor, Tensor]:
        batch = prepare_images(images, budget, pad_to_budget=False)
        return batch.pixels, batch.positions

    return prepare, tower


def transformers(config: dict[str, Any], weights: dict[str, Tensor], budget: int) -> tuple[Prepare, Encode]:
    """Hugging Face transformers, with its defaults."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    processor = Gemma4ImageProcessor(max_soft_tokens=budget)
    tower = Gemma4VisionModel._from_config(Gemma4VisionConfig(**config["vision_config"])).eval()
    tower.load_state_dict(weights)

    def prepare(images: list[Tensor]) -> tuple[Tensor, Tensor]:
        batch = processor(images=images, return_tensors="pt")
        return batch["pixel_values"], batch["image_position_ids"]

    def encode(pixels: Tensor, positions: Tensor) -> Tensor:
        features: Tensor = tower(pixels, positions).last_hidden_state
        return features

    return prepare, encode


def main() -> None:
    """Load, then answer until the pipe closes."""
    name, place, threads, budget = sys.argv[1:]
    torch.set_num_threads(int(threads))
    folder = Path(place)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "tower.safetensors")
    stored = load_file(folder / "images.safetensors")
    images = [stored[key] for key in sorted(stored)]
    prepare, encode = {"reference": reference, "transformers": transformers}[name](
        config, weights, int(budget)
    )
    for line in sys.stdin:
        question = json.loads(line)
        calls = [[image] for image in images] if question["one_by_one"] else [images]
        prepared, features, times = [], [], []
        with torch.inference_mode():
            times.append(time.perf_counter())
            prepared = [prepare(call) for call in calls]
            times.append(time.perf_counter())
            features = [encode(*batch) for batch in prepared]
            times.append(time.perf_counter())
        save_file({"features": torch.cat(features)}, folder / question["features"])
        answer = {"prepare": times[1] - times[0], "encode": times[2] - times[1], "memory": peak_memory()}
        print(json.dumps(answer), flush=True)


def peak_memory() -> int:
    """Largest resident size of this program so far, in bytes; `ru_maxrss` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    main()
