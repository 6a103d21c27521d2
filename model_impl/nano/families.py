"""The nano checkpoints' shapes: each has the traits of one published family, at a width of 128.

Head widths are among those that vLLM's CPU attention has. The window is shorter than nearly every prompt and
every picture, so that what it hides matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model_impl.chat.render import Family
from model_impl.nano.settings import SOFT_TOKENS
from model_impl.nano.vocabulary import BOS, CONTROL_IDS, STOP_IDS

WINDOW = 8
"""Of sliding layers. In a thought, the digits that decide the next one stand four and eight tokens before it:
at the window's very edge."""
POSITIONS = 2048
_DTYPE = "float32"
"""Of the computation. Weights are stored in bfloat16; vLLM runs a tower in what its configuration says,
whatever it is asked for."""
_HIDDEN = 128
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class NanoFamily:
    """One checkpoint's shape."""

    name: str
    template: Family
    shows: str
    """What it has that the others do not."""
    text: Mapping[str, Any]
    """Keys of `text_config` that it has of its own."""
    audio: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def config(self, rows: int) -> dict[str, Any]:
        """The content of `config.json`, for an embedding table of so many rows."""
        tokens = {
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "boi_token_id": "<|image>",
            "eoi_token_id": "<image|>",
            "audio_token_id": "<|audio|>",
            "boa_token_id": "<|audio>",
            "eoa_token_id": "<audio|>",
            "eoa_token_index": "<audio|>",
        }
        return {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "dtype": _DTYPE,
            "text_config": _text(rows) | dict(self.text),
            "vision_config": _vision(),
            "audio_config": None if self.audio is None else dict(self.audio),
            "vision_soft_tokens_per_image": SOFT_TOKENS,
            **{name: CONTROL_IDS[token] for name, token in tokens.items()},
            "eos_token_id": list(STOP_IDS[:2]),
            "tie_word_embeddings": True,
        }


def _text(rows: int) -> dict[str, Any]:
    """What all have, and the neutral values of what only some have."""
    return {
        "model_type": "gemma4_text",
        "dtype": _DTYPE,
        "vocab_size": rows,
        "vocab_size_per_layer_input": rows,
        "hidden_size": _HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 384,
        "use_double_wide_mlp": False,
        "num_hidden_layers": 6,
        "layer_types": [_SLIDING, _FULL] * 3,
        "num_kv_shared_layers": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": None,
        "head_dim": 32,
        "global_head_dim": 64,
        "attention_k_eq_v": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": WINDOW,
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            _FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        },
        "max_position_embeddings": POSITIONS,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": None,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "use_cache": True,
    }


def _vision() -> dict[str, Any]:
    """The position table is long enough for a strip of all the budget's tokens."""
    return {
        "model_type": "gemma4_vision",
        "dtype": _DTYPE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 32,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 256,
        "default_output_length": SOFT_TOKENS,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "standardize": True,
        "use_clipped_linears": True,
    }


# transformers takes the first number of channels for that of mel bins, 128, and refuses any other.
_AUDIO: Mapping[str, Any] = {
    "model_type": "gemma4_audio",
    "dtype": _DTYPE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "silu",
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_logit_cap": 50.0,
    "attention_invalid_logits_value": -1e9,
    "conv_kernel_size": 5,
    "gradient_clipping": 1e10,
    "residual_weight": 0.5,
    "rms_norm_eps": 1e-6,
    "subsampling_conv_channels": [128, 8],
    "output_proj_dims": 96,
    "use_clipped_linears": True,
}

FAMILIES: Mapping[str, NanoFamily] = {
    family.name: family
    for family in (
        NanoFamily(
            "nano-e",
            "e",
            "per-layer embeddings, shared keys and values, wider MLPs where they are shared, sound",
            {
                "hidden_size_per_layer_input": 16,
                "intermediate_size": 320,
                "use_double_wide_mlp": True,
                "num_kv_shared_layers": 2,
            },
            _AUDIO,
        ),
        NanoFamily(
            "nano-a",
            "large",
            "mixture of experts, keys that are values",
            {
                "intermediate_size": 256,
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "enable_moe_block": True,
                "num_experts": 8,
                "top_k_experts": 2,
                "moe_intermediate_size": 64,
                "use_bidirectional_attention": "vision",
            },
        ),
        NanoFamily(
            "nano-d",
            "large",
            "dense, keys that are values, fewer heads of them in full layers",
            {
                "num_global_key_value_heads": 1,
                "attention_k_eq_v": True,
                "use_bidirectional_attention": "vision",
            },
        ),
    )
}
