"""A PostgreSQL server of the tests' own: Debian's binaries, a private folder, a socket in it and no port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

_DEADLINE = 120
"""Seconds for each step, on a busy machine."""
_QUICK = ("fsync=off", "full_page_writes=off", "synchronous_commit=off", "shared_buffers=16MB")
"""What would only matter if the machine broke down in the middle."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    folder: Path

    def fresh(self) -> str:
        """URL of its database, emptied; nobody may be connected to it."""
        # Not a new database each time: each takes seven megabytes, and tests ask for hundreds.
        with psycopg.connect(self._place, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '60s'")
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return f"postgresql+psycopg://tests@/postgres?host={self.folder}"

    def cut_connections(self) -> None:
        """Close all connections to it, as a restart does."""
        with psycopg.connect(self._place, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
            )

    def answers(self) -> bool:
        """Whether it takes connections yet."""
        try:
            psycopg.connect(self._place, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def _place(self) -> str:
        return f"host={self.folder} user=tests dbname=postgres"


def binaries() -> Path | None:
    """Folder of the server's programs; Debian keeps them off the PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    installed = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(installed, key=lambda folder: int(folder.parent.name), default=None)


@contextmanager
def server() -> Iterator[Server]:
    """Start a server, and end it. It also ends when this process does, whatever becomes of it."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed; on Debian: apt-get install postgresql")
    # Not below pytest's own folder, which only its owner may enter; and short, because it holds a socket.
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        run_as = _other_user(folder)
        made = ["--auth=trust", "--username=tests", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [*run_as, programs / "initdb", "-D", folder / "data", *made],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=_DEADLINE,
        )
        options = [word for setting in (*_QUICK, "listen_addresses=") for word in ("-c", setting)]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*run_as, programs / "postgres", "-D", folder / "data", "-k", folder, *options],
                cwd=folder,
                stdout=log,
                stderr=log,
            )
        try:
            yield _ready(Server(folder), process)
        finally:
            process.send_signal(signal.SIGQUIT)  # at once, without tidying what is removed anyway
            try:
                process.wait(timeout=_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=_DEADLINE)
    finally:
        shutil.rmtree(folder)


def _ready(started: Server, process: subprocess.Popen[bytes]) -> Server:
    until = time.monotonic() + _DEADLINE
    while not started.answers():
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"PostgreSQL did not start: {(started.folder / 'log').read_text()}")
        time.sleep(0.2)
    return started


def _other_user(folder: Path) -> list[str]:
    """The beginning of a command that dies with this process; not as root, which PostgreSQL refuses."""
    command = ["setpriv", "--pdeathsig", "QUIT"]
    if os.geteuid() != 0:
        return command
    names = {user.pw_name: user for user in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    os.chown(folder, user.pw_uid, user.pw_gid)
    return [*command, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
