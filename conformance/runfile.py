"""Write, read and resume run files. Their lines are the models of `conformance.results`.

1. Every line is on disk (fsync) before anything about it is shown.
2. A writer holds a lock on its file, so two runs cannot interleave.
3. A run that goes on in the same file adds a header with `resumed_from`; a target that is first
   heard of during a run adds a header with that target. Headers of one file are merged in order.
4. Only the last line may be torn, and only by a writer that was killed.
5. A stored result is reused only if nothing that is known to bear on it has changed: the case, the
   sources of the harness, the target and its environment, the environment of the run. Results of
   factories are never reused: their code can change without a sign.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from pydantic import TypeAdapter, ValidationError

from conformance.errors import RunFileError
from conformance.results import SCHEMA_VERSION, Footer, Header, Line, Result, Run
from conformance.targets import registry
from conformance.targets.protocol import TargetInfo

MAX_LINE = 64 * 1024 * 1024
"""Bytes of a line, above which a file is refused: it is no run file, or would fill the memory."""

_LINE: TypeAdapter[Header | Result | Footer] = TypeAdapter(Line)
_OF_THE_JOB = ("env:GITHUB_", "env:OMP_NUM_THREADS")
"""Beginnings of facts that name a job, or how the machine is shared: a run that is gone on with by another
number of processes, each with another share of the cores, has the same verdicts."""


class RunWriter:
    """Appends to a run file. Use as a context manager, or call `close`."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        """Open the file.

        Args:
            path: The file; it must not exist, except to resume.
            resume: Go on with an existing file; a torn last line is cut off.

        Raises:
            RunFileError: it exists (or, to resume, does not), is in use, or cannot be written.
        """
        self.path = path
        flags = os.O_RDWR | (0 if resume else os.O_CREAT | os.O_EXCL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFileError(f"{path.parent}: this folder cannot be made: {error.strerror}") from None
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileExistsError:
            raise RunFileError(
                f"{path} exists; go on with it by --resume {path}, or write to another file"
            ) from None
        except OSError as error:
            if resume and isinstance(error, FileNotFoundError):
                raise RunFileError(f"{path}: there is no such run to resume") from None
            raise RunFileError(f"{path}: cannot be written: {error.strerror}") from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise RunFileError(f"{path} is being written by another run") from None
        if resume:
            self._cut_torn_line()
        self._file.seek(0, os.SEEK_END)

    def write(self, line: Header | Result | Footer) -> None:
        """Append one line and wait until it is on disk.

        Raises:
            RunFileError: the line could not be read back.
        """
        data = line.model_dump_json().encode() + b"\n"
        if len(data) > MAX_LINE:
            raise RunFileError(f"{self.path}: a line of {len(data)} bytes is too long to be written")
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and release its lock. Safe to call twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        data = self._file.read()
        if data and not data.endswith(b"\n"):
            self._file.truncate(data.rfind(b"\n") + 1)


def discard_unbegun(path: Path) -> bool:
    """Remove a file in which no run has begun: it has no complete line, and nobody is writing it.

    Returns:
        Whether it was removed; False where there is none, or a run has begun in it.

    Raises:
        RunFileError: another run is writing it, or it cannot be read or removed.
    """
    try:
        with path.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFileError(f"{path} is being written by another run") from None
            if file.readline(MAX_LINE + 1).endswith(b"\n") or file.tell() > MAX_LINE:
                return False
            # What is locked must be what stands there: another run may have removed it, and begun anew.
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise RunFileError(f"{path} is being written by another run")
            path.unlink()
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read or replaced: {error.strerror or error}") from None


def read(path: Path) -> Run:
    """Read a run file back.

    Raises:
        RunFileError: it cannot be read, or a line other than a torn last one is wrong.
    """
    return _run(_read(path))


def _run(content: _Content) -> Run:
    return Run(
        header=merge(content.headers),
        results=tuple(stored.result for stored in content.results),
        footer=content.footer,
        torn=content.torn,
    )


def read_open(file: BinaryIO, name: str) -> tuple[Run, int]:
    """Read a run from an open file, such as one that was sent.

    Args:
        file: At its beginning.
        name: What messages call it.

    Returns:
        The run, and the number of its complete lines.

    Raises:
        RunFileError: as `read`.
    """
    content = _contents(file, name)
    return _run(content), content.lines


def read_stored(path: Path) -> dict[tuple[str, str, str], StoredResult]:
    """The last result of each case and target, with what produced it.

    Raises:
        RunFileError: as `read`.
    """
    return {stored.result.key: stored for stored in _read(path).results}


@dataclass(frozen=True)
class StoredResult:
    """A result of an earlier session, and what was in use when it was written."""

    result: Result
    sources: str
    environment: dict[str, str]
    info: TargetInfo | None
    """The target that gave it."""

    def reusable(self, digest: str, info: TargetInfo, environment: dict[str, str]) -> bool:
        """Whether running the case again would only repeat it.

        Args:
            digest: Of the case today.
            info: The target today.
            environment: The facts of the run today.
        """
        return (
            not registry.is_factory(self.result.target)
            and "serve" not in info.capabilities  # a server may have been started anew
            and self.result.digest == digest
            and self.info == info
            and self.sources == harness_digest()
            and _bearing(self.environment) == _bearing(environment)
            and self.result.verdict not in ("error", "timeout")
        )


@cache
def harness_digest(without: tuple[str, ...] = ()) -> str:
    """SHA-256 over the files of the harness and of the bundled implementation, as installed.

    Args:
        without: Beginnings of names of files that are left out, such as `conformance/targets/locks/`.
    """
    digest = hashlib.sha256()
    for package in ("conformance", "model_impl"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise RunFileError(f"the package {package} cannot be found; install gemma4-conformance again")
        root = Path(spec.origin).parent
        for path in sorted(path for path in root.rglob("*") if "__pycache__" not in path.parts):
            if path.is_file():
                name = f"{package}/{path.relative_to(root).as_posix()}"
                if name.startswith(without):
                    continue
                digest.update(f"{name}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _bearing(environment: dict[str, str]) -> dict[str, str]:
    return {name: fact for name, fact in environment.items() if not name.startswith(_OF_THE_JOB)}


def check_new(path: Path) -> None:
    """Refuse a path at which no run file can be made.

    Raises:
        RunFileError: something is there, or the folder cannot be made or written.
    """
    if path.is_dir():
        raise RunFileError(f"{path} is a folder; name a file in it")
    if path.exists():
        raise RunFileError(f"{path} exists; go on with it by --resume {path}, or name another file")
    check_parent(path)


def files(paths: Iterable[Path]) -> list[Path]:
    """Run files, and those in folders, by name.

    Raises:
        RunFileError: a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise RunFileError(f"{path}: there is no run file (*.jsonl) in this folder")
        found += inside
    return found


def check_parent(path: Path) -> None:
    """Refuse a path below something that is no folder, or that cannot be written.

    Raises:
        RunFileError: says which it is.
    """
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise RunFileError(f"{path}: {parent} is no folder; name another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunFileError(f"{path}: {parent} cannot be written; name another path")


@dataclass
class _Content:
    headers: list[Header] = field(default_factory=list)
    results: list[StoredResult] = field(default_factory=list)
    targets: dict[str, TargetInfo] = field(default_factory=dict)
    footer: Footer | None = None
    lines: int = 0
    """Complete ones."""
    torn: str = ""


def _read(path: Path) -> _Content:
    try:
        with path.open("rb") as file:
            return _contents(file, str(path))
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read: {error.strerror or error}") from None


def _contents(file: BinaryIO, path: str) -> _Content:
    content = _Content()
    while data := file.readline(MAX_LINE + 1):
        number = content.lines + 1
        if len(data) > MAX_LINE:
            raise RunFileError(f"{path}:{number}: the line is longer than {MAX_LINE} bytes")
        if not data.endswith(b"\n"):
            content.torn = f"line {number} was cut off after {len(data)} bytes and is ignored"
            break
        _take(path, number, _parse(path, number, data), content)
        content.lines = number
    if not content.headers:
        reason = f"; {content.torn}" if content.torn else ""
        raise RunFileError(f"{path}: the file holds no complete header{reason}")
    return content


def _take(path: str, number: int, line: Header | Result | Footer, content: _Content) -> None:
    if isinstance(line, Header):
        _check_header(path, number, line, content.headers)
        content.headers.append(line)
        content.targets |= line.targets
        content.footer = None
    elif not content.headers:
        raise RunFileError(f"{path}:{number}: a run file begins with its header")
    elif content.footer is not None:
        raise RunFileError(f"{path}:{number}: a line follows the run's last line")
    elif isinstance(line, Result):
        header = content.headers[-1]
        info = content.targets.get(line.target)
        content.results.append(StoredResult(line, header.sources, header.environment, info))
    else:
        content.footer = line


def json_schema() -> dict[str, Any]:
    """JSON Schema of one line of a run file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_LINE.json_schema()}


def _parse(path: str, number: int, data: bytes) -> Header | Result | Footer:
    try:
        return _LINE.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RunFileError(
            f"{path}:{number}: {place + ': ' if place else ''}{first['msg']}; "
            "this is not a run file of this version, or it was changed by hand"
        ) from None


def _check_header(path: str, number: int, header: Header, earlier: list[Header]) -> None:
    if header.schema_version != SCHEMA_VERSION:
        raise RunFileError(
            f"{path}:{number}: schema version {header.schema_version}; this harness reads {SCHEMA_VERSION}"
        )
    if earlier and header.run_id != earlier[0].run_id:
        raise RunFileError(f"{path}:{number}: run {header.run_id} inside the file of {earlier[0].run_id}")


def merge(headers: Sequence[Header]) -> Header:
    """The first header, with what later ones add; a target that ran later is no longer unavailable."""
    first = headers[0]
    unavailable: dict[str, str] = {}
    for header in headers:
        unavailable |= header.unavailable
        unavailable = {s: reason for s, reason in unavailable.items() if s not in header.targets}
    manifest = {(p.suite, p.case, p.target): p for header in headers for p in header.manifest}
    return first.model_copy(
        update={
            "targets": {spec: info for header in headers for spec, info in header.targets.items()},
            "unavailable": unavailable,
            "suites": {suite: digest for header in headers for suite, digest in header.suites.items()},
            "paths": {suite: path for header in headers for suite, path in header.paths.items()},
            "manifest": tuple(manifest.values()),
            "commit": headers[-1].commit,
            "harness": headers[-1].harness,
            "sources": headers[-1].sources,
            "environment": headers[-1].environment,
            "resumed_from": next((h.resumed_from for h in headers if h.resumed_from), None),
        }
    )
