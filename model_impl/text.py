"""The text decoder (fact sheet, section 2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.config import AttentionKind, LayerConfig, TextConfig
from model_impl.errors import CacheError, ModelError
from model_impl.layers import rope
from model_impl.layers.attention import Attention
from model_impl.layers.backend_choice import BackendRequest, resolve_backend
from model_impl.layers.backend_table import Device
from model_impl.layers.backends import Mask
from model_impl.layers.mlp import MLP, gelu_tanh
from model_impl.layers.moe import Experts, Router
from model_impl.layers.norm import RMSNorm
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import BlockMode, Blocks, visible, without_long
from model_impl.runtime.step import Cache, Step


class ScaledEmbedding(nn.Embedding):
    """An embedding times the root of its width, which is rounded to the weight's dtype first."""

    def __init__(self, rows: int, width: int, scaled_width: int) -> None:
        super().__init__(rows, width)
        self.scale = scaled_width**0.5

    def reset_parameters(self) -> None:
        """As any embedding; where there is nothing to draw, torch would import half of itself to find out."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] to [..., width]."""
        return F.embedding(ids, self.weight) * self.rounded_scale(self.weight)

    def low_rank(self, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """See `LowRankModule`; `a` is [r, rows], and `b` [width, r]."""
        return F.linear(F.embedding(ids, a.T), b) * self.rounded_scale(a)

    def rounded_scale(self, like: Tensor) -> Tensor:
        """The root of the width in the dtype, and on the device, of a tensor."""
        return torch.tensor(self.scale, dtype=like.dtype, device=like.device)


class TiedHead(nn.Module):
    """The embedding's weight as the head; a module, so that what acts on modules can act on it."""

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary]."""
        return F.linear(hidden, weight)


def check_aux_layers(aux_layers: Sequence[int], layers: int) -> None:
    """Refuse a choice of states that a model of so many layers cannot give, or would give twice.

    Raises:
        ModelError: it is not distinct, ascending, and from 0 to the number of layers.
    """
    ordered = all(a < b for a, b in itertools.pairwise(aux_layers))
    if not ordered or any(not 0 <= index <= layers for index in aux_layers):
        raise ModelError(
            f"states are wanted after {list(aux_layers)} layers; name distinct, ascending numbers from 0 to "
            f"{layers}, the number of layers"
        )


class DecoderLayer(nn.Module):
    """Attention, then a dense MLP (and experts beside it), then the gated per-layer input."""

    def __init__(self, config: TextConfig, layer: LayerConfig, backend: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, backend)
        self.mlp = MLP(hidden, layer.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.layer_scalar: Tensor
        self.register_buffer("layer_scalar", torch.ones(1))
        self.has_experts = config.moe is not None
        if config.moe is not None:
            self.router = Router(hidden, config.moe, eps)
            self.experts = Experts(hidden, config.moe)
            self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        if config.per_layer_inputs is not None:
            width = config.per_layer_inputs.width
            self.per_layer_input_gate = nn.Linear(hidden, width, bias=False)
            self.per_layer_projection = nn.Linear(width, hidden, bias=False)
            self.post_per_layer_input_norm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, per_layer_input: Tensor | None, step: Step) -> Tensor:
        """[B, T, H] to [B, T, H]; `per_layer_input` is [B, T, width] where the model has such inputs."""
        h: Tensor = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step))
        f = self.mlp(self.pre_feedforward_layernorm(h))
        if self.has_experts:
            f = self.post_feedforward_layernorm_1(f) + self.post_feedforward_layernorm_2(self.route(h))
        h = h + self.post_feedforward_layernorm(f)
        if per_layer_input is not None:
            gated = gelu_tanh(self.per_layer_input_gate(h)) * per_layer_input
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return h * self.layer_scalar

    def route(self, h: Tensor) -> Tensor:
        """The experts' part: they see the normed residual stream, the router the stream itself."""
        tokens = h.flatten(0, 1)
        _, weights, experts = self.router(tokens)
        mixed: Tensor = self.experts(self.pre_feedforward_layernorm_2(tokens), experts, weights)
        return mixed.view_as(h)


@dataclass(frozen=True)
class SoftTokens:
    """What stands in the place of token embeddings: images, frames and sound, as the decoder sees them."""

    where: Tensor
    """bool [B, T]."""
    features: Tensor
    """[n, H], one for each place, row by row."""
    blocks: Tensor
    """int [B, T]: the same number for tokens that see each other both ways; `NO_BLOCK` for all others."""

    def columns(self, start: int, stop: int) -> SoftTokens:
        """Those of some columns."""
        column = self.where.nonzero(as_tuple=True)[1]
        inside = (column >= start) & (column < stop)
        return SoftTokens(self.where[:, start:stop], self.features[inside], self.blocks[:, start:stop])


@dataclass(frozen=True)
class States:
    """What one forward pass leaves for the head and for a draft."""

    hidden: Tensor
    """After the final norm, [B, T, H]."""
    aux: tuple[Tensor, ...]
    """The residual stream after so many layers as were asked for, each [B, T, H]: as many as were asked
    for, one and none included."""


class TextPart(nn.Module):
    """What the whole text decoder and one stage of it share: how a pass begins, and how it ends.

    Args:
        config: The text decoder's.
        attention: Backend of all layers; left out, the first that can serve them.
        device: Where it will run, as the choice of a backend depends on it.
        long_blocks: What becomes of an image that is longer than the window.

    Raises:
        BackendError: the backend asked for cannot serve the model; those that can are named.
    """

    PAIR_SCALE = 2.0**-0.5
    """Keeps the sum of the token's and the context's part of a per-layer input at unit variance."""

    ends = True
    """Whether it holds the last layers, the final norm and the head."""

    embed_tokens: ScaledEmbedding
    norm: RMSNorm
    lm_head: nn.Module
    embed_tokens_per_layer: ScaledEmbedding
    per_layer_model_projection: nn.Linear
    per_layer_projection_norm: RMSNorm

    def __init__(
        self,
        config: TextConfig,
        attention: str | None = None,
        device: Device = "cpu",
        long_blocks: BlockMode = "clamp_past",
    ) -> None:
        super().__init__()
        self.config = config
        self.long_blocks = long_blocks
        request = BackendRequest(backend=attention, device=device, images=config.bidirectional_images)
        self.backend = resolve_backend(config, request).backend
        """The one that the rule chose; what the layers run is `attention_backend`."""
        self._frequencies: dict[tuple[AttentionKind, torch.device], Tensor] = {}

    @property
    def attention_backend(self) -> str:
        """The backend that the layers run, read back from them."""
        return ", ".join(sorted({m.backend for m in self.modules() if isinstance(m, Attention)}))

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and of the computation."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.parameters()).device

    def begin(
        self, ids: Tensor, lengths: Sequence[int] | None, cache: Cache | None, blocks: Tensor | None
    ) -> Step:
        """What all layers of a pass share; arguments as in `TextModel.states`.

        Raises:
            CacheError: as `TextModel.states`.
        """
        batch, width = ids.shape
        counts = [width] * batch if lengths is None else list(lengths)
        if len(counts) != batch or not all(0 <= count <= width for count in counts):
            raise CacheError(f"lengths {counts} do not fit input_ids of {batch} rows and {width} columns")
        return self._step(width, counts, cache, ids.device, blocks)

    def embed(self, ids: Tensor, soft: SoftTokens | None) -> tuple[Tensor, Tensor | None]:
        """The residual stream before the first layer, [B, T, H], and what `per_layer_inputs` gives."""
        if soft is not None:
            ids = torch.where(soft.where, self.config.pad_token_id, ids)
        x = self.embed_tokens(ids)
        if soft is not None:
            x = x.masked_scatter(soft.where[..., None], soft.features.to(x.dtype))
        return x, self.per_layer_inputs(ids, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., vocabulary], soft-capped: `cap · tanh(logits / cap)`."""
        tied = (self.embed_tokens.weight,) if self.config.tie_word_embeddings else ()
        logits: Tensor = self.lm_head(hidden, *tied)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def per_layer_inputs(self, ids: Tensor, x: Tensor) -> Tensor | None:
        """What each layer gets beside the residual stream: [B, T, layers, width], or None.

        A part that depends on the token alone, from a table packed layer by layer (its padding row where a
        soft token stands), and a part that is projected from the embedded input.
        """
        if (ple := self.config.per_layer_inputs) is None:
            return None
        shape = (len(self.config.layers), ple.width)
        context = self.per_layer_model_projection(x) * self.config.hidden_size**-0.5
        context = self.per_layer_projection_norm(context.view(*ids.shape, *shape))
        identity = self.embed_tokens_per_layer(ids).view(*ids.shape, *shape)
        inputs: Tensor = (context + identity) * self.PAIR_SCALE
        return inputs

    def _step(
        self,
        width: int,
        counts: list[int],
        cache: Cache | None,
        device: torch.device,
        blocks: Tensor | None,
    ) -> Step:
        dtype = self.dtype
        if not self.config.bidirectional_images:
            blocks = None
        if blocks is not None and self.long_blocks == "drop":
            blocks = without_long(blocks, self.config.sliding_window)
        if cache is not None:
            cache.check(self.config, dtype)
            positions, masks = cache.begin(width, counts, blocks, self.long_blocks)
        else:
            positions = torch.arange(width, device=device).expand(len(counts), width)
            masks = {kind: self._mask(kind, positions, blocks) for kind in self.config.kinds}
        angles = {
            kind: rope.angles(positions, self._inverse_frequencies(kind, device), dtype)
            for kind in self.config.kinds
        }
        return Step(angles, masks, cache)

    def _mask(self, kind: AttentionKind, positions: Tensor, blocks: Tensor | None) -> Mask:
        """Without a cache; padding stands behind all valid tokens, so that no valid query sees it."""
        window = self.config.sliding_window if kind == "sliding_attention" else None
        if window is None or (positions.shape[1] <= window and blocks is None):
            return Mask(None, causal=True)
        own = None if blocks is None else Blocks(blocks, blocks, self.long_blocks)
        return Mask(visible(positions, positions, window, own))

    def _inverse_frequencies(self, kind: AttentionKind, device: torch.device) -> Tensor:
        if (kind, device) not in self._frequencies:
            head_dim = next(layer.head_dim for layer in self.config.layers if layer.kind == kind)
            made = rope.inverse_frequencies(self.config.rope[kind], head_dim)
            self._frequencies[kind, device] = made.to(device)
        return self._frequencies[kind, device]


class TextModel(TextPart):
    """Token ids to hidden states and logits; arguments and errors as `TextPart`."""

    def __init__(
        self,
        config: TextConfig,
        attention: str | None = None,
        device: Device = "cpu",
        long_blocks: BlockMode = "clamp_past",
    ) -> None:
        super().__init__(config, attention, device, long_blocks)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, self.backend) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = TiedHead()
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if (ple := config.per_layer_inputs) is not None:
            packed = len(config.layers) * ple.width
            self.embed_tokens_per_layer = ScaledEmbedding(ple.vocab_size, packed, ple.width)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, packed, bias=False)
            self.per_layer_projection_norm = RMSNorm(ple.width, config.rms_norm_eps)

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache of so many rows, for this model."""
        return KVCache(self.config, rows, self.dtype, self.device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
        soft: SoftTokens | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, H]: `states` without those for a draft."""
        return self.states(input_ids, cache=cache, lengths=lengths, soft=soft).hidden

    def states(
        self,
        input_ids: Tensor,
        *,
        aux_layers: Sequence[int] = (),
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
        soft: SoftTokens | None = None,
    ) -> States:
        """One pass over new tokens.

        Args:
            input_ids: int [B, T], right-padded.
            aux_layers: After how many layers the residual stream is wanted as well, distinct and ascending;
                0 is the scaled embedding.
            cache: Holds the tokens before these, and receives these.
            lengths: Valid tokens of each row; all T if left out.
            soft: What stands in the place of tokens; the ids there are not looked at.

        Returns:
            Hidden states; what stands at padding means nothing.

        Raises:
            CacheError: `lengths` does not fit the rows, or the cache does not fit them or the model.
            ModelError: `aux_layers` is not distinct, ascending, and within the model.
        """
        check_aux_layers(aux_layers, len(self.layers))
        step = self.begin(input_ids, lengths, cache, None if soft is None else soft.blocks)
        x, per_layer = self.embed(input_ids, soft)
        aux = [x] if 0 in aux_layers else []
        for index, layer in enumerate(self.layers):
            x = layer(x, None if per_layer is None else per_layer[:, :, index], step)
            if index + 1 in aux_layers:
                aux.append(x)
        if cache is not None:
            cache.commit()
        return States(self.norm(x), tuple(aux))
