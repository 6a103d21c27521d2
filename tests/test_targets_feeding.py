"""How a worker cuts an output and feeds it to an engine's parser."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.chunking import chunk_texts
from conformance.suites import PlainText
from conformance.targets.protocol import Chunking, Delta, Piece
from conformance.tokenization import pieces
from conformance.worker import adapter

PIECES = st.lists(
    st.builds(
        Piece,
        text=st.text("ab<é😀", max_size=4),
        ids=st.lists(st.integers(0, 300_000), max_size=1).map(tuple),
    ),
    max_size=8,
)


@given(PIECES, st.data())
def test_chunks_are_those_of_the_harness(parts: list[Piece], data: st.DataObject) -> None:
    n = len(parts)
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, n - 1)), "cuts"))) if n > 1 else ()
    lag = data.draw(st.integers(0, 6), "lag")
    made = list(adapter.chunks([part.model_dump() for part in parts], cuts, lag))
    expected = chunk_texts(parts, Chunking(name="x", cuts=cuts, lag=lag))
    assert [(text, tuple(ids)) for text, ids, _ in made] == expected
    assert [finished for _, _, finished in made] == [False] * len(cuts) + [True]


def _request(*output: str | PlainText) -> dict[str, Any]:
    parts = [piece.model_dump() for piece in pieces(output)]
    return {"output": "".join(part["text"] for part in parts), "pieces": parts}


@pytest.mark.parametrize("stop", ["<turn|>", "<eos>", "<|tool_response>"])
def test_a_server_keeps_the_text_of_the_stop_token_back(stop: str) -> None:
    request = _request(f"Hello{stop}")
    seen = adapter.without_stop_text(request)
    assert seen["output"] == "Hello"
    assert "".join(piece["text"] for piece in seen["pieces"]) == "Hello"
    assert [piece["ids"] for piece in seen["pieces"]] == [piece["ids"] for piece in request["pieces"]]
    assert request["output"] == f"Hello{stop}", "the request itself is left alone"


@pytest.mark.parametrize(
    "output",
    [
        ("Hello",),
        ("Hello<turn|>!",),
        ("Hello", PlainText(plain="<turn|>")),
        ("Hello<tool_call|>",),
        (),
    ],
)
def test_anything_else_is_shown(output: tuple[str | PlainText, ...]) -> None:
    request = _request(*output)
    assert adapter.without_stop_text(request) == request


def test_only_the_last_stop_token_is_kept_back() -> None:
    assert adapter.without_stop_text(_request("Hi<turn|><eos>"))["output"] == "Hi<turn|>"


def test_cuts_inside_a_stop_token_that_is_kept_back() -> None:
    request = adapter.without_stop_text(_request("Hi<turn|>"))
    made = list(adapter.chunks(adapter.units(request, "characters"), (1, 2, 5, 8), 0))
    assert made == [("H", [], False), ("i", [], True)]


class Recorder:
    """A session that remembers what it was fed, and fails at a word."""

    shared = ()

    def __init__(self) -> None:
        self.fed: list[tuple[str, list[int], bool]] = []

    def feed(self, text: str, ids: list[int], finished: bool) -> list[dict[str, Any]]:
        self.fed.append((text, ids, finished))
        if "!" in text:
            raise ValueError("no exclamation")
        return [{"content": text}]


def _stream(output: str, *chunkings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Recorder]]:
    sessions: list[Recorder] = []

    def opener(request: dict[str, Any]) -> Callable[[], Recorder]:
        assert request["output"] == output

        def open_session() -> Recorder:
            sessions.append(Recorder())
            return sessions[-1]

        return open_session

    request = {"request": _request(output), "chunkings": chunkings}
    return adapter.stream(request, opener), sessions


def test_each_chunking_has_a_session_of_its_own() -> None:
    characters = {"unit": "characters", "cuts": [1], "lag": 0}
    tokens = {"unit": "tokens", "cuts": [], "lag": 0}
    results, sessions = _stream("abc", characters, tokens)
    assert sessions[0].fed == [("a", [], False), ("bc", [], True)]
    (whole,) = sessions[1].fed
    assert whole[0] == "abc"
    assert whole[1] == [token for piece in pieces("abc") for token in piece.ids]
    assert results == [{"deltas": [{"content": "a"}, {"content": "bc"}]}, {"deltas": [{"content": "abc"}]}]


def test_an_empty_output_is_one_chunk() -> None:
    _, (session,) = _stream("", {"unit": "tokens", "cuts": [], "lag": 0})
    assert session.fed == [("", [], True)]


def test_what_the_parser_raises_ends_that_stream_only() -> None:
    cut = {"unit": "characters", "cuts": [1, 2], "lag": 0}
    whole = {"unit": "characters", "cuts": [], "lag": 2}
    results, sessions = _stream("a!c", cut, whole)
    assert results == [
        {"deltas": [{"content": "a"}], "error": "ValueError: no exclamation"},
        {"deltas": [], "error": "ValueError: no exclamation"},
    ]
    assert len(sessions[0].fed) == 2, "nothing is fed after an error"


def test_a_chunk_of_a_stream_as_a_delta() -> None:
    function = SimpleNamespace(name="add", arguments='{"a":')
    calls = [
        SimpleNamespace(index=1, id="call-1", type="function", function=function),
        SimpleNamespace(index=1, id=None, type=None, function=None),
    ]
    delta = Delta.model_validate(adapter.delta_json("So", None, calls))
    assert (delta.reasoning, delta.content) == ("So", None)
    first, second = delta.tool_calls
    assert (first.index, first.id, first.name, first.arguments) == (1, "call-1", "add", '{"a":')
    assert (second.index, second.id, second.name, second.arguments) == (1, None, None, None)
    assert Delta.model_validate(adapter.delta_json(None, "text", None)) == Delta(content="text")
