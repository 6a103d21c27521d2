"""Exploring how a target streams one output: by certificate where possible, else by sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from conformance.checks.base import Search
from conformance.chunking import chunk_texts, lagging, sampled, shrink
from conformance.errors import EngineError, NotRecordedError
from conformance.results import Problem, StreamEvidence
from conformance.targets.protocol import (
    Certificate,
    CertifyRequest,
    Chunking,
    Outcome,
    ParseRequest,
    ParseResult,
    Piece,
    PieceUnit,
    StreamRequest,
    StreamResult,
    Target,
    TargetInfo,
    ToolCall,
    ToolCallDelta,
)
from conformance.tokenization import characters
from conformance.worker.adapter import STOP_TOKENS

MAX_CERTIFIED_CHARACTERS = 48
"""Longer outputs are certified by tokens, and sampled by characters besides: the search costs n²/2."""

MAX_SECONDS = 3.0
MAX_STATES = 100_000

REPLAYED_DENSITIES = (0.15, 0.35, 0.6, 0.85)
"""A certificate is the target's word. Besides the two extremes a chunking of each of these shares of cuts is
streamed, and must end as one of the certificate's outcomes says."""

_BATCH = 16
"""Chunkings in one request, so that a request's time limit says the same for few chunkings and for many."""


@dataclass(frozen=True)
class Streamed:
    """One streamed answer, put together by call index.

    A certificate's outcome has only the result, the error and `ragged`.
    """

    result: ParseResult
    indices: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()
    error: str | None = None
    ragged: bool = False
    starts: tuple[str, ...] = ()
    """What is wrong with the first deltas of calls."""
    texts: int = 0
    """Number of deltas with reasoning or content."""
    finest: bool = False
    """Every piece of the output was a chunk of its own."""


@dataclass(frozen=True)
class Exploration:
    """What was found, and how far it reaches."""

    evidence: StreamEvidence
    problems: tuple[Problem, ...] = ()


Judge = Callable[[Streamed], list[Problem]]


def explore(
    request: ParseRequest,
    target: Target,
    info: TargetInfo,
    *,
    seed: int,
    search: Search,
    judge: Judge,
) -> Exploration:
    """Stream an output in every way that can be had; report each broken rule with its smallest chunking."""
    if "parse_stream" not in info.capabilities:
        return Exploration(StreamEvidence(kind="unsupported", reason="the target does not stream"))
    explorer = _Explorer(request, target, info, seed, judge)
    evidence = explorer.certify(search)
    if evidence.kind != "certified":
        evidence = explorer.sample(evidence)
    elif info.stream_unit == "tokens":
        explorer.sample_chunkings(lagging(request.pieces, seed=seed))
    elif evidence.unit == "tokens":
        explorer.sample_chunkings(sampled(characters(request.output), "characters", seed=seed))
    return Exploration(evidence, tuple(explorer.problems.values()))


def sampled_chunkings(request: ParseRequest, info: TargetInfo, *, seed: int = 0) -> list[Chunking]:
    """The chunkings in which an output is streamed that is not certified."""
    chunkings = sampled(request.pieces, "tokens", seed=seed)
    if info.stream_unit == "characters":
        return chunkings + sampled(characters(request.output), "characters", seed=seed)
    return chunkings + lagging(request.pieces, seed=seed)


class _Explorer:
    def __init__(
        self, request: ParseRequest, target: Target, info: TargetInfo, seed: int, judge: Judge
    ) -> None:
        self._request = request
        self._target = target
        self._info = info
        self._seed = seed
        self._judge = judge
        self.problems: dict[str, Problem] = {}

    def certify(self, search: Search) -> StreamEvidence:
        """Search all chunkings, in the finest unit that the target can meet and the budget allows."""
        unit: PieceUnit = "tokens"
        if self._info.stream_unit == "characters" and len(self._request.output) <= MAX_CERTIFIED_CHARACTERS:
            unit = "characters"
        pieces = self._pieces(unit)
        feeds = len(pieces) * (len(pieces) + 1) // 2
        reason = ""
        if "certify" not in self._info.capabilities:
            reason = "the target's parser state cannot be copied"
        elif search == "none":
            reason = "no search was asked for"
        elif search == "bounded" and feeds > self._info.search_feeds:
            reason = f"a search takes {feeds} feeds, above this target's {self._info.search_feeds}"
        if reason:
            return StreamEvidence(kind="sampled", unit=unit, pieces=len(pieces), reason=reason)
        try:
            certificate = self._target.certify(
                CertifyRequest(
                    request=self._request, unit=unit, max_states=MAX_STATES, max_seconds=MAX_SECONDS
                )
            )
        except EngineError as error:
            return StreamEvidence(
                kind="sampled", unit=unit, pieces=len(pieces), reason=f"the search failed: {error}"
            )
        reason = certificate.reason if not certificate.complete else self._inconsistency(certificate, unit)
        if reason:
            return StreamEvidence(kind="sampled", unit=unit, pieces=len(pieces), reason=reason)
        for outcome in certificate.outcomes:
            if self._judge(_of_outcome(outcome)):
                chunking = Chunking(name="smallest that leads here", unit=unit, cuts=outcome.cuts)
                streamed = self._stream([chunking])[0]
                if not self._judge(streamed):
                    reason = f"the search found what streaming does not show (cuts {list(chunking.cuts)})"
                    return StreamEvidence(kind="sampled", unit=unit, pieces=len(pieces), reason=reason)
                self._report(chunking, streamed)
        # Of ids and of what comes first a certificate says nothing; these streams are judged by that too.
        replayed = list(self._replayed(unit, len(pieces)))
        known = {_end(_of_outcome(outcome)) for outcome in certificate.outcomes}
        for chunking, streamed in zip(replayed, self.sample_chunkings(replayed), strict=True):
            if _end(streamed) not in known:
                cuts = list(chunking.cuts)
                reason = (
                    f"streaming shows what the search did not find (cuts {cuts[:20]}, {len(cuts)} in all)"
                )
                return StreamEvidence(kind="sampled", unit=unit, pieces=len(pieces), reason=reason)
        return StreamEvidence(
            kind="certified",
            unit=unit,
            pieces=certificate.pieces,
            chunkings=str(1 << max(certificate.pieces - 1, 0)),
            states=certificate.states,
        )

    def _inconsistency(self, certificate: Certificate, unit: PieceUnit) -> str:
        """Why a certificate cannot be about this output; empty if it can."""
        n = len(self._pieces(unit))
        last = self._request.pieces[-1] if self._request.pieces else None
        lengths = {n}
        if unit == "characters" and last is not None and last.special and last.text in STOP_TOKENS:
            lengths.add(n - len(last.text))  # servers keep a final stop token's text from the parser
        if certificate.unit != unit or certificate.pieces not in lengths:
            return (
                f"the search was over {certificate.pieces} {certificate.unit}, the output has {n} {unit}: "
                "no certificate"
            )
        every = 1 << max(certificate.pieces - 1, 0)
        if sum(_count(outcome) for outcome in certificate.outcomes) != every:
            return f"the outcomes' chunkings do not add up to 2^{every.bit_length() - 1}: no certificate"
        for outcome in certificate.outcomes:
            if list(outcome.cuts) != sorted({c for c in outcome.cuts if 0 < c < certificate.pieces}):
                return f"an outcome's cuts {list(outcome.cuts)} are none of this output: no certificate"
        return ""

    def _replayed(self, unit: PieceUnit, n: int) -> Iterator[Chunking]:
        yield Chunking(name="one chunk", unit=unit)
        rng = random.Random(self._seed)  # noqa: S311 - a seeded sample
        seen: set[tuple[int, ...]] = {()}
        for density in (1.0, *REPLAYED_DENSITIES):
            cuts = tuple(k for k in range(1, n) if rng.random() < density)
            if cuts not in seen:
                seen.add(cuts)
                yield Chunking(name=f"{density:.0%} of the cuts", unit=unit, cuts=cuts)

    def sample(self, evidence: StreamEvidence) -> StreamEvidence:
        """Stream the sampled chunkings; return the evidence with their number."""
        chunkings = sampled_chunkings(self._request, self._info, seed=self._seed)
        self.sample_chunkings(chunkings)
        return evidence.model_copy(update={"chunkings": str(len(chunkings))})

    def sample_chunkings(self, chunkings: Sequence[Chunking]) -> list[Streamed]:
        """Stream these; keep the simplest failure of each rule, shrunk. Return what was streamed."""
        failures: dict[str, Chunking] = {}
        answers = self._stream(chunkings)
        for chunking, streamed in zip(chunkings, answers, strict=True):
            for problem in self._judge(streamed):
                best = failures.get(problem.rule)
                if best is None or (len(chunking.cuts), chunking.lag) < (len(best.cuts), best.lag):
                    failures[problem.rule] = chunking
        for rule, chunking in failures.items():
            if rule in self.problems:
                continue
            try:
                smallest = shrink(chunking, lambda cs, rule=rule: self._fails(cs, rule))  # type: ignore[misc]
            except NotRecordedError:  # it fails all the same
                smallest = chunking
            self._report(smallest, self._stream([smallest])[0], only=rule)
        return answers

    def _fails(self, chunkings: Sequence[Chunking], rule: str) -> list[bool]:
        return [any(p.rule == rule for p in self._judge(s)) for s in self._stream(chunkings)]

    def _stream(self, chunkings: Sequence[Chunking]) -> list[Streamed]:
        if not chunkings:
            return []
        requests = (
            StreamRequest(request=self._request, chunkings=batch)
            for batch in (tuple(chunkings[i : i + _BATCH]) for i in range(0, len(chunkings), _BATCH))
        )
        return [
            replace(assemble(result), finest=self._is_finest(chunking))
            for request in requests
            for chunking, result in zip(request.chunkings, self._target.parse_stream(request), strict=True)
        ]

    def _is_finest(self, chunking: Chunking) -> bool:
        return not chunking.lag and len(chunking.cuts) == len(self._pieces(chunking.unit)) - 1

    def _report(self, chunking: Chunking, streamed: Streamed, *, only: str | None = None) -> None:
        chunks = tuple(text for text, _ in chunk_texts(self._pieces(chunking.unit), chunking))
        for problem in self._judge(streamed):
            if only in (None, problem.rule) and self._simpler(problem.rule, chunking):
                self.problems[problem.rule] = problem.model_copy(
                    update={"chunking": chunking, "chunks": chunks}
                )

    def _simpler(self, rule: str, chunking: Chunking) -> bool:
        known = self.problems.get(rule)
        return known is None or known.chunking is None or len(chunking.cuts) < len(known.chunking.cuts)

    def _pieces(self, unit: PieceUnit) -> Sequence[Piece]:
        return self._request.pieces if unit == "tokens" else characters(self._request.output)


def assemble(stream: StreamResult) -> Streamed:
    """Merge deltas by call index, as OpenAI clients do."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: dict[int, list[str]] = {}
    ids: dict[int, str] = {}
    first: dict[int, ToolCallDelta] = {}
    for delta in stream.deltas:
        reasoning.append(delta.reasoning or "")
        content.append(delta.content or "")
        for part in delta.tool_calls:
            first.setdefault(part.index, part)
            call = calls.setdefault(part.index, ["", ""])
            call[0] += part.name or ""
            call[1] += part.arguments or ""
            if part.id:
                ids.setdefault(part.index, part.id)
    indices = tuple(calls)
    return Streamed(
        result=ParseResult(
            reasoning="".join(reasoning) or None,
            content="".join(content) or None,
            tool_calls=tuple(ToolCall(name=name, arguments=arguments) for name, arguments in calls.values()),
        ),
        indices=indices,
        ids=tuple(ids.values()),
        error=stream.error,
        ragged=list(indices) != list(range(len(indices))),
        starts=tuple(
            f"the first delta of the call with index {index} {fault}"
            for index, part in first.items()
            for fault in _start_faults(part, name=calls[index][0])
        ),
        texts=sum(1 for delta in stream.deltas if delta.reasoning or delta.content),
    )


def _start_faults(part: ToolCallDelta, *, name: str) -> Iterator[str]:
    """What the first delta of a call lacks. That a call has no name at all is another rule's matter."""
    if not part.id:
        yield "has no id"
    if part.type != "function":
        yield f"has the type {part.type!r}, not 'function'"
    if part.name is None or (name and not part.name):
        yield "has arguments and no name" if part.arguments else "has no name"


def _count(outcome: Outcome) -> int:
    """Its number of chunkings; what is no number counts nothing."""
    try:
        return max(int(outcome.chunkings), 0)
    except ValueError:
        return 0


def _end(streamed: Streamed) -> tuple[object, ...]:
    """What a certificate says of a stream, in comparable form."""
    result = streamed.result
    calls = tuple((call.name, call.arguments) for call in result.tool_calls)
    return result.reasoning or "", result.content or "", calls, streamed.ragged, streamed.error is not None


def _of_outcome(outcome: Outcome) -> Streamed:
    streamed = Streamed(result=outcome.result, error=outcome.error, ragged=outcome.ragged)
    return replace(
        streamed, indices=tuple(range(len(outcome.result.tool_calls))) if not outcome.ragged else ()
    )


__all__ = ["Exploration", "Streamed", "assemble", "explore", "sampled_chunkings"]
