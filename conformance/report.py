"""The dashboard: HTML pages made from a run, which `write_site` puts into a folder.

The pages work from a folder, without JavaScript, and ask for nothing outside it. The service has them by
`make_pages`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from conformance import __version__, resources
from conformance.backtests import Findings
from conformance.comparison import Comparison
from conformance.errors import ConformanceError
from conformance.faults.record import FaultsFile
from conformance.history import Ladder
from conformance.loading import LoadedSuite
from conformance.reporting.accuracy import AccuracyView, History
from conformance.reporting.backtests import BacktestsView
from conformance.reporting.cells import MatrixView
from conformance.reporting.compared import ComparisonView
from conformance.reporting.faults import FaultsView
from conformance.reporting.ladders import views
from conformance.reporting.pages import Extras, Pages
from conformance.reporting.runs import RunsView
from conformance.reporting.trials import TrialsView
from conformance.reporting.view import Site
from conformance.results import Run
from conformance.store import StoredRun
from conformance.trials.record import TrialsFile

MARKER = ".conformance-site.json"
"""A folder with this file in it was written here, and may be replaced."""


class ReportError(ConformanceError):
    """The dashboard cannot be written."""


def make_pages(
    run: Run,
    suites: Iterable[LoadedSuite] = (),
    *,
    ladders: Iterable[Ladder] = (),
    backtests: Findings | None = None,
    history: History | None = None,
    cells: Iterable[Run] = (),
    left_out: Sequence[str] = (),
    faults: FaultsFile | None = None,
    trials: TrialsFile | None = None,
    comparison: Comparison | None = None,
    runs: Sequence[StoredRun] = (),
    served: bool = False,
) -> Pages:
    """The pages of a run's dashboard, whether they are written or served; arguments as for `write_site`.

    With `served`, the list of runs links to each run's own dashboard.
    """
    site = Site(run, suites)
    shown = BacktestsView(backtests, site) if backtests is not None else None
    matrix = MatrixView(cells, site, left_out)
    return Pages(
        site,
        views(ladders, site),
        shown,
        AccuracyView(site, history),
        matrix if matrix.entries or left_out else None,
        Extras(
            faults=FaultsView(faults, site) if faults is not None else None,
            trials=TrialsView(trials, site) if trials is not None else None,
            comparison=ComparisonView(comparison, site, matrix) if comparison is not None else None,
            runs=RunsView(
                runs,
                run.header.run_id,
                served=served,
                cells={cell.run.header.run_id: cell.page for cell in matrix.entries},
            )
            if runs
            else None,
        ),
    )


def write_site(
    run: Run,
    out: Path,
    suites: Iterable[LoadedSuite] = (),
    *,
    ladders: Iterable[Ladder] = (),
    backtests: Findings | None = None,
    history: History | None = None,
    cells: Iterable[Run] = (),
    left_out: Sequence[str] = (),
    faults: FaultsFile | None = None,
    trials: TrialsFile | None = None,
    comparison: Comparison | None = None,
    runs: Sequence[StoredRun] = (),
) -> Path:
    """Write the dashboard of a run.

    The pages are made in a folder beside `out` that takes its place once it is complete, so readers
    see the old site or the new one.

    Args:
        run: The run, finished or not.
        out: Folder of the site. It is made, or replaced if it holds an older site.
        suites: Suites as loaded now, for their descriptions, negative controls and accepted answers.
            Facts of a case are used only if the case is still the one that ran.
        ladders: Release ladders that get a page beside the run; the last one of a target counts.
        backtests: Backtests that get a page beside the run.
        history: Results of accuracy cases over time; None for those of the run alone.
        cells: Runs of cells of the matrix, which get a map beside the run.
        left_out: Sentences for that map, on cells that are not among them.
        faults: Record of faults that gets a page beside the run.
        trials: Record of trials that gets a page beside the run.
        comparison: What changed since the runs before.
        runs: Of the history, for a list.

    Returns:
        The folder.

    Raises:
        ReportError: `out` is a file, holds something else than a site, or cannot be written.
        RunFileError: one of `cells` is a run of no cell.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100  # `resolve` would follow a link that is about to be replaced
    _check_replaceable(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
        try:
            pages = make_pages(
                run,
                suites,
                ladders=ladders,
                backtests=backtests,
                history=history,
                cells=cells,
                left_out=left_out,
                faults=faults,
                trials=trials,
                comparison=comparison,
                runs=runs,
            )
            _write_pages(pages, run, new)
            _check_replaceable(out)
            _put_in_place(new, out)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise ReportError(f"{out}: the dashboard cannot be written: {error}") from error
    return out


def check_site(out: Path) -> None:
    """Refuse a folder that `write_site` could not write, before a long run.

    Raises:
        ReportError: as `write_site`.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100  # as in `write_site`
    _check_replaceable(out)
    parent = next(parent for parent in out.parents if parent.exists())
    if not parent.is_dir():
        raise ReportError(f"{out}: {parent} is no folder; name another folder for the dashboard")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ReportError(f"{out}: {parent} cannot be written; name another folder for the dashboard")


def _write_pages(pages: Pages, run: Run, folder: Path) -> None:
    for path, html in pages:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html, encoding="utf-8")
    shutil.copytree(resources.assets_dir(), folder / "assets")
    marker = {"written_by": "conformance report", "version": __version__, "run_id": run.header.run_id}
    (folder / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    # `mkdtemp` makes a private folder; a site is for whoever may read its surroundings.
    folder.chmod(0o755)


def _check_replaceable(out: Path) -> None:
    if out.is_symlink():
        raise ReportError(f"{out}: is a symbolic link; name the folder that it points to, or another one")
    if not out.exists():
        return
    if not out.is_dir():
        raise ReportError(f"{out}: is a file; name a folder for the dashboard")
    if any(out.iterdir()) and not (out / MARKER).is_file():
        raise ReportError(
            f"{out}: holds files that are not a dashboard (there is no {MARKER} in it), and is left alone; "
            "name a new folder, or empty this one"
        )


def _put_in_place(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    kept = old / out.name
    out.rename(kept)
    try:
        new.rename(out)
    except OSError:
        kept.rename(out)
        old.rmdir()
        raise
    shutil.rmtree(old)
