"""Faults of reasoning and tool-call parsing (catalogue classes 1 and 2).

Each function describes a bug that an engine shipped and returns the patch that brings it back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import regex

from conformance.faults.base import Collection, Patch, replace
from model_impl.chat import arguments, delimited, keys, markers, parser, schema
from model_impl.chat.argument_phases import Phase
from model_impl.chat.arguments import ArgumentReader
from model_impl.chat.delimited import DelimitedText
from model_impl.chat.keys import KeyText
from model_impl.chat.markers import Lexer
from model_impl.chat.parser import Delta, Parser, PromptState, _State

faults = Collection("parser")


# ---------------------------------------------------------------------------- reasoning


@faults("label-kept", source=("R02",), area="reasoning", module=parser)
def _label_kept() -> Patch:
    """The role label `thought` stays in the reasoning."""
    return replace(parser, "LABEL", "\0")


@faults("label-flushed-at-end", source=("R16",), area="reasoning", module=parser)
def _label_flushed() -> Patch:
    """A label that the end of the output cuts off comes out as reasoning."""
    original = Parser._end_of_part

    def end_of_part(self: Parser) -> None:
        if self._state is _State.LABEL:
            self._think(self._take_held())
        original(self)

    return replace(Parser, "_end_of_part", end_of_part)


@faults("prompt-scanned-past-turn", source=("R03",), area="reasoning", module=parser)
def _prompt_scanned_past_turn() -> Patch:
    """Channel markers of earlier turns decide where the output starts."""

    def prompt_state(prompt: str) -> PromptState:
        opened, closed = prompt.rfind(markers.CHANNEL_OPEN), prompt.rfind(markers.CHANNEL_CLOSE)
        if opened == closed:
            return PromptState.CONTENT
        return PromptState.OPEN_CHANNEL if opened > closed else PromptState.CLOSED_CHANNEL

    return replace(parser, "prompt_state", prompt_state)


@faults("open-channel-ignored", source=("R05", "R04"), area="reasoning", module=parser)
def _open_channel_ignored() -> Patch:
    """A prompt that ends inside a thought channel is not noticed."""
    return replace(parser, "prompt_state", lambda _prompt: PromptState.CONTENT)


@faults("thinking-means-reasoning", source=("R06", "R20"), area="reasoning", module=parser)
def _thinking_means_reasoning() -> Patch:
    """With thinking on, every fresh turn starts in reasoning, opener or not."""
    original = parser.prompt_state

    def prompt_state(prompt: str) -> PromptState:
        state = original(prompt)
        fresh = state is PromptState.CONTENT and "<|think|>" in prompt
        return PromptState.OPEN_CHANNEL if fresh else state

    return replace(parser, "prompt_state", prompt_state)


@faults("closer-swallows-delta", source=("R09", "R27"), area="reasoning", module=parser)
def _closer_swallows_delta() -> Patch:
    """Reasoning that shares a delta with the channel's closer is dropped."""
    original = Parser._take

    def take(self: Parser) -> Delta:
        delta = original(self)
        if delta.reasoning and self._state is _State.CONTENT:
            return Delta("", delta.content, delta.calls)
        return delta

    return replace(Parser, "_take", take)


@faults("one-thought-only", source=("R28", "R30"), area="reasoning", module=parser)
def _one_thought_only() -> Patch:
    """A second thought block of a turn comes out as content, opener and all."""
    original = Parser._marker
    thought_ended = "_fault_thought_ended"

    def marker(self: Parser, text: str, tokens: markers.Tokens) -> None:
        if text == markers.CHANNEL_OPEN and getattr(self, thought_ended, False):
            self._end_of_part()
            self._say(text)
            return
        if text == markers.CHANNEL_CLOSE:
            setattr(self, thought_ended, True)
        original(self, text, tokens)

    return replace(Parser, "_marker", marker)


# ---------------------------------------------------------------------------- markers and calls


@faults("split-marker-missed", source=("T01", "T11", "T37"), area="markers", module=markers)
def _split_marker_missed() -> Patch:
    """A marker that is split between two deltas is taken for text."""
    original = Lexer.feed

    def feed(self: Lexer, text: str, tokens: markers.Tokens) -> Iterator[tuple[str, bool, markers.Tokens]]:
        yield from original(self, text, tokens)
        yield from self.flush()

    return replace(Lexer, "feed", feed)


@faults("debris-leaks", source=("T37", "R17"), area="markers", module=parser)
def _debris_leaks() -> Patch:
    """Closers and response openers that follow a call come out as content."""
    original = Parser._marker

    def marker(self: Parser, text: str, tokens: markers.Tokens) -> None:
        debris = text in (markers.CALL_CLOSE, markers.RESPONSE_OPEN, markers.TURN_CLOSE)
        if debris and self._state is _State.CONTENT:
            self._say(text)
        else:
            original(self, text, tokens)

    return replace(Parser, "_marker", marker)


@faults("next-call-truncates", source=("T08", "T09"), area="tool-calls", module=parser)
def _next_call_truncates() -> Patch:
    """When one delta brings two calls, all but the last lose their arguments."""
    original = Parser._take

    def take(self: Parser) -> Delta:
        delta = original(self)
        calls = tuple(
            parser.CallDelta(c.index, c.name, "" if c.index < delta.calls[-1].index else c.arguments)
            for c in delta.calls
        )
        return Delta(delta.reasoning, delta.content, calls)

    return replace(Parser, "_take", take)


@faults("index-by-tool", source=("T29",), area="tool-calls", module=parser)
def _index_by_tool() -> Patch:
    """A call is numbered by its function's place among the declared tools."""
    original = Parser._take

    def take(self: Parser) -> Delta:
        delta = original(self)
        names = [tool.get("function", tool).get("name") for tool in self._tools]
        known: dict[int, int] = self.__dict__.setdefault("_fault_indices", {})
        for call in delta.calls:
            if call.name in names:
                known[call.index] = names.index(call.name)
        calls = tuple(parser.CallDelta(known.get(c.index, c.index), c.name, c.arguments) for c in delta.calls)
        return Delta(delta.reasoning, delta.content, calls)

    return replace(Parser, "_take", take)


@faults("word-names-only", source=("T31", "T32"), area="tool-calls", module=parser)
def _word_names_only() -> Patch:
    """Names with `-`, `.` or `:` are not recognised."""
    head = regex.compile(r"\s*+(?P<call>call\s*:|:)?\s*(?P<name>\w+)\s*(?P<bracket>[{(])")
    return replace(parser, "_HEAD", head)


@faults("braces-only", source=("T15",), area="recovery", module=parser)
def _braces_only() -> Patch:
    """`call:name(…)` is not read as a call."""
    head = regex.compile(r"\s*+(?P<call>call\s*:|:)?\s*(?P<name>[\w.:/-]*?[\w./-])\s*(?P<bracket>{)")
    return replace(parser, "_HEAD", head)


# ---------------------------------------------------------------------------- arguments


@faults("brackets-in-strings-count", source=("T26", "T31"), area="strings", module=arguments)
def _brackets_in_strings_count() -> Patch:
    """A closing bracket inside a delimited string ends the string."""
    original = ArgumentReader._read_string

    def read_string(self: ArgumentReader, text: str, position: int) -> int:
        stop = min((i for i in (text.find("}", position), text.find("]", position)) if i >= 0), default=-1)
        if stop < 0:
            return original(self, text, position)
        original(self, text[:stop], position)
        self._close_string()
        return stop

    # The table of steps was built from the class, so it is patched too.
    steps = {**arguments._STEPS, Phase.STRING: read_string}
    return replace(arguments, "_STEPS", steps)


@faults("backslashes-unescaped", source=("T33",), area="strings", module=delimited)
def _backslashes_unescaped() -> Patch:
    """Backslashes inside delimited strings are taken for escapes."""
    original = DelimitedText._write

    def write(self: DelimitedText, text: str) -> str:
        return original(self, re.sub(r"\\(.)", r"\1", text))

    return replace(DelimitedText, "_write", write)


@faults("quotes-kept", source=("T14",), area="strings", module=arguments)
def _quotes_kept() -> Patch:
    """ASCII quotes around a value are kept as part of it."""
    return replace(arguments, "QUOTED_STOP", {})


@faults("keys-cut-at-blanks", source=("T38",), area="strings", module=keys)
def _keys_cut_at_blanks() -> Patch:
    """A bare key ends at its first blank."""
    original = KeyText.name
    return replace(KeyText, "name", lambda self: original(self).split(" ")[0])


@faults("bare-null-is-text", source=("T04", "T05"), area="typing", module=schema)
def _bare_null_is_text() -> Patch:
    """A bare `null` becomes the string "null", whatever the schema says."""
    original = schema.type_bare

    def type_bare(lexeme: str, node: schema.Node | None) -> str:
        return schema.quote(lexeme) if lexeme == "null" else original(lexeme, node)

    return replace(arguments, "type_bare", type_bare)


@faults("schema-ignored", source=("T13",), area="typing", module=schema)
def _schema_ignored() -> Patch:
    """Declared types have no say: a number-like string becomes a number."""
    original = schema.type_bare
    return replace(arguments, "type_bare", lambda lexeme, _node: original(lexeme, None))


@faults("bare-is-always-text", source=("T12", "T03"), area="typing", module=schema)
def _bare_is_always_text() -> Patch:
    """Every value without delimiters becomes a string."""
    return replace(arguments, "type_bare", lambda lexeme, _node: schema.quote(lexeme))


@faults("opening-delimiter-required", source=("T30",), area="recovery", module=arguments)
def _opening_delimiter_required() -> Patch:
    """A value that lost its opening delimiter is cut at its first comma."""

    def join_next(self: ArgumentReader) -> None:
        del self  # the text after the comma is lost

    return replace(ArgumentReader, "_join_next", join_next)


@faults("digits-rounded", source=("T50",), area="typing", module=schema)
def _digits_rounded() -> Patch:
    """Numbers pass through a float, which rounds long integers."""
    original = schema.type_bare

    def type_bare(lexeme: str, node: schema.Node | None) -> str:
        typed = original(lexeme, node)
        return repr(float(typed)) if re.fullmatch(r"-?\d{16,300}", typed) else typed

    return replace(arguments, "type_bare", type_bare)
