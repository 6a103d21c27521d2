"""The engine against simple generation: batches that change, chunks, shared prefixes, scarce blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from model_impl.errors import CacheError, ModelError
from model_impl.runtime.engine import Engine, EngineConfig
from model_impl.runtime.generate import Generated, generate
from model_impl.runtime.masks import BlockMode
from model_impl.runtime.paged import CacheSizes, PagedCache, Place
from model_impl.runtime.request import Request, Result
from model_impl.runtime.runner import Batch, LocalRunner, Piece
from model_impl.runtime.sampling import GenerationError, Sampling
from model_impl.runtime.scheduler import chunk_end
from model_impl.text import SoftTokens, TextModel
from tests.engines import asked, engine, said, sizes, unused
from tests.model_configs import DENSE, FULL, SLIDING, WINDOW, build, distance, random_ids
from tests.test_generate import MODELS, PROMPTS, WARM

STEPS = WINDOW + 4
PLANS: dict[str, dict[str, int]] = {
    "whole": {},
    "chunks": {"tokens": 3},
    "few at once": {"max_sequences": 2, "tokens": 5},
    "scarce blocks": {"blocks": 14, "tokens": 7},
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> TextModel:
    return MODELS[request.param]


def assert_same(found: Sequence[Result], expected: Sequence[Generated]) -> None:
    """Tokens, log-probabilities and likeliest tokens; near ties between the latter do not matter."""
    assert said(found) == [row.ids for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.finish_reason == b.finish_reason
        if b.logprobs is not None:
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=2e-5)
        for mine, other in zip(a.top or (), b.top or (), strict=True):
            assert next(iter(mine)) == next(iter(other))


@pytest.mark.parametrize("sampling", [Sampling.greedy(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_requests_get_what_generation_gives_them(
    model: TextModel, plan: dict[str, Any], sampling: Sampling
) -> None:
    expected = generate(
        model,
        PROMPTS,
        max_new_tokens=STEPS,
        sampling=sampling,
        seed=[1, 2, 3, 4],
        logprobs=True,
        top_logprobs=2,
    )
    made = engine(model, **plan)
    free = unused(made)
    requests = asked(PROMPTS, STEPS, sampling=sampling, logprobs=True, top_logprobs=2)
    found = made.run(requests)
    assert_same(found, expected)
    assert (sum(result.preemptions for result in found) > 0) == ("blocks" in plan)
    assert (unused(made), made.unfinished) == (free, 0)
    # Once more, with what is cached.
    again = made.run(requests)
    assert_same(again, expected)
    if "blocks" not in plan:
        assert [result.cached_tokens for result in again] == [0, 0, 12, 0]


def test_requests_join_and_leave_between_steps_and_none_notices(model: TextModel) -> None:
    expected = generate(model, PROMPTS, max_new_tokens=STEPS)
    made = engine(model, tokens=6)
    requests = asked(PROMPTS, STEPS)
    numbers, seen = [], {}
    for request in requests:
        numbers.append(made.add(request))
        for _ in range(3):
            for output in made.step():
                seen.setdefault(output.request, []).append(output.id)
    gone = numbers[1]
    made.abort(gone)
    made.abort(gone)
    while made.unfinished:
        for output in made.step():
            seen.setdefault(output.request, []).append(output.id)
    for number, row in zip(numbers, expected, strict=True):
        if number == gone:
            assert tuple(seen[number]) == row.ids[: len(seen[number])]
            with pytest.raises(GenerationError, match=f"no result of request {gone}"):
                made.result(number)
        else:
            assert tuple(seen[number]) == row.ids == made.result(number).ids
    assert unused(made) == [80, 80]


def test_stop_tokens_end_their_request_alone() -> None:
    free = generate(MODELS["dense"], PROMPTS, max_new_tokens=STEPS)
    stop = free[0].ids[5]
    expected = generate(MODELS["dense"], PROMPTS, max_new_tokens=STEPS, stop_ids={stop})
    found = engine(MODELS["dense"]).run(asked(PROMPTS, STEPS, stop_ids=frozenset({stop})))
    assert_same(found, expected)
    assert found[0].finish_reason == "stop"


def test_a_step_feeds_no_more_than_its_budget_unless_it_generates() -> None:
    made = engine(MODELS["dense"], tokens=6)
    runner = made.runner
    with mock.patch.object(runner, "run", wraps=runner.run) as run:
        for request in asked(PROMPTS, 4):
            made.add(request)
        while made.unfinished:
            before = run.call_count
            made.step()
            assert sum(sum(call.args[0].lengths) for call in run.call_args_list[before:]) <= 6


@pytest.mark.parametrize("tokens", [5, 2048])
def test_a_shared_block_is_never_written(model: TextModel, tokens: int) -> None:
    made = engine(model, tokens=tokens)
    runner = made.runner
    assert isinstance(runner, LocalRunner)
    long = random_ids(1, 30, 9)[0].tolist()
    made.run(asked([long], 2))
    cached = {kind: {*pool._digests} for kind, pool in made.blocks.pools.items()}
    assert all(len(blocks) > 3 for blocks in cached.values())
    layers = [layer for layer in model.config.layers if not layer.shares_kv]
    before = {
        (layer.index, block): bytes_of(runner.cache, layer.index, block)
        for layer in layers
        for block in cached[layer.kind]
    }
    # Requests that share 12 and 24 tokens with it, while they are under way and afterwards.
    others = [[*long[:17], *random_ids(1, 6, 1)[0].tolist()], [*long[:28], 5, 6], long, long]
    found = made.run(asked(others, 9))
    assert [result.cached_tokens for result in found] == [12, 24, 24, 24]
    for kind, blocks in cached.items():
        assert blocks <= {*made.blocks.pools[kind]._digests}, "none had to be taken"
    for (index, block), content in before.items():
        assert bytes_of(runner.cache, index, block) == content
    assert said(found) == [row.ids for row in generate(model, others, max_new_tokens=9)]


def bytes_of(cache: PagedCache, layer: int, block: int) -> bytes:
    return b"".join(pool[block].numpy().tobytes() for pool in cache.pools[layer])


def test_prefixes_of_other_adapters_and_images_are_not_found() -> None:
    runner = LocalRunner(MODELS["dense"], sizes(), activate=mock.MagicMock())
    made = Engine(runner)
    plain = Request(tuple(random_ids(1, 20, 4)[0].tolist()), 1)
    images = [replace(plain, soft=images_at(20, (3, 6), seed=seed)) for seed in (1, 2)]
    for request in (plain, replace(plain, adapter="a"), replace(plain, adapter="b"), *images):
        assert made.run([request])[0].cached_tokens == 0
        assert made.run([request])[0].cached_tokens == 12
    with pytest.raises(ModelError, match="no adapters are loaded here; 'a' is asked for"):
        engine(MODELS["dense"]).run([replace(plain, adapter="a")])


def test_without_prefix_caching_nothing_is_found() -> None:
    made = engine(MODELS["dense"], prefix_caching=False)
    for _ in range(2):
        assert made.run(asked([PROMPTS[2]], 3))[0].cached_tokens == 0


# --------------------------------------------------------------------------------------------- images


def images_at(length: int, *images: tuple[int, int], seed: int = 1) -> SoftTokens:
    """Soft tokens of one prompt; each image has its first column, and the one after its last."""
    where = torch.zeros(1, length, dtype=torch.bool)
    blocks = torch.full((1, length), -1)
    for number, (first, last) in enumerate(images):
        where[0, first:last] = True
        blocks[0, first:last] = number
    generator = torch.Generator().manual_seed(seed)
    return SoftTokens(where, torch.randn(int(where.sum()), 48, generator=generator) * 3, blocks)


PICTURED = [
    (23, [(4, 9), (9, 12)]),
    (30, [(0, WINDOW + 5)]),
    (9, [(5, 8)]),
    (26, [(2, 4), (11, 14 + WINDOW)]),
]
"""Lengths of prompts and their images, some longer than the window."""


@pytest.mark.parametrize("mode", ["clamp_past", "clamp_both", "drop"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_prompts_with_images_get_what_generation_gives_them(mode: BlockMode, plan: dict[str, Any]) -> None:
    model = MODELS["dense"]
    prompts = [random_ids(1, length, seed)[0].tolist() for seed, (length, _) in enumerate(PICTURED)]
    softs = [images_at(length, *images, seed=seed) for seed, (length, images) in enumerate(PICTURED)]
    with mock.patch.object(model, "long_blocks", mode):
        expected = [
            generate(model, [prompt], max_new_tokens=6, soft=soft, logprobs=True)[0]
            for prompt, soft in zip(prompts, softs, strict=True)
        ]
        made = engine(model, **{**plan, "blocks": 20 if "blocks" in plan else 80})
        requests = [
            Request(tuple(prompt), 6, soft=soft, logprobs=True)
            for prompt, soft in zip(prompts, softs, strict=True)
        ]
        for _ in range(2):
            assert_same(made.run(requests), expected)


def test_an_image_is_fed_whole_whatever_the_budget() -> None:
    spans = [(4, 9), (9, 12), (15, 30)]
    for start in (0, 4, 9, 12, 15, 30):
        for stop in range(start + 1, 35):
            end = chunk_end(spans, start, stop)
            assert start < end
            assert not any(first < end < last for first, last in spans)
            assert end <= stop or any((first, last) == (start, end) for first, last in spans)
            if not any(first < stop < last for first, last in spans):
                assert end == stop


# ------------------------------------------------------------------------------------- a paged cache


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex"])
def test_a_paged_cache_in_any_order_of_blocks_is_one_pass(attention: str) -> None:
    model = build(DENSE, attention=attention)
    runner = LocalRunner(model, sizes(60), (0, 3))
    rows = [random_ids(1, length, length)[0].tolist() for length in (29, 5, 17)]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(60, generator=generator).tolist()
    tables = [{kind: tuple(order[20 * row : 20 * row + 20]) for kind in (FULL, SLIDING)} for row in range(3)]
    done, found = [0, 0, 0], [[], [], []]
    while any(count < len(row) for count, row in zip(done, rows, strict=True)):
        pieces = {}
        for row, ids in enumerate(rows):
            count = int(torch.randint(1, 9, (), generator=generator))
            if ids[done[row] : done[row] + count]:
                pieces[row] = Piece(tuple(ids[done[row] : done[row] + count]), done[row], tables[row])
        states = runner.run(Batch(tuple(pieces.values())))
        for at, (row, piece) in enumerate(pieces.items()):
            both = torch.cat([states.hidden[at], states.aux[0][at], states.aux[1][at]], dim=-1)
            found[row].append(both[: len(piece.ids)])
            done[row] += len(piece.ids)
    for row, ids in enumerate(rows):
        whole = model.states(torch.tensor([ids]), aux_layers=(0, 3))
        assert distance(torch.cat(found[row]), torch.cat([whole.hidden, *whole.aux], dim=-1)[0]) < 2e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex"])
def test_nonsense_in_the_cache_stays_with_its_own_row(attention: str) -> None:
    model = build(DENSE, attention=attention)
    ids = [random_ids(1, length, length)[0].tolist() for length in (2 * WINDOW, 5)]
    tables = [{kind: tuple(range(8 * row, 8 * row + 8)) for kind in (FULL, SLIDING)} for row in (0, 1)]
    soft = images_at(len(ids[0]), (0, 1))
    # The first row has blocks 0, and is longer, so that the second one's keys are padded.
    for features in (soft.features, soft.features * float("nan")):
        runner = LocalRunner(model, sizes(20))
        pieces = Piece(tuple(ids[0]), 0, tables[0], replace(soft, features=features))
        states = runner.run(Batch((pieces, Piece(tuple(ids[1]), 0, tables[1]))))
        more = runner.run(Batch((Piece((7,), len(ids[0]), tables[0]), Piece((8,), len(ids[1]), tables[1]))))
        assert bool(states.hidden[0].isnan().any()) == bool(features.isnan().any())
        alone = model(torch.tensor([[*ids[1], 8]]))[0]
        assert distance(torch.cat([states.hidden[1, : len(ids[1])], more.hidden[1, :1]]), alone) < 2e-5


def test_what_a_runner_keeps_is_what_a_draft_model_may_read() -> None:
    model = MODELS["e2b"]
    runner = LocalRunner(model, sizes(20))
    ids = [random_ids(1, length, 3)[0].tolist() for length in (14, 5)]
    tables = [{kind: tuple(range(10 * row, 10 * row + 10)) for kind in (FULL, SLIDING)} for row in (0, 1)]
    pieces = tuple(Piece(tuple(own), 0, table) for own, table in zip(ids, tables, strict=True))
    runner.run(Batch(pieces))
    seen: dict[int, Tensor] = {}
    for index in (3, 4):
        attention = model.layers[index].self_attn
        original = attention.keys_values

        def spy(x: Tensor, step: Any, at: int = index, real: Any = original) -> tuple[Tensor, Tensor]:
            made: tuple[Tensor, Tensor] = real(x, step)
            seen[at] = made[0]
            return made

        with mock.patch.object(attention, "keys_values", spy):
            model(torch.tensor(ids[:1]))
    kept = runner.kept([piece.place for piece in pieces])
    assert kept["full_attention"].positions.tolist() == [[*range(14)], [*range(5), *[-1] * 9]]
    assert kept["sliding_attention"].positions.tolist() == [[*range(6, 14)], [*range(5), *[-1] * 3]]
    assert distance(kept["full_attention"].k[0], seen[4][0]) < 2e-5
    assert distance(kept["sliding_attention"].k[0], seen[3][0, :, 6:]) < 2e-5


def test_a_table_that_is_too_short_is_refused() -> None:
    runner = LocalRunner(MODELS["dense"], sizes())
    with pytest.raises(CacheError, match="9 tokens from position 4 on do not fit a table of full_attention"):
        runner.run(Batch((Piece((5,) * 9, 4, {FULL: (0, 1, 2), SLIDING: (0, 1, 2, 3, 4)}),)))
    view = runner.cache.view([Place(0, 2, {FULL: (0,), SLIDING: (0,)})])
    with pytest.raises(CacheError, match=r"one of \[2\] new tokens; \[3\] in 3 columns"):
        view.begin(3, [3])
    with pytest.raises(CacheError, match="sliding_attention: 0 blocks of 0 positions"):
        CacheSizes({FULL: 4}, {FULL: 4}).check(MODELS["dense"].config.kinds)
    with pytest.raises(CacheError, match="the model computes in"):
        PagedCache(MODELS["dense"].config, sizes()).check(MODELS["dense"].config, torch.bfloat16)
    with pytest.raises(CacheError, match="another configuration"):
        PagedCache(MODELS["dense"].config, sizes()).check(MODELS["moe"].config, torch.float32)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "the prompt is empty"),
        (Request((5, 96), 3), "token id 96 is outside the vocabulary of 96"),
        (Request((5, 6.5), 3), "a prompt is a sequence of token ids"),  # type: ignore[arg-type]
        (Request((5,), 0), "max_new_tokens is 0"),
        (Request((5,) * 10, 503), "exceed the model's 512 positions"),
        (Request((5,), 3, top_logprobs=97), "top_logprobs is 97"),
        (Request((5,), 3, soft=images_at(2, (0, 1))), r"soft tokens for \[1, 2\] rows and columns"),
        (Request((5,), 3, sampling=Sampling.greedy(range(96))), "suppress holds all 96 tokens"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(request_: Request, message: str) -> None:
    made = engine(MODELS["dense"])
    with pytest.raises(GenerationError, match=message):
        made.add(request_)
    assert made.unfinished == 0


def test_a_request_that_could_never_have_its_blocks_is_refused_and_others_go_on() -> None:
    made = engine(MODELS["dense"], blocks=6)
    with pytest.raises(CacheError, match="can need 9 blocks of 3 in sliding_attention layers, which have 6"):
        made.run(asked([PROMPTS[0], [5] * 20], 6))
    assert (made.unfinished, unused(made)) == (0, [6, 6])
    assert len(made.run(asked([PROMPTS[0]], 6))[0].ids) == 6


@pytest.mark.parametrize("name", ["max_tokens_per_step", "max_sequences", "draft_tokens"])
def test_an_engine_s_numbers_are_positive(name: str) -> None:
    with pytest.raises(GenerationError, match=f"{name} is 0"):
        EngineConfig(**{name: 0})


def test_nonsense_of_one_request_is_named_and_the_others_go_on() -> None:
    model = MODELS["dense"]
    made = engine(model)
    numbers = [made.add(request) for request in asked(PROMPTS[:3], 5)]
    made.step()
    real = made.runner.logits

    def broken(hidden: Tensor, adapters: Sequence[str | None]) -> Tensor:
        logits = real(hidden, adapters).clone()
        if len(logits) > 1:
            logits[1] = float("nan")
        return logits

    with mock.patch.object(made.runner, "logits", broken):
        for _ in range(2):
            with pytest.raises(GenerationError, match=f"request {numbers[1]}: the logits after 2 tokens"):
                made.step()
    made.abort(numbers[1])
    while made.unfinished:
        made.step()
    expected = generate(model, PROMPTS[:3], max_new_tokens=5)
    assert [made.result(numbers[0]).ids, made.result(numbers[2]).ids] == [expected[0].ids, expected[2].ids]
