"""The server: which address it takes, how it ends, and what it logs."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from conformance.errors import UsageError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_CONNECTIONS = 200
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


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until the process is told to end; requests that are open then are still answered."""
    config = uvicorn.Config(
        app,
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
