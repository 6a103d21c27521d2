"""A target in a worker process, under the interpreter of its engine's environment.

Whatever the engine does there costs one request: an exception is an `EngineError`; death, a broken or
endless answer a `WorkerDiedError`; a missed deadline a `TargetTimeoutError`. The next request starts a new
worker where the old one is gone. `conformance.worker.guardian` sees to it that no process and no file is left
behind, even when this one is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from pydantic import TypeAdapter

from conformance.errors import (
    EngineError,
    NotAskedError,
    TargetError,
    TargetTimeoutError,
    WorkerDiedError,
)
from conformance.targets import guarded
from conformance.targets.protocol import (
    Certificate,
    CertifyRequest,
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
    StreamRequest,
    StreamResult,
    TargetInfo,
)
from conformance.targets.stages import StagesRequest, StagesResult

REQUEST_TIMEOUT = 60.0
START_TIMEOUT = 180.0
FORWARD_TIMEOUT = 120.0
"""Seconds for a forward pass beyond those of an ordinary request: the first one imports the engine."""
ENGINE_TIMEOUT = 300.0
"""Seconds for generation beyond those of any request: one engine may have to end, another to start."""
MAX_LINE = 64 * 2**20
"""Bytes of one answer."""
_EXITS = ("SystemExit", "KeyboardInterrupt")
"""Exceptions that mean to end a process."""
_STDERR_TAIL = 8192

_T = TypeVar("_T")
_Tensors = TypeVar("_Tensors", PreprocessResult, ForwardResult, StagesResult)
_STREAM_RESULTS: TypeAdapter[tuple[StreamResult, ...]] = TypeAdapter(tuple[StreamResult, ...])


class WorkerTarget:
    """Implements `conformance.targets.protocol.Target` over JSON lines.

    Args:
        spec: How the user names the target.
        python: Interpreter of the engine's environment.
        adapter: Name of a module in `conformance.worker.adapters`, or a dotted module name.
        timeout: Seconds for one request.
        start_timeout: Seconds for the start of a worker, before its first request.
        environment: Variables for the worker, besides the allowed ones of this process.
        import_paths: Folders that the worker may import from, besides its own environment.
        max_line: Bytes of one answer; a longer one is an error.
    """

    def __init__(
        self,
        spec: str,
        *,
        python: Path,
        adapter: str,
        timeout: float = REQUEST_TIMEOUT,
        start_timeout: float = START_TIMEOUT,
        environment: Mapping[str, str] | None = None,
        import_paths: Sequence[Path] = (),
        max_line: int = MAX_LINE,
    ) -> None:
        self.spec = spec
        self.timeout = timeout
        self._start_timeout = start_timeout
        self._command = [
            str(python),
            "-P",
            "-X",
            "faulthandler",
            "-m",
            "conformance.worker",
            "--adapter",
            adapter,
        ]
        self._environment = dict(environment or {})
        self._import_paths = tuple(import_paths)
        self._max_line = max_line
        self._info: TargetInfo | None = None
        self._worker: _Worker | None = None
        self._number = 0
        self._lock = threading.Lock()
        self._closed = False

    def describe(self) -> TargetInfo:
        """What the adapter says of its engine; asked once."""
        if self._info is None:
            self._info = self._ask("describe", None, TargetInfo.model_validate)
        return self._info

    def parse(self, request: ParseRequest) -> ParseResult:
        """Parse a whole output."""
        return self._ask("parse", request.model_dump(), ParseResult.model_validate)

    def parse_stream(self, request: StreamRequest) -> Sequence[StreamResult]:
        """Parse the output once per chunking."""

        def validate(answer: Any) -> Sequence[StreamResult]:
            results = _STREAM_RESULTS.validate_python(answer)
            if len(results) != len(request.chunkings):
                raise ValueError(f"{len(results)} results for {len(request.chunkings)} chunkings")
            return results

        return self._ask("parse_stream", request.model_dump(), validate)

    def certify(self, request: CertifyRequest) -> Certificate:
        """Search all chunkings; the search's own time limit comes on top of the request's."""
        return self._ask(
            "certify", request.model_dump(), Certificate.model_validate, extra=request.max_seconds
        )

    def render(self, request: RenderRequest) -> RenderResult:
        """Render messages to a prompt."""
        return self._ask("render", request.model_dump(), RenderResult.model_validate)

    def preprocess(self, request: PreprocessRequest) -> PreprocessResult:
        """Prepare media; loading the engine has time of its own."""
        return self._ask_for_tensors("preprocess", request, PreprocessResult)

    def forward(self, request: ForwardRequest) -> ForwardResult:
        """Run a model; loading the engine and the checkpoint has time of its own."""
        return self._ask_for_tensors("forward", request, ForwardResult)

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Generate; the start of the engine has time of its own."""

        def validate(answer: Any) -> GenerateResult:
            result = GenerateResult.model_validate(answer)
            wanted = len(request.prompts) * request.samples * request.repeat
            if len(result.generations) != wanted:
                raise ValueError(
                    f"{len(result.generations)} answers, and {wanted} to {len(request.prompts)} prompts were "
                    "asked for"
                )
            return result

        return self._ask("generate", request.model_dump(), validate, extra=ENGINE_TIMEOUT)

    def loglikelihood(self, request: LoglikelihoodRequest) -> LoglikelihoodResult:
        """Score continuations; the start of the engine has time of its own."""

        def validate(answer: Any) -> LoglikelihoodResult:
            result = LoglikelihoodResult.model_validate(answer)
            if len(result.likelihoods) != len(request.contexts):
                raise ValueError(f"{len(result.likelihoods)} answers to {len(request.contexts)} pairs")
            return result

        return self._ask("loglikelihood", request.model_dump(), validate, extra=ENGINE_TIMEOUT)

    def stages(self, request: StagesRequest) -> StagesResult:
        """Run a model in stages; the start of the engine has time of its own."""
        return self._ask_for_tensors("stages", request, StagesResult)

    def close(self) -> None:
        """End the worker and all it started."""
        with self._lock:
            self._closed = True
            self._stop(gently=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the worker's guardian, which leads its process group; None while there is none."""
        return self._worker.pid if self._worker is not None else None

    def _ask_for_tensors(
        self,
        method: str,
        request: PreprocessRequest | ForwardRequest | StagesRequest,
        answer_type: type[_Tensors],
    ) -> _Tensors:
        def validate(answer: Any) -> _Tensors:
            result = answer_type.model_validate(answer)
            if result.path != request.output:
                raise ValueError(f"tensors in {result.path!r}, not in {request.output!r}")
            return result

        return self._ask(method, request.model_dump(), validate, extra=FORWARD_TIMEOUT)

    def _ask(
        self,
        method: str,
        request: dict[str, Any] | None,
        validate: Callable[[Any], _T],
        *,
        extra: float = 0.0,
    ) -> _T:
        params = {} if request is None else {"request": request}
        with self._lock:
            worker = self._running()
            self._number += 1
            question = {"id": self._number, "method": method, "params": params}
            with self._fatal():
                answer = worker.exchange(question, self.timeout + extra)
                try:
                    return validate(answer)
                except ValueError as error:  # pydantic's ValidationError among them
                    raise WorkerDiedError(
                        f"{self.spec} gave an answer to {method!r} that does not fit the protocol: "
                        f"{_first_lines(str(error))}"
                    ) from error

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """End the worker on everything but an exception of its engine or adapter."""
        try:
            yield
        except (EngineError, NotAskedError):
            raise
        except (WorkerDiedError, TargetTimeoutError) as error:
            error.stderr_tail = self._stop(gently=False)
            raise
        except BaseException:
            self._stop(gently=False)
            raise

    def _running(self) -> _Worker:
        """The worker, started if need be."""
        if self._closed:
            raise WorkerDiedError(f"{self.spec} is closed; open the target again")
        if self._worker is not None and not self._worker.idle():
            self._stop(gently=False)
        if self._worker is None:
            self._worker = _Worker(
                self.spec, self._command, self._environment, self._import_paths, self._max_line
            )
            try:
                with self._fatal():
                    self._worker.wait_for_start(self._start_timeout)
            except EngineError:
                self._stop(gently=False)  # without an adapter it ends by itself anyway
                raise
        return self._worker

    def _stop(self, *, gently: bool) -> str:
        """End the worker; return the end of what it wrote to standard error."""
        if self._worker is None:
            return ""
        worker, self._worker = self._worker, None
        return worker.stop(gently=gently)


class _Worker:
    """One worker process and its pipes."""

    def __init__(
        self,
        spec: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        import_paths: Sequence[Path],
        max_line: int,
    ) -> None:
        self._spec = spec
        self._max_line = max_line
        scratch = guarded.scratch_folder()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the environment's own interpreter
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=scratch,
                env=guarded.variables(scratch, environment, import_paths),
                start_new_session=True,
            )
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise TargetError(f"{spec}: {command[0]} cannot be started: {error.strerror}") from error
        self._stdin, self._stdout, stderr = _pipes(self._process)
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
        self._tail = bytearray()
        self._drain = threading.Thread(target=_drain, args=(stderr, self._tail), daemon=True)
        self._drain.start()
        # Runs at the latest when this process exits, whatever becomes of the target.
        self._end = weakref.finalize(self, guarded.end, self._process, scratch, os.getpid())

    @property
    def pid(self) -> int:
        """Of the guardian, which leads the worker's process group."""
        return self._process.pid

    def idle(self) -> bool:
        """Whether it is alive and has said nothing that was not asked for."""
        if self._process.poll() is not None:
            return False
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        return not poll.poll(0)

    def wait_for_start(self, seconds: float) -> None:
        """Wait until the adapter is loaded."""
        data = self._transfer(b"", time.monotonic() + seconds, f"it did not start within {seconds:g} s")
        try:
            self._read_answer(data, 0)
        except EngineError as error:
            raise EngineError(f"{self._spec} could not start: {error}", traceback=error.traceback) from None

    def exchange(self, question: dict[str, Any], seconds: float) -> Any:
        """Send one request and return its result.

        Raises:
            EngineError: the engine raised.
            NotAskedError: the adapter cannot hand the request to it.
            WorkerDiedError: the worker ended, or what it wrote is no answer.
            TargetTimeoutError: no answer came in time.
        """
        late = f"it did not answer {question['method']!r} within {seconds:g} s"
        data = self._transfer(json.dumps(question).encode() + b"\n", time.monotonic() + seconds, late)
        return self._read_answer(data, question["id"])

    def stop(self, *, gently: bool) -> str:
        """End it and all it started; return the end of what it wrote to standard error.

        Args:
            gently: Let the engine put things in order first.
        """
        self._stdin.close()
        if gently:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(guarded.STOP_GRACE)
        self._end()
        self._stdout.close()
        self._drain.join(guarded.STOP_GRACE)
        return bytes(self._tail).decode(errors="replace")

    def _transfer(self, data: bytes, deadline: float, late: str) -> bytes:
        """Write `data`, and read until a line is complete."""
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        if data:
            poll.register(self._stdin, select.POLLOUT)
        line = bytearray()
        while True:
            ready = dict(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
            if not ready:
                raise TargetTimeoutError(f"{self._spec}: {late}")
            if self._stdin.fileno() in ready:
                data = self._write_some(data)
                if not data:
                    poll.unregister(self._stdin)
            if self._stdout.fileno() not in ready:
                continue
            chunk = os.read(self._stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._death()
            line += chunk
            if len(line) > self._max_line:
                raise self._broken(f"an answer of more than {self._max_line} bytes")
            if b"\n" in chunk:
                return bytes(line)

    def _write_some(self, data: bytes) -> bytes:
        try:
            return data[self._stdin.write(data) or 0 :]
        except BrokenPipeError:  # the end of its output will tell
            return b""

    def _read_answer(self, data: bytes, number: int) -> Any:
        line, _, rest = data.partition(b"\n")
        try:
            answer = json.loads(line)
            if answer["id"] != number:
                raise ValueError(f"expected an answer to request {number}")
            error = _raised(answer["error"]) if "error" in answer else None
            result = answer["result"] if error is None else None
        except (ValueError, LookupError, TypeError, RecursionError) as bad:
            raise self._broken(f"what is no answer: {_shorten(line)}") from bad
        if rest:
            raise self._broken(f"more than an answer: {_shorten(rest)}")
        if error is not None:
            raise error
        return result

    def _broken(self, what: str) -> WorkerDiedError:
        return WorkerDiedError(f"{self._spec}: the worker wrote {what}")

    def _death(self) -> WorkerDiedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(guarded.STOP_GRACE)
        code = self._process.returncode
        how = "closed its output" if code is None else guarded.ending(code)
        return WorkerDiedError(f"{self._spec}: the worker {how}")


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdin, process.stdout, process.stderr


def _drain(stderr: IO[bytes], tail: bytearray) -> None:
    """Read standard error to its end, keeping the last bytes."""
    with stderr:
        while chunk := stderr.read(1 << 16):
            tail += chunk
            del tail[:-_STDERR_TAIL]


def _raised(error: dict[str, str]) -> EngineError | NotAskedError:
    if error["type"] == NotAskedError.__name__:
        return NotAskedError(error["message"])
    return EngineError(
        f"{error['type']}: {error['message']}",
        traceback=str(error["traceback"]),
        exited=error["type"] in _EXITS,
    )


def _shorten(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 120 else f"{text[:119]}…")


def _first_lines(text: str) -> str:
    return " ".join(text.split("\n")[:3])
