"""The newest result of every case on every target, kept until the database changes.

Those of cells of the matrix are left out: a case would have as many as it has cells.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from conformance.commands.output import AreaCounts
from conformance.results import Verdict
from conformance.service.models import CaseRow
from conformance.store import StoredVerdict
from conformance.store.history import Store


class Newest:
    """The newest results.

    Args:
        store: The database.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._revision = -1
        self._verdicts: tuple[StoredVerdict, ...] = ()

    def verdicts(self) -> tuple[StoredVerdict, ...]:
        """The results, in the order of their keys.

        Raises:
            StoreError: the database cannot be read.
        """
        with self._lock:
            # Asked first: a merge in between makes the next call read again.
            revision = self._store.revision()
            if revision != self._revision:
                self._verdicts = tuple(v for v in self._store.latest() if v.cell is None)
                self._revision = revision
            return self._verdicts

    def cases(self) -> list[CaseRow]:
        """The cases, with what became of each on its targets."""
        by_case: dict[tuple[str, str], list[StoredVerdict]] = {}
        for found in self.verdicts():
            by_case.setdefault((found.suite, found.case), []).append(found)
        rows = []
        for (suite, case), results in by_case.items():
            last = max(results, key=lambda result: (result.started, result.run_id))
            verdicts: dict[str, Verdict] = {result.target: result.verdict for result in results}
            rows.append(CaseRow(suite=suite, case=case, kind=last.kind, area=last.area, verdicts=verdicts))
        return rows

    def counts(self, target: str, area: str | None = None) -> Counter[Verdict] | None:
        """Number of a target's results by verdict; None if it has none.

        Args:
            target: Its spec.
            area: Only those of one area.
        """
        found = Counter(
            result.verdict
            for result in self.verdicts()
            if result.target == target and area in (None, result.area)
        )
        return found or None


def areas(results: Iterable[StoredVerdict]) -> tuple[AreaCounts, ...]:
    """Results counted by target and area."""
    cells: dict[tuple[str, str], Counter[Verdict]] = {}
    for result in results:
        cells.setdefault((result.target, result.area), Counter())[result.verdict] += 1
    return tuple(
        AreaCounts(target=target, area=area, counts=dict(sorted(counts.items())))
        for (target, area), counts in sorted(cells.items())
    )
