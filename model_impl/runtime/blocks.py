"""Blocks of one pool: who uses them, which may be taken, and what the cached ones hold.

A block is used by any number of sequences. One that nobody uses may be taken, and until then it can be found
again by its digest; the one that has been unused longest goes first, those without a digest before all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

from model_impl.errors import CacheError
from model_impl.runtime.masks import NO_BLOCK
from model_impl.text import SoftTokens

Digest = bytes

FIRST = b""
"""What stands before the first block of a sequence."""


def block_digest(
    previous: Digest, ids: Sequence[int], soft: Sequence[Digest | None], adapter: str | None
) -> Digest:
    """What decides the keys and values of a block.

    Args:
        previous: Digest of the block before it, and so of everything before it.
        ids: Its tokens.
        soft: For each of them what `soft_digests` says.
        adapter: That the sequence runs with.
    """
    content = repr((previous, tuple(ids), tuple(soft), adapter))
    return hashlib.sha256(content.encode()).digest()


def soft_digests(soft: SoftTokens | None, length: int) -> list[Digest | None]:
    """For each column of a row: what stands there in the place of a token; None for a token.

    Tokens of an image see all of it, later ones too: what stands there is the whole image, and where in it.

    Args:
        soft: Of one row, [1, length]; None where there is none.
        length: Columns.
    """
    found: list[Digest | None] = [None] * length
    if soft is None:
        return found
    columns = soft.where[0].nonzero()[:, 0].tolist()
    rows = soft.features.detach().cpu().contiguous().view(torch.uint8)
    numbers = soft.blocks[0].tolist()
    whole: dict[int, bytes] = {}
    for column, row in zip(columns, rows, strict=True):
        found[column] = hashlib.sha256(row.numpy().tobytes()).digest()
        if numbers[column] != NO_BLOCK:
            whole[numbers[column]] = whole.get(numbers[column], b"") + (found[column] or b"")
    for column in columns:
        if numbers[column] != NO_BLOCK:
            first = numbers.index(numbers[column])
            image = whole[numbers[column]] + (column - first).to_bytes(8, "little")
            found[column] = hashlib.sha256(image).digest()
    return found


class BlockPool:
    """The blocks of one pool.

    Args:
        blocks: How many there are.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._users = [0] * blocks
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        """In the order in which they are taken."""
        self._digests: dict[int, Digest] = {}
        self._found: dict[Digest, int] = {}

    @property
    def unused(self) -> int:
        """How many blocks nobody uses."""
        return len(self._unused)

    def users(self, block: int) -> int:
        """How many sequences use a block."""
        return self._users[block]

    def find(self, digest: Digest) -> int | None:
        """The block with this content, used or not; None if there is none."""
        return self._found.get(digest)

    def take(self, count: int) -> list[int]:
        """Blocks for one new user, whose old content is forgotten.

        Raises:
            CacheError: fewer are unused.
        """
        if count > self.unused:
            raise CacheError(f"{count} blocks are wanted, {self.unused} of {self.blocks} are unused")
        taken = [self._unused.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.forget(block)
            self._users[block] = 1
        return taken

    def share(self, block: int) -> None:
        """One more user of a block that was found."""
        self._unused.pop(block, None)
        self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each; of those that are unused then, the first is taken first.

        Raises:
            CacheError: nobody uses one of them.
        """
        for block in blocks:
            if self._users[block] < 1:
                raise CacheError(f"block {block} is given back, but nobody uses it")
            self._users[block] -= 1
            if self._users[block] == 0:
                self._unused[block] = None
                if block not in self._digests:
                    self._unused.move_to_end(block, last=False)

    def remember(self, block: int, digest: Digest) -> None:
        """A block is full and will not be written again. Of two with the same content, the first is found."""
        if digest not in self._found and block not in self._digests:
            self._digests[block] = digest
            self._found[digest] = block

    def forget(self, block: int) -> None:
        """A block cannot be found any more."""
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._found[digest]
