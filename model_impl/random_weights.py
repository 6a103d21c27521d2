"""Seeded random checkpoints for tests: real names and shapes, every buffer off neutral.

Randomly initialised models usually keep norms, scalars and expert scales at one, and a model with such
buffers cannot tell an implementation that applies them from one that does not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_impl.checkpoint import PREFIX
from model_impl.config import TextConfig
from model_impl.media_config import MultimodalConfig
from model_impl.multimodal import Gemma4ForConditionalGeneration
from model_impl.speculative.eagle3 import Eagle3
from model_impl.speculative.eagle3_config import Eagle3Config
from model_impl.text import TextModel

_RANGES = {
    "q_norm.weight": (0.3, 0.7),
    "k_norm.weight": (0.3, 0.7),
    "post_attention_layernorm.weight": (0.2, 0.5),
    "post_feedforward_layernorm.weight": (0.2, 0.5),
    "post_per_layer_input_norm.weight": (0.2, 0.5),
    "layer_scalar": (0.7, 0.95),
    "per_expert_scale": (0.5, 1.6),
    "router.scale": (0.5, 2.0),
    "norm": (0.5, 1.7),
}
"""Uniform ranges by the end of a name, or for every other norm.

What makes a random stack blow up rounding is kept low, so that float32 decides: query and key norms, as there
is no 1/sqrt(d) and higher ones make attention sharp; what a layer adds; and what it takes from the stream."""


_BOUNDS = {
    # Averages of values are below the bounds of what is projected, products of gates smaller still. Of two
    # bounds around silu only the tighter one bites: in one network the first, in the other the second.
    "self_attn.post.": (0.1, 0.2),
    "linear_end.output": (0.1, 0.2),
    "linear_end.input_min": (0.1, 0.2),
    "feed_forward1.ffw_layer_1.output": (0.2, 0.3),
    "feed_forward1.ffw_layer_2.input": (0.2, 0.3),
    "feed_forward2.ffw_layer_2.input": (0.05, 0.1),
    "ffw_layer_2.output": (0.05, 0.15),
    "gate_proj.output": (0.2, 0.5),
    "down_proj.": (0.04, 0.09),
}
"""Magnitudes of the bounds of clipped linears, by a part of the name. What cuts nothing off would say nothing
in a comparison."""
_USUAL_BOUND = (0.5, 1.0)

_TOWER_RANGES = {
    "per_dim_scale": (-1.5, 0.5),
    "std_scale": (0.2, 1.2),
    "std_bias": (-5.0, 5.0),
    "q_norm.weight": (0.3, 0.7),
    "k_norm.weight": (0.3, 0.7),
    "input_layernorm.weight": (0.5, 1.7),
    "post_attention_layernorm.weight": (0.2, 0.5),
    "pre_feedforward_layernorm.weight": (0.5, 1.7),
    "post_feedforward_layernorm.weight": (0.2, 0.5),
    "pre_layer_norm.weight": (0.5, 1.7),
    "post_layer_norm.weight": (0.2, 0.5),
    "norm_pre_attn.weight": (0.5, 1.7),
    "norm_post_attn.weight": (0.2, 0.5),
    "norm_out.weight": (0.5, 1.7),
    "conv_norm.weight": (0.5, 1.7),
    "norm.weight": (0.5, 1.7),
    "pos_norm.weight": (0.5, 1.7),
    "pos_norm.bias": (-0.5, 0.5),
    "patch_ln1.weight": (0.5, 1.7),
    "patch_ln1.bias": (-1.5, 1.5),
    # Vectors before the last norm are so small that the norm's epsilon shows.
    "patch_dense.weight": (-2e-4, 2e-4),
    "patch_dense.bias": (-0.02, 0.02),
    "patch_ln2.weight": (0.005, 0.017),
    "patch_ln2.bias": (-0.5, 0.5),
    "output_proj.bias": (-0.5, 0.5),
    "linear_end.linear.weight": (-0.1, 0.1),
}
"""Uniform ranges by the last parts of a tensor's name."""

_LARGE = {"std_bias": 7e4, "std_scale": 1e-4}
"""First element of a vector: one feature has a mean beyond float16, as in published checkpoints (M01)."""


def write_checkpoint(config: Mapping[str, Any], folder: Path, *, seed: int) -> None:
    """Write `config.json` and `model.safetensors` (float32).

    Args:
        config: As published; written as it is. With a configuration of images or sound it is a whole model's.
        folder: Must exist.
        seed: Together with a tensor's name it decides the tensor.

    Raises:
        ConfigError: as `TextConfig.from_dict` and `MultimodalConfig.from_dict`.
    """
    tensors = {
        PREFIX + name: random_tensor(name, shape, seed)
        for name, shape in shapes(TextConfig.from_dict(config))
    }
    if config.get("vision_config") or config.get("audio_config"):
        tensors |= {
            f"model.{name}": _tower_tensor(name, shape, seed)
            for name, shape in tower_shapes(MultimodalConfig.from_dict(config))
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_eagle3(
    target: TextConfig, folder: Path, *, seed: int, layers: Sequence[int], drafted: Tensor | None = None
) -> None:
    """Write `config.json` and `model.safetensors` (float32) of an Eagle3 draft head.

    Its one layer is as wide as the target.

    Args:
        target: The model that it drafts for.
        folder: Must exist.
        seed: Decides the weights.
        layers: After how many of the target's layers the states are taken that it reads.
        drafted: Ids of the tokens that can be drafted, ascending, int64; left out, half of all, at random.

    Raises:
        ConfigError: as `Eagle3Config.from_dict`.
    """
    if drafted is None:
        shuffled = torch.randperm(target.vocab_size, generator=torch.Generator().manual_seed(seed))
        drafted = shuffled[: target.vocab_size // 2].sort().values
    config = eagle3_config(target, layers, len(drafted))
    with torch.device("meta"):
        head = Eagle3(Eagle3Config.from_dict(config, target_layers=len(target.layers)))
    tensors = {name: random_tensor(name, tuple(like.shape), seed) for name, like in head.state_dict().items()}
    tensors |= eagle3_tables(drafted, target.vocab_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def eagle3_config(target: TextConfig, layers: Sequence[int], draft_vocab_size: int) -> dict[str, Any]:
    """The content of `config.json` of an Eagle3 draft head that is as wide as its target.

    Args:
        target: The model that it drafts for.
        layers: After how many of the target's layers the states are taken that it reads.
        draft_vocab_size: How many of the target's tokens can be drafted.
    """
    return {
        "architectures": ["Eagle3DraftModel"],
        "dtype": "float32",
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(layers),
        "norm_before_fc": False,
        "norm_before_residual": True,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["Gemma4ForCausalLM"], "name_or_path": None},
        },
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            "attention_bias": False,
            "head_dim": max(target.head_dims),
            "hidden_act": "silu",
            "hidden_size": target.hidden_size,
            "intermediate_size": 2 * target.hidden_size,
            "max_position_embeddings": target.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": target.num_heads,
            "num_hidden_layers": 1,
            "num_key_value_heads": target.num_heads,
            "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
            "vocab_size": target.vocab_size,
        },
    }


def eagle3_tables(chosen: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """The two tables of a draft head's file.

    Args:
        chosen: Ids of the target's tokens that can be drafted, ascending, int64 [draft vocabulary].
        vocab_size: Of the target.
    """
    return {
        "d2t": chosen - torch.arange(len(chosen)),
        "t2d": torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, chosen, True),
    }


def shapes(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, dead ones of shared layers included."""
    with torch.device("meta"):
        model = TextModel(config)
    for name, tensor in model.state_dict().items():
        yield name, tuple(tensor.shape)
    for layer in config.layers:
        if layer.shares_kv:
            source = f"layers.{layer.kv_source}.self_attn."
            for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
                if source + name in model.state_dict():
                    shape = tuple(model.state_dict()[source + name].shape)
                    yield f"layers.{layer.index}.self_attn.{name}", shape


def tower_shapes(config: MultimodalConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of towers, embedders and projectors, below `model.`."""
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    for name, tensor in model.state_dict().items():
        if not name.startswith("language_model."):
            yield name, tuple(tensor.shape)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A float32 tensor of a text model or a draft: what is drawn depends on its name, shape and seed."""
    generator = _generator(name, seed)
    for part, (low, high) in _RANGES.items():
        if name.endswith(part) or (part == "norm" and "norm" in name):
            return torch.empty(shape).uniform_(low, high, generator=generator)
    # An embedding's lookup multiplies by the root of the width, so that every stream starts at variance one.
    return torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)


def _tower_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = _generator(name, seed)
    made = torch.empty(shape)
    if name.endswith(("_min", "_max")):
        low, high = next((span for part, span in _BOUNDS.items() if part in name), _USUAL_BOUND)
        bound = made.uniform_(low, high, generator=generator)
        return -bound if name.endswith("_min") else bound
    for end, (low, high) in _TOWER_RANGES.items():
        if name.endswith(f".{end}"):
            made.uniform_(low, high, generator=generator)
            if end in _LARGE:
                made[0] = _LARGE[end]
            return made
    if name.endswith(".pos_embedding"):
        return made.normal_(0.0, 0.004, generator=generator)
    if name.endswith(".position_embedding_table"):
        return made.normal_(0.0, 0.4, generator=generator)
    if made.ndim < 2:
        raise ValueError(f"no rule says how to draw the weights {name}; add one to `_TOWER_RANGES`")
    return made.normal_(0.0, math.prod(shape[1:]) ** -0.5, generator=generator)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
