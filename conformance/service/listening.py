"""The server: which address it takes, how it ends, and what it logs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from conformance.errors import UsageError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_CONNECTIONS = 200
_FOR_A_HEAD = 10.0
"""Seconds for the head of a request to come whole; a connection that sends none must not count for ever."""
_LAST_WORDS = 20
"""Seconds that open requests have once the server was told to end."""
_ENDINGS = (signal.SIGINT, signal.SIGTERM)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Args:
        host: Address or name.
        port: 0 for any that is free.

    Raises:
        UsageError: it cannot be taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: this address cannot be taken: {error.strerror}; name others by --host and --port"
        ) from None


def url_of(listening: socket.socket) -> str:
    """Where a socket can be reached."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def names_of(host: str, more: Sequence[str]) -> list[str]:
    """Names by which a service may be called.

    Args:
        host: The address that it takes.
        more: Names that were given to it besides.
    """
    own = [f"[{host}]" if ":" in host else host]
    return [*LOOPBACK_NAMES, *own, *more]


class _Impatient(H11Protocol):
    """Closes a connection on which no head of a request comes: uvicorn waits for the first one for ever."""

    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Begin to count where a head is awaited; more of it does not begin anew."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._closing is None and not self.transport.is_closing():
            self._closing = self.loop.call_later(_FOR_A_HEAD, self.transport.close)

    def _stop_watching(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until the process is told to end; requests that are open then are still answered."""
    config = uvicorn.Config(
        app,
        http=_Impatient,
        log_config=None,
        access_log=False,  # it would have queries in it
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_WORDS,
    )
    with _logging(), _ending_quietly():
        uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Messages of the service and of uvicorn on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger("conformance.service"), logging.getLogger("uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
    loggers[0].setLevel(logging.INFO)
    loggers[1].setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextlib.contextmanager
def _ending_quietly() -> Iterator[None]:
    """Once uvicorn has shut down, it raises the signal again that told it to; that is no failure here."""
    before = {number: signal.signal(number, lambda *_: None) for number in _ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
