"""Targets that say what a function gives them to say: one generates token ids, the other serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from conformance.errors import EngineError, WorkerDiedError
from conformance.targets import bundled
from conformance.targets.protocol import (
    GenerateRequest,
    GenerateResult,
    Generation,
    ServeAnswer,
    ServeRequest,
    TargetInfo,
)

Speaker = Callable[[str], str]
"""A prompt, or the last message's text, to what is said; it may raise."""


class Generates:
    """Says what the speaker says, in the scripted checkpoint's tokens, and keeps what it was asked."""

    spec = "generates"

    def __init__(
        self,
        speaker: Speaker,
        *,
        dtype: str = "float32",
        features: Sequence[str] = (),
        silent: Sequence[str] = (),
    ) -> None:
        self._speaker = speaker
        told = {"dtype": dtype, "attention": "mouth"}
        self._effective = {name: value for name, value in told.items() if name not in silent}
        self._features = tuple(features)
        self.asked: list[GenerateRequest] = []

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name="generates",
            version="1",
            capabilities=("generate",),
            features=self._features,  # type: ignore[arg-type]
        )

    def generate(self, request: GenerateRequest) -> GenerateResult:
        self.asked.append(request)
        return GenerateResult(
            generations=tuple(self._one(prompt, request) for prompt in request.prompts),
            effective=self._effective,
        )

    def _one(self, prompt: Sequence[int], request: GenerateRequest) -> Generation:
        said = self._speaker(bundled.text(prompt))
        ids = bundled.tokenizer().encode(said, add_special_tokens=False).ids
        stopped = bool(ids) and ids[-1] in request.stop_ids and len(ids) <= request.max_new_tokens
        ids = ids[: request.max_new_tokens]
        return Generation(
            token_ids=tuple(ids), finish_reason="stop" if stopped else "length", logprobs=(0.0,) * len(ids)
        )

    def close(self) -> None:
        pass


class Serves:
    """Says what the speaker says as chat completions, and keeps the bodies."""

    spec = "serves"

    def __init__(self, speaker: Speaker, *, reasoning: str = "") -> None:
        self._speaker = speaker
        self._reasoning = reasoning
        self.bodies: list[Any] = []

    def describe(self) -> TargetInfo:
        return TargetInfo(name="serves", version="1", capabilities=("serve",))

    def serve(self, request: ServeRequest) -> Sequence[ServeAnswer]:
        self.bodies += request.bodies
        return [self._one(body) for body in request.bodies]

    def _one(self, body: Any) -> ServeAnswer:
        message: dict[str, Any] = {"role": "assistant", "content": self._speaker(words(body))}
        if self._reasoning:
            message["reasoning"] = self._reasoning
        choice = {"message": message, "finish_reason": "stop"}
        return ServeAnswer(status=200, body={"choices": [choice], "usage": {"completion_tokens": 3}})

    def close(self) -> None:
        pass


def words(body: Any) -> str:
    """The text of a body's last message."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def refuses(mark: str, speaker: Speaker, *, dies: bool = False) -> Speaker:
    """Raises where the prompt holds a mark."""

    def speak(prompt: str) -> str:
        if mark in prompt:
            raise WorkerDiedError("gone") if dies else EngineError("no such prompts")
        return speaker(prompt)

    return speak
