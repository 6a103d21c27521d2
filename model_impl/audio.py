"""The audio tower: mel features to soft tokens (fact sheet, section 3.8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.errors import ConfigError, MediaError
from model_impl.layers.clipped import ClippedLinear
from model_impl.layers.norm import RMSNorm
from model_impl.media_config import AudioConfig
from model_impl.preprocess.audio import MEL_BINS


class HalvingConvolution(nn.Module):
    """`relu(LN(conv(x)))`: half as many frames and half as many bins; the norm is over channels."""

    def __init__(self, channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, T, bins] and bool [N, T], both of half the length afterwards.

        Padding is silenced first: the kernel of the last valid frame reaches into it.
        """
        y = self.conv((x * mask[:, None, :, None]).to(self.conv.weight.dtype))
        normed: Tensor = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.relu(normed), mask[:, ::2]


class Subsampling(nn.Module):
    """Two convolutions that together make one frame of four, then a linear."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        first, second = config.channels
        self.layer0 = HalvingConvolution(1, first, config.rms_norm_eps)
        self.layer1 = HalvingConvolution(first, second, config.rms_norm_eps)
        self.input_proj_linear = nn.Linear(MEL_BINS // 4 * second, config.hidden_size, bias=False)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[N, T, bins] and bool [N, T] to [N, T / 4, D] and bool [N, T / 4], rounded up."""
        x, mask = self.layer0(features[:, None], mask)
        x, mask = self.layer1(x, mask)
        y: Tensor = self.input_proj_linear(x.permute(0, 2, 3, 1).flatten(2))
        return y, mask


class FeedForward(nn.Module):
    """`x + w · rms(W2 · silu(W1 · rms(x)))`, with a residual weight `w`."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden, eps, clipped = config.hidden_size, config.rms_norm_eps, config.clipped_linears
        self.config = config
        self.pre_layer_norm = RMSNorm(hidden, eps)
        self.ffw_layer_1 = ClippedLinear(hidden, 4 * hidden, clipped=clipped)
        self.ffw_layer_2 = ClippedLinear(4 * hidden, hidden, clipped=clipped)
        self.post_layer_norm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        y = self.pre_layer_norm(clamp(x, self.config.clamp))
        y = self.ffw_layer_2(F.silu(self.ffw_layer_1(y)))
        y = self.post_layer_norm(clamp(y, self.config.clamp))
        out: Tensor = x + self.config.residual_weight * y
        return out


class LocalAttention(nn.Module):
    """Each frame attends to itself and a few before it; computed in float32, block by block.

    The logit at distance δ is `cap · tanh((q · k + q · r[δ]) / cap)`, where `r` is a projected sinusoid.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden, clipped = config.hidden_size, config.clipped_linears
        self.config = config
        self.head_dim = hidden // config.num_heads
        self.q_proj = ClippedLinear(hidden, hidden, clipped=clipped)
        self.k_proj = ClippedLinear(hidden, hidden, clipped=clipped)
        self.v_proj = ClippedLinear(hidden, hidden, clipped=clipped)
        self.post = ClippedLinear(hidden, hidden, clipped=clipped)
        self.relative_k_proj = nn.Linear(hidden, hidden, bias=False)
        self.per_dim_scale = nn.Parameter(torch.zeros(self.head_dim))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D].

        `allowed` is bool [N, 1, blocks, chunk, context]: the keys that each query sees, of those that its
        block can reach.
        """
        chunk, past, cap = self.config.chunk_size, self.config.context_left - 1, self.config.logit_cap
        # softplus(0) is ln 2: a parameter of zero leaves 1/sqrt(d). Keys always have softplus(1) / ln 2.
        q = self._heads(self.q_proj(x)) * (self.head_dim**-0.5 / math.log(2)) * F.softplus(self.per_dim_scale)
        k = self._heads(self.k_proj(x)) * (math.log(1 + math.e) / math.log(2))
        q, k, v = (
            contexts(q, chunk, 0),
            contexts(k, chunk, past),
            contexts(self._heads(self.v_proj(x)), chunk, past),
        )
        r = self._heads(self.relative_k_proj(sinusoids(past, x)))
        by_distance = torch.einsum("nhbqd,phd->nhbqp", q, r)
        distance = distances(chunk, past, x.device).clamp(0, past)
        logits = q @ k.mT + by_distance.gather(-1, distance.expand(*q.shape[:-1], -1))
        logits = cap * torch.tanh(logits / cap)
        o = torch.softmax(logits.masked_fill(~allowed, self.config.masked_logit), dim=-1) @ v
        o = o.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)[:, : x.shape[1]]
        y: Tensor = self.post(o.to(x.dtype))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).to(torch.promote_types(x.dtype, torch.float32))


class LightConvolution(nn.Module):
    """`x + W_b · silu(rms(conv(glu(W_a · rms(x)))))`: a causal convolution, each channel by itself."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden, eps, clipped = config.hidden_size, config.rms_norm_eps, config.clipped_linears
        self.config = config
        self.pre_layer_norm = RMSNorm(hidden, eps)
        self.linear_start = ClippedLinear(hidden, 2 * hidden, clipped=clipped)
        self.depthwise_conv1d = nn.Conv1d(hidden, hidden, config.conv_kernel, groups=hidden, bias=False)
        self.conv_norm = RMSNorm(hidden, eps)
        self.linear_end = ClippedLinear(hidden, hidden, clipped=clipped)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        y = F.glu(self.linear_start(self.pre_layer_norm(x)), dim=-1)
        y = self.depthwise_conv1d(F.pad(y.mT, (self.config.conv_kernel - 1, 0))).mT
        y = F.silu(self.conv_norm(clamp(y, self.config.clamp)))
        out: Tensor = x + self.linear_end(y)
        return out


class ConformerLayer(nn.Module):
    """Half a feed-forward network, attention, convolution, the other half, and a norm."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.feed_forward1 = FeedForward(config)
        self.norm_pre_attn = RMSNorm(hidden, eps)
        self.self_attn = LocalAttention(config)
        self.norm_post_attn = RMSNorm(hidden, eps)
        self.lconv1d = LightConvolution(config)
        self.feed_forward2 = FeedForward(config)
        self.norm_out = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]; `allowed` as in `LocalAttention`."""
        x = self.feed_forward1(x)
        attended = self.self_attn(self.norm_pre_attn(clamp(x, self.config.clamp)), allowed)
        x = x + self.norm_post_attn(clamp(attended, self.config.clamp))
        x = self.feed_forward2(self.lconv1d(x))
        y: Tensor = self.norm_out(clamp(x, self.config.clamp))
        return y


class AudioTower(nn.Module):
    """Mel features to soft tokens, four frames to one.

    Args:
        config: The tower's.
        keys: How many frames a frame attends to, itself included. Left out, one less than
            `attention_context_left`, as in transformers and vLLM (12 in published models); the first-party
            implementation has `attention_context_left` (13).

    Raises:
        ConfigError: neither of these numbers, or a block is not as long as what it sees of the past.
    """

    def __init__(self, config: AudioConfig, keys: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.keys = config.context_left - 1 if keys is None else keys
        if self.keys not in (config.context_left - 1, config.context_left) or self.keys < 1:
            raise ConfigError(
                f"audio attention over {self.keys} keys: with attention_context_left {config.context_left} "
                f"transformers has {config.context_left - 1} and the first-party implementation one more"
            )
        if config.chunk_size not in (config.context_left - 1, config.context_left):
            # Elsewhere transformers' table of positions, half a context long, ends at another distance.
            raise ConfigError(
                f"audio_config: attention_chunk_size {config.chunk_size} must be attention_context_left "
                f"{config.context_left}, or one less as in published models"
            )
        self.subsample_conv_projection = Subsampling(config)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))
        self.output_proj = nn.Linear(config.hidden_size, config.output_size)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Soft tokens of all clips, one clip after the other; padding leaves no trace.

        Args:
            features: [N, T, 128], as `prepare_audio` makes them.
            mask: bool [N, T]; false at padding.

        Returns:
            [all soft tokens, width of the output], in the dtype of the weights.

        Raises:
            MediaError: the features are not of that form, stretches of the unified model for example.
        """
        if features.ndim != 3 or features.shape[-1] != MEL_BINS or mask.shape != features.shape[:2]:
            raise MediaError(
                f"audio features {list(features.shape)} with a mask {list(mask.shape)} do not fit this "
                f"model: they must be [clips, frames, {MEL_BINS}] and [clips, frames]; `prepare_audio` makes "
                "such"
            )
        if features.numel() == 0:  # clips that are too short for a frame: a convolution refuses them
            return self.output_proj.weight.new_empty(0, self.config.output_size)
        x, valid = self.subsample_conv_projection(features, mask)
        allowed = local_mask(valid, self.config.chunk_size, self.config.context_left - 1, self.keys)
        for layer in self.layers:
            x = layer(x, allowed)
        soft: Tensor = self.output_proj(x[valid])
        return soft


def clamp(x: Tensor, limit: float) -> Tensor:
    """Between `-limit` and `limit`, or the largest numbers that the dtype has."""
    bound = min(limit, torch.finfo(x.dtype).max)
    return x.clamp(-bound, bound)


def contexts(x: Tensor, chunk: int, past: int) -> Tensor:
    """Blocks of `chunk` frames, each with the `past` frames before it: [N, T, n, d] to [N, n, blocks, _, d].

    What is before the first frame and behind the last is zero.
    """
    behind = -x.shape[1] % chunk
    return F.pad(x, (0, 0, 0, 0, past, behind)).unfold(1, chunk + past, chunk).permute(0, 2, 1, 4, 3)


def distances(chunk: int, past: int, device: torch.device) -> Tensor:
    """How far back each key of a context is from each query of its block: int [chunk, context]."""
    queries = torch.arange(chunk, device=device)[:, None] + past
    return queries - torch.arange(chunk + past, device=device)


def local_mask(valid: Tensor, chunk: int, past: int, keys: int) -> Tensor:
    """The keys that each query sees: valid ones at distances 0 to `keys` - 1.

    Args:
        valid: bool [N, T].
        chunk: Queries of a block.
        past: Frames of a block's context before its first query.
        keys: Most keys of a query.

    Returns:
        bool [N, 1, blocks, chunk, context].
    """
    distance = distances(chunk, past, valid.device)
    context = contexts(valid[:, :, None, None], chunk, past)[..., 0]
    return context[:, :, :, None] & (distance >= 0) & (distance < keys)


def sinusoids(past: int, like: Tensor) -> Tensor:
    """Sines then cosines of the distances 0 to `past`: [past + 1, D], in the dtype and width of `like`.

    Periods grow geometrically from 2π to 20 000π.
    """
    half = like.shape[-1] // 2
    steps = torch.arange(half, device=like.device) / max(half - 1, 1)
    angles = torch.arange(past + 1, device=like.device)[:, None] * torch.exp(-math.log(10_000.0) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
