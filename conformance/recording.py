"""What one process of a pytest session keeps about its suite items: run file and exit code.

It lives in the process that the user started. Under pytest-xdist that is the controller, which
collects nothing itself: it learns the items from the workers' node ids and the results from their
reports.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conformance
from conformance import fingerprint, resources, results, runfile, runner
from conformance.discovery import looks_like_suite
from conformance.loading import LoadedCase, LoadedSuite, load_suite
from conformance.results import CellRecord, Footer, Header, PlannedCase, Preflight, Result, Run, Verdict
from conformance.targets.protocol import TargetInfo

NODE_ID = re.compile(r"^(?P<path>.+\.yaml)::(?P<case>[a-z0-9-]+)\[(?P<target>.+)\]$", re.DOTALL)
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Planned:
    """A suite item before it has run."""

    loaded: LoadedCase
    target: str

    @property
    def entry(self) -> PlannedCase:
        """Its line in the manifest."""
        return runner.plan(self.loaded, self.target)


def planned_item(root: Path, node_id: str) -> Planned | None:
    """The case and target that a node id names, or None when it is no suite item's."""
    match = NODE_ID.match(node_id)
    if match is None or not looks_like_suite(root / match["path"]):
        return None
    return Planned(load_suite(root / match["path"]).case(match["case"]), match["target"])


@dataclass
class Recording:
    """A run as it happens."""

    argv: tuple[str, ...]
    unavailable: dict[str, str]
    path: Path | None = None
    resume: bool = False
    listeners: list[Callable[[Result], None]] = field(default_factory=list)
    """Called after a result is safe on disk."""
    preflight: tuple[Preflight, ...] = ()
    """For the header; set before anything is planned."""
    cell: CellRecord | None = None
    """The cell of the matrix that this is a run of."""

    def __post_init__(self) -> None:
        self.planned: dict[str, Planned] = {}
        self.verdicts: dict[Key, Verdict] = {}
        """Of this session."""
        self._earlier: Run | None = None
        self._before: dict[Key, Verdict] = {}
        self._manifest: set[Key] = set()
        self._targets: dict[str, TargetInfo] = {}
        self._started = time.monotonic()
        self._header: Header | None = None
        self._writer: runfile.RunWriter | None = None
        if self.path is not None:
            # Read first: a file that is no run file is not touched.
            self._earlier = runfile.read(self.path) if self.resume else None
            self._writer = runfile.RunWriter(self.path, resume=self.resume)
            self._run_id = self._earlier.header.run_id if self._earlier is not None else new_run_id()

    def plan(self, items: Iterable[tuple[str, Planned]]) -> None:
        """State what the run sets out to do; the first call counts."""
        if self.planned:
            return
        self.planned = dict(items)
        self._manifest = {self._key(p) for p in self.planned.values()}
        if self._writer is None or not self.planned:
            return
        suites = {p.loaded.suite.suite.id: p.loaded.suite for p in self.planned.values()}
        self._header = Header(
            run_id=self._run_id,
            started=_now(),
            harness=conformance.__version__,
            commit=fingerprint.git_commit(),
            sources=runfile.harness_digest(),
            argv=tuple(fingerprint.redact(argument) for argument in self.argv),
            unavailable=self.unavailable,
            environment=fingerprint.environment(),
            suites={name: suite.digest for name, suite in suites.items()},
            paths={name: p for name, suite in suites.items() if (p := self._path_of(suite))},
            manifest=tuple(p.entry for p in self.planned.values()),
            preflight=self.preflight,
            resumed_from=self._run_id if self.resume else None,
            cell=self.cell,
        )
        self._writer.write(self._header)
        if self._earlier is not None:
            merged = runfile.merge([self._earlier.header, self._header])
            self._manifest = {(p.suite, p.case, p.target) for p in merged.manifest}
            whole = self._earlier.model_copy(update={"header": merged})
            self._before = {key: result.verdict for key, result in whole.latest().items()}

    def record(self, result: Result, info: TargetInfo | None, *, stored: bool) -> None:
        """Keep one result.

        Args:
            result: It.
            info: The target that gave it, if it could be asked.
            stored: It stands in the run file already.
        """
        if self._writer is not None and self._header is not None:
            if info is not None and self._targets.get(result.target) != info:
                self._targets[result.target] = info
                nothing: dict[str, Any] = {
                    "manifest": (),
                    "preflight": (),
                    "suites": {},
                    "paths": {},
                    "unavailable": {},
                }
                added = nothing | {"targets": {result.target: info}}
                self._writer.write(self._header.model_copy(update=added))
            if not stored:
                self._writer.write(result)
        self.verdicts[result.key] = result.verdict
        for listener in self.listeners:
            listener(result)

    def crashed(self, node_id: str, reason: str) -> None:
        """Keep the verdict `error` for an item whose process died under it."""
        planned = self.planned.get(node_id)
        if planned is None:
            return
        repeat = runner.repeat_line(planned.loaded, planned.target)
        self.record(runner.failed_result(planned.entry, repeat, reason), None, stored=False)

    @property
    def complete(self) -> bool:
        """Whether every item that was planned, now or in a session that this one resumes, has a verdict."""
        if not self.planned or any(self._key(p) not in self.verdicts for p in self.planned.values()):
            return False
        return self._manifest <= self.whole.keys()

    @property
    def whole(self) -> dict[Key, Verdict]:
        """The latest verdicts of the whole run: of earlier sessions, and of this one."""
        return self._before | self.verdicts

    def exit_code(self) -> int:
        """Exit code of the whole run so far; 3 where it would be 0 and planned cases have not run."""
        code = results.exit_code(list(self.whole.values()))
        return 3 if code == 0 and not self.complete else code

    def counts(self) -> dict[str, dict[str, int]]:
        """Target to verdict to number, in the whole run."""
        counts: dict[str, Counter[str]] = {}
        for (_, _, target), verdict in self.whole.items():
            counts.setdefault(target, Counter())[verdict] += 1
        return {target: dict(counter) for target, counter in counts.items()}

    def finish(self, exit_code: int) -> None:
        """Write the footer if the run is complete, and close the file; one without a line is removed."""
        if self._writer is None:
            return
        if self._header is not None and self.complete:
            self._writer.write(
                Footer(
                    finished=_now(),
                    duration=round(time.monotonic() - self._started, 3),
                    counts=self.counts(),
                    exit_code=exit_code,
                )
            )
        self._writer.close()
        if self._header is None and not self.resume:
            self._writer.path.unlink()

    def _path_of(self, suite: LoadedSuite) -> str | None:
        """A suite's file from the run file's folder; None for bundled suites."""
        if self.path is None or suite.root == resources.suites_dir():
            return None
        return Path(os.path.relpath(suite.path, self.path.parent.resolve())).as_posix()

    @staticmethod
    def _key(planned: Planned) -> Key:
        return (planned.loaded.suite.suite.id, planned.loaded.case.id, planned.target)


def new_run_id() -> str:
    """Sortable by time, unique in practice: `20261121T034812Z-9f3a1c`."""
    moment = dt.datetime.now(dt.UTC)
    return f"{moment:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
