"""What the dashboard shows of the runs before: what broke, what was mended, what is new."""

from __future__ import annotations

from dataclasses import dataclass

from conformance.comparison import STATES, Compared, Comparison, State
from conformance.reporting.cells import MatrixView, status_of_cell
from conformance.reporting.signs import Status
from conformance.reporting.view import Site
from conformance.results import Verdict

_LISTED: tuple[State, ...] = ("broken", "still-broken", "unjudged", "mended", "new", "gone", "changed")
"""States whose cases are listed; the rest is counted."""
WORDS: dict[State, str] = {
    "broken": "broken",
    "still-broken": "still broken",
    "unjudged": "not judged any more",
    "mended": "mended",
    "new": "new",
    "gone": "gone",
    "changed": "changed",
    "same": "as before",
}


@dataclass(frozen=True)
class ComparedEntry:
    """One case, with where it is shown."""

    compared: Compared
    link: str | None
    """From the site's root; None where this dashboard has no page of it."""

    @property
    def before(self) -> Status:
        """Sign of the earlier result."""
        return _status(self.compared.before)

    @property
    def after(self) -> Status:
        """Sign of this one."""
        return _status(self.compared.after)

    @property
    def where(self) -> str:
        """Target, or cell."""
        return self.compared.cell or self.compared.target


class ComparisonView:
    """A comparison.

    Args:
        comparison: It.
        site: The run beside which it is shown.
        matrix: Its cells.
    """

    def __init__(self, comparison: Comparison, site: Site, matrix: MatrixView) -> None:
        self.before = comparison.before
        self.counts = comparison.counts
        self.meanings = STATES
        self.words = WORDS
        self._entries = {(e.case.address, e.target.spec): e.link for e in site.entries}
        self._cells = {cell.id: cell.page for cell in matrix.entries}
        self.listed = {
            state: [ComparedEntry(found, self._link(found)) for found in comparison.of(state)]
            for state in _LISTED
            if state in self.counts
        }

    def _link(self, found: Compared) -> str | None:
        if found.cell is not None:
            return self._cells.get(found.cell)
        return self._entries.get((found.address, found.target))


def _status(verdict: Verdict | None) -> Status:
    return status_of_cell("not run" if verdict is None else verdict) if verdict != "skip" else "skip"
