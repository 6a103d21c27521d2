"""Small models for invariance suites: drawn at random, by the families of the published ones, or trained.

Head sizes of drawn ones are those that vLLM's attention for CPUs has kernels for.
"""

from __future__ import annotations

from typing import Any, Literal

DrawnModel = Literal["e2b-like", "dense", "moe"]
TrainedModel = Literal["nano-a", "nano-d", "nano-e"]
"""Bundled checkpoints."""
HEADED: tuple[TrainedModel, ...] = ("nano-d", "nano-e")
"""Those with a trained Eagle3 head beside them."""

_SLIDING, _FULL = "sliding_attention", "full_attention"
VOCAB_SIZE = 128

_COMMON: dict[str, Any] = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        _FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

_E2B: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 7,
    "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _SLIDING, _FULL],
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "enable_moe_block": False,
}
"""Per-layer embeddings; layers 5 and 6 share the keys and values of 3 and 4, with MLPs of double width."""

_DENSE: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 6,
    "layer_types": [_SLIDING, _SLIDING, _FULL] * 2,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
}
"""As 31B: keys are values in full layers, which have fewer key-value heads."""

_MOE: dict[str, Any] = {
    **_DENSE,
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _SLIDING, _SLIDING, _FULL],
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
"""As 26B-A4B: experts beside the dense MLP."""

MODELS: dict[DrawnModel, dict[str, Any]] = {"e2b-like": _E2B, "dense": _DENSE, "moe": _MOE}
"""Configurations with published keys."""
