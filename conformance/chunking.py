"""How a finished output is cut into stream chunks when not every chunking can be visited.

Cuts are piece counts: a cut at k ends a chunk after piece k. Single cuts are sampled everywhere (in a long
output at every marker, and at some hundred other places), so that a fault which one boundary can show is
found with a chunking of two chunks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from conformance.targets.protocol import Chunking, Piece, PieceUnit

FIXED_SIZES = (2, 3, 5, 10, 20, 64)
"""Pieces a chunk: speculative decoding and stream intervals deliver several tokens at once."""

LAGS = (1, 2, 5, 12, 32)
"""Characters that the text stays behind its token ids (catalogue R10)."""

MAX_SINGLE_CUTS = 64
"""Besides those at markers."""

MAX_MARKERS = 24
"""How many markers are cut around on both sides at once."""

RANDOM_CHUNKINGS = 12


def sampled(pieces: Sequence[Piece], unit: PieceUnit, *, seed: int) -> list[Chunking]:
    """Chunkings for an output that is only sampled; without duplicates, simplest first.

    Args:
        pieces: The output's tokens or characters.
        unit: Which of the two they are.
        seed: Seed of the random chunkings.
    """
    n = len(pieces)
    found: dict[tuple[int, ...], str] = {(): "one chunk"}
    for name, cuts in _named_cuts(pieces, n, random.Random(seed)):  # noqa: S311 - a seeded sample
        found.setdefault(tuple(sorted({c for c in cuts if 0 < c < n})), name)
    return [Chunking(name=name, unit=unit, cuts=cuts) for cuts, name in found.items()]


def lagging(pieces: Sequence[Piece], *, seed: int) -> list[Chunking]:
    """Token chunkings whose text stays behind the ids; without duplicates, and none of one chunk only."""
    n = len(pieces)
    rng = random.Random(seed)  # noqa: S311 - a seeded sample
    found: dict[tuple[tuple[int, ...], int], str] = {}
    for lag in LAGS:
        for size in (1, 10):
            found.setdefault((tuple(range(size, n, size)), lag), f"{size} a chunk, text {lag} behind")
        cuts = tuple(k for k in range(1, n) if rng.random() < 0.3)
        found.setdefault((cuts, lag), f"random, text {lag} behind")
    return [Chunking(name=name, cuts=cuts, lag=lag) for (cuts, lag), name in found.items() if cuts]


def _named_cuts(pieces: Sequence[Piece], n: int, rng: random.Random) -> Iterator[tuple[str, Sequence[int]]]:
    yield "one piece a chunk", range(1, n)
    marks = [k for k, piece in enumerate(pieces) if piece.special]
    singles = set(range(1, n))
    if len(singles) > MAX_SINGLE_CUTS:
        singles = {*rng.sample(range(1, n), MAX_SINGLE_CUTS), *marks, *(k + 1 for k in marks)}
    for cut in sorted(singles):
        yield f"cut after piece {cut}", (cut,)
    for k in marks[:MAX_MARKERS]:
        for before in (k - 1, k):
            for after in (k + 1, k + 2):
                yield f"around the marker at piece {k + 1}", (before, after)
    yield "before every marker", marks
    yield "after every marker", [k + 1 for k in marks]
    yield "around every marker", [*marks, *(k + 1 for k in marks)]
    for size in FIXED_SIZES:
        for start in (size, 1):
            yield f"{size} pieces a chunk", range(start, n, size)
    for number in range(RANDOM_CHUNKINGS):
        density = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)[number % 6]
        yield f"random {number + 1}", [k for k in range(1, n) if rng.random() < density]


def shrink(failing: Chunking, fails: Callable[[Sequence[Chunking]], Sequence[bool]]) -> Chunking:
    """A chunking that still fails, but with one cut less, or with less lag, no longer would.

    Args:
        failing: A chunking that fails.
        fails: Judges several chunkings at once.
    """
    smaller: Chunking | None = failing
    while smaller is not None:
        current = smaller
        smaller = _first_failing(_with_fewer_cuts(current), fails) or _first_failing(
            [current.model_copy(update={"name": "shrunk", "lag": lag}) for lag in range(current.lag)], fails
        )
    return current


def _first_failing(
    candidates: Sequence[Chunking], fails: Callable[[Sequence[Chunking]], Sequence[bool]]
) -> Chunking | None:
    if not candidates:
        return None
    return next((c for c, bad in zip(candidates, fails(candidates), strict=True) if bad), None)


def _with_fewer_cuts(chunking: Chunking) -> list[Chunking]:
    cuts = chunking.cuts
    return [
        chunking.model_copy(update={"name": "shrunk", "cuts": cuts[:i] + cuts[j:]})
        for i, j in _removals(len(cuts))
    ]


def _removals(n: int) -> Iterator[tuple[int, int]]:
    """Index ranges of cuts to leave out, longest first (delta debugging).

    Pairs are always among them: a fault may depend on whether a number of cuts is odd.
    """
    widths = {n >> k for k in range(n.bit_length())} | ({2} if n > 1 else set())
    for width in sorted(widths, reverse=True):
        for start in range(0, n, width):
            yield start, min(n, start + width)


def chunk_texts(pieces: Sequence[Piece], chunking: Chunking) -> list[tuple[str, tuple[int, ...]]]:
    """Text and token ids of each chunk, with `lag` applied to the text."""
    text = "".join(p.text for p in pieces)
    bounds = [0, *chunking.cuts, len(pieces)]
    chunks: list[tuple[str, tuple[int, ...]]] = []
    shown = end = 0
    for first, last in pairwise(bounds):
        chunk = pieces[first:last]
        end += sum(len(p.text) for p in chunk)
        until = len(text) if last == len(pieces) else max(shown, end - chunking.lag)
        chunks.append((text[shown:until], tuple(t for p in chunk for t in p.ids)))
        shown = until
    return chunks
