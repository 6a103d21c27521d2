"""Parsers that lie in one way each, named on the command line as `tests.lying_parsers:Name`.

Each is the reference but for its lie, and says in `rule` which rule of the parser check must name it.
The first kind lies about the whole answer and streams the same lie in one delta; the second kind lies
in streams only, and only for some chunkings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from conformance.chunking import chunk_texts
from conformance.errors import EngineError
from conformance.suites import PROMPTS
from conformance.targets.protocol import (
    Capability,
    Certificate,
    CertifyRequest,
    Chunking,
    Delta,
    ParseRequest,
    ParseResult,
    PieceUnit,
    RenderRequest,
    RenderResult,
    StreamRequest,
    StreamResult,
    TargetInfo,
    ToolCall,
)
from conformance.targets.reference import ReferenceTarget, _Session, _units
from conformance.worker.search import Session, certify

Deltas = list[dict[str, Any]]


class Liar:
    """Honest, until a subclass says otherwise.

    Args:
        searchable: Whether it offers certificates, or can only be sampled.
        streams: Whether it streams at all.
    """

    rule: ClassVar[str]
    unit: ClassVar[PieceUnit] = "characters"

    def __init__(self, *, searchable: bool = True, streams: bool = True) -> None:
        self.spec = f"tests.lying_parsers:{type(self).__name__}"
        self._honest = ReferenceTarget()
        self._capabilities: tuple[Capability, ...] = ("parse",)
        if streams:
            self._capabilities += ("parse_stream", "certify") if searchable else ("parse_stream",)

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name=type(self).__name__,
            version="1.0",
            capabilities=self._capabilities,
            stream_unit=self.unit,
            search_feeds=5000,
        )

    def parse(self, request: ParseRequest) -> ParseResult:
        return self._honest.parse(request)

    def open(self, request: ParseRequest) -> Session:
        """One stream."""
        raise NotImplementedError

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        return [self._stream(request.request, chunking) for chunking in request.chunkings]

    def _stream(self, request: ParseRequest, chunking: Chunking) -> StreamResult:
        session = self.open(request)
        chunks = chunk_texts(_units(request, chunking.unit), chunking)
        deltas: list[Delta] = []
        for number, (text, ids) in enumerate(chunks, 1):
            try:
                fed = session.feed(text, list(ids), number == len(chunks))
            except ValueError as error:
                return StreamResult(deltas=tuple(deltas), error=f"ValueError: {error}")
            deltas += [Delta.model_validate(delta) for delta in fed]
        return StreamResult(deltas=tuple(deltas))

    def certify(self, request: CertifyRequest) -> Certificate:
        answer = certify(
            lambda: self.open(request.request),
            [piece.model_dump() for piece in _units(request.request, request.unit)],
            unit=request.unit,
            max_states=request.max_states,
            max_seconds=request.max_seconds,
        )
        return Certificate.model_validate(answer)

    def render(self, request: RenderRequest) -> RenderResult:
        raise EngineError("renders nothing")

    def close(self) -> None:
        pass


# ---------------------------------------------------------------------------------------- whole answers


class _AtTheEnd:
    """Streams a message in one delta, when the output is over."""

    shared: tuple[object, ...] = ()

    def __init__(self, message: ParseResult) -> None:
        calls = [
            {
                "index": k,
                "id": f"call_{k}",
                "type": "function",
                "name": call.name,
                "arguments": call.arguments,
            }
            for k, call in enumerate(message.tool_calls)
        ]
        self.delta = {"reasoning": message.reasoning, "content": message.content, "tool_calls": calls}

    def feed(self, text: str, ids: list[int], finished: bool) -> Deltas:
        return [self.delta] if finished else []


class WholeLiar(Liar):
    """Lies about the message."""

    rule = "expected"

    def parse(self, request: ParseRequest) -> ParseResult:
        return self.lie(request, self._honest.parse(request))

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        raise NotImplementedError

    def open(self, request: ParseRequest) -> Session:
        return _AtTheEnd(self.parse(request))


class LeaksMarker(WholeLiar):
    """The closer of the last call, or of the thought, stays in the content."""

    rule = "marker-leak"

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        leaked = [
            p.text
            for p in request.pieces
            if p.special and p.text in ("<tool_call|>", "<channel|>", "<turn|>")
        ]
        return message.model_copy(update={"content": (message.content or "") + "".join(leaked[-1:])})


class DropsTextAfterCall(WholeLiar):
    """Content after the first call is lost."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        kept = []
        for span in message.spans or ():
            if span.role == "call_name":
                break
            if span.role == "content":
                kept.append(request.output[span.start : span.end])
        return message.model_copy(update={"content": "".join(kept) or None})


class ArgumentsNotJson(WholeLiar):
    """Arguments are what Python prints for a mapping."""

    rule = "arguments-json"

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return _with_arguments(
            message, lambda arguments: repr(json.loads(arguments)) if arguments != "{}" else "{'"
        )


class LosesLastCharacter(WholeLiar):
    """The last character of the last field that has text is lost."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        if message.content:
            return message.model_copy(update={"content": message.content.rstrip()[:-1]})
        if message.tool_calls:
            *calls, last = message.tool_calls
            members = list(json.loads(last.arguments).items())[:-1]
            cut = last.model_copy(update={"arguments": json.dumps(dict(members)), "name": last.name[:-1]})
            return message.model_copy(update={"tool_calls": (*calls, cut)})
        return message.model_copy(update={"reasoning": (message.reasoning or "").rstrip()[:-1]})


class Raises(WholeLiar):
    """Raises on anything with a bracket or a quote in it."""

    rule = "raised"

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        if re.search(r"[\[({'\"]", request.output):
            raise EngineError("IndexError: string index out of range")
        return message


class ReasoningInContent(WholeLiar):
    """Reasoning comes out as content."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return message.model_copy(
            update={"reasoning": None, "content": (message.reasoning or "") + (message.content or "") or None}
        )


class KeepsLabel(WholeLiar):
    """The role label stays in the reasoning."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        label = "<|channel>thought\n" in request.output
        return (
            message.model_copy(update={"reasoning": "thought\n" + message.reasoning})
            if label and message.reasoning
            else message
        )


class IgnoresPrompt(WholeLiar):
    """Every output is read as if the turn were fresh."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return self._honest.parse(request.model_copy(update={"prompt": PROMPTS["model"]}))


class IgnoresTools(WholeLiar):
    """Arguments are typed as if no tool were declared."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return self._honest.parse(request.model_copy(update={"tools": ()}))


class StringsOnly(WholeLiar):
    """Every number, boolean and null is a string."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return _with_values(message, lambda value: value if isinstance(value, str) else json.dumps(value))


class CutsStrings(WholeLiar):
    """Strings end at the first comma, colon, bracket or line end."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return _with_values(
            message, lambda value: re.split(r"[,:{}\[\]()\n]", value)[0] if isinstance(value, str) else value
        )


class CutsKeys(WholeLiar):
    """Keys end at the first character that is no letter, digit or underscore."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return _with_arguments(
            message, lambda text: json.dumps(_rebuilt(json.loads(text), key=lambda k: re.split(r"\W", k)[0]))
        )


class FlattensArguments(WholeLiar):
    """Objects and arrays come out as strings of their JSON."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        def flat(text: str) -> str:
            values = json.loads(text)
            return json.dumps(
                {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in values.items()}
            )

        return _with_arguments(message, flat)


class WordNamesOnly(WholeLiar):
    """Names end at the first `.`, `:`, `/` or `-`."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        calls = tuple(
            c.model_copy(update={"name": re.split(r"[-.:/]", c.name)[0]}) for c in message.tool_calls
        )
        return message.model_copy(update={"tool_calls": calls})


class FirstCallOnly(WholeLiar):
    """All calls but the first are lost."""

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return message.model_copy(update={"tool_calls": message.tool_calls[:1]})


class NotationOnly(WholeLiar):
    """Calls that are not exactly in the template's notation are text."""

    _CALL = re.compile(r"<\|tool_call>call:[\w.:/-]+\{(?:(?!<tool_call\|>).)*\}<tool_call\|>", re.DOTALL)
    _SLIP = re.compile(
        r"[:,]\s*[\"']|:\s*(?![<\d{\[tfn-])|[,:]\s*[}\]]|\}\s*\}+<|\s[:,]|[A-Za-z]<\|\"\|>[A-Za-z]"
    )

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        calls = self._CALL.findall(request.output)
        if len(calls) == len(message.tool_calls) and not any(self._SLIP.search(call) for call in calls):
            return message
        return ParseResult(reasoning=message.reasoning, content=re.sub(r"<[^<>]*[|>]>?", "", request.output))


class Silent(WholeLiar):
    """Every field is empty."""

    rule = "nothing-lost"

    def lie(self, request: ParseRequest, message: ParseResult) -> ParseResult:
        return ParseResult()


def _with_arguments(message: ParseResult, change: Callable[[str], str]) -> ParseResult:
    calls = tuple(ToolCall(name=call.name, arguments=change(call.arguments)) for call in message.tool_calls)
    return message.model_copy(update={"tool_calls": calls})


def _with_values(message: ParseResult, change: Callable[[Any], Any]) -> ParseResult:
    """Change every value that is neither an object nor an array."""
    return _with_arguments(message, lambda text: json.dumps(_rebuilt(json.loads(text), value=change)))


def _rebuilt(
    item: Any, *, key: Callable[[str], str] = lambda k: k, value: Callable[[Any], Any] = lambda v: v
) -> Any:
    if isinstance(item, dict):
        return {key(k): _rebuilt(v, key=key, value=value) for k, v in item.items()}
    if isinstance(item, list):
        return [_rebuilt(v, key=key, value=value) for v in item]
    return value(item)


# ---------------------------------------------------------------------------------------- streams only


class _Wrapped:
    """An honest stream, whose deltas a subclass changes."""

    def __init__(self, request: ParseRequest) -> None:
        self.inner = _Session(request)
        self.shared = self.inner.shared

    def feed(self, text: str, ids: list[int], finished: bool) -> Deltas:
        return self.lie(text, ids, self.inner.feed(text, ids, finished))

    def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
        return deltas


class StreamLiar(Liar):
    """Whole answers are honest; streams go through `session`."""

    rule = "stream-equals-whole"
    session: ClassVar[type[_Wrapped]]

    def open(self, request: ParseRequest) -> Session:
        return self.session(request)


class SplitsDelimiter(StreamLiar):
    """A chunk that ends inside a string delimiter costs the next delta of arguments its first character."""

    class session(_Wrapped):  # noqa: N801 - it is what the attribute is called
        tail = ""
        broken = False

        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            for part in (part for delta in deltas for part in delta["tool_calls"]):
                if self.broken and part["arguments"]:
                    part["arguments"] = part["arguments"][1:]
                    self.broken = False
            self.tail = (self.tail + text)[-4:]
            self.broken = self.broken or self.tail.endswith(('<|"', '<|"|'))
            return deltas


class DropsLoneDigit(StreamLiar):
    """A chunk that is one digit and nothing else brings no content."""

    class session(_Wrapped):  # noqa: N801
        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            return [{**d, "content": None} for d in deltas] if len(text) == 1 and text.isdigit() else deltas


class NeverFinishes(StreamLiar):
    """What is held back until the end of the output never comes."""

    class session(_Wrapped):  # noqa: N801
        def feed(self, text: str, ids: list[int], finished: bool) -> Deltas:
            return super().feed(text, ids, False)


class CountsFromOne(StreamLiar):
    """Streamed calls are numbered from 1."""

    rule = "indices"

    class session(_Wrapped):  # noqa: N801
        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            return [
                {**d, "tool_calls": [{**p, "index": p["index"] + 1} for p in d["tool_calls"]]} for d in deltas
            ]


class NumbersByChunk(StreamLiar):
    """A second call that begins in a later chunk than the first gets the index 2."""

    rule = "indices"

    class session(_Wrapped):  # noqa: N801
        late = False

        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            parts = [part for delta in deltas for part in delta["tool_calls"]]
            begun = {part["index"] for part in parts if part["name"]}
            self.late = self.late or (1 in begun and 0 not in begun)
            for part in parts:
                part["index"] += part["index"] == 1 and self.late
            return deltas


class SameIds(StreamLiar):
    """All calls of a stream have the same id."""

    rule = "call-ids"

    class session(_Wrapped):  # noqa: N801
        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            return [
                {**d, "tool_calls": [{**p, "id": p["id"] and "call_0"} for p in d["tool_calls"]]}
                for d in deltas
            ]


class OmitsIds(StreamLiar):
    """Streamed calls have no id."""

    rule = "call-start"

    class session(_Wrapped):  # noqa: N801
        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            return [{**d, "tool_calls": [{**p, "id": None} for p in d["tool_calls"]]} for d in deltas]


class OmitsTypes(StreamLiar):
    """Streamed calls have no type."""

    rule = "call-start"

    class session(_Wrapped):  # noqa: N801
        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            return [{**d, "tool_calls": [{**p, "type": None} for p in d["tool_calls"]]} for d in deltas]


class NameLast(StreamLiar):
    """The name of a call comes when the output is over, behind the arguments."""

    rule = "call-start"

    class session(_Wrapped):  # noqa: N801
        def __init__(self, request: ParseRequest) -> None:
            super().__init__(request)
            self.names: list[dict[str, Any]] = []

        def feed(self, text: str, ids: list[int], finished: bool) -> Deltas:
            deltas = super().feed(text, ids, finished)
            for part in (part for delta in deltas for part in delta["tool_calls"]):
                if part["name"] is not None:
                    self.names.append({"index": part["index"], "name": part["name"]})
                    part["name"] = None
            return [*deltas, {"tool_calls": self.names}] if finished else deltas


class WaitsForTheEnd(StreamLiar):
    """Nothing comes before the output is over, and then all text at once."""

    rule = "not-streamed"

    class session(_Wrapped):  # noqa: N801
        def __init__(self, request: ParseRequest) -> None:
            super().__init__(request)
            self.held: dict[str, Any] = {"reasoning": "", "content": "", "tool_calls": []}

        def feed(self, text: str, ids: list[int], finished: bool) -> Deltas:
            for delta in super().feed(text, ids, finished):
                for key, value in delta.items():
                    self.held[key] += value or type(self.held[key])()
            return [self.held] if finished else []


class RaisesAtBoundary(StreamLiar):
    """A chunk that begins with the second character of a marker is an error."""

    rule = "raised"

    class session(_Wrapped):  # noqa: N801
        def feed(self, text: str, ids: list[int], finished: bool) -> Deltas:
            if text.startswith("|"):
                raise ValueError("not enough values to unpack")
            return super().feed(text, ids, finished)


class LeaksSplitMarker(StreamLiar):
    """A closer that is split between two chunks comes out as content."""

    rule = "marker-leak"

    class session(_Wrapped):  # noqa: N801
        tail = ""

        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            head, self.tail = self.tail, (self.tail + text)[-12:]
            seam = head + text[:12]
            at = seam.find("<tool_call|>")
            split = 0 <= at < len(head) < at + len("<tool_call|>")
            return [*deltas, {"content": "<tool_call|>", "tool_calls": []}] if split else deltas


class TrustsIds(StreamLiar):
    """Takes the text so far for all of a thought whose closing id came: what lags behind is lost."""

    unit = "tokens"

    class session(_Wrapped):  # noqa: N801
        def __init__(self, request: ParseRequest) -> None:
            super().__init__(request)
            self.closers = tuple(p.ids for p in request.pieces if p.text == "<channel|>")
            self.closed = False

        def lie(self, text: str, ids: list[int], deltas: Deltas) -> Deltas:
            if self.closed:
                deltas = [{**delta, "reasoning": None} for delta in deltas]
            self.closed = self.closed or any(i in ids for closer in self.closers for i in closer)
            return deltas


WHOLE_LIARS: tuple[type[WholeLiar], ...] = (
    LeaksMarker, DropsTextAfterCall, ArgumentsNotJson, LosesLastCharacter, Raises, ReasoningInContent,
    KeepsLabel,
    IgnoresPrompt, IgnoresTools, StringsOnly, CutsStrings, CutsKeys, FlattensArguments, WordNamesOnly,
    FirstCallOnly, NotationOnly, Silent,
)  # fmt: skip
STREAM_LIARS: tuple[type[StreamLiar], ...] = (
    SplitsDelimiter, DropsLoneDigit, NeverFinishes, CountsFromOne, NumbersByChunk, SameIds, OmitsIds,
    OmitsTypes, NameLast, WaitsForTheEnd, RaisesAtBoundary, LeaksSplitMarker, TrustsIds,
)  # fmt: skip
