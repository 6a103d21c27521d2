"""What must hold for every output, however broken and however it is cut.

Every property is checked on text of unknown origin, on text of ordinary tokens, and on runs of ordinary
and control tokens. Examples are derandomised, so that a failure is everyone's failure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from model_impl.chat.markers import Tokens
from model_impl.chat.parser import Message, MessageBuilder, Parser, PromptState, parse

Q = '<|"|>'
CONTROL = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", Q, "<|turn>", "<turn|>", "<|tool_response>",
    "<tool_response|>", "<eos>", "<bos>", "<pad>", "<unused7>", "<unused6241>",
)  # fmt: skip
DRIFTED = "<|tool_call|>"
# Written apart from the lexer's own pattern on purpose: it is what the lexer is held against.
MARKER = re.compile(
    r'<\|(?:channel|tool_call|turn|tool_response|"\|)>|<(?:channel|tool_call|turn|tool_response)\|>'
    r"|<(?:eos|bos|pad)>|<unused\d{1,4}>"
)

_PREFIXES = (
    "<",
    "<|",
    "<|tool_call",
    "<|tool_call|",
    "<|chan",
    "<channel|",
    "<tool_",
    '<|"',
    "<unused",
    "<unused12",
    "<eo",
)
_TEXT = (
    "a", "b:", "key", "x y", "thought", "thought\n", "though", "\n", " ", "\t", "\x1c", "\u00a0", "call:",
    "call:f{",
    "call:ns.g-1(", "call:-f {", "call", ":", "=", ",", ", ", "{", "}", "[", "]", "(", ")", '"', "'", "\\",
    '\\"',
    "true", "null", "False", "1", "-0.5", "1e+21", "007", "5.0", "Ünï", "👩‍🚀", "\ud83d", "\ude00", "\x00",
    "n't",
    '"v"', "'v',", "San Francisco, CA", "{{", "({", "})", "_.:/-", "unlabelled text ",
)  # fmt: skip
_OPENINGS = (
    "", "", "<|tool_call>call:f{", "<|tool_call>call:f{a:", "<|tool_call>call:f(",
    f"<|tool_call>call:f{{a:{Q}",
    "<|tool_call>call:f{a:'", '<|tool_call>call:f{a:["', "<|channel>", "<|channel>thought\n",
    DRIFTED + "call:f{",
    "<|tool_call>call:f{a:x,", "<|tool_call>call:f{\"a", "<|tool_call>call:f{}", "thought",
)  # fmt: skip

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                    "key": {"type": "array", "items": {"type": "number"}},
                    "x y": {"$ref": "#/$defs/node"},
                },
                "additionalProperties": {"type": "string"},
                "$defs": {"node": {"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}}}},
            },
        },
    },
)

fragments = st.one_of(
    st.sampled_from(_TEXT), st.sampled_from(_TEXT), st.sampled_from((*CONTROL, DRIFTED)),
    st.sampled_from(_PREFIXES), st.text(max_size=3),
)  # fmt: skip
texts = st.tuples(st.sampled_from(_OPENINGS), st.lists(fragments, max_size=14)).map(
    lambda t: t[0] + "".join(t[1])
)
Runs = tuple[tuple[str, Tokens], ...]


def token_runs(text: str) -> Runs:
    """The text with its markers as control tokens and the rest as ordinary ones."""
    runs: list[tuple[str, Tokens]] = []
    position = 0
    for match in MARKER.finditer(text):
        runs += [(text[position : match.start()], "ordinary"), (match.group(), "control")]
        position = match.end()
    runs.append((text[position:], "ordinary"))
    return tuple(run for run in runs if run[0])


def spelled(runs: Runs) -> Runs:
    """Some control tokens spelled with ordinary ones, and neighbours of one kind joined."""
    joined: list[tuple[str, Tokens]] = []
    for text, kind in runs:
        if kind == "ordinary" and joined and joined[-1][1] == "ordinary":
            joined[-1] = (joined[-1][0] + text, kind)
        else:
            joined.append((text, kind))
    return tuple(joined)


outputs = st.one_of(
    texts.map(lambda t: ((t, "unknown"),)),
    texts.map(token_runs),
    st.lists(
        st.one_of(
            st.sampled_from(CONTROL).map(lambda m: (m, "control")), texts.map(lambda t: (t, "ordinary"))
        ),
        max_size=6,
    ).map(lambda runs: spelled(tuple(runs))),
    texts.map(lambda t: ((t, "ordinary"),)),
)
requests = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(PromptState),
        "tools": st.sampled_from(((), TOOLS)),
        "calls_allowed": st.sampled_from((True, True, True, False)),
    }
)
derandomised = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def text_of(runs: Iterable[tuple[str, Tokens]]) -> str:
    return "".join(text for text, _ in runs)


@dataclass
class Stream:
    """A streamed message, and what the client held after every delta."""

    message: Message
    held: list[tuple[str, ...]] = field(default_factory=list)


def stream(runs: Runs, cuts: Iterable[int], request: dict[str, Any]) -> Stream:
    """Feed the runs cut at these positions of the whole text; a cut given twice feeds an empty piece."""
    parser = Parser(**request, track_spans=True)
    builder = MessageBuilder()
    result = Stream(Message("", "", (), ()))
    wanted = sorted(cuts)
    position = 0
    for text, kind in runs:
        inner = [c - position for c in wanted if position <= c <= position + len(text)]
        for start, end in zip([0, *inner], [*inner, len(text)], strict=True):
            builder.add(parser.feed(text[start:end], kind))
            result.held.append(tuple(call.arguments for call in builder.message(parser).tool_calls))
        position += len(text)
    builder.add(parser.finish())
    result.message = builder.message(parser)
    return result


def check_spans(text: str, message: Message) -> None:
    """Every character belongs to exactly one span, and the fields are what the spans say."""
    position = 0
    for span in message.spans:
        assert span.start == position, message.spans
        assert span.end > span.start
        assert bool(span.reason) == (span.role == "dropped"), span
        position = span.end
    assert position == len(text)
    said = {
        role: [text[s.start : s.end] for s in message.spans if s.role == role]
        for role in ("reasoning", "content", "call_name")
    }
    assert "".join(said["reasoning"]) == message.reasoning
    assert "".join(said["content"]) == message.content
    assert said["call_name"] == [call.name for call in message.tool_calls]


# ---------------------------------------------------------------------------------------- properties


@given(outputs, requests)
@settings(derandomised, max_examples=1000)
def test_every_character_has_one_role_and_arguments_are_objects(runs: Runs, request: dict[str, Any]) -> None:
    message = parse(runs, **request)
    check_spans(text_of(runs), message)
    for call in message.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.name
    if not request["calls_allowed"]:
        assert message.tool_calls == ()


@given(outputs, requests, st.data())
@settings(derandomised, max_examples=800)
def test_streams_equal_whole_and_never_take_back(
    runs: Runs, request: dict[str, Any], data: st.DataObject
) -> None:
    whole = parse(runs, **request)
    length = len(text_of(runs))
    chosen = data.draw(st.lists(st.integers(0, length), max_size=6))
    for cuts in (chosen, range(length + 1), range(0, length + 1, 3)):
        streamed = stream(runs, cuts, request)
        assert streamed.message == whole
        for held in streamed.held:
            for index, arguments in enumerate(held):
                assert whole.tool_calls[index].arguments.startswith(arguments)


@given(outputs, requests)
@settings(derandomised, max_examples=300)
def test_parsing_has_no_memory(runs: Runs, request: dict[str, Any]) -> None:
    first = parse(runs, **request)
    parse("<|tool_call>call:other{a:'1", PromptState.OPEN_CHANNEL)
    assert parse(runs, **request) == first


@given(texts, requests)
@settings(derandomised, max_examples=1000)
def test_no_marker_reaches_reasoning_or_content(text: str, request: dict[str, Any]) -> None:
    """Of text whose origin is unknown, and of control tokens, no marker becomes visible text."""
    markers = [match.span() for match in MARKER.finditer(text)]
    for runs in (((text, "unknown"),), token_runs(text)):
        for span in parse(runs, **request).spans:
            if span.role in ("reasoning", "content", "call_name"):
                overlap = [m for m in markers if m[0] < span.end and span.start < m[1]]
                assert not overlap, (span, text[span.start : span.end])


@given(
    st.lists(st.one_of(st.sampled_from(CONTROL), st.sampled_from(_TEXT)), max_size=12).map("".join), requests
)
@settings(derandomised, max_examples=500)
def test_markers_spelled_with_ordinary_tokens_are_text(text: str, request: dict[str, Any]) -> None:
    """Without control tokens there is no structure but the drifted opener and a leading label."""
    assume(DRIFTED not in text and not text.startswith("thought\n"))
    message = parse([(text, "ordinary")], **request)
    assert message.tool_calls == ()
    assert message.reasoning + message.content == text


@given(texts, requests)
@settings(derandomised, max_examples=300)
def test_nothing_but_blanks_brackets_labels_and_stray_text_is_dropped(
    text: str, request: dict[str, Any]
) -> None:
    known = {
        "channel label": re.compile(r"thought\n?"),
        "unbalanced closing bracket": re.compile(r"[}\])\s]+"),
        "blanks after a call": re.compile(r"\s+"),
        "text after a closed value": re.compile(r".+", re.DOTALL),
        "text after a delimited key": re.compile(r".+", re.DOTALL),
        "delimiter out of place": re.compile(rf"(?:{re.escape(Q)})+"),
        "delimiter after a quoted value": re.compile(rf"(?:{re.escape(Q)})+"),
        "marker inside arguments": re.compile(r"(<[^<>]+>)+"),
    }
    for span in parse(text, **request).spans:
        if span.role == "dropped":
            assert known[span.reason].fullmatch(text[span.start : span.end]), (
                span,
                text[span.start : span.end],
            )


# ---------------------------------------------------------------------------------------- round trip


def native(value: Any) -> list[tuple[str, Tokens]]:
    """Runs of the template's notation of a JSON value; strings and odd keys between delimiters."""
    match value:
        case dict():
            runs: list[tuple[str, Tokens]] = [("{", "ordinary")]
            for number, (key, item) in enumerate(value.items()):
                runs.append(("," if number else "", "ordinary"))
                bare = re.fullmatch(r"[A-Za-z_](?:[\w .-]*\w)?", key, re.ASCII)
                runs += [(key, "ordinary")] if bare else delimited(key)
                runs += [(":", "ordinary"), *native(item)]
            return [*runs, ("}", "ordinary")]
        case list():
            runs = [("[", "ordinary")]
            for number, item in enumerate(value):
                runs += [("," if number else "", "ordinary"), *native(item)]
            return [*runs, ("]", "ordinary")]
        case str():
            return delimited(value)
        case True | False | None:
            return [(json.dumps(value), "ordinary")]
        case _:
            return [(repr(value), "ordinary")]


def delimited(text: str) -> list[tuple[str, Tokens]]:
    return [(Q, "control"), (text, "ordinary"), (Q, "control")]


def call_runs(arguments: dict[str, Any]) -> Runs:
    body = native(arguments)
    runs: list[tuple[str, Tokens]] = [("<|tool_call>", "control"), ("call:f", "ordinary"), *body]
    return spelled(tuple(run for run in [*runs, ("<tool_call|>", "control")] if run[0]))


strings = st.one_of(
    st.text(max_size=8), st.lists(st.sampled_from((*_TEXT, *_PREFIXES, *CONTROL)), max_size=5).map("".join)
)
scalars = st.one_of(
    strings,
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
)
values = st.recursive(
    scalars,
    lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(strings, v, max_size=4)),
    max_leaves=12,
)
objects = st.dictionaries(st.one_of(strings, st.sampled_from(("a", "my key", "x.y-z"))), values, max_size=4)


def markers_within(value: Any) -> bool:
    """Whether a string or key of the value spells a marker, or the drifted opener."""
    if isinstance(value, str):
        return bool(MARKER.search(value)) or DRIFTED in value
    if isinstance(value, dict):
        return any(markers_within(k) or markers_within(v) for k, v in value.items())
    return isinstance(value, list) and any(markers_within(v) for v in value)


def identical(a: Any, b: Any) -> bool:
    """Equal values of equal types: 1, 1.0 and True all differ."""
    return json.dumps(a) == json.dumps(b)


@given(objects, st.data())
@settings(derandomised, max_examples=250)
def test_arguments_survive_the_round_trip(arguments: dict[str, Any], data: st.DataObject) -> None:
    """By tokens every string comes back, whatever it spells; by text, every one without markers."""
    runs = call_runs(arguments)
    cases = [runs]
    if not markers_within(arguments):
        cases.append(((text_of(runs), "unknown"),))
    cuts = data.draw(st.lists(st.integers(0, len(text_of(runs))), max_size=5))
    for case in cases:
        whole = parse(case)
        assert (whole.reasoning, whole.content) == ("", "")
        assert [(c.name, c.complete) for c in whole.tool_calls] == [("f", True)]
        assert identical(json.loads(whole.tool_calls[0].arguments), arguments)
        for positions in (cuts, range(len(text_of(runs)))):
            assert stream(case, positions, {}).message == whole


# ---------------------------------------------------------------------------------------- size and depth

DEPTH = 200_000


@pytest.mark.parametrize(
    ("opener", "closer", "expected"),
    [
        ("[", "]", "[" * DEPTH + "]" * DEPTH),
        ("{a:", "}", '{"a":' * DEPTH + '""' + "}" * DEPTH),
    ],
    ids=["arrays", "objects"],
)
@pytest.mark.parametrize(
    ("closed", "size"), [(True, 10**9), (False, 10**9), (False, 7)], ids=["whole", "whole-cut", "sevens-cut"]
)
def test_deep_nesting_neither_raises_nor_recurses(
    opener: str, closer: str, expected: str, closed: bool, size: int
) -> None:
    text = "<|tool_call>call:f{v:" + opener * DEPTH + (closer * DEPTH + "}<tool_call|>" if closed else "")
    parser = Parser(tools=TOOLS)
    builder = MessageBuilder()
    for start in range(0, len(text), size):
        builder.add(parser.feed(text[start : start + size]))
    builder.add(parser.finish())
    message = builder.message(parser)
    assert [(c.name, c.complete) for c in message.tool_calls] == [("f", closed)]
    assert message.tool_calls[0].arguments == '{"v":' + expected + "}"


REPEATED: Sequence[str] = (
    "<|tool_call>", "<|channel>", "<|tool_cal", "call:f{", "<|tool_call>call:f{a:'", "call:f{a:'x} ", '"',
    "'\"", "\\",
    "a:{b:[", "}", "]", ")", "(", ",", "a,", "a:b,", ":", "=", Q, Q + "}", "<tool_call|>", "<eos>",
    "<|tool_call|>", " ",
    "thought", "thought\n", "call:f{}", "call:f{b:\"}",
)  # fmt: skip


@pytest.mark.parametrize(
    "opening", ["", "<|tool_call>call:f{a:", "<|tool_call>call:f{a:'", f"<|tool_call>call:f{{a:{Q}"]
)
@pytest.mark.parametrize("unit", REPEATED)
def test_repetition_neither_raises_nor_recurses(opening: str, unit: str) -> None:
    """The same few characters some thousand times: no recursion on any of them."""
    text = opening + unit * 2000
    for runs in (((text, "unknown"),), token_runs(text)):
        check_spans(text, parse(runs))
