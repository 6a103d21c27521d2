"""The service, for its tests: in this process, or as `conformance serve` in one of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from starlette.testclient import TestClient
from starlette.types import ASGIApp

from conformance.results import Footer, Header, Result
from conformance.service.app import make_app
from conformance.service.ingest import DEFAULT_LIMIT, MEDIA_TYPE, Ingest, Token
from conformance.service.listening import LOOPBACK_NAMES
from conformance.service.pages import Dashboard
from conformance.store.history import Store
from tests.conftest import ROOT

TOKEN = "a token that only the tests know"
SENDER = {"Authorization": f"Bearer {TOKEN}", "Content-Type": MEDIA_TYPE}
_DEADLINE = 120
"""Seconds to start: on a busy machine the imports alone take half a minute."""


def app(store: Store, *, token: str | None = TOKEN, limit: int = DEFAULT_LIMIT) -> ASGIApp:
    ingest = Ingest(store, Token(token) if token is not None else None, limit)
    return make_app(store, Dashboard(store), ingest, LOOPBACK_NAMES)


def client(store: Store, **options: object) -> TestClient:
    """Errors of the application are answers, as they are to those who ask over the network."""
    made = app(store, **options)  # type: ignore[arg-type]
    address = "http://127.0.0.1"
    return TestClient(made, base_url=address, raise_server_exceptions=False, follow_redirects=False)


def lines(*content: Header | Result | Footer) -> bytes:
    return b"".join(line.model_dump_json().encode() + b"\n" for line in content)


@dataclass
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def running(
    folder: Path, database: str, *arguments: str, token: str | None = TOKEN, options: Sequence[str] = ()
) -> Iterator[Running]:
    """`conformance serve` on a free port; killed at the end if it did not end before."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "CONFORMANCE_"))}
    variables["PYTHONPATH"] = str(ROOT)
    if token is not None:
        variables["CONFORMANCE_INGEST_TOKEN"] = token
    command = [sys.executable, "-m", "conformance", "serve", "--port", "0", "--database", database]
    folder.mkdir(parents=True, exist_ok=True)
    out, log = folder / "out", folder / "log"
    with out.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *options, *arguments],
            cwd=folder,
            env=variables,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
    try:
        yield Running(process, _url(process, out, log), log)
    finally:
        process.kill()
        process.wait(timeout=60)


def logged(served: Running, line: str) -> str:
    """The log once a line is in it: a request is logged when its answer is on its way already."""
    until = time.monotonic() + _DEADLINE
    while line not in (log := served.log.read_text()):
        assert time.monotonic() < until, f"{line!r} is not in the log: {log}"
        time.sleep(0.05)
    return log


def _url(process: subprocess.Popen[str], out: Path, log: Path) -> str:
    until = time.monotonic() + _DEADLINE
    while time.monotonic() < until:
        found = re.search(r"at (http://\S+?)/?(?:,|\n)", out.read_text())
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"the service did not start: {out.read_text()}{log.read_text()}")
