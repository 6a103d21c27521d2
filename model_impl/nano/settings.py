"""All files of a small checkpoint but its weights, in the published forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer

from model_impl.chat.render import Family, template_text
from model_impl.nano.vocabulary import BOS, CONTROL_IDS, STOP_IDS, tokenizer_config

SOFT_TOKENS = 70
"""Most soft tokens of a picture: the smallest of the published budgets."""
_PATCH, _POOLING = 16, 3
_SLIDING, _FULL = "sliding_attention", "full_attention"


_TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "audio_token_id": "<|audio|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_id": "<audio|>",
    "eoa_token_index": "<audio|>",
}
_TEXT: Mapping[str, Any] = {
    "model_type": "gemma4_text",
    "dtype": None,
    "vocab_size": None,
    "vocab_size_per_layer_input": None,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 128,
    "use_double_wide_mlp": False,
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _FULL] * 2,
    "num_kv_shared_layers": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "head_dim": 32,
    "global_head_dim": 64,
    "attention_k_eq_v": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": 8,
    "rope_parameters": {
        _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        _FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
    "max_position_embeddings": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": "vision",
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
"""Head widths are the smallest that vLLM's CPU attention has. What is None at the top is filled in."""
_VISION: Mapping[str, Any] = {
    "model_type": "gemma4_vision",
    "dtype": None,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "global_head_dim": 24,
    "patch_size": _PATCH,
    "pooling_kernel_size": _POOLING,
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
"""The position table is long enough for a strip of all the budget's tokens."""


def config(
    rows: int,
    *,
    dtype: str = "bfloat16",
    text: Mapping[str, Any] = MappingProxyType({}),
    vision: Mapping[str, Any] = MappingProxyType({}),
    audio: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        rows: Of the embedding table.
        dtype: Of the computation.
        text: What is other than in the scripted checkpoint, as are the next two.
        vision: For pictures.
        audio: All about sounds, or None for a checkpoint without them.
    """
    sized = {"vocab_size": rows, "vocab_size_per_layer_input": rows}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": dtype,
        "text_config": {**_TEXT, **sized, "dtype": dtype, **text},
        "vision_config": {**_VISION, "dtype": dtype, **vision},
        "audio_config": None if audio is None else {**audio, "dtype": dtype},
        "vision_soft_tokens_per_image": SOFT_TOKENS,
        **{name: CONTROL_IDS[token] for name, token in _TOKENS.items()},
        "eos_token_id": list(STOP_IDS[:2]),
        "tie_word_embeddings": True,
    }


def generation_config() -> dict[str, Any]:
    """The content of `generation_config.json`: as published, but only the likeliest token may be sampled.

    So an engine that takes it up says the script whatever temperature a client asks for.
    """
    return {
        "bos_token_id": BOS,
        "do_sample": True,
        "eos_token_id": list(STOP_IDS),
        "pad_token_id": 0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def processor_config() -> dict[str, Any]:
    """The content of `processor_config.json`: as published, but for the budget of images."""
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": SOFT_TOKENS,
        "patch_size": _PATCH,
        "pooling_kernel_size": _POOLING,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    return {
        "processor_class": "Gemma4Processor",
        "image_seq_length": SOFT_TOKENS,
        "audio_seq_length": 750,
        "audio_ms_per_token": 40,
        "image_processor": {**pixels, "image_processor_type": "Gemma4ImageProcessor"},
        "video_processor": {
            **pixels,
            "video_processor_type": "Gemma4VideoProcessor",
            "do_normalize": True,
            "do_sample_frames": True,
            "num_frames": 32,
            "return_metadata": False,
        },
        "feature_extractor": {
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "dither": 0.0,
            "feature_size": 128,
            "fft_length": 512,
            "fft_overdrive": False,
            "frame_length": 320,
            "hop_length": 160,
            "input_scale_factor": 1.0,
            "max_frequency": 8000.0,
            "mel_floor": 0.001,
            "min_frequency": 0.0,
            "padding_side": "right",
            "padding_value": 0.0,
            "per_bin_mean": None,
            "per_bin_stddev": None,
            "preemphasis": 0.0,
            "preemphasis_htk_flavor": True,
            "return_attention_mask": True,
            "sampling_rate": 16000,
        },
    }


def write_texts(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any], family: Family) -> None:
    """Write all files of a nano checkpoint but its weights.

    Args:
        folder: Must exist; files of the same names are replaced.
        tokenizer: The checkpoint's.
        config: The content of `config.json`; pictures have `SOFT_TOKENS`.
        family: Of the chat template.
    """
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config()),
        ("processor_config.json", processor_config()),
        ("tokenizer_config.json", tokenizer_config(processor=True)),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template_text(family), encoding="utf-8")
