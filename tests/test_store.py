"""The history database: merging loses nothing and repeats nothing; what is asked of it is right."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, update

from conformance import runfile
from conformance.errors import RunFileError
from conformance.results import CellRecord, Footer, Header, Result, Run
from conformance.store import MisfitError, StoreError, UnknownRunError, database, history
from conformance.store.history import Store
from conformance.store.tables import VERSION, Base, VersionRow
from tests.history_runs import (
    CASE,
    SUITE,
    accuracy_result,
    decision,
    footer,
    header,
    item,
    items_of,
    planned,
    result,
    run_of,
    sheet,
    write,
)
from tests.postgres import Server

Line = Header | Result | Footer


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Gives the URL of an empty database, each time it is called."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").fresh
    number = itertools.count()
    return lambda: f"sqlite:///{tmp_path}/history-{next(number)}.sqlite"


@pytest.fixture
def store(fresh: Callable[[], str]) -> Iterator[Store]:
    with Store(fresh(), create=True) as opened:
        yield opened


def content(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in the database, without the numbers that it gives to rows, or counts merges by."""
    found = {}
    with store._database.reading() as session:
        results = {
            row.id: (row.run_id, *row.key, row.digest) for row in session.scalars(select(_table("results")))
        }
        for mapper in Base.registry.mappers:
            unnamed = ("id", "result_id", "revision")
            names = [column.key for column in mapper.columns if column.key not in unnamed]
            rows = []
            for row in session.scalars(select(mapper.class_)):
                owner = results[row.result_id] if hasattr(row, "result_id") else ()
                rows.append((*owner, *(getattr(row, name) for name in names)))
            found[mapper.class_.__tablename__] = sorted(rows, key=repr)
    return found


def _table(name: str) -> Any:
    return next(m.class_ for m in Base.registry.mappers if m.class_.__tablename__ == f"conformance_{name}")


# ----------------------------------------------------------------------------------------- round trip


def test_a_run_comes_back_as_its_file_has_it(store: Store, tmp_path: Path) -> None:
    answers = sheet(items_of({"correct": 40, "wrong": 3, "truncated": 2, "empty": 1}))
    odd = sheet([item(0, answer="nul \x00 “ünïcode” \u2028 <b>", prompt="same"), item(1, prompt="same")])
    lines = (
        header(manifest=planned(result("other"))),
        accuracy_result(answers, decision(answers, lost=["3"])),
        accuracy_result(odd, None, "odd"),
        result("other", "fail", reason="broken \x00"),
        footer(),
    )
    run = run_of(tmp_path / "run.jsonl", *lines)
    merged = store.merge(run, 5)
    assert (merged.added, merged.updated, merged.unchanged, merged.newer) == (3, 0, 0, True)
    assert store.run("run-1") == run
    assert store.outcomes("run-1", (SUITE, CASE, "fake")) == {
        "correct": 40,
        "empty": 1,
        "truncated": 2,
        "wrong": 3,
    }
    assert store.outcomes("run-1", (SUITE, "other", "fake")) == {}


def test_a_prompt_is_kept_once(store: Store, tmp_path: Path) -> None:
    answers = sheet(items_of({"correct": 20}))
    for night in range(3):
        head = header(f"run-{night}", f"2026-11-0{night + 1}T02:00:00+00:00")
        store.merge(run_of(tmp_path / "r.jsonl", head, accuracy_result(answers, decision(answers))), 2)
    kept = content(store)
    assert len(kept["conformance_prompts"]) == 20
    assert len(kept["conformance_items"]) == 60


def test_merging_again_changes_nothing(store: Store, tmp_path: Path) -> None:
    answers = sheet(items_of({"correct": 5, "wrong": 1}))
    path = write(
        tmp_path / "run.jsonl", header(), accuracy_result(answers, decision(answers)), result("b"), footer()
    )
    assert store.merge_file(path).changed
    before = content(store)
    again = store.merge_file(path)
    assert (again.changed, again.added, again.updated, again.unchanged) == (False, 0, 0, 2)
    assert content(store) == before


def test_a_grown_file_updates_its_run_and_an_old_copy_does_not(store: Store, tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", header(), result("a", "fail"))
    grown = (header(resumed_from="run-1"), result("a"), result("b"), footer())
    new = write(tmp_path / "new.jsonl", header(), result("a", "fail"), *grown)
    assert store.merge_file(old).added == 1
    assert store.runs()[0].finished is None
    merged = store.merge_file(new)
    assert (merged.added, merged.updated, merged.newer) == (1, 1, True)
    (row,) = store.runs()
    assert (row.counts, row.finished) == ({"pass": 2}, footer().finished)
    after = content(store)
    assert not store.merge_file(old).changed
    assert content(store) == after


def test_a_resumed_run_that_has_no_result_yet_is_unfinished_again(store: Store, tmp_path: Path) -> None:
    lines = (header(), result("a"), footer())
    store.merge_file(write(tmp_path / "run.jsonl", *lines))
    plans = planned(result("a", digest="d2"))
    store.merge_file(write(tmp_path / "run.jsonl", *lines, header(resumed_from="run-1", manifest=plans)))
    (row,) = store.runs()
    assert (row.finished, row.exit_code, row.planned, row.counts) == (None, None, 1, {})
    assert store.latest() == []


def test_a_replaced_result_leaves_no_items_behind(store: Store, tmp_path: Path) -> None:
    many, few = sheet(items_of({"correct": 9})), sheet(items_of({"wrong": 2}))
    other = sheet([item(3)])
    first = (header(), accuracy_result(many, decision(many)), accuracy_result(other, None, "other"))
    store.merge_file(write(tmp_path / "run.jsonl", *first))
    store.merge_file(write(tmp_path / "run.jsonl", *first, accuracy_result(few, decision(few))))
    assert store.outcomes("run-1", (SUITE, CASE, "fake")) == {"wrong": 2}
    kept = content(store)
    assert len(kept["conformance_items"]) == 3
    prompts = {item(number).prompt for number in (0, 1, 3)}
    assert {json.loads(text) for _, text in kept["conformance_prompts"]} == prompts


def test_a_torn_last_line_is_reported_and_the_rest_is_kept(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", header(), result("a"), result("b"))
    path.write_bytes(path.read_bytes()[:-20])
    merged = store.merge_file(path)
    assert merged.torn.startswith("line 3 was cut off")
    assert merged.added == 1


def test_a_file_that_grows_while_it_is_read_is_read_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "run.jsonl", header(), result("a"))
    read, grown = runfile.read, [result("b"), result("c")]

    def slow(file: Path) -> Any:
        run = read(file)
        if grown:
            with path.open("a") as out:
                out.write(grown.pop().model_dump_json() + "\n")
        return run

    monkeypatch.setattr(runfile, "read", slow)
    assert store.merge_file(path).added == 3

    def never_at_rest(file: Path) -> Any:
        run = read(file)
        with path.open("a") as out:
            out.write(result("d").model_dump_json() + "\n")
        return run

    monkeypatch.setattr(runfile, "read", never_at_rest)
    with pytest.raises(StoreError, match=r"run\.jsonl: grows while it is read; merge it once"):
        store.merge_file(path)


def test_two_runs_of_one_id_are_told_apart(store: Store, tmp_path: Path) -> None:
    store.merge_file(write(tmp_path / "one.jsonl", header(), result("a")))
    other = write(tmp_path / "two.jsonl", header(started="2026-11-02T02:00:00+00:00"), result("a", "fail"))
    with pytest.raises(StoreError, match=r"run run-1: .* holds another run of this id, started 2026-11-01"):
        store.merge_file(other)
    assert [row.counts for row in store.runs()] == [{"pass": 1}]


@pytest.mark.parametrize("started", ["yesterday", "2026-11-01T02:00:00", ""])
def test_a_run_without_a_time_is_refused(store: Store, tmp_path: Path, started: str) -> None:
    with pytest.raises(StoreError, match="which is no ISO 8601 time with its zone"):
        store.merge_file(write(tmp_path / "run.jsonl", header(started=started)))


def test_a_file_that_is_no_run_file_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("hello\n")
    with pytest.raises(RunFileError, match=r"x\.jsonl:1: "):
        store.merge_file(tmp_path / "x.jsonl")
    with pytest.raises(RunFileError, match=r"gone\.jsonl: cannot be read: No such file"):
        store.merge_file(tmp_path / "gone.jsonl")


# ---------------------------------------------------------------------- any copies, in any order

_RESULTS = st.builds(
    lambda case, verdict, digest, right: (
        accuracy_result(answers := sheet(items_of({"correct": right, "wrong": 1})), decision(answers), case)
        if right
        else result(case, verdict)
    ).model_copy(update={"digest": digest}),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["pass", "fail", "error"]),
    st.sampled_from(["d1", "d2"]),
    st.integers(0, 2),
)
_HEADERS = st.builds(
    lambda plans, commit: header(
        resumed_from="run-1",
        manifest=planned(*(result(c, digest=d) for c, d in plans.items())),
        commit=commit,
    ),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(["d1", "d2"])),
    st.sampled_from(["one", "two"]),
)
_SESSIONS = st.lists(st.tuples(_HEADERS, st.lists(_RESULTS, max_size=4), st.booleans()), max_size=3)


def _lines(sessions: list[tuple[Header, list[Result], bool]]) -> list[Line]:
    lines: list[Line] = [header()]
    for head, results, ended in sessions:
        lines += [head, *results]
        if ended:
            lines.append(footer(len(lines)))
    return lines


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sessions=_SESSIONS, seed=st.integers(0, 2**32))
def test_copies_of_a_growing_file_in_any_order_come_to_the_whole_file(
    tmp_path: Path, fresh: Callable[[], str], sessions: Any, seed: int
) -> None:
    lines = _lines(sessions)
    rng = random.Random(seed)
    lengths = [len(lines), *(rng.randint(1, len(lines)) for _ in range(3))]
    lengths += rng.sample(lengths, 2)
    rng.shuffle(lengths)
    with Store(fresh(), create=True) as store:
        store.merge(run_of(tmp_path / "whole.jsonl", *lines), len(lines))
        wanted = content(store)
        whole = runfile.read(tmp_path / "whole.jsonl")
        stored = store.run("run-1")
        assert stored.latest() == whole.latest()
        assert (stored.header, stored.footer) == (whole.header, whole.footer)
        assert {v.key: v.verdict for v in store.latest()} == {k: r.verdict for k, r in whole.latest().items()}
    with Store(fresh(), create=True) as store:
        for length in lengths:
            store.merge_file(write(tmp_path / "copy.jsonl", *lines[:length]))
        assert content(store) == wanted


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shared=_SESSIONS, left=_SESSIONS, right=_SESSIONS)
def test_copies_that_were_resumed_apart_merge_in_either_order_and_lose_no_result(
    tmp_path: Path, fresh: Callable[[], str], shared: Any, left: Any, right: Any
) -> None:
    files = [
        write(tmp_path / f"{n}.jsonl", *_lines([*shared, *more])) for n, more in enumerate((left, right))
    ]
    found = []
    for order in (files, files[::-1], [*files, *files]):
        with Store(fresh(), create=True) as store:
            for path in order:
                store.merge_file(path)
            found.append(content(store))
            kept = {(*r.key, r.digest) for r in store.run("run-1").results}
    assert found[0] == found[1] == found[2]
    assert kept == {(*r.key, r.digest) for path in files for r in runfile.read(path).results}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([result("a", digest="d1")], [result("a", digest="d2")]),  # one place, two versions of the case
        ([result("a"), footer(1.0)], [result("a"), footer(2.0)]),  # ended twice
        ([header(commit="one")], [header(commit="two")]),
        ([result("a"), result("b")], [result("c")]),  # the shorter one knows something too
    ],
)
def test_two_copies_of_one_length_come_to_the_same_in_either_order(
    fresh: Callable[[], str], tmp_path: Path, left: list[Line], right: list[Line]
) -> None:
    files = [write(tmp_path / f"{n}.jsonl", header(), *lines) for n, lines in enumerate((left, right))]
    found = []
    for order in (files, files[::-1]):
        with Store(fresh(), create=True) as store:
            for path in order:
                store.merge_file(path)
            found.append((content(store), store.latest(), store.runs()))
    assert found[0] == found[1]
    keys = {line.key for line in (*left, *right) if isinstance(line, Result)}
    assert {verdict.key for verdict in found[0][1]} == keys


# ------------------------------------------------------------------------------------ several writers


def test_a_writer_waits_for_another_from_its_first_look_on(fresh: Callable[[], str], tmp_path: Path) -> None:
    url = fresh()
    path = write(tmp_path / "run.jsonl", header(), result("a"))
    with Store(url, create=True) as first, Store(url) as second, ThreadPoolExecutor() as threads:
        with first._database.writing() as session:
            waiting = threads.submit(second.merge_file, path)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            session.add(_table("prompts")(digest="x", text="y"))
        assert waiting.result(timeout=30).added == 1
        assert len(content(first)["conformance_prompts"]) == 1


def test_writers_at_one_time_lose_nothing(tmp_path: Path, fresh: Callable[[], str], environment: Any) -> None:
    """They also race to make the database."""
    url = fresh()
    answers = sheet(items_of({"correct": 30, "wrong": 5}))
    files = []
    for n in range(12):
        head = header(f"run-{n}", f"2026-11-{n + 1:02}T02:00:00+00:00")
        lines = (head, accuracy_result(answers, decision(answers)), result("b"), footer())
        files.append(write(tmp_path / f"{n}.jsonl", *lines))
    shared = write(tmp_path / "shared.jsonl", header("shared"), result("a"), result("b"))
    command = [sys.executable, "-m", "conformance", "store", "merge", "--database", url]
    writers = [
        subprocess.Popen([*command, *map(str, [*files[n::2], shared])], env=environment, cwd=tmp_path)
        for n in range(2)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    with Store(url) as store:
        runs = store.runs()
        assert sorted(run.run_id for run in runs) == sorted(["shared", *(f"run-{n}" for n in range(12))])
        assert all(run.counts == {"pass": 2} for run in runs)
        kept = content(store)
    assert len(kept["conformance_prompts"]) == 35
    assert len(kept["conformance_items"]) == 12 * 35


def test_a_writer_that_waits_too_long_says_so(
    fresh: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_PATIENCE", 1)
    url = fresh()
    path = write(tmp_path / "run.jsonl", header(), result("a"))
    with Store(url, create=True) as first, Store(url) as second:
        with first._database.writing(), pytest.raises(StoreError, match=r"locked|lock timeout"):
            second.merge_file(path)
        assert second.merge_file(path).added == 1


def test_a_merge_that_fails_half_way_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(store)

    def broken(*_: Any) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr("conformance.store.history.mark_current", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        store.merge_file(write(tmp_path / "run.jsonl", header(), result("a")))
    assert content(store) == before


# ------------------------------------------------------------------------------------------- questions


@pytest.fixture
def nights(store: Store, tmp_path: Path) -> Store:
    """Three runs, merged out of order, whose ids do not sort as their times do."""
    scores = {"d4": (92, 8), "c3": (95, 5), "a1": (80, 20)}
    starts = {
        "c3": "2026-11-01T23:30:00-05:00",
        "d4": "2026-11-02T05:00:00Z",
        "a1": "2026-11-03T02:00:00.5Z",
    }
    for name, (right, wrong) in scores.items():
        answers = sheet(items_of({"correct": right, "wrong": wrong}))
        made = decision(answers, verdict="fail" if right < 90 else "pass")
        lines = [header(name, starts[name]), accuracy_result(answers, made)]
        lines.append(result("old", "fail" if name == "c3" else "pass", digest=f"d-{name}"))
        if name == "a1":
            lines.append(result("new", "skip", target="other"))
        store.merge_file(write(tmp_path / f"{name}.jsonl", *lines, footer()))
    return store


def test_runs_come_newest_first(nights: Store) -> None:
    assert [run.run_id for run in nights.runs()] == ["a1", "d4", "c3"]
    assert [run.run_id for run in nights.runs(limit=1)] == ["a1"]
    assert nights.runs()[0].counts == {"fail": 1, "pass": 1, "skip": 1}
    assert nights.runs()[2].started == "2026-11-02T04:30:00.000000+00:00"


def test_the_latest_result_of_each_case_on_each_target(nights: Store, tmp_path: Path) -> None:
    assert [(v.case, v.target, v.verdict, v.run_id) for v in nights.latest()] == [
        (CASE, "fake", "fail", "a1"),
        ("new", "other", "skip", "a1"),
        ("old", "fake", "pass", "a1"),
    ]
    late = header("b2", "2026-11-04T02:00:00Z")
    nights.merge_file(write(tmp_path / "b2.jsonl", late, result("old", "xfail")))
    assert [(v.case, v.run_id) for v in nights.latest()] == [
        (CASE, "a1"),
        ("new", "a1"),
        ("old", "b2"),
    ]


def test_a_case_over_time(nights: Store) -> None:
    points = nights.evidence_series(SUITE, CASE, "fake")
    assert [(v.run_id, v.verdict) for v, _ in points] == [
        ("c3", "pass"),
        ("d4", "pass"),
        ("a1", "fail"),
    ]
    assert [r.evidence.accuracy.decision.score.count for _, r in points] == [95, 92, 80]
    assert all(r.evidence.accuracy.sheet.items == () for _, r in points)
    assert [nights.outcomes(v.run_id, v.key)["wrong"] for v, _ in points] == [5, 8, 20]
    assert [v.run_id for v in nights.series(SUITE, "new")] == ["a1"]
    assert nights.series(SUITE, "new", "fake") == []


def test_a_case_over_time_comes_in_portions_by_few_statements(nights: Store) -> None:
    whole, total = nights.points(SUITE, CASE)
    assert total == len(whole) == 3
    assert [point.outcomes["wrong"] for point in whole] == [5, 8, 20]
    assert nights.points(SUITE, CASE, limit=2) == (whole[1:], 3)
    assert nights.points(SUITE, CASE, limit=2, offset=2) == (whole[:1], 3)
    assert nights.points(SUITE, CASE, offset=3) == ([], 3)
    sent = []
    event.listen(nights._database._engine, "before_cursor_execute", lambda *said: sent.append(said[2]))
    nights.points(SUITE, CASE)
    asked = [statement for statement in sent if statement.startswith("SELECT")]
    assert len(asked) == 3, "their number, the results, and all their outcomes"
    nights.points(SUITE, "new")
    assert len([s for s in sent if s.startswith("SELECT")]) == 5, "where nothing is scored, no outcomes"


def test_verdicts_that_changed_between_two_runs(nights: Store) -> None:
    changes = nights.changes("c3", "a1")
    assert [(c.case, c.target, c.before, c.after, c.edited) for c in changes] == [
        (CASE, "fake", "pass", "fail", False),
        ("new", "other", None, "skip", False),
        ("old", "fake", "fail", "pass", True),
    ]
    assert nights.changes("a1", "a1") == []
    with pytest.raises(StoreError, match="holds no run n9; `conformance store list` names them"):
        nights.changes("c3", "n9")


# ------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("version", "said"),
    [(VERSION + 1, "made by a newer harness .*upgrade"), (0, "an older harness")],
)
def test_another_schema_is_refused(fresh: Callable[[], str], version: int, said: str) -> None:
    url = fresh()
    with Store(url, create=True) as store, store._database.writing() as session:
        session.execute(update(VersionRow).values(version=version))
    for create in (False, True):
        with pytest.raises(StoreError, match=said):
            Store(url, create=create)


def test_a_missing_database_is_not_made_by_asking(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.sqlite"
    with pytest.raises(StoreError, match="there is no history; `conformance store merge RUN` begins one"):
        Store(f"sqlite:///{path}")
    assert not path.parent.exists()
    Store(f"sqlite:///{path}", create=True).close()
    assert path.is_file()


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("create table runs (name text)")
    connection.close()
    with pytest.raises(StoreError, match="holds no history"):
        Store(f"sqlite:///{path}")
    (tmp_path / "text.txt").write_text("no database at all, and long enough to be looked at" * 40)
    with pytest.raises(StoreError, match="the history cannot be used: file is not a database"):
        Store(f"sqlite:///{tmp_path / 'text.txt'}", create=True)


@pytest.mark.parametrize("url", ["history.sqlite", "", "nosuch://user:secret@host/db"])
def test_a_wrong_url_says_what_is_wanted(url: str) -> None:
    with pytest.raises(StoreError, match=r"no database URL.*such as sqlite:///history.sqlite") as raised:
        Store(url)
    assert "secret" not in str(raised.value)


def test_a_missing_driver_is_named_and_a_password_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"its driver is not installed; pip install psycopg") as raised:
        Store("postgresql+psycopg://user:secret@host/db")
    assert "secret" not in str(raised.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file: this folder cannot be made"):
        Store(f"sqlite:///{tmp_path}/file/history.sqlite", create=True)


def test_a_result_of_another_version_of_the_harness_says_so(store: Store, tmp_path: Path) -> None:
    store.merge_file(write(tmp_path / "run.jsonl", header(), result("a")))
    with store._database.writing() as session:
        row = session.scalars(select(_table("results"))).one()
        row.body = row.body.replace('"reason"', '"why"')
    with pytest.raises(StoreError, match=r"run run-1: was stored by another version of the harness \(why: "):
        store.run("run-1")


def test_one_result_of_another_version_does_not_cost_the_others(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for day, run in enumerate(("run-1", "run-2", "run-3")):
        started = f"2026-11-0{day + 1}T00:00:00+00:00"
        lines = header(run).model_copy(update={"started": started}), result("a")
        store.merge_file(write(tmp_path / f"{run}.jsonl", *lines))
    with store._database.writing() as session:
        table = _table("results")
        row = session.scalars(select(table).where(table.run_id == "run-2")).one()
        row.body = row.body.replace('"reason"', '"why"')
    found = store.evidence_series(result("a").suite, "a", "fake")
    assert [verdict.run_id for verdict, _ in found] == ["run-1", "run-3"]
    (said,) = caplog.messages
    assert "of run run-2: was stored by another version" in said
    points, total = store.points(result("a").suite, "a", "fake")
    assert [point.verdict.run_id for point in points] == ["run-1", "run-2", "run-3"]
    assert total == 3


# ----------------------------------------------------------------------- the same on every database


@pytest.mark.parametrize(
    "run",
    [
        [header(), result("a\0b")],
        [header("run\0"), result("a")],
        [header(cell=CellRecord(id="a\0", axes={"target": "fake"})), result("a")],
        [header(), result("a", target="x" * 2500)],
        [header(), result("a"), footer().model_copy(update={"exit_code": 2**40})],
        [header(), result("a", duration=float("nan"))],
        [header(), result("a"), footer(float("inf"))],
    ],
)
def test_what_no_database_can_keep_is_refused_by_all(store: Store, run: list[Line]) -> None:
    before = content(store)
    lines = Run(header=run[0], results=run[1:2], footer=run[2] if len(run) > 2 else None)
    with pytest.raises(MisfitError):
        store.merge(lines, len(run))
    assert content(store) == before


def test_text_of_every_kind_comes_back(store: Store, tmp_path: Path) -> None:
    text = "\0 \x7f \ufffe \u2028 \U0001f98a '; DROP TABLE x; --"
    answers = sheet([item(1, prompt=text, answer=text)])
    found = accuracy_result(
        answers, decision(answers), reason=text, case="'; --\u2028\U0001f98a", area="é" * 400
    )
    store.merge_file(write(tmp_path / "run.jsonl", header(), found, footer()))
    assert store.run("run-1").results == (found,)
    assert store.result("run-1", found.key) == found
    (point,), total = store.points(*found.key)
    assert (point.outcomes, total) == ({"correct": 1}, 1)


def test_results_are_found_by_what_they_are(nights: Store) -> None:
    wanted, total = nights.results("a1", limit=1, verdict="pass")
    everything, _ = nights.results("a1")
    passing = [verdict for verdict in everything if verdict.verdict == "pass"]
    assert (wanted, total) == (passing[:1], len(passing))
    assert nights.results("a1", offset=1)[0] == everything[1:]
    assert nights.results("a1", target="nobody") == ([], 0)
    assert nights.result("a1", ("no", "such", "case")) is None
    assert nights.described("a1") == next(run for run in nights.runs() if run.run_id == "a1")
    assert nights.runs(limit=1, offset=1) == nights.runs()[1:2]
    assert nights.size() == len(nights.runs())
    for ask in (nights.described, nights.results):
        with pytest.raises(UnknownRunError):
            ask("n9")


def test_the_revision_counts_changes_alone(store: Store, tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", header(), result("a"))
    whole = write(tmp_path / "whole.jsonl", header(), result("a"), result("b"), footer())
    seen = [store.revision()]
    for path in (short, short, whole, short, whole):
        store.merge_file(path)
        seen.append(store.revision())
    assert seen == [0, 1, 1, 2, 2, 2]


def test_what_is_read_is_of_one_moment(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge ends between the statements that read a run: its results, and their items.

    On SQLite none does: it waits for those who read.
    """
    url = postgres.fresh()
    store = Store(url, create=True)
    short = [header(), accuracy_result(sheet([item(1)]), None)]
    store.merge_file(write(tmp_path / "short.jsonl", *short))
    longer = write(
        tmp_path / "longer.jsonl", header(), accuracy_result(sheet([item(1), item(2)]), None), footer()
    )
    whole = store.run("run-1")
    real = history.read_result

    def read_result(*arguments: Any) -> Result:
        monkeypatch.setattr(history, "read_result", real)
        with Store(url) as other:
            assert other.merge_file(longer).newer
        return real(*arguments)

    monkeypatch.setattr(history, "read_result", read_result)
    assert store.run("run-1") == whole
    assert store.run("run-1").footer is not None
    store.close()


def test_a_removed_run_leaves_nothing_behind_and_comes_back(store: Store, tmp_path: Path) -> None:
    answers = sheet([item(1), item(2, "wrong")])
    shared = write(
        tmp_path / "1.jsonl", header("run-1"), accuracy_result(sheet(answers.items[:1]), None), footer()
    )
    store.merge_file(shared)
    before = content(store)
    path = write(
        tmp_path / "2.jsonl", header("run-2"), accuracy_result(answers, decision(answers)), result("b")
    )
    store.merge_file(path)
    store.remove("run-2")
    assert content(store) == before
    assert store.revision() == 3
    with pytest.raises(UnknownRunError):
        store.remove("run-2")
    assert store.merge_file(path).added == 2


def test_a_run_that_started_too_late_is_refused(store: Store, tmp_path: Path) -> None:
    run = runfile.read(write(tmp_path / "run.jsonl", header(started="2026-11-02T01:00:00+01:00"), footer()))
    with pytest.raises(MisfitError, match=r"run run-1: started at 2026-11-02T01:00:00\+01:00, which is in"):
        store.merge(run, 2, by=dt.datetime(2026, 11, 1, 23, 59, tzinfo=dt.UTC))
    assert store.merge(run, 2, by=dt.datetime(2026, 11, 2, 0, 0, tzinfo=dt.UTC)).newer
