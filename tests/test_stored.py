"""A paged cache that stores keys and values in another dtype than the model computes in."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from conformance import expectations
from conformance.commands.selection import select
from conformance.faults import registry
from conformance.faults.run import REQUEST_SECONDS, failures
from conformance.runner import TargetPool
from model_impl.errors import CacheError
from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.paged import PagedCache, Place
from model_impl.runtime.request import Request
from model_impl.runtime.runner import LocalRunner
from model_impl.runtime.stored import StoredAs, dtype_name, narrowed, storage_dtype
from tests.engines import sizes
from tests.model_configs import FULL, SLIDING
from tests.test_generate import MODELS, PROMPTS

FORMATS: dict[StoredAs, tuple[int, int, float]] = {
    # bits of the mantissa, exponent of the smallest normal number, largest number
    "float16": (10, -14, 65504.0),
    "bfloat16": (7, -126, (2 - 2**-7) * 2.0**127),
    "fp8_e4m3": (3, -6, 448.0),
    "fp8_e5m2": (2, -14, 57344.0),
}
CONFIG = MODELS["dense"].config


def rounded(x: float, stored: StoredAs) -> float:
    """The nearest number of a format, of two as near the one whose last bit is zero."""
    bits, least, largest = FORMATS[stored]
    step = 2.0 ** (max(math.frexp(x)[1] - 1, least) - bits)
    return max(-largest, min(largest, round(x / step) * step))


def kept(stored: StoredAs | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer attends to that has written its first tokens."""
    cache = PagedCache(CONFIG, replace(sizes(), stored=stored))
    tables = {kind: range(8) for kind in (FULL, SLIDING)}
    view = cache.view([Place(0, k.shape[2], tables)])
    view.begin(k.shape[2], [k.shape[2]])
    return view.extend(CONFIG.layers[0], k, v)


def keys_and_values() -> tuple[Tensor, Tensor]:
    layer = CONFIG.layers[0]
    shape = 1, layer.num_kv_heads, 6, layer.head_dim
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-18, 8, shape) for _ in "kv")
    v[0, 0, 0, :4] = torch.tensor([1e5, -1e9, 470.0, 0.0])
    return k, v


@pytest.mark.parametrize("stored", FORMATS)
def test_attention_reads_what_rounding_leaves(stored: StoredAs) -> None:
    given = keys_and_values()
    for read, made in zip(kept(stored, *given), given, strict=True):
        assert read.dtype == torch.float32
        expected = torch.tensor([rounded(x, stored) for x in made.double().flatten().tolist()])
        assert torch.equal(read, expected.view_as(made))
        assert not torch.equal(read, made)


def test_a_cache_of_the_dtype_of_the_computation_keeps_every_bit() -> None:
    given = keys_and_values()
    for read, made in zip(kept(None, *given), given, strict=True):
        assert torch.equal(read, made)


@pytest.mark.parametrize(("stored", "size"), [(None, 4), ("bfloat16", 2), ("fp8_e4m3", 1), ("fp8_e5m2", 1)])
def test_narrow_pools_take_fewer_bytes(stored: StoredAs | None, size: int) -> None:
    cache = PagedCache(CONFIG, replace(sizes(), stored=stored))
    assert {pool.element_size() for pair in cache.pools.values() for pool in pair} == {size}
    assert cache.stored == (stored or "float32")
    assert LocalRunner(MODELS["dense"], replace(sizes(), stored=stored)).stored == (stored or "float32")


def test_a_run_of_slots_is_read_without_a_copy_where_nothing_is_rounded() -> None:
    cache = PagedCache(CONFIG, sizes())
    pool = cache.pools[0][0]
    assert cache.gather(pool, slice(0, 5), 1).data_ptr() == pool.data_ptr()


def test_names_and_dtypes_belong_to_each_other() -> None:
    assert set(FORMATS) == set(get_args(StoredAs))
    for stored in FORMATS:
        assert dtype_name(storage_dtype(stored, torch.float32)) == stored
    assert storage_dtype(None, torch.bfloat16) == torch.bfloat16
    with pytest.raises(CacheError, match="cannot be stored as 'int4'"):
        storage_dtype("int4", torch.float32)  # type: ignore[arg-type]


WITHOUT_EXPERTS = [name for name, model in MODELS.items() if model.config.moe is None]
"""A router that chooses another expert moves numbers by any amount."""


@pytest.mark.parametrize("model", WITHOUT_EXPERTS)
def test_narrower_formats_move_numbers_farther(model: str) -> None:
    def logprobs(stored: StoredAs | None) -> Tensor:
        runner = LocalRunner(MODELS[model], replace(sizes(), stored=stored))
        asked = [Request(tuple(prompt), 1, logprobs=True, top_logprobs=8) for prompt in PROMPTS]
        found = Engine(runner, EngineConfig()).run(asked)
        return torch.tensor([sum(row.top[0].values()) / len(row.top[0]) for row in found if row.top])

    exact = logprobs(None)
    moved = [
        float((logprobs(stored) - exact).abs().max())
        for stored in ("float16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
    ]
    assert 0 < moved[0] < moved[1] < moved[2] < moved[3]
    assert moved[1] < 0.05


def test_a_cache_that_leaves_new_tokens_unrounded_shows_where_chunks_read_what_is_stored() -> None:
    chosen = select(("invariance/caches::chunks-fp8",))
    fault = registry()["new-tokens-not-rounded"]
    with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as pool, fault.applied():
        (caught,) = failures(chosen.cases, expectations.beside(chosen.suites), pool)
    assert (caught.verdict, caught.rules) == ("fail", ("logprobs",))


def test_the_largest_number_of_float16_is_none_of_bfloat16() -> None:
    large = torch.tensor([1e6, -1e6, 7e4, 1.5], dtype=torch.bfloat16)
    stored = narrowed(large, torch.float16)
    assert stored.tolist() == [65504.0, -65504.0, 65504.0, 1.5]
