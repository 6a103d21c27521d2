"""A target's answers to a task, scored by lm-eval: `evaluate` gives a sheet.

lm-eval's own evaluator builds the prompts, applies the task's filters and its metric. What it says of each
document is put together with what the model saw of the answer: how it ended, and why there may be none.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval.api.task  # type: ignore[import-untyped]
from lm_eval import evaluator
from pydantic import Field

import conformance
from conformance import evaluation_tasks, fingerprint
from conformance.answering import Cache, EvaluationError, Progress, UnavailableError
from conformance.evaluation_tasks import Documents, LoadedTask, document_sha256
from conformance.lm_eval_model import BATCH_SIZE, Asked, ConformanceLM
from conformance.records import Record
from conformance.scoring import Item, OutcomeClass, Sheet, SheetHeader, classify, read_extracted
from conformance.targets import registry
from conformance.targets.protocol import EngineOptions, Feature, Target
from conformance.targets.reference_chat import checkpoint_folder, checkpoint_sha256

_ANSWER = "#### "
"""Before the answer in solutions of GSM8K and tasks of its form."""


class EvaluationOptions(Record):
    """How a task is asked."""

    thinking: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    """None: as the task says."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples before each question; None: as the task has it."""
    filter: str | None = None
    """lm-eval's filter that reads the answers; None: the task's first."""
    order_seed: int = 0
    """Of the order in which documents are drawn."""
    chat_template: bool = True
    batch_size: int = Field(default=BATCH_SIZE, ge=1)
    """Questions at once."""
    engine: EngineOptions = EngineOptions()
    cache: Path | None = None
    """JSON Lines file that keeps answers, so that an interrupted evaluation goes on."""


def evaluate(
    target: Target,
    task: str,
    *,
    checkpoint: str | Path = "",
    limit: int | None = None,
    seed: int = 0,
    options: EvaluationOptions | None = None,
    progress: Progress | None = None,
    documents: Documents | None = None,
    examples: Documents = (),
) -> Sheet:
    """Ask a target a task's questions and score the answers.

    Args:
        target: Has the capability `generate` or `serve`.
        task: By lm-eval's name for it: a task, or a group of them.
        checkpoint: A bundled one's name or a folder; for a server, only a name for the sheet.
        limit: Most documents; they are drawn in the recorded order.
        seed: Of the choice of solved examples.
        options: How it is asked.
        progress: Told after each batch how many of how many are answered.
        documents: In place of the task's own.
        examples: Where there are `documents`, the solved ones that stand before questions.

    Raises:
        UnavailableError: the target cannot do what the task needs.
        EvaluationError: there is no such task, filter or document, or what ran is not what was asked for.
        DataError: the task's documents cannot be read.
        CheckpointError: there is no such checkpoint.
    """
    options = options or EvaluationOptions()
    if options.thinking and not options.chat_template:
        raise EvaluationError("a thought is asked for by the chat template; leave it on, or thinking off")
    with _quiet():
        loaded = evaluation_tasks.load(
            task, shots=options.shots, seed=seed, documents=documents, examples=examples
        )
        scheme = _scheme(loaded, options.filter)
        _check_media(loaded, target)
        drawn = _draw(loaded, limit, options.order_seed)
        model, about = _model(target, checkpoint, options, progress)
        results = evaluator.evaluate(
            model,
            task_dict={"tasks": {name: loaded.parts[name] for name in drawn.places}, "groups": {}},
            samples=drawn.places,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.chat_template,
            bootstrap_iters=0,
        )
    if model.chat is not None and any(not each.answer.failure for each in model.asked):
        _check_effective(options.engine, model.answerer.effective, target.spec)
    samples = {
        (name, sample["doc_id"]): sample
        for name, found in results["samples"].items()
        for sample in found
        if sample["filter"] == scheme
    }
    asked = {(each.task, drawn.places[each.task][each.place]): each for each in model.asked}
    metric = str(next(iter(samples.values()))["metrics"][0])
    header = SheetHeader(
        task=task,
        task_version=loaded.version,
        filter=scheme,
        metric=metric,
        target=target.spec,
        effective=model.answerer.effective,
        dtype=model.answerer.effective.get("dtype", "unknown"),
        template_sha256=model.chat.template_sha256 if model.chat and options.chat_template else "",
        thinking=options.thinking,
        shots=loaded.shots,
        max_new_tokens=max(each.question.max_new_tokens for each in model.asked),
        seed=seed,
        order_seed=options.order_seed,
        limit=limit,
        available=drawn.available,
        data=dict(loaded.data),
        lm_eval=metadata.version("lm-eval"),
        harness=conformance.__version__,
        commit=fingerprint.git_commit(but_references=True),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **about,
    )
    items = (_item(loaded, key, asked[key], samples[key], metric) for key in drawn.order)
    return Sheet(header=header, items=tuple(items))


@dataclass(frozen=True)
class _Drawn:
    """Documents, by task and number."""

    order: tuple[tuple[str, int], ...]
    available: int

    @property
    def places(self) -> dict[str, list[int]]:
        """Numbers in each task that has any, sorted, as lm-eval wants them."""
        found: dict[str, list[int]] = {}
        for name, place in sorted(self.order):
            found.setdefault(name, []).append(place)
        return found


def _draw(loaded: LoadedTask, limit: int | None, seed: int) -> _Drawn:
    every = [(name, place) for name, part in loaded.parts.items() for place in range(len(part.eval_docs))]
    order = list(every)
    random.Random(seed).shuffle(order)  # noqa: S311 - not a secret
    if limit is not None and limit < 1:
        raise EvaluationError(f"a limit of {limit} leaves nothing to ask")
    return _Drawn(tuple(order[:limit]), len(every))


def _check_media(loaded: LoadedTask, target: Target) -> None:
    """Look for what would be found out at the first question, before hundreds of pictures are written.

    Raises:
        UnavailableError: the target generates, and takes no media of the task's kind.
    """
    info = target.describe()
    if "generate" not in info.capabilities:
        return
    needed: dict[Feature, bool] = {
        "images": any(part.config.doc_to_image is not None for part in loaded.parts.values()),
        "sounds": any(part.config.doc_to_audio is not None for part in loaded.parts.values()),
    }
    lacking = [feature for feature, is_needed in needed.items() if is_needed and feature not in info.features]
    if lacking:
        raise UnavailableError(f"{target.spec} cannot generate with {', '.join(lacking)}")


def _scheme(loaded: LoadedTask, wanted: str | None) -> str:
    """Name of the filter that reads the answers."""
    part = next(iter(loaded.parts.values()))
    names = [str(each["name"]) for each in part.config.filter_list or ({"name": "none"},)]
    if wanted is not None and wanted not in names:
        raise EvaluationError(f"{loaded.name} has no filter {wanted!r}; it has {', '.join(names)}")
    return wanted or names[0]


def _model(
    target: Target, checkpoint: str | Path, options: EvaluationOptions, progress: Progress | None
) -> tuple[ConformanceLM, dict[str, Any]]:
    """The model, and what the header says of it."""
    info = registry.describe(target)
    served = "generate" not in info.capabilities
    folder = None if served else checkpoint_folder(checkpoint)
    about: dict[str, Any] = {
        "checkpoint": folder.name if folder else str(checkpoint) or info.environment.get("model", ""),
        "checkpoint_sha256": checkpoint_sha256(folder) if folder else "",
        "engine_version": info.version,
        "torch": info.environment.get("package:torch", ""),
    }
    identity = {"target": target.spec, "engine": options.engine.model_dump(), **about}
    model = ConformanceLM(
        target,
        folder or "",
        thinking=options.thinking,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        engine=options.engine,
        cache=Cache(options.cache, json.dumps(identity, sort_keys=True)),
        progress=progress or (lambda done, total: None),
        keep_failures=True,
    )
    return model, about


def _check_effective(asked: EngineOptions, ran: Mapping[str, str], spec: str) -> None:
    """What was asked for and not used says nothing about what was asked for; nor does one who does not tell.

    Layouts of one process are no choice. Other ones than were asked for are a failure of the target, which
    the check of the case finds.

    Raises:
        EvaluationError: names what is not told, or differs.
    """
    for name, value in (("dtype", asked.dtype), ("attention", asked.attention)):
        if value is not None and name in ran and ran[name] != value:
            raise EvaluationError(f"{spec}: {name} {value!r} was asked for and {ran[name]!r} ran")
    needed = {
        "dtype": True,
        "attention": asked.attention is not None,
        "tensor_parallel": asked.tensor_parallel > 1,
        "pipeline_parallel": asked.pipeline_parallel > 1,
    }
    silent = [name for name, is_asked in needed.items() if is_asked and name not in ran]
    if silent:
        raise EvaluationError(
            f"{spec}: does not tell which {', '.join(silent)} ran; let its `generate` read that back from "
            "the engine and give it in `effective`"
        )


def _item(
    loaded: LoadedTask, key: tuple[str, int], asked: Asked, sample: Mapping[str, Any], metric: str
) -> Item:
    answer, doc = asked.answer, asked.document
    extracted = read_extracted(sample["filtered_resps"])
    outcome: OutcomeClass
    if answer.failure:
        outcome, extracted = answer.failure, None
    else:
        outcome = classify(
            content=answer.content,
            finish_reason=answer.finish_reason,
            extracted=extracted,
            correct=float(sample[metric]) == 1.0,
        )
    name, place = key
    alone = len(loaded.parts) == 1
    own = doc.get("id")
    return Item(
        doc_id=own if isinstance(own, str) else str(place) if alone else f"{name}/{place}",
        doc_hash=document_sha256(doc),
        prompt_hash=asked.question.sha256,
        cluster=str(doc.get("subject") or ("" if alone else name)),
        prompt=answer.prompt,
        media=tuple(medium.sha256 for medium in asked.question.media),
        answer=answer.raw,
        extracted=extracted,
        # GSM8K's solutions end in the mark and the number, which is all that is compared.
        expected=str(sample["target"]).rpartition(_ANSWER)[2].strip(),
        outcome=outcome,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        error=answer.error,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's own bars and remarks from the terminal: progress is told by us."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch.object(lm_eval.api.task, "tqdm", lambda rows, **_options: rows):
            yield
    finally:
        logger.setLevel(level)
