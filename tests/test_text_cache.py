"""Windows, the key-value cache, chunks and rows: every way of cutting up the work gives the same numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from model_impl import text
from model_impl.config import LayerConfig, TextConfig
from model_impl.errors import CacheError
from model_impl.layers.backends import BACKENDS
from model_impl.runtime import cache as cache_module
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import Blocks, visible
from model_impl.runtime.step import Step
from model_impl.text import TextModel
from tests.model_configs import DENSE, E2B, MOE, TINY, WINDOW, build, distance, random_ids, tapped
from tests.text_rules import SAME, Check, logits

Patch = AbstractContextManager[object]

# ------------------------------------------------------------------------------------- sliding windows


def check_window_edges() -> None:
    """Position p reaches queries p .. p + W - 1 of one sliding layer, and each layer adds W - 1."""
    ids = random_ids(1, 40)
    other = ids.index_fill(1, torch.tensor([3]), (int(ids[0, 3]) + 1) % 96)
    with tapped(model := build(DENSE)) as before:
        model(ids)
    with tapped(model) as after:
        model(other)
    for layer, last in ((0, 3 + WINDOW - 1), (1, 3 + 2 * (WINDOW - 1))):
        differs = (before.output(f"layers.{layer}") != after.output(f"layers.{layer}")).any(dim=-1)[0]
        assert differs.tolist() == [3 <= q <= last for q in range(40)]
    differs = (before.output("layers.2") != after.output("layers.2")).any(dim=-1)[0]
    assert differs.tolist() == [q >= 3 for q in range(40)]


def check_a_needle_outside_the_windows_has_no_influence(pieces: Sequence[int]) -> None:
    """Four sliding layers see 4 (W - 1) back: what lies further changes no bit of what they return."""
    reach = 4 * (WINDOW - 1)
    ids = random_ids(1, reach + 3)
    model = build(E2B)
    outputs = []
    for token in (1, 2):
        cache, parts = KVCache(model.config, 1), []
        for piece in ids.index_fill(1, torch.tensor([1]), token).split(pieces, dim=1):
            with tapped(model) as taps:
                model(piece, cache=cache)
            parts.append(taps.output("layers.3")[0])
        outputs.append(torch.cat(parts))
    differs = (outputs[0] != outputs[1]).any(dim=-1)
    assert differs.tolist() == [1 <= q <= reach + 1 for q in range(reach + 3)]


# ------------------------------------------------------------------------------------- chunks and rows

LENGTH = 3 * WINDOW + 5


def in_pieces(model: TextModel, ids: Tensor, pieces: Sequence[int]) -> Tensor:
    """Hidden states of all positions, with a cache, in calls of so many tokens."""
    cache = KVCache(model.config, len(ids), dtype=model.embed_tokens.weight.dtype)
    return torch.cat([model(piece, cache=cache) for piece in ids.split(list(pieces), dim=1)], dim=1)


PIECES = {
    "whole": [LENGTH],
    "single": [1] * LENGTH,
    "window-then-single": [WINDOW] + [1] * (LENGTH - WINDOW),
    "longer-than-the-window": [2, 2 * WINDOW + 3, 1, LENGTH - 2 * WINDOW - 6],
    "uneven": [5, 1, WINDOW, 1, WINDOW - 1, 3, 1, LENGTH - 2 * WINDOW - 10],
}


def check_pieces_equal_one_call(kind: str, attention: str, pieces: Sequence[int]) -> None:
    model = build(TINY[kind], attention=attention)
    ids = random_ids(2, LENGTH)
    assert distance(in_pieces(model, ids, pieces), model(ids)) < SAME


def check_layers_agree_with_and_without_a_cache(kind: str) -> None:
    model = build(TINY[kind])
    ids = random_ids(2, LENGTH)
    with tapped(model) as without:
        model(ids)
    with tapped(model) as cached:
        model(ids, cache=KVCache(model.config, 2))
    for index in range(len(model.layers)):
        name = f"layers.{index}"
        assert distance(cached.output(name), without.output(name)) < SAME


def check_rounds(model: TextModel, rounds: Sequence[Sequence[int]], *, cached: bool) -> None:
    """Rows fed together, so many tokens of each in each round, against each row alone in one call."""
    rows = [random_ids(1, sum(counts), seed=40 + i)[0] for i, counts in enumerate(zip(*rounds, strict=True))]
    done = [0] * len(rows)
    cache = KVCache(model.config, len(rows)) if cached else None
    got: list[list[Tensor]] = [[] for _ in rows]
    for counts in rounds:
        ids = torch.full((len(rows), max(counts)), 95)
        for i, count in enumerate(counts):
            ids[i, :count] = rows[i][done[i] : done[i] + count]
        hidden = model(ids, cache=cache, lengths=counts)
        for i, count in enumerate(counts):
            got[i].append(hidden[i, :count])
            done[i] += count
    assert cache is None or cache.lengths == done
    for i, row in enumerate(rows):
        assert distance(torch.cat(got[i]), model(row[None])[0]) < SAME


ROUNDS = [
    [1, LENGTH, 3, WINDOW, WINDOW + 1, 2 * WINDOW + 1],
    [1] * 6,
    [1, 0, 1, 0, 1, 1],
    [4, 1, 0, WINDOW + 2, 2, 3],
    [1] * 6,
]
"""Rows from one token to three windows; then steps in which some rows get nothing."""


def check_ragged_rows_equal_single_rows(kind: str, attention: str, *, cached: bool) -> None:
    model = build(TINY[kind], attention=attention)
    check_rounds(model, ROUNDS if cached else ROUNDS[:1], cached=cached)


def check_random_rounds(window: int) -> None:
    """Windows from a single token up, and rounds as they come."""
    model = build({**E2B, "sliding_window": window})
    chance = random.Random(window)
    for _ in range(3):
        widths = [chance.choice([1, 1, 2, 3, 7, 12]) for _ in range(5)]
        rows = chance.randint(1, 3)
        rounds = [
            [chance.randint(0 if i else 1, width) for _ in range(rows)] for i, width in enumerate(widths)
        ]
        # A call without any token is no call.
        check_rounds(model, [counts for counts in rounds if any(counts)], cached=True)


def check_the_cache_outgrows_its_first_buffers() -> None:
    """Full layers hold more than one allocation, sliding layers go round many times."""
    model = build(DENSE)
    ids = random_ids(1, 600)
    assert distance(in_pieces(model, ids, [200, 100, 1, 299]), model(ids)) < SAME


def check_layers_that_share_store_nothing() -> None:
    model = build(E2B)
    cache = KVCache(model.config, 1)
    calls: list[int] = []
    original = KVCache.extend

    def extend(self: KVCache, layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(layer.index)
        return original(self, layer, k, v)

    with mock.patch.object(KVCache, "extend", extend):
        for piece in random_ids(1, 12).split([10, 1, 1], dim=1):
            model(piece, cache=cache)
    assert calls == [0, 1, 2, 3, 4] * 3
    assert set(cache._buffers) == {0, 1, 2, 3, 4}


NEEDLE_PIECES = {"whole": [31], "single": [1] * 31, "chunks": [3, 19, 1, 8]}

CHECKS: dict[str, Check] = {
    "window-edges": check_window_edges,
    **{
        f"needle-{name}": partial(check_a_needle_outside_the_windows_has_no_influence, pieces)
        for name, pieces in NEEDLE_PIECES.items()
    },
    **{
        f"pieces-{kind}-{attention}-{name}": partial(check_pieces_equal_one_call, kind, attention, pieces)
        for kind in TINY
        for attention in BACKENDS
        for name, pieces in PIECES.items()
        # FlexAttention is slow here; this cut has a first chunk, a long one, and a single token.
        if attention != "flex" or (name == "longer-than-the-window" and kind == "e2b")
    },
    **{f"cache-or-none-{kind}": partial(check_layers_agree_with_and_without_a_cache, kind) for kind in TINY},
    **{
        f"ragged-{kind}-{attention}-{'cache' if cached else 'none'}": partial(
            check_ragged_rows_equal_single_rows, kind, attention, cached=cached
        )
        for kind in TINY
        for attention in BACKENDS
        for cached in (True, False)
        if attention != "flex" or (cached and kind != "dense")
    },
    **{f"random-rounds-window-{w}": partial(check_random_rounds, w) for w in (1, 2, 3, 5, 8, 16)},
    "growth": check_the_cache_outgrows_its_first_buffers,
    "sharing-stores-nothing": check_layers_that_share_store_nothing,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_rule(check: Check) -> None:
    check()


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("kind", TINY)
def test_backends_agree(kind: str, attention: str) -> None:
    ids = random_ids(2, LENGTH)
    expected = logits(build(TINY[kind], attention="eager"), ids)
    model = build(TINY[kind], attention=attention)
    assert model.attention_backend == attention
    assert distance(logits(model, ids), expected) < SAME


@pytest.mark.parametrize("kind", TINY)
def test_float64_sharpens_the_comparison(kind: str) -> None:
    """Norms and eager softmax are float32 by definition; all else falls away."""
    model = build(TINY[kind], dtype=torch.float64)
    ids = random_ids(2, LENGTH)
    assert model(ids).dtype == torch.float64
    assert distance(in_pieces(model, ids, PIECES["uneven"]), model(ids)) < 5e-7
    assert distance(build(TINY[kind])(ids), model(ids)) < SAME


def test_what_padding_holds_does_not_matter() -> None:
    model = build(E2B)
    ids = random_ids(2, 12)
    results = []
    for padding in (0, 77):
        cache = KVCache(model.config, 2)
        filled = ids.clone()
        filled[1, 4:] = padding
        first = model(filled, cache=cache, lengths=[12, 4])
        results.append((first[1, :4], model(ids[:, :1], cache=cache)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_refused_call_leaves_the_cache_as_it_was() -> None:
    model = build(E2B)
    ids = random_ids(1, 9)
    cache = KVCache(model.config, 1)
    model(ids[:, :8], cache=cache)
    with pytest.raises(CacheError, match="the cache holds 1 rows; 2 rows"):
        model(random_ids(2, 3), cache=cache)
    with pytest.raises(CacheError, match="do not fit"):
        model(ids[:, 8:], cache=cache, lengths=[2])
    with pytest.raises(CacheError, match="row 1 has no token"):
        model(random_ids(2, 1), cache=KVCache(model.config, 2), lengths=[1, 0])
    assert cache.lengths == [8]
    assert distance(model(ids[:, 8:], cache=cache), model(ids)[:, 8:]) < SAME


def test_a_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(CacheError):
        build(DENSE, dtype=torch.bfloat16)(random_ids(1, 5), cache=KVCache(TextConfig.from_dict(DENSE), 1))


def test_a_cache_for_other_layers_is_refused() -> None:
    with pytest.raises(CacheError):
        build(MOE)(random_ids(1, 5), cache=KVCache(TextConfig.from_dict(DENSE), 1))


def test_a_cache_of_the_models_dtype_serves() -> None:
    model = build(E2B, dtype=torch.bfloat16)
    ids = random_ids(1, LENGTH)
    # Eight bits of mantissa through ten layers.
    assert distance(in_pieces(model, ids, PIECES["uneven"]), model(ids)) < 0.1


@pytest.mark.parametrize("lengths", [[3], [3, 9], [3, -1]], ids=["rows", "above-width", "negative"])
def test_lengths_that_do_not_fit_are_refused_without_a_cache_too(lengths: list[int]) -> None:
    with pytest.raises(CacheError):
        build(E2B)(random_ids(2, 5), lengths=lengths)


# --------------------------------------------------------------------------------------------- mutants


def _window(change: int) -> Patch:
    def seen(
        query_positions: Tensor, key_positions: Tensor, window: int | None, blocks: Blocks | None = None
    ) -> Tensor:
        moved = window if window is None else window + change
        return visible(query_positions, key_positions, moved, blocks)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(text, "visible", seen))
    stack.enter_context(mock.patch.object(cache_module, "visible", seen))
    return stack


def _lost_tokens(self: KVCache) -> None:
    """Positions do not count on after a chunk of more than one token."""
    self.lengths = [length + min(new, 1) for length, new in zip(self.lengths, self._pending, strict=True)]
    self._plans = {}


def _padding_is_kept(self: KVCache) -> None:
    self.lengths = [length + max(self._pending) for length in self.lengths]
    self._plans = {}


def _wrapped_too_early(self: KVCache, slots: int, window: int | None, lengths: Sequence[int]) -> Tensor:
    """Empty slots of a ring that is not full count as the first token."""
    return SLOT_POSITIONS(self, slots, window, lengths).clamp(min=0)


def _through_the_store(self: Step, layer: LayerConfig) -> tuple[Tensor, Tensor]:
    """Sharing layers write what they read into a buffer of their own."""
    k, v = KEYS_VALUES(self, layer)
    if layer.shares_kv and isinstance(self.store, KVCache):
        new = max(self.store._pending)
        self.store.extend(layer, k[:, :, -new:], v[:, :, -new:])
    return k, v


def _trimmed(self: Step, layer: LayerConfig) -> tuple[Tensor, Tensor]:
    """Sharing layers find what the ring still holds after the pass."""
    k, v = KEYS_VALUES(self, layer)
    if layer.shares_kv and layer.kind == "sliding_attention" and self.store is not None:
        hidden = torch.arange(k.shape[2])[:, None] < k.shape[2] - WINDOW
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return k, v


SLOT_POSITIONS, KEYS_VALUES = KVCache._slot_positions, Step.keys_values

MUTANTS: dict[str, tuple[Callable[[], Patch], list[str]]] = {
    "window: one key too many": (
        partial(_window, 1),
        ["window-edges", "needle-whole", "needle-chunks"],
    ),
    "window: one key too few": (
        partial(_window, -1),
        ["window-edges", "needle-whole", "needle-chunks", "pieces-dense-sdpa-single"],
    ),
    "window: none": (partial(_window, 1000), ["window-edges", "needle-whole", "needle-chunks"]),
    "cache: chunks count once": (
        lambda: mock.patch.object(KVCache, "commit", _lost_tokens),
        ["pieces-e2b-sdpa-uneven", "pieces-dense-eager-longer-than-the-window", "growth"],
    ),
    "cache: padding counts": (
        lambda: mock.patch.object(KVCache, "commit", _padding_is_kept),
        [f"ragged-{kind}-{attention}-cache" for kind in TINY for attention in ("eager", "sdpa")],
    ),
    "cache: empty slots are seen": (
        lambda: mock.patch.object(KVCache, "_slot_positions", _wrapped_too_early),
        ["ragged-e2b-sdpa-cache", "ragged-dense-sdpa-cache", "ragged-moe-sdpa-cache"],
    ),
    "cache: sharing layers write": (
        lambda: mock.patch.object(Step, "keys_values", _through_the_store),
        ["sharing-stores-nothing"],
    ),
    "cache: sharing layers find a trimmed ring": (
        lambda: mock.patch.object(Step, "keys_values", _trimmed),
        ["cache-or-none-e2b", "pieces-e2b-sdpa-longer-than-the-window"],
    ),
}


@pytest.mark.parametrize(
    ("patch", "rule"),
    [
        pytest.param(patch, CHECKS[rule], id=f"{name} ({rule})")
        for name, (patch, rules) in MUTANTS.items()
        for rule in rules
    ],
)
def test_each_check_fails_on_its_mutant(patch: Callable[[], Patch], rule: Check) -> None:
    with patch(), pytest.raises(AssertionError):
        rule()
