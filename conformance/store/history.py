"""Run files merged into a database, and what is asked of it.

1. A run is known by its id, a result by its run, its key (suite, case, target) and the digest of the case.
2. Run files only grow. Of two copies of a run the one with more lines is newer; of two results of one
   identity, the one that stands later. So merging is a union in which the newer wins: files may be merged
   twice, in any order, and as copies that were resumed apart, and nothing is lost.
3. One writer at a time: each merge is one transaction under a lock.
4. Items of accuracy evidence are rows of their own; prompts, which are the same night after night, are
   kept once.
5. Every statement is SQLAlchemy's, so that a URL decides between SQLite and PostgreSQL.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError
from sqlalchemy import URL, ColumnElement, Select, func, select, update
from sqlalchemy.orm import Session, defer

from conformance import runfile
from conformance.errors import RunFileError
from conformance.results import Footer, Header, Result, Run, Verdict
from conformance.store import (
    Change,
    Key,
    Merged,
    MisfitError,
    OtherVersionError,
    RunConflictError,
    StoredRun,
    StoredVerdict,
    StoreError,
    StorePoint,
    UnknownRunError,
)
from conformance.store.database import Database
from conformance.store.rows import (
    check_storable,
    mark_current,
    merge_results,
    outcomes_of,
    read_result,
    remove_results,
    verdict_counts,
)
from conformance.store.tables import ResultRow, RunRow, VersionRow

_LOG = logging.getLogger(__name__)
_READINGS = 5
"""How often a file that is being written is read again."""
_NO_BODY = defer(ResultRow.body)
_LIGHT = (_NO_BODY, defer(RunRow.header), defer(RunRow.footer))
"""Columns that are long, and left out where only verdicts are asked for."""


class Store:
    """The history database. Use as a context manager, or call `close`.

    Args:
        url: Database URL, such as `sqlite:///history.sqlite` or `postgresql+psycopg://user@host/name`; by
            default a file in the user's data folder.
        create: Make the database where there is none, to merge into it.

    Raises:
        StoreError: the URL is none, there is no such database, or it cannot be used.
    """

    def __init__(self, url: str | URL | None = None, *, create: bool = False) -> None:
        self._database = Database(url, create=create)

    @property
    def name(self) -> str:
        """URL of the database, without a password."""
        return self._database.name

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ writing

    def merge_file(self, path: Path) -> Merged:
        """Merge a run file; one that is still being written is merged as far as it has come.

        Raises:
            RunFileError: it cannot be read.
            StoreError: it does not fit, or the database cannot be written.
        """
        for _ in range(_READINGS):
            lines = _lines(path)
            run = runfile.read(path)
            if _lines(path) == lines:
                return self.merge(run, lines)
        raise StoreError(f"{path}: grows while it is read; merge it once the run has ended")

    def merge(self, run: Run, lines: int, *, by: dt.datetime | None = None) -> Merged:
        """Merge one run.

        Args:
            run: A run, or what is there of it.
            lines: Complete lines of its file, which tell an older copy from a newer one.
            by: When it must have started at the latest, with a zone.

        Raises:
            MisfitError: it holds what cannot be kept, or started later.
            RunConflictError: another run of this id is stored.
            StoreError: the database cannot be written.
        """
        header = run.header
        started = _moment(header)
        if by is not None and started > _text(by):
            raise MisfitError(
                f"run {header.run_id}: started at {header.started}, which is in the future; "
                "set the clock of the machine that it ran on"
            )
        check_storable(run)
        with self._database.writing() as session:
            row = session.get(RunRow, header.run_id)
            if row is not None and row.started != started:
                raise RunConflictError(
                    f"run {header.run_id}: {self.name} holds another run of this id, started "
                    f"{row.started}; the file was changed by hand, or two runs drew the same id"
                )
            newer = self._merge_run(session, row, run, lines, started)
            added, updated = merge_results(session, run)
            if newer or added or updated:
                mark_current(session, header.run_id)
                session.execute(update(VersionRow).values(revision=VersionRow.revision + 1))
        unchanged = len({(*r.key, r.digest) for r in run.results}) - added - updated
        return Merged(
            run_id=header.run_id,
            added=added,
            updated=updated,
            unchanged=unchanged,
            newer=newer,
            torn=run.torn,
        )

    def remove(self, run_id: str) -> None:
        """Remove a run with all its results. Merging its file brings it back.

        Raises:
            UnknownRunError: there is no such run.
            StoreError: the database cannot be written.
        """
        with self._database.writing() as session:
            row = self._run(session, run_id)
            remove_results(session, run_id)
            session.delete(row)
            session.execute(update(VersionRow).values(revision=VersionRow.revision + 1))

    def _merge_run(self, session: Session, row: RunRow | None, run: Run, lines: int, started: str) -> bool:
        """Store what is known of the run as a whole, if the copy is newer; whether it was."""
        header, footer = run.header.model_dump_json(), run.footer and run.footer.model_dump_json()
        digest = hashlib.sha256(f"{header}\n{footer}".encode()).hexdigest()
        if row is not None and (row.lines, row.digest) >= (lines, digest):
            return False
        values = {
            "started": started,
            "harness": run.header.harness,
            "commit": run.header.commit,
            "finished": run.footer.finished if run.footer is not None else None,
            "exit_code": run.footer.exit_code if run.footer is not None else None,
            "planned": len({(p.suite, p.case, p.target) for p in run.header.manifest}),
            "lines": lines,
            "digest": digest,
            "header": header,
            "footer": footer,
            "cell": run.header.cell.id if run.header.cell is not None else None,
        }
        if row is None:
            session.add(RunRow(run_id=run.header.run_id, **values))
        else:
            for name, value in values.items():
                setattr(row, name, value)
        session.flush()
        return True

    # ------------------------------------------------------------------------------------------ reading

    def runs(
        self, *, limit: int | None = None, offset: int = 0, cells: bool | None = None
    ) -> list[StoredRun]:
        """The runs, newest first, with the verdicts that count.

        Args:
            limit: So many at most.
            offset: Behind so many.
            cells: Only those of cells of the matrix, or only the others; None: both.
        """
        query = select(RunRow).order_by(RunRow.started.desc(), RunRow.run_id.desc())
        if cells is not None:
            query = query.where(RunRow.cell.is_not(None) if cells else RunRow.cell.is_(None))
        with self._database.reading() as session:
            return self._described(session, query.limit(limit).offset(offset))

    def described(self, run_id: str) -> StoredRun:
        """One run, without its results.

        Raises:
            UnknownRunError: there is no such run.
        """
        with self._database.reading() as session:
            self._run(session, run_id)
            return self._described(session, select(RunRow).where(RunRow.run_id == run_id))[0]

    def size(self) -> int:
        """Number of runs."""
        with self._database.reading() as session:
            return session.scalars(select(func.count()).select_from(RunRow)).one()

    def revision(self) -> int:
        """A number that is another one after every merge that changed anything."""
        with self._database.reading() as session:
            return session.scalars(select(VersionRow.revision)).one()

    @staticmethod
    def _described(session: Session, query: Select[RunRow]) -> list[StoredRun]:
        rows = session.scalars(query.options(*_LIGHT[1:])).all()
        counts = verdict_counts(session, [row.run_id for row in rows])
        return [
            StoredRun(
                run_id=row.run_id,
                started=row.started,
                harness=row.harness,
                commit=row.commit,
                finished=row.finished,
                exit_code=row.exit_code,
                planned=row.planned,
                counts=dict(counts.get(row.run_id, {})),
                cell=row.cell,
            )
            for row in rows
        ]

    def run(self, run_id: str) -> Run:
        """A run with all its results and items, as its file has it, less lines that later ones replaced.

        Raises:
            UnknownRunError: there is no such run.
        """
        with self._database.reading() as session:
            row = self._run(session, run_id)
            query = select(ResultRow).where(ResultRow.run_id == run_id)
            query = query.order_by(ResultRow.position, ResultRow.content)
            with _of_this_version(f"run {run_id}"):
                return Run(
                    header=Header.model_validate_json(row.header),
                    results=tuple(read_result(session, found) for found in session.scalars(query)),
                    footer=Footer.model_validate_json(row.footer) if row.footer is not None else None,
                )

    def results(
        self, run_id: str, *, limit: int | None = None, offset: int = 0, **wanted: str | None
    ) -> tuple[list[StoredVerdict], int]:
        """The results of a run that count, in the order of their keys, and how many there are in all.

        Args:
            run_id: Of the run.
            limit: Only so many.
            offset: Leave out so many first.
            wanted: Values of `suite`, `case`, `target`, `area` or `verdict`; None for any.

        Raises:
            UnknownRunError: there is no such run.
        """
        named = [getattr(ResultRow, name) == value for name, value in wanted.items() if value is not None]
        which = (ResultRow.run_id == run_id, ResultRow.current, *named)
        with self._database.reading() as session:
            run = self._run(session, run_id)
            total = session.scalars(select(func.count()).select_from(ResultRow).where(*which)).one()
            query = select(ResultRow).where(*which).options(_NO_BODY)
            query = query.order_by(ResultRow.suite, ResultRow.case, ResultRow.target)
            return [_verdict(row, run) for row in session.scalars(query.limit(limit).offset(offset))], total

    def result(self, run_id: str, key: Key) -> Result | None:
        """The result of a run that counts, with its items; None where it has none."""
        query = select(ResultRow).where(ResultRow.run_id == run_id, ResultRow.current, *_is(key))
        with self._database.reading() as session, _of_this_version(f"run {run_id}"):
            row = session.scalars(query).one_or_none()
            return read_result(session, row) if row is not None else None

    def latest(self, before: Run | None = None, verdicts: Collection[Verdict] = ()) -> list[StoredVerdict]:
        """The newest result of every case on every target, in each cell of the matrix and outside it.

        Args:
            before: Only of runs that started before this one.
            verdicts: The newest of these verdicts; empty for all.

        Raises:
            MisfitError: that run has no time at which it started.
        """
        older = () if before is None else (RunRow.started < _moment(before.header),)
        wanted = (ResultRow.verdict.in_(verdicts),) if verdicts else ()
        newest = (
            func.row_number()
            .over(
                partition_by=(ResultRow.suite, ResultRow.case, ResultRow.target, RunRow.cell),
                order_by=(RunRow.started.desc(), RunRow.run_id.desc()),
            )
            .label("newest")
        )
        ranked = (
            select(ResultRow.id, newest)
            .join(RunRow, RunRow.run_id == ResultRow.run_id)
            .where(ResultRow.current, *older, *wanted)
            .subquery()
        )
        query = (
            select(ResultRow, RunRow)
            .join(RunRow, RunRow.run_id == ResultRow.run_id)
            .join(ranked, ranked.c.id == ResultRow.id)
            .where(ranked.c.newest == 1)
            .options(*_LIGHT)
        )
        with self._database.reading() as session:
            found = [_verdict(result, run) for result, run in session.execute(query)]
        return sorted(found, key=lambda verdict: (verdict.key, verdict.cell or ""))

    def series(
        self, suite: str, case: str, target: str | None = None, cell: str | None = None
    ) -> list[StoredVerdict]:
        """The verdicts of a case over time, oldest first.

        Args:
            suite: Its suite's id.
            case: Its id.
            target: Only on this target.
            cell: Only in this cell of the matrix; empty: only outside the matrix.
        """
        query = self._series(suite, case, target, cell).options(*_LIGHT)
        with self._database.reading() as session:
            return [_verdict(result, run) for result, run in session.execute(query)]

    def evidence_series(
        self, suite: str, case: str, target: str | None = None, cell: str | None = None
    ) -> list[tuple[StoredVerdict, Result]]:
        """The same with the results, whose accuracy evidence comes without its items.

        A result that another version of the harness has stored in a form of its own is left out: what came
        before it and after it is still of use.
        """
        query = self._series(suite, case, target, cell)
        found = []
        with self._database.reading() as session:
            for row, run in session.execute(query):
                result = _readable(row, run)
                if result is not None:
                    found.append((_verdict(row, run), result))
        return found

    def accuracy(self, besides: Collection[Key] = ()) -> dict[Key, list[tuple[StoredVerdict, Result]]]:
        """Results of every accuracy case on every target, oldest first; the newest with scores has its items.

        The matrix has no accuracy cases, and its runs are left out.

        Args:
            besides: Cases and targets whose items are at hand already.
        """
        known = [v.key for v in self.latest() if v.kind == "accuracy" and v.cell is None]
        found = {key: self.evidence_series(*key, cell="") for key in known}
        for key, past in found.items():
            scored = [n for n, (_, result) in enumerate(past) if result.evidence.accuracy is not None]
            if scored and key not in besides:
                verdict, without = past[scored[-1]]
                # It may have been removed since; then it is shown once more, without its items.
                past[scored[-1]] = (verdict, self.result(verdict.run_id, verdict.key) or without)
        return found

    def outcomes(self, run_id: str, key: Key) -> dict[str, int]:
        """Number of items of a result by outcome class; empty where it has none."""
        query = select(ResultRow.id).where(ResultRow.run_id == run_id, ResultRow.current, *_is(key))
        with self._database.reading() as session:
            result_id = session.scalars(query).one_or_none()
            return outcomes_of(session, [result_id]).get(result_id, {}) if result_id is not None else {}

    def points(
        self,
        suite: str,
        case: str,
        target: str | None = None,
        cell: str | None = None,
        *,
        limit: int | None = None,
        offset: int = 0,
    ) -> tuple[list[StorePoint], int]:
        """A case over time, oldest first, with what its gate decided, and how many points there are in all.

        Of a result that another version of the harness has stored in a form of its own, the verdict alone.

        Args:
            suite: As in `series`; so are `case`, `target` and `cell`.
            case: Its id.
            target: Only on this target.
            cell: Only in this cell.
            limit: Only the newest so many.
            offset: Leave out so many of the newest first.
        """
        query = self._series(suite, case, target, cell)
        newest = query.order_by(None).order_by(
            RunRow.started.desc(), RunRow.run_id.desc(), ResultRow.target.desc()
        )
        points = []
        with self._database.reading() as session:
            found = query.with_only_columns(ResultRow.id).order_by(None).subquery()
            total = session.scalars(select(func.count()).select_from(found)).one()
            rows = session.execute(newest.options(*_LIGHT[1:]).limit(limit).offset(offset)).all()
            read = [(row, run, _readable(row, run)) for row, run in reversed(rows)]
            scored = [row.id for row, _, result in read if result is not None and result.evidence.accuracy]
            outcomes = outcomes_of(session, scored)
            for row, run, result in read:
                accuracy = result.evidence.accuracy if result is not None else None
                points.append(
                    StorePoint(
                        verdict=_verdict(row, run),
                        decision=accuracy.decision if accuracy is not None else None,
                        outcomes=outcomes.get(row.id, {}),
                    )
                )
        return points, total

    def changes(self, before: str, after: str) -> list[Change]:
        """Verdicts that differ between two runs; results that only one of them has included.

        Raises:
            UnknownRunError: there is no such run.
        """
        with self._database.reading() as session:
            old, new = (self._verdicts_of(session, run_id) for run_id in (before, after))
        nothing = (None, "")
        found = []
        for key in sorted(old.keys() | new.keys()):
            (was, case_was), (is_now, case_is) = old.get(key, nothing), new.get(key, nothing)
            if was != is_now:
                suite, case, target = key
                edited = key in old and key in new and case_was != case_is
                found.append(
                    Change(suite=suite, case=case, target=target, before=was, after=is_now, edited=edited)
                )
        return found

    def _run(self, session: Session, run_id: str) -> RunRow:
        row = session.get(RunRow, run_id)
        if row is None:
            raise UnknownRunError(f"{self.name} holds no run {run_id}; `conformance store list` names them")
        return row

    def _verdicts_of(self, session: Session, run_id: str) -> dict[Key, tuple[Verdict | None, str]]:
        self._run(session, run_id)
        query = select(ResultRow).where(ResultRow.run_id == run_id, ResultRow.current).options(_NO_BODY)
        return {row.key: (row.verdict, row.digest) for row in session.scalars(query)}

    @staticmethod
    def _series(suite: str, case: str, target: str | None, cell: str | None) -> Select[ResultRow, RunRow]:
        query = (
            select(ResultRow, RunRow)
            .join(RunRow, RunRow.run_id == ResultRow.run_id)
            .where(ResultRow.suite == suite, ResultRow.case == case, ResultRow.current)
            .order_by(RunRow.started, RunRow.run_id, ResultRow.target)
        )
        if target is not None:
            query = query.where(ResultRow.target == target)
        return query if cell is None else query.where(RunRow.cell == cell if cell else RunRow.cell.is_(None))


def _readable(row: ResultRow, run: RunRow) -> Result | None:
    """A result; None where another version of the harness stored it in a form of its own, which is logged."""
    try:
        with _of_this_version(f"{row.suite}::{row.case} of run {run.run_id}"):
            return Result.model_validate_json(row.body)
    except OtherVersionError as error:
        _LOG.warning("left out: %s", error)
        return None


def _verdict(result: ResultRow, run: RunRow) -> StoredVerdict:
    return StoredVerdict(
        run_id=run.run_id,
        started=run.started,
        harness=run.harness,
        commit=run.commit,
        suite=result.suite,
        case=result.case,
        target=result.target,
        kind=result.kind,
        area=result.area,
        verdict=result.verdict,
        digest=result.digest,
        cell=run.cell,
    )


def _is(key: Key) -> tuple[ColumnElement[bool], ...]:
    suite, case, target = key
    return (ResultRow.suite == suite, ResultRow.case == case, ResultRow.target == target)


def _lines(path: Path) -> int:
    """Complete lines of a file."""
    try:
        with path.open("rb") as file:
            return sum(portion.count(b"\n") for portion in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read: {error.strerror or error}") from None


def _moment(header: Header) -> str:
    """When a run started, as a text that sorts by time."""
    moment = None
    with contextlib.suppress(ValueError, OverflowError):
        read = dt.datetime.fromisoformat(header.started)
        moment = read.astimezone(dt.UTC) if read.tzinfo is not None else None
    if moment is None:
        raise MisfitError(
            f"run {header.run_id}: started at {header.started!r}, which is no ISO 8601 time with its zone; "
            "the file was changed by hand, or is none of this harness"
        )
    return _text(moment)


def _text(moment: dt.datetime) -> str:
    return moment.astimezone(dt.UTC).isoformat(timespec="microseconds")


@contextlib.contextmanager
def _of_this_version(what: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise OtherVersionError(
            f"{what}: was stored by another version of the harness ({place}: {first['msg']}); "
            "merge its run file into a new database"
        ) from None
