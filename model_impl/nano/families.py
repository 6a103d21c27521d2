"""The nano checkpoints' shapes: each has the traits of one published family, at a width of 128.

Head widths are among those that vLLM's CPU attention has. The window is shorter than nearly every prompt and
every picture, so that what it hides matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_impl.chat.render import Family
from model_impl.nano import settings

WINDOW = 8
"""Of sliding layers. In a thought, the digits that decide the next one stand four and eight tokens before it:
at the window's very edge."""
POSITIONS = 2048
_DTYPE = "float32"
"""Of the computation. Weights are stored in bfloat16; vLLM runs a tower in what its configuration says,
whatever it is asked for."""


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

    def config(self, rows: int) -> dict[str, Any]:
        """The content of `config.json`, for an embedding table of so many rows."""
        return settings.config(
            rows, dtype=_DTYPE, text={**_TEXT, **self.text}, vision=_VISION, audio=self.audio
        )


_TEXT: Mapping[str, Any] = {
    "hidden_size": 128,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": POSITIONS,
    "use_bidirectional_attention": None,
}
_VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "head_dim": 32,
    "global_head_dim": 32,
}
# transformers takes the first number of channels for that of mel bins, 128, and refuses any other.
_AUDIO: Mapping[str, Any] = {
    "model_type": "gemma4_audio",
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
