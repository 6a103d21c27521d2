"""`conformance requests`: what cases ask, for an engine that answers elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import click
from pydantic import TypeAdapter

from conformance import checks
from conformance.checks.parser import build_request as parse_request
from conformance.checks.streams import sampled_chunkings
from conformance.checks.template import build_request as render_request
from conformance.commands.selection import select
from conformance.errors import NotRecordedError, UsageError
from conformance.loading import LoadedCase
from conformance.oracles import Oracles
from conformance.suites import ParserCase, ParserSuite, TemplateCase, TemplateSuite
from conformance.targets.protocol import (
    Chunking,
    GenerateRequest,
    Model,
    ParseRequest,
    PieceUnit,
    RenderRequest,
    ServeRequest,
    StreamRequest,
    Target,
    TargetInfo,
)
from conformance.targets.recordings import RECORDABLE, Header, Index, Recordable, content_digest, line_text
from conformance.targets.replay import Asked, ReplayTarget, open_replay

_USUAL: tuple[Recordable, ...] = ("parse", "parse_stream", "render")
_NEEDS = {
    "parser": "parse",
    "template": "render",
    "server": "serve",
    "generation": "generate",
    "invariance": "generate",
    "lora": "generate",
}
"""Kind of a suite to the capability without which it asks nothing."""


class RequestLine(Model):
    """A request. Its answer is this line with `result`, or `error`; `request` and `case` may be left out."""

    type: Recordable
    key: str
    case: str
    """The first case that asks it."""
    request: ParseRequest | RenderRequest | GenerateRequest | ServeRequest
    chunkings: tuple[Chunking, ...] | None = None
    """Of type `parse_stream` alone: stream the request anew for each, and give one result for each."""
    again: int | None = None
    """Of type `serve` alone: how often this case asked the same before."""


def json_schema() -> dict[str, Any]:
    """JSON Schema of one line."""
    schema = TypeAdapter(Header | RequestLine).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@click.command("requests")
@click.argument("cases", nargs=-1)
@click.option(
    "--answered",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recording: print only what it lacks, for the capabilities that it names.",
)
@click.option(
    "--capability",
    "-c",
    "capabilities",
    multiple=True,
    type=click.Choice(RECORDABLE),
    help=f"What is asked for; may be repeated.  [default: {', '.join(_USUAL)}]",
)
@click.option(
    "--stream-unit",
    type=click.Choice(["tokens", "characters"]),
    help="Finest cut that the engine can be streamed in.  [default: tokens]",
)
@click.option(
    "--files",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where the checkpoints of requests to generate are copied to.",
)
def requests_command(
    cases: tuple[str, ...],
    answered: Path | None,
    capabilities: tuple[Recordable, ...],
    stream_unit: Literal["tokens", "characters"] | None,
    files: Path | None,
) -> None:
    """Print what CASES ask a target, one JSON object a line, so that an engine can answer elsewhere.

    The first line is the header of the recording to be: write in who answers. Then add `result`, or `error`,
    to each line, and judge the file by `conformance run CASES --target replay@FILE`. What a live server is
    asked depends on its answers: repeat with --answered, and append, until nothing is printed.
    """
    if answered is not None and (capabilities or stream_unit):
        raise UsageError("the recording's header names capabilities and stream unit; leave out the options")
    selected = select(cases)
    target = _open(answered, capabilities or _USUAL, stream_unit or "tokens")
    oracles = Oracles(_no_oracle)
    seen: set[tuple[Any, ...]] = set()
    if answered is None:
        header = Header(type="header", version=1, target=target.describe())
        click.echo(line_text(header), nl=False)
    try:
        for case in selected.cases:
            for asked in _unanswered(case, target, oracles):
                identity = (asked.kind, asked.key, asked.chunkings, asked.again)
                if identity not in seen:
                    seen.add(identity)
                    click.echo(_line(asked, case, files))
    finally:
        oracles.close()
        target.close()


def _open(answered: Path | None, capabilities: Sequence[Recordable], stream_unit: PieceUnit) -> ReplayTarget:
    if answered is not None:
        return open_replay(f"replay@{answered}")
    info = TargetInfo(
        name="write-the-engine's-name-here",
        version="and-its-version-here",
        capabilities=tuple(capabilities),
        stream_unit=stream_unit,
        features=()
        if "generate" not in capabilities
        else ("tensor-parallel", "pipeline-parallel", "eagle3", "lora", "mixed-adapters", "images", "sounds"),
    )
    return ReplayTarget("replay", Path(os.devnull), Index(info), info)


def _no_oracle(spec: str) -> Target:
    raise UsageError(f"the oracle {spec} is not asked here")


def _unanswered(loaded: LoadedCase, target: ReplayTarget, oracles: Oracles) -> Iterator[Asked]:
    """What a case asks and the target has no answer to, as far as can be told before it is answered."""
    case, suite, capabilities = loaded.case, loaded.suite.suite, target.describe().capabilities
    if _NEEDS.get(suite.kind) not in capabilities:
        return
    if isinstance(suite, ParserSuite) and isinstance(case, ParserCase):
        request = parse_request(case, suite)
        yield from _missing(target, request)
        if "parse_stream" in capabilities:
            chunkings = tuple(sampled_chunkings(request, target.describe()))
            missing = target.missing_chunkings(StreamRequest(request=request, chunkings=chunkings))
            yield from [missing] if missing is not None else []
    elif isinstance(suite, TemplateSuite) and isinstance(case, TemplateCase):
        for family in case.families:
            yield from _missing(target, render_request(case, suite, family))
    else:
        target.begin_case()
        try:
            checks.judge(case, suite, cast(Target, target), oracles=oracles)
        except NotRecordedError as error:
            yield from (asked for asked in error.asked if isinstance(asked, Asked))


def _missing(target: ReplayTarget, request: ParseRequest | RenderRequest) -> Iterator[Asked]:
    asked = target.asked(request)
    if not target.answers(asked):
        yield asked


def _line(asked: Asked, case: LoadedCase, files: Path | None) -> str:
    request = asked.request
    if isinstance(request, GenerateRequest):
        request = _with_files(request, files)
    line = RequestLine(
        type=asked.kind,
        key=asked.key,
        case=case.address,
        request=request,
        chunkings=asked.chunkings or None,
        again=asked.again if asked.kind == "serve" else None,
    )
    data = line.model_dump()
    return json.dumps({name: value for name, value in data.items() if value is not None})


def _with_files(request: GenerateRequest, files: Path | None) -> GenerateRequest:
    """The request with copies of its files, which a recording knows by their content.

    Raises:
        UsageError: it is not known where to.
    """
    if files is None:
        raise UsageError("requests to generate come with checkpoints; name a folder for them with --files")
    changes: dict[str, Any] = {"checkpoint": _copied(request.checkpoint, files)}
    if request.adapter is not None:
        changes["adapter"] = _copied(request.adapter, files)
    if request.adapters:
        changes["adapters"] = tuple(each and _copied(each, files) for each in request.adapters)
    for name, media in (("images", request.images), ("sounds", request.sounds)):
        if media:
            changes[name] = tuple(tuple(_copied(file, files) for file in row) for row in media)
    if request.options.speculation is not None:
        draft = _copied(request.options.speculation.checkpoint, files)
        speculation = request.options.speculation.model_copy(update={"checkpoint": draft})
        changes["options"] = request.options.model_copy(update={"speculation": speculation})
    return request.model_copy(update=changes)


def _copied(name: str, files: Path) -> str:
    """Path of the copy of a file or folder, from the folder of all copies.

    Raises:
        UsageError: something else has its name there.
    """
    source = Path(name)
    place = files / source.name
    if not place.exists():
        files.mkdir(parents=True, exist_ok=True)
        # Aside, so that what bears the name is whole.
        with tempfile.TemporaryDirectory(prefix=".copy-", dir=files) as aside:
            partial = Path(aside) / source.name
            if source.is_dir():
                shutil.copytree(source, partial)
            else:
                shutil.copy(source, partial)
            partial.rename(place)
    elif content_digest(str(place)) != content_digest(name):
        raise UsageError(f"{place} is there and is no copy of {source}; name an empty folder with --files")
    return place.name
