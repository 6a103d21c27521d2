"""Runs under the interpreter of a transformers environment: its audio code on given inputs.

Reads a folder: `request.json` and `input.safetensors`; writes `answer.json` and `output.safetensors` there.
"""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig, Gemma4TextConfig
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedTextConfig,
)
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedMultimodalEmbedder

Tensors = dict[str, Tensor]


def counts(asked: list[int], given: Tensors) -> tuple[Any, Tensors]:
    """Samples of silence to soft tokens: as computed from the length, and as placed in the prompt."""
    # The processor's module names this type even where there is no Pillow and images are left out.
    builtins.__dict__.setdefault("Gemma4ImageProcessorKwargs", dict)
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    extractor = Gemma4AudioFeatureExtractor()
    processor = SimpleNamespace(
        feature_extractor=extractor, audio_seq_length=750, boa_token="", audio_token="a", eoa_token=""
    )
    found = []
    for samples in asked:
        wave = np.zeros(samples, dtype=np.float32)
        placed = Gemma4Processor.replace_audio_token(processor, extractor([wave]), 0)
        found.append([Gemma4Processor._compute_audio_num_tokens(processor, wave, 16_000), len(placed)])
    return found, {}


def features(asked: dict[str, list[str]], given: Tensors) -> tuple[Any, Tensors]:
    """Batches of clips to mel features."""
    made = {}
    for key, clips in asked.items():
        batch = Gemma4AudioFeatureExtractor()([given[clip].numpy() for clip in clips])
        made[f"{key}.features"] = torch.from_numpy(np.stack(batch["input_features"]))
        made[f"{key}.mask"] = torch.from_numpy(np.stack(batch["input_features_mask"]))
    return None, made


def waves(asked: dict[str, list[str]], given: Tensors) -> tuple[Any, Tensors]:
    """Batches of clips to stretches for the unified model."""
    made = {}
    for key, clips in asked.items():
        extractor = Gemma4UnifiedAudioFeatureExtractor()
        batch = extractor([given[clip].numpy() for clip in clips], return_tensors="pt")
        made[f"{key}.features"], made[f"{key}.mask"] = batch["input_features"], batch["input_features_mask"]
    return None, made


def towers(asked: list[dict[str, Any]], given: Tensors) -> tuple[Any, Tensors]:
    """Audio towers and their projectors on features: what is valid of each clip, one after the other."""
    window = modeling_gemma4.sliding_window_mask_function
    made = {}
    for run in asked:
        wider = run["wider_by"]
        modeling_gemma4.sliding_window_mask_function = lambda sizes, wider=wider: window(
            (sizes[0] + wider, sizes[1])
        )
        config = Gemma4AudioConfig(**run["config"])
        dtype = getattr(torch, run["dtype"])
        tower = modeling_gemma4.Gemma4AudioModel._from_config(config, attn_implementation=run["attention"])
        tower.load_state_dict(part(given, f"{run['weights']}.tower."), strict=True)
        projector = modeling_gemma4.Gemma4MultimodalEmbedder(
            config, Gemma4TextConfig(hidden_size=run["text_width"])
        )
        projector.load_state_dict(part(given, f"{run['weights']}.projector."), strict=True)
        tower, projector = tower.eval().to(dtype), projector.to(dtype)
        mask = given[f"{run['batch']}.mask"]
        with torch.inference_mode():
            out = tower(given[f"{run['batch']}.features"], mask)
            soft = projector(out.last_hidden_state)
        made[f"{run['key']}.features"] = out.last_hidden_state[out.attention_mask]
        made[f"{run['key']}.soft"] = soft[out.attention_mask]
    return None, made


def unified(asked: dict[str, Any], given: Tensors) -> tuple[Any, Tensors]:
    """The projector of the unified model on stretches."""
    projector = Gemma4UnifiedMultimodalEmbedder(
        Gemma4UnifiedAudioConfig(**asked["config"]), Gemma4UnifiedTextConfig(hidden_size=asked["text_width"])
    )
    projector.load_state_dict(part(given, "unified.projector."), strict=True)
    with torch.inference_mode():
        soft = projector(given["unified.features"])
    return None, {"unified.soft": soft[given["unified.mask"]]}


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
    for task in (counts, features, waves, towers, unified):
        if task.__name__ in asked:
            answers[task.__name__], tensors = task(asked[task.__name__], given)
            made |= tensors
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / "output.safetensors")
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
