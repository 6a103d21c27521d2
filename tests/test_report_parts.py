"""The parts of the dashboard: names, drawn text, differences, evidence."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lxml import html
from markupsafe import Markup

from conformance.reporting import evidence, values
from conformance.reporting.diff import compare
from conformance.reporting.slugs import Slugs
from conformance.reporting.text import HUGE_TEXT, LONG_TEXT, plain, prose, visible
from conformance.results import Problem, StreamEvidence
from conformance.targets.protocol import Chunking

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufffe]")


@given(st.lists(st.text(max_size=120), unique=True, max_size=30))
@example(["vllm@0.32.0", "vllm-0.32.0", "vllm-0-32-0", "..", ".", "", "/", "\ud800", "A", "a"])
def test_slugs_are_safe_and_never_shared(names):
    slugs = Slugs()
    made = [slugs[name] for name in names]
    assert len(set(made)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", slug) and len(slug) < 200 for slug in made)
    assert made == [slugs[name] for name in names]


def _shown(markup: Markup) -> str:
    return html.fragment_fromstring(f"<pre>{markup}</pre>").text_content()


_printable = st.text(
    st.characters(exclude_categories=["Cc", "Cf", "Cs", "Cn", "Zl", "Zp", "Zs"], include_characters=" \n\t")
)
_texts = st.lists(
    st.one_of(
        _printable, st.sampled_from(["<|channel>", "<channel|>", '<|"|>', "<script>", "&amp;", "  \n", "\t"])
    )
).map("".join)


@given(_texts)
def test_visible_text_keeps_every_character(text):
    # A leading newline of `pre` is dropped by parsers; `visible` always puts a sign before it.
    assert _shown(visible(text)) == text
    assert _shown(visible(text, signs=False)).lstrip("\n") == text.lstrip("\n")


@given(st.text(st.characters()))
def test_no_unseen_character_gets_through(text):
    for drawn in (visible(text), prose(text), plain(text)):
        assert not _UNSEEN.search(drawn)
        drawn.encode("utf-8")


def test_markers_and_whitespace_get_signs():
    drawn = visible("<|channel>a b  c\n\td \n<unused12><|tool_call|>\u202e\x00\u00a0")
    tree = html.fragment_fromstring(f"<pre>{drawn}</pre>")
    chips = tree.xpath(".//*[starts-with(@class, 'mk')]")
    assert [c.text for c in chips] == ["<|channel>", "<unused12>", "<|tool_call|>"]
    assert chips[0].get("title") == "thought channel opens"
    assert [s.text for s in tree.xpath(".//*[@class='unseen']")] == ["U+202E", "NUL", "U+00A0"]
    assert len(tree.xpath(".//*[@class='nl']")) == 2
    assert len(tree.xpath(".//*[@class='tab']")) == 1
    assert len(tree.xpath(".//*[@class='sp']")) == 3


def test_backticks_become_code_and_stay_escaped():
    assert prose("use `a<b` or `c`") == Markup("use <code>a&lt;b</code> or <code>c</code>")
    assert prose("one ` alone") == Markup("one ` alone")


# Differences and evidence


@given(_texts, _texts)
@example("a b c", "a b c ")
@example("x" * 5000, "y" * 5000)
@example("a " * 3000, "a b " * 2000)
def test_both_sides_of_a_difference_keep_their_text(left, right):
    sides = compare(left, right)
    assert _shown(sides.left).lstrip("\n") == left.lstrip("\n")
    assert _shown(sides.right).lstrip("\n") == right.lstrip("\n")
    assert ("<del>" in sides.left or "<ins>" in sides.right) == (left != right)


def test_a_difference_marks_words_and_not_the_rest():
    sides = compare("It is sunny in Paris.", "It is rainy in Paris.")
    assert sides.left == Markup("It is <del>sunny</del> in Paris.")
    assert sides.right == Markup("It is <ins>rainy</ins> in Paris.")


def test_a_difference_of_long_texts_is_quick():
    left = " ".join(f"w{i % 7}" for i in range(40_000))
    right = " ".join(f"w{i % 5}" for i in range(40_000))
    start = time.process_time()
    compare(left, right)
    compare("ab" * 199, "ba" * 199)
    assert time.process_time() - start < 5


def test_fields_are_compared_one_by_one_and_calls_alike():
    problem = Problem(
        rule="expected",
        message="m",
        expected={
            "reasoning": "",
            "content": "a",
            "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": 2}}],
        },
        got={"reasoning": None, "content": "b", "tool_calls": [{"name": "f", "arguments": '{"a":2,"b":1}'}]},
    )
    view = evidence.problem_view(problem)
    assert [c.name for c in view.comparisons] == ["content"]
    assert view.agreeing == ["tool_calls"]
    assert view.expected == view.got == []


@pytest.mark.parametrize(
    ("expected", "got", "left", "right"),
    [
        ("text", {"a": 1}, ["text"], ["1"]),
        (None, "text", [], ["text"]),
        (["only"], None, ["only"], []),
        (0, False, ["0"], ["false"]),
        ({"error": True}, "a prompt", ["true"], ["a prompt"]),
    ],
)
def test_values_of_different_shape_stand_side_by_side(expected, got, left, right):
    view = evidence.problem_view(Problem(rule="r", message="m", expected=expected, got=got))
    assert view.comparisons == []
    assert [_shown(b.html) for f in view.expected for b in f.blocks] == left
    assert [_shown(b.html) for f in view.got for b in f.blocks] == right


def test_a_part_is_not_compared_with_the_whole_that_should_hold_it():
    prompt = "<bos><|turn>user\nHello<turn|>\n<|turn>model\n"
    view = evidence.problem_view(
        Problem(rule="prompt-contains", message="m", expected="<|think|>", got=prompt)
    )
    assert view.comparisons == []
    assert [_shown(b.html) for f in view.got for b in f.blocks] == [prompt]
    view = evidence.problem_view(Problem(rule="prompt", message="m", expected=prompt + "x", got=prompt))
    assert "<del>x</del>" in view.comparisons[0].sides.left


def test_answers_of_equal_families_are_set_out_once():
    value = {"large": {"prompt": "a", "token_ids": [2, 105]}, "e": {"prompt": "a", "token_ids": [2, 105]}}
    drawn = [(f.name, _shown(f.blocks[0].html)) for f in values.fields(value)]
    assert drawn == [("large, e: prompt", "a"), ("large, e: token_ids", "[2, 105]")]
    value["e"] = {"error": "refused"}
    assert [f.name for f in values.fields(value)] == ["large: prompt", "large: token_ids", "e: error"]


def test_json_fits_lines_when_shown_and_is_laid_out_alike_when_compared():
    short, long = {"b": [1, 2], "a": {}}, {"k": ["x" * 50, {"y": "z" * 50}]}
    assert values.as_text(short, fit=True) == '{"a": {}, "b": [1, 2]}'
    assert values.as_text(short) == '{\n  "a": {},\n  "b": [1, 2]\n}'
    for item in (short, long, [long, short, None, True, "é\n"]):
        for fit in (True, False):
            assert json.loads(values.as_text(item, fit=fit)) == item
    assert max(map(len, values.as_text([long, short], fit=True).splitlines())) <= 88


def test_lists_of_texts_keep_their_lines():
    (field,) = values.fields({"contains": ["a\nb", "c"]})
    assert [_shown(b.html) for b in field.blocks] == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("spans", "refused"),
    [
        ("no list", "they are not a list"),
        ([1], "span 0 is not a mapping"),
        ([{"start": "0", "end": 1}], "span 0 has no integer start and end"),
        ([{"start": 0, "end": 4}, {"start": 3, "end": 5}], "span 1 covers [3, 5)"),
        ([{"start": 0, "end": 99}], "span 0 covers [0, 99)"),
        ([{"start": 2, "end": 2}], "span 0 covers [2, 2)"),
        ([{"start": True, "end": 2}], "span 0 has no integer start and end"),
    ],
)
def test_spans_that_cannot_be_drawn_say_why(spans, refused):
    assert evidence.annotate("hello", spans).refused.startswith(refused)


def test_gaps_between_spans_are_drawn_without_a_role():
    drawn = evidence.annotate("hello you", [{"start": 2, "end": 5, "role": "content"}])
    assert [(_shown(s.html), s.role) for s in drawn.stretches] == [
        ("he", ""),
        ("llo", "content"),
        (" you", ""),
    ]
    assert evidence.annotate("hello", None) is None


@pytest.mark.parametrize(
    ("kind", "pieces", "chunkings", "exponent", "words"),
    [
        ("certified", 5, "16", 4, "16"),
        ("certified", 5, "15", None, "15"),
        ("certified", 200, str(2**199), 199, "a number of 60 digits"),
        ("sampled", 9000, "9" * 5000, None, "a number of 5000 digits"),
        ("sampled", 12, "1480", None, "1\u2009480"),
        ("sampled", 0, "many", None, "many"),
    ],
)
def test_the_number_of_chunkings_is_a_power_only_if_it_is(kind, pieces, chunkings, exponent, words):
    view = evidence.stream_view(StreamEvidence(kind=kind, pieces=pieces, chunkings=chunkings))
    assert (view.exponent, view.chunkings) == (exponent, words)


def test_chunkings_without_texts_are_still_described():
    problem = Problem(
        rule="r", message="m", chunking=Chunking(name="per-token", cuts=tuple(range(1, 30)), lag=3)
    )
    chunks = evidence.problem_view(problem).chunks
    assert chunks.caption.startswith("per-token; 30 chunks; cut after token 1, 2, 3")
    assert chunks.caption.endswith("…; text 3 characters behind its token ids")
    assert chunks.parts == ()


def test_long_texts_are_folded_and_huge_ones_cut():
    short, long, huge = (
        values.block("x"),
        values.block("x" * (LONG_TEXT + 1)),
        values.block("é" * 900_000),
    )
    assert short.preview is None
    assert len(long.preview) < 1000 < len(long.html)
    assert huge.left_out == 900_000 - HUGE_TEXT
    assert len(huge.html) < HUGE_TEXT + 200
    assert f"{huge.left_out} characters left out" in huge.html
    assert values.block("line\n" * 500).preview is not None
