"""Configuration of the text decoder, from a published `config.json` (fact sheet, section 1.2).

The published keys describe the two kinds of layer; here each layer has its own record, so that no module
works out again what kind it is, how wide its heads are, or whose keys and values it reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model_impl.errors import ConfigError

AttentionKind = Literal["sliding_attention", "full_attention"]

_DEFAULT_GLOBAL_HEAD_DIM = 512
_DEFAULT_PATTERN = 6
"""Without `layer_types`, every sixth layer attends to everything."""
_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "sliding_window",
)  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer."""

    theta: float
    rotated: float
    """Part of the frequency pairs that rotate; the others have frequency zero."""


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer."""

    index: int
    kind: AttentionKind
    head_dim: int
    num_kv_heads: int
    keys_are_values: bool
    """The value is the normed output of the key projection; there is no value projection."""
    kv_source: int
    """Index of the layer whose keys and values this one attends to: its own, or an earlier layer's."""
    intermediate_size: int

    @property
    def shares_kv(self) -> bool:
        """Whether the keys and values are another layer's."""
        return self.kv_source != self.index


@dataclass(frozen=True)
class PerLayerInputConfig:
    """Per-layer embeddings (E2B, E4B)."""

    vocab_size: int
    width: int


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts beside the dense MLP (26B-A4B)."""

    num_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    sliding_window: int
    rope: Mapping[AttentionKind, RopeConfig]
    rms_norm_eps: float
    final_logit_softcapping: float | None
    per_layer_inputs: PerLayerInputConfig | None
    moe: MoEConfig | None
    tie_word_embeddings: bool
    bidirectional_images: bool
    """Tokens of one image attend to each other in both directions, in sliding layers."""
    max_position_embeddings: int
    pad_token_id: int

    @classmethod
    def from_file(cls, path: Path) -> TextConfig:
        """Read a `config.json`.

        Raises:
            ConfigError: it cannot be read, or as in `from_dict`.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TextConfig:
        """Read a text configuration, or the one inside a whole model's.

        Both ways of writing the heads of full-attention layers are understood: `global_head_dim` with
        `num_global_key_value_heads`, and `per_layer_config`.

        Raises:
            ConfigError: a key is missing, values contradict each other, or something is asked for that no
                published Gemma 4 text model has.
        """
        text = raw.get("text_config", raw)
        _refuse_foreign(text)
        missing = [key for key in _REQUIRED if text.get(key) is None]
        if missing:
            raise ConfigError(f"the text configuration lacks {', '.join(missing)}")
        ple_width = text.get("hidden_size_per_layer_input", 0) or 0
        return cls(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            num_heads=text["num_attention_heads"],
            layers=_layers(text),
            sliding_window=text["sliding_window"],
            rope=_rope(text.get("rope_parameters") or _DEFAULT_ROPE),
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            final_logit_softcapping=text.get("final_logit_softcapping"),
            per_layer_inputs=PerLayerInputConfig(
                vocab_size=text.get("vocab_size_per_layer_input") or text["vocab_size"], width=ple_width
            )
            if ple_width
            else None,
            moe=_moe(text),
            tie_word_embeddings=text.get("tie_word_embeddings", raw.get("tie_word_embeddings", True)),
            bidirectional_images=text.get("use_bidirectional_attention") == "vision",
            max_position_embeddings=text.get("max_position_embeddings", 131_072),
            pad_token_id=text.get("pad_token_id") or 0,
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Head dimension of each layer."""
        return tuple(layer.head_dim for layer in self.layers)

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention that occur, each once."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))


def _refuse_foreign(text: Mapping[str, Any]) -> None:
    """Refuse what would silently be computed wrong."""
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False, None),
        "use_bidirectional_attention": ("vision", None),
        "attn_logit_softcapping": (None,),
    }
    for key, values in supported.items():
        if key in text and text[key] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise ConfigError(f"{key} is {text[key]!r}; this implementation has {wanted}")


def _layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    count = text["num_hidden_layers"]
    kinds = _kinds(text, count)
    first_shared = count - (text.get("num_kv_shared_layers") or 0)
    if first_shared < 0:
        raise ConfigError(f"num_kv_shared_layers is {count - first_shared}, above num_hidden_layers {count}")
    heads = text["num_attention_heads"]
    layers = []
    for index, kind in enumerate(kinds):
        head_dim, kv_heads = _geometry(text, index, kind)
        if head_dim % 2 or heads % kv_heads:
            raise ConfigError(
                f"layer {index}: head_dim {head_dim} must be even, and num_attention_heads {heads} a "
                f"multiple of its {kv_heads} key-value heads"
            )
        wide = bool(text.get("use_double_wide_mlp")) and index >= first_shared
        layers.append(
            LayerConfig(
                index=index,
                kind=kind,
                head_dim=head_dim,
                num_kv_heads=kv_heads,
                keys_are_values=bool(text.get("attention_k_eq_v")) and kind == "full_attention",
                kv_source=_kv_source(kinds, index, first_shared),
                intermediate_size=text["intermediate_size"] * (2 if wide else 1),
            )
        )
    return tuple(layers)


def _kinds(text: Mapping[str, Any], count: int) -> list[AttentionKind]:
    kinds: list[AttentionKind] = list(text.get("layer_types") or ())
    if not kinds:
        kinds = [
            "sliding_attention" if (i + 1) % _DEFAULT_PATTERN else "full_attention" for i in range(count)
        ]
    if len(kinds) != count or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ConfigError(
            f"layer_types must name {count} layers, each sliding_attention or full_attention; "
            f"it names {len(kinds)}: {', '.join(sorted(set(map(str, kinds))))}"
        )
    kinds[-1] = "full_attention"  # as transformers forces it
    return kinds


def _geometry(text: Mapping[str, Any], index: int, kind: AttentionKind) -> tuple[int, int]:
    """Head dimension and number of key-value heads of a layer."""
    head_dim, kv_heads = text["head_dim"], text["num_key_value_heads"]
    if (per_layer := text.get("per_layer_config")) is not None:
        own = per_layer.get(str(index), per_layer.get(index, {}))
        unknown = sorted(set(own) - {"head_dim", "num_key_value_heads"})
        if unknown:
            raise ConfigError(f"per_layer_config[{index}] sets {', '.join(unknown)}, which is not per layer")
        return own.get("head_dim", head_dim), own.get("num_key_value_heads", kv_heads)
    if kind == "sliding_attention":
        return head_dim, kv_heads
    # The number of global heads counts only where keys are values; E2B and E4B keep the common one.
    global_heads = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None
    return text.get("global_head_dim") or _DEFAULT_GLOBAL_HEAD_DIM, global_heads or kv_heads


def _kv_source(kinds: list[AttentionKind], index: int, first_shared: int) -> int:
    """The last layer of the same kind before the shared ones; the layer itself if it is not shared.

    A shared layer without such a predecessor keeps keys and values of its own.
    """
    if index < first_shared:
        return index
    own_kind = [i for i in range(first_shared) if kinds[i] == kinds[index]]
    return own_kind[-1] if own_kind else index


def _rope(parameters: Mapping[str, Any]) -> dict[AttentionKind, RopeConfig]:
    kinds: tuple[AttentionKind, ...] = ("sliding_attention", "full_attention")
    return {kind: _rope_of(kind, parameters[kind]) for kind in kinds if parameters.get(kind)}


def _rope_of(kind: str, parameters: Mapping[str, Any]) -> RopeConfig:
    rope_type = parameters.get("rope_type")
    if rope_type not in ("default", "proportional"):
        raise ConfigError(
            f"rope_parameters.{kind}: rope_type {rope_type!r} is neither default nor proportional"
        )
    if parameters.get("factor", 1.0) != 1.0:
        raise ConfigError(f"rope_parameters.{kind}: no published model scales positions; factor must be 1")
    rotated = parameters.get("partial_rotary_factor", 1.0) if rope_type == "proportional" else 1.0
    return RopeConfig(theta=float(parameters["rope_theta"]), rotated=float(rotated))


def _moe(text: Mapping[str, Any]) -> MoEConfig | None:
    if not text.get("enable_moe_block"):
        return None
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size")
    missing = [key for key in keys if not text.get(key)]
    if missing:
        raise ConfigError(f"enable_moe_block is set, but the configuration lacks {', '.join(missing)}")
    experts, top_k, width = (text[key] for key in keys)
    if top_k > experts:
        raise ConfigError(f"top_k_experts {top_k} is above num_experts {experts}")
    return MoEConfig(num_experts=experts, top_k=top_k, intermediate_size=width)
