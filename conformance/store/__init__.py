"""The history of runs, in a database: what it answers with. `Store`, which is asked, is in `.history`.

`tables` the schema · `database` reaching it · `rows` results and items as rows · `history` the rest.
This module imports no SQLAlchemy, which takes long to load.
"""

from __future__ import annotations

from conformance.errors import ConformanceError
from conformance.gates.decision import Decision
from conformance.records import Record
from conformance.results import Verdict

Key = tuple[str, str, str]
"""Suite, case, target."""


class StoreError(ConformanceError):
    """The history database cannot be used, or a run does not fit into it."""


class UnknownRunError(StoreError):
    """The database holds no such run."""


class OtherVersionError(StoreError):
    """A stored run or result is of another version of the harness, and cannot be read by this one."""


class MisfitError(StoreError):
    """A run cannot be kept: it holds what not every database keeps."""


class RunConflictError(StoreError):
    """Another run of the same id is stored."""


class Merged(Record):
    """What merging one run changed."""

    run_id: str
    added: int
    """Results that were not there."""
    updated: int
    """Results that a later line replaced."""
    unchanged: int
    newer: bool
    """Whether the copy was newer than what was stored of the run."""
    torn: str = ""
    """What was wrong with the file's last line, if it was cut."""

    @property
    def changed(self) -> bool:
        """Whether the database is another one than before."""
        return bool(self.newer or self.added or self.updated)


class StoredRun(Record):
    """One run, without its results."""

    run_id: str
    started: str
    harness: str
    commit: str | None
    finished: str | None
    """None where the run did not come to its end."""
    exit_code: int | None
    planned: int
    counts: dict[Verdict, int]
    cell: str | None = None
    """Of the matrix; None outside it."""


class StoredVerdict(Record):
    """A result that counts in its run, and where it comes from."""

    run_id: str
    started: str
    harness: str
    commit: str | None
    suite: str
    case: str
    target: str
    kind: str
    area: str
    verdict: Verdict
    digest: str
    """Of the case."""
    cell: str | None = None
    """Of the matrix; None outside it."""

    @property
    def key(self) -> Key:
        """Identity inside a run."""
        return (self.suite, self.case, self.target)


class StorePoint(Record):
    """A case on a target in one run."""

    verdict: StoredVerdict
    decision: Decision | None
    """Of accuracy cases."""
    outcomes: dict[str, int]
    """Items by outcome class, of accuracy cases."""


class Change(Record):
    """A verdict that differs between two runs; None where a run has no result."""

    suite: str
    case: str
    target: str
    before: Verdict | None
    after: Verdict | None
    edited: bool
    """Both judged the case, and it was edited in between."""
