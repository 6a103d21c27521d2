"""Gemma 4's output parser: reasoning, content and tool calls, whole or streamed by one machine.

Rules and their reasons: `docs/parsing.md`. Sources: fact sheet section 6 (format), fault catalogue
classes 1 and 2 (what goes wrong).

1. Linear in the output's length, whatever the text and however it is cut.
2. Never raises on text: malformed output is repaired, kept as text, or dropped with a reason.
3. The fields do not depend on how the stream was cut.
4. Emitted text is never taken back; every streamed prefix of the arguments is a prefix of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from io import StringIO
from itertools import groupby
from typing import Any

import regex

from model_impl.chat import markers as m
from model_impl.chat.arguments import ArgumentReader
from model_impl.chat.quoted import Run
from model_impl.chat.schema import Node, declared, parameters_of
from model_impl.chat.spans import Span, SpanLog

LABEL = "thought\n"
"""Role label that the model writes right after the channel opener."""

_MAX_HEAD = 300
"""Longest text between a call's opener and its bracket; the longest function name APIs allow is 64."""
_BLANK = r"[\s\x1c-\x1f]"
"""What `str.isspace` calls blank; the `\\s` of `regex` leaves out the separators U+001C to U+001F."""
_NAME = r"(?P<name>[\w.:/-]*?[\w./-])"
_HEAD = regex.compile(rf"{_BLANK}*+(?P<call>call{_BLANK}*:|:)?{_BLANK}*{_NAME}{_BLANK}*(?P<bracket>[{{(])")
_STRICT_HEAD = regex.compile(
    rf"{_BLANK}*+(?P<call>call{_BLANK}*:){_BLANK}*{_NAME}{_BLANK}*(?P<bracket>[{{(])"
)
_STRAY_CLOSERS = regex.compile(rf"(?P<blanks>{_BLANK}{{0,{_MAX_HEAD}}}+)[}}\])]++")


class PromptState(Enum):
    """What the prompt leaves open for the output to continue."""

    CONTENT = "content"
    """A fresh model turn, or text: no channel in this turn yet."""
    CLOSED_CHANNEL = "closed"
    """The turn's thought channel was opened and closed by the prompt."""
    OPEN_CHANNEL = "open"
    """The prompt ends inside a thought channel."""


def prompt_state(prompt: str) -> PromptState:
    """First state of the parser, from the last turn of the rendered prompt.

    Args:
        prompt: Rendered prompt, or its tail from the last `<|turn>` on.
    """
    turn = prompt[prompt.rfind(m.TURN_OPEN) + 1 :]
    last = max(
        (m.CHANNEL_OPEN, m.CHANNEL_CLOSE, m.CALL_OPEN, m.RESPONSE_OPEN, m.RESPONSE_CLOSE),
        key=turn.rfind,
    )
    if turn.rfind(last) == -1:
        return PromptState.CONTENT
    if last == m.CHANNEL_OPEN:
        return PromptState.OPEN_CHANNEL
    return PromptState.CLOSED_CHANNEL if last == m.CHANNEL_CLOSE else PromptState.CONTENT


@dataclass(frozen=True)
class CallDelta:
    """Part of call `index`: its name first, then pieces of its JSON arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What one `feed` made certain. Empty fields brought nothing."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


@dataclass(frozen=True)
class ToolCall:
    """A finished call. `arguments` is JSON text; `complete` is False when the output ended inside it."""

    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True)
class Message:
    """A parsed output."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    spans: tuple[Span, ...]


class _State(Enum):
    START = auto()
    """At the very beginning, where a label without opener may stand."""
    CONTENT = auto()
    LABEL = auto()
    """Right after a channel opener."""
    REASONING = auto()
    HEAD = auto()
    """Between a call's opener and its bracket."""
    ARGUMENTS = auto()
    AFTER_CALL = auto()
    """Between a call's closing bracket and `<tool_call|>`."""


class Parser:
    """Incremental parser of one output.

    Args:
        prompt: Rendered prompt, or a `PromptState`; decides the first state.
        tools: Declared tools in OpenAI's form; type the arguments and resolve odd names.
        calls_allowed: False for `tool_choice: none`: call text becomes content.
        track_spans: Whether `spans()` is wanted.
    """

    def __init__(
        self,
        prompt: str | PromptState = PromptState.CONTENT,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        calls_allowed: bool = True,
        track_spans: bool = False,
    ) -> None:
        state = prompt if isinstance(prompt, PromptState) else prompt_state(prompt)
        self._state = {
            PromptState.CONTENT: _State.START,
            PromptState.CLOSED_CHANNEL: _State.CONTENT,
            PromptState.OPEN_CHANNEL: _State.REASONING,
        }[state]
        self._tools = tuple(tools)
        self._calls_allowed = calls_allowed
        self._lexer = m.Lexer()
        self._log = SpanLog(enabled=track_spans)
        self._held = StringIO()
        self._drifted_from: _State | None = None
        self._reader: ArgumentReader | None = None
        self._plain_quotes: frozenset[str] = frozenset()
        self._next_index = 0
        self._incomplete: set[int] = set()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[CallDelta] = []

    # ------------------------------------------------------------------ interface

    def feed(self, text: str, tokens: m.Tokens = "unknown") -> Delta:
        """Read the next piece of the output.

        Args:
            text: Any cut of the text, markers included.
            tokens: What it was decoded from. `ordinary`: the text spells no markers, whatever it looks
                like; `control`: it is one; `unknown`: everything that looks like a marker is one.
        """
        return self.feed_runs([(text, tokens)])

    def feed_runs(self, runs: Iterable[tuple[str, m.Tokens]]) -> Delta:
        """Read one chunk of a stream, given as runs of like tokens; one delta for all of it."""
        for text, tokens in runs:
            for run, is_marker, kind in self._lexer.feed(text, tokens):
                self._run(run, is_marker, kind)
        return self._take()

    def finish(self) -> Delta:
        """The output is over (stopped, or cut by a limit): settle what was held back."""
        for run, is_marker, kind in self._lexer.flush():
            self._run(run, is_marker, kind)
        self._end_of_part()
        return self._take()

    def is_complete(self, index: int) -> bool:
        """Whether call `index` was closed, so that the turn may end in `tool_calls` and not `length`."""
        return index < self._next_index and index not in self._incomplete

    def spans(self) -> tuple[Span, ...]:
        """What became of every character; covers the whole output once `finish` was called."""
        return self._log.spans()

    # ------------------------------------------------------------------ the machine

    def _run(self, text: str, is_marker: bool, tokens: m.Tokens) -> None:
        if is_marker:
            self._marker(text, tokens)
            return
        position = 0
        while position < len(text):
            position = self._text(text, position)

    def _text(self, text: str, position: int) -> int:
        """Read text without markers in the present state; return where the next state goes on."""
        match self._state:
            case _State.CONTENT:
                self._say(text[position:])
            case _State.REASONING:
                self._think(text[position:])
            case _State.START | _State.LABEL:
                return self._read_label(text, position)
            case _State.HEAD | _State.AFTER_CALL:
                return self._read_head(text, position)
            case _State.ARGUMENTS:
                return self._read_arguments(text, position)
        return len(text)

    def _marker(self, marker: str, tokens: m.Tokens) -> None:
        if self._state is _State.ARGUMENTS and self._marker_in_arguments(marker, tokens):
            return
        if marker == m.CALL_OPEN_DRIFTED:
            # No control token: an opener only if `call:` follows, else the text that it is.
            self._end_of_part()
            self._drifted_from = self._state
            self._state = _State.HEAD
            return
        if marker == m.CHANNEL_CLOSE and self._state is _State.START and self._held.getvalue() == LABEL[:-1]:
            self._drop_held("channel label")
        self._end_of_part()
        if marker == m.CALL_OPEN:
            self._state = _State.HEAD
        elif marker == m.CHANNEL_OPEN:
            self._state = _State.LABEL
        elif marker == m.CHANNEL_CLOSE:
            self._state = _State.CONTENT
        self._log.add("marker", len(marker))

    def _end_of_part(self) -> None:
        """Settle what is held: a marker or the end of the output follows. Leaves reasoning or content."""
        while self._state is _State.ARGUMENTS:  # text read again may have begun another call
            self._end_arguments()
        match self._state:
            case _State.START:
                self._say(self._take_held())
                self._state = _State.CONTENT
            case _State.LABEL:
                if self._held.getvalue() == LABEL[:-1]:
                    self._drop_held("channel label")
                else:
                    self._think(self._take_held())
                self._state = _State.REASONING
            case _State.HEAD:
                self._no_call()
            case _State.AFTER_CALL:
                self._after_call_text(self._take_held())
                self._state = _State.CONTENT

    # ------------------------------------------------------------------ fields

    def _say(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._log.add("content", len(text))

    def _think(self, text: str) -> None:
        if text:
            self._reasoning.append(text)
            self._log.add("reasoning", len(text))

    def _take(self) -> Delta:
        if not (self._reasoning or self._content or self._calls):
            return _NOTHING
        calls = tuple(
            _merged(index, list(parts)) for index, parts in groupby(self._calls, key=lambda c: c.index)
        )
        delta = Delta("".join(self._reasoning), "".join(self._content), calls)
        self._reasoning, self._content, self._calls = [], [], []
        return delta

    def _take_held(self) -> str:
        text = self._held.getvalue()
        self._held = StringIO()
        return text

    def _drop_held(self, reason: str) -> None:
        self._log.add("dropped", len(self._take_held()), reason)

    # ------------------------------------------------------------------ the label

    def _read_label(self, text: str, position: int) -> int:
        """Hold text while it may become the label; at the start of the output it also opens reasoning."""
        held = self._held.getvalue()
        end = position + len(LABEL) - len(held)
        if LABEL.startswith(held + text[position:end]):
            self._held.write(text[position:end])
            if end <= len(text):
                self._drop_held("channel label")
                self._state = _State.REASONING
            return min(end, len(text))
        if self._state is _State.START:
            self._state = _State.CONTENT
            self._say(self._take_held())
        else:
            self._state = _State.REASONING
            self._think(self._take_held())
        return position

    # ------------------------------------------------------------------ calls

    def _read_head(self, text: str, position: int) -> int:
        """Hold text until it is a call's name and bracket, or can no longer become one."""
        if self._state is _State.AFTER_CALL and (closers := self._stray_closers(text, position)):
            self._drop_held("unbalanced closing bracket")
            self._log.add("dropped", len(closers), "unbalanced closing bracket")
            return position + len(closers)
        held = self._take_held()
        strict = self._drifted_from is not None or self._state is _State.AFTER_CALL
        end = min(len(text), position + _MAX_HEAD - len(held))
        head = held + text[position:end]
        match = (_STRICT_HEAD if strict else _HEAD).match(head, partial=True)
        if match is None or not self._may_open(match, head):
            self._held.write(head)
            self._no_call()
            return end
        if match.partial:
            self._held.write(head)
            return end
        if self._drifted_from is not None:
            self._log.add("marker", len(m.CALL_OPEN_DRIFTED))
            self._drifted_from = None
        if self._calls_allowed:
            self._begin_call(match)
        else:
            self._held.write(match.group())
            self._no_call()
        return position + match.end() - len(held)

    def _may_open(self, match: regex.Match[str], head: str) -> bool:
        """Whether this (partial) head is a call's, or may still become one."""
        if match.partial:
            return len(head) < _MAX_HEAD
        # `name (…)` without `call:` is how prose reads, unless the name is a declared one.
        return bool(match["call"]) or match["bracket"] == "{" or self._declares(match["name"])

    def _begin_call(self, match: regex.Match[str]) -> None:
        name = self._resolve(match["name"])
        start = match.end("name") - len(name)
        self._log.add("marker", start)
        self._log.add("call_name", len(name))
        self._log.add("marker", match.end() - match.end("name"))
        schema = parameters_of(self._tools, name)
        node = Node(schema, schema) if schema is not None else None
        self._reader = ArgumentReader(match["bracket"], node, self._log, self._plain_quotes)
        self._incomplete.add(self._next_index)
        self._calls.append(CallDelta(self._next_index, name, self._reader.take()))
        self._next_index += 1
        self._state = _State.ARGUMENTS

    def _resolve(self, name: str) -> str:
        """Drop a leading `-` only if the tools declare the name without it, and not the name with it."""
        bare = name.lstrip("-")
        if bare != name and not self._declares(name) and self._declares(bare):
            return bare
        return name

    def _declares(self, name: str) -> bool:
        return declared(self._tools, name) is not None

    def _no_call(self) -> None:
        """What followed the opener is no call: it is text."""
        text, origin = self._take_held(), self._drifted_from
        after_call, self._state, self._drifted_from = self._state is _State.AFTER_CALL, _State.CONTENT, None
        if after_call:
            self._after_call_text(text)
        elif origin is _State.REASONING:
            self._state = origin
            self._think(m.CALL_OPEN_DRIFTED + text)
        else:
            self._say((m.CALL_OPEN_DRIFTED if origin else "") + text)

    # ------------------------------------------------------------------ arguments

    def _read_arguments(self, text: str, position: int) -> int:
        reader = self._expect_reader()
        position = reader.feed(text, position)
        self._emit_arguments(reader)
        if reader.done:
            self._close_call()
        return position

    def _marker_in_arguments(self, marker: str, tokens: m.Tokens) -> bool:
        """Let the reader have the marker; False when it ends the call and is still to be read."""
        reader = self._expect_reader()
        rest: list[Run] = []
        if marker == m.QUOTE:
            rest = reader.delimiter(len(marker))
        elif reader.in_string and (
            marker not in m.CALL_ENDING or (tokens == "unknown" and not reader.may_end_here)
        ):
            reader.feed(marker)
        elif marker in m.CALL_ENDING:
            self._end_arguments()
            return False
        else:
            reader.stray(marker)
        self._emit_arguments(reader)
        if reader.done:
            self._close_call()
            self._read_rest(rest, reader.plain_quotes)
            self._marker(marker, tokens)
        return True

    def _end_arguments(self) -> None:
        reader = self._expect_reader()
        rest = reader.end()
        self._emit_arguments(reader)
        if reader.done:
            self._close_call()
        else:
            self._reader = None
            self._state = _State.AFTER_CALL
        self._read_rest(rest, reader.plain_quotes)

    def _read_rest(self, rest: Sequence[Run], plain_quotes: frozenset[str]) -> None:
        """Read what an unclosed quote had swallowed; in the calls in it that quote is known not to close.

        Without that knowledge each call would hold and read again all that follows it.
        """
        self._plain_quotes = plain_quotes
        for text, is_marker in rest:
            self._run(text, is_marker, "unknown")
        self._plain_quotes = frozenset()

    def _emit_arguments(self, reader: ArgumentReader) -> None:
        text = reader.take()
        if text:
            self._calls.append(CallDelta(self._next_index - 1, None, text))

    def _close_call(self) -> None:
        self._incomplete.discard(self._next_index - 1)
        self._reader = None
        self._state = _State.AFTER_CALL

    def _stray_closers(self, text: str, position: int) -> str:
        """Closing brackets after a call, and the blanks before them: they belong to nothing."""
        held = self._held.getvalue()
        match = _STRAY_CLOSERS.match(text, position)
        if match is None or len(held) + len(match["blanks"]) >= _MAX_HEAD or (held and not held.isspace()):
            return ""
        return match.group()

    def _after_call_text(self, text: str) -> None:
        """Text between a call's bracket and its closer: blanks are layout, the rest is content."""
        if text and text.isspace():
            self._log.add("dropped", len(text), "blanks after a call")
        else:
            self._say(text)

    def _expect_reader(self) -> ArgumentReader:
        assert self._reader is not None, "state ARGUMENTS always has a reader"
        return self._reader


_NOTHING = Delta()


def _merged(index: int, parts: Sequence[CallDelta]) -> CallDelta:
    """Parts of one call as one; a name stands in the first part or nowhere."""
    return CallDelta(index, parts[0].name, "".join(part.arguments for part in parts))


class MessageBuilder:
    """Puts deltas together, as a client does."""

    def __init__(self) -> None:
        self._reasoning = StringIO()
        self._content = StringIO()
        self._calls: list[tuple[str, StringIO]] = []

    def add(self, delta: Delta) -> None:
        """Append one delta."""
        self._reasoning.write(delta.reasoning)
        self._content.write(delta.content)
        for call in delta.calls:
            if call.name is not None:
                self._calls.append((call.name, StringIO()))
            self._calls[call.index][1].write(call.arguments)

    def message(self, parser: Parser) -> Message:
        """The whole message; `parser` knows which calls were closed."""
        calls = tuple(
            ToolCall(name, arguments.getvalue(), parser.is_complete(index))
            for index, (name, arguments) in enumerate(self._calls)
        )
        return Message(self._reasoning.getvalue(), self._content.getvalue(), calls, parser.spans())


def parse(
    output: str | Iterable[tuple[str, m.Tokens]],
    prompt: str | PromptState = PromptState.CONTENT,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    calls_allowed: bool = True,
) -> Message:
    """Parse a whole output.

    Args:
        output: The text, markers included; or runs of text with what they were decoded from.
        prompt: Rendered prompt, or its state.
        tools: Declared tools in OpenAI's form.
        calls_allowed: False for `tool_choice: none`.
    """
    parser = Parser(prompt, tools=tools, calls_allowed=calls_allowed, track_spans=True)
    builder = MessageBuilder()
    runs: Iterable[tuple[str, m.Tokens]] = [(output, "unknown")] if isinstance(output, str) else output
    builder.add(parser.feed_runs(runs))
    builder.add(parser.finish())
    return builder.message(parser)
