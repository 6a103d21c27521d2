"""Eagle3 draft head in the published layout (fact sheet, section 9).

One Llama layer with keys and values of its own. A pass at position p takes the embedding of token p + 1
beside features of position p: of the target's hidden states at first, then what the pass before returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.checkpoint import load_draft
from model_impl.config import TextConfig
from model_impl.errors import CheckpointError, ModelError
from model_impl.layers import backends, rope
from model_impl.layers.backend_choice import BackendRequest, resolve_backend
from model_impl.layers.backend_table import Device
from model_impl.layers.backends import Mask
from model_impl.layers.norm import RMSNorm
from model_impl.runtime.cache import KVCache
from model_impl.runtime.step import Cache, Step
from model_impl.speculative.eagle3_config import KIND, Eagle3Config

_OLD_LAYER, _LAYER = "midlayer.", "layers.0."


class Eagle3Attention(nn.Module):
    """Grouped-query attention over the embedding and the features side by side."""

    def __init__(self, config: TextConfig, backend: str) -> None:
        super().__init__()
        (layer,) = config.layers
        hidden, heads, d = config.hidden_size, config.num_heads, layer.head_dim
        self.layer = layer
        self.backend = backend
        self.q_proj = nn.Linear(2 * hidden, heads * d, bias=False)
        self.k_proj = nn.Linear(2 * hidden, layer.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(2 * hidden, layer.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(heads * d, hidden, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[B, T, 2H] to [B, T, H]."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rope.rotate(heads, *step.rope[KIND]).transpose(1, 2) for heads in (q, k))
        step.put(self.layer, k, v.transpose(1, 2))
        k, v = step.keys_values(self.layer)
        # The backends do not scale, as Gemma 4 does not.
        q = q * self.layer.head_dim**-0.5
        o = backends.BACKENDS[self.backend](q, k, v, step.masks[KIND])
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(2))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.layer.head_dim)


class SiluMLP(nn.Module):
    """`W_down · (silu(W_gate · x) * (W_up · x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Eagle3Layer(nn.Module):
    """Attention and MLP; the residual stream starts at the features, normed or not."""

    def __init__(self, config: Eagle3Config, backend: str) -> None:
        super().__init__()
        decoder = config.decoder
        hidden, eps = decoder.hidden_size, decoder.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = Eagle3Attention(decoder, backend)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = SiluMLP(hidden, decoder.layers[0].intermediate_size)

    def forward(self, embedding: Tensor, features: Tensor, step: Step) -> Tensor:
        """Twice [B, T, H] to [B, T, H]."""
        u, g = self.input_layernorm(embedding), self.hidden_norm(features)
        residual = g if self.norm_before_residual else features
        r = residual + self.self_attn(torch.cat([u, g], dim=-1), step)
        out: Tensor = r + self.mlp(self.post_attention_layernorm(r))
        return out


class Eagle3(nn.Module):
    """An Eagle3 draft head.

    Args:
        config: As published.
        attention: Backend of its layer; left out, the first that can serve it.
        device: Where it will run, as the choice of a backend depends on it.

    Raises:
        BackendError: the backend asked for cannot serve the layer; those that can are named.
    """

    def __init__(self, config: Eagle3Config, attention: str | None = None, device: Device = "cpu") -> None:
        super().__init__()
        decoder = config.decoder
        backend = resolve_backend(decoder, BackendRequest(backend=attention, device=device)).backend
        taken = len(config.aux_layers) * config.target_hidden_size
        self.config = config
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(taken, decoder.rms_norm_eps)
        self.fc = nn.Linear(taken, decoder.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config, backend)])
        self.norm = RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)
        self.lm_head = nn.Linear(decoder.hidden_size, config.draft_vocab_size, bias=False)
        self.d2t: Tensor
        """What to add to a draft token's id to get the target's."""
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.t2d: Tensor
        """Which of the target's tokens can be drafted; no computation reads it."""
        self.register_buffer("t2d", torch.zeros(decoder.vocab_size, dtype=torch.bool))

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty cache for the keys and values of this head."""
        weight = self.fc.weight
        return KVCache(self.config.decoder, batch_size, weight.dtype, weight.device)

    def features(self, states: Sequence[Tensor]) -> Tensor:
        """The target's hidden states, as they are after each of `aux_layers` layers, to [B, T, H].

        Raises:
            ModelError: there are more or fewer of them.
        """
        if len(states) != len(self.config.aux_layers):
            raise ModelError(
                f"the draft head reads the target's states after {list(self.config.aux_layers)} of its "
                f"layers; {len(states)} were given"
            )
        joined = torch.cat(list(states), dim=-1)
        projected: Tensor = self.fc(self.input_norm(joined) if self.config.norm_before_fc else joined)
        return projected

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        *,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over new positions, the first after those that the cache holds.

        Args:
            input_ids: int [B, T], right-padded: at position p the token p + 1, in the target's ids.
            features: [B, T, H]: at position p what `features` made of the target's states of position p, or
                what the pass before returned for its last position.
            cache: Holds the positions before, and receives these.
            lengths: Valid positions of each row; all T if left out.

        Returns:
            Hidden states [B, T, H] for `logits`, and features [B, T, H] for the next pass.

        Raises:
            CacheError: the cache does not fit the rows or this head.
        """
        batch, width = input_ids.shape
        decoder, dtype = self.config.decoder, self.fc.weight.dtype
        if cache is not None:
            cache.check(decoder, dtype)
            positions, masks = cache.begin(width, [width] * batch if lengths is None else lengths)
        else:
            # Padding stands behind all valid positions, so that none of them sees it.
            positions = torch.arange(width, device=input_ids.device).expand(batch, width)
            masks = {KIND: Mask(None, causal=True)}
        frequencies = rope.inverse_frequencies(decoder.rope[KIND], decoder.head_dims[0])
        angles = rope.angles(positions, frequencies.to(input_ids.device), dtype)
        step = Step({KIND: angles}, masks, cache)
        # Not scaled by the root of the width, unlike the target's.
        out: Tensor = self.layers[0](self.embed_tokens(input_ids), features, step)
        if cache is not None:
            cache.commit()
        return self.norm(out), out

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to [..., draft vocabulary]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids of the draft vocabulary to the target's, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def target_logits(self, logits: Tensor) -> Tensor:
        """[..., draft vocabulary] to [..., vocabulary]; tokens that cannot be drafted get minus infinity."""
        full = logits.new_full((*logits.shape[:-1], self.config.decoder.vocab_size), float("-inf"))
        return full.index_copy(-1, self.target_ids(torch.arange(len(self.d2t), device=logits.device)), logits)


def load_eagle3(
    folder: Path,
    *,
    target_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> Eagle3:
    """Build the draft head of a checkpoint folder and load its weights.

    Args:
        folder: Holds `config.json`, and one or several safetensors files.
        target_layers: As `Eagle3Config.from_dict`.
        dtype: Of parameters and of the computation.
        attention: Backend of its layer; left out, the first that can serve it.

    Raises:
        BackendError: the backend asked for cannot serve the layer.
        ConfigError: as `Eagle3Config.from_file`.
        CheckpointError: no weights, a broken file, or tensors that do not fit.
    """
    config = Eagle3Config.from_file(folder / "config.json", target_layers=target_layers)
    with torch.device("meta"):
        model = Eagle3(config, attention)
    load_draft(model, folder, dtype, _name)
    _check_mapping(model, folder)
    return model


def _name(stored: str) -> str:
    """Older files call the layer `midlayer`."""
    return _LAYER + stored.removeprefix(_OLD_LAYER) if stored.startswith(_OLD_LAYER) else stored


def _check_mapping(model: Eagle3, folder: Path) -> None:
    """The two tables of a checkpoint must agree: a wrong one would draft other tokens in silence."""
    targets = model.target_ids(torch.arange(len(model.d2t)))
    vocab_size = len(model.t2d)
    if bool(((targets < 0) | (targets >= vocab_size)).any()):
        raise CheckpointError(f"{folder}: d2t leads beyond the vocabulary of {vocab_size} tokens")
    if not torch.equal(model.t2d, torch.zeros_like(model.t2d).index_fill(0, targets, True)):
        raise CheckpointError(f"{folder}: t2d does not mark the tokens that d2t leads to")
    if int(model.t2d.sum()) < len(targets):
        raise CheckpointError(f"{folder}: d2t leads to the same token twice")
