"""Asks a target the same prompts in one way or another, and remembers what cases have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from conformance.errors import EngineError
from conformance.invariance_suite import Way
from conformance.oracles import Oracles
from conformance.results import Problem
from conformance.targets.protocol import (
    GenerateRequest,
    GenerateResult,
    Generation,
    Sampling,
    Target,
)

TOP = 20
"""Alternatives asked for: as many as targets give."""

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """What is asked, by whatever way."""

    ids: tuple[Ids, ...]
    images: tuple[tuple[str, ...], ...] = ()
    """Files of each prompt's pictures; empty: no prompt has any."""
    sounds: tuple[tuple[str, ...], ...] = ()
    """Likewise."""
    stop_ids: Ids = ()
    names: tuple[str, ...] = ()
    """What people call them."""

    def pick(self, numbers: Sequence[int]) -> Prompts:
        """Some of them, in another order."""
        return replace(
            self,
            ids=tuple(self.ids[number] for number in numbers),
            images=tuple(self.images[number] for number in numbers) if self.images else (),
            sounds=tuple(self.sounds[number] for number in numbers) if self.sounds else (),
            names=tuple(self.names[number] for number in numbers),
        )

    def followed_by(self, answers: Sequence[Ids]) -> Prompts:
        """Each with the beginning of an answer behind it."""
        ids = tuple((*prompt, *answer) for prompt, answer in zip(self.ids, answers, strict=True))
        return replace(self, ids=ids)


@dataclass(frozen=True)
class Answers:
    """What came back."""

    rounds: tuple[tuple[Generation, ...], ...]
    """One answer to each prompt, in the order of the prompts: for each time that they were asked."""
    effective: dict[str, str] = field(default_factory=dict)
    wrong: tuple[Problem, ...] = ()
    """Settings that were asked for and did not run."""


@dataclass(frozen=True)
class Asker:
    """One target, one checkpoint.

    Args:
        target: It generates.
        oracles: Makes drafts, and keeps answers for other cases.
        checkpoint: Folder of the model.
        drafted_for: Folder of the model whose draft it has; None: its own.
    """

    target: Target
    oracles: Oracles
    checkpoint: Path
    drafted_for: Path | None = None

    def greedy(self, way: Way, prompts: Prompts, limit: int) -> Answers:
        """The likeliest tokens, with alternatives.

        Args:
            way: How to set up the engine and give it the prompts.
            prompts: At least one.
            limit: Most tokens of an answer.

        Raises:
            EngineError: the target refuses, or has not given an answer to each prompt.
            WorkerDiedError, TargetTimeoutError: from the target.
        """
        count = len(prompts.ids)
        orders: list[list[int]] = [list(range(count))]
        if way.given == "alone":
            orders = [[number] for number in range(count)]
        elif way.given == "reversed":
            orders = [list(range(count))[::-1]]
        elif way.given == "twice":
            orders = [[*range(count), *range(count)]]
        rounds: list[list[list[Generation]]] = [[[] for _ in range(count)] for _ in range(way.repeat)]
        effective: dict[str, str] = {}
        wrong: dict[str, Problem] = {}
        for order in orders:
            request = self._request(way, prompts.pick(order), limit)
            result = self._ask(request, len(order))
            effective = result.effective
            wrong |= {problem.rule: problem for problem in wrong_settings(request, effective)}
            answers = iter(result.generations)
            for asked in rounds:
                for number in order:
                    asked[number].append(next(answers))
        turns = tuple(tuple(each) for asked in rounds for each in zip(*asked, strict=True))
        return Answers(turns, effective, tuple(wrong.values()))

    def drawn(self, way: Way, prompts: Prompts, sampling: Sampling, limit: int, draws: int) -> Answers:
        """Drawn answers: as many rounds as there are draws.

        Raises:
            EngineError, WorkerDiedError, TargetTimeoutError: as `greedy`.
        """
        request = self._request(way, prompts, limit).model_copy(
            update={"sampling": sampling, "samples": draws, "top_logprobs": 0, "stop_ids": ()}
        )
        result = self._ask(request, len(prompts.ids) * draws)
        rows = [result.generations[k * draws : (k + 1) * draws] for k in range(len(prompts.ids))]
        turns = tuple(zip(*rows, strict=True))
        return Answers(turns, result.effective, tuple(wrong_settings(request, result.effective)))

    def states(self, way: Way, prompt: Prompts) -> Path:
        """The file with what each layer gives for the last token of the one prompt.

        Raises:
            EngineError, WorkerDiedError, TargetTimeoutError: as `greedy`.
        """
        path = str(self.oracles.output())
        self.target.generate(self._request(way, prompt, 1).model_copy(update={"states": path}))
        return Path(path)

    def _request(self, way: Way, prompts: Prompts, limit: int) -> GenerateRequest:
        draft = None
        if way.eagle3 is not None or way.assistant is not None:
            draft = self.oracles.speaking_draft(self.drafted_for or self.checkpoint, way)
        return GenerateRequest(
            checkpoint=str(self.checkpoint),
            prompts=prompts.ids,
            images=prompts.images if any(prompts.images) else (),
            sounds=prompts.sounds if any(prompts.sounds) else (),
            max_new_tokens=limit,
            stop_ids=prompts.stop_ids,
            top_logprobs=TOP,
            repeat=way.repeat,
            options=way.options(str(draft) if draft is not None else None),
        )

    def _ask(self, request: GenerateRequest, count: int) -> GenerateResult:
        """The same request is asked once in a session."""
        text = json.dumps([self.target.spec, request.model_dump()], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        kept = self.oracles.kept
        if key not in kept:
            result = self.target.generate(request)
            expected = count * request.repeat
            if len(result.generations) != expected:
                raise EngineError(f"{len(result.generations)} answers came where {expected} were asked for")
            kept[key] = result
        found: GenerateResult = kept[key]
        return found


def wrong_settings(request: GenerateRequest, effective: dict[str, str]) -> list[Problem]:
    """What was asked for and did not run."""
    return [
        Problem(
            rule=f"wrong-{name.replace('_', '-')}",
            message=f"{name} {value!r} was asked for and {effective.get(name)!r} ran",
            expected=value,
            got=effective.get(name),
        )
        for name, value in request.options.asked.items()
        if effective.get(name) != value
    ]
