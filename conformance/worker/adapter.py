"""What an adapter offers to the worker, and what most adapters share.

Requests and answers are the JSON forms of the models in `conformance.targets.protocol`; the parent
validates them. Standard library only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from conformance.worker.search import Session, certify

Json = dict[str, Any]

STOP_TOKENS = frozenset({"<eos>", "<turn|>", "<|tool_response>"})
"""Tokens 1, 106 and 50, on which a server ends an answer of Gemma 4 (`generation_config.json`)."""


class Adapter(Protocol):
    """Drives one engine. A module under `conformance.worker.adapters` makes one with `create()`."""

    def describe(self) -> Json:
        """`TargetInfo`."""
        ...

    def parse(self, request: Json) -> Json:
        """`ParseRequest` to `ParseResult`."""
        ...

    def parse_stream(self, request: Json) -> Sequence[Json]:
        """`StreamRequest` to one `StreamResult` per chunking."""
        ...

    def certify(self, request: Json) -> Json:
        """`CertifyRequest` to `Certificate`."""
        ...

    def render(self, request: Json) -> Json:
        """`RenderRequest` to `RenderResult`."""
        ...

    def preprocess(self, request: Json) -> Json:
        """`PreprocessRequest` to `PreprocessResult`."""
        ...

    def forward(self, request: Json) -> Json:
        """`ForwardRequest` to `ForwardResult`; the tensors go into the file that the request names."""
        ...

    def generate(self, request: Json) -> Json:
        """`GenerateRequest` to `GenerateResult`."""
        ...

    def loglikelihood(self, request: Json) -> Json:
        """`LoglikelihoodRequest` to `LoglikelihoodResult`."""
        ...

    def stages(self, request: Json) -> Json:
        """`StagesRequest` to `StagesResult`; the tensors go into the file that the request names."""
        ...


Opener = Callable[[Json], Callable[[], Session]]
"""Does for a `ParseRequest` what all its streams share; returns what opens a session for one of them."""


def stream(request: Json, opener: Opener) -> list[Json]:
    """Answer a `StreamRequest`: each chunking through a session of its own.

    What the parser raises ends that stream only, and is part of its result.
    """
    open_session = opener(request["request"])
    return [
        _stream_one(open_session(), units(request["request"], chunking["unit"]), chunking)
        for chunking in request["chunkings"]
    ]


def _stream_one(session: Session, pieces: Sequence[Json], chunking: Json) -> Json:
    deltas: list[Json] = []
    try:
        for text, ids, finished in chunks(pieces, chunking["cuts"], chunking["lag"]):
            deltas += session.feed(text, ids, finished)
    except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
        return {"deltas": deltas, "error": f"{type(error).__name__}: {error}"}
    return {"deltas": deltas}


def search(request: Json, opener: Opener) -> Json:
    """Answer a `CertifyRequest`."""
    return certify(
        opener(request["request"]),
        units(request["request"], request["unit"]),
        unit=request["unit"],
        max_states=request["max_states"],
        max_seconds=request["max_seconds"],
    )


def delta_json(reasoning: str | None, content: str | None, calls: Iterable[Any] | None) -> Json:
    """A `Delta`, from what a chunk of an OpenAI stream holds.

    Args:
        reasoning: Text of it.
        content: Text of it.
        calls: Parts of tool calls: objects of the engine's.
    """
    return {
        "reasoning": reasoning,
        "content": content,
        "tool_calls": [
            {
                "index": call.index,
                "id": call.id,
                "type": call.type,
                "name": call.function.name if call.function else None,
                "arguments": call.function.arguments if call.function else None,
            }
            for call in calls or ()
        ],
    }


def units(request: Json, unit: str) -> list[Json]:
    """The output of a `ParseRequest` in tokens or characters, in the JSON form of `Piece`."""
    if unit == "characters":
        return [{"text": character, "ids": [], "special": False} for character in request["output"]]
    return list(request["pieces"])


def chunks(pieces: Sequence[Json], cuts: Sequence[int], lag: int) -> Iterator[tuple[str, list[int], bool]]:
    """Text, token ids and end mark of each chunk of a `Chunking`.

    The text of all chunks but the last stays `lag` characters behind the token ids. Cuts behind the
    last piece are left out: they lie in a stop token whose text is kept back.
    """
    whole = "".join(piece["text"] for piece in pieces)
    start = shown = end = 0
    for cut in (*(cut for cut in cuts if cut < len(pieces)), len(pieces)):
        last = cut == len(pieces)
        end += sum(len(piece["text"]) for piece in pieces[start:cut])
        until = len(whole) if last else max(shown, end - lag)
        yield whole[shown:until], [token for piece in pieces[start:cut] for token in piece["ids"]], last
        start, shown = cut, until


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Json:
    """Those arguments that this release's function has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def without_stop_text(request: Json) -> Json:
    """A `ParseRequest` as a server's parser meets it: the stop token has an id and no text.

    Servers end an answer at a stop token, hand its id on and keep its text back. Plain text that merely
    spells the token stops nothing. Nor does one in the midst of an output: the case then models a
    server that was told to go on (`ignore_eos`), which shows the text.
    """
    pieces = request["pieces"]
    if not pieces or not pieces[-1]["special"] or pieces[-1]["text"] not in STOP_TOKENS:
        return request
    stop = pieces[-1]
    return {
        **request,
        "output": request["output"][: -len(stop["text"])],
        "pieces": [*pieces[:-1], {**stop, "text": ""}],
    }
