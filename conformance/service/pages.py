"""The dashboard of stored runs: the very pages that `conformance report` writes, rendered when asked for.

`/` is the newest run, `/runs/ID/` any other. What a run's pages are made from is kept until the database
changes. A path in a request is looked up among the paths of the pages, and never among files.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from conformance import resources
from conformance.backtests import Findings
from conformance.comparison import compare
from conformance.faults.record import FaultsFile
from conformance.history import Ladder
from conformance.loading import LoadedSuite
from conformance.report import make_pages
from conformance.reporting.pages import Render
from conformance.results import Run
from conformance.store import OtherVersionError, StoredRun, UnknownRunError
from conformance.store.history import Store
from conformance.trials.record import TrialsFile

KEPT = 4
"""Runs whose pages are kept. All results of a run are in memory for them."""
CELL_AGE = dt.timedelta(days=30)
"""A cell whose newest run is so much older than that of another is no longer one of the matrix's."""
_TYPES = {".html": "text/html", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Served:
    """A page or an asset."""

    content: str
    media_type: str


class Dashboard:
    """The pages of all runs of a database.

    Args:
        store: The database.
        suites: Suites as loaded now; see `conformance.report.write_site`.
        ladders: Release ladders that get a page beside every run.
        backtests: Backtests that get a page beside every run.
        faults: Record of faults that gets a page beside every run.
        trials: Record of trials that gets a page beside every run.
    """

    def __init__(
        self,
        store: Store,
        suites: Sequence[LoadedSuite] = (),
        *,
        ladders: Sequence[Ladder] = (),
        backtests: Findings | None = None,
        faults: FaultsFile | None = None,
        trials: TrialsFile | None = None,
    ) -> None:
        self._store = store
        self._suites = suites
        self._ladders = ladders
        self._backtests = backtests
        self._faults = faults
        self._trials = trials
        self._assets = {
            f"assets/{path.name}": Served(path.read_text("utf-8"), _TYPES[path.suffix])
            for path in resources.assets_dir().iterdir()
        }
        self._kept: OrderedDict[str, dict[str, Render]] = OrderedDict()
        self._cells: tuple[list[Run], list[str]] | None = None
        self._revision = -1
        # One run is read at a time; who waits for it holds no thread, so that queries are still answered.
        self._lock = asyncio.Lock()

    async def find(self, run_id: str | None, path: str) -> Served | None:
        """A page.

        Args:
            run_id: The run; None for the newest of no cell of the matrix.
            path: From the root of its dashboard; empty for the overview.

        Returns:
            The page; None where there is none at this path, or no run at all.

        Raises:
            UnknownRunError: there is no such run.
            StoreError: the database cannot be read.
        """
        if path in self._assets:
            return self._assets[path]
        async with self._lock:
            pages = await run_in_threadpool(self._pages, run_id)
        render = pages.get(path or "index.html")
        if render is None:
            return None
        return Served(await run_in_threadpool(render), _TYPES[".html"])

    def _pages(self, run_id: str | None) -> dict[str, Render]:
        revision = self._store.revision()
        if revision != self._revision:
            self._kept.clear()
            self._cells = None
            self._revision = revision
        if run_id is None:
            run_id = next((run.run_id for run in self._store.runs(limit=1, cells=False)), None)
            if run_id is None:
                return {}
        if run_id not in self._kept:
            self._kept[run_id] = self._made(run_id)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(run_id)
        return self._kept[run_id]

    def _made(self, run_id: str) -> dict[str, Render]:
        run = self._store.run(run_id)
        scored = {key for key, result in run.latest().items() if result.evidence.accuracy is not None}
        if self._cells is None:
            self._cells = self._read_cells()
        cells, left_out = self._cells
        pages = make_pages(
            run,
            self._suites,
            ladders=self._ladders,
            backtests=self._backtests,
            history=self._store.accuracy(besides=scored),
            cells=cells,
            left_out=left_out,
            faults=self._faults,
            trials=self._trials,
            comparison=compare(self._store, [run]),
            runs=self._store.runs(),
            served=True,
        )
        return dict(pages.each())

    def _read_cells(self) -> tuple[list[Run], list[str]]:
        """The newest run of each cell of the matrix, and what to say of those that are left out."""
        newest: dict[str | None, StoredRun] = {}
        for stored in self._store.runs(cells=True):
            newest.setdefault(stored.cell, stored)
        found, left_out, old = [], [], 0
        oldest = max(map(_moment, newest.values()), default=dt.datetime.max.replace(tzinfo=dt.UTC)) - CELL_AGE
        for stored in newest.values():
            if _moment(stored) < oldest:
                old += 1
                continue
            try:
                found.append(self._store.run(stored.run_id))
            except OtherVersionError as error:
                left_out.append(f"The newest run of the cell {stored.cell} is left out: {error}")
            except UnknownRunError:
                continue  # removed since it was listed
        if old:
            what = "cell is" if old == 1 else "cells are"
            left_out.append(f"{old} {what} left out: not run within {CELL_AGE.days} days of the newest.")
        return found, left_out


def _moment(run: StoredRun) -> dt.datetime:
    return dt.datetime.fromisoformat(run.started)
