"""Draft models for small checkpoints: random ones, and ones that guess well without any training.

Which token follows which, if nothing but the last token counts, can be read off a target's embedding and
final norm (`model_impl.speaking_weights.successors`). A draft that guesses has that knowledge in its
weights, beside random ones that hardly matter: it is right about some of the tokens of a target from
`speaking_weights`, and of no use to any other. One that is fed the wrong token guesses no better than
chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_impl.config import TextConfig, read_config
from model_impl.errors import ConfigError
from model_impl.random_weights import random_tensor
from model_impl.random_weights import write_eagle3 as write_random_eagle3
from model_impl.speaking_weights import embedding_and_norm, successors
from model_impl.speculative.assistant import Assistant, AssistantConfig, kv_layers

_WEIGHTS = "model.safetensors"
_CONSTANT = 0.5
"""First element of every vector of a guessing Eagle3 head's embedding."""
_SELF = 8.0
"""Attention score of a token with itself, which leaves the others a little."""
_TURNING = 8
"""Pairs of a head's dimensions that turn fast enough to tell neighbours apart."""
_HEARD = 0.08
"""Of the target's states, which a guessing Eagle3 head reads beside the token."""
_STATE = 0.3
"""Of the target's last state, as a guessing assistant hears it beside the token."""
_ATTENDED = 0.25
"""Of what a guessing assistant's attention adds, so that it matters whose keys it reads."""
_QUIET = 0.02
"""Of all else that is random in it."""
_CLUSTER = 8
"""Tokens of a cluster of the centroid head."""


def write_eagle3(target: Path, folder: Path, *, guesses: bool, seed: int, layers: Sequence[int]) -> None:
    """Write `config.json` and `model.safetensors` (float32) of an Eagle3 head.

    Args:
        target: Checkpoint of the model that it drafts for.
        folder: Must exist.
        guesses: With the knowledge of which token follows which; the head drafts those that follow most.
        seed: Decides what is random.
        layers: After how many of the target's layers the states are taken that it reads.

    Raises:
        ConfigError: the head does not fit the target.
    """
    config = TextConfig.from_file(target / "config.json")
    write_random_eagle3(config, folder, seed=seed, layers=layers)
    if not guesses:
        return
    tensors = load_file(folder / _WEIGHTS)
    embedding, norm = embedding_and_norm(target)
    count = len(tensors["d2t"])
    chosen = successors(target).argmax(dim=-1).bincount(minlength=len(embedding)).topk(count).indices
    chosen = chosen.sort().values
    tensors["d2t"] = chosen - torch.arange(count)
    tensors["t2d"] = torch.zeros(len(embedding), dtype=torch.bool).index_fill(0, chosen, True)
    layer = "layers.0."
    tensors["embed_tokens.weight"] = embedding.clone()
    tensors["embed_tokens.weight"][:, 0] = _CONSTANT
    tensors[f"{layer}hidden_norm.weight"] *= _HEARD
    tensors[f"{layer}mlp.down_proj.weight"] *= _QUIET
    tensors |= _looks_at_itself(tensors, config.hidden_size, max(config.head_dims), config.num_heads)
    tensors["lm_head.weight"] = (embedding * norm)[chosen] / tensors["norm.weight"]
    tensors["lm_head.weight"][:, 0] = 0.0
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _looks_at_itself(tensors: dict[str, Tensor], hidden: int, d: int, heads: int) -> dict[str, Tensor]:
    """Attention whose output is the normed embedding of the very token: its scores come from the constant."""
    prefix = "layers.0."
    if heads * d < hidden:
        raise ConfigError(f"{heads} heads of size {d} do not hold {hidden} features")
    weight = tensors[prefix + "input_layernorm.weight"]
    size = float(tensors["embed_tokens.weight"].pow(2).mean(dim=-1).sqrt().mean())
    constant = _CONSTANT / size * float(weight[0])
    # A score is the sum over the dimensions that turn, divided by the root of the head's size.
    each = (_SELF * d**0.5 / _TURNING) ** 0.5 / constant
    changed = {}
    for name in ("q_proj", "k_proj"):
        made = torch.zeros_like(tensors[f"{prefix}self_attn.{name}.weight"])
        for head in range(heads):
            made[head * d : head * d + _TURNING, 0] = each
        changed[f"{prefix}self_attn.{name}.weight"] = made
    values = tensors[f"{prefix}self_attn.v_proj.weight"] * _QUIET
    output = tensors[f"{prefix}self_attn.o_proj.weight"] * _QUIET
    values[:hidden, :hidden] = torch.diag(1 / weight)
    output[:, :hidden] = torch.eye(hidden)
    changed[f"{prefix}self_attn.v_proj.weight"] = values
    changed[f"{prefix}self_attn.o_proj.weight"] = output
    return changed


def write_assistant(target: Path, folder: Path, *, guesses: bool, seed: int) -> None:
    """Write `config.json` and `model.safetensors` (float32) of an assistant.

    It has the centroid head where the target has per-layer embeddings, as the published ones have.

    Args:
        target: Checkpoint of the model that it drafts for.
        folder: Must exist.
        guesses: With the knowledge of which token follows which.
        seed: Decides what is random.

    Raises:
        ConfigError: no assistant fits the target.
    """
    raw = read_config(target / "config.json")
    config = _assistant_config(raw.get("text_config", raw), TextConfig.from_file(target / "config.json"))
    with torch.device("meta"):
        model = Assistant(AssistantConfig.from_dict(config))
    tensors = {
        name: random_tensor(name, tuple(like.shape), seed)
        for name, like in model.state_dict().items()
        if not name.endswith("token_ordering")
    }
    if model.config.centroids is not None:
        order = torch.randperm(model.config.text.vocab_size, generator=torch.Generator().manual_seed(seed))
        tensors["masked_embedding.token_ordering"] = order
    if guesses:
        _teach(tensors, model.config, target)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _teach(tensors: dict[str, Tensor], config: AssistantConfig, target: Path) -> None:
    """Let the newest token's vector through to the head, and give the head the target's table."""
    embedding, norm = embedding_and_norm(target)
    hidden = embedding.shape[-1]
    for name in tensors:
        if ".post_" in name and name.endswith("norm.weight"):
            tensors[name] *= _ATTENDED if "attention" in name else _QUIET
    tensors["pre_projection.weight"] *= _QUIET
    tensors["pre_projection.weight"][:, :hidden] += torch.eye(hidden) * hidden**-0.5
    # The state before the newest token points to that token, as it is what the target chose by it.
    tensors["pre_projection.weight"][:, hidden:] += torch.eye(hidden) * _STATE
    tensors["post_projection.weight"] *= _QUIET
    table = embedding * norm / tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = table
    if config.centroids is not None:
        clusters = tensors["masked_embedding.token_ordering"].view(config.centroids.clusters, -1)
        tensors["masked_embedding.centroids.weight"] = table[clusters].mean(dim=1)


def _assistant_config(text: dict[str, Any], target: TextConfig) -> dict[str, Any]:
    """Four layers with queries alone, as wide as the target."""
    sources = kv_layers(target)
    sliding = sources.get("sliding_attention")
    full = sources.get("full_attention")
    if sliding is None or full is None:
        raise ConfigError("an assistant reads keys and values of both kinds of layers; the target has one")
    ordered = bool(text.get("hidden_size_per_layer_input"))
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "float32",
        "backbone_hidden_size": target.hidden_size,
        "use_ordered_embeddings": ordered,
        "num_centroids": target.vocab_size // _CLUSTER,
        "centroid_intermediate_top_k": max(1, target.vocab_size // _CLUSTER // 2),
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "intermediate_size": 2 * target.hidden_size,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "num_attention_heads": target.num_heads,
            "num_key_value_heads": sliding.num_kv_heads,
            "num_global_key_value_heads": full.num_kv_heads if full.keys_are_values else None,
            "attention_k_eq_v": full.keys_are_values,
            "head_dim": sliding.head_dim,
            "global_head_dim": full.head_dim,
            "sliding_window": target.sliding_window,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "rms_norm_eps": target.rms_norm_eps,
            "final_logit_softcapping": None,
            "tie_word_embeddings": True,
            "enable_moe_block": False,
            "use_double_wide_mlp": False,
            "max_position_embeddings": text["max_position_embeddings"],
            "rope_parameters": text["rope_parameters"],
            "attention_bias": False,
            "use_bidirectional_attention": None,
            "pad_token_id": 0,
        },
    }
