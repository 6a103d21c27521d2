"""Configurations of the five released sizes, as their `config.json` has them.

Only what the sizes differ in is written out per size; what all share stands once. Layer patterns are given by
their rule (so many sliding layers, then a full one) and spelled out on reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_K, _M = 1024, 1_000_000
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class _Size:
    layers: int
    sliding_per_full: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    global_kv_heads: int | None = None
    """Set where keys are values."""
    shared: int = 0
    double_wide: bool = False
    per_layer_width: int = 0
    experts: tuple[int, int, int] | None = None
    """How many, how many per token, and their width."""
    text_parameters: float = 0.0
    """Billions, to three decimals; counted from these configurations by another implementation."""

    @property
    def small(self) -> bool:
        """E2B and E4B: a shorter context, no attention within images."""
        return self.per_layer_width > 0


SIZES = {
    "E2B": _Size(
        35, 4, 1536, 6 * _K, 8, 1, shared=20, double_wide=True, per_layer_width=256, text_parameters=4.629
    ),
    "E4B": _Size(42, 5, 2560, 10 * _K, 8, 2, shared=18, per_layer_width=256, text_parameters=7.463),
    "12B": _Size(48, 5, 3840, 15 * _K, 16, 8, global_kv_heads=1, text_parameters=11.907),
    "26B-A4B": _Size(
        30, 5, 2816, 2112, 16, 8, global_kv_heads=2, experts=(128, 8, 704), text_parameters=25.233
    ),
    "31B": _Size(60, 5, 5376, 21 * _K, 32, 16, global_kv_heads=4, text_parameters=30.697),
}


def text_config(name: str) -> dict[str, Any]:
    """The `text_config` of a released size."""
    size = SIZES[name]
    moe, top_k, width = size.experts or (None, None, None)
    period = size.sliding_per_full + 1
    kinds = [_SLIDING if (i + 1) % period else _FULL for i in range(size.layers)]
    return {
        "model_type": "gemma4_unified_text" if name == "12B" else "gemma4_text",
        "dtype": "bfloat16",
        # Shape.
        "vocab_size": 256 * _K,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "use_double_wide_mlp": size.double_wide,
        "num_hidden_layers": size.layers,
        "layer_types": kinds,
        "tie_word_embeddings": True,
        # Attention.
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "num_global_key_value_heads": size.global_kv_heads,
        "head_dim": 256,
        "global_head_dim": 512,
        "attention_k_eq_v": size.global_kv_heads is not None,
        "num_kv_shared_layers": size.shared,
        "sliding_window": 512 if size.small else 1024,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_bidirectional_attention": None if size.small else "vision",
        "max_position_embeddings": (128 if size.small else 256) * _K,
        "rope_parameters": {
            _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            _FULL: {"rope_type": "proportional", "rope_theta": 1.0 * _M, "partial_rotary_factor": 0.25},
        },
        # Per-layer embeddings and experts.
        "hidden_size_per_layer_input": size.per_layer_width,
        "vocab_size_per_layer_input": 256 * _K,
        "enable_moe_block": size.experts is not None,
        "num_experts": moe,
        "top_k_experts": top_k,
        "moe_intermediate_size": width,
        # Numerics and tokens.
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
        "final_logit_softcapping": 30.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


def e2b_config() -> dict[str, Any]:
    """The whole `config.json` of E2B, with its vision and audio towers."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text_config("E2B"),
        "vision_config": {
            "model_type": "gemma4_vision",
            # Keys that the text configuration has too, with other values: the reader must not mix them up.
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "head_dim": 64,
            "global_head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-06,
            "max_position_embeddings": 128 * _K,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "default_output_length": 280,
            "position_embedding_size": 10 * _K,
            "use_clipped_linears": True,
            "standardize": False,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 1024,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "hidden_act": "silu",
            "attention_chunk_size": 12,
            "attention_context_left": 13,
            "attention_context_right": 0,
            "attention_logit_cap": 50.0,
            "attention_invalid_logits_value": -1e9,
            "conv_kernel_size": 5,
            "gradient_clipping": 1e10,
            "residual_weight": 0.5,
            "rms_norm_eps": 1e-06,
            "subsampling_conv_channels": [128, 32],
            "output_proj_dims": 1536,
            "use_clipped_linears": True,
        },
        "vision_soft_tokens_per_image": 280,
        "boi_token_id": 255_999,
        "boa_token_id": 256_000,
        "image_token_id": 258_880,
        "audio_token_id": 258_881,
        "eoi_token_id": 258_882,
        "eoa_token_id": 258_883,
        "video_token_id": 258_884,
        "eos_token_id": [1, 106],
    }
