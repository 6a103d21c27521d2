"""The file format of recorded answers, one JSON object a line. `docs/adding-a-target.md` describes it.

1. The first line is a `Header`: the format's version, and who answered.
2. Every other line is the answer to one request, which it names by its key: `request_key` says what that
   depends on. An answer is a result, or the error that came instead.
3. Nothing is answered twice. A line that is damaged, or not understood, makes the whole file unusable: what
   is wrong with one line says nothing good about the others.
4. Lines are checked when the file is opened, and read again when they are asked for, so that a long
   recording does not fill the memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar, get_args

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from conformance.errors import TargetError
from conformance.targets.protocol import (
    Chunking,
    GenerateRequest,
    GenerateResult,
    Model,
    ParseRequest,
    ParseResult,
    RenderRequest,
    RenderResult,
    ServeAnswer,
    ServeRequest,
    StreamResult,
    TargetInfo,
)

FORMAT_VERSION = 1
MAX_LINE = 64 * 2**20
"""Bytes of one line, as of one answer of a worker."""

Recordable = Literal["parse", "parse_stream", "render", "generate", "serve"]
"""Capabilities whose answers a recording can hold. A certificate is a search, and the tensors of `forward`
are too large."""

RECORDABLE: tuple[Recordable, ...] = get_args(Recordable)
Request = ParseRequest | RenderRequest | GenerateRequest | ServeRequest
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Failure(Model):
    """The error that a target gave in place of an answer."""

    kind: Literal["engine", "died", "timeout"] = "engine"
    """The engine raised; it ended, or its answer made no sense; it did not answer in time."""
    message: str


class Header(Model):
    """First line of a recording."""

    type: Literal["header"]
    version: Literal[1]
    """Of this format."""
    target: TargetInfo
    """Who answered; its capabilities are among those that can be recorded."""

    @model_validator(mode="after")
    def _can_be_recorded(self) -> Header:
        wrong = sorted(set(self.target.capabilities) - set(RECORDABLE))
        if wrong:
            can = ", ".join(RECORDABLE)
            raise ValueError(f"a recording cannot hold answers of {', '.join(wrong)}; it can of {can}")
        return self


class Line(Model):
    """What all answers have. `request` and `case` may stay, as they were asked; they are not read."""

    key: Key
    error: Failure | None = None
    """Why there is no result."""
    request: Any = None
    case: str = ""

    @model_validator(mode="after")
    def _one_answer(self) -> Line:
        if (getattr(self, "result", None) is None) == (self.error is None):
            raise ValueError("give exactly one of `result` and `error`")
        return self


class ParseLine(Line):
    """Answer to a `ParseRequest`."""

    type: Literal["parse"]
    result: ParseResult | None = None


class StreamLine(Line):
    """Answers to a `ParseRequest` that was streamed; one line may hold some chunkings, another the rest."""

    type: Literal["parse_stream"]
    chunkings: tuple[Chunking, ...] = Field(min_length=1)
    result: tuple[StreamResult, ...] | None = None
    """One for each chunking, in order."""

    @model_validator(mode="after")
    def _one_each(self) -> StreamLine:
        if self.result is not None and len(self.result) != len(self.chunkings):
            raise ValueError(f"{len(self.result)} results for {len(self.chunkings)} chunkings")
        return self


class RenderLine(Line):
    """Answer to a `RenderRequest`; a conversation that is refused is an error of kind `engine`."""

    type: Literal["render"]
    result: RenderResult | None = None


class GenerateLine(Line):
    """Answer to a `GenerateRequest`."""

    type: Literal["generate"]
    result: GenerateResult | None = None


class ServeLine(Line):
    """Answers to the bodies of a `ServeRequest`."""

    type: Literal["serve"]
    again: int = Field(default=0, ge=0)
    """How often one case had asked the same before: a server need not repeat itself."""
    result: tuple[ServeAnswer, ...] | None = None
    """One for each body, in order."""


AnswerLine = ParseLine | StreamLine | RenderLine | GenerateLine | ServeLine
AnyLine = Annotated[Header | AnswerLine, Field(discriminator="type")]
L = TypeVar("L", ParseLine, StreamLine, RenderLine, GenerateLine, ServeLine)
_LINE: TypeAdapter[Header | AnswerLine] = TypeAdapter(AnyLine)

Place = tuple[str, str, object]
"""Type, key, and what else tells answers apart."""


def json_schema() -> dict[str, Any]:
    """JSON Schema of one line."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_LINE.json_schema()}


# ---------------------------------------------------------------------------- keys


def request_key(kind: Recordable, request: Request) -> str:
    """SHA-256 of what is asked: of the request's JSON with sorted keys, and without fields at their default.

    Fields that the protocol gains later change no key. A folder or file counts by its content.
    """
    data = request.model_dump(exclude_defaults=True)
    if isinstance(request, GenerateRequest):
        data |= _contents(request)
    text = json.dumps({"type": kind, "request": data}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(request: GenerateRequest) -> dict[str, Any]:
    """The fields that name files, with digests in place of paths."""
    found: dict[str, Any] = {"checkpoint": content_digest(request.checkpoint)}
    if request.adapter is not None:
        found["adapter"] = content_digest(request.adapter)
    if request.adapters:
        found["adapters"] = [each and content_digest(each) for each in request.adapters]
    for name, media in (("images", request.images), ("sounds", request.sounds)):
        if media:
            found[name] = [[content_digest(file) for file in files] for files in media]
    if request.options.speculation is not None:
        options = request.options.model_dump(exclude_defaults=True)
        options["speculation"]["checkpoint"] = content_digest(request.options.speculation.checkpoint)
        found["options"] = options
    return found


def content_digest(name: str) -> str:
    """SHA-256 of a file, or of a folder's files with their names.

    Raises:
        TargetError: it cannot be read.
    """
    path = Path(name)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    try:
        parts = [(_relative(file, path), *_stamp(file)) for file in files]
        return _digest_of(str(path), tuple(parts))
    except OSError as error:
        raise TargetError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root else ""


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


@cache
def _digest_of(root: str, parts: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, size in parts:
        digest.update(f"{name}\0{size}\0".encode())
        with (Path(root) / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def place(kind: str, key: str, detail: object = None) -> Place:
    """Where an answer stands."""
    return kind, key, detail


def chunking_detail(chunking: Chunking) -> object:
    """What tells chunkings apart; the name does not."""
    return chunking.unit, chunking.cuts, chunking.lag


def places_of(line: AnswerLine) -> Iterator[Place]:
    """Everything that a line answers."""
    if isinstance(line, StreamLine):
        yield from (place(line.type, line.key, chunking_detail(c)) for c in line.chunkings)
    else:
        yield place(line.type, line.key, line.again if isinstance(line, ServeLine) else None)


# ---------------------------------------------------------------------------- files


@dataclass
class Index:
    """Where each answer of a file stands: offset and length of its line."""

    info: TargetInfo | None = None
    lines: dict[Place, tuple[int, int]] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 of the file."""


def read_index(path: Path) -> Index:
    """Check every line of a recording.

    Raises:
        TargetError: names the line, and says what to do.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise TargetError(f"{path}: cannot be read: {error.strerror}; name a recording") from None
    if not path.is_file():
        raise TargetError(f"{path} is no file; name a recording")
    return _read_index(path.absolute(), path, found.st_mtime_ns, found.st_size)


@cache
def _read_index(absolute: Path, shown: Path, _mtime: int, _size: int) -> Index:
    index = Index()
    digest = hashlib.sha256()
    numbers: dict[Place, int] = {}
    try:
        with absolute.open("rb") as file:
            for number, offset, data in _lines(file, shown):
                digest.update(data)
                _take(f"{shown}:{number}", data, offset, index, numbers, number)
    except OSError as error:
        raise TargetError(f"{shown}: cannot be read: {error.strerror}") from None
    if index.info is None:
        raise TargetError(f"{shown}: the file is empty; a recording begins with a header")
    index.digest = digest.hexdigest()
    return index


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset, number = 0, 0
    while data := file.readline(MAX_LINE + 1):
        number += 1
        if len(data) > MAX_LINE:
            raise TargetError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes; record again")
        if not data.endswith(b"\n"):
            raise TargetError(
                f"{path}:{number}: the line was cut off after {len(data)} bytes; "
                "remove it and answer its request again"
            )
        yield number, offset, data
        offset += len(data)


def _take(where: str, data: bytes, offset: int, index: Index, numbers: dict[Place, int], number: int) -> None:
    line = parse_line(data, where)
    if number == 1:
        if not isinstance(line, Header):
            raise TargetError(
                f"{where}: a recording begins with a line of type header, this one is of type {line.type}; "
                "see `conformance schema replay`"
            )
        index.info = line.target
        return
    if isinstance(line, Header):
        raise TargetError(f"{where}: a second header; one file holds the answers of one target")
    assert index.info is not None
    if line.type not in index.info.capabilities:
        raise TargetError(
            f"{where}: an answer of type {line.type}, and the header does not name that capability; "
            "add it to `target.capabilities` in line 1, or remove this line"
        )
    for each in places_of(line):
        if each in numbers:
            raise TargetError(
                f"{where}: line {numbers[each]} answers the same request{_which(each)}; remove one of the two"
            )
        numbers[each] = number
        index.lines[each] = (offset, len(data))


def parse_line(data: bytes, where: str) -> Header | AnswerLine:
    """Read one line.

    Raises:
        TargetError: it is damaged.
    """
    advice = "correct or remove it; `conformance schema replay` tells what a line holds"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{where}: this line is no JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise TargetError(f"{where}: this line is no JSON object; {advice}")
    if value.get("type") == "header" and value.get("version") != FORMAT_VERSION:
        raise TargetError(
            f"{where}: format version {value.get('version')!r}; this harness reads {FORMAT_VERSION}; "
            "record again, or use the harness that belongs to it"
        )
    try:
        return _LINE.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = ".".join(map(str, first["loc"]))
        raise TargetError(f"{where}: {loc + ': ' if loc else ''}{first['msg']}; {advice}") from None


def line_text(line: Model, *, exclude: Iterable[str] = ()) -> bytes:
    """A line as it is written: ASCII, so that halves of characters survive; defaults left out."""
    head = {"type": getattr(line, "type", "")}
    data = head | line.model_dump(exclude_defaults=True, exclude=set(exclude))
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"


def _which(found: Place) -> str:
    kind, _, detail = found
    if kind == "parse_stream" and isinstance(detail, tuple):
        unit, cuts, lag = detail
        return f" (cuts {list(cuts)[:8]}{' …' if len(cuts) > 8 else ''} in {unit}, lag {lag})"
    return f" (asked {detail} times before)" if kind == "serve" else ""
