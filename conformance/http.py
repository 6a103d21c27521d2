"""HTTP to a server that is not trusted: every request has limits, and nothing follows a redirect.

1. One request, one connection. Its time is limited to connect, between two pieces of the answer, and as a
   whole; so are the bytes of the answer, and the number of requests of a client.
2. A redirect is an answer like any other: its target is never asked, so it never learns the key.
3. Nothing is asked twice: a refusal for too many requests (429) is an answer too.
4. Settings of the machine (proxies, `.netrc`) are not read: only the key's own variable is.
"""

from __future__ import annotations

import contextlib
import json
import queue
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import httpx2

Failure = Literal["redirect", "timeout", "too-large", "connection", "malformed", "budget"]


@dataclass(frozen=True)
class Limits:
    """What one answer may take, and how many requests there may be."""

    connect: float = 10.0
    """Seconds until the connection stands."""
    idle: float = 60.0
    """Seconds without a byte of the answer."""
    total: float = 300.0
    """Seconds for the whole answer."""
    max_bytes: int = 8_000_000
    max_events: int = 50_000
    """Of one stream."""
    max_requests: int = 5_000


class HttpError(Exception):
    """Why there is no whole answer.

    Args:
        failure: What kind of failure.
        message: What happened, without any text of the server's.
        status: Of the answer, if it had got so far.
        said: The server's text that is to blame, all of it. It may hold the key: shorten and show it only
            after it was searched.
    """

    def __init__(self, failure: Failure, message: str, status: int | None = None, said: str = "") -> None:
        super().__init__(message)
        self.failure: Failure = failure
        self.status = status
        self.said = said


@dataclass(frozen=True)
class Answer:
    """A whole answer: its JSON, or the JSON of its events."""

    status: int
    body: Any = None
    events: tuple[dict[str, Any], ...] | None = None
    done: bool = False
    """The stream ended with `[DONE]`."""


class Client:
    """Sends JSON to one server.

    Args:
        base_url: What paths are appended to.
        headers: Sent with every request, the key among them.
        limits: Of each request, and of their number.
    """

    def __init__(self, base_url: str, headers: dict[str, str], limits: Limits) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = headers | {"Accept-Encoding": "identity"}
        self._limits = limits
        self._left = limits.max_requests
        self._lock = threading.Lock()

    def get(self, path: str) -> Answer | HttpError:
        """Fetch one resource."""
        return self._at_once([("GET", path, None)])[0]

    def post(self, path: str, bodies: Sequence[dict[str, Any] | str]) -> list[Answer | HttpError]:
        """Post all bodies at the same time; answers in the same order."""
        texts = [body if isinstance(body, str) else json.dumps(body, ensure_ascii=False) for body in bodies]
        return self._at_once([("POST", path, text) for text in texts])

    def _at_once(self, requests: Sequence[tuple[str, str, str | None]]) -> list[Answer | HttpError]:
        """One thread a request; a server that drips bytes for ever holds a thread, not the caller."""
        answers: queue.SimpleQueue[tuple[int, Answer | HttpError]] = queue.SimpleQueue()
        open_clients: list[httpx2.Client] = []

        def work(number: int, method: str, path: str, text: str | None) -> None:
            answers.put((number, self._answer(method, path, text, open_clients)))

        for number, request in enumerate(requests):
            threading.Thread(target=work, args=(number, *request), daemon=True).start()
        late = HttpError("timeout", f"no whole answer within {self._limits.total:g} s")
        found: list[Answer | HttpError] = [late] * len(requests)
        end = time.monotonic() + self._limits.connect + self._limits.total
        try:
            for _ in requests:
                number, answer = answers.get(timeout=max(0.0, end - time.monotonic()))
                found[number] = answer
        except queue.Empty:
            pass  # those that are missing stay `late`
        finally:
            with self._lock:
                left_open = list(open_clients)
            for client in left_open:
                client.close()
        return found

    def _answer(
        self, method: str, path: str, text: str | None, open_clients: list[httpx2.Client]
    ) -> Answer | HttpError:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                limit = self._limits.max_requests
                return HttpError("budget", f"the {limit} requests that this run may send are used up")
        client = httpx2.Client(
            headers=self._headers,
            timeout=httpx2.Timeout(self._limits.idle, connect=self._limits.connect),
            follow_redirects=False,
            trust_env=False,
            verify=_ssl_context(),
        )
        with self._lock:
            open_clients.append(client)
        try:
            with client:
                return self._exchange(client, method, path, text)
        except HttpError as error:
            return error
        except httpx2.ConnectTimeout:
            return HttpError("timeout", f"no connection within {self._limits.connect:g} s")
        except httpx2.TimeoutException:
            return HttpError("timeout", f"no byte for {self._limits.idle:g} s")
        except httpx2.DecodingError as error:
            return HttpError("malformed", "the answer cannot be decoded", said=str(error))
        except httpx2.SSEError as error:
            return HttpError("malformed", "the stream is none of events", said=str(error))
        except httpx2.RemoteProtocolError as error:
            return HttpError("connection", "the server broke the connection or the protocol", said=str(error))
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as error:
            return HttpError("connection", f"{type(error).__name__}: {error}")
        finally:
            with self._lock, contextlib.suppress(ValueError):
                open_clients.remove(client)

    def _exchange(self, client: httpx2.Client, method: str, path: str, text: str | None) -> Answer:
        end = time.monotonic() + self._limits.total
        content = None if text is None else text.encode("utf-8", "surrogatepass")
        headers = {} if text is None else {"Content-Type": "application/json"}
        with client.stream(method, self._base_url + path, content=content, headers=headers) as response:
            status = response.status_code
            if response.is_redirect or 300 <= status < 400:
                where = response.headers.get("location", "nowhere")
                raise HttpError("redirect", f"HTTP {status} elsewhere was not followed", status, where)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise HttpError("malformed", "the answer is compressed, which was not asked for", status)
            assert isinstance(response.stream, httpx2.SyncByteStream)
            response.stream = _Limited(response.stream, self._limits, end)
            try:
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    events, done = self._events(response)
                    return Answer(status, events=events, done=done)
                return Answer(status, body=_json(b"".join(response.iter_bytes()), status))
            except HttpError as error:
                raise HttpError(error.failure, str(error), status, error.said) from None

    def _events(self, response: httpx2.Response) -> tuple[tuple[dict[str, Any], ...], bool]:
        events: list[dict[str, Any]] = []
        done = False
        for event in httpx2.EventSource(response, max_event_size=None):
            if not event.data:
                continue
            if done:
                raise HttpError("malformed", "an event comes after [DONE]", said=event.data)
            if event.data.strip() == "[DONE]":
                done = True
                continue
            value = _json(event.data.encode("utf-8", "surrogatepass"), None)
            if not isinstance(value, dict):
                raise HttpError("malformed", "an event is no JSON object", said=event.data)
            events.append(value)
            if len(events) > self._limits.max_events:
                raise HttpError("too-large", f"the stream has more than {self._limits.max_events} events")
        return tuple(events), done


class _Limited(httpx2.SyncByteStream):
    """A stream of bytes that ends in an error when it takes too long or grows too large."""

    def __init__(self, stream: httpx2.SyncByteStream, limits: Limits, end: float) -> None:
        self._stream = stream
        self._limits = limits
        self._end = end

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > self._limits.max_bytes:
                raise HttpError("too-large", f"the answer has more than {self._limits.max_bytes} bytes")
            if time.monotonic() > self._end:
                raise HttpError("timeout", f"no whole answer within {self._limits.total:g} s")
            yield part

    def close(self) -> None:
        self._stream.close()


def _json(content: bytes, status: int | None) -> Any:
    """The JSON of an answer; None for an error's answer that is none, which has a status to judge."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if status is not None and status >= 400:
            return None
        said = content.decode("utf-8", "replace")
        raise HttpError("malformed", f"not JSON ({type(error).__name__})", said=said) from None


@cache
def _ssl_context() -> ssl.SSLContext:
    return httpx2.create_ssl_context(trust_env=False)
