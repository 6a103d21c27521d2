"""The vision tower (fact sheet, section 3.2).

The patches of all images of a batch lie in one row, image after image, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_impl.config import RopeConfig
from model_impl.errors import MediaError
from model_impl.layers import backends, rope
from model_impl.layers.backends import Mask
from model_impl.layers.clipped import ClippedLinear
from model_impl.layers.mlp import gelu_tanh
from model_impl.layers.norm import RMSNorm
from model_impl.media_config import VisionConfig

Angles = tuple[Tensor, Tensor]
"""Cosines and sines [P, 1, 2, d/2]: of the column for one half of a head, of the row for the other."""
_AT_ONCE = 4096
"""Patches that a module works on at a time, or one image if that has more: what it needs meanwhile is many
times its input, and stays in the processor's caches."""
_NOTHING_HIDDEN = Mask(None)


class PatchEmbedder(nn.Module):
    """`W · 2(pixels - 1/2) + table[0][column] + table[1][row]`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(torch.empty(2, config.positions, config.hidden_size))

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """[P, 3 · patch²] and int [P, 2] to [P, D]."""
        columns, rows = self.position_embedding_table
        place = F.embedding(positions[..., 0], columns) + F.embedding(positions[..., 1], rows)
        patches: Tensor = self.input_proj((2 * (pixels - 0.5)).to(columns.dtype))
        return patches + place


class VisionAttention(nn.Module):
    """Every patch of an image attends to every other one."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, d, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        queries, keys, clipped = config.num_heads * d, config.num_kv_heads * d, config.clipped_linears
        self.head_dim = d
        self.q_proj = ClippedLinear(hidden, queries, clipped=clipped)
        self.k_proj = ClippedLinear(hidden, keys, clipped=clipped)
        self.v_proj = ClippedLinear(hidden, keys, clipped=clipped)
        self.o_proj = ClippedLinear(queries, hidden, clipped=clipped)
        self.q_norm = RMSNorm(d, eps)
        self.k_norm = RMSNorm(d, eps)
        self.v_norm = RMSNorm(d, eps, scale=False)

    def forward(self, x: Tensor, angles: Angles, lengths: Sequence[int]) -> Tensor:
        """[P, D], the angles of each patch, and how many patches each image has, to [P, D]."""
        slices = _slices(lengths)
        sizes = [sum(images) for images in slices]
        parts = (tensor.split_with_sizes(sizes) for tensor in (x, *angles))
        return torch.cat([self._attend(*own) for own in zip(slices, *parts, strict=True)])

    def _attend(self, lengths: Sequence[int], x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        q = self._rotate(self.q_norm(self._heads(self.q_proj(x))), (cosines, sines))
        k = self._rotate(self.k_norm(self._heads(self.k_proj(x))), (cosines, sines))
        v = self.v_norm(self._heads(self.v_proj(x)))
        # Neighbours of one length, such as all frames of a video, are a batch without padding.
        batches = [(len(list(images)), length) for length, images in groupby(lengths)]
        parts = (tensor.split_with_sizes([math.prod(batch) for batch in batches]) for tensor in (q, k, v))
        outputs = []
        for batch, *own in zip(batches, *parts, strict=True):
            queries, keys, values = (part.unflatten(0, batch).transpose(1, 2) for part in own)
            seen = backends.sdpa(queries, keys, values, _NOTHING_HIDDEN)
            outputs.append(seen.transpose(1, 2).flatten(0, 1))
        y: Tensor = self.o_proj(torch.cat(outputs).flatten(1))
        return y

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    @staticmethod
    def _rotate(x: Tensor, angles: Angles) -> Tensor:
        return rope.rotate(x.view(*x.shape[:-1], 2, -1), *angles).flatten(-2)


class VisionMLP(nn.Module):
    """`W_down · (gelu_tanh(W_gate · x) * (W_up · x))`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, inner, clipped = config.hidden_size, config.intermediate_size, config.clipped_linears
        self.gate_proj = ClippedLinear(hidden, inner, clipped=clipped)
        self.up_proj = ClippedLinear(hidden, inner, clipped=clipped)
        self.down_proj = ClippedLinear(inner, hidden, clipped=clipped)

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] to [P, D]."""
        return torch.cat([self._transform(part) for part in torch.split(x, _AT_ONCE)])

    def _transform(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(gelu_tanh(self.gate_proj(x)) * self.up_proj(x))
        return down


class VisionLayer(nn.Module):
    """Attention, then an MLP, each between two norms."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)

    def forward(self, x: Tensor, angles: Angles, lengths: Sequence[int]) -> Tensor:
        """[P, D], the angles of each patch, and how many patches each image has, to [P, D]."""
        attended = self.self_attn(self.input_layernorm(x), angles, lengths)
        h = x + self.post_attention_layernorm(attended)
        y: Tensor = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        return y


class VisionEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, angles: Angles, lengths: Sequence[int]) -> Tensor:
        """[P, D], the angles of each patch, and how many patches each image has, to [P, D]."""
        for layer in self.layers:
            x = layer(x, angles, lengths)
        return x


class VisionTower(nn.Module):
    """Patches to soft tokens: embed, encode, average over squares of patches, standardise."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size))
            self.register_buffer("std_scale", torch.ones(config.hidden_size))

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """Soft tokens of all images, one image after the other, row by row; padding leaves no trace.

        Args:
            pixels: [N, P, 3 · patch²] in [0, 1].
            positions: int [N, P, 2]: column and row of each patch; negative at padding.

        Returns:
            [all soft tokens, D], in the dtype of the weights.

        Raises:
            MediaError: the patches do not fit the tower, or a position is beyond its table.
        """
        check_squares(pixels, positions, self.config.patch_size, self.config.positions)
        valid = (positions >= 0).all(dim=-1)
        lengths, pixels, positions = valid.sum(dim=1), pixels[valid], positions[valid]
        x = self.patch_embedder(pixels, positions)
        cosines, sines = rope.angles(positions[None], self._frequencies(x.device), x.dtype)
        x = self.encoder(x, (cosines[0], sines[0]), lengths.tolist())
        pooled = pool(x, positions, lengths, self.config.pooling).float() * self.config.hidden_size**0.5
        # Wide until here: these numbers may be beyond what float16 holds.
        if self.config.standardize:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        y: Tensor = pooled.to(x.dtype)
        return y

    def _frequencies(self, device: torch.device) -> Tensor:
        # Each half of a head is a head of its own that rotates whole.
        half = RopeConfig(theta=self.config.rope_theta, rotated=1.0)
        return rope.inverse_frequencies(half, self.config.head_dim // 2).to(device)


def _slices(lengths: Sequence[int]) -> list[list[int]]:
    """Neighbouring images that are worked on together, by how many patches each has."""
    slices: list[list[int]] = [[]]
    for length in lengths:
        if slices[-1] and sum(slices[-1]) + length > _AT_ONCE:
            slices.append([])
        slices[-1].append(length)
    return slices


def pool(x: Tensor, positions: Tensor, lengths: Tensor, pooling: int) -> Tensor:
    """Means over squares of `pooling` x `pooling` patches.

    Args:
        x: [P, D].
        positions: int [P, 2].
        lengths: int [N]: patches of each image.
        pooling: Patches of a square along each side.

    Returns:
        [all squares, D], in the dtype of `x`: image by image, row by row.

    Raises:
        MediaError: the patches of an image are no grid of whole squares.
    """
    columns, rows = (positions // pooling).unbind(-1)
    image = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    across = torch.zeros_like(lengths).scatter_reduce(0, image, columns.to(lengths.dtype), "amax") + 1
    squares = lengths // pooling**2
    starts = squares.cumsum(0) - squares
    index = starts[image] + rows * across[image] + columns
    total = int(squares.sum())
    if (torch.bincount(index, minlength=total) != pooling**2).any():
        raise MediaError(
            f"the patches of an image are no grid of whole squares of {pooling} x {pooling}: resize it to "
            "multiples of such squares, as `prepare_images` does"
        )
    sums = torch.zeros(total, x.shape[-1], dtype=torch.float32, device=x.device)
    return (sums.index_add_(0, index, x.float()) / pooling**2).to(x.dtype)


def check_squares(pixels: Tensor, positions: Tensor, side: int, places: int) -> None:
    """Refuse what cannot be embedded.

    Args:
        pixels: To be [N, P, 3 · side²].
        positions: To be [N, P, 2], and below `places`.
        side: Pixels of a square along each side.
        places: Rows of the position table.

    Raises:
        MediaError: they are not.
    """
    width = 3 * side**2
    if pixels.ndim != 3 or pixels.shape[-1] != width or positions.shape != (*pixels.shape[:2], 2):
        raise MediaError(
            f"pixels {list(pixels.shape)} with positions {list(positions.shape)} do not fit this model: they "
            f"must be [images, squares, {width}] and [images, squares, 2]; prepare images with its patch size"
        )
    if positions.numel() and (last := int(positions.max())) >= places:
        raise MediaError(
            f"an image has a square in row or column {last}, and the position table ends at {places - 1}; "
            "choose a smaller budget"
        )
