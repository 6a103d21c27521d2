"""The bundled implementation as a target. It runs in this process."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any, get_args

import conformance
from conformance.chunking import chunk_texts
from conformance.errors import EngineError
from conformance.targets.protocol import (
    AttentionBackend,
    Capability,
    Certificate,
    CertifyRequest,
    Chunking,
    Delta,
    ForwardRequest,
    ForwardResult,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    ParseRequest,
    ParseResult,
    Piece,
    PreprocessRequest,
    PreprocessResult,
    RenderRequest,
    RenderResult,
    Span,
    StreamRequest,
    StreamResult,
    TargetInfo,
    ToolCall,
    ToolCallDelta,
)
from conformance.targets.reference_abilities import CACHES, FEATURES
from conformance.targets.scores import ScoreRequest, ScoreResult
from conformance.targets.stages import StagesRequest, StagesResult
from conformance.tokenization import characters, encode
from conformance.worker.search import certify
from model_impl.chat import parser as gemma
from model_impl.chat import render as gemma_render
from model_impl.chat.markers import Tokens
from model_impl.errors import ModelError


class ReferenceTarget:
    """`model_impl` behind the target protocol."""

    spec = "reference"

    def describe(self) -> TargetInfo:
        """All capabilities but `serve`; the version is the package's own."""
        return TargetInfo(
            name="reference",
            version=conformance.__version__,
            capabilities=tuple(name for name in get_args(Capability) if name != "serve"),
            stream_unit="characters",
            search_feeds=700,
            features=(*FEATURES, "media", "long-blocks"),
            choices={"attention": get_args(AttentionBackend), "cache": CACHES},
            environment={
                "python": platform.python_version(),
                "package:torch": metadata.version("torch"),
            },
            note="model_impl.chat.parser.Parser, model_impl.chat.render.render, model_impl.text.TextModel",
        )

    def parse(self, request: ParseRequest) -> ParseResult:
        """One feed per run of like tokens, and a finish."""
        message = gemma.parse(
            [(text, kind) for text, kind in _runs(request.pieces)],
            request.prompt,
            tools=request.tools,
            calls_allowed=request.tool_choice != "none",
        )
        return ParseResult(
            reasoning=message.reasoning or None,
            content=message.content or None,
            tool_calls=tuple(ToolCall(name=c.name, arguments=c.arguments) for c in message.tool_calls),
            spans=tuple(Span(start=s.start, end=s.end, role=s.role, reason=s.reason) for s in message.spans),
        )

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        """Stream each chunking through a fresh parser."""
        return [self._stream(request.request, chunking) for chunking in request.chunkings]

    def certify(self, request: CertifyRequest) -> Certificate:
        """Search all chunkings of tokens or characters."""
        pieces = _units(request.request, request.unit)
        answer = certify(
            lambda: _Session(request.request),
            [piece.model_dump() for piece in pieces],
            unit=request.unit,
            max_states=request.max_states,
            max_seconds=request.max_seconds,
        )
        return Certificate.model_validate(answer)

    def render(self, request: RenderRequest) -> RenderResult:
        """Render with the bundled template."""
        try:
            prompt = gemma_render.render(
                request.messages,
                tools=request.tools or None,
                thinking=request.thinking,
                preserve_thinking=request.preserve_thinking,
                add_generation_prompt=request.add_generation_prompt,
                family=request.family,
            )
        except ModelError as error:
            raise EngineError(f"{type(error).__name__}: {error}") from error
        return RenderResult(prompt=prompt, token_ids=encode(prompt))

    def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
        """Prepare media with the bundled processors."""
        from conformance.targets import reference_media

        return reference_media.preprocess(request)

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """Run the text model on the whole batch."""
        # It loads torch, which takes seconds that parser suites need not spend.
        from conformance.targets import reference_model

        return reference_model.forward(request)

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate on the whole batch, with the whole model where there are pictures or sounds."""
        from conformance.targets import reference_generate

        return reference_generate.generate(request)

    def loglikelihood(self, request: LoglikelihoodRequest) -> LoglikelihoodResult:
        """Read each pair in one pass."""
        from conformance.targets import reference_generate

        return reference_generate.loglikelihood(request)

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Score answers as gates do."""
        from conformance.targets import reference_scores

        return reference_scores.score(request)

    def stages(self, request: StagesRequest) -> StagesResult:
        """Run the stages one after the other."""
        from conformance.targets import reference_model

        return reference_model.stages(request)

    def close(self) -> None:
        """Nothing to release."""

    def _stream(self, request: ParseRequest, chunking: Chunking) -> StreamResult:
        session = _Session(request)
        deltas: list[Delta] = []
        chunks = chunk_texts(_units(request, chunking.unit), chunking)
        for number, (text, _) in enumerate(chunks, 1):
            finished = number == len(chunks)
            deltas.extend(_delta(d) for d in session.read(text, finished=finished))
        return StreamResult(deltas=tuple(deltas))


def _units(request: ParseRequest, unit: str) -> Sequence[Piece]:
    return request.pieces if unit == "tokens" else characters(request.output)


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[str, Tokens]]:
    """Control tokens one by one, ordinary ones joined."""
    ordinary: list[str] = []
    for piece in pieces:
        if not piece.special:
            ordinary.append(piece.text)
            continue
        if ordinary:
            yield "".join(ordinary), "ordinary"
            ordinary = []
        yield piece.text, "control"
    if ordinary:
        yield "".join(ordinary), "ordinary"


class _Session:
    """One stream; knows from the request which characters come from control tokens."""

    def __init__(self, request: ParseRequest) -> None:
        self._parser = gemma.Parser(
            request.prompt, tools=request.tools, calls_allowed=request.tool_choice != "none"
        )
        self._runs = tuple(_runs(request.pieces))
        self._run = 0
        self._offset = 0
        self.shared: tuple[object, ...] = (request.tools, self._runs)

    def feed(self, text: str, ids: list[int], finished: bool) -> list[dict[str, Any]]:
        """One chunk for the search; the runs of like tokens say what the ids would."""
        del ids
        return [_delta(d).model_dump() for d in self.read(text, finished=finished)]

    def read(self, text: str, *, finished: bool) -> list[gemma.Delta]:
        """Feed one chunk, and finish after the last; return what that brought."""
        deltas = [self._parser.feed_runs(self._cut(text))]
        if finished:
            deltas.append(self._parser.finish())
        return [d for d in deltas if d]

    def _cut(self, text: str) -> Iterator[tuple[str, Tokens]]:
        """Cut the next chunk where the kind of token changes."""
        while text:
            run, kind = self._runs[self._run]
            part = text[: len(run) - self._offset]
            yield part, kind
            text = text[len(part) :]
            self._offset += len(part)
            if self._offset == len(run):
                self._run, self._offset = self._run + 1, 0


def _delta(delta: gemma.Delta) -> Delta:
    return Delta(
        reasoning=delta.reasoning or None,
        content=delta.content or None,
        tool_calls=tuple(
            ToolCallDelta(
                index=c.index,
                id=f"call_{c.index}" if c.name is not None else None,
                type="function" if c.name is not None else None,
                name=c.name,
                arguments=c.arguments,
            )
            for c in delta.calls
        ),
    )
