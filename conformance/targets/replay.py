"""Recorded answers as a target: `replay@PATH`. They are judged as if their engine were asked now.

A request that the recording has no answer to makes its case inconclusive, never a pass. Known failures are
those of the target that was recorded, under its name and version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self, TypeVar, runtime_checkable

from conformance.errors import (
    EngineError,
    NotRecordedError,
    TargetError,
    TargetTimeoutError,
    WorkerDiedError,
)
from conformance.targets.protocol import (
    Chunking,
    GenerateRequest,
    GenerateResult,
    ParseRequest,
    ParseResult,
    RenderRequest,
    RenderResult,
    ServeAnswer,
    ServeRequest,
    StreamRequest,
    StreamResult,
    TargetInfo,
)
from conformance.targets.recordings import (
    AnswerLine,
    Failure,
    GenerateLine,
    Header,
    Index,
    L,
    ParseLine,
    Place,
    Recordable,
    RenderLine,
    Request,
    ServeLine,
    StreamLine,
    chunking_detail,
    parse_line,
    place,
    places_of,
    read_index,
    request_key,
)

_T = TypeVar("_T")

NAME = "replay"
_FORM = f"{NAME}@PATH"
_KINDS: dict[type[Request], Recordable] = {
    ParseRequest: "parse",
    RenderRequest: "render",
    GenerateRequest: "generate",
    ServeRequest: "serve",
}


@runtime_checkable
class PerCase(Protocol):
    """A target that is told when a new case begins."""

    def begin_case(self) -> None:
        """The requests that follow are those of another case."""
        ...


@dataclass(frozen=True)
class Asked:
    """A request that has no answer."""

    kind: Recordable
    key: str
    request: Request
    chunkings: tuple[Chunking, ...] = ()
    """Of a stream: those that have none."""
    again: int = 0
    """How often the case had asked a server the same before."""


def is_replay(spec: str) -> bool:
    """Whether a spec names a recording."""
    return spec == NAME or spec.startswith(f"{NAME}@")


def path_of(spec: str) -> Path:
    """The recording that a spec names.

    Raises:
        TargetError: it names none.
    """
    name = spec.removeprefix(NAME).removeprefix("@")
    if not name:
        raise TargetError(f"{spec!r} names no recording; write {_FORM}")
    return Path(name)


def open_replay(spec: str) -> ReplayTarget:
    """Open the target that a spec names.

    Raises:
        TargetError: the file cannot be read, or a line of it is damaged.
    """
    path = path_of(spec)
    index = read_index(path)
    assert index.info is not None
    environment = index.info.environment | {"recording": f"sha256:{index.digest}"}
    return ReplayTarget(spec, path, index, index.info.model_copy(update={"environment": environment}))


class ReplayTarget:
    """Answers from a recording.

    Args:
        spec: How the user names the target.
        path: The file.
        index: What stands where in it; may grow while the target is open.
        info: Who answered.
    """

    def __init__(self, spec: str, path: Path, index: Index, info: TargetInfo) -> None:
        self.spec = spec
        self._path = path
        self._index = index
        self._info = info
        self._file: BinaryIO | None = None
        self._last: tuple[tuple[int, int], AnswerLine] | None = None
        self._served: Counter[str] = Counter()

    def describe(self) -> TargetInfo:
        """The target that was recorded."""
        return self._info

    def begin_case(self) -> None:
        """A case that asks a server the same twice gets the first answer first."""
        self._served.clear()

    def asked(self, request: Request) -> Asked:
        """A request that is answered at once, with its key."""
        kind = _KINDS[type(request)]
        return Asked(kind, request_key(kind, request), request)

    def answers(self, asked: Asked) -> bool:
        """Whether there is an answer."""
        return _place_of(asked) in self._index.lines

    def parse(self, request: ParseRequest) -> ParseResult:
        """The recorded answer."""
        return _result(self._line(ParseLine, self.asked(request)).result)

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        """The recorded answer to each chunking, whichever were asked together."""
        missing = self.missing_chunkings(request)
        if missing is not None:
            raise self._not_recorded(missing)
        key = request_key("parse_stream", request.request)
        found = []
        for chunking in request.chunkings:
            line = self._line(StreamLine, Asked("parse_stream", key, request.request, (chunking,)))
            details = [chunking_detail(each) for each in line.chunkings]
            found.append(_result(line.result)[details.index(chunking_detail(chunking))])
        return found

    def missing_chunkings(self, request: StreamRequest) -> Asked | None:
        """Those chunkings that have no answer; None if all have one."""
        key = request_key("parse_stream", request.request)
        missing = {
            detail: chunking
            for chunking in request.chunkings
            if place("parse_stream", key, detail := chunking_detail(chunking)) not in self._index.lines
        }
        asked = Asked("parse_stream", key, request.request, tuple(missing.values()))
        return asked if missing else None

    def render(self, request: RenderRequest) -> RenderResult:
        """The recorded answer."""
        return _result(self._line(RenderLine, self.asked(request)).result)

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """The recorded answer; files of the request count by their content."""
        return _result(self._line(GenerateLine, self.asked(request)).result)

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        """The recorded answers to the same bodies, sent at the same time."""
        key = request_key("serve", request)
        asked = Asked("serve", key, request, again=self._served[key])
        line = self._line(ServeLine, asked)
        answers = _result(line.result)
        if len(answers) != len(request.bodies):
            raise TargetError(
                f"{self._path}: {len(answers)} answers to the {len(request.bodies)} bodies of the request "
                f"with key {key[:12]}…; each body needs one"
            )
        self._served[key] += 1
        return answers

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, kind: type[L], asked: Asked) -> L:
        """The line that answers.

        Raises:
            NotRecordedError: there is none.
            EngineError, WorkerDiedError, TargetTimeoutError: as recorded.
        """
        line = self._read(self._index.lines.get(_place_of(asked)), asked)
        assert isinstance(line, kind)
        if line.error is not None:
            raise _error(line.error)
        return line

    def _read(self, where: tuple[int, int] | None, asked: Asked) -> AnswerLine:
        if where is None:
            raise self._not_recorded(asked)
        changed = TargetError(f"{self._path} was changed while it was read; run again")
        if self._last is None or self._last[0] != where:
            if self._file is None:
                self._file = self._path.open("rb")
            self._file.seek(where[0])
            try:
                line = parse_line(self._file.read(where[1]), f"{self._path}, byte {where[0]}")
            except TargetError as error:  # every line was understood when the file was opened
                raise changed from error
            if isinstance(line, Header):
                raise changed
            self._last = (where, line)
        line = self._last[1]
        if _place_of(asked) not in places_of(line):
            raise changed
        return line

    def _not_recorded(self, asked: Asked) -> NotRecordedError:
        what = f"`{asked.kind}` request {asked.key[:12]}…"
        if asked.chunkings:
            what += f" in {len(asked.chunkings)} chunkings"
        elif asked.again:
            what += f", asked {asked.again} times before in this case"
        return NotRecordedError(
            f"not recorded: {self._path} has no answer to the {what}; record again, or answer what "
            f"`conformance requests CASE --answered {self._path}` prints",
            asked=(asked,),
        )


def _place_of(asked: Asked) -> Place:
    if asked.kind == "parse_stream":
        return place(asked.kind, asked.key, chunking_detail(asked.chunkings[0]))
    return place(asked.kind, asked.key, asked.again if asked.kind == "serve" else None)


def _result(result: _T | None) -> _T:
    assert result is not None  # a line has a result or an error
    return result


def _error(failure: Failure) -> EngineError | WorkerDiedError | TargetTimeoutError:
    if failure.kind == "engine":
        return EngineError(failure.message)
    return (WorkerDiedError if failure.kind == "died" else TargetTimeoutError)(failure.message)
