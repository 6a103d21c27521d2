"""Faults of the evaluation: how questions are put, answers read and counted (catalogue class 10).

They are patches of the harness itself, as in this class it is the tool that is wrong and not the model. The
cases that notice them have their answers and what must become of them in the suite.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from conformance import answering, evaluation, evaluation_tasks, lm_eval_model, scoring
from conformance.answering import Answer, Generating, Question
from conformance.evaluation_tasks import LoadedTask
from conformance.faults.base import Collection, Patch, replace
from conformance.lm_eval_model import ConformanceLM
from conformance.scoring import OutcomeClass
from conformance.targets import reference_chat
from conformance.targets.reference_chat import Chat, Said
from conformance.tasks import mmmu

faults = Collection("scoring")
read = partial(faults, area="scoring-answers")
put = partial(faults, area="scoring-questions")


# ----------------------------------------------------------------------------------- how answers are read


@read("thought-is-scored", source=("N06",), module=reference_chat)
def _thought() -> Patch:
    """The thought is left in the answer that is scored."""
    original = Chat.read

    def whole(self: Chat, ids: Sequence[int], prompt: str) -> Said:
        said = original(self, ids, prompt)
        return Said(said.raw, said.reasoning, said.reasoning + said.content)

    return replace(Chat, "read", whole)


@read("letters-drawn-by-chance", source=("N02",), module=mmmu)
def _chance() -> Patch:
    """An answer from which no letter can be read counts as one that is drawn by chance."""
    original = mmmu.letter

    def drawn(response: str, doc: mmmu.Document) -> str:
        found = original(response, doc)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(mmmu.options(doc))]
        return random.Random(response).choice(letters) if found is None else found  # noqa: S311

    return replace(mmmu, "letter", drawn)


@read("last-number-counts-everywhere", source=("N06",), module=evaluation)
def _last_filter() -> Patch:
    """Answers are read by the last filter of the task, whichever one was asked for."""
    original = evaluation._scheme

    def last(loaded: LoadedTask, wanted: str | None) -> str:
        original(loaded, wanted)
        part = next(iter(loaded.parts.values()))
        return str(part.config.filter_list[-1]["name"])

    return replace(evaluation, "_scheme", last)


@read("cut-off-is-wrong", source=("N01",), module=scoring)
def _cut_off() -> Patch:
    """An answer that broke off at the limit is counted with the wrong ones."""
    original = scoring.classify

    def finished(*, content: str, finish_reason: str, extracted: str | None, correct: bool) -> OutcomeClass:
        return original(content=content, finish_reason="stop", extracted=extracted, correct=correct)

    return replace(evaluation, "classify", finished)


@read("unparsable-is-wrong", source=("N01", "check 23"), module=scoring)
def _unparsable() -> Patch:
    """What the filter gives where it finds nothing is taken for an answer."""

    def as_it_is(filtered: Any) -> str | None:
        return str(filtered[0] if isinstance(filtered, list) else filtered).strip() or None

    return replace(evaluation, "read_extracted", as_it_is)


@read("refused-is-wrong", source=("check 23",), module=answering)
def _refused() -> Patch:
    """A prompt that was refused counts as one that was answered with nothing."""

    def nothing(self: Generating, question: Question, _failure: str, _error: Exception) -> Answer:
        return Answer(prompt=self._prompt(question)[0], finish_reason="stop")

    return replace(Generating, "_failed", nothing)


@read("stop-strings-ignored", source=("N06",), module=lm_eval_model)
def _ignored() -> Patch:
    """An answer is read past the task's stop strings."""

    def none(_options: Mapping[str, Any]) -> list[str]:
        return []

    return replace(lm_eval_model, "_until", none)


@read("stop-strings-in-thoughts", source=("N06",), module=lm_eval_model)
def _in_thoughts() -> Patch:
    """A stop string in the thought ends the answer before it has begun."""
    original = lm_eval_model._cut

    def anywhere(answer: Answer, until: Sequence[str]) -> Answer:
        if any(stop in answer.raw.partition("<channel|>")[0] for stop in until):
            return answer.model_copy(update={"content": "", "finish_reason": "stop"})
        return original(answer, until)

    return replace(lm_eval_model, "_cut", anywhere)


# ------------------------------------------------------------------------------------ how questions are put


def _question_with(**changes: Any) -> Patch:
    original = ConformanceLM._question

    def changed(self: ConformanceLM, arguments: Sequence[Any]) -> Question:
        return dataclasses.replace(original(self, arguments), **changes)

    return replace(ConformanceLM, "_question", changed)


@put("budget-of-the-library", source=("N01",), module=lm_eval_model)
def _budget() -> Patch:
    """Every answer may have as many tokens as lm-eval's models give by default, whatever its task says."""
    return _question_with(max_new_tokens=lm_eval_model.MAX_NEW_TOKENS)


@put("thought-never-asked-for", source=("N05",), module=lm_eval_model)
def _no_thought() -> Patch:
    """Questions are asked without a thought, whatever was asked for."""
    return _question_with(thinking=False)


@put("template-left-out", source=("N05", "N06"), module=answering)
def _no_template() -> Patch:
    """Conversations are given to the model as bare text."""

    def bare(self: Generating, question: Question) -> tuple[str, tuple[int, ...]]:
        contents = [str(message["content"]) for message in question.messages] or [question.text]
        text = "\n".join(contents)
        return text, self._chat.bare_ids(text)

    return replace(Generating, "_prompt", bare)


@put("no-first-token", source=("N06",), module=reference_chat)
def _no_bos() -> Patch:
    """A bare text is given to the model without the token that every prompt begins with."""

    def as_it_is(self: Chat, text: str) -> tuple[int, ...]:
        return self.ids(text)

    return replace(Chat, "bare_ids", as_it_is)


@put("examples-drawn-in-turn", source=("N06",), module=evaluation_tasks)
def _in_turn() -> Patch:
    """Solved examples are drawn one after the other, so that a prompt depends on the documents before it."""

    def once(task: Any, seed: int) -> None:
        task.set_fewshot_seed(seed=seed)

    return replace(evaluation_tasks, "_steady_examples", once)
