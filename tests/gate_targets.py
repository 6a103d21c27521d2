"""Targets for tests of gates, named on the command line as `gate_targets:Solver`.

They know the answers of `nano_gsm8k`, read the prompt as a model would, and misbehave as they are told.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from conformance import resources
from conformance.errors import EngineError, TargetTimeoutError
from conformance.targets import bundled
from conformance.targets.protocol import GenerateRequest, GenerateResult, Generation, TargetInfo
from conformance.tasks.nano import documents

TURN_END = 106
CUT = " but wait,"


@cache
def _answers() -> dict[str, str]:
    """Question to the number that answers it."""
    return {
        doc["question"]: doc["answer"].rpartition("#### ")[2]
        for doc in documents(resources.task_data("nano_gsm8k"))
    }


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(bundled.checkpoint() / "tokenizer.json"))


def _luck(question: str) -> float:
    """Between 0 and 1, the same for the same question."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") / 2**32


class Solver:
    """Right, but for the share of questions that `GATE_WRONG` says."""

    spec = ""

    def __init__(self) -> None:
        self.wrong = float(os.environ.get("GATE_WRONG", "0"))
        self.log = os.environ.get("GATE_LOG")

    def describe(self) -> TargetInfo:
        return TargetInfo(name="solver", version="1", capabilities=("generate",))

    def generate(self, request: GenerateRequest) -> GenerateResult:
        if self.log:
            with Path(self.log).open("a") as file:
                file.write("asked\n" * len(request.prompts))
        made = tuple(self.answer(bundled.text(prompt), request.max_new_tokens) for prompt in request.prompts)
        return GenerateResult(generations=made, effective={"dtype": request.options.dtype})

    def answer(self, prompt: str, limit: int) -> Generation:
        question = prompt.rpartition("<|turn>user\n")[2].partition("<turn|>")[0]
        number = _answers()[question]
        if _luck(question) < self.wrong:
            number += "1"
        return self.said(f"#### {number}", limit)

    def said(self, text: str, limit: int) -> Generation:
        ids = [*_tokenizer().encode(text, add_special_tokens=False).ids, TURN_END]
        cut = tuple(ids[:limit])
        reason = "stop" if len(cut) == len(ids) else "length"
        return Generation(token_ids=cut, finish_reason=reason, logprobs=(0.0,) * len(cut))

    def close(self) -> None:
        pass


class Rambling(Solver):
    """Right, and goes on for ever after one answer of four."""

    def answer(self, prompt: str, limit: int) -> Generation:
        made = super().answer(prompt, limit)
        if _luck(prompt) < 0.25:
            return self.said(CUT * limit, limit)
        return made


class Dropping(Solver):
    """Wrong about a question of four, and times out at just those."""

    def generate(self, request: GenerateRequest) -> GenerateResult:
        if any(_luck(bundled.text(prompt)) < 0.25 for prompt in request.prompts):
            raise TargetTimeoutError("no answer in time")
        return super().generate(request)


class Refusing(Solver):
    """Takes no question with an odd digest."""

    def generate(self, request: GenerateRequest) -> GenerateResult:
        if any(_luck(bundled.text(prompt)) < 0.5 for prompt in request.prompts):
            raise EngineError("too hard")
        return super().generate(request)


class OtherLayout(Solver):
    """Says that it ran two ranks where one was asked for."""

    def generate(self, request: GenerateRequest) -> GenerateResult:
        made = super().generate(request)
        return made.model_copy(update={"effective": {**made.effective, "tensor_parallel": "2"}})


class Parser(Solver):
    """Generates nothing."""

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name="parser",
            version="1",
            capabilities=("parse",),
            unavailable={"generate": "install its engine"},
        )
