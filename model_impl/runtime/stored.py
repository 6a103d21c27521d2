"""The dtype in which a cache stores keys and values, where that is not the one the model computes in.

Keys and values are rounded once, when they are stored, without a scale: they come out of norms, so that they
are of the order of one. What lies outside the range of a dtype is stored as its largest number, not as
infinity or NaN. Attention reads them back in the dtype of the computation.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from model_impl.errors import CacheError

StoredAs = Literal["float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
"""`fp8_e4m3` has four bits of exponent and three of mantissa, without infinities."""

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def storage_dtype(stored: StoredAs | None, computed: torch.dtype) -> torch.dtype:
    """The dtype of pools.

    Args:
        stored: What is asked for; None for the dtype of the computation.
        computed: The dtype of the computation.

    Raises:
        CacheError: no such dtype.
    """
    if stored is None:
        return computed
    if stored not in get_args(StoredAs):
        raise CacheError(f"keys and values cannot be stored as {stored!r}; name one of {get_args(StoredAs)}")
    return _DTYPES[stored]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype of pools: one of `StoredAs`, or `float32`."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as they are stored, of any shape; torch's casts do not saturate by themselves."""
    if x.dtype == dtype:
        return x
    largest = torch.finfo(dtype).max
    # In float32: the largest number of float16 is none of bfloat16, and the next one is too large.
    return x.float().clamp(-largest, largest).to(dtype)


def movable(x: Tensor) -> Tensor:
    """A view that can be indexed and copied: torch does neither with float8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
