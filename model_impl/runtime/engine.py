"""Continuous batching: requests join and leave between steps, prompts come in chunks, prefixes are shared.

Each step runs one pass for sequences that generate and one for prompts, chooses or verifies tokens, and lets
a draft model go on from there. A request's tokens are what `generate` gives it alone, up to rounding; with
drafted tokens and sampling, they have the same distribution.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from model_impl.config import AttentionKind
from model_impl.errors import CacheError
from model_impl.runtime.generate import FinishReason, check_options, checked_prompt
from model_impl.runtime.masks import NO_BLOCK
from model_impl.runtime.prefix import BlockTables, Content
from model_impl.runtime.request import Output, Request, Result
from model_impl.runtime.runner import Batch, Piece, Runner
from model_impl.runtime.sampling import GenerationError, Sampling
from model_impl.runtime.scheduler import Scheduled, Scheduler, SequenceState
from model_impl.speculative.proposer import Grown, Proposer
from model_impl.speculative.verify import (
    Acceptance,
    Draft,
    target_distribution,
    verify_greedy,
    verify_sampled,
)
from model_impl.text import SoftTokens, States


@dataclass(frozen=True)
class EngineConfig:
    """How an engine works; nothing here changes what comes out, up to rounding."""

    max_tokens_per_step: int = 2048
    """Budget of a step. Sequences that generate always go on, and an image is never torn; else a step feeds
    no more, so that long prompts come in chunks."""
    max_sequences: int = 64
    """Most that run at once; the others wait."""
    prefix_caching: bool = True
    """Find leading blocks of a prompt that an earlier request has computed."""
    draft_tokens: int = 3
    """Most drafted tokens in a round, where there is a draft model."""

    def __post_init__(self) -> None:
        for name in ("max_tokens_per_step", "max_sequences", "draft_tokens"):
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} is {getattr(self, name)}; it must be 1 or above")


class Engine:
    """Runs requests on a runner.

    Args:
        runner: Holds the model and its cache; the engine does not close it.
        config: How to work.
        proposer: A draft model made for this runner; none unless given.

    Raises:
        GenerationError: the runner does not give the states that the proposer reads.
    """

    def __init__(
        self, runner: Runner, config: EngineConfig | None = None, proposer: Proposer | None = None
    ) -> None:
        self.runner = runner
        self.config = config or EngineConfig()
        self.proposer = proposer
        """The draft model, if there is one."""
        if proposer is not None and proposer.aux_layers and proposer.aux_layers != runner.aux_layers:
            raise GenerationError(
                f"the draft model reads states after {list(proposer.aux_layers)} layers, the runner gives "
                f"them after {list(runner.aux_layers)}; make the runner with the draft model's"
            )
        keeps = proposer is not None and proposer.keeps_cache
        self._drafts = self.config.draft_tokens if proposer is not None else 0
        self.blocks = BlockTables(
            runner.config, runner.sizes, caching=self.config.prefix_caching, drop_last=keeps
        )
        self._scheduler = Scheduler(
            self.blocks,
            self.config.max_tokens_per_step,
            self.config.max_sequences,
            lookahead=self._drafts if keeps else 0,
        )
        self._sequences: dict[int, SequenceState] = {}
        self._results: dict[int, Result] = {}
        self._next = 0
        self.acceptance = Acceptance()
        """Of all requests that have ended."""

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._sequences)

    def add(self, request: Request) -> int:
        """Take a request, which runs from one of the next steps on.

        Returns:
            Its number.

        Raises:
            GenerationError: it is out of range or does not fit the model.
            CacheError: it could not be run even if it were alone.
        """
        prompt = self._checked(request)
        number = self._next
        sequence = SequenceState(
            number,
            request,
            Content(prompt, request.soft, request.adapter),
            random.Random(request.seed),  # noqa: S311 - sampling, not a secret
            random.Random(f"drafts of {request.seed}"),  # noqa: S311
        )
        self._scheduler.add(sequence, self._drafts)
        self._sequences[number] = sequence
        self._next += 1
        return number

    def abort(self, number: int) -> None:
        """End a request; it has no result. One that has ended already is left as it is."""
        sequence = self._sequences.pop(number, None)
        if sequence is not None:
            self._scheduler.remove(sequence)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests to their ends, beside those that are under way.

        Returns:
            One result for each, in their order.

        Raises:
            GenerationError, CacheError: as `add` and `step`; none of these requests goes on then.
        """
        numbers: list[int] = []
        try:
            for request in requests:
                number = self.add(request)
                numbers.append(number)
            while any(number in self._sequences for number in numbers):
                self.step()
        except BaseException:
            for number in numbers:
                self.abort(number)
                self._results.pop(number, None)
            raise
        return [self.result(number) for number in numbers]

    def result(self, number: int) -> Result:
        """Of a request that has ended, once.

        Raises:
            GenerationError: it has not, or its result was taken.
        """
        if number not in self._results:
            raise GenerationError(
                f"there is no result of request {number}; it runs, was aborted, or was taken"
            )
        return self._results.pop(number)

    def step(self) -> list[Output]:
        """One step of all sequences that have a place in it.

        Returns:
            New tokens, those of one request in order; nothing if there is no request.

        Raises:
            GenerationError: the logits of a request are not finite. It is named, and no request has moved, so
                that the others go on once it is aborted.
            CacheError: no request has blocks to go on; a fault of the scheduler, which would not pass.
        """
        scheduled = self._scheduler.schedule()
        if self._sequences and not scheduled:
            raise CacheError(
                f"none of {len(self._sequences)} requests can go on, though each was found to fit; abort "
                "some, or give more blocks"
            )
        generating = [one for one in scheduled if len(one.fed) <= 1 + self._drafts]
        prompts = [one for one in scheduled if len(one.fed) > 1 + self._drafts]
        passes = [_Pass(part, self._run(part)) for part in (generating, prompts) if part]
        # All logits are looked at before any request moves, or takes a random number.
        logits = [self._logits(one) for one in passes]
        outputs: list[Output] = []
        for one, values in zip(passes, logits, strict=True):
            outputs += self._grow(one, values)
            self._propose(one)
        for sequence in [one.sequence for one in scheduled]:
            if sequence.number in self._results:
                self._scheduler.remove(sequence)
                del self._sequences[sequence.number]
                self.acceptance += sequence.acceptance
        return outputs

    # ----------------------------------------------------------------------------------------------- a step

    def _run(self, scheduled: Sequence[Scheduled]) -> States:
        pieces = []
        for one in scheduled:
            sequence = one.sequence
            soft = _soft(sequence.request, one.start, one.start + len(one.fed))
            pieces.append(Piece(one.fed, one.start, _tables(sequence), soft, sequence.request.adapter))
        return self.runner.run(Batch(tuple(pieces)))

    def _logits(self, one: _Pass) -> Tensor | None:
        """Of all places that a token comes from, float32 [places, V]; the head sees no others.

        Raises:
            GenerationError: they are not finite.
        """
        if not one.places:
            return None
        hidden = one.states.hidden
        if len(one.places) == hidden.shape[0] * hidden.shape[1]:
            hidden = hidden.flatten(0, 1)
        else:
            rows, columns = zip(*one.places, strict=True)
            hidden = hidden[list(rows), list(columns)]
        adapters = [one.scheduled[row].sequence.request.adapter for row, _ in one.places]
        logits = self.runner.logits(hidden, adapters).float()
        finite = logits.isfinite().all(dim=-1).tolist()
        if not all(finite):
            row, column = one.places[finite.index(False)]
            broken = one.scheduled[row]
            raise GenerationError(
                f"request {broken.sequence.number}: the logits after {broken.start + column + 1} tokens are "
                "not finite; look for broken weights, or for overflow in the model's dtype"
            )
        return logits

    def _grow(self, one: _Pass, logits: Tensor | None) -> list[Output]:
        """Move the sequences of a pass on."""
        outputs: list[Output] = []
        chosen = {} if logits is None else _chosen(one, logits)
        for scheduled in one.scheduled:
            sequence = scheduled.sequence
            tokens: tuple[int, ...] = ()
            if logits is not None and scheduled.gives_token:
                tokens = _until_stop(chosen[sequence.number], sequence.request.stop_ids)
                if scheduled.drafted:
                    # The last token is the target's own, unless a drafted one has ended the request.
                    stay = min(len(tokens), len(chosen[sequence.number]) - 1)
                    sequence.acceptance += Acceptance((len(scheduled.drafted),), (stay,))
                outputs += self._take(sequence, tokens, logits[one.giving[sequence.number]])
                # What is computed again in several pieces keeps its draft until it has been judged.
                sequence.draft = Draft()
            # The newest token has not been fed; what was fed behind those that stay does not count.
            sequence.computed = len(sequence.ids) - 1 if tokens else scheduled.stop
            assert sequence.held is not None
            self.blocks.remember(sequence.held, sequence.content, sequence.computed)
        return outputs

    def _take(self, sequence: SequenceState, tokens: Sequence[int], logits: Tensor) -> list[Output]:
        """New tokens of a sequence, of which the last may end it."""
        request = sequence.request
        asked = request.logprobs or request.top_logprobs
        values = logits[: len(tokens)].log_softmax(dim=-1) if asked else logits
        outputs: list[Output] = []
        for token, row in zip(tokens, values, strict=False):
            sequence.ids.append(token)
            reason: FinishReason | None = None if sequence.left else "length"
            if token in request.stop_ids:
                reason = "stop"
            logprob = top = None
            if request.logprobs:
                logprob = float(row[token])
                sequence.logprobs.append(logprob)
            if request.top_logprobs:
                best = row.topk(request.top_logprobs)
                top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                sequence.top.append(top)
            outputs.append(Output(sequence.number, token, logprob, top, reason))
            if reason is not None:
                self._results[sequence.number] = _result(sequence, reason)
        return outputs

    def _propose(self, one: _Pass) -> None:
        """Let the draft model go on from a pass.

        It is told of sequences that have ended too, as their blocks may be found again.
        """
        if self.proposer is None:
            return
        grown = []
        for scheduled in one.scheduled:
            sequence = scheduled.sequence
            assert sequence.held is not None
            going = scheduled.gives_token and sequence.number not in self._results
            grown.append(
                Grown(
                    ids=sequence.ids,
                    start=scheduled.start,
                    count=sequence.computed - scheduled.start,
                    tables=sequence.held.tables,
                    # A round gives one token more than stay of those drafted.
                    wanted=min(self._drafts, sequence.left - 1) if going else 0,
                    sampling=sequence.request.sampling,
                    source=sequence.draft_source,
                )
            )
        drafts = self.proposer.propose(one.states, grown)
        for scheduled, draft in zip(one.scheduled, drafts, strict=True):
            if scheduled.gives_token:
                scheduled.sequence.draft = draft

    def _checked(self, request: Request) -> list[int]:
        """The prompt as a list of ints, if the request fits the model."""
        config = self.runner.config
        check_options(config, request.sampling, request.max_new_tokens, request.top_logprobs, least=1)
        prompt = checked_prompt(config, request.prompt, request.max_new_tokens)
        if request.soft is not None and request.soft.where.shape != (1, len(prompt)):
            raise GenerationError(
                f"soft tokens for {list(request.soft.where.shape)} rows and columns do not fit one prompt of "
                f"{len(prompt)} tokens"
            )
        return prompt


class _Pass:
    """One pass of a step: what was fed, and what came out."""

    def __init__(self, scheduled: Sequence[Scheduled], states: States) -> None:
        self.scheduled = scheduled
        self.states = states
        self.places: list[tuple[int, int]] = []
        """Rows and columns that a token comes from: of each newest token, and of all drafted ones."""
        self.giving: dict[int, slice] = {}
        """Where each sequence's are among `places`."""
        for row, one in enumerate(scheduled):
            if one.gives_token:
                first, count = one.stop - one.start - 1, 1 + len(one.drafted)
                self.giving[one.sequence.number] = slice(len(self.places), len(self.places) + count)
                self.places += [(row, first + place) for place in range(count)]


def _chosen(one: _Pass, logits: Tensor) -> dict[int, tuple[int, ...]]:
    """New tokens of each sequence that gives any: drafted ones that stay, and one more."""
    found: dict[int, tuple[int, ...]] = {}
    alike: defaultdict[Sampling, list[Scheduled]] = defaultdict(list)
    for scheduled in one.scheduled:
        if scheduled.gives_token:
            alike[scheduled.sequence.request.sampling].append(scheduled)
    for sampling, rows in alike.items():
        whole = []
        for scheduled in rows:
            sequence = scheduled.sequence
            if sampling.temperature > 0 and scheduled.drafted:
                p = target_distribution(sampling, logits[one.giving[sequence.number]])
                found[sequence.number] = verify_sampled(p, sequence.draft, sequence.source)
            else:
                whole.append(scheduled)
        spans = [range(len(logits))[one.giving[scheduled.sequence.number]] for scheduled in whole]
        places = [place for span in spans for place in span]
        if not places:
            continue
        part = logits if len(places) == len(logits) else logits[places]
        uniforms = [] if sampling.temperature == 0 else [row.sequence.source.random() for row in whole]
        tokens = iter(sampling.choose(part, uniforms).tolist())
        for scheduled, span in zip(whole, spans, strict=True):
            own = [next(tokens) for _ in span]
            found[scheduled.sequence.number] = verify_greedy(own, scheduled.drafted)
    return found


def _until_stop(tokens: tuple[int, ...], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """Tokens up to the first that ends a request."""
    return tokens[: next((n for n, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))]


def _tables(sequence: SequenceState) -> dict[AttentionKind, tuple[int, ...]]:
    assert sequence.held is not None
    return {kind: tuple(table) for kind, table in sequence.held.tables.items()}


def _soft(request: Request, start: int, stop: int) -> SoftTokens | None:
    """The soft tokens of some columns of a sequence; behind the prompt there are none."""
    prompt = len(request.prompt)
    if request.soft is None or start >= prompt:
        return None
    own = request.soft.columns(start, min(stop, prompt))
    if not own.where.any():
        return None
    behind = max(0, stop - prompt)
    return SoftTokens(
        nn.functional.pad(own.where, (0, behind), value=False),
        own.features,
        nn.functional.pad(own.blocks, (0, behind), value=NO_BLOCK),
    )


def _result(sequence: SequenceState, reason: FinishReason) -> Result:
    request = sequence.request
    return Result(
        ids=tuple(sequence.ids[len(request.prompt) :]),
        finish_reason=reason,
        logprobs=tuple(sequence.logprobs) if request.logprobs else None,
        top=tuple(sequence.top) if request.top_logprobs else None,
        cached_tokens=sequence.cached_tokens or 0,
        preemptions=sequence.preemptions,
        acceptance=sequence.acceptance,
    )
