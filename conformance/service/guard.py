"""What every request and every answer passes: security headers and the log of access.

It stands outside the application, so that answers to errors of the application pass it too.
"""

from __future__ import annotations

import logging
import time
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Content-Security-Policy: styles and the icon come from here, nothing else is loaded, nothing runs."""
_ALWAYS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
_UNLESS_SAID = {"cross-origin-resource-policy": "same-origin", "cache-control": "no-cache"}
_LOG = logging.getLogger(__name__)


class Guard:
    """Wraps an application.

    The log has method, path, status and time of a request: neither its query nor its headers, in which
    someone may have put a token.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _ALWAYS.items():
                    headers[name] = value
                for name, value in _UNLESS_SAID.items():
                    headers.setdefault(name, value)
                if status >= 400 and scope["method"] not in ("GET", "HEAD"):
                    # The body may not have been read, and the server would read all of it first.
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, guarded)
        finally:
            took = 1000 * (time.monotonic() - began)
            _LOG.info("%s %s %d %.0f ms", scope["method"], quote(scope["path"])[:300], status, took)
