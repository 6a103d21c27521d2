"""Any server with OpenAI's chat completions as a target: `openai@URL#MODEL`.

The key comes from an environment variable and stays in this module's headers. An answer that holds it is
thrown away, and a message that would is not made.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from conformance.fingerprint import redact
from conformance.http import Answer, Client, HttpError, Limits
from conformance.replies import MalformedReplyError, read_stream, strings
from conformance.targets.endpoint import NAME, Endpoint, endpoint, key_of
from conformance.targets.protocol import ServeAnswer, ServeRequest, TargetInfo

_SHOWN = 200
"""Characters of a server's text in a message."""

_ESCAPE = re.compile(r"""\\(?:u([0-9a-fA-F]{4})|(["'\\/]))""")


class OpenAITarget:
    """A live server.

    Args:
        where: The endpoint.
        limits: Of time, size and number of requests.
        key: The server's key; empty for none.
    """

    def __init__(self, where: Endpoint, *, limits: Limits | None = None, key: str = "") -> None:
        self.spec = where.spec
        self.endpoint = where
        self._key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = Client(where.url, headers, limits or Limits())

    def describe(self) -> TargetInfo:
        """It serves; nothing is asked for that."""
        return TargetInfo(
            name=NAME,
            version="unknown",
            capabilities=("serve",),
            environment={"url": self.endpoint.url, "model": self.endpoint.model},
            note="POST /chat/completions",
        )

    def models(self) -> ServeAnswer:
        """What the server lists."""
        return self._safe(self._client.get("/models"))

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        """Post every body at the same time."""
        bodies: list[dict[str, Any] | str] = [
            body if isinstance(body, str) else {"model": self.endpoint.model} | body
            for body in request.bodies
        ]
        return [self._safe(answer) for answer in self._client.post("/chat/completions", bodies)]

    def close(self) -> None:
        """Connections are closed with their answers."""

    def _safe(self, answer: Answer | HttpError) -> ServeAnswer:
        """The answer, unless the key is in it, whole or spread over the events of a stream."""
        texts = [answer.said] if isinstance(answer, HttpError) else _all_text(answer)
        if self._holds_key(texts):
            return ServeAnswer(
                status=answer.status,
                failure="key-echoed",
                detail="the server sent the key back in its answer, which was thrown away",
            )
        if isinstance(answer, HttpError):
            said = f": {answer.said[:_SHOWN]!r}" if answer.said else ""
            detail = redact(f"{self._without_key(str(answer))}{said}")
            return ServeAnswer(status=answer.status, failure=answer.failure, detail=detail)
        return ServeAnswer(status=answer.status, body=answer.body, events=answer.events, done=answer.done)

    def _holds_key(self, texts: Iterable[str]) -> bool:
        """Whether the key is in a text as it stands, or as the JSON or the URL that the text is part of."""
        if not self._key:
            return False
        return any(self._key in form for text in texts for form in (text, _unescaped(text), unquote(text)))

    def _without_key(self, text: str) -> str:
        """An error of this machine's, which may quote a header."""
        return text.replace(self._key, "[key]") if self._key else text


def _unescaped(text: str) -> str:
    """The text with the escapes of JSON and of `repr` undone."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else found[2], text)


def _all_text(answer: Answer) -> list[str]:
    """Every text of an answer, those of a stream also put together."""
    texts = [*strings(answer.body), *strings(answer.events)]
    if answer.events is None:
        return texts
    texts += _put_together(answer.events)
    try:
        reply = read_stream(answer.events, done=answer.done)
    except MalformedReplyError:
        return texts
    return texts + reply.texts()


def _put_together(events: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of equal name in all events, put together: all of them, and those of each index alone.

    It reads every stream, also one that breaks the rules.
    """
    parts: defaultdict[tuple[str, Any], list[str]] = defaultdict(list)
    stack: list[tuple[str, Any, Any]] = [("", None, event) for event in reversed(events)]
    while stack:
        name, index, value = stack.pop()
        if isinstance(value, str):
            for group in {None, index}:
                parts[name, group].append(value)
        elif isinstance(value, dict):
            inner = value["index"] if isinstance(value.get("index"), int) else index
            stack += [(key, inner, item) for key, item in reversed(value.items())]
        elif isinstance(value, list):
            stack += [(name, index, item) for item in reversed(value)]
    return ["".join(texts) for texts in parts.values()]


def open_endpoint(spec: str, *, timeout: float) -> OpenAITarget:
    """Open the target that a spec names.

    Args:
        spec: `openai@URL#MODEL`.
        timeout: Seconds for one request.

    Raises:
        TargetError: the spec or the key's variable is wrong.
    """
    limits = replace(Limits(), total=timeout, idle=min(Limits.idle, timeout))
    return OpenAITarget(endpoint(spec), limits=limits, key=key_of())
