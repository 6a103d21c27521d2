"""Hypothesis strategies for conversations, tool declarations and model text.

Most conversations are well formed; about one in ten carries something that a template must refuse or
cope with. Names and keys come from small pools on purpose: rules fire when they meet (an id that
matches, keys that differ in case only, a parameter named like a schema keyword).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

MARKERS = (
    "<|channel>",
    "<channel|>",
    "<|channel>thought\n",
    "<|turn>",
    "<turn|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|tool>",
    "<tool|>",
    '<|"|>',
    "<|think|>",
    "<|image|>",
    "<bos>",
    "<eos>",
)

_FRAGMENTS = (
    "Hi",
    " a word ",
    "two\nlines",
    "\n",
    "  ",
    "",
    "{x:1}",
    '"quoted" \\n',
    "Grüße",
    "東京",
    "👩‍👩‍👧",
    "e\u0301",
    "\u00a0edge\u2003",
    "{{ 7 * 7 }}",
    "<b>&amp;</b>",
)
NAMES = ("f", "get_weather", "Get_Weather", "ns:tool.do-it", "t1")
KEYWORDS = ("description", "type", "properties", "required", "nullable", "items", "enum", "title", "get")
KEYS = ("a", "A", "b", "city", "my key", "x-y.z", "日本", *KEYWORDS)
IDS = ("call_1", "call_2", "call_3")

texts = st.one_of(
    st.sampled_from(_FRAGMENTS),
    st.lists(st.sampled_from(_FRAGMENTS + MARKERS), min_size=1, max_size=5).map("".join),
    st.text(max_size=6),
)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), st.text(min_size=1, max_size=3))
scalars = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.integers(min_value=-(10**20), max_value=10**20),
    st.floats(allow_nan=False),
    st.sampled_from((0, 1, 1.0, -0.5, 1e-05, 1e21, 0.1)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=6,
)
objects = st.dictionaries(keys, values, max_size=4)


ABSENT = object()


def maybe(strategy: st.SearchStrategy[Any], present: int = 1, absent: int = 1) -> st.SearchStrategy[Any]:
    """The value, or `ABSENT`, in this ratio."""
    # Hypothesis favours the first choices, so the absent ones stand in the middle.
    ahead = (present + 1) // 2
    return st.sampled_from((*[True] * ahead, *[False] * absent, *[True] * (present - ahead))).flatmap(
        lambda there: strategy if there else st.just(ABSENT)
    )


def mostly(usual: st.SearchStrategy[Any], *odd: Any) -> st.SearchStrategy[Any]:
    """What the strategy gives, or in one of eight draws one of these values."""
    return st.sampled_from((*[True] * 4, False, *[True] * 3)).flatmap(
        lambda is_usual: usual if is_usual else st.sampled_from(odd)
    )


def record(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping of these fields in any order, without those that came out `ABSENT`."""
    return st.tuples(st.fixed_dictionaries(fields), st.permutations(list(fields))).map(
        lambda pair: {name: pair[0][name] for name in pair[1] if pair[0][name] is not ABSENT}
    )


_names_required = mostly(st.lists(keys, min_size=1, max_size=3), "ab", None, [], [1, "a"])
_enums = mostly(st.lists(st.one_of(scalars, values), min_size=1, max_size=3), None, [])
_nullables = st.sampled_from((True, False, None, 1, "yes"))
_descriptions = mostly(texts, None)
_strings = st.sampled_from(("string", "STRING", "String"))
_arrays = st.sampled_from(("array", "ARRAY"))
_objects = st.sampled_from(("object", "OBJECT"))
_odd_types = (None, "", ["string", "null"], ["array", "null"], ["object"], 3)
_odd_schemas = (True, False, None, "string", ["a"], 3, {}, {"type": "object"}, {"type": "array"})

_leaves = st.one_of(
    record(
        type=mostly(st.sampled_from(("integer", "number", "boolean", "null")), *_odd_types),
        description=maybe(_descriptions),
        nullable=maybe(_nullables, 1, 2),
        # Keywords that belong to another type are not declared.
        enum=maybe(_enums, 1, 2),
        items=maybe(st.just({"type": "string"}), 1, 2),
        properties=maybe(st.just({"a": {"type": "string"}}), 1, 2),
        required=maybe(st.just(["a"]), 1, 2),
    ),
    record(
        type=_strings, enum=maybe(_enums, 3), description=maybe(_descriptions), nullable=maybe(_nullables)
    ),
    st.sampled_from(_odd_schemas),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Arrays and objects of these schemas."""
    members = st.dictionaries(keys, inner, min_size=1, max_size=3)
    arrays = record(
        type=_arrays,
        items=mostly(st.one_of(inner, inner, members), ABSENT, {}, True, None, [{"type": "string"}]),
        description=maybe(_descriptions),
        nullable=maybe(_nullables),
    )
    arrays_of_objects = record(
        type=_arrays,
        items=record(
            type=mostly(_objects, ["object", "null"], ABSENT),
            properties=mostly(members, True, [], "none", None),
            required=maybe(_names_required),
            description=maybe(_descriptions),
            default=maybe(values, 1, 2),
        ),
    )
    objects_with_properties = record(
        type=_objects,
        properties=mostly(members, {}, None, [], True),
        required=maybe(_names_required),
        description=maybe(_descriptions),
        nullable=maybe(_nullables),
        additionalProperties=maybe(st.booleans(), 1, 2),
    )
    bare_objects = record(
        type=_objects,
        description=maybe(_descriptions),
        required=maybe(_names_required),
        title=maybe(st.one_of(texts, inner)),
        additionalProperties=maybe(st.one_of(st.booleans(), inner)),
    )
    return st.one_of(arrays, arrays_of_objects, objects_with_properties, bare_objects)


schemas = st.one_of(_leaves, _nested(_leaves), _nested(st.one_of(_leaves, _nested(_leaves))))

tools = record(
    type=maybe(st.just("function"), 3),
    function=record(
        name=st.sampled_from(NAMES),
        description=mostly(texts, None, ABSENT),
        parameters=mostly(
            record(
                type=mostly(_objects, None, ABSENT, ["object", "null"]),
                properties=mostly(st.dictionaries(keys, schemas, min_size=1, max_size=3), {}, None, ABSENT),
                required=maybe(_names_required, 2),
                additionalProperties=maybe(st.booleans()),
            ),
            ABSENT,
            None,
            {},
            {"type": "object"},
        ),
        response=maybe(
            mostly(
                record(
                    type=mostly(st.sampled_from(("object", "string", "Object")), None, ABSENT),
                    description=maybe(_descriptions),
                ),
                None,
                {},
            ),
            1,
            2,
        ),
        strict=maybe(st.booleans()),
    ),
)

_media = st.sampled_from(
    (
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "audio"},
        {"type": "input_audio"},
        {"type": "video", "video": "x"},
        {"type": "file"},
        {"text": "part without a type"},
    )
)
_text_parts = texts.map(lambda text: {"type": "text", "text": text})
_parts = st.lists(st.one_of(_text_parts, _media), max_size=4)
_contents = mostly(st.one_of(texts, texts, _parts), None, "", ABSENT, [])
_thoughts = maybe(mostly(texts, None, ""))
_system_contents = mostly(
    st.one_of(texts, st.lists(st.one_of(_text_parts, _media), max_size=3)), None, ABSENT, "", {"a": 1}, 7
)

_calls = record(
    id=st.sampled_from((*IDS, None, ABSENT)),
    type=maybe(st.just("function")),
    function=record(
        name=st.sampled_from(NAMES),
        arguments=mostly(objects, {}, None),
    ),
)
_call_lists = st.lists(_calls, min_size=1, max_size=3)
_legacy_responses = st.lists(
    record(
        name=st.sampled_from((*NAMES, None, "", ABSENT)),
        response=st.one_of(objects, values, st.just(ABSENT)),
    ),
    min_size=1,
    max_size=2,
)

_tool_messages = record(
    role=st.just("tool"),
    tool_call_id=st.sampled_from((*IDS, "other", None, ABSENT)),
    name=st.sampled_from((*NAMES, None, "", ABSENT)),
    content=mostly(st.one_of(texts, _parts, _parts), None, ABSENT, {}, 5, 2.5, True),
)
_users = record(role=st.just("user"), content=_contents, name=maybe(st.just("Ann")))
_answers = record(
    role=st.just("assistant"), content=_contents, reasoning=_thoughts, reasoning_content=_thoughts
)
_callers = record(
    role=st.just("assistant"),
    content=_contents,
    reasoning=_thoughts,
    reasoning_content=_thoughts,
    tool_calls=_call_lists,
    tool_responses=maybe(mostly(_legacy_responses, [], None), 1, 2),
)
_oddities = record(
    role=st.sampled_from(("system", "developer", "model", "user", "assistant", "critic", "")),
    content=_contents,
    reasoning=_thoughts,
    tool_calls=maybe(mostly(_call_lists, [], None)),
    tool_responses=maybe(_legacy_responses, 1, 2),
)

_episodes = st.one_of(
    st.tuples(_users),
    st.tuples(_users, _answers),
    st.tuples(_answers),
    st.tuples(_callers),
    st.tuples(_callers, st.lists(_tool_messages, max_size=3)),
    st.tuples(_callers, st.lists(_tool_messages, min_size=1, max_size=2), _answers),
    st.tuples(_users, _callers, st.lists(_tool_messages, min_size=1, max_size=2)),
    st.tuples(_tool_messages),
    st.tuples(_oddities),
)


def _flatten(episodes: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [
        message
        for episode in episodes
        for step in episode
        for message in (step if isinstance(step, list) else [step])
    ]


_openings = st.one_of(
    st.just([]),
    record(role=st.sampled_from(("system", "developer")), content=_system_contents).map(lambda m: [m]),
)


def _caller(call: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


MALFORMED_MESSAGES: tuple[dict[str, Any], ...] = (
    _caller({"id": "call_1", "function": {"name": "f", "arguments": '{"a": 1}'}}),
    _caller({"id": "call_1", "function": {"name": "f", "arguments": ""}}),
    _caller({"id": "call_1", "function": {"name": "f", "arguments": ["a"]}}),
    _caller({"id": "call_1", "function": {"name": "f"}}),
    _caller({"id": "call_1", "function": {"arguments": {}}}),
    _caller({"id": "call_1", "name": "f", "arguments": {}}),
    _caller({"id": "call_1", "function": {"name": 5, "arguments": {}}}),
    _caller({"id": "call_1", "function": {"name": "f", "arguments": {1: "key", 2: {3: 4}}}}),
    _caller({"id": "call_1", "function": {"name": "f", "arguments": {1: "a", "b": 2}}}),
    _caller("f"),
    {"role": "assistant", "tool_calls": "f()"},
    {"role": "user", "content": ["text"]},
    {"role": "user", "content": {"type": "text"}},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{"type": "text", "text": None}]},
    {"role": "user", "content": 5},
    {"role": "assistant", "content": ["text"]},
    {"role": "assistant", "content": [{"type": "text"}]},
    {"role": "assistant", "content": {}},
    {"role": "assistant", "content": 5},
    {"role": "assistant", "reasoning": 5, "content": "a"},
    {"role": "assistant", "reasoning_content": ["why"], "content": "a"},
    {"role": None, "content": "a"},
    {"role": 3, "content": "a"},
    {"content": "a"},
    {},
    {"role": "assistant", "tool_responses": [{"name": 5, "response": "ok"}]},
    {"role": "assistant", "tool_responses": {"a": 1}},
    {"role": "assistant", "tool_responses": ["x"]},
)
"""Messages that no API would let through; the template refuses most and copes with some."""

MALFORMED_RESULTS: tuple[Any, ...] = (
    {"temp": 1},
    ["text"],
    [{"type": "text"}],
    [{"type": "text", "text": None}],
    [{"type": "text", "text": 5}],
)
"""Contents of tool messages of the same kind."""


def _parameters(schema: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}}


MALFORMED_TOOLS: tuple[Any, ...] = (
    {"name": "f"},
    {"function": None},
    {"function": {"name": "f", "parameters": {"type": "object", "properties": ["a"]}}},
    {"function": {"name": "f", "parameters": {"type": "object", "required": 5}}},
    {"function": {"name": None, "description": 5, "parameters": "none"}},
    _parameters({"type": "object", "required": True}),
    _parameters({"type": "object", "properties": {1: {"type": "string"}, "b": {}}}),
    _parameters({"type": "array", "items": {"type": True}}),
    _parameters({"type": "array", "items": {"type": 0}}),
    _parameters({"type": "array", "items": {"required": 3}}),
    _parameters({"type": "array", "items": {"default": {1: 2}}}),
    _parameters({"type": "string", "enum": [{1: 2}]}),
    "f",
    None,
)
"""Declarations of the same kind."""


@dataclass(frozen=True)
class Conversation:
    """Everything that decides a prompt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool | None
    preserve_thinking: bool | None
    add_generation_prompt: bool

    def __str__(self) -> str:
        return json.dumps(self.__dict__, ensure_ascii=False, indent=1, default=repr)


_flags = st.sampled_from((None, True, False))
_flaws = st.sampled_from((*[None] * 14, *["message"] * 3, *["result"] * 2, *["tool"] * 2, *[None] * 14))


_declared = st.sampled_from(
    (
        None,
        [{"type": "function", "function": {"name": "f", "description": "Do it.", "parameters": {}}}],
        [],
        [{"function": {"name": "f"}}, {"function": {"name": "g", "description": "Go."}}],
    )
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any messages, with plain tools; about one in ten holds something malformed."""
    messages = [*draw(_openings), *_flatten(draw(st.lists(_episodes, max_size=4)))]
    declared = draw(_declared)
    flaw = draw(_flaws)
    if flaw == "message":
        place = draw(st.integers(min_value=0, max_value=len(messages)))
        messages.insert(place, draw(st.sampled_from(MALFORMED_MESSAGES)))
    elif flaw == "result":
        result = {"role": "tool", "tool_call_id": draw(st.sampled_from(IDS))}
        messages += [draw(_callers), {**result, "content": draw(st.sampled_from(MALFORMED_RESULTS))}]
    elif flaw == "tool":
        declared = [*(declared or []), draw(st.sampled_from(MALFORMED_TOOLS))]
    return Conversation(
        messages=messages,
        tools=declared,
        thinking=draw(_flags),
        preserve_thinking=draw(_flags),
        add_generation_prompt=draw(st.booleans()),
    )


declarations = st.builds(
    Conversation,
    messages=st.sampled_from(
        ([{"role": "user", "content": "Hi"}], [{"role": "system", "content": "Be kind."}])
    ),
    tools=st.lists(tools, min_size=1, max_size=2),
    thinking=_flags,
    preserve_thinking=st.none(),
    add_generation_prompt=st.just(False),
)
"""A short conversation with elaborate tools."""
