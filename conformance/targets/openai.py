"""Any server with OpenAI's chat completions as a target: `openai@URL#MODEL`.

The key comes from an environment variable and stays in this module's headers. An answer that holds it is
thrown away, and a message that would is not made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from conformance.fingerprint import redact
from conformance.http import Answer, Client, HttpError, Limits
from conformance.replies import MalformedReplyError, read_stream, read_whole, strings
from conformance.targets.endpoint import NAME, Endpoint, endpoint, key_of
from conformance.targets.protocol import ServeAnswer, ServeRequest, TargetInfo


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
        if isinstance(answer, HttpError):
            detail = redact(self._without_key(str(answer)))
            return ServeAnswer(status=answer.status, failure=answer.failure, detail=detail)
        if self._key and any(self._key in text for text in _all_text(answer)):
            return ServeAnswer(
                status=answer.status,
                failure="key-echoed",
                detail="the server sent the key back in its answer, which was thrown away",
            )
        return ServeAnswer(status=answer.status, body=answer.body, events=answer.events, done=answer.done)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _all_text(answer: Answer) -> list[str]:
    """Every text of an answer, those of a stream also put together."""
    texts = [*strings(answer.body), *strings(answer.events)]
    try:
        if answer.events is not None:
            reply = read_stream(answer.events, done=answer.done)
        else:
            reply = read_whole(answer.body)
    except MalformedReplyError:
        return [*texts, "".join(texts), "".join(reversed(texts))]
    return texts + reply.texts() + [call.id for call in reply.calls]


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
