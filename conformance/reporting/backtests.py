"""What the dashboard shows of backtests: faults by what became of them, each with its proof."""

from __future__ import annotations

from conformance.backtests import STATES, BacktestResult, Findings
from conformance.reporting.view import Case, Site


class BacktestsView:
    """Backtests.

    Args:
        findings: What `conformance backtest` wrote.
        site: The run beside which they are shown, for links.
    """

    def __init__(self, findings: Findings, site: Site) -> None:
        self._cases = {case.address: case for case in site.cases}
        self.states: dict[str, list[BacktestResult]] = {
            state: [found for found in findings.backtests if found.state == state]
            for state in STATES
            if any(found.state == state for found in findings.backtests)
        }
        self.slugs = {state: state.replace(" ", "-") for state in STATES}
        self.unreached = findings.not_reachable

    @property
    def by_reason(self) -> dict[str, list[str]]:
        """Ids that have no backtest, by the reason."""
        found: dict[str, list[str]] = {}
        for catalogue_id, reason in self.unreached.items():
            found.setdefault(reason, []).append(catalogue_id)
        return found

    def case_of(self, found: BacktestResult) -> Case | None:
        """The case in the run of this dashboard, if it is there."""
        return self._cases.get(found.case)
