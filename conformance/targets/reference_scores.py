"""The harness's own scoring, asked about answers that are given. Importing this loads lm-eval.

A model that says what it is given to say stands in for a target; everything between the document and the
class of the answer is what gates use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conformance.errors import ConformanceError, EngineError
from conformance.evaluation import EvaluationOptions, evaluate
from conformance.targets import bundled
from conformance.targets.protocol import (
    GenerateRequest,
    GenerateResult,
    Generation,
    TargetInfo,
)
from conformance.targets.scores import Scored, ScoreRequest, ScoreResult

_CHECKPOINT = "scripted"
"""Its tokenizer and its template are used; no weight of it is read."""


def score(request: ScoreRequest) -> ScoreResult:
    """Answer a `ScoreRequest`.

    Raises:
        EngineError: the documents cannot be asked or scored.
    """
    speaker = _Speaker(request)
    options = EvaluationOptions(
        thinking=request.thinking,
        max_new_tokens=request.max_new_tokens,
        shots=request.shots,
        filter=request.filter,
        chat_template=request.chat_template,
    )
    # By what they ask and not by their place, on which nothing may depend.
    documents = [{**doc, "id": _name(doc)} for doc in request.documents]
    try:
        sheet = evaluate(
            speaker,  # type: ignore[arg-type]  # it generates, and nothing else is asked of it
            request.task,
            checkpoint=_CHECKPOINT,
            options=options,
            documents=documents,
            examples=request.examples,
        )
    except ConformanceError as error:
        raise EngineError(f"{type(error).__name__}: {error}") from error
    items = {item.doc_id: item for item in sheet.items}
    return ScoreResult(
        scored=tuple(
            Scored(
                outcome=items[_name(doc)].outcome,
                extracted=items[_name(doc)].extracted,
                prompt=prompt,
                budget=budget,
            )
            for doc, (prompt, budget) in zip(request.documents, speaker.asked(), strict=True)
        )
    )


def _name(doc: Mapping[str, Any]) -> str:
    return str(doc["question"])


class _Speaker:
    """A target that says what a request gives it to say, and keeps what it was asked."""

    spec = "recorded-answers"

    def __init__(self, request: ScoreRequest) -> None:
        self._request = request
        self._asked: dict[int, tuple[str, int]] = {}

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name=self.spec, version="1", capabilities=("generate",), features=("images", "sounds")
        )

    def generate(self, request: GenerateRequest) -> GenerateResult:
        return GenerateResult(
            generations=tuple(self._one(prompt, request) for prompt in request.prompts),
            effective={"dtype": request.options.dtype, "attention": "none"},
        )

    def _one(self, prompt: Sequence[int], request: GenerateRequest) -> Generation:
        text = bundled.text(prompt)
        # Questions of examples stand before the one that is asked.
        places = [text.rfind(_name(doc)) for doc in self._request.documents]
        number = max(range(len(places)), key=places.__getitem__)
        if places[number] < 0:
            raise EngineError(f"a prompt holds none of the questions: {text[:200]!r}")
        self._asked[number] = (text, request.max_new_tokens)
        said = self._request.answers[number]
        if said is None:
            raise EngineError("this prompt is refused")
        ids = bundled.tokenizer().encode(said, add_special_tokens=False).ids
        kept = ids[: request.max_new_tokens]
        ended = len(kept) == len(ids) and ids[-1:] and ids[-1] in request.stop_ids
        return Generation(
            token_ids=tuple(kept), finish_reason="stop" if ended else "length", logprobs=(0.0,) * len(kept)
        )

    def asked(self) -> list[tuple[str, int]]:
        """Prompt and budget of each document.

        Raises:
            EngineError: one was not asked about.
        """
        missing = [number for number in range(len(self._request.documents)) if number not in self._asked]
        if missing:
            raise EngineError(f"the document {missing[0]} was not asked about")
        return [self._asked[number] for number in range(len(self._request.documents))]

    def close(self) -> None:
        pass
