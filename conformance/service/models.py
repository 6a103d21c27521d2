"""What queries are answered with, where it is not what the harness has a model for already."""

from __future__ import annotations

from typing import Literal

from conformance.commands.output import AreaCounts
from conformance.records import Record
from conformance.results import Verdict
from conformance.store import Change, StoredRun, StoredVerdict, StorePoint


class Refusal(Record):
    """Why a request was refused."""

    detail: str


class Health(Record):
    """Whether the service can answer."""

    status: Literal["ok", "unavailable"]
    """`unavailable`: the database cannot be read."""
    version: str
    """Of the harness."""
    ingest: bool
    """Runs can be sent here."""
    runs: int | None
    """Number of runs in the database; null where it cannot be read."""


class RunList(Record):
    """Some of the runs, newest first."""

    total: int
    """Runs that there are."""
    runs: tuple[StoredRun, ...]


class ResultList(Record):
    """Some of the results of a run."""

    total: int
    """Results that fit the query."""
    results: tuple[StoredVerdict, ...]


class ChangeList(Record):
    """Verdicts that differ between two runs."""

    run_id: str
    since: str
    """The run that it is compared with."""
    changes: tuple[Change, ...]


class CaseRow(Record):
    """A case, and its newest verdict on each target."""

    suite: str
    case: str
    kind: str
    area: str
    verdicts: dict[str, Verdict]
    """By target."""


class CaseList(Record):
    """Some of the cases."""

    total: int
    """Cases that fit the query."""
    cases: tuple[CaseRow, ...]


class Points(Record):
    """Some of the results of a case over time."""

    suite: str
    case: str
    total: int
    """Results that there are."""
    points: tuple[StorePoint, ...]
    """Oldest first; the portion is counted from the newest."""


class AccuracyList(Record):
    """The accuracy cases that there are."""

    series: tuple[StoredVerdict, ...]
    """The newest result of each on each target; `/history` has the others."""


class Summary(Record):
    """Targets x areas."""

    run_id: str | None
    """The run that it is of; null: of the newest result of every case on every target."""
    areas: tuple[AreaCounts, ...]
