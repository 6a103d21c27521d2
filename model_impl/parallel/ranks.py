"""What the ranks of one stage do together."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The ranks that share the layers of a stage."""

    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, on each of them; `x` may be overwritten."""
        ...

    def gather(self, x: Tensor, total: int) -> Tensor:
        """All ranks' parts of the last axis, side by side, cut to `total` columns.

        Args:
            x: [..., columns]: as `even_parts` divides them; the last ranks may have fewer.
            total: Of all ranks.
        """
        ...


class Alone:
    """A stage that one rank holds whole."""

    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def gather(self, x: Tensor, total: int) -> Tensor:
        """As it is."""
        del total
        return x


def even_part(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of one of so many parts of `total`; the last ones may be smaller, or empty."""
    widest = -(-total // parts)
    return min(index * widest, total), min((index + 1) * widest, total)
