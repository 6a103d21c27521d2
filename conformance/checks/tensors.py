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
    return bool(torch.isfinite(tensor).all())


def distance(tensor: Tensor, oracle: Tensor) -> Distance:
    """Distance of two finite tensors of one shape [tokens, ...], computed in float64."""
    a, b = tensor.double().flatten(1), oracle.double().flatten(1)
    difference = (a - b).abs()
    norm, largest = float(b.norm()), float(b.abs().max())
    return Distance(
        relative=float(difference.norm()) / (norm or 1.0),
        maximum=float(difference.max()) / (largest or 1.0),
        token=int(difference.amax(dim=1).argmax()),
    )


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
