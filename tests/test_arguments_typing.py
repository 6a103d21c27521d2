"""Types of tool arguments: section 5 of docs/parsing.md, on the reference parser."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_impl.chat.parser import Parser, parse

Q = '<|"|>'
STRING, INTEGER, NUMBER, BOOLEAN, NULL = (
    {"type": t} for t in ("string", "integer", "number", "boolean", "null")
)
OBJECT, ARRAY = {"type": "object"}, {"type": "array"}
derandomised = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def parameters(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def typed(inside: str, schema: dict[str, Any] | None = None, *, whole: bool = True) -> str:
    """JSON text of `call:f{…}` with this text inside, under a schema of the parameters; by character too."""
    tools: tuple[dict[str, Any], ...] = (
        {"type": "function", "function": {"name": "f", "parameters": schema}},
    )
    if schema is None:
        tools = ()
    text = f"<|tool_call>call:f{{{inside}}}<tool_call|>"
    (call,) = parse(text, tools=tools).tool_calls
    parser = Parser(tools=tools)
    deltas = [*(parser.feed(character) for character in text), parser.finish()]
    assert "".join(part.arguments for delta in deltas for part in delta.calls) == call.arguments
    return call.arguments


def value(inside: str, schema: dict[str, Any] | None = None, **rest: Any) -> str:
    """JSON text of the single value `v:…` under the schema of that value."""
    text = typed(f"v:{inside}", None if schema is None else {**parameters(v=schema), **rest})
    assert text.startswith('{"v":')
    return text[5:-1]


# ---------------------------------------------------------------------------------------- without a schema


@pytest.mark.parametrize("literal", ["true", "false", "null"])
def test_literals_are_typed(literal: str) -> None:
    assert value(literal) == literal


@pytest.mark.parametrize(
    "text", ["True", "FALSE", "None", "NULL", "nan", "inf", "-inf", "Infinity", "undefined", "yes"]
)
def test_other_words_are_strings(text: str) -> None:
    assert value(text) == json.dumps(text)


@pytest.mark.parametrize(
    "number",
    [
        "0",
        "-0",
        "5",
        "-5",
        "1.50",
        "0.1",
        "1e5",
        "1E+21",
        "1e-05",
        "-1.5e300",
        "1e400",
        "12345678901234567890123",
        "9" * 5000,
    ],
)
def test_json_numbers_keep_their_digits(number: str) -> None:
    assert value(number) == number


@pytest.mark.parametrize(
    "text",
    ["007", "+4", ".5", "5.", "1_000", "0x1F", "1e", "--1", "1 2", "1,5e3x", "5%", "٣", "-", "1/2", "1:30"],
)
def test_what_json_does_not_call_a_number_is_a_string(text: str) -> None:
    assert value(text) == json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize("text", ["5", "true", "null", "1.5", "[1]", "{}"])
def test_delimited_values_are_strings(text: str) -> None:
    assert value(f"{Q}{text}{Q}") == value(f'"{text}"') == value(f"'{text}'") == json.dumps(text)


def test_blanks_around_a_value_do_not_count() -> None:
    assert typed(" v : 5 , w :  true\n") == '{"v":5,"w":true}'


# ---------------------------------------------------------------------------------------- declared types


@pytest.mark.parametrize("text", ["007", "null", "true", "5", "1.50", "-", "None"])
def test_string_keeps_the_lexeme(text: str) -> None:
    assert value(text, STRING) == json.dumps(text)


@pytest.mark.parametrize(
    "nullable",
    [{"type": "string", "nullable": True}, {"type": ["string", "null"]}, {"anyOf": [STRING, NULL]}],
)
@pytest.mark.parametrize("text", ["null", "NULL", "Null", "nUlL"])
def test_null_in_any_case_where_nullable(nullable: dict[str, Any], text: str) -> None:
    assert value(text, nullable) == "null"
    assert value(text, STRING) == json.dumps(text)
    assert value(f"{Q}{text}{Q}", nullable) == json.dumps(text), "a delimited value is never null"


@pytest.mark.parametrize(
    "schema", [NULL, {"type": ["integer", "null"]}, {"type": "integer", "nullable": True}]
)
def test_a_quoted_null_is_text(schema: dict[str, Any]) -> None:
    assert value(f"{Q}null{Q}", schema) == '"null"'
    assert value("null", schema) == "null"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", "5"), ("-5", "-5"), ("5.0", "5"), ("5.", "5"), ("+5", "5"), ("007", "7"), ("-0", "0"),
        ("-0.0", "0"), ("5.000", "5"),
        ("12345678901234567890123", "12345678901234567890123"), ("9" * 5000, "9" * 5000),
        # Not integral: read as if there were no schema.
        ("5.5", "5.5"), ("1e5", "1e5"), ("five", '"five"'), ("true", "true"), ("null", "null"),
        (".5", '".5"'), ("-", '"-"'),
        (".", '"."'), ("+", '"+"'), ("0x10", '"0x10"'), ("5 6", '"5 6"'), ("٣", '"٣"'),
    ],
)  # fmt: skip
def test_integer_takes_integral_numbers(text: str, expected: str) -> None:
    assert value(text, INTEGER) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", "5"), ("5.5", "5.5"), ("1.50", "1.50"), ("1e5", "1e5"), ("-0.5", "-0.5"), (".5", "0.5"),
        ("5.", "5"), ("+4", "4"),
        ("007", "7"), ("007.50", "7.50"), ("-.5e3", "-0.5e3"), ("1E+21", "1E+21"),
        ("five", '"five"'), (".", '"."'), ("e5", '"e5"'), ("inf", '"inf"'), ("nan", '"nan"'),
        ("true", "true"),
    ],
)  # fmt: skip
def test_number_takes_any_number(text: str, expected: str) -> None:
    assert value(text, NUMBER) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", "true"), ("False", "false"), ("TRUE", "true"), ("fAlSe", "false"), ("1", "1"), ("0", "0"),
        ("yes", '"yes"'), ("t", '"t"')],
)  # fmt: skip
def test_boolean_in_any_case(text: str, expected: str) -> None:
    assert value(text, BOOLEAN) == expected


@pytest.mark.parametrize("quote", [Q, '"', "'"])
@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (INTEGER, "5", "5"), (INTEGER, "-5", "-5"), (NUMBER, "5.5", "5.5"), (BOOLEAN, "true", "true"),
        (BOOLEAN, "False", "false"),
        (INTEGER, "5 ", '"5 "'), (INTEGER, " 5", '" 5"'), (INTEGER, "5.5", '"5.5"'),
        (INTEGER, "five", '"five"'), (INTEGER, "", '""'),
        (NUMBER, "", '""'), (NUMBER, "5%", '"5%"'), (BOOLEAN, "1", '"1"'), (BOOLEAN, "yes", '"yes"'),
        (NULL, "null", '"null"'),
        (INTEGER, "null", '"null"'), (STRING, "5", '"5"'), (OBJECT, "{}", '"{}"'), (ARRAY, "[1]", '"[1]"'),
        ({"type": ["integer", "string"]}, "5", '"5"'), ({"anyOf": [BOOLEAN, STRING]}, "true", '"true"'),
        ({"anyOf": [INTEGER, BOOLEAN]}, "true", "true"), ({}, "5", '"5"'),
    ],
)  # fmt: skip
def test_quoted_values_are_cast_only_to_what_they_spell(
    quote: str, schema: dict[str, Any], text: str, expected: str
) -> None:
    assert value(f"{quote}{text}{quote}", schema) == expected


def test_a_bare_value_that_lost_its_opener_counts_as_quoted() -> None:
    assert value(f"5{Q}", STRING) == '"5"'
    assert value(f"5{Q}", INTEGER) == "5"
    assert value(f"5{Q}") == '"5"'


@pytest.mark.parametrize("union", ["anyOf", "oneOf", "type"])
@pytest.mark.parametrize(
    ("members", "text", "expected"),
    [
        (("string", "integer"), "5", "5"), (("string", "number"), "5.0", "5.0"),
        (("integer", "number"), "5.0", "5"),
        (("number", "string"), "x", '"x"'), (("boolean", "string"), "TRUE", "true"),
        (("boolean", "integer"), "1", "1"),
        (("string", "null"), "null", "null"), (("integer", "null"), "NULL", "null"),
        (("string", "integer", "null"), "null", "null"),
        (("integer", "boolean"), "x", '"x"'), (("object", "string"), "null", '"null"'),
        (("string", "object"), "x", '"x"'),
        (("array", "string"), "[1]", "[1]"), (("object", "string"), "{a:1}", '{"a":1}'),
    ],
)  # fmt: skip
def test_unions_try_the_types_in_one_order(
    union: str, members: tuple[str, ...], text: str, expected: str
) -> None:
    for order in (members, members[::-1]):
        schema = {"type": list(order)} if union == "type" else {union: [{"type": t} for t in order]}
        assert value(text, schema) == expected


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (INTEGER, "true", "true"), (BOOLEAN, "5", "5"), (NUMBER, "null", "null"), (OBJECT, "5", "5"),
        (ARRAY, "x", '"x"'),
        (STRING, "{a:1}", '{"a":1}'), (STRING, "[1]", "[1]"), (INTEGER, "[1]", "[1]"), (NULL, "5", "5"),
        (NULL, "x", '"x"'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_read_without_schema(schema: dict[str, Any], text: str, expected: str) -> None:
    assert value(text, schema) == expected


@pytest.mark.parametrize("spelling", ["STRING", "String", "string"])
def test_type_names_in_any_case(spelling: str) -> None:
    assert value("007", {"type": spelling}) == '"007"'


# ---------------------------------------------------------------------------------------- where the schema is


def test_properties_and_additional_properties() -> None:
    schema = {**parameters(a=STRING), "additionalProperties": INTEGER}
    assert typed("a:007,b:007,c:x", schema) == '{"a":"007","b":7,"c":"x"}'
    assert typed("b:007", {**parameters(a=STRING), "additionalProperties": False}) == '{"b":"007"}'
    assert typed("b:5", {**parameters(a=STRING), "additionalProperties": True}) == '{"b":5}'


def test_nested_properties() -> None:
    schema = parameters(o=parameters(a=STRING, o=parameters(a=INTEGER)))
    assert typed("a:1,o:{a:1,b:1,o:{a:007}}", schema) == '{"a":1,"o":{"a":"1","b":1,"o":{"a":7}}}'


def test_keys_are_looked_up_as_the_model_meant_them() -> None:
    schema = parameters(**{"my key": STRING, "a:b": STRING})
    assert typed(f"my key :1,{Q}a:b{Q}:1", schema) == '{"my key":"1","a:b":"1"}'
    assert typed("'my key':1,\"a:b\":1", schema) == '{"my key":"1","a:b":"1"}'
    assert typed(f"my key{Q}1{Q}", schema) == '{"my key":"1"}'


def test_items_and_prefix_items() -> None:
    assert value("[1,x,[2]]", {"type": "array", "items": STRING}) == '["1","x",[2]]'
    assert (
        value("[1,1,1]", {"type": "array", "prefixItems": [STRING, INTEGER], "items": STRING})
        == '["1",1,"1"]'
    )
    assert value("[1,1]", {"type": "array", "prefixItems": [STRING]}) == '["1",1]'
    assert value("[,1,,1]", {"type": "array", "prefixItems": [STRING, INTEGER]}) == '["1",1]'
    nested = {"type": "array", "items": {"type": "array", "items": STRING}}
    assert value("[[1],[2,3],4]", nested) == '[["1"],["2","3"],4]'
    assert value("[{a:1},{a:1}]", {"type": "array", "items": parameters(a=STRING)}) == '[{"a":"1"},{"a":"1"}]'


@pytest.mark.parametrize("keyword", ["enum", "const"])
def test_enum_and_const_say_the_type(keyword: str) -> None:
    def one(item: Any) -> dict[str, Any]:
        return {keyword: item if keyword == "const" else [item]}

    assert value("5", one("5")) == '"5"'
    assert value("5", one(5)) == "5"
    assert value("TRUE", one(False)) == "true"
    assert value("NULL", one(None)) == "null"
    assert value("007", one(1.5)) == "7"
    assert value("x", one(5)) == '"x"'
    assert value("5", {"enum": ["a", 5]}) == "5"
    assert value("5", {"enum": []}) == "5"
    assert value("5", {"type": "string", **one(5)}) == '"5"', "a declared type counts more"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("#/$defs/text", '"5"'), ("#/definitions/text", '"5"'), ("#/$defs/chain", '"5"'),
        ("#/$defs/a~1b~0c", '"5"'),
        ("#/$defs/my%20type", '"5"'), ("#/$defs/choices/anyOf/1", '"5"'),
        # Not local, or nothing there: no schema.
        ("#/$defs/missing", "5"), ("https://example.org/text", "5"), ("#text", "5"),
        ("#/$defs/choices/anyOf/9", "5"),
        ("#/$defs/choices/anyOf/x", "5"), ("#/$defs/choices/anyOf/-1", "5"), ("#/$defs/text/type/0", "5"),
        ("", "5"),
        # Cycles end.
        ("#/$defs/loop", "5"), ("#/$defs/ping", "5"), ("#/properties/v", "5"), ("#", "5"),
    ],
)  # fmt: skip
def test_local_references(reference: str, expected: str) -> None:
    definitions = {
        "text": STRING, "chain": {"$ref": "#/$defs/text"}, "a/b~c": STRING, "my type": STRING,
        "choices": {"anyOf": [INTEGER, STRING]}, "loop": {"$ref": "#/$defs/loop"},
        "ping": {"anyOf": [{"$ref": "#/$defs/pong"}, {"$ref": "#/$defs/pong"}]},
        "pong": {"anyOf": [{"$ref": "#/$defs/ping"}, {"$ref": "#/$defs/ping"}]},
    }  # fmt: skip
    extra = {"$defs": definitions, "definitions": {"text": STRING}}
    assert value("5", {"$ref": reference}, **extra) == expected


def test_recursive_schemas_are_followed_to_any_depth() -> None:
    tree = {**parameters(name=STRING), "additionalProperties": {"$ref": "#/$defs/tree"}}
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    depth = 500
    text = typed("child:{" * depth + "name:1" + "}" * depth, schema)
    assert text == '{"child":' * depth + '{"name":"1"}' + "}" * depth


def test_references_inside_unions_arrays_and_properties() -> None:
    schema = {
        **parameters(
            a={"anyOf": [NULL, {"$ref": "#/$defs/texts"}]},
            o={"allOf": [{"$ref": "#/$defs/pair"}, {"title": "x"}]},
        ),
        "$defs": {"texts": {"type": "array", "items": STRING}, "pair": parameters(k=STRING)},
    }
    assert typed("a:[1],o:{k:1,l:1}", schema) == '{"a":["1"],"o":{"k":"1","l":1}}'
    assert typed("a:null", schema) == '{"a":null}'


@pytest.mark.parametrize(
    "schema",
    [
        {}, {"type": 5}, {"type": []}, {"type": [5, None]}, {"properties": []}, {"anyOf": "x"},
        {"anyOf": [5, None]}, {"enum": 5},
        {"$ref": 5}, {"items": [STRING]}, {"prefixItems": {}}, {"additionalProperties": "x"},
        {"enum": [[1], {}]}, {"nullable": True},
    ],
)  # fmt: skip
def test_broken_schemas_count_as_none(schema: dict[str, Any]) -> None:
    for inside in ("5", "x", f"{Q}x{Q}", "[1,{b:2}]", "{b:[1]}"):
        assert value(inside, schema) == value(inside)


@pytest.mark.parametrize("boolean", [True, False, None, "x", 5])
def test_schemas_that_are_no_mapping_count_as_none(boolean: Any) -> None:
    assert value("5", {"properties": {"a": boolean}}) == "5"
    assert value("{a:5}", {"properties": {"a": boolean}}) == '{"a":5}'
    assert value("[5]", {"items": boolean}) == "[5]"


@pytest.mark.parametrize(
    "tool",
    [
        {}, {"name": "f"}, {"function": None}, {"function": {"name": "f"}},
        {"function": {"name": "f", "parameters": None}},
        {"function": {"name": "g", "parameters": parameters(v=STRING)}},
        {"type": "function", "function": "f"},
    ],
)  # fmt: skip
def test_tools_without_parameters_type_nothing(tool: dict[str, Any]) -> None:
    (call,) = parse("<|tool_call>call:f{v:5}<tool_call|>", tools=[tool]).tool_calls
    assert call.arguments == '{"v":5}'


def test_tools_may_stand_without_their_wrapping() -> None:
    tool = {"name": "f", "parameters": parameters(v=STRING)}
    assert parse("<|tool_call>call:f{v:5}<tool_call|>", tools=[tool]).tool_calls[0].arguments == '{"v":"5"}'


def test_each_call_is_typed_by_its_own_tool() -> None:
    tools = [{"name": n, "parameters": parameters(v=s)} for n, s in (("f", STRING), ("g", INTEGER))]
    calls = parse("<|tool_call>call:f{v:05}call:g{v:05}call:h{v:05}<tool_call|>", tools=tools).tool_calls
    assert [c.arguments for c in calls] == ['{"v":"05"}', '{"v":5}', '{"v":"05"}']


# ------------------------------------------------------------------------------ any lexeme, any schema

lexemes = st.one_of(
    st.from_regex(r"[+-]?[0-9]{0,4}(\.[0-9]{0,3})?([eE][+-]?[0-9]{1,2})?", fullmatch=True),
    st.sampled_from(("true", "False", "NULL", "null", "x", "-", "+.", "1.e5")),
).filter(lambda text: text.strip() != "")
scalar_schemas = st.recursive(
    st.sampled_from(
        (
            STRING,
            INTEGER,
            NUMBER,
            BOOLEAN,
            NULL,
            {},
            {"type": "integer", "nullable": True},
            {"enum": [1, "a"]},
        )
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda s: {"anyOf": s}),
        st.lists(inner, min_size=1, max_size=3).map(lambda s: {"oneOf": s}),
    ),
    max_leaves=4,
)


@given(lexemes, scalar_schemas, st.booleans())
@derandomised
def test_casting_keeps_the_value(lexeme: str, schema: dict[str, Any], quoted: bool) -> None:
    """Whatever the schema, a value is its lexeme as a string, or the number or literal that it spells."""
    text = value(f"{Q}{lexeme}{Q}" if quoted else lexeme, schema)
    got = json.loads(text, parse_int=Decimal, parse_float=Decimal)
    if isinstance(got, str):
        assert got == lexeme
    elif isinstance(got, Decimal):
        assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", text)
        assert got == Decimal(lexeme)
    else:
        assert text == lexeme.lower()
        assert not (quoted and got is None)
