"""Runs of cells in the history: told apart from each other and from other runs; older databases learn it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text, update

from conformance.results import CellRecord, Verdict
from conformance.store import StoreError
from conformance.store.history import Store
from conformance.store.tables import VERSION, VersionRow
from tests.history_runs import CASE, SUITE, footer, header, result, run_of
from tests.test_store import content, fresh, store  # noqa: F401  # fixtures


def cell(name: str) -> CellRecord:
    return CellRecord(id=f"fake+{name}", axes={"target": "fake", "checkpoint": name})


def merge(into: Store, folder: Path, run_id: str, day: int, name: str | None, verdict: Verdict) -> None:
    head = header(run_id, f"2026-11-{day:02}T02:00:00+00:00", cell=cell(name) if name is not None else None)
    path = folder / f"{run_id}.jsonl"
    run_of(path, head, result(CASE, verdict, kind="generation"), footer())
    into.merge_file(path)


@pytest.fixture
def cells(store: Store, tmp_path: Path) -> Store:  # noqa: F811
    for number, (name, verdict) in enumerate(
        [(None, "pass"), ("a", "fail"), ("b", "error"), (None, "fail"), ("a", "pass")], 1
    ):
        merge(store, tmp_path, f"r{number}", number, name, verdict)  # type: ignore[arg-type]
    return store


def test_the_newest_result_is_that_of_each_cell(cells: Store) -> None:
    found = {(v.cell, v.run_id, v.verdict) for v in cells.latest()}
    assert found == {(None, "r4", "fail"), ("fake+a", "r5", "pass"), ("fake+b", "r3", "error")}


def test_a_series_is_of_all_of_one_cell_or_of_none(cells: Store) -> None:
    assert [v.run_id for v in cells.series(SUITE, CASE)] == ["r1", "r2", "r3", "r4", "r5"]
    assert [v.run_id for v in cells.series(SUITE, CASE, cell="fake+a")] == ["r2", "r5"]
    assert [v.run_id for v in cells.series(SUITE, CASE, cell="")] == ["r1", "r4"]
    assert [run.cell for run in cells.runs()] == ["fake+a", None, "fake+b", "fake+a", None]


def test_merging_the_run_of_a_cell_again_changes_nothing(cells: Store, tmp_path: Path) -> None:
    before = content(cells)
    for number in (5, 2, 3):
        assert not cells.merge_file(tmp_path / f"r{number}.jsonl").changed
    assert content(cells) == before
    assert cells.run("r2").header.cell == cell("a")


def make_old(url: str) -> None:
    """What the first schema was."""
    with Store(url) as opened, opened._database.writing() as session:
        session.execute(text("ALTER TABLE conformance_runs DROP COLUMN cell"))
        session.execute(update(VersionRow).values(version=1))
        session.execute(text("ALTER TABLE conformance_version DROP COLUMN revision"))


def test_an_older_database_is_brought_up_to_date_by_merging(fresh, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    url = fresh()
    with Store(url, create=True) as opened:
        merge(opened, tmp_path, "r1", 1, None, "pass")
    make_old(url)
    with pytest.raises(StoreError, match=r"schema 1, this one has 2\); `conformance store merge RUN` brings"):
        Store(url)
    with Store(url, create=True) as opened:
        merge(opened, tmp_path, "r2", 2, "a", "fail")
        assert [(run.run_id, run.cell) for run in opened.runs()] == [("r2", "fake+a"), ("r1", None)]
    with Store(url) as opened, opened._database.reading() as session:
        assert session.get_one(VersionRow, 1).version == VERSION
    Store(url, create=True).close()  # a second time there is nothing to do
