"""Configuration of an Eagle3 draft head, from a published `config.json` (fact sheet, section 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from model_impl.config import (
    AttentionKind,
    Count,
    LayerConfig,
    Published,
    RopeConfig,
    TextConfig,
    read_config,
    validated,
)
from model_impl.errors import ConfigError

KIND: AttentionKind = "full_attention"
"""Of the one layer."""

_AUX_KEY = "eagle_aux_hidden_state_layer_ids"

Theta = Annotated[float, Field(gt=0)]


class _PublishedRope(Published):
    rope_type: Literal["default"] = "default"
    rope_theta: Theta


class _PublishedLayer(Published):
    """A Llama configuration: its layer is the draft's."""

    model_type: Literal["llama"] = "llama"
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Literal[1]
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count | None = None
    hidden_act: Literal["silu"]
    attention_bias: Literal[False, None] = False
    mlp_bias: Literal[False, None] = False
    rms_norm_eps: Annotated[float, Field(gt=0)]
    max_position_embeddings: Count
    rope_parameters: _PublishedRope | None = None
    rope_theta: Theta | None = None
    rope_scaling: None = None


class _PublishedEagle3(Published):
    speculators_model_type: Literal["eagle3"]
    transformer_layer_config: _PublishedLayer
    draft_vocab_size: Count
    target_hidden_size: Count | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    norm_before_residual: bool
    norm_before_fc: bool = False
    fc_norm: Literal[False, None] = False
    norm_output: Literal[False, None] = False
    tie_word_embeddings: Literal[False, None] = False


@dataclass(frozen=True)
class Eagle3Config:
    """An Eagle3 draft head."""

    decoder: TextConfig
    """Its one layer, in the words that the key-value cache understands."""
    target_hidden_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    """After how many of its layers the target's hidden states are taken; 0 is the scaled embedding."""
    norm_before_residual: bool
    norm_before_fc: bool

    @classmethod
    def from_file(cls, path: Path, *, target_layers: int | None = None) -> Eagle3Config:
        """Read a `config.json`.

        Raises:
            ConfigError: it cannot be read, or as in `from_dict`.
        """
        return cls.from_dict(read_config(path), target_layers=target_layers)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, target_layers: int | None = None) -> Eagle3Config:
        """Read a configuration as published.

        Args:
            raw: The content of a `config.json`.
            target_layers: How many layers the target has: to check which of them are read, and to choose
                them where the configuration does not.

        Raises:
            ConfigError: a key is missing, values contradict each other or the target, or something is asked
                for that no published draft head has.
        """
        published = validated(_PublishedEagle3, raw, "Eagle3 configuration")
        layer = published.transformer_layer_config
        if published.draft_vocab_size > layer.vocab_size:
            raise ConfigError(
                f"draft_vocab_size {published.draft_vocab_size} is above vocab_size {layer.vocab_size}"
            )
        return cls(
            decoder=_decoder(layer),
            target_hidden_size=published.target_hidden_size or layer.hidden_size,
            draft_vocab_size=published.draft_vocab_size,
            aux_layers=_aux_layers(published.eagle_aux_hidden_state_layer_ids, target_layers),
            norm_before_residual=published.norm_before_residual,
            norm_before_fc=published.norm_before_fc,
        )


def default_aux_layers(target_layers: int) -> tuple[int, ...]:
    """After how many layers the target's states are taken where the configuration does not say."""
    return 2, target_layers // 2, target_layers - 3


def _aux_layers(named: list[int] | None, target_layers: int | None) -> tuple[int, ...]:
    if named is None and target_layers is None:
        raise ConfigError(
            f"{_AUX_KEY} is missing; name the layers, or tell how many the target has for the default"
        )
    ids = tuple(named) if named is not None else default_aux_layers(target_layers or 0)
    origin = "" if named is not None else f", the default for {target_layers} layers,"
    # Engines join the states in the order of layers and each once, whatever the order here.
    if not ids or any(a >= b for a, b in pairwise(ids)):
        raise ConfigError(
            f"{_AUX_KEY} {list(ids)}{origin} must be distinct and ascending; name others in the configuration"
        )
    if ids[0] < 0 or (target_layers is not None and ids[-1] > target_layers):
        last = "" if target_layers is None else f" to {target_layers}, the number of the target's layers"
        raise ConfigError(f"{_AUX_KEY} {list(ids)}{origin} must lie from 0{last}; is this the right target?")
    return ids


def _decoder(layer: _PublishedLayer) -> TextConfig:
    hidden, heads, kv_heads = layer.hidden_size, layer.num_attention_heads, layer.num_key_value_heads
    head_dim = layer.head_dim or hidden // heads
    if head_dim % 2 or head_dim == 0 or heads % kv_heads:
        raise ConfigError(
            f"head_dim {head_dim} must be even, and num_attention_heads {heads} a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    theta = layer.rope_parameters.rope_theta if layer.rope_parameters else layer.rope_theta
    if theta is None:
        raise ConfigError("transformer_layer_config has neither rope_parameters nor rope_theta")
    return TextConfig(
        vocab_size=layer.vocab_size,
        hidden_size=hidden,
        num_heads=heads,
        layers=(
            LayerConfig(
                index=0,
                kind=KIND,
                head_dim=head_dim,
                num_kv_heads=kv_heads,
                keys_are_values=False,
                kv_source=0,
                intermediate_size=layer.intermediate_size,
            ),
        ),
        sliding_window=layer.max_position_embeddings,
        rope={KIND: RopeConfig(theta, 1.0)},
        rms_norm_eps=layer.rms_norm_eps,
        final_logit_softcapping=None,
        per_layer_inputs=None,
        moe=None,
        tie_word_embeddings=False,
        bidirectional_images=False,
        max_position_embeddings=layer.max_position_embeddings,
        pad_token_id=0,
    )
