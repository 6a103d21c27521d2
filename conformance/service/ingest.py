"""Runs that are sent: who may send, how much, and what becomes of it.

1. The sender shows a token, which is compared in constant time. Without a token nothing can be sent.
2. What is sent goes to a temporary file without a name, up to a limit, however it is sent; then it is read as
   any run file is, line by line. It is never unpacked: a compressed body is refused.
3. One run is read at a time, so that not more than one is in memory.
4. A run is known by its id. Sending it twice changes nothing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import hmac
import logging
import tempfile
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from conformance import runfile
from conformance.errors import RunFileError, UsageError
from conformance.service.names import addressable
from conformance.store import Merged, MisfitError, RunConflictError
from conformance.store.history import Store

TOKEN_VARIABLE = "CONFORMANCE_INGEST_TOKEN"  # noqa: S105  # its name
SHORTEST_TOKEN = 16
"""Characters."""
MEDIA_TYPE = "application/x-ndjson"
DEFAULT_LIMIT = 64 * 1024 * 1024
"""Bytes of a run file."""
MOST_RESULTS = 50_000
"""Planned or given in one run; each is a row, and each case is a page."""
_AHEAD = dt.timedelta(days=1)
"""By which clocks may differ. A run of the future would stay the newest, on the pages and in badges."""
_UPLOADS = 4
"""Requests whose bodies are read at a time."""
_PATIENCE = 300.0
"""Seconds for the body of a request to come."""
_LOG = logging.getLogger(__name__)


class Token:
    """What a sender must show. It is not kept, only its digest is.

    Raises:
        UsageError: it is shorter than `SHORTEST_TOKEN`.
    """

    def __init__(self, text: str) -> None:
        if len(text) < SHORTEST_TOKEN:
            raise UsageError(
                f"{TOKEN_VARIABLE}: a token of fewer than {SHORTEST_TOKEN} characters can be guessed; "
                "draw one by `python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )
        self._digest = _digest(text)

    def matches(self, given: str) -> bool:
        """Whether this is the token. How long it takes says nothing of where the two differ."""
        return hmac.compare_digest(_digest(given), self._digest)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Ingest:
    """Takes runs into a database.

    Args:
        store: The database.
        token: What a sender must show; None if nobody may send.
        limit: Bytes of a run file.
    """

    def __init__(self, store: Store, token: Token | None, limit: int = DEFAULT_LIMIT) -> None:
        self._store = store
        self._token = token
        self._limit = limit
        self._uploads = asyncio.Semaphore(_UPLOADS)
        self._merging = asyncio.Lock()

    @property
    def enabled(self) -> bool:
        """Whether anybody may send."""
        return self._token is not None

    def check_sender(self, given: str | None) -> None:
        """Refuse who may not send.

        Args:
            given: The token that came with the request.

        Raises:
            HTTPException: 403 if nobody may, 401 if the token is missing or wrong.
        """
        if self._token is None:
            raise HTTPException(403, f"runs are not taken here; start the service with {TOKEN_VARIABLE} set")
        if given is None or not self._token.matches(given):
            what = "a token is needed" if given is None else "this is not the token"
            raise HTTPException(
                401, f"{what}; send `Authorization: Bearer TOKEN`", headers={"WWW-Authenticate": "Bearer"}
            )

    async def take(self, request: Request) -> Merged:
        """Merge the run that is the body of a request.

        Raises:
            HTTPException: 400 it did not come whole; 408 it came too slowly; 409 another run has its id;
                413 it is too large; 415 it is of another type, or compressed; 422 it is no run file.
            StoreError: the database cannot be written.
        """
        self._check_headers(request)
        # Not `NamedTemporaryFile`: what is sent has no name that anything could be done with.
        with tempfile.TemporaryFile() as file:
            async with self._uploads:
                await self._receive(request, file)
            async with self._merging:
                return await run_in_threadpool(self._merge, file)

    def _check_headers(self, request: Request) -> None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != MEDIA_TYPE:
            raise HTTPException(415, f"send a run file as `Content-Type: {MEDIA_TYPE}`")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise HTTPException(415, "send the run file as it is, without a Content-Encoding")
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._limit:
            raise self._too_large()

    async def _receive(self, request: Request, file: BinaryIO) -> None:
        size = 0
        try:
            async with asyncio.timeout(_PATIENCE):
                async for portion in request.stream():
                    size += len(portion)
                    if size > self._limit:
                        raise self._too_large()
                    file.write(portion)
        except TimeoutError:
            raise HTTPException(408, f"the run file did not come within {_PATIENCE:.0f} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the run file did not come whole") from None
        file.seek(0)

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413, f"the run file has more than {self._limit} bytes; merge it by `conformance store merge`"
        )

    def _merge(self, file: BinaryIO) -> Merged:
        try:
            run, lines = runfile.read_open(file, "run file")
            run_id = run.header.run_id
            if not addressable(run_id):
                raise HTTPException(
                    422,
                    "the run's id must be up to 100 of `A-Z a-z 0-9 . _ -`, with a letter or digit first",
                )
            if max(len(run.results), len(run.header.manifest)) > MOST_RESULTS:
                raise HTTPException(422, f"the run has more than {MOST_RESULTS} results")
            merged = self._store.merge(run, lines, by=dt.datetime.now(dt.UTC) + _AHEAD)
        except (RunFileError, MisfitError) as error:
            raise HTTPException(422, str(error)) from None
        except RunConflictError:
            raise HTTPException(409, f"run {run_id}: another run of this id is stored") from None
        _LOG.info("run %s: %d results added, %d updated", run_id, merged.added, merged.updated)
        return merged
