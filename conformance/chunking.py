"""How a finished output is cut into stream chunks when not every chunking can be visited.

Cuts are piece counts: a cut at k ends a chunk after piece k. All single cuts are always sampled, so a
fault that one boundary can show is found with a chunking of two chunks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from conformance.targets.protocol import Chunking, Piece, PieceUnit

FIXED_SIZES = (2, 3, 4, 5, 7, 10, 16, 20, 32, 64, 256)
"""Pieces a chunk: speculative decoding and stream intervals deliver several tokens at once."""

LAGS = (1, 2, 3, 5, 8, 12, 20, 32)
"""Characters that the text stays behind its token ids (catalogue R10)."""

MAX_SINGLE_CUTS = 200
RANDOM_CHUNKINGS = 24


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
    """Token chunkings whose text stays behind the ids."""
    n = len(pieces)
    rng = random.Random(seed)  # noqa: S311 - a seeded sample
    found = []
    for lag in LAGS:
        for size in (1, 2, 10):
            cuts = tuple(range(size, n, size))
            found.append(Chunking(name=f"{size} a chunk, text {lag} behind", cuts=cuts, lag=lag))
        cuts = tuple(k for k in range(1, n) if rng.random() < 0.3)
        found.append(Chunking(name=f"random, text {lag} behind", cuts=cuts, lag=lag))
    return found


def _named_cuts(pieces: Sequence[Piece], n: int, rng: random.Random) -> Iterator[tuple[str, Sequence[int]]]:
    yield "one piece a chunk", range(1, n)
    positions = range(1, n)
    if n - 1 > MAX_SINGLE_CUTS:
        positions = sorted(rng.sample(positions, MAX_SINGLE_CUTS))  # type: ignore[assignment]
    for cut in positions:
        yield f"cut after piece {cut}", (cut,)
    marks = [k for k, piece in enumerate(pieces) if piece.special]
    for k in marks:
        for before in (k - 1, k):
            for after in (k + 1, k + 2):
                yield f"around the marker at piece {k + 1}", (before, after)
    yield "before every marker", marks
    yield "after every marker", [k + 1 for k in marks]
    yield "around every marker", [*marks, *(k + 1 for k in marks)]
    for size in FIXED_SIZES:
        for start in {size, 1}:
            yield f"{size} pieces a chunk", range(start, n, size)
    for number in range(RANDOM_CHUNKINGS):
        density = (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)[number % 6]
        yield f"random {number + 1}", [k for k in range(1, n) if rng.random() < density]


def shrink(failing: Chunking, fails: Callable[[Sequence[Chunking]], Sequence[bool]]) -> Chunking:
    """Smallest chunking found that still fails: fewest cuts, then least lag.

    Args:
        failing: A chunking that fails.
        fails: Judges several chunkings at once.
    """
    current = failing
    if current.lag:
        smaller = [current.model_copy(update={"lag": lag}) for lag in (0, 1, 2, 3, 5, 8) if lag < current.lag]
        verdicts = fails(smaller) if smaller else ()
        current = next((c for c, bad in zip(smaller, verdicts, strict=True) if bad), current)
    while current.cuts:
        candidates = [
            current.model_copy(update={"name": "shrunk", "cuts": current.cuts[:i] + current.cuts[j:]})
            for i, j in _removals(len(current.cuts))
        ]
        verdicts = fails(candidates)
        smaller_one = next((c for c, bad in zip(candidates, verdicts, strict=True) if bad), None)
        if smaller_one is None:
            return current
        current = smaller_one
    return current


def _removals(n: int) -> Iterator[tuple[int, int]]:
    """Index ranges of cuts to leave out, longest first (delta debugging)."""
    width = n
    while width:
        for start in range(0, n, width):
            yield start, min(n, start + width)
        width //= 2


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
