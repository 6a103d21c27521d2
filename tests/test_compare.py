"""Comparing what targets say."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.compare import complete_json, json_equal, load_json, same_text

derandomised = settings(derandomize=True, database=None, deadline=None, max_examples=150)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)

# ---------------------------------------------------------------------------------------- reading


def test_numbers_are_exact() -> None:
    assert load_json("[1, 1.10, 1e400, 12345678901234567890123]") == [
        Decimal(1),
        Decimal("1.1"),
        Decimal("1e400"),
        Decimal(12345678901234567890123),
    ]
    assert load_json("9" * 5000) == Decimal("9" * 5000), "longer than int() reads"


@pytest.mark.parametrize("text", ["", "{", "NaN", "[Infinity]", "-Infinity", "{'a':1}", "[1,]", "01", "1 2"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        load_json(text)


@pytest.mark.parametrize(
    "text", ["1e99999999999999999999", "[-1E-99999999999999999999]", "1.5e+99999999999999999999"]
)
def test_numbers_beyond_any_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="beyond any range"):
        load_json(text)


@pytest.mark.parametrize(
    ("text", "key"), [('{"a":1,"a":1}', "a"), ('[{"b":1,"x":{"c":1,"\\u0063":2}}]', "c"), ('{"":1,"":2}', "")]
)
def test_keys_given_twice_are_refused(text: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"the key '{key}' is given twice"):
        load_json(text)


def test_keys_repeat_in_different_objects() -> None:
    assert load_json('{"a":{"a":1},"b":[{"a":2},{"a":3}]}') == {"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}


def test_what_nests_too_deeply_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 100_000 + "]" * 100_000)


# ---------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (5, 5.0, True), (5, Decimal("5.00"), True), (0.1, Decimal("0.1"), True), (1e21, 10**21, True),
        (0, -0.0, True),
        (12345678901234567890123, 12345678901234567890124, False), (2**53, 2**53 + 1, False),
        (float(2**53), 2**53 + 1, False),
        (Decimal("0.1"), Decimal("0.10000000000000001"), False),
        (1, True, False), (0, False, False), (True, True, True), (False, True, False), (None, None, True),
        (None, False, False), (None, 0, False), (None, "", False), ("5", 5, False), ("a", "a", True),
        ("a", "A", False),
        ("a", "a ", False), ("é", "e\u0301", False), ([], {}, False), ([], (), True), ([1], [1.0], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False), ({}, {}, True), ({"a": 1}, {"a": 1.0}, True), ({"a": 1}, {"b": 1}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True), ({"a": None}, {}, False),
        ({"a": [True]}, {"a": [1]}, False), ([[]], [[[]]], False),
        ("", [], False), ({"a": {"b": [1, {"c": None}]}}, {"a": {"b": [1, {"c": None}]}}, True),
    ],
)  # fmt: skip
def test_json_equality(a: Any, b: Any, same: bool) -> None:
    assert json_equal(a, b) is same
    assert json_equal(b, a) is same


@given(values)
@derandomised
def test_a_value_equals_its_own_json(value: Any) -> None:
    assert json_equal(value, value)
    assert json_equal(load_json(json.dumps(value)), value)


def test_deep_values_compare() -> None:
    a: Any = 1
    b: Any = Decimal(1)
    for _ in range(100_000):
        a, b = [a], [b]
    assert json_equal(a, b)
    assert not json_equal(a, [b])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("a", " a\n", True),
        (None, "", True),
        (None, " \n", True),
        ("a", None, False),
        ("a b", "a  b", False),
        ("a", "A", False),
    ],
)
def test_text_equality(a: str | None, b: str | None, same: bool) -> None:
    assert same_text(a, b) is same
    assert same_text(b, a) is same


# ---------------------------------------------------------------------------------------- cut JSON


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ("{", "{}"), ("[", "[]"), ('{"a":1', '{"a":1}'), ('{"a":1,', '{"a":1}'), ('{"a":1, ', '{"a":1}'),
        ('{"a":[1,{"b":2', '{"a":[1,{"b":2}]}'),
        ('{"a":"x', '{"a":"x"}'), ('{"a":"x\\', '{"a":"x"}'), ('{"a":"x\\\\', '{"a":"x\\\\"}'),
        ('{"a":"x\\n', '{"a":"x\\n"}'),
        ('{"a":"x\\u', '{"a":"x"}'), ('{"a":"x\\u00e', '{"a":"x"}'), ('{"a":"x\\u00e9', '{"a":"x\\u00e9"}'),
        ('{"a":"\\\\u00', '{"a":"\\\\u00"}'),
        ('{"a"', '{"a":null}'), ('{"a', '{"a":null}'), ('{"a":', '{"a":null}'), ('{"a": ', '{"a":null}'),
        ('{"', '{"":null}'),
        # A key that is cut may be longer than the earlier one that it equals so far.
        ('{"a":1,"a', '{"a":1}'), ('{"o":{"a\\"":[1], "a\\"', '{"o":{"a\\"":[1]}}'), ('{"":1,"', '{"":1}'),
        ('{"a":1,"b', '{"a":1,"b":null}'),
        ('{"a":"}', '{"a":"}"}'), ('{"a":"[{', '{"a":"[{"}'), ('{"a":{}', '{"a":{}}'),
        ('{"a":true', '{"a":true}'), ("[1,[2],", "[1,[2]]"),
        ('{"a":' + "9" * 5000, '{"a":' + "9" * 5000 + "}"),
    ],
)  # fmt: skip
def test_cut_json_is_closed(cut: str, whole: str) -> None:
    assert load_json(complete_json(cut)) == load_json(whole)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"a":1}',
        "[1]",
        "5",
        "nonsense",
        "{a:1}",
        "{'a':1",
        '{"a":1}}',
        '{"a":tru',
        '{"a" 1',
        "]",
        '{"a":1]',
        '{"a":1,"a":2',
        '{"a":1,"a":2,"b',
        '{"a":1,"b" 1',
        '{"a" 1,"b',
        "[" * 100_000,
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    assert complete_json(text) == text


@given(values, st.data())
@derandomised
def test_every_prefix_of_an_object_closes_or_stays(value: Any, data: st.DataObject) -> None:
    """A cut inside a literal or a number stays open; every other one closes to an object."""
    text = json.dumps({"k": value}, ensure_ascii=data.draw(st.booleans()))
    for end in range(1, len(text) + 1):
        closed = complete_json(text[:end])
        try:
            assert isinstance(load_json(closed), dict)
        except ValueError:
            assert closed == text[:end]
            assert text[end - 1] in "truefalsn-+.eE", text[:end]
