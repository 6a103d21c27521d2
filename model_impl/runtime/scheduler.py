"""Which tokens of which sequences the next step computes.

Sequences that generate always go on; prompts share what is left of a budget of tokens, the oldest first, and
wait for blocks. Where a running sequence lacks blocks, the youngest gives up all of its own and is computed
again later.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from model_impl.runtime.prefix import BlockTables, Content, Held, Span
from model_impl.runtime.request import Request
from model_impl.speculative.verify import Acceptance, Draft


@dataclass(eq=False)
class SequenceState:
    """A request under way."""

    number: int
    request: Request
    content: Content
    source: random.Random
    """Of randomness for the tokens that stay."""
    draft_source: random.Random
    """Of randomness for drafted tokens."""
    held: Held | None = None
    """None while it waits."""
    computed: int = 0
    """Leading tokens that are in the cache."""
    draft: Draft = field(default_factory=Draft)
    """Follows the newest token."""
    logprobs: list[float] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    cached_tokens: int | None = None
    preemptions: int = 0

    @property
    def ids(self) -> list[int]:
        """The prompt, and all that was generated."""
        return self.content.ids

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return len(self.request.prompt) + self.request.max_new_tokens - len(self.ids)

    @property
    def limit(self) -> int:
        """Most tokens that it can ever have in the cache: its last one is not fed."""
        return len(self.request.prompt) + self.request.max_new_tokens - 1


@dataclass(frozen=True)
class Scheduled:
    """Tokens of one sequence in the next step."""

    sequence: SequenceState
    start: int
    stop: int
    """Of its known tokens, the one after the last."""
    drafted: tuple[int, ...]
    """Fed behind them."""
    gives_token: bool
    """Whether its newest token is among them, so that the next one comes out."""

    @property
    def fed(self) -> tuple[int, ...]:
        """All tokens of the piece."""
        return (*self.sequence.ids[self.start : self.stop], *self.drafted)


def chunk_end(spans: Sequence[Span], start: int, stop: int) -> int:
    """Where a pass over tokens from `start` on may end, if `stop` is wished: no image is torn.

    A pass ends before an image that does not fit, and behind it where it begins with that image.
    """
    for first, last in spans:
        if first < stop < last:
            return first if first > start else last
    return stop


class Scheduler:
    """Sequences that run and that wait.

    Args:
        blocks: Of the caches.
        max_tokens: Budget of a step.
        max_sequences: Most that run at once.
        lookahead: Positions behind those of a pass that a draft model may write.
    """

    def __init__(self, blocks: BlockTables, max_tokens: int, max_sequences: int, lookahead: int = 0) -> None:
        self.blocks = blocks
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        """The oldest first."""
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._lookahead = lookahead

    def add(self, sequence: SequenceState, drafts: int) -> None:
        """A new sequence, with up to `drafts` drafted tokens in a pass.

        Raises:
            CacheError: it would lack blocks even if it were alone.
        """
        longest = max((stop - start for start, stop in sequence.content.spans), default=0)
        # A sequence that is computed again feeds its drafted tokens behind the last piece.
        span = max(self._max_tokens, longest) + drafts + self._lookahead
        self.blocks.check_fits(sequence.limit, min(span, sequence.limit))
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """End a sequence, whatever it is doing; its blocks come back."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step's tokens; nothing if there is no sequence.

        At least one goes on: `add` made sure that the oldest has blocks where all others give theirs up.
        """
        budget = self._max_tokens
        chosen: list[Scheduled] = []
        generating = [sequence for sequence in self.running if len(sequence.ids) - sequence.computed == 1]
        prompts = [sequence for sequence in self.running if sequence not in generating]
        waited = len(self.waiting)
        for sequence in [*generating, *prompts]:
            # Some may have given up their blocks to one before them.
            piece = self._piece(sequence, budget) if sequence.held is not None else None
            if piece is None or not self._make_room(piece, chosen):
                continue
            chosen.append(piece)
            budget -= len(piece.fed)
        if len(self.waiting) > waited:
            # Blocks are scarce; what was just given up would only be taken again.
            return chosen
        while self.waiting and len(self.running) < self._max_sequences and (budget > 0 or not chosen):
            piece = self._admit(self.waiting[0], max(budget, 1))
            if piece is None:
                break
            chosen.append(piece)
            budget -= len(piece.fed)
        return chosen

    def _piece(self, sequence: SequenceState, budget: int) -> Scheduled | None:
        """What a running sequence may feed, if the budget allows anything."""
        start, stop = sequence.computed, len(sequence.ids)
        if stop - start > 1:
            if budget < 1:
                return None
            stop = chunk_end(sequence.content.spans, start, min(stop, start + budget))
        whole = stop == len(sequence.ids)
        return Scheduled(sequence, start, stop, sequence.draft.ids if whole else (), whole)

    def _admit(self, sequence: SequenceState, budget: int) -> Scheduled | None:
        """Let a waiting sequence run, if there are blocks for its first piece."""
        sequence.held = self.blocks.open(sequence.content)
        sequence.computed = sequence.held.hit
        piece = self._piece(sequence, budget)
        if piece is None or not self._extend(piece):
            self._give_back(sequence)
            return None
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.held.hit
        self.waiting.popleft()
        self.running.append(sequence)
        return piece

    def _make_room(self, piece: Scheduled, chosen: Sequence[Scheduled]) -> bool:
        """Blocks for a piece, taken from the youngest if need be; not from one that goes on in this step.

        Returns:
            Whether the sequence goes on; if not, it waits again.
        """
        busy = {one.sequence.number for one in chosen}
        while not self._extend(piece):
            youngest = next(one for one in reversed(self.running) if one.number not in busy)
            self._preempt(youngest)
            if youngest is piece.sequence:
                return False
        return True

    def _extend(self, piece: Scheduled) -> bool:
        sequence = piece.sequence
        assert sequence.held is not None
        # A draft model writes behind the tokens of the pass, and never beyond what the request may have.
        reach = min(piece.stop + len(piece.drafted) + self._lookahead, max(sequence.limit, piece.stop))
        return self.blocks.extend(sequence.held, sequence.computed, reach)

    def _preempt(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: SequenceState) -> None:
        if sequence.held is not None:
            self.blocks.close(sequence.held)
        # Drafted tokens still follow the newest one; drawn again, they would be others.
        sequence.held, sequence.computed = None, 0
