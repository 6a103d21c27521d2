"""Block pools and prefixes of a hybrid cache, against dictionaries of what each slot holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from model_impl.config import AttentionKind, TextConfig
from model_impl.errors import CacheError
from model_impl.runtime.blocks import BlockPool, block_digest, soft_digests
from model_impl.runtime.masks import NO_BLOCK
from model_impl.runtime.paged import NO_TABLE_ENTRY, CacheSizes
from model_impl.runtime.prefix import BlockTables, Content, Held, image_spans
from model_impl.text import SoftTokens
from tests.model_configs import DENSE, FULL, SLIDING

KINDS: tuple[AttentionKind, ...] = ("sliding_attention", "full_attention")
BLOCK = {FULL: 2, SLIDING: 3}
POOL = {FULL: 24, SLIDING: 9}
ALIGNED = 6
WINDOW = 4
CONFIG = replace(TextConfig.from_dict(DENSE), sliding_window=WINDOW)
SIZES = CacheSizes({kind: BLOCK[kind] for kind in KINDS}, {kind: POOL[kind] for kind in KINDS})

Prefix = tuple[object, ...]
"""Everything that decides the keys and values at a position: all tokens up to it."""


def picture(length: int, *images: tuple[int, int, float]) -> SoftTokens:
    """Soft tokens of a prompt; each image has its first column, its number of them, and a colour."""
    where = torch.zeros(1, length, dtype=torch.bool)
    blocks = torch.full((1, length), NO_BLOCK)
    features = []
    for number, (first, count, colour) in enumerate(images):
        where[0, first : first + count] = True
        blocks[0, first : first + count] = number
        features.append(torch.full((count, 3), colour) + torch.arange(count)[:, None])
    return SoftTokens(where, torch.cat(features), blocks)


@dataclass(eq=False)
class Open:
    """A sequence of the machine."""

    content: Content
    held: Held
    images: tuple[tuple[int, int, float], ...]
    computed: int
    newest: int = 0
    """Tokens of its latest pass."""

    def prefix(self, stop: int) -> Prefix:
        """Tokens before `stop`; an image counts whole as soon as it has begun."""
        seen: list[object] = [self.content.adapter]
        for column, token in enumerate(self.content.ids[:stop]):
            image = next((i for i in self.images if i[0] <= column < i[0] + i[1]), None)
            seen.append((token, None if image is None else (image, column)))
        return tuple(seen)


IMAGES = ((), (), ((2, 5, 1.0),), ((2, 5, 2.0),), ((3, 2, 1.0), (5, 3, 1.0)))


class Machine(RuleBasedStateMachine):
    """Sequences come, grow, and go; a dictionary says what stands in each slot."""

    drop_last = False

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(CONFIG, SIZES, drop_last=self.drop_last)
        self.open: list[Open] = []
        self.written: dict[tuple[str, int, int], Prefix] = {}
        self.findable: dict[str, dict[Prefix, int]] = {kind: {} for kind in KINDS}

    sequences = Bundle("sequences")

    @rule(
        target=sequences,
        length=st.integers(1, 20),
        other=st.none() | st.integers(0, 19),
        images=st.sampled_from(IMAGES),
        adapter=st.sampled_from([None, None, None, "a"]),
        at_once=st.booleans(),
    )
    def begin(
        self,
        length: int,
        other: int | None,
        images: tuple[tuple[int, int, float], ...],
        adapter: str | None,
        at_once: bool,
    ) -> Open:
        """Prompts are all alike but for their lengths, and for one token of some."""
        ids = [int(column == other) for column in range(max(length, 9) if images else length)]
        content = Content(list(ids), picture(len(ids), *images) if images else None, adapter)
        one = Open(content, Held({}, {}, 0), images, 0)
        expected = self.longest(one)
        one.held = self.tables.open(content)
        one.computed = one.held.hit
        assert one.held.hit == expected
        self.open.append(one)
        if at_once:
            self.compute(one, len(ids))
        return one

    def longest(self, one: Open) -> int:
        """The longest prefix of use, tried one by one."""
        ids = one.content.ids

        def has(kind: str, first: int, stop: int) -> bool:
            """Whether all blocks that reach into a range can be found."""
            size = BLOCK[kind]
            return all(
                one.prefix((index + 1) * size) in self.findable[kind]
                for index in range(first // size, -(-stop // size))
            )

        lengths = [
            length
            for length in range(0, len(ids), ALIGNED)
            if has(FULL, 0, length)
            and has(SLIDING, max(0, length - WINDOW + 1), length)
            and not any(first < length < first + count for first, count, _ in one.images)
            and (
                not self.drop_last
                or length == 0
                or (length + BLOCK[FULL] <= len(ids) and has(FULL, 0, length + BLOCK[FULL]))
            )
        ]
        return max(lengths)

    @rule(one=sequences, count=st.integers(1, 7))
    def go_on(self, one: Open, count: int) -> None:
        if one in self.open:
            self.compute(one, count)

    def compute(self, one: Open, count: int) -> None:
        stop = min(one.computed + count, len(one.content.ids))
        if stop == one.computed:
            return
        before = {kind: list(table) for kind, table in one.held.tables.items()}
        unused = {kind: self.tables.pools[kind].unused for kind in KINDS}
        if not self.tables.extend(one.held, one.computed, stop):
            short = [
                kind
                for kind in KINDS
                if -(-stop // BLOCK[kind]) - len(before[kind]) > self.tables.pools[kind].unused
            ]
            assert short
            assert {k: len(t) for k, t in one.held.tables.items()} == {k: len(t) for k, t in before.items()}
            assert all(self.tables.pools[kind].unused >= unused[kind] for kind in KINDS)
            return
        for kind in KINDS:
            self.forget(kind, one.held.tables[kind][len(before[kind]) :])
            self.read(one, kind)
            self.write(one, kind, stop)
        one.newest = stop - one.computed
        one.computed = stop
        self.tables.remember(one.held, one.content, stop)
        for kind in KINDS:
            self.note(one, kind)

    def forget(self, kind: str, taken: list[int]) -> None:
        self.findable[kind] = {p: block for p, block in self.findable[kind].items() if block not in taken}

    def read(self, one: Open, kind: str) -> None:
        """All that the next token reads is there, and is this sequence's."""
        first = 0 if kind == FULL else max(0, one.computed - WINDOW + 1)
        for position in range(first, one.computed):
            block = one.held.tables[kind][position // BLOCK[kind]]
            assert self.written[kind, block, position % BLOCK[kind]] == one.prefix(position + 1)

    def write(self, one: Open, kind: str, stop: int) -> None:
        """Into blocks that no other sequence has, and that cannot be found."""
        for position in range(one.computed, stop):
            block = one.held.tables[kind][position // BLOCK[kind]]
            others = [o for o in self.open if o is not one and block in o.held.tables[kind]]
            assert not others
            assert block not in self.findable[kind].values()
            self.written[kind, block, position % BLOCK[kind]] = one.prefix(position + 1)

    def note(self, one: Open, kind: str) -> None:
        for index in range(one.computed // BLOCK[kind]):
            block = one.held.tables[kind][index]
            prefix = one.prefix((index + 1) * BLOCK[kind])
            if block != NO_TABLE_ENTRY and block not in self.findable[kind].values():
                self.findable[kind].setdefault(prefix, block)

    @rule(one=sequences, token=st.integers(0, 1))
    def generate(self, one: Open, token: int) -> None:
        if one in self.open and one.computed == len(one.content.ids) < 30:
            one.content.ids.append(token)

    @rule(one=consumes(sequences))
    def end(self, one: Open) -> None:
        if one in self.open:
            self.tables.close(one.held)
            self.open.remove(one)

    @precondition(lambda self: len(self.open) > 2)
    @rule()
    def end_the_oldest(self) -> None:
        self.tables.close(self.open.pop(0).held)

    @invariant()
    def users_are_tables(self) -> None:
        for kind in KINDS:
            pool = self.tables.pools[kind]
            for block in range(pool.blocks):
                assert pool.users(block) == sum(one.held.tables[kind].count(block) for one in self.open)
            assert pool.unused == sum(pool.users(block) == 0 for block in range(pool.blocks))

    @invariant()
    def sliding_tables_hold_no_more_than_their_window(self) -> None:
        for one in self.open:
            held = [block for block in one.held.tables[SLIDING] if block != NO_TABLE_ENTRY]
            # What a pass added may stay until the next one.
            assert len(held) <= (WINDOW - 1 + one.newest + BLOCK[SLIDING] - 2) // BLOCK[SLIDING] + 1

    def teardown(self) -> None:
        for one in self.open:
            self.tables.close(one.held)
        for pool in self.tables.pools.values():
            assert pool.unused == pool.blocks


class MachineWithDrafts(Machine):
    drop_last = True


TestTables = Machine.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTablesWithDrafts = MachineWithDrafts.TestCase
TestTablesWithDrafts.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


# --------------------------------------------------------------------------------------------- pools


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "find"]), st.integers(0, 9)), max_size=40))
def test_blocks_are_taken_in_the_order_in_which_they_were_left(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(5)
    order, used, known = [0, 1, 2, 3, 4], [], {}
    for number, (action, pick) in enumerate(actions):
        if action == "take" and order:
            (block,) = pool.take(1)
            assert block == order.pop(0)
            known = {digest: b for digest, b in known.items() if b != block}
            used.append(block)
            if pick % 2:
                pool.remember(block, digest := bytes([number]))
                known[digest] = block
        elif action == "release" and used:
            block = used.pop(pick % len(used))
            pool.release([block])
            order.insert(len(order) if block in known.values() else 0, block)
        elif action == "find" and known:
            digest, block = sorted(known.items())[pick % len(known)]
            assert pool.find(digest) == block
            if block in order:
                pool.share(block)
                order.remove(block)
                used.append(block)
    assert pool.unused == len(order)
    assert all(pool.find(bytes([number])) == known.get(bytes([number])) for number in range(len(actions)))


def test_a_pool_gives_no_block_that_it_does_not_have_and_takes_none_back_twice() -> None:
    pool = BlockPool(2)
    taken = pool.take(2)
    with pytest.raises(CacheError, match="1 blocks are wanted, 0 of 2 are unused"):
        pool.take(1)
    pool.release(taken)
    with pytest.raises(CacheError, match="block 0 is given back, but nobody uses it"):
        pool.release([0])


# ------------------------------------------------------------------------------------------- digests


def test_a_digest_covers_everything_before_the_block_and_the_adapter() -> None:
    base = block_digest(b"x", [1, 2], [None, None], None)
    others = [
        block_digest(b"y", [1, 2], [None, None], None),
        block_digest(b"x", [1, 3], [None, None], None),
        block_digest(b"x", [12], [None], None),
        block_digest(b"x", [1, 2], [b"s", None], None),
        block_digest(b"x", [1, 2], [None, None], "a"),
        block_digest(b"x", [1, 2], [None, None], "None"),
    ]
    assert len({base, *others}) == 7


def test_a_soft_token_stands_for_its_whole_image_and_its_place_in_it() -> None:
    one = soft_digests(picture(8, (2, 4, 1.0)), 8)
    assert [digest is None for digest in one] == [True, True, *[False] * 4, True, True]
    assert len(set(one)) == 5
    longer = soft_digests(picture(8, (2, 5, 1.0)), 8)
    assert not {*longer[2:]} & {*one[2:6]}, "what comes later in the image is seen by its first tokens"
    assert soft_digests(picture(9, (3, 4, 1.0)), 9)[3:7] == one[2:6]


def test_sounds_are_known_token_by_token() -> None:
    image = picture(6, (1, 4, 1.0))
    sound = replace(image, blocks=torch.full_like(image.blocks, NO_BLOCK))
    longer = picture(6, (1, 5, 1.0))
    longer = replace(longer, blocks=torch.full_like(longer.blocks, NO_BLOCK))
    assert soft_digests(sound, 6)[1:5] == soft_digests(longer, 6)[1:5]
    assert image_spans(sound) == []
    assert image_spans(picture(9, (1, 3, 1.0), (4, 2, 1.0))) == [(1, 4), (4, 6)]


def test_a_request_that_could_never_run_is_refused() -> None:
    tables = BlockTables(CONFIG, SIZES)
    tables.check_fits(48, 8)
    with pytest.raises(
        CacheError, match=r"49 tokens.* 25 blocks of 2 in full_attention layers, which have 24"
    ):
        tables.check_fits(49, 8)
    roomy = replace(SIZES, blocks={FULL: 100, SLIDING: 3})
    with pytest.raises(CacheError, match="sliding_attention layers, which have 3"):
        BlockTables(CONFIG, roomy).check_fits(100, 8)
    BlockTables(CONFIG, roomy).check_fits(100, 4)
