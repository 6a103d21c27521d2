"""Comparing the tensors of two forward passes. Needs torch, so it is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class TensorFileError(Exception):
    """A file of tensors cannot be read."""


@dataclass(frozen=True)
class Distance:
    """How far one tensor is from another, in both measures."""

    relative: float
    """||a - b|| / ||b||; the numerator alone where b is zero."""
    maximum: float
    """max|a - b| / max|b|; the numerator alone where b is zero."""
    token: int
    """Where the largest difference is, along the first axis."""


def read(path: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        TensorFileError: it is missing or broken.
    """
    try:
        return load_file(Path(path))
    except (OSError, SafetensorError) as error:
        raise TensorFileError(str(error)) from error


def finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    # Both ends are NaN where any value is, and one is infinite where any is: one pass without a mask.
    return all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def distance(tensor: Tensor, oracle: Tensor) -> Distance:
    """Distance of two finite tensors of one shape [tokens, ...].

    Differences of floats of 32 bits or fewer are rounded to float32, others to float64; sums are in float64.
    """
    narrow = {torch.float32, torch.bfloat16, torch.float16}
    dtype = torch.float32 if {tensor.dtype, oracle.dtype} <= narrow else torch.float64
    a, b = tensor.to(dtype).flatten(1), oracle.to(dtype).flatten(1)
    difference = (a - b).abs_()
    most = difference.amax(dim=1)
    norm, largest = _norm(b), max(abs(float(end)) for end in b.aminmax())
    return Distance(
        relative=_norm(difference) / (norm or 1.0),
        maximum=float(most.max()) / (largest or 1.0),
        token=int(most.argmax()),
    )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def same_experts(weights: Tensor, others: Tensor) -> bool:
    """Whether two routings [tokens, experts] choose the same experts for every token."""
    return bool(((weights != 0) == (others != 0)).all())


def place(token: int, lengths: Sequence[int], prefill: int | None) -> str:
    """A place among concatenated rows, in words: `row 0, token 17`."""
    row = 0
    while token >= lengths[row]:
        token -= lengths[row]
        row += 1
    alone = prefill is not None and token >= prefill
    return f"row {row}, token {token}{' (a step of its own)' if alone else ''}"
