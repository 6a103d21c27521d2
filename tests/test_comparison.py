"""Runs beside the history: what broke, what was mended, what is new, and since when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import runfile
from conformance.comparison import Comparison, compare
from conformance.results import CellRecord, Run, Verdict
from conformance.store.history import Store
from tests.history_runs import SUITE, footer, header, planned, result, write


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(f"sqlite:///{tmp_path}/history.sqlite", create=True) as opened:
        yield opened


def night(
    folder: Path,
    day: int,
    verdicts: dict[str, Verdict],
    *,
    cell: str | None = None,
    left: tuple[str, ...] = (),
) -> Path:
    """The run file of one night; `left` was planned and has no result."""
    results = [result(case, verdict, reason=f"reason {day}") for case, verdict in verdicts.items()]
    missing = [result(case) for case in left]
    name = f"run-{day}" + (f"-{cell}" if cell else "")
    head = header(
        name,
        f"2026-11-{day:02}T02:00:00+00:00",
        commit=f"c{day}",
        manifest=planned(*results, *missing),
        cell=CellRecord(id=cell, axes={}) if cell else None,
    )
    return write(folder / f"{name}.jsonl", head, *results, footer())


def compared(store: Store, *paths: Path) -> Comparison:
    return compare(store, [runfile.read(path) for path in paths])


def states(found: Comparison) -> dict[str, str]:
    return {entry.case: entry.state for entry in found.entries}


def test_each_state(store: Store, tmp_path: Path) -> None:
    before: dict[str, Verdict] = {
        "broken": "pass", "still-broken": "fail", "unjudged": "error", "mended": "timeout",
        "gone": "pass", "changed": "pass", "same": "xfail", "lost": "fail",
    }  # fmt: skip
    after: dict[str, Verdict] = {
        "broken": "fail", "still-broken": "error", "unjudged": "skip", "mended": "pass",
        "changed": "skip", "same": "xfail", "new": "pass", "new-and-broken": "xpass",
    }  # fmt: skip
    store.merge_file(night(tmp_path, 1, before))
    found = compared(store, night(tmp_path, 2, after, left=("lost", "never-seen")))
    assert states(found) == {
        "broken": "broken", "still-broken": "still-broken", "unjudged": "unjudged", "mended": "mended",
        "gone": "gone", "changed": "changed", "same": "same", "new": "new", "new-and-broken": "broken",
        "lost": "unjudged",
    }  # fmt: skip
    assert found.counts["broken"] == 2
    assert next(iter(found.counts)) == "broken"
    assert found.before == ("run-1",)
    (mended,) = found.of("mended")
    assert (mended.before, mended.after, mended.before_run) == ("timeout", "pass", "run-1")


def test_since_when_a_case_fails(store: Store, tmp_path: Path) -> None:
    history: list[dict[str, Verdict]] = [
        {"a": "fail", "b": "fail"},
        {"a": "pass", "b": "fail"},
        {"a": "fail", "b": "error"},
        {"a": "skip", "b": "skip"},  # says nothing, and ends nothing
        {"a": "fail", "b": "fail"},
    ]
    for day, verdicts in enumerate(history, 1):
        path = night(tmp_path, day, verdicts)
        store.merge_file(path)
    found = {entry.case: entry for entry in compared(store, path).entries}
    a, b = found["a"].since, found["b"].since
    assert a is not None
    assert b is not None
    assert (a.run_id, a.commit, a.last_good, a.good_commit) == ("run-3", "c3", "run-2", "c2")
    assert (b.run_id, b.last_good) == ("run-1", None)
    assert found["a"].state == "still-broken", "the skip of the fourth night has mended nothing"
    assert found["a"].reason == "reason 5"


def test_what_fails_is_told_until_it_is_judged_again(store: Store, tmp_path: Path) -> None:
    """Two skips in a row, and a gate that could not decide, hide and mend nothing."""
    history: list[dict[str, Verdict]] = [
        {"a": "fail", "gate": "fail", "idle": "pass"},
        {"a": "skip", "gate": "inconclusive", "idle": "skip"},
        {"a": "skip", "gate": "inconclusive", "idle": "skip"},
    ]
    for day, verdicts in enumerate(history, 1):
        path = night(tmp_path, day, verdicts)
        store.merge_file(path)
        found = compared(store, path)
    assert states(found) == {"a": "unjudged", "gate": "unjudged", "idle": "same"}
    assert {entry.before_run for entry in found.of("unjudged")} == {"run-1"}
    last = night(tmp_path, 4, {"a": "pass", "gate": "fail", "idle": "pass"})
    found = compared(store, last)
    assert states(found) == {"a": "mended", "gate": "still-broken", "idle": "changed"}
    (gate,) = found.of("still-broken")
    assert gate.since is not None
    assert (gate.since.run_id, gate.since.last_good) == ("run-1", None)


def test_a_night_that_lost_a_part_hides_nothing_from_the_next(store: Store, tmp_path: Path) -> None:
    store.merge_file(night(tmp_path, 1, {"a": "pass", "b": "pass"}))
    store.merge_file(night(tmp_path, 2, {"a": "pass"}))
    found = compared(store, night(tmp_path, 3, {"a": "pass", "b": "fail"}))
    assert states(found) == {"a": "same", "b": "broken"}
    assert found.before == ("run-2", "run-1")


def test_a_stored_run_is_not_compared_with_itself_or_with_later_ones(store: Store, tmp_path: Path) -> None:
    paths = [night(tmp_path, day, {"a": verdict}) for day, verdict in ((1, "pass"), (2, "fail"), (3, "pass"))]
    for path in paths:
        store.merge_file(path)
    assert states(compared(store, paths[1])) == {"a": "broken"}
    assert states(compared(store, paths[2])) == {"a": "mended"}
    assert states(compared(store, paths[0])) == {"a": "new"}


def test_cells_are_compared_with_themselves(store: Store, tmp_path: Path) -> None:
    store.merge_file(night(tmp_path, 1, {"a": "fail"}))
    store.merge_file(night(tmp_path, 1, {"a": "pass"}, cell="x+pp2"))
    found = compared(
        store, night(tmp_path, 2, {"a": "fail"}), night(tmp_path, 2, {"a": "fail"}, cell="x+pp2")
    )
    assert [(entry.cell, entry.state) for entry in found.entries] == [
        (None, "still-broken"),
        ("x+pp2", "broken"),
    ]


def test_what_was_not_asked_is_not_missed(store: Store, tmp_path: Path) -> None:
    other = result("elsewhere", suite="parser/other")
    head = header("run-0", "2026-10-30T02:00:00+00:00", manifest=planned(other))
    store.merge_file(write(tmp_path / "other.jsonl", head, other, footer()))
    assert states(compared(store, night(tmp_path, 2, {"a": "pass"}))) == {"a": "new"}


def test_an_edited_case_is_marked(store: Store, tmp_path: Path) -> None:
    store.merge_file(night(tmp_path, 1, {"a": "pass"}))
    run: Run = runfile.read(night(tmp_path, 2, {"a": "fail"}))
    results = tuple(r.model_copy(update={"digest": "d2"}) for r in run.results)
    manifest = tuple(p.model_copy(update={"digest": "d2"}) for p in run.header.manifest)
    edited = run.model_copy(
        update={"results": results, "header": run.header.model_copy(update={"manifest": manifest})}
    )
    (entry,) = compare(store, [edited]).entries
    assert entry.edited
    assert entry.address == f"{SUITE}::a"


def test_nothing_is_compared_with_nothing(store: Store) -> None:
    assert compare(store, []).entries == ()
