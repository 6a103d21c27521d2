"""The model and the prompts of a case."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import cast

from conformance.invariance.asking import Prompts
from conformance.invariance.models import VOCAB_SIZE, DrawnModel
from conformance.invariance_suite import DrawnPrompts, ExamPrompts, InvarianceCase, ScriptedPrompts
from conformance.media import ImagePiece
from conformance.oracles import Oracles
from conformance.targets import bundled
from conformance.targets.reference_chat import checkpoint_folder

_RESERVED = 8
"""Tokens below this are left out of drawn prompts: padding, and those with which texts begin and end."""


def checkpoint_of(case: InvarianceCase, oracles: Oracles) -> Path:
    """The folder of the model."""
    if case.model == "scripted":
        return bundled.checkpoint()
    if isinstance(case.prompts, ExamPrompts):
        return checkpoint_folder(case.model)
    return oracles.speaking(cast(DrawnModel, case.model), case.weights)


def prompts_of(case: InvarianceCase, oracles: Oracles) -> Prompts:
    """What is asked."""
    if isinstance(case.prompts, DrawnPrompts):
        return _drawn(case.prompts)
    if isinstance(case.prompts, ExamPrompts):
        from conformance.invariance import examined  # loads lm-eval, which most sessions need not

        return examined.prompts(case.prompts, checkpoint_of(case, oracles), oracles)
    return _scripted(case.prompts, oracles)


def _drawn(spec: DrawnPrompts) -> Prompts:
    draw = random.Random(spec.seed)  # noqa: S311 - seeded test data

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(_RESERVED, VOCAB_SIZE) for _ in range(count))

    beginning = tokens(spec.shared)
    ids: list[tuple[int, ...]] = []
    for length in spec.lengths:
        carried = ids[-1][-spec.carried :] if spec.carried and ids else ()
        ids.append((*beginning, *carried, *tokens(length)))
    # Last, so that prompts are those of the same case without.
    stop_ids = tuple(draw.sample(range(_RESERVED, VOCAB_SIZE), spec.stops))
    return Prompts(tuple(ids), stop_ids=stop_ids, names=tuple(f"{len(each)} tokens" for each in ids))


def _scripted(spec: ScriptedPrompts, oracles: Oracles) -> Prompts:
    words = [(dialogue, ()) for dialogue in bundled.dialogues(spec.asked, spec.lines)] if spec.lines else []
    seen = []
    for prompt in spec.pictures:
        files = oracles.files([ImagePiece(image=picture) for picture in prompt.shows])
        colours = [picture.colour for picture in prompt.shows]
        dialogue = bundled.about_pictures(spec.asked, prompt.line, colours)
        seen.append((dialogue, tuple(file.path for file in files)))
    pairs = itertools.zip_longest(words, seen)
    asked = [question for pair in pairs for question in pair if question is not None]
    return Prompts(
        ids=tuple(dialogue.prompt for dialogue, _ in asked),
        images=tuple(files for _, files in asked) if spec.pictures else (),
        stop_ids=bundled.STOP_IDS,
        names=tuple(repr(dialogue.line) for dialogue, _ in asked),
    )
