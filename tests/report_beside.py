"""What a dashboard shows beside a run, with hostile text wherever text can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conformance import sealed
from conformance.backtests import BacktestResult, Findings
from conformance.comparison import compare
from conformance.faults import record
from conformance.faults.record import FaultsFile
from conformance.history import Ladder
from conformance.report import write_site
from conformance.results import Run
from conformance.store.history import Store
from conformance.trials.record import TrialsFile
from tests.run_fixtures import wide_run
from tests.test_report_extras import changed, record_of, trials_of
from tests.test_report_matrix import HOSTILE, RUNS
from tests.test_report_releases import ROWS, ladder_of

PAGES = {
    "matrix": "matrix.html",
    "ladder": "ladders/toy.html",
    "release": "ladders/toy/2-0.html",
    "faults": "faults.html",
    "fault": "faults/label-kept.html",
    "trials": "trials.html",
    "comparison": "comparison.html",
    "alone": "alone.html",
    "runs": "runs.html",
    "backtests": "backtests.html",
}
"""Kind to page."""


@dataclass(frozen=True)
class Beside:
    """Everything that stands beside a run."""

    faults: FaultsFile
    trials: TrialsFile
    ladder: Ladder
    backtests: Findings
    cells: list[Run]

    def files(self, folder: Path) -> list[str]:
        """Write what `conformance serve` takes as files; its options for them."""
        record.write(self.faults, folder / "faults.json")
        sealed.write(self.trials, folder / "trials.json")
        (folder / "ladder.json").write_text(self.ladder.model_dump_json())
        (folder / "backtests.json").write_text(self.backtests.model_dump_json())
        names = {"--faults": "faults", "--trials": "trials", "--ladder": "ladder", "--backtests": "backtests"}
        return [word for option, name in names.items() for word in (option, str(folder / f"{name}.json"))]


def run_of_three() -> Run:
    """A run in which some cases are failed by one of three targets alone."""
    return changed(wide_run(3), "run-of-tonight", 3, ["fail", "fail", "pass", "skip", "pass"])


def beside(run: Run) -> Beside:
    """For a run, whose cases some of it is about."""
    faults = record_of(run)
    worst = [found.model_copy(update={"title": HOSTILE, "module": HOSTILE}) for found in faults.faults]
    one = BacktestResult(
        id=HOSTILE, title=HOSTILE, elsewhere=HOSTILE, case=HOSTILE, last_bad=HOSTILE, first_good=HOSTILE,
        state="missed", proof=(HOSTILE,),
    )  # fmt: skip
    return Beside(
        faults=faults.model_copy(update={"faults": tuple(worst)}),
        trials=trials_of(run),
        ladder=ladder_of(ROWS | {HOSTILE: "F...F", f"parser/{HOSTILE}": "FFFFF"}),
        backtests=Findings(backtests=(one,), not_reachable={HOSTILE: HOSTILE}),
        cells=RUNS,
    )


def write_beside(run: Run, folder: Path, history: Path) -> Path:
    """A site with all of it.

    Args:
        run: The run.
        folder: Of the site.
        history: A database that is made.
    """
    found = beside(run)
    with Store(f"sqlite:///{history}", create=True) as store:
        for stored in (run, *found.cells):
            store.merge(stored, lines=len(stored.results))
        comparison, runs = compare(store, [run, *found.cells]), store.runs()
    return write_site(
        run,
        folder,
        faults=found.faults,
        trials=found.trials,
        ladders=[found.ladder],
        backtests=found.backtests,
        cells=found.cells,
        comparison=comparison,
        runs=runs,
    )
