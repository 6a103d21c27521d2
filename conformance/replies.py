"""Chat completions as clients see them: a whole answer, or the deltas of a stream put together.

Reading is strict about what a client would trip over, and lenient about what it would not see: unknown
fields are ignored, and reasoning may be called `reasoning` or `reasoning_content`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


class MalformedReplyError(Exception):
    """An answer that a client cannot read: says what and where."""


@dataclass
class Call:
    """A tool call."""

    name: str = ""
    arguments: str = ""
    id: str = ""


@dataclass
class Reply:
    """One answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    logprobs: list[dict[str, Any]] | None = None
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Broken rules of the stream's form: name and sentence."""

    def shown(self) -> dict[str, Any]:
        """As evidence."""
        return {
            "reasoning": self.reasoning,
            "content": self.content,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in self.calls],
            "finish_reason": self.finish_reason,
            "usage": self.usage,
        }

    def texts(self) -> list[str]:
        """Every text that a client shows or acts on."""
        parts = [self.content, self.reasoning]
        for call in self.calls:
            parts += [call.name, call.arguments]
        return [part for part in parts if part]


def read_whole(body: Any) -> Reply:
    """Read the answer to a request without `stream`.

    Raises:
        MalformedReplyError: it is no chat completion with one choice.
    """
    choice = _only_choice(body, "answer")
    message = _mapping(choice.get("message"), "choices[0].message")
    reply = Reply(
        content=_text(message.get("content"), "message.content"),
        reasoning=_reasoning(message, "message"),
        finish_reason=_text(choice.get("finish_reason"), "finish_reason") or None,
        usage=_usage(body),
        logprobs=_logprobs(choice),
    )
    for number, value in enumerate(_list(message.get("tool_calls"), "message.tool_calls")):
        where = f"message.tool_calls[{number}]"
        call = _mapping(value, where)
        function = _mapping(call.get("function"), f"{where}.function")
        if call.get("type") != "function":
            reply.faults.append(("call-start", f"call {number} has the type {call.get('type')!r}"))
        reply.calls.append(
            Call(
                name=_text(function.get("name"), f"{where}.function.name"),
                arguments=_text(function.get("arguments"), f"{where}.function.arguments"),
                id=_text(call.get("id"), f"{where}.id"),
            )
        )
    return reply


def read_stream(events: Sequence[dict[str, Any]], *, done: bool) -> Reply:
    """Put the events of a stream together as OpenAI's clients do, and note what would confuse one.

    Raises:
        MalformedReplyError: an event is no chunk of a chat completion.
    """
    return _StreamReader().read(events, done=done)


class _StreamReader:
    def __init__(self) -> None:
        self._reply = Reply()
        self._by_index: dict[int, Call] = {}
        self._stream_ids: set[str] = set()

    def read(self, events: Sequence[dict[str, Any]], *, done: bool) -> Reply:
        for number, event in enumerate(events):
            if event.get("error") is not None:
                self._fault("stream-end", f"event {number} is an error: {event['error']!r}")
                continue
            self._event(event, f"event {number}")
        if len(self._stream_ids) > 1:
            self._fault("stream-id", f"the chunks carry {len(self._stream_ids)} different ids")
        if self._reply.finish_reason is None:
            self._fault("stream-end", "no chunk has a finish_reason")
        if not done:
            self._fault("stream-end", "the stream does not end with [DONE]")
        self._reply.calls = list(self._by_index.values())
        return self._reply

    def _fault(self, rule: str, message: str) -> None:
        if (rule, message) not in self._reply.faults:
            self._reply.faults.append((rule, message))

    def _event(self, event: dict[str, Any], where: str) -> None:
        if isinstance(event.get("id"), str):
            self._stream_ids.add(event["id"])
        if event.get("usage") is not None:
            self._reply.usage = _usage(event)
        choices = _list(event.get("choices"), f"{where}.choices")
        if not choices:
            return
        choice = _only_choice(event, where)
        delta = _mapping(choice.get("delta") or {}, f"{where}.delta")
        content, reasoning = _text(delta.get("content"), f"{where}.content"), _reasoning(delta, where)
        calls = _list(delta.get("tool_calls"), f"{where}.tool_calls")
        if self._reply.finish_reason is not None and (content or reasoning or calls):
            self._fault("stream-end", f"{where} brings text after the finish_reason")
        for text in (content, reasoning):
            self._check_characters(text, where)
        self._reply.content += content
        self._reply.reasoning += reasoning
        for value in calls:
            self._call(_mapping(value, f"{where}.tool_calls"), where)
        self._add_logprobs(choice)
        reason = _text(choice.get("finish_reason"), f"{where}.finish_reason")
        if reason:
            if self._reply.finish_reason is not None:
                self._fault("stream-end", f"{where} brings a second finish_reason")
            self._reply.finish_reason = reason

    def _call(self, part: dict[str, Any], where: str) -> None:
        index = part.get("index")
        if not isinstance(index, int) or isinstance(index, bool):
            self._fault("indices", f"{where} has a call without an index")
            index = max(self._by_index, default=-1) + (1 if part.get("id") else 0)
        function = _mapping(part.get("function") or {}, f"{where}.function")
        name = _text(function.get("name"), f"{where}.function.name")
        arguments = _text(function.get("arguments"), f"{where}.function.arguments")
        call_id = _text(part.get("id"), f"{where}.tool_calls.id")
        self._check_characters(arguments, where)
        call = self._by_index.get(index)
        if call is None:
            if index != len(self._by_index):
                self._fault("indices", f"{where} begins call {index}, but {len(self._by_index)} is the next")
            if not (call_id and name and part.get("type") == "function"):
                self._fault("call-start", f"call {index} begins without id, name, or the type `function`")
            self._by_index[index] = Call(name, arguments, call_id)
            return
        if call_id and call_id != call.id:
            self._fault("call-start", f"call {index} changes its id")
        if name:
            self._fault("call-start", f"call {index} gets a second name, {name!r}")
        call.arguments += arguments

    def _check_characters(self, text: str, where: str) -> None:
        if broken := broken_characters(text):
            self._fault("unicode", f"{where} brings half a character: {broken}")

    def _add_logprobs(self, choice: dict[str, Any]) -> None:
        found = _logprobs(choice)
        if found is not None:
            self._reply.logprobs = (self._reply.logprobs or []) + found


def broken_characters(text: str) -> str:
    """The first replacement character or lone surrogate of a text, escaped; empty if there is none."""
    for char in text:
        if char == "\ufffd" or 0xD800 <= ord(char) <= 0xDFFF:
            return f"\\u{ord(char):04x}"
    return ""


def strings(value: Any) -> Iterable[str]:
    """Every string in a JSON value, keys too."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            stack += item


def _only_choice(body: Any, where: str) -> dict[str, Any]:
    choices = _list(_mapping(body, where).get("choices"), f"{where}.choices")
    if len(choices) != 1:
        raise MalformedReplyError(f"{where} has {len(choices)} choices, and one was asked for")
    choice = _mapping(choices[0], f"{where}.choices[0]")
    if choice.get("index", 0) != 0:
        raise MalformedReplyError(f"{where}: the only choice has the index {choice['index']!r}, not 0")
    return choice


def _reasoning(message: dict[str, Any], where: str) -> str:
    first = _text(message.get("reasoning"), f"{where}.reasoning")
    return first or _text(message.get("reasoning_content"), f"{where}.reasoning_content")


def _usage(body: dict[str, Any]) -> dict[str, Any] | None:
    usage = body.get("usage")
    return None if usage is None else _mapping(usage, "usage")


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]] | None:
    value = choice.get("logprobs")
    if value is None:
        return None
    entries = _mapping(value, "logprobs").get("content")
    return [_mapping(entry, "logprobs.content") for entry in _list(entries, "logprobs.content")]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedReplyError(f"{where} is {_kind(value)}, not an object")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise MalformedReplyError(f"{where} is {_kind(value)}, not a list")
    return value


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedReplyError(f"{where} is {_kind(value)}, not a text")
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
