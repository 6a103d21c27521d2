"""Steps without a model: whoever is taken in can go on, however few blocks there are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import pytest

from model_impl.errors import CacheError
from model_impl.runtime.paged import CacheSizes
from model_impl.runtime.prefix import BlockTables, Content, Span
from model_impl.runtime.request import Request
from model_impl.runtime.scheduler import Scheduled, Scheduler, SequenceState
from model_impl.speculative.verify import Draft
from tests.engines import BLOCK_SIZES, asked, engine
from tests.model_configs import FULL, SLIDING, WINDOW
from tests.test_generate import MODELS, PROMPTS

CONFIG = MODELS["dense"].config
PROMPT, NEW = 6, 60
LIMIT = PROMPT + NEW - 1
BUDGET, DRAFTS = 32, 3


def sequence(number: int, prompt: int, new: int, *images: Span) -> SequenceState:
    ids = [100 * number + place for place in range(prompt)]
    one = SequenceState(number, Request(tuple(ids), new), Content(ids), random.Random(), random.Random())
    one.content.spans = list(images)
    return one


def scheduler(full: int, sliding: int, budget: int, lookahead: int, most: int = 64) -> Scheduler:
    tables = BlockTables(CONFIG, CacheSizes(BLOCK_SIZES, {FULL: full, SLIDING: sliding}))
    return Scheduler(tables, budget, most, lookahead)


def runs_again(sliding: int, known: int, hit: int, lookahead: int) -> bool:
    """Whether a lone sequence with a draft is admitted that was preempted, and finds `hit` of its tokens."""
    made = scheduler(100, sliding, BUDGET, lookahead)
    one = sequence(0, PROMPT, NEW)
    one.ids.extend(range(known - PROMPT))
    one.draft = Draft(tuple(range(min(DRAFTS, LIMIT - known))))
    held = made.blocks.open(one.content)
    for stop in range(1, hit + 1):
        assert made.blocks.extend(held, stop - 1, stop)
        made.blocks.remember(held, one.content, stop)
    made.blocks.close(held)
    made.waiting.append(one)
    (piece,) = made.schedule() or [None]
    assert piece is None or piece.start == hit
    return piece is not None


@pytest.mark.parametrize("lookahead", [0, DRAFTS])
def test_a_sequence_is_taken_in_exactly_if_it_could_run_again_with_its_draft(lookahead: int) -> None:
    assert WINDOW == 8
    states = [(known, hit) for hit in (0, 12, 24) for known in range(max(PROMPT, hit) + 1, LIMIT + 1)]
    for blocks in range(12, 18):
        try:
            scheduler(100, blocks, BUDGET, lookahead).add(sequence(0, PROMPT, NEW), DRAFTS)
            taken = True
        except CacheError:
            taken = False
        assert taken == all(runs_again(blocks, *state, lookahead) for state in states), blocks


def steps(made: Scheduler, drafts: int, source: random.Random) -> Iterator[list[Scheduled]]:
    """Steps to the end; a random number of drafted tokens stays in each round."""
    while made.running or made.waiting:
        chosen = made.schedule()
        yield chosen
        for piece in chosen:
            one = piece.sequence
            one.computed = piece.stop
            if piece.gives_token:
                stay = source.randint(1, 1 + len(piece.drafted))
                one.ids.extend(source.randrange(96) for _ in range(stay))
                one.computed = len(one.ids) - 1
                one.draft = Draft(tuple(range(min(drafts, max(0, one.left - 1)))))
            assert one.held is not None
            made.blocks.remember(one.held, one.content, one.computed)
            if one.left <= 0:
                made.remove(one)


def test_every_step_gets_something_done_however_scarce_blocks_are() -> None:
    preempted = 0
    for seed in range(300):
        source = random.Random(seed)
        drafts = source.choice((0, 1, 3))
        made = scheduler(
            source.randint(6, 14),
            source.randint(6, 14),
            budget=source.choice((1, 3, 7, 30)),
            lookahead=source.choice((0, drafts)),
            most=source.choice((2, 64)),
        )
        taken = []
        for number in range(5):
            prompt = source.randint(1, 25)
            image = sorted(source.randint(0, prompt) for _ in range(2))
            one = sequence(number, prompt, source.randint(1, 20), (image[0], image[1]))
            try:
                made.add(one, drafts)
            except CacheError:
                continue
            taken.append(one)
        for count, chosen in enumerate(steps(made, drafts, source)):
            assert chosen, f"seed {seed}: nothing goes on"
            assert count < 1000, f"seed {seed}: no end"
        preempted += sum(one.preemptions for one in taken)
    assert preempted > 300


def test_who_gives_up_its_blocks_gives_up_its_part_of_the_budget() -> None:
    made = scheduler(full=6, sliding=6, budget=3, lookahead=0)
    # A pass ends before the image, so that the second is let in, and generates on and on.
    for one in (sequence(0, 12, 5, (2, 9)), sequence(1, 1, 24)):
        made.add(one, DRAFTS)
    first, second = made.waiting
    for chosen in steps(made, DRAFTS, random.Random(0)):
        assert chosen
        if second.preemptions:
            assert [(piece.sequence, piece.start, piece.stop) for piece in chosen] == [(first, 2, 9)]
            return
    pytest.fail("blocks were not scarce")


def test_an_engine_that_cannot_go_on_says_so() -> None:
    made = engine(MODELS["dense"])
    with (
        mock.patch.object(made._scheduler, "schedule", list),
        pytest.raises(CacheError, match="none of 2 requests can go on"),
    ):
        made.run(asked(PROMPTS[:2], 3))
    assert made.unfinished == 0
    assert made.step() == []
