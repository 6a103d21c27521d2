"""The certificate search: it says what trying every chunking says, or it says nothing."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import re
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conformance.targets.protocol import (
    Certificate,
    CertifyRequest,
    Chunking,
    Delta,
    ParseRequest,
    StreamRequest,
)
from conformance.targets.reference import ReferenceTarget, _Session
from conformance.tokenization import characters, pieces
from conformance.worker import search
from conformance.worker.search import Assembled, OpaqueStateError, certify
from model_impl.chat.parser import Parser
from tests import search_toys as toys
from tests.search_toys import GLOBAL, TOYS, Child, Colour, CountsChunks, Faithful, Frugal, Point, Session

Q = '<|"|>'
Outcomes = dict[str, tuple[int, tuple[int, ...]]]
"""By what came out: how many chunkings lead there, and the smallest one."""


def letters(text: str) -> list[dict[str, Any]]:
    return [{"text": character, "ids": [ord(character)], "special": False} for character in text]


def certificate(
    session: Callable[[], Any], text: str, *, max_states: int = 100_000, max_seconds: float = 60.0
) -> Certificate:
    answer = certify(
        session, letters(text), unit="characters", max_states=max_states, max_seconds=max_seconds
    )
    return Certificate.model_validate(answer)


def all_cuts(n: int) -> Iterator[tuple[int, ...]]:
    for size in range(max(n, 1)):
        yield from itertools.combinations(range(1, n), size)


def outcomes_of(found: Certificate) -> Outcomes:
    """The certificate's outcomes by what the client sees."""
    assert found.complete, found.reason
    return {
        repr((o.result.model_dump(), o.error, o.ragged)): (int(o.chunkings), o.cuts) for o in found.outcomes
    }


def brute_force(session: Callable[[], Any], text: str) -> Outcomes:
    """Every chunking on a fresh session."""
    found: Outcomes = {}
    for cuts in all_cuts(len(text)):
        assembled, error = Assembled(), None
        stream = session()
        for start, end in itertools.pairwise([0, *cuts, len(text)]):
            chunk = text[start:end]
            try:
                deltas = stream.feed(chunk, [ord(c) for c in chunk], end == len(text))
            except Exception as raised:  # noqa: BLE001 - a toy may raise what it likes
                # What came before the error is kept; the cuts behind it were never made.
                error, cuts = f"{type(raised).__name__}: {raised}", tuple(c for c in cuts if c <= end)
                break
            assembled = assembled.plus(deltas)
        key = repr((_result(assembled), error, assembled.ragged))
        count, smallest = found.get(key, (0, cuts))
        found[key] = (count + 1, min(smallest, cuts, key=lambda c: (len(c), c)))
    return found


def _result(assembled: Assembled) -> dict[str, Any]:
    return {
        "reasoning": None,
        **assembled.result(),
        "tool_calls": tuple(assembled.result()["tool_calls"]),
        "spans": None,
    }


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("text", ["", "a", "<x>", "a<x>b", "<<x>>aab<", "a<x><x>bb<x"])
def test_certificate_agrees_with_brute_force(toy: type[Session], text: str) -> None:
    found = certificate(toy, text)
    assert outcomes_of(found) == brute_force(toy, text)
    assert found.pieces == len(text)
    assert sum(int(o.chunkings) for o in found.outcomes) == 2 ** max(len(text) - 1, 0)


def test_toys_have_the_bugs_they_are_said_to_have() -> None:
    counts = {toy: len(certificate(toy, "a<x><x>bb<x").outcomes) for toy in TOYS}
    assert counts.pop(Faithful) == 1
    assert counts.pop(CountsChunks) == len("a<x><x>bb<x")
    assert all(number > 1 for number in counts.values())


def test_outcomes_are_sorted_by_number_and_named_by_the_smallest_chunking() -> None:
    found = certificate(toys.SplitMarkerMissed, "ab<x>")
    assert [(o.result.content, o.chunkings, o.cuts) for o in found.outcomes] == [
        ("ab<x>", "12", (3,)),
        ("ab", "4", ()),
    ]


def test_errors_are_outcomes_and_keep_what_came_before() -> None:
    found = certificate(toys.RaisesAtChunkStart, "ab<x>")
    by_error = {o.error: (o.result.content, o.chunkings, o.cuts) for o in found.outcomes}
    assert by_error == {
        None: ("ab<x>", "8", ()),
        "ValueError: chunk '<x>'": ("ab", "2", (2,)),
        "ValueError: chunk '<x'": ("ab", "2", (2, 4)),
        "ValueError: chunk '<'": ("ab", "4", (2, 3)),
    }


def test_ragged_indices_are_told() -> None:
    assert {(o.ragged, o.cuts) for o in certificate(toys.RaggedIndices, "a<").outcomes} == {
        (False, ()),
        (True, (1,)),
    }


def test_long_outputs_are_searched_whole() -> None:
    text = "ab" * 40 + "<x>" + "cd" * 5
    total = 2 ** (len(text) - 1)
    found = certificate(toys.SplitMarkerMissed, text)
    # The marker is met whole in one chunking of four: neither boundary inside it is a cut.
    assert [(o.result.content, int(o.chunkings), o.cuts) for o in found.outcomes] == [
        (text, total * 3 // 4, (81,)),
        ("ab" * 40 + "cd" * 5, total // 4, ()),
    ]


# ------------------------------------------------------------------------------ the reference parser

TARGET = ReferenceTarget()
SHORT = ["Hi<eos>", "<|channel>ab<channel|>", f"{Q}a", "{'a", "call:f{", "🙂é\n", "a<tool_cal", ""]
INSIDE = [
    f"<|tool_call>call:f{{a:{Q}x{Q}}}<tool_call|>",
    "<|channel>thought\nwhy<channel|>so",
    "thought\nso",
    '<|tool_call>call:f{a:\'b,c:"d"}',
    "a<|tool_call|>call:f{}",
]


def brute_force_target(request: ParseRequest, unit: Any, count: int) -> Outcomes:
    chunkings = [Chunking(name="all", unit=unit, cuts=cuts) for cuts in all_cuts(count)]
    found: Outcomes = {}
    streams = TARGET.parse_stream(StreamRequest(request=request, chunkings=tuple(chunkings)))
    for chunking, stream in zip(chunkings, streams, strict=True):
        assembled = Assembled().plus([delta.model_dump() for delta in stream.deltas])
        key = repr((_result(assembled), stream.error, assembled.ragged))
        number, smallest = found.get(key, (0, chunking.cuts))
        found[key] = (number + 1, min(smallest, chunking.cuts, key=lambda c: (len(c), c)))
    return found


@pytest.mark.parametrize("text", [*SHORT, *INSIDE])
@pytest.mark.parametrize("unit", ["tokens", "characters"])
def test_reference_certificate_agrees_with_brute_force(text: str, unit: Any) -> None:
    cut = pieces(text)
    output = "".join(p.text for p in cut)
    prompt = "<|turn>model\n"
    count = len(cut) if unit == "tokens" else len(output)
    request = ParseRequest(output=output, pieces=cut, prompt=prompt)
    found = TARGET.certify(CertifyRequest(request=request, unit=unit, max_seconds=60))
    assert len(outcomes_of(found)) == 1
    if count <= 12:
        assert outcomes_of(found) == brute_force_target(request, unit, count)
    assert found.pieces == count
    assert found.outcomes[0].chunkings == str(2 ** max(count - 1, 0))


@pytest.mark.parametrize("start", range(0, 44, 4))
def test_reference_certificate_inside_a_call(start: int) -> None:
    """Twelve characters at a time, with all that comes before them in the first piece."""
    text = f"<|channel>thought\na<channel|><|tool_call>call:f{{a:{Q}b{Q},c:'d}}<tool_call|>e"
    runs = pieces(text)
    units = [characters(text)[k] for k in range(start, start + 12)]
    first = text[:start] + units[0].text
    rest = text[start + 12 :]
    parts = [
        {"text": first, "ids": []},
        *({"text": u.text, "ids": []} for u in units[1:-1]),
        {"text": units[-1].text + rest, "ids": []},
    ]
    request = ParseRequest(output=text, pieces=runs, prompt="")
    found = Certificate.model_validate(
        certify(lambda: _Session(request), parts, unit="characters", max_states=10**5, max_seconds=60)
    )
    expected: Outcomes = {}
    for cuts in all_cuts(12):
        stream, assembled = _Session(request), Assembled()
        for i, j in itertools.pairwise([0, *cuts, 12]):
            assembled = assembled.plus(stream.feed("".join(p["text"] for p in parts[i:j]), [], j == 12))
        key = repr((_result(assembled), None, assembled.ragged))
        number, smallest = expected.get(key, (0, cuts))
        expected[key] = (number + 1, min(smallest, cuts, key=lambda c: (len(c), c)))
    assert outcomes_of(found) == expected
    assert len(expected) == 1


def test_reference_search_is_small() -> None:
    """About one or two distinct states at each position: that is what makes the search cheap."""
    text = f"<|channel>thought\nwhy<channel|><|tool_call>call:f{{a:{Q}b c{Q},d:[1,2]}}<tool_call|>"
    request = ParseRequest(output=text, pieces=pieces(text), prompt="")
    found = TARGET.certify(CertifyRequest(request=request, unit="characters", max_seconds=60))
    assert found.complete
    assert found.states <= 3 * len(text)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("session", toys.REFUSED.values(), ids=toys.REFUSED.keys())
def test_state_out_of_sight_is_refused(session: Callable[[], Any]) -> None:
    found = certificate(session, "abcd")
    assert not found.complete
    assert found.outcomes == ()
    assert re.search("cannot be compared|holds state|has attributes|nested too deeply", found.reason)


@pytest.mark.parametrize("session", toys.UNSEEN)
@pytest.mark.parametrize("text", ["abcd", "abcdefghijklmnop"])
def test_state_outside_the_session_is_found_by_the_audit(session: type[Session], text: str) -> None:
    for before in range(3):
        GLOBAL["feeds"] = toys.ClassCounter.feeds = before
        found = certificate(session, text)
        assert not found.complete
        assert found.reason == "the parser keeps state that a copy of it does not carry"


# ---------------------------------------------------------------------------------------- limits


def test_too_many_states() -> None:
    found = certificate(CountsChunks, "abcdefghij", max_states=20)
    assert (found.complete, found.outcomes) == (False, ())
    assert found.reason == "more than 20 distinct states"
    assert certificate(CountsChunks, "abcdefghij", max_states=1000).complete


def test_too_little_time() -> None:
    found = certificate(Faithful, "abcdefghij", max_seconds=-1.0)
    assert (found.complete, found.outcomes) == (False, ())
    assert found.reason == "the time limit of the search was reached"


# ---------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("make", toys.COPYABLE.values(), ids=toys.COPYABLE.keys())
def test_equal_objects_have_equal_keys_and_copies(make: Callable[[], Any]) -> None:
    value = make()
    first, key = search._Copier(()).copy(value)
    _, again = search._Copier(()).copy(first)
    assert key == again
    assert hash(key) == hash(again)
    assert type(first) is type(value)
    assert first is not value


def test_copies_share_nothing_that_changes() -> None:
    value = Child()
    made = Child.made
    twin, key = search._Copier(()).copy(value)
    assert Child.made == made
    twin.append(2)
    assert (twin.hidden(), value.hidden()) == ([1, 2], [1])
    assert twin.method() is twin.same_method() is twin.hidden()
    twin.point.x.append(5)
    twin.left["a"].add(5)
    assert (value.point, value.left) == (Point([1], 2), {"a": {1, 2}})
    assert search._Copier(()).copy(value)[1] == key
    assert search._Copier(()).copy(twin)[1] != key


def test_members_of_sets_are_copied() -> None:
    value = {Child()}
    twin, _ = search._Copier(()).copy(value)
    (member,), (original,) = twin, value
    member.append(2)
    assert original.hidden() == [1]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1], [True]), ([1], [1.0]), ([0.0], [-0.0]), ([1], (1,)), ({1: 2}, {1: 3}), ({1}, {2}), ("a", b"a"),
        ([[], []], [[]] * 2),
        (deque([1], maxlen=1), deque([1], maxlen=2)), (defaultdict(int), defaultdict(list)),
        ({}, OrderedDict()),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (Point(1, 2), (1, 2)), (Colour.RED, 1), (len, max),
        (re.compile("a"), re.compile("b")),
        (io.StringIO("a"), io.StringIO("b")), (bytearray(b"a"), bytearray(b"b")), ([None], [0]),
        (types.MappingProxyType({1: 2}), {1: 2}),
    ],
)  # fmt: skip
def test_unlike_objects_have_unlike_keys(a: Any, b: Any) -> None:
    copier = search._Copier(())
    assert copier.copy(a)[1] != copier.copy(b)[1]


def test_a_stream_s_position_in_a_buffer_counts() -> None:
    buffer = io.StringIO("abc")
    buffer.seek(1)
    twin, key = search._Copier(()).copy(buffer)
    assert (twin.read(1), buffer.read(1)) == ("b", "b")
    assert search._Copier(()).copy(twin)[1] != key


def test_shared_objects_and_what_their_containers_hold_are_not_copied() -> None:
    tokenizer = object()
    schema = {"type": "object", "properties": {"a": [tokenizer]}}
    session = {"all": schema, "part": schema["properties"], "tokenizer": tokenizer, "own": {"a": 1}}
    twin, _ = search._Copier((schema, [tokenizer])).copy(session)
    assert twin["all"] is schema
    assert twin["part"] is schema["properties"]
    assert twin["tokenizer"] is tokenizer
    assert twin["own"] is not session["own"]


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("split", range(1, 8))
def test_copies_behave_as_deep_copies_do(toy: type[Session], split: int) -> None:
    """After any first part, the copy, a deep copy and the original itself all end alike."""
    text = "a<x>aab<"

    def rest(stream: Any) -> list[Any]:
        found: list[Any] = []
        for number, character in enumerate(text[split:], split + 1):
            try:
                found.append(stream.feed(character, [], number == len(text)))
            except ValueError as error:
                return [*found, str(error)]
        return found

    stream = toy()
    stream.feed(text[:split], [], False)
    copier = search._Copier(stream.shared)
    twin, key = copier.copy(stream)
    others = [twin] if toy is Frugal else [twin, copy.deepcopy(stream)]  # its proxy has no deep copy
    results = [rest(other) for other in others]
    assert copier.copy(stream)[1] == key, "feeding a copy changes the original"
    assert results == [rest(stream)] * len(results)


def test_reference_copies_behave_as_deep_copies_do() -> None:
    text = f"<|channel>thought\na<channel|><|tool_call>call:f{{a:{Q}b{Q},c:'d',e:x, y}}<tool_call|>e"
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}]
    for split in range(len(text)):
        parser = Parser(tools=tools)
        parser.feed(text[:split])
        twins = [search._Copier(()).copy(parser)[0], copy.deepcopy(parser), parser]
        assert len({repr([t.feed(text[split:]), t.finish()]) for t in twins}) == 1


def test_assembled_deltas_are_what_a_client_has() -> None:
    deltas = [
        Delta(reasoning="a").model_dump(),
        Delta(content="b", reasoning="c").model_dump(),
        {"tool_calls": [{"index": 1, "name": "g", "arguments": "{"}]},
        {"tool_calls": [{"index": 0, "name": "f", "arguments": None}, {"index": 1, "arguments": "}"}]},
    ]
    whole = Assembled().plus(deltas)
    piecewise = functools.reduce(lambda a, d: a.plus([d]), deltas, Assembled())
    assert whole.key() == piecewise.key()
    assert whole.result() == {
        "reasoning": "ac",
        "content": "b",
        "tool_calls": [{"name": "g", "arguments": "{}"}, {"name": "f", "arguments": ""}],
    }
    assert whole.ragged
    assert not Assembled().ragged


def test_opaque_state_names_the_type() -> None:
    with pytest.raises(OpaqueStateError, match=r"_thread\.(lock|LockType)"):
        search._Copier(()).copy([threading.Lock()])
