"""Blocks of sequences in a hybrid cache: one table for each kind of layer, and prefixes that are found again.

A prefix is of use only if all kinds of layers have it: full layers all of it, sliding layers their window
before its end. Tables of different block sizes meet at multiples of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from model_impl.config import AttentionKind, TextConfig
from model_impl.errors import CacheError
from model_impl.runtime.blocks import FIRST, BlockPool, Digest, block_digest, soft_digests
from model_impl.runtime.masks import NO_BLOCK
from model_impl.runtime.paged import NO_TABLE_ENTRY, CacheSizes
from model_impl.text import SoftTokens

FULL: AttentionKind = "full_attention"

Span = tuple[int, int]
"""First column, and the one after the last."""


def image_spans(soft: SoftTokens | None) -> list[Span]:
    """Columns of tokens that see each other both ways, image by image, from one row's soft tokens."""
    spans: list[Span] = []
    numbers = [] if soft is None else soft.blocks[0].tolist()
    for column, number in enumerate(numbers):
        if number == NO_BLOCK:
            continue
        if spans and spans[-1][1] == column and numbers[column - 1] == number:
            spans[-1] = (spans[-1][0], column + 1)
        else:
            spans.append((column, column + 1))
    return spans


@dataclass
class Content:
    """What a sequence says; its blocks' digests follow from it."""

    ids: list[int]
    """Grows as tokens are generated."""
    soft: SoftTokens | None = None
    """Of the prompt, one row."""
    adapter: str | None = None
    spans: list[Span] = field(init=False)
    """Images."""
    _soft: list[Digest | None] = field(init=False)
    _digests: dict[int, list[Digest]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.spans = image_spans(self.soft)
        self._soft = soft_digests(self.soft, len(self.ids))

    def digests(self, size: int, count: int) -> list[Digest]:
        """Those of the first `count` blocks of `size` tokens, which must be full."""
        known = self._digests.setdefault(size, [])
        for index in range(len(known), count):
            start, stop = index * size, (index + 1) * size
            soft = self._soft[start:stop]
            soft += [None] * (size - len(soft))
            known.append(
                block_digest(known[-1] if known else FIRST, self.ids[start:stop], soft, self.adapter)
            )
        return known[:count]


@dataclass
class Held:
    """Blocks of one sequence."""

    tables: dict[AttentionKind, list[int]]
    remembered: dict[AttentionKind, int]
    """Leading blocks of each table that have been told to the pool as full."""
    hit: int
    """Leading tokens that were found in the cache."""


class BlockTables:
    """Gives blocks to sequences, shares those with the same content, and takes them back.

    Args:
        config: The model's.
        sizes: Of the pools.
        caching: Find prefixes again.
        drop_last: Of a prefix that is found, leave out the last block, as a draft head needs that keeps keys
            and values of its own beside it: its last position has read a token that comes after the block.
    """

    def __init__(
        self, config: TextConfig, sizes: CacheSizes, *, caching: bool = True, drop_last: bool = False
    ) -> None:
        sizes.check(config.kinds)
        self.kinds = config.kinds
        self.block_size = dict(sizes.block_size)
        self.window = config.sliding_window
        self.caching = caching
        self.drop_last = drop_last
        self.pools = {kind: BlockPool(sizes.blocks[kind]) for kind in self.kinds}

    @property
    def alignment(self) -> int:
        """Tokens at whose multiples the blocks of all tables end."""
        return math.lcm(*(self.block_size[kind] for kind in self.kinds))

    def open(self, content: Content) -> Held:
        """The tables of a new sequence, which hold the longest prefix that is in the cache."""
        hit = self.longest_hit(content) if self.caching else 0
        tables: dict[AttentionKind, list[int]] = {}
        for kind in self.kinds:
            found = self._found(kind, content, hit)
            first = self._first_read(kind, hit)
            tables[kind] = [NO_TABLE_ENTRY] * min(first, len(found)) + found[first:]
            for block in found[first:]:
                self.pools[kind].share(block)
        return Held(tables, {kind: len(table) for kind, table in tables.items()}, hit)

    def extend(self, held: Held, computed: int, stop: int) -> bool:
        """Make the tables reach over `stop` tokens, of which `computed` are in the cache.

        What no token after these reads goes back first.

        Returns:
            Whether there were enough blocks; if not, no table has grown.
        """
        missing: dict[AttentionKind, int] = {}
        for kind in self.kinds:
            self._leave(kind, held.tables[kind], self._first_read(kind, computed))
            missing[kind] = max(0, -(-stop // self.block_size[kind]) - len(held.tables[kind]))
        if any(count > self.pools[kind].unused for kind, count in missing.items()):
            return False
        for kind, count in missing.items():
            held.tables[kind] += self.pools[kind].take(count)
        return True

    def remember(self, held: Held, content: Content, computed: int) -> None:
        """Make blocks findable that have become full of computed tokens."""
        if not self.caching:
            return
        for kind in self.kinds:
            full = computed // self.block_size[kind]
            digests = content.digests(self.block_size[kind], full)
            for index in range(held.remembered[kind], full):
                block = held.tables[kind][index]
                if block != NO_TABLE_ENTRY:
                    self.pools[kind].remember(block, digests[index])
            held.remembered[kind] = max(held.remembered[kind], full)

    def close(self, held: Held) -> None:
        """Take all blocks back; of those with a digest, the first of the sequence are kept longest."""
        for kind, table in held.tables.items():
            self.pools[kind].release([block for block in reversed(table) if block != NO_TABLE_ENTRY])
            table.clear()

    def check_fits(self, tokens: int, span: int) -> None:
        """Refuse a sequence that could not be run even if it were alone.

        Args:
            tokens: Most that it can have in the cache.
            span: Most that one pass adds.

        Raises:
            CacheError: a pool has too few blocks.
        """
        for kind in self.kinds:
            size, pool = self.block_size[kind], self.pools[kind]
            needed = -(-tokens // size)
            if kind != FULL:
                # In the worst case the window begins at the last position of a block.
                needed = min(needed, (self.window - 1 + span + size - 2) // size + 1)
            if needed > pool.blocks:
                raise CacheError(
                    f"a request of up to {tokens} tokens, up to {span} of them in one pass, can need "
                    f"{needed} blocks of {size} in {kind} layers, which have {pool.blocks}; give more "
                    "blocks, or ask for fewer tokens"
                )

    # ------------------------------------------------------------------------------------------- prefixes

    def longest_hit(self, content: Content) -> int:
        """How many leading tokens are in the cache for all kinds of layers; never all of them."""
        length = self.full_hit(content)
        if self.drop_last:
            length = self.without_last(length)
        # One token at least is computed: there would be no logits otherwise.
        length = self.aligned(min(length, len(content.ids) - 1))
        while length > 0:
            whole = self.aligned(whole_images(content.spans, length))
            if whole == length and self.window_hit(content, length):
                return length
            length = whole if whole < length else length - self.alignment
        return 0

    def full_hit(self, content: Content) -> int:
        """How many leading tokens are in the cache of full layers, which read all of them."""
        size = self.block_size[FULL]
        for index, digest in enumerate(content.digests(size, len(content.ids) // size)):
            if self.pools[FULL].find(digest) is None:
                return index * size
        return len(content.ids) // size * size

    def without_last(self, length: int) -> int:
        """A hit of full layers without its last block."""
        return max(0, length - self.block_size[FULL])

    def aligned(self, length: int) -> int:
        """The longest part of a hit that ends at the end of a block in every table."""
        return length // self.alignment * self.alignment

    def window_hit(self, content: Content, length: int) -> bool:
        """Whether all other kinds have in the cache what the token after `length` reads."""
        for kind in self.kinds:
            if kind != FULL:
                digests = content.digests(self.block_size[kind], length // self.block_size[kind])
                read = digests[self._first_read(kind, length) :]
                if any(self.pools[kind].find(digest) is None for digest in read):
                    return False
        return True

    def _found(self, kind: AttentionKind, content: Content, hit: int) -> list[int]:
        """Blocks of a hit; `NO_TABLE_ENTRY` where one is not in the cache."""
        size, pool = self.block_size[kind], self.pools[kind]
        found = [pool.find(digest) for digest in content.digests(size, hit // size)]
        return [NO_TABLE_ENTRY if block is None else block for block in found]

    def _first_read(self, kind: AttentionKind, computed: int) -> int:
        """Index of the first block that the token after `computed` ones reads."""
        if kind == FULL:
            return 0
        return max(0, computed - self.window + 1) // self.block_size[kind]

    def _leave(self, kind: AttentionKind, table: list[int], first: int) -> None:
        """Give back the blocks before an index."""
        left = [index for index in range(min(first, len(table))) if table[index] != NO_TABLE_ENTRY]
        self.pools[kind].release([table[index] for index in reversed(left)])
        for index in left:
            table[index] = NO_TABLE_ENTRY


def whole_images(spans: Sequence[Span], length: int) -> int:
    """At most `length` leading tokens, such that no image is torn."""
    return next((start for start, stop in spans if start < length < stop), length)
