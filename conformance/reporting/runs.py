"""What the dashboard shows of the history: a list of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from conformance.reporting.signs import SIGNS, Status
from conformance.store import StoredRun

MOST = 500
"""Runs of the list; the newest."""


@dataclass(frozen=True)
class RunRow:
    """One run."""

    run: StoredRun
    link: str | None
    """Its dashboard; None where that is not here."""
    own: bool
    """Whether it is the run of this dashboard."""
    cell: str | None = None
    """Page of its cell in this dashboard, from the site's root."""

    @property
    def counts(self) -> dict[Status, int]:
        """Its results by verdict, and what it planned and did not come to."""
        tally: dict[Status, int] = {name: count for name, count in self.run.counts.items() if count}
        missing = self.run.planned - sum(tally.values())
        if missing > 0:
            tally["not-run"] = missing
        return {status: tally[status] for status in SIGNS if status in tally}


class RunsView:
    """The newest runs of a history.

    Args:
        runs: All, newest first.
        own: Id of the run of this dashboard.
        served: Whether every run has a dashboard at `/runs/ID/`.
        cells: Pages of the runs of cells that this dashboard shows, from the site's root, by run.
    """

    def __init__(
        self, runs: Sequence[StoredRun], own: str, *, served: bool, cells: Mapping[str, str] | None = None
    ) -> None:
        self.served = served
        pages = cells or {}
        self.total = len(runs)
        self.rows = [
            RunRow(
                run,
                f"/runs/{quote(run.run_id, safe='')}/" if served else None,
                run.run_id == own,
                pages.get(run.run_id),
            )
            for run in runs[:MOST]
        ]
