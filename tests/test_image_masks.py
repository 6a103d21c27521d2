"""Attention over soft tokens: which keys each query sees, by layer kind and mode, against plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model_impl.config import AttentionKind
from model_impl.runtime.cache import KVCache
from model_impl.runtime.masks import NO_BLOCK, BlockMode, Blocks, visible, without_long
from model_impl.text import SoftTokens, TextModel
from tests.model_configs import DENSE, E2B, FULL, SLIDING, WINDOW, build, distance, random_ids

MODES: tuple[BlockMode, ...] = ("drop", "clamp_past", "clamp_both")
CAUSAL = {**DENSE, "use_bidirectional_attention": None}


def row_of(*lengths: tuple[int, int]) -> list[int]:
    """Block numbers of a row: pairs of a number and how many tokens have it."""
    return [number for number, length in lengths for _ in range(length)]


def seen(kind: AttentionKind, mode: BlockMode, blocks: Sequence[int], query: int, key: int) -> bool:
    """The rule, said for one pair."""
    if kind == FULL:
        return key <= query
    number = blocks[query]
    together = number != NO_BLOCK and blocks[key] == number
    if mode == "drop" and blocks.count(number) > WINDOW:
        together = False
    if mode == "clamp_both" and key - query >= WINDOW:
        return False
    return (key <= query or together) and query - key < WINDOW


LAYOUTS = {
    "short": row_of((NO_BLOCK, 3), (0, 4), (NO_BLOCK, 5)),
    "of the window": row_of((NO_BLOCK, 2), (0, WINDOW), (NO_BLOCK, 3)),
    "longer than the window": row_of((NO_BLOCK, 2), (0, WINDOW + 1), (NO_BLOCK, 3)),
    "much longer": row_of((0, 3 * WINDOW), (NO_BLOCK, 1)),
    "two side by side": row_of((NO_BLOCK, 1), (0, 4), (1, 5), (NO_BLOCK, 2)),
    "one token": row_of((NO_BLOCK, 4), (0, 1), (NO_BLOCK, 4)),
}


def mask_of(model: TextModel, kind: AttentionKind, blocks: Tensor, *, cached: bool) -> Tensor:
    """What the model's layers of a kind get, [T, T]."""
    width = blocks.shape[1]
    cache = KVCache(model.config, 1) if cached else None
    mask = model._step(width, [width], cache, torch.device("cpu"), blocks).masks[kind]
    dense = mask.dense(width, width, torch.device("cpu"))
    assert dense is not None
    return dense[0, 0]


@pytest.mark.parametrize("cached", [False, True], ids=["without-cache", "with-cache"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_kind_of_layer_sees_what_the_rule_says(layout: str, mode: BlockMode, cached: bool) -> None:
    blocks = LAYOUTS[layout]
    model = build(DENSE)
    model.long_blocks = mode
    for kind in (SLIDING, FULL):
        found = mask_of(model, kind, torch.tensor([blocks]), cached=cached)
        for query, key in itertools.product(range(len(blocks)), repeat=2):
            expected = seen(kind, mode, blocks, query, key)
            assert bool(found[query, key]) == expected, (kind, query, key)


def test_a_block_of_one_token_more_than_the_window_tells_the_modes_apart() -> None:
    blocks = torch.zeros(1, WINDOW + 1, dtype=torch.int64)
    positions = torch.arange(WINDOW + 1)[None]

    def ends(mode: BlockMode) -> tuple[bool, bool]:
        """Whether the first query sees the last key, and the last query the first key."""
        own = without_long(blocks, WINDOW) if mode == "drop" else blocks
        found = visible(positions, positions, WINDOW, Blocks(own, own, mode))[0, 0]
        return bool(found[0, -1]), bool(found[-1, 0])

    assert {mode: ends(mode) for mode in MODES} == {
        "drop": (False, False),
        "clamp_past": (True, False),
        "clamp_both": (False, False),
    }
    inner = visible(positions, positions, WINDOW, Blocks(blocks, blocks, "clamp_both"))[0, 0]
    assert bool(inner[0, -2]), "within the window both ways are open"


def test_a_model_without_image_attention_pays_no_heed_to_blocks() -> None:
    model = build(CAUSAL)
    blocks = torch.tensor([LAYOUTS["short"]])
    for kind in (SLIDING, FULL):
        width = blocks.shape[1]
        plain = (
            model._step(width, [width], None, torch.device("cpu"), None)
            .masks[kind]
            .dense(width, width, torch.device("cpu"))
        )
        assert plain is not None
        assert torch.equal(mask_of(model, kind, blocks, cached=False), plain[0, 0])


# ----------------------------------------------------------------------------------------- in the model


def soft_tokens(model: TextModel, blocks: list[list[int]], seed: int = 2) -> SoftTokens:
    where = torch.tensor(blocks) != NO_BLOCK
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(int(where.sum()), model.config.hidden_size, generator=draw)
    return SoftTokens(where, features, torch.tensor(blocks))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
def test_pieces_with_whole_blocks_are_one_pass(mode: BlockMode, attention: str) -> None:
    """Text, an image longer than the window, text token by token, another image."""
    parts = [
        row_of((NO_BLOCK, 3)),
        row_of((NO_BLOCK, 2), (0, WINDOW + 2), (NO_BLOCK, 1)),
        *[[NO_BLOCK]] * 3,
        row_of((1, 4), (NO_BLOCK, 2)),
    ]
    model = build(DENSE, attention=attention)
    model.long_blocks = mode
    whole = [number for part in parts for number in part]
    ids = random_ids(2, len(whole))
    soft = soft_tokens(model, [whole, whole])
    expected = model(ids, soft=soft)
    cache = KVCache(model.config, 2)
    found = []
    start = 0
    every = torch.zeros(2, len(whole), model.config.hidden_size).masked_scatter(
        soft.where[..., None], soft.features
    )
    for part in parts:
        stop = start + len(part)
        where = soft.where[:, start:stop]
        piece = SoftTokens(where, every[:, start:stop][where], soft.blocks[:, start:stop])
        found.append(model(ids[:, start:stop], cache=cache, soft=piece if where.any() else None))
        start = stop
    assert distance(torch.cat(found, dim=1), expected) < 1e-5


def test_rows_with_and_without_images_do_not_touch_each_other() -> None:
    model = build(DENSE)
    blocks = [
        row_of((NO_BLOCK, 2), (0, 6), (NO_BLOCK, 4)),
        row_of((NO_BLOCK, 12)),
        row_of((0, 3), (1, 3), (NO_BLOCK, 6)),
    ]
    ids = random_ids(3, 12)
    soft = soft_tokens(model, blocks)
    together = model(ids, soft=soft)
    first = 0
    for row, own in enumerate(blocks):
        count = sum(number != NO_BLOCK for number in own)
        alone = SoftTokens(
            torch.tensor([own]) != NO_BLOCK, soft.features[first : first + count], torch.tensor([own])
        )
        first += count
        assert distance(model(ids[row : row + 1], soft=alone)[0], together[row]) < 1e-5


def test_ids_under_soft_tokens_are_not_looked_at_and_per_layer_inputs_take_the_padding_row() -> None:
    model = build(E2B)
    blocks = [row_of((NO_BLOCK, 3), (0, 5), (NO_BLOCK, 3))]
    soft = soft_tokens(model, blocks)
    ids = random_ids(1, 11)
    expected = model(ids, soft=soft)
    other = torch.where(soft.where, (ids + 7) % 96, ids)
    assert torch.equal(model(other, soft=soft), expected)
    assert model.config.per_layer_inputs is not None
    padded = torch.where(soft.where, model.config.pad_token_id, ids)
    x = model.embed_tokens(padded).masked_scatter(soft.where[..., None], soft.features)
    by_hand = model.per_layer_inputs(padded, x)
    taken = []
    original = model.per_layer_inputs

    def recorded(ids: Tensor, x: Tensor) -> Tensor | None:
        taken.append(original(ids, x))
        return taken[-1]

    model.per_layer_inputs = recorded  # type: ignore[method-assign]
    model(ids, soft=soft)
    assert by_hand is not None
    torch.testing.assert_close(taken[0], by_hand, rtol=0, atol=0)


def test_soft_tokens_reach_earlier_ones_of_their_block_through_sliding_layers_only() -> None:
    """Changing a block's last token moves its first, and never the text before the block."""
    blocks = [row_of((NO_BLOCK, 3), (0, 5), (NO_BLOCK, 3))]
    for config, reaches in ((DENSE, True), (CAUSAL, False)):
        model = build(config)
        soft = soft_tokens(model, blocks)
        changed = soft.features.clone()
        changed[-1] += 1
        ids = random_ids(1, 11)
        before = model(ids, soft=soft)
        after = model(ids, soft=SoftTokens(soft.where, changed, soft.blocks))
        moved = (before - after).abs().amax(dim=-1)[0] > 1e-4
        assert moved.tolist() == [False] * 3 + [reaches] * 4 + [True] * 4
