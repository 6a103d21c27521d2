"""A database of history: how it is reached, begun and locked.

One writer at a time: SQLite locks its file as a transaction that will write begins; PostgreSQL locks the row
that holds the schema's version.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from conformance.store import StoreError
from conformance.store.tables import MIGRATIONS, VERSION, Base, VersionRow

_WRITES = "conformance_writes"
"""Execution option of a connection that will write."""
_PATIENCE = 60
"""Seconds for which one writer waits for another."""


def default_url() -> URL:
    """Where the history lies unless a URL is given: a file in the user's data folder."""
    folder = platformdirs.user_data_path("gemma4-conformance", appauthor=False)
    return URL.create("sqlite", database=str(folder / "history.sqlite"))


class Database:
    """A database, checked for its schema.

    Args:
        url: Its URL; None for `default_url()`.
        create: Make what is not there yet, and bring an older schema up to date.

    Raises:
        StoreError: the URL is none, there is no such database, or it cannot be used.
    """

    def __init__(self, url: str | URL | None, *, create: bool) -> None:
        self._url, self._engine = _engine(default_url() if url is None else url)
        try:
            if create:
                self._create()
                self._migrate()
            self._check_version()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Its URL, without a password."""
        return self._url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that no other writer shares its time with."""
        with (
            self._errors(),
            self._connected(writes=True) as connection,
            Session(connection) as session,
            session.begin(),
        ):
            session.execute(select(VersionRow).with_for_update())
            yield session

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads, and sees the database as it is when it begins to."""
        with self._errors(), self._connected() as connection, Session(connection) as session:
            yield session

    def _create(self) -> None:
        file = _file(self._url)
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"{file.parent}: this folder cannot be made: {error.strerror}") from None
        with self._errors():
            try:
                self._create_tables()
            except (IntegrityError, ProgrammingError):
                self._create_tables()  # another process was making them at the same time, and is done

    def _create_tables(self) -> None:
        with self._connected(writes=True) as connection, connection.begin():
            Base.metadata.create_all(connection)
            if connection.execute(select(VersionRow.version)).first() is None:
                connection.execute(insert(VersionRow).values(id=1, version=VERSION))

    def _migrate(self) -> None:
        """Bring an older schema up to date, in one transaction under the lock."""
        with self._errors(), self._connected(writes=True) as connection, connection.begin():
            version = connection.execute(select(VersionRow.version).with_for_update()).scalar_one_or_none()
            for known, statements in sorted(MIGRATIONS.items()):
                if version == known:
                    for statement in statements:
                        connection.execute(text(statement))
                    version = known + 1
                    connection.execute(update(VersionRow).values(version=version))

    def _check_version(self) -> None:
        file = _file(self._url)
        if file is not None and not file.exists():
            raise StoreError(f"{file}: there is no history; `conformance store merge RUN` begins one")
        with self._errors(), self._connected() as connection, connection.begin():
            if not self._engine.dialect.has_table(connection, VersionRow.__tablename__):
                raise StoreError(
                    f"{self.name} holds no history; `conformance store merge RUN` begins one in it"
                )
            version = connection.execute(select(VersionRow.version)).scalar_one_or_none()
        if version is None or version < VERSION:
            raise StoreError(
                f"{self.name} was made by an older harness (schema {version}, this one has {VERSION}); "
                "`conformance store merge RUN` brings it up to date, if it is not too old"
            )
        if version > VERSION:
            raise StoreError(
                f"{self.name} was made by a newer harness (schema {version}, this one knows {VERSION}); "
                "upgrade gemma4-conformance, or name another database"
            )

    @contextlib.contextmanager
    def _connected(self, *, writes: bool = False) -> Iterator[Connection]:
        options: dict[str, Any] = {_WRITES: writes}
        if not writes and self._url.get_backend_name() == "postgresql":
            # Otherwise each statement would see merges that ended since the one before. SQLite's transactions
            # are snapshots already.
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._engine.connect() as connection:
            yield connection.execution_options(**options)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            # The whole message would hold the statement with its values.
            reason = str(error.orig).strip() if isinstance(error, DBAPIError) else str(error)
            raise StoreError(f"{self.name}: the history cannot be used: {reason}") from error


def _engine(url: str | URL) -> tuple[URL, Engine]:
    try:
        parsed = make_url(url)
        patience = {"timeout": _PATIENCE} if _is_sqlite(parsed) else {}
        # A server that was restarted has closed the connections that are kept.
        engine = create_engine(parsed, connect_args=patience, pool_pre_ping=True)
    except ArgumentError:  # its message repeats the URL, and a password with it
        raise StoreError(
            "--database: this is no database URL, or of no kind that SQLAlchemy knows; "
            "name one such as sqlite:///history.sqlite or postgresql+psycopg://user@host/name"
        ) from None
    except ModuleNotFoundError as error:
        raise StoreError(
            f"{parsed.render_as_string(hide_password=True)}: its driver is not installed; "
            f"pip install {error.name}"
        ) from None
    if _is_sqlite(parsed):
        event.listen(engine, "connect", _leave_transactions_to_us)
        event.listen(engine, "begin", _begin)
    elif parsed.get_backend_name() == "postgresql":
        event.listen(engine, "begin", _limit_waiting)
    return parsed, engine


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _file(url: URL) -> Path | None:
    """The file of an SQLite database."""
    named = url.database if _is_sqlite(url) else None
    return Path(named) if named and named != ":memory:" else None


def _leave_transactions_to_us(connection: Any, _record: Any) -> None:
    """Python's driver would begin transactions late, and none for the making of tables."""
    connection.isolation_level = None


def _begin(connection: Connection) -> None:
    """Take SQLite's lock at the beginning, because two readers that go on to write lock each other out."""
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _limit_waiting(connection: Connection) -> None:
    """PostgreSQL would wait for another writer for ever."""
    if connection.get_execution_options().get(_WRITES, False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_PATIENCE}s'")
