"""Judge what a target generates from a checkpoint that says the lines of a script by heart.

1. All prompts, with pictures or without, go to the target at once. Every answer must be the script's, token
   by token, with the finish reason that belongs to it; margins are wide, so that rounding decides nothing.
2. Log-probabilities, those of the alternatives too, must be those of the bundled implementation, which reads
   each answer in one pass without a cache. So right tokens from wrong numbers are noticed.
3. With a LoRA adapter, the oracle reads a checkpoint into which the adapter is merged. With a draft head, the
   oracle has none: what a head proposes may change no number.
4. Where keys and values are to be stored in a narrower dtype than is computed in, the oracle rounds them so
   too. In float32, numbers must be clearly nearer to its own than those without rounding are. In bfloat16
   they may be as far from the truth as others may, which says of what is stored no more than a read-back.
5. What ran, as read back from the engine, must be what was asked for.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.checks.base import CheckOutcome
from conformance.errors import EngineError
from conformance.media import ImagePiece
from conformance.oracles import Oracles
from conformance.results import Evidence, Problem
from conformance.suites import GenerationCase
from conformance.targets import bundled
from conformance.targets.bundled import Dialogue
from conformance.targets.protocol import (
    Feature,
    GenerateRequest,
    GenerateResult,
    Generation,
    Target,
    TargetInfo,
)

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 3
"""Differences that are told one by one."""


def judge(case: GenerationCase, target: Target, oracles: Oracles) -> CheckOutcome:
    """Generate once, and compare.

    Raises:
        EngineError: the oracle raised.
        WorkerDiedError, TargetTimeoutError: from the target.
    """
    reason = _cannot(case, target)
    if reason:
        return CheckOutcome("skip", reason=reason)
    asked = _questions(case, oracles) * case.copies
    dialogues = [question.dialogue for question in asked]
    request = _request(case, asked, oracles)
    try:
        result = target.generate(request)
    except EngineError as error:
        problem = Problem(rule="raised", message=f"generation raised {error}", got=str(error))
        return CheckOutcome.from_problems([problem], _evidence(case, request, dialogues, None))
    return CheckOutcome.from_problems(
        [*_setting_problems(request, result), *_answer_problems(case, request, dialogues, result, oracles)],
        _evidence(case, request, dialogues, result),
    )


def _cannot(case: GenerationCase, target: Target) -> str:
    """Why the target is not asked; empty if it is."""
    info: TargetInfo = target.describe()
    if "generate" not in info.capabilities:
        why = info.unavailable.get("generate")
        return f"{target.spec} has no capability `generate`{f': {why}' if why else ''}"
    asked: list[Feature] = list(case.options().features)
    if case.adapter is not None:
        asked.append("lora")
    if case.pictures:
        asked.append("images")
    lacking = [feature for feature in asked if feature not in info.features]
    return f"{target.spec} cannot generate with {', '.join(lacking)}" if lacking else ""


@dataclass(frozen=True)
class _Question:
    dialogue: Dialogue
    images: tuple[str, ...] = ()
    """Files of its pictures."""


def _questions(case: GenerationCase, oracles: Oracles) -> list[_Question]:
    """Prompts without pictures, and between them those with some."""
    words = [] if case.pictures and not case.lines else bundled.dialogues(case.asked, case.lines)
    seen = []
    for prompt in case.pictures:
        files = oracles.files([ImagePiece(image=picture) for picture in prompt.shows])
        colours = [picture.colour for picture in prompt.shows]
        dialogue = bundled.about_pictures(case.asked, prompt.line, colours, causal_images=case.causal_images)
        seen.append(_Question(dialogue, tuple(file.path for file in files)))
    pairs = itertools.zip_longest((_Question(dialogue) for dialogue in words), seen)
    return [question for pair in pairs for question in pair if question is not None]


def _request(case: GenerationCase, asked: Sequence[_Question], oracles: Oracles) -> GenerateRequest:
    checkpoint = bundled.checkpoint(causal_images=case.causal_images)
    draft = oracles.draft(checkpoint, case.eagle3) if case.eagle3 is not None else None
    adapter = oracles.adapter(checkpoint, case.adapter) if case.adapter is not None else None
    return GenerateRequest(
        checkpoint=str(checkpoint),
        prompts=tuple(question.dialogue.prompt for question in asked),
        images=tuple(question.images for question in asked) if case.pictures else (),
        adapter=str(adapter) if adapter is not None else None,
        max_new_tokens=case.max_new_tokens,
        stop_ids=bundled.STOP_IDS,
        top_logprobs=case.top_logprobs,
        options=case.options(str(draft) if draft is not None else None),
    )


def _setting_problems(request: GenerateRequest, result: GenerateResult) -> Iterator[Problem]:
    """What was asked for and not used is a failure, even where the answers agree."""
    ran = result.effective
    for name, value in request.options.asked.items():
        if ran.get(name) != value:
            yield Problem(
                rule=f"wrong-{name.replace('_', '-')}",
                message=f"{name} {value!r} was asked for and {ran.get(name)!r} ran",
                expected=value,
                got=ran.get(name),
            )
    applied = ran.get("adapter")
    if (applied in (None, "", "none")) != (request.adapter is None):
        yield Problem(
            rule="wrong-adapter",
            message="an adapter was asked for and none is applied to any module"
            if request.adapter
            else f"no adapter was asked for and one is applied to {applied}",
            got=applied,
        )


def _answer_problems(
    case: GenerationCase,
    request: GenerateRequest,
    dialogues: Sequence[Dialogue],
    result: GenerateResult,
    oracles: Oracles,
) -> Iterator[Problem]:
    if len(result.generations) != len(dialogues):
        yield Problem(
            rule="answers",
            message=f"{len(result.generations)} answers came to {len(dialogues)} prompts",
            expected=len(dialogues),
            got=len(result.generations),
        )
        return
    pairs = list(zip(dialogues, result.generations, strict=True))
    wrong = [problem for pair in pairs for problem in _text_problems(*pair, case.max_new_tokens)]
    yield from wrong[:_SHOWN]
    if len(wrong) > _SHOWN:
        yield Problem(rule="tokens", message=f"{len(wrong) - _SHOWN} more such differences")
    yield from _number_problems(case, request, pairs, oracles)


def _text_problems(dialogue: Dialogue, made: Generation, limit: int) -> Iterator[Problem]:
    """Tokens and finish reason of one answer."""
    expected = dialogue.answer[:limit]
    if made.token_ids != expected:
        at = next(
            (k for k, pair in enumerate(zip(made.token_ids, expected, strict=False)) if pair[0] != pair[1]),
            min(len(made.token_ids), len(expected)),
        )
        yield Problem(
            rule="tokens",
            message=f"the answer to {dialogue.line!r} differs from its token {at} on",
            expected=bundled.text(expected),
            got=bundled.text(made.token_ids),
        )
    reason = "stop" if len(dialogue.answer) <= limit else "length"
    if made.finish_reason != reason:
        yield Problem(
            rule="finish-reason",
            message=f"the answer to {dialogue.line!r} ended with {made.finish_reason!r}, not {reason!r}",
            expected=reason,
            got=made.finish_reason,
        )


def _number_problems(
    case: GenerationCase,
    request: GenerateRequest,
    pairs: Sequence[tuple[Dialogue, Generation]],
    oracles: Oracles,
) -> Iterator[Problem]:
    """The worst log-probability of the chosen tokens, and of the alternatives."""
    for dialogue, made in pairs:
        count = len(made.token_ids)
        lists = count if case.top_logprobs else len(made.top)
        fewest = min(map(len, made.top), default=case.top_logprobs)
        if len(made.logprobs) != count or len(made.top) != lists or fewest < case.top_logprobs:
            yield Problem(
                rule="logprobs",
                message=f"the answer to {dialogue.line!r} has {count} tokens, {len(made.logprobs)} "
                f"log-probabilities, and {len(made.top)} lists of {fewest} alternatives or more; "
                f"{case.top_logprobs} were asked for",
            )
            return
    said = [bool(made.token_ids) for _, made in pairs]
    pairs = list(itertools.compress(pairs, said))
    images = list(itertools.compress(request.images, said))
    checkpoint = bundled.checkpoint(causal_images=case.causal_images)
    if case.adapter is not None:
        checkpoint = oracles.merged(checkpoint, case.adapter)
    prompts = [dialogue.prompt for dialogue, _ in pairs]
    answers = [made.token_ids for _, made in pairs]
    truth = oracles.logprobs(checkpoint, prompts, answers, "float32", images)
    own = oracles.logprobs(checkpoint, prompts, answers, case.dtype, images, case.kv_dtype)
    # Tokens known by heart have a probability near one, which rounding hardly changes; alternatives do not.
    for values in (_chosen, _alternatives):
        apart = _apart(pairs, truth, own, values)
        limit = max(case.tolerance, case.factor * apart)
        worst, where = _worst(pairs, truth, values)
        if case.kv_dtype is not None and case.dtype == "float32":
            limit = max(case.tolerance, apart / 2)
            worst, where = _worst(pairs, own, values)
        if worst > limit:
            yield Problem(
                rule="logprobs",
                message=f"log-probabilities are up to {worst:.3g} from the oracle's (limit {limit:.3g}): "
                f"{where}",
                got=float(f"{worst:.3g}") if math.isfinite(worst) else "not a number",
            )


Values = Callable[[Generation], Iterator[tuple[int, int, float]]]
"""Position, token and log-probability."""


def _chosen(made: Generation) -> Iterator[tuple[int, int, float]]:
    for place, (token, value) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
        yield place, token, value


def _alternatives(made: Generation) -> Iterator[tuple[int, int, float]]:
    for place, best in enumerate(made.top):
        for token, value in best.items():
            yield place, token, value


def _worst(
    pairs: Sequence[tuple[Dialogue, Generation]], truth: Sequence[Tensor], values: Values
) -> tuple[float, str]:
    """The largest distance from the oracle, and where it is."""
    worst, where = 0.0, ""
    for (dialogue, made), row in zip(pairs, truth, strict=True):
        for place, token, value in values(made):
            expected = float(row[place, token])
            distance = abs(value - expected)
            if math.isnan(distance):
                distance = math.inf
            if distance > worst:
                worst = distance
                where = (
                    f"token {token} at position {place} of the answer to {dialogue.line!r}: {value:.6g}, not "
                    f"{expected:.6g}"
                )
    return worst, where


def _apart(
    pairs: Sequence[tuple[Dialogue, Generation]],
    truth: Sequence[Tensor],
    own: Sequence[Tensor],
    values: Values,
) -> float:
    """How far two passes of the oracle are from each other, over what the target told of."""
    distances = (
        abs(float(mine[place, token]) - float(row[place, token]))
        for (_, made), row, mine in zip(pairs, truth, own, strict=True)
        for place, token, _ in values(made)
    )
    return max(distances, default=0.0)


def _evidence(
    case: GenerationCase,
    request: GenerateRequest,
    dialogues: Sequence[Dialogue],
    result: GenerateResult | None,
) -> Evidence:
    options = request.options.model_dump(mode="json", exclude_defaults=True)
    if request.options.speculation is not None:
        options["speculation"]["checkpoint"] = Path(request.options.speculation.checkpoint).name
    if request.adapter is not None:
        options["adapter"] = Path(request.adapter).name
    shown = [prompt.model_dump(mode="json", exclude_defaults=True) for prompt in case.pictures]
    return Evidence(
        input=json.dumps(
            {
                "prompts": [bundled.text(prompt) for prompt in request.prompts],
                **({"pictures": shown} if shown else {}),
                "max_new_tokens": request.max_new_tokens,
                "options": options,
            },
            ensure_ascii=False,
            indent=2,
        ),
        expected={dialogue.line: bundled.text(dialogue.answer) for dialogue in dialogues},
        got=None
        if result is None
        else {
            "effective": result.effective,
            "answers": [bundled.text(made.token_ids) for made in result.generations],
        },
    )
