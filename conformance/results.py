"""Run files: one JSON Lines file per run, one fsynced line per result.

Line 1 is a `Header`, then one `Result` per case and target, last a `Footer`. A run that was killed
has no footer and keeps every line it wrote; a torn last line is reported and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from conformance.gates.decision import Decision
from conformance.records import Record
from conformance.scoring import Sheet, SheetHeader
from conformance.targets.protocol import Chunking, ParseResult, TargetInfo

Verdict = Literal["pass", "fail", "xfail", "xpass", "skip", "inconclusive", "error", "timeout"]

CellVerdict = Literal["pass", "xfail", "inconclusive", "fail", "xpass", "timeout", "error", "not run"]
"""What a cell of the matrix comes to: the worst of its verdicts; `not run` where all cases are skipped."""

SCHEMA_VERSION = 1


class Problem(Record):
    """One broken rule."""

    rule: str
    """Short name: `expected`, `stream-equals-whole`, `marker-leak`, `indices`, `arguments-json`,
    `nothing-lost`, `raised`, `prompt`, `prompt-ids`, …"""
    message: str
    """One sentence for people."""
    expected: Any = None
    got: Any = None
    chunking: Chunking | None = None
    """Smallest chunking that breaks the rule, for streamed problems."""
    chunks: tuple[str, ...] | None = None
    """The text of those chunks."""


class StreamEvidence(Record):
    """How far streaming was explored for a case."""

    kind: Literal["certified", "sampled", "unsupported"]
    unit: Literal["tokens", "characters"] = "tokens"
    pieces: int = 0
    chunkings: str = "0"
    """How many chunkings the verdict covers, as a decimal string."""
    states: int = 0
    reason: str = ""
    """Why it is not a certificate."""


class ModuleError(Record):
    """How far one module's output is from the oracle's."""

    module: str
    relative: float | None
    """||a - b|| / ||b||; None where the two cannot be compared. Absolute where the oracle's is zero."""
    maximum: float | None
    """max|a - b| / max|b|."""
    relative_limit: float
    maximum_limit: float
    rule: Literal["", "missing-tensor", "shape", "not-finite", "diverges"] = ""
    """The rule that it breaks; empty where the two agree."""
    worst: str = ""
    """Where the largest difference is: `row 0, token 17`."""
    note: str = ""
    """Why the two cannot be compared."""


class ParityEvidence(Record):
    """The modules of a forward pass, compared with an oracle's in the order in which they ran."""

    oracle: str
    """Spec of the oracle."""
    config: str
    """Name of the configuration in the suite."""
    dtype: str
    rows: tuple[int, ...]
    """Tokens of each row."""
    prefill: int | None = None
    effective: dict[str, str] = Field(default_factory=dict)
    """What the target says it ran."""
    oracle_effective: dict[str, str] = Field(default_factory=dict)
    modules: tuple[ModuleError, ...] = ()

    @property
    def first(self) -> ModuleError | None:
        """The first module that differs."""
        return next((module for module in self.modules if module.rule), None)


class AccuracyEvidence(Record):
    """The scored answers of a target to a task, and what the gate made of them."""

    sheet: Sheet
    """Every item with its prompt and answer; never shortened."""
    decision: Decision | None = None
    """None where the gate refused to compare; the result's reason says why."""
    reference: SheetHeader | None = None
    """Of the stored answers that it is paired with."""


class Shortened(Record):
    """A text or list that was too long to be kept whole."""

    where: str
    """Place in the result: `problems.0.got.content`."""
    length: int
    """Characters, or items, before it was shortened."""
    sha256: str
    """Of the whole: of the text in UTF-8, or of the list as JSON."""


class Evidence(Record):
    """What was sent and what came back; the case page shows it."""

    input: str = ""
    """The output to parse, or the messages as JSON."""
    prompt: str = ""
    expected: Any = None
    got: Any = None
    stream: StreamEvidence | None = None
    policy: str | None = None
    """Name of the accepted answer that the target gave; `unlisted` if none."""
    spans: Any = None
    parity: ParityEvidence | None = None
    accuracy: AccuracyEvidence | None = None


class Result(Record):
    """Verdict of one case on one target."""

    type: Literal["result"] = "result"
    suite: str
    case: str
    target: str
    """The target's spec, such as `vllm@0.32.0`."""
    kind: str
    area: str
    verdict: Verdict
    reason: str = ""
    """Why it was skipped, expected to fail, or errored; one line."""
    problems: tuple[Problem, ...] = ()
    evidence: Evidence = Evidence()
    shortened: tuple[Shortened, ...] = ()
    """What was too long to be kept whole."""
    expectation: str | None = None
    """Where the expectation stands: `file:line`."""
    own_verdict: Verdict | None = None
    """The check's own verdict, where an expectation spoke about the case."""
    own_reason: str = ""
    """The reason that came with it."""
    stderr: str = ""
    """Tail of the worker's standard error, for `error` and `timeout`."""
    duration: float = 0.0
    """Seconds."""
    digest: str
    """Digest of the case as loaded; `--resume` reuses a result only under the same digest."""
    repeat: str
    """One shell line that repeats this case on this target."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity inside a run."""
        return (self.suite, self.case, self.target)


class PlannedCase(Record):
    """One entry of the manifest: what the run set out to do. Denominators come from here."""

    suite: str
    case: str
    target: str
    kind: str
    area: str
    title: str
    source: tuple[str, ...]
    digest: str


class Preflight(Record):
    """One cheap question to a server before its suites run."""

    name: str
    ok: bool
    detail: str


class CellRecord(Record):
    """The cell of the matrix that a run is of."""

    id: str
    axes: dict[str, str]
    """Every axis to its value; the axes `target` and `checkpoint` are among them."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What it imposed on its cases."""


class Header(Record):
    """First line of a run file: who ran what, where."""

    type: Literal["header"] = "header"
    schema_version: int = SCHEMA_VERSION
    run_id: str
    started: str
    """ISO 8601, UTC."""
    harness: str
    """Version of this package."""
    commit: str | None = None
    """Git commit of the working tree, with `+dirty` when it had changes."""
    sources: str = ""
    """Digest of the source files of the harness and of the bundled implementation."""
    argv: tuple[str, ...] = ()
    targets: dict[str, TargetInfo] = Field(default_factory=dict)
    """By spec."""
    unavailable: dict[str, str] = Field(default_factory=dict)
    """Targets that could not be used: spec to reason."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Allow-listed facts: Python, platform, CPU count, package versions."""
    suites: dict[str, str] = Field(default_factory=dict)
    """Suite id to the digest of its file."""
    paths: dict[str, str] = Field(default_factory=dict)
    """Suite id to its file, from the run file's folder; bundled suites are left out."""
    manifest: tuple[PlannedCase, ...] = ()
    preflight: tuple[Preflight, ...] = ()
    """What a probe asked first."""
    resumed_from: str | None = None
    cell: CellRecord | None = None
    """None outside the matrix."""


class Footer(Record):
    """Last line: the run came to its end."""

    type: Literal["footer"] = "footer"
    finished: str
    duration: float
    counts: dict[str, dict[str, int]]
    """Target spec to verdict to number."""
    exit_code: int


Line = Annotated[Header | Result | Footer, Field(discriminator="type")]


def exit_code(verdicts: list[Verdict]) -> int:
    """Exit code of a set of verdicts.

    2 when nothing was collected; 1 for any fail, xpass, error or timeout; else 3 for any
    inconclusive; else 0.
    """
    if not verdicts:
        return 2
    if any(v in ("fail", "xpass", "error", "timeout") for v in verdicts):
        return 1
    return 3 if "inconclusive" in verdicts else 0


class Run(Record):
    """A whole run file, read back."""

    header: Header
    results: tuple[Result, ...]
    footer: Footer | None = None
    torn: str = ""
    """What was wrong with the last line, if it was cut."""

    def latest(self) -> dict[tuple[str, str, str], Result]:
        """Results by key; a later line replaces an earlier one.

        A result of a case that has changed since, and is planned again, counts no more.
        """
        planned = {(p.suite, p.case, p.target): p.digest for p in self.header.manifest}
        return {r.key: r for r in self.results if planned.get(r.key, r.digest) == r.digest}


__all__ = [
    "SCHEMA_VERSION",
    "AccuracyEvidence",
    "CellRecord",
    "CellVerdict",
    "Evidence",
    "Footer",
    "Header",
    "Line",
    "ModuleError",
    "ParityEvidence",
    "ParseResult",
    "PlannedCase",
    "Problem",
    "Record",
    "Result",
    "Run",
    "Shortened",
    "StreamEvidence",
    "Verdict",
    "exit_code",
]
