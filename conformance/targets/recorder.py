"""Record what a live target answers, while it is judged.

A request is asked once; where it comes again, the recorded answer is given. So the verdicts of the run that
records are those of the recording. A server's answers to a request that one case repeats are all recorded,
because a server that does not repeat itself is judged by that.

Only requests' keys and answers are written: what a target was opened with (a server's key, variables) is not
seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import TypeVar, cast

from conformance.errors import (
    EngineError,
    NotRecordedError,
    TargetError,
    TargetTimeoutError,
    WorkerDiedError,
)
from conformance.targets import registry
from conformance.targets.protocol import (
    ForwardRequest,
    ForwardResult,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    ParseRequest,
    ParseResult,
    PreprocessRequest,
    PreprocessResult,
    RenderRequest,
    RenderResult,
    ServeAnswer,
    Server,
    ServeRequest,
    StreamRequest,
    StreamResult,
    Target,
    TargetInfo,
)
from conformance.targets.recordings import (
    MAX_LINE,
    RECORDABLE,
    AnswerLine,
    Failure,
    GenerateLine,
    Header,
    Index,
    ParseLine,
    RenderLine,
    ServeLine,
    StreamLine,
    line_text,
    places_of,
)
from conformance.targets.replay import Asked, ReplayTarget
from conformance.targets.scores import Scorer, ScoreRequest, ScoreResult
from conformance.targets.stages import StagesRequest, StagesResult

_T = TypeVar("_T")
_LINES: dict[str, type[AnswerLine]] = {
    "parse": ParseLine,
    "parse_stream": StreamLine,
    "render": RenderLine,
    "generate": GenerateLine,
    "serve": ServeLine,
}


class Recorder:
    """A new recording, of one target, which may be closed and opened while it is written.

    Args:
        path: The file; made with the first answer of the target.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index()
        self._file: FileIO | None = None
        self._end = 0

    def begin(self, info: TargetInfo) -> TargetInfo:
        """Write the header, the first time; return the target's description without what is not recorded.

        Raises:
            TargetError: the file exists or cannot be written, or the target is not the one it was.
        """
        kept = tuple(name for name in info.capabilities if name in RECORDABLE)
        header = info.model_copy(update={"capabilities": kept, "search_feeds": 0})
        if self.index.info is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = FileIO(self.path, "x+")
            except OSError as error:
                raise TargetError(
                    f"{self.path}: cannot be made: {error.strerror}; name another path"
                ) from None
            self.index.info = header
            self._end = sum(self._append(line_text(Header(type="header", version=1, target=header))))
        elif self.index.info != header:
            raise TargetError(f"{self.path}: the target has changed while it was recorded; record again")
        shown = tuple(name for name in info.capabilities if name != "certify")
        return header.model_copy(update={"capabilities": shown})

    def write(self, line: AnswerLine) -> None:
        """Append an answer, wholly or not at all.

        Raises:
            TargetError: it is longer than a line may be.
        """
        places = list(places_of(line))
        try:
            where = self._append(line_text(line))
            self.index.lines |= dict.fromkeys(places, where)
        except BaseException:  # the time of a case may end at any instruction
            for place in places:
                self.index.lines.pop(place, None)
            self._cut(self._end)
            raise
        self._end = sum(where)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()

    def _append(self, data: bytes) -> tuple[int, int]:
        assert self._file is not None
        if len(data) > MAX_LINE:
            raise TargetError(f"{self.path}: an answer of {len(data)} bytes is too long to be recorded")
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        return self._end, len(data)

    def _cut(self, length: int) -> None:
        assert self._file is not None
        self._file.truncate(length)
        self._file.seek(length)


class RecordingTarget:
    """A live target whose answers are recorded. It certifies nothing: a certificate cannot be recorded.

    Args:
        target: The target.
        recorder: Where its answers go.
    """

    def __init__(self, target: Target, recorder: Recorder) -> None:
        self.spec = target.spec
        self._target = target
        self._recorder = recorder
        self._info = recorder.begin(registry.describe(target))
        self._replay = ReplayTarget(target.spec, recorder.path, recorder.index, self._info)

    def describe(self) -> TargetInfo:
        """The target, as it is recorded."""
        return self._info

    def begin_case(self) -> None:
        """Repeated requests to a server are counted within a case."""
        self._replay.begin_case()

    def parse(self, request: ParseRequest) -> ParseResult:
        """Ask once."""
        return self._recorded(
            lambda: self._replay.parse(request),
            lambda asked: ParseLine(type="parse", key=asked.key, result=self._target.parse(request)),
        )

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        """Ask once for each chunking."""

        def ask(asked: Asked) -> StreamLine:
            streams = self._target.parse_stream(
                StreamRequest(request=request.request, chunkings=asked.chunkings)
            )
            return StreamLine(
                type="parse_stream", key=asked.key, chunkings=asked.chunkings, result=tuple(streams)
            )

        return self._recorded(lambda: self._replay.parse_stream(request), ask)

    def render(self, request: RenderRequest) -> RenderResult:
        """Ask once."""
        return self._recorded(
            lambda: self._replay.render(request),
            lambda asked: RenderLine(type="render", key=asked.key, result=self._target.render(request)),
        )

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Ask once."""
        return self._recorded(
            lambda: self._replay.generate(request),
            lambda asked: GenerateLine(type="generate", key=asked.key, result=self._target.generate(request)),
        )

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        """Ask as often as one case does."""
        server = cast(Server, self._target)
        return self._recorded(
            lambda: self._replay.serve(request),
            lambda asked: ServeLine(
                type="serve", key=asked.key, again=asked.again, result=tuple(server.serve(request))
            ),
        )

    def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
        """Ask; tensors are not recorded."""
        return self._target.preprocess(request)

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """Ask; tensors are not recorded."""
        return self._target.forward(request)

    def loglikelihood(self, request: LoglikelihoodRequest) -> LoglikelihoodResult:
        """Ask; no suite judges likelihoods, so they are not recorded."""
        return self._target.loglikelihood(request)

    def score(self, request: ScoreRequest) -> ScoreResult:
        """Ask; nothing of an engine's is in it that could be recorded."""
        return cast(Scorer, self._target).score(request)

    def stages(self, request: StagesRequest) -> StagesResult:
        """Ask; tensors are not recorded."""
        return self._target.stages(request)

    def close(self) -> None:
        """Close the target; the recording goes on if it is opened again."""
        self._replay.close()
        self._target.close()

    def _recorded(self, replay: Callable[[], _T], ask: Callable[[Asked], AnswerLine]) -> _T:
        try:
            return replay()
        except NotRecordedError as missing:
            (asked,) = missing.asked
        assert isinstance(asked, Asked)
        try:
            line = ask(asked)
        except (EngineError, WorkerDiedError, TargetTimeoutError) as error:
            self._recorder.write(_failed(asked, error))
            raise
        self._recorder.write(line)
        return replay()


def _failed(asked: Asked, error: EngineError | WorkerDiedError | TargetTimeoutError) -> AnswerLine:
    kind = "engine"
    if not isinstance(error, EngineError):
        kind = "died" if isinstance(error, WorkerDiedError) else "timeout"
    extra: dict[str, object] = {}
    if asked.chunkings:
        extra = {"chunkings": asked.chunkings}
    elif asked.again:
        extra = {"again": asked.again}
    failure = Failure.model_validate({"kind": kind, "message": str(error)})
    return _LINES[asked.kind].model_validate({"type": asked.kind, "key": asked.key, "error": failure} | extra)
