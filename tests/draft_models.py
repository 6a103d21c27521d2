"""Configurations of draft models as published, small ones like them, and their random weights."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model_impl.config import AttentionKind
from model_impl.speculative.assistant import Assistant, AssistantConfig, TargetKV, kv_layers
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import Eagle3Config
from tests.model_configs import FULL, SLIDING, WINDOW
from tests.text_rules import EPS

Target = Mapping[AttentionKind, TargetKV]
Inputs = tuple[Tensor, Tensor, Tensor, Target]

_K = 1024
_PATTERN = [SLIDING, SLIDING, SLIDING, FULL]
_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
_SHARED: dict[str, Any] = {
    "attention_bias": False,
    "enable_moe_block": False,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "layer_types": _PATTERN,
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": _ROPES,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 0,
}


@dataclass(frozen=True)
class _Assistant:
    target_hidden: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    global_kv_heads: int | None
    parameters: int
    """Counted by hand from the shapes."""
    millions: float
    """As the fact sheet has it."""


ASSISTANTS = {
    "E2B": _Assistant(1536, 256, 2048, 4, 1, None, 77_731_328, 77.7),
    "E4B": _Assistant(2560, 256, 2048, 4, 2, None, 78_517_760, 78.5),
    "12B": _Assistant(3840, 1024, 8192, 16, 8, 1, 422_856_960, 422.9),
    "26B-A4B": _Assistant(2816, 1024, 8192, 16, 8, 2, 419_711_232, 419.7),
    "31B": _Assistant(5376, 1024, 8192, 32, 16, 4, 469_518_592, 469.5),
}


def assistant_config(name: str) -> dict[str, Any]:
    """The `config.json` of a released size's draft model."""
    size = ASSISTANTS[name]
    small = size.global_kv_heads is None
    unified = "unified_" if name == "12B" else ""
    return {
        "architectures": [f"Gemma4{unified.title().rstrip('_')}AssistantForCausalLM"],
        "backbone_hidden_size": size.target_hidden,
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "image_token_id": 258_880,
        "model_type": f"gemma4_{unified}assistant",
        "num_centroids": 2048,
        "text_config": {
            **_SHARED,
            "attention_k_eq_v": not small,
            "global_head_dim": 512,
            "head_dim": 256,
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "max_position_embeddings": (128 if small else 256) * _K,
            "model_type": f"gemma4_{unified}text",
            "num_attention_heads": size.heads,
            "num_global_key_value_heads": size.global_kv_heads,
            "num_key_value_heads": size.kv_heads,
            "sliding_window": 512 if small else 1024,
            "vocab_size": 256 * _K,
        },
        "tie_word_embeddings": True,
        "use_ordered_embeddings": small,
    }


def tiny_assistant(*, ordered: bool) -> dict[str, Any]:
    """The draft model of the small E2B-like target (`ordered`), or of the dense one."""
    return {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": 48,
        "use_ordered_embeddings": ordered,
        "num_centroids": 12,
        "centroid_intermediate_top_k": 3,
        "text_config": {
            **_SHARED,
            "vocab_size": 96,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 8,
            "num_key_value_heads": 1 if ordered else 4,
            "num_global_key_value_heads": None if ordered else 2,
            "attention_k_eq_v": not ordered,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": WINDOW,
        },
    }


def small_assistant(name: str) -> dict[str, Any]:
    """A released size's draft model with narrow layers; kinds, heads and switches are the published ones."""
    published = assistant_config(name)
    narrow = {
        "vocab_size": 96,
        "hidden_size": 24,
        "intermediate_size": 40,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": WINDOW,
    }
    return {
        **published,
        "backbone_hidden_size": 48,
        "num_centroids": 12,
        "centroid_intermediate_top_k": 3,
        "text_config": published["text_config"] | narrow,
    }


EAGLE3_31B: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"],
    "draft_vocab_size": 32_000,
    "dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 30, 57],
    "embed_requires_grad": False,
    "norm_before_fc": False,
    "norm_before_residual": True,
    "speculators_config": {"algorithm": "eagle3", "default_proposal_method": "greedy"},
    "speculators_model_type": "eagle3",
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "transformer_layer_config": {
        "attention_bias": False,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "max_position_embeddings": 256 * _K,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 1,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "vocab_size": 256 * _K,
    },
}

TINY_EAGLE3: dict[str, Any] = {
    **EAGLE3_31B,
    "draft_vocab_size": 20,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
    "target_hidden_size": 10,
    "transformer_layer_config": {
        **EAGLE3_31B["transformer_layer_config"],
        "head_dim": 8,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    },
}


def random_weights(model: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    """Weights by name, none neutral; tables of token ids that are valid and not the identity."""
    return {name: _random(name, tensor, seed) for name, tensor in model.state_dict().items()} | _mapping(
        model.state_dict(), seed
    )


def _random(name: str, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    if name.endswith("token_ordering"):
        return torch.randperm(len(like), generator=generator)
    if "norm" in name or "layer_scalar" in name:
        low, high = (0.3, 0.7) if "q_norm" in name else (0.5, 1.7)
        return torch.empty(like.shape).uniform_(low, high, generator=generator)
    return torch.empty(like.shape).normal_(0.0, like.shape[-1] ** -0.5, generator=generator)


def _mapping(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Both tables of a draft vocabulary, where there is one: its tokens are spread over the target's."""
    if "d2t" not in state:
        return {}
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(state["t2d"]), generator=generator)[: len(state["d2t"])].sort().values
    marks = torch.zeros(len(state["t2d"]), dtype=torch.bool).index_fill(0, chosen, True)
    return {"d2t": chosen - torch.arange(len(chosen)), "t2d": marks}


def write(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> Path:
    """A checkpoint folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def assistant_on_meta(config: Mapping[str, Any]) -> Assistant:
    with torch.device("meta"):
        return Assistant(AssistantConfig.from_dict(config))


def draft_inputs(config: Mapping[str, Any], rows: list[int], *, queries: int = 1, seed: int = 5) -> Inputs:
    """A draft step for rows of as many processed tokens; keys in no order, slots without a key between."""
    text = AssistantConfig.from_dict(config).text
    generator = torch.Generator().manual_seed(seed)
    slots, batch = max(rows) + 2, len(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = {}
    for kind, layer in kv_layers(text).items():
        positions = torch.stack(
            [
                torch.where(order < count, order, -1)
                for count, order in ((n, torch.randperm(slots, generator=generator)) for n in rows)
            ]
        )
        k, v = (random(batch, layer.num_kv_heads, slots, layer.head_dim) for _ in "kv")
        target[kind] = TargetKV(k * 0.5, v, positions)
    newest = torch.tensor(rows)[:, None] + torch.arange(queries)
    return random(batch, queries, 48), random(batch, queries, 48), newest, target


def tiny_eagle3(**changes: Any) -> dict[str, Any]:
    """The small configuration with changes, in the layer where the key belongs; "absent" drops a key."""
    layer = {**TINY_EAGLE3["transformer_layer_config"]}
    whole = {**TINY_EAGLE3, "transformer_layer_config": layer}
    for key, value in changes.items():
        part = layer if key in layer or key in ("mlp_bias", "rope_scaling", "rope_theta") else whole
        part[key] = value
        if value == "absent":
            del part[key]
    return whole


def eagle3_on_meta(config: Mapping[str, Any]) -> Eagle3:
    with torch.device("meta"):
        return Eagle3(Eagle3Config.from_dict(config))


def target_states(rows: int, width: int, seed: int = 5) -> list[Tensor]:
    """Three hidden states of the target."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, 10, generator=generator) for _ in range(3)]


# ------------------------------------------------------------------ arithmetic in float64, one vector a time


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS normalisation of one vector."""
    return x * weight / math.sqrt(float(x @ x) / len(x) + EPS)


def turn(x: Tensor, position: int, theta: float, rotated: float = 1.0) -> Tensor:
    """Rotary embedding of one head, as a product of complex numbers."""
    half = len(x) // 2
    moving = int(rotated * half)
    turns = [position * theta ** (-2 * j / len(x)) if j < moving else 0.0 for j in range(half)]
    angles = torch.tensor(turns, dtype=torch.float64)
    y = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([y.real, y.imag])


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query over a list of keys."""
    scores = [math.exp(float(q @ k)) for k in keys]
    return sum((w * v for w, v in zip(scores, values, strict=True)), torch.zeros_like(q)) / sum(scores)


def heads(x: Tensor, d: int) -> list[Tensor]:
    """Cut one vector into heads."""
    return list(x.split(d))
