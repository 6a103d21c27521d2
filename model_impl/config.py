"""Configuration of the text decoder, from a published `config.json` (fact sheet, section 1.2).

The published keys describe the two kinds of layer; here each layer has its own record, so that no module
works out again what kind it is, how wide its heads are, or whose keys and values it reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_impl.errors import ConfigError

AttentionKind = Literal["sliding_attention", "full_attention"]

_DEFAULT_PATTERN = 6
"""Without `layer_types`, every sixth layer attends to everything."""

_LISTED = 8

Count = Annotated[int, Field(gt=0)]


class Published(BaseModel):
    """Base of the published forms: numbers are numbers, keys of no concern here are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


Form = TypeVar("Form", bound=Published)


class _PublishedRope(Published):
    rope_type: Literal["default", "proportional"]
    rope_theta: Annotated[float, Field(gt=0)]
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    factor: Literal[1, None] = None
    """No published model scales positions."""


class _PublishedRopes(Published):
    sliding_attention: _PublishedRope
    full_attention: _PublishedRope


_DEFAULT_ROPES = _PublishedRopes(
    sliding_attention=_PublishedRope(rope_type="default", rope_theta=10_000.0),
    full_attention=_PublishedRope(
        rope_type="proportional", rope_theta=1_000_000.0, partial_rotary_factor=0.25
    ),
)


class _PublishedLayer(Published):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    head_dim: Count | None = None
    num_key_value_heads: Count | None = None


class _PublishedText(Published):
    """The keys of a text configuration that matter to inference; the values that Gemma 4 has."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    num_global_key_value_heads: Count | None = None
    head_dim: Count
    global_head_dim: Count | None = 512
    per_layer_config: dict[Annotated[int, Field(strict=False, ge=0)], _PublishedLayer] | None = None
    layer_types: list[AttentionKind] | None = None
    sliding_window: Count
    num_kv_shared_layers: Annotated[int, Field(ge=0)] | None = 0
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: Annotated[int, Field(ge=0)] | None = 0
    vocab_size_per_layer_input: Annotated[int, Field(ge=0)] | None = None
    enable_moe_block: bool = False
    num_experts: Count | None = None
    top_k_experts: Count | None = None
    moe_intermediate_size: Count | None = None
    rope_parameters: _PublishedRopes | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    final_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False, None] = False
    attn_logit_softcapping: None = None
    model_type: str | None = None
    use_bidirectional_attention: Literal["vision", None] = None
    tie_word_embeddings: bool | None = None
    max_position_embeddings: Count = 131_072
    pad_token_id: int | None = 0


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
    kv_source: int | None
    """Index of the layer whose keys and values this one attends to: its own, or an earlier layer's. None
    where they are another model's, as a draft model reads its target's."""
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
        return cls.from_dict(read_config(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TextConfig:
        """Read a text configuration, or the one inside a whole model's.

        Both ways of writing the heads of full-attention layers are understood: `global_head_dim` with
        `num_global_key_value_heads`, and `per_layer_config`.

        Raises:
            ConfigError: a key is missing, values contradict each other, or something is asked for that no
                published Gemma 4 text model has.
        """
        text = validated(_PublishedText, raw.get("text_config", raw), "text configuration")
        ropes = text.rope_parameters or _DEFAULT_ROPES
        tied = raw.get("tie_word_embeddings", True) if text.tie_word_embeddings is None else None
        ple_width = text.hidden_size_per_layer_input
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
            layers=_layers(text),
            sliding_window=text.sliding_window,
            rope={
                "sliding_attention": _rope(ropes.sliding_attention),
                "full_attention": _rope(ropes.full_attention),
            },
            rms_norm_eps=text.rms_norm_eps,
            final_logit_softcapping=text.final_logit_softcapping,
            per_layer_inputs=PerLayerInputConfig(
                text.vocab_size_per_layer_input or text.vocab_size, ple_width
            )
            if ple_width
            else None,
            moe=_moe(text) if text.enable_moe_block else None,
            tie_word_embeddings=bool(text.tie_word_embeddings if tied is None else tied),
            bidirectional_images=_image_attention(text) == "vision",
            max_position_embeddings=text.max_position_embeddings,
            pad_token_id=text.pad_token_id or 0,
        )

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Head dimension of each layer."""
        return tuple(layer.head_dim for layer in self.layers)

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention that occur, each once."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))


def _image_attention(text: _PublishedText) -> Literal["vision", None]:
    """Where a file is silent, its class in transformers decides: `vision` for the unified model."""
    said = "use_bidirectional_attention" in text.model_fields_set
    unified = text.model_type == "gemma4_unified_text"
    return "vision" if unified and not said else text.use_bidirectional_attention


def read_config(path: Path) -> dict[str, Any]:
    """The content of a `config.json`.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def validated(form: type[Form], raw: object, what: str) -> Form:
    """A configuration in its published form; `what` names it in errors.

    Raises:
        ConfigError: keys are missing or have values that the form does not take, all of them named.
    """
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or what}: {problem['msg']}"
            + ("" if problem["type"] == "missing" else f", found {str(problem['input'])[:60]}")
            for problem in error.errors()
        ]
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConfigError(f"the {what} does not fit: {'; '.join(problems[:_LISTED])}{more}") from None


def _layers(text: _PublishedText) -> tuple[LayerConfig, ...]:
    count = text.num_hidden_layers
    kinds = _kinds(text)
    first_shared = count - (text.num_kv_shared_layers or 0)
    if first_shared < 0:
        raise ConfigError(f"num_kv_shared_layers is {count - first_shared}, above num_hidden_layers {count}")
    geometry = [_geometry(text, index, kind) for index, kind in enumerate(kinds)]
    _check_geometry(text, kinds, geometry)
    return tuple(
        LayerConfig(
            index=index,
            kind=kind,
            head_dim=geometry[index][0],
            num_kv_heads=geometry[index][1],
            keys_are_values=text.attention_k_eq_v and kind == "full_attention",
            kv_source=_kv_source(kinds, index, first_shared),
            intermediate_size=text.intermediate_size
            * (2 if text.use_double_wide_mlp and index >= first_shared else 1),
        )
        for index, kind in enumerate(kinds)
    )


def _kinds(text: _PublishedText) -> list[AttentionKind]:
    count = text.num_hidden_layers
    kinds: list[AttentionKind] = list(text.layer_types or ())
    if not kinds:
        kinds = [
            "sliding_attention" if (i + 1) % _DEFAULT_PATTERN else "full_attention" for i in range(count)
        ]
    if len(kinds) != count:
        raise ConfigError(
            f"layer_types must name {count} layers, as num_hidden_layers says; it names {len(kinds)}"
        )
    kinds[-1] = "full_attention"  # as transformers forces it
    return kinds


def _geometry(text: _PublishedText, index: int, kind: AttentionKind) -> tuple[int, int]:
    """Head dimension and number of key-value heads of a layer."""
    head_dim, kv_heads = text.head_dim, text.num_key_value_heads
    if text.per_layer_config is not None:
        own = text.per_layer_config.get(index, _PublishedLayer())
        return own.head_dim or head_dim, own.num_key_value_heads or kv_heads
    if kind == "sliding_attention":
        return head_dim, kv_heads
    # The number of global heads counts only where keys are values; E2B and E4B keep the common one.
    global_heads = text.num_global_key_value_heads if text.attention_k_eq_v else None
    return text.global_head_dim or head_dim, global_heads or kv_heads


def _check_geometry(
    text: _PublishedText, kinds: Sequence[AttentionKind], geometry: Sequence[tuple[int, int]]
) -> None:
    beyond = sorted(index for index in text.per_layer_config or () if index >= len(kinds))
    if beyond:
        raise ConfigError(f"per_layer_config names layer {beyond[0]}; there are {len(kinds)}")
    for index, (head_dim, kv_heads) in enumerate(geometry):
        if head_dim % 2 or text.num_attention_heads % kv_heads:
            raise ConfigError(
                f"layer {index}: head_dim {head_dim} must be even, and num_attention_heads "
                f"{text.num_attention_heads} a multiple of its {kv_heads} key-value heads"
            )
        # Layers of a kind share rotary angles, and later ones the keys and values of earlier ones.
        first = kinds.index(kinds[index])
        if geometry[index] != geometry[first]:
            raise ConfigError(
                f"layers {first} and {index} are both {kinds[index]}, but their head dimension and key-value "
                f"heads are {geometry[first]} and {geometry[index]}"
            )


def _kv_source(kinds: Sequence[AttentionKind], index: int, first_shared: int) -> int:
    """The last layer of the same kind before the shared ones; the layer itself if it is not shared.

    A shared layer without such a predecessor keeps keys and values of its own.
    """
    if index < first_shared:
        return index
    own_kind = [i for i in range(first_shared) if kinds[i] == kinds[index]]
    return own_kind[-1] if own_kind else index


def _rope(published: _PublishedRope) -> RopeConfig:
    proportional = published.rope_type == "proportional"
    return RopeConfig(published.rope_theta, published.partial_rotary_factor if proportional else 1.0)


def _moe(text: _PublishedText) -> MoEConfig:
    experts, top_k, width = text.num_experts, text.top_k_experts, text.moe_intermediate_size
    if experts is None or top_k is None or width is None:
        named = {"num_experts": experts, "top_k_experts": top_k, "moe_intermediate_size": width}
        missing = [key for key, value in named.items() if value is None]
        raise ConfigError(f"enable_moe_block is set, but the configuration lacks {', '.join(missing)}")
    if top_k > experts:
        raise ConfigError(f"top_k_experts {top_k} is above num_experts {experts}")
    return MoEConfig(num_experts=experts, top_k=top_k, intermediate_size=width)
