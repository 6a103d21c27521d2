"""The published draft models, which read the keys and values of their target (fact sheet, section 4.2).

Four Gemma 4 layers with queries alone. A draft step takes the embedding of the newest token and the hidden
state before it, and returns logits and the hidden state to feed back; nothing is kept between steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.checkpoint import load_draft
from model_impl.config import (
    AttentionKind,
    Count,
    LayerConfig,
    Published,
    TextConfig,
    read_config,
    validated,
)
from model_impl.errors import CacheError, CheckpointError, ConfigError
from model_impl.layers import rope
from model_impl.layers.backend_choice import BackendRequest, resolve_backend
from model_impl.layers.backend_table import Device
from model_impl.layers.backends import Mask
from model_impl.layers.norm import RMSNorm
from model_impl.runtime.masks import visible
from model_impl.runtime.step import Step
from model_impl.text import DecoderLayer


class _PublishedText(Published):
    """What a draft model's text configuration has beyond `TextConfig`'s own rules."""

    num_hidden_layers: Count
    num_kv_shared_layers: Annotated[int, Field(ge=0)] | None = None
    hidden_size_per_layer_input: Literal[0, None] = None
    enable_moe_block: Literal[False] = False
    use_double_wide_mlp: Literal[False] = False
    final_logit_softcapping: None = None
    tie_word_embeddings: Literal[True, None] = None


class _PublishedAssistant(Published):
    model_type: Literal["gemma4_assistant", "gemma4_unified_assistant"]
    text_config: _PublishedText
    backbone_hidden_size: Count
    use_ordered_embeddings: bool = False
    num_centroids: Count = 2048
    centroid_intermediate_top_k: Count = 32
    tie_word_embeddings: Literal[True, None] = None


@dataclass(frozen=True)
class CentroidConfig:
    """A head that scores the tokens of the likeliest clusters alone (E2B, E4B)."""

    clusters: int
    top_k: int


@dataclass(frozen=True)
class AssistantConfig:
    """A draft model."""

    text: TextConfig
    """Its own decoder. The keys and values of all layers come from the target: `kv_source` is None."""
    target_hidden_size: int
    centroids: CentroidConfig | None

    @classmethod
    def from_file(cls, path: Path) -> AssistantConfig:
        """Read a `config.json`.

        Raises:
            ConfigError: it cannot be read, or as in `from_dict`.
        """
        return cls.from_dict(read_config(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AssistantConfig:
        """Read a configuration as published.

        Raises:
            ConfigError: a key is missing, values contradict each other, or something is asked for that no
                published draft model has.
        """
        published = validated(_PublishedAssistant, raw, "assistant configuration")
        layers, shared = published.text_config.num_hidden_layers, published.text_config.num_kv_shared_layers
        # As transformers has it, none means all: a draft model has no keys and values of its own.
        if shared not in (None, 0, layers):
            raise ConfigError(
                f"text_config.num_kv_shared_layers is {shared}; all {layers} layers of an assistant share"
            )
        text = TextConfig.from_dict(raw)
        return cls(
            text=replace(text, layers=tuple(replace(layer, kv_source=None) for layer in text.layers)),
            target_hidden_size=published.backbone_hidden_size,
            centroids=_centroids(published, text.vocab_size) if published.use_ordered_embeddings else None,
        )

    def check_target(self, target: TextConfig) -> None:
        """Refuse a target that this draft model was not made for.

        Raises:
            ConfigError: its tokens, hidden states, or keys and values do not fit.
        """
        sources = kv_layers(target)
        pairs: list[tuple[str, object, object]] = [
            ("vocabulary", self.text.vocab_size, target.vocab_size),
            ("target's hidden size", self.target_hidden_size, target.hidden_size),
        ]
        for kind, own in kv_layers(self.text).items():
            source = sources.get(kind)
            heads = (source.num_kv_heads, source.head_dim) if source else None
            pairs += [
                (f"key-value heads and head dimension in {kind}", (own.num_kv_heads, own.head_dim), heads),
                (f"rotary embedding in {kind}", self.text.rope[kind], target.rope[kind]),
            ]
        if "sliding_attention" in self.text.kinds:
            pairs.append(("sliding window", self.text.sliding_window, target.sliding_window))
        differ = [f"{what} {mine} against {other}" for what, mine, other in pairs if mine != other]
        if differ:
            raise ConfigError(
                f"the assistant does not fit this target: {'; '.join(differ)}; take the one made for it"
            )


def kv_layers(config: TextConfig) -> dict[AttentionKind, LayerConfig]:
    """Of each kind the layer whose keys and values later ones read: the last with its own.

    In a draft model, where no layer has its own, the last.
    """
    return {layer.kind: layer for layer in config.layers if not layer.shares_kv or layer.kv_source is None}


@dataclass(frozen=True)
class TargetKV:
    """Keys and values of the target that the layers of one kind read."""

    k: Tensor
    """[B, g, S, d], normed and rotated, as the target's cache holds them."""
    v: Tensor
    """[B, g, S, d]."""
    positions: Tensor
    """int [B, S], in any order; negative where there is no key."""


class CentroidHead(nn.Module):
    """Logits of the tokens of the likeliest clusters.

    Args:
        hidden_size: h, of the draft model.
        vocab_size: A multiple of the number of clusters.
        config: Clusters.
    """

    def __init__(self, hidden_size: int, vocab_size: int, config: CentroidConfig) -> None:
        super().__init__()
        self.config = config
        self.centroids = nn.Linear(hidden_size, config.clusters, bias=False)
        self.token_ordering: Tensor
        """Token ids, cluster by cluster."""
        self.register_buffer("token_ordering", torch.arange(vocab_size))

    def forward(self, s: Tensor, embeddings: Tensor) -> Tensor:
        """[..., h] and the table [vocabulary, h] to [..., vocabulary].

        Tokens that are not scored get the row's lowest score minus one, as in transformers (which takes the
        lowest of all rows, and drafts one); in vLLM the lowest number that there is.
        """
        likeliest = self.centroids(s).topk(self.config.top_k, dim=-1).indices
        tokens = self.token_ordering.view(self.config.clusters, -1)[likeliest].flatten(-2)
        scores = (F.embedding(tokens, embeddings) @ s[..., None]).squeeze(-1)
        rest = scores.amin(dim=-1, keepdim=True) - 1
        return rest.repeat_interleave(len(embeddings), dim=-1).scatter(-1, tokens, scores)


class DraftDecoder(nn.Module):
    """The part that published names call `model`."""

    def __init__(self, config: TextConfig, backend: str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        """Serves as the head alone: a draft step starts from the target's embedding."""
        self.layers = nn.ModuleList(DecoderLayer(config, layer, backend) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, z: Tensor, step: Step) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        for layer in self.layers:
            z = layer(z, None, step)
        normed: Tensor = self.norm(z)
        return normed


class Assistant(nn.Module):
    """A draft model.

    Args:
        config: As published.
        attention: Backend of all layers; left out, the first that can serve them.
        device: Where it will run, as the choice of a backend depends on it.

    Raises:
        BackendError: the backend asked for cannot serve the layers; those that can are named.
    """

    def __init__(self, config: AssistantConfig, attention: str | None = None, device: Device = "cpu") -> None:
        super().__init__()
        self.config = config
        backend = resolve_backend(config.text, BackendRequest(backend=attention, device=device)).backend
        hidden, target_hidden = config.text.hidden_size, config.target_hidden_size
        self.pre_projection = nn.Linear(2 * target_hidden, hidden, bias=False)
        self.model = DraftDecoder(config.text, backend)
        self.post_projection = nn.Linear(hidden, target_hidden, bias=False)
        if config.centroids is not None:
            self.masked_embedding = CentroidHead(hidden, config.text.vocab_size, config.centroids)

    def forward(
        self, embedding: Tensor, hidden: Tensor, positions: Tensor, target: Mapping[AttentionKind, TargetKV]
    ) -> tuple[Tensor, Tensor]:
        """One draft step; H is the target's hidden size, and T is 1 in drafting.

        All steps of a round have the same positions, keys and values. Every query sees all keys of full
        layers, and of sliding ones the newest `sliding_window` (transformers: one more).

        Args:
            embedding: [B, T, H], the target's of the newest token, scaled as the target scales it.
            hidden: [B, T, H], of the token before: the target's after its final norm, then what the step
                before returned.
            positions: int [B, T]. Transformers gives the position of the newest token, which the target has
                not processed yet, vLLM the one before it, which is the newest that it has: acceptance may
                differ, the accepted text cannot.
            target: For each kind of layer, of the target's last layer with keys and values of its own.

        Returns:
            Logits [B, T, vocabulary], and the hidden state [B, T, H] for the next step.

        Raises:
            CacheError: keys and values are missing or do not fit.
        """
        z = self.pre_projection(torch.cat([embedding, hidden], dim=-1))
        s = self.model(z, self._step(positions, target))
        feedback: Tensor = self.post_projection(s)
        return self.logits(s), feedback

    def logits(self, s: Tensor) -> Tensor:
        """[..., h] to [..., vocabulary], without a soft cap."""
        embeddings = self.model.embed_tokens.weight
        if self.config.centroids is None:
            return F.linear(s, embeddings)
        logits: Tensor = self.masked_embedding(s, embeddings)
        return logits

    def _step(self, positions: Tensor, target: Mapping[AttentionKind, TargetKV]) -> Step:
        text, dtype = self.config.text, self.pre_projection.weight.dtype
        angles, masks, given = {}, {}, {}
        for kind, layer in kv_layers(text).items():
            if kind not in target:
                raise CacheError(f"the target's keys and values of {kind} layers are missing")
            kv = target[kind]
            self._check(layer, kv, len(positions))
            frequencies = rope.inverse_frequencies(text.rope[kind], layer.head_dim).to(positions.device)
            angles[kind] = rope.angles(positions, frequencies, dtype)
            masks[kind] = self._mask(kind, kv.positions)
            given[kind] = kv.k, kv.v
        return Step(angles, masks, None, given)

    @staticmethod
    def _check(layer: LayerConfig, kv: TargetKV, rows: int) -> None:
        expected = (rows, layer.num_kv_heads, kv.positions.shape[-1], layer.head_dim)
        if kv.k.shape != expected or kv.v.shape != expected or kv.positions.shape != expected[::2]:
            raise CacheError(
                f"{layer.kind}: keys {list(kv.k.shape)}, values {list(kv.v.shape)} and their positions "
                f"{list(kv.positions.shape)} do not fit {rows} rows of {layer.num_kv_heads} heads of size "
                f"{layer.head_dim}; hand over those of the target's last layer of this kind that has its own"
            )

    def _mask(self, kind: AttentionKind, keys: Tensor) -> Mask:
        """The newest key is what the window counts from: `positions` may lie beyond it."""
        newest = keys.amax(dim=1, keepdim=True)
        if bool((newest < 0).any()):
            raise CacheError(f"{kind}: a row has no key; the target must have processed a token of each")
        seen = visible(newest, keys, self.config.text.sliding_window if kind == "sliding_attention" else None)
        return Mask(None) if bool(seen.all()) else Mask(seen)


def load_assistant(
    folder: Path, *, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> Assistant:
    """Build the draft model of a checkpoint folder and load its weights.

    Args:
        folder: Holds `config.json`, and one or several safetensors files.
        dtype: Of parameters and of the computation.
        attention: Backend of all layers; left out, the first that can serve them.

    Raises:
        BackendError: the backend asked for cannot serve the layers.
        ConfigError: as `AssistantConfig.from_file`.
        CheckpointError: no weights, a broken file, or tensors that do not fit.
    """
    config = AssistantConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        model = Assistant(config, attention)
    load_draft(model, folder, dtype)
    if config.centroids is not None:
        ids, count = model.masked_embedding.token_ordering, config.text.vocab_size
        if bool(((ids < 0) | (ids >= count)).any()):
            raise CheckpointError(
                f"{folder}: masked_embedding.token_ordering has ids beyond the vocabulary of {count} tokens"
            )
    return model


def _centroids(published: _PublishedAssistant, vocab_size: int) -> CentroidConfig:
    clusters, top_k = published.num_centroids, published.centroid_intermediate_top_k
    if vocab_size % clusters:
        raise ConfigError(f"vocab_size {vocab_size} must be a multiple of num_centroids {clusters}")
    if top_k > clusters:
        raise ConfigError(f"centroid_intermediate_top_k {top_k} is above num_centroids {clusters}")
    return CentroidConfig(clusters, top_k)
