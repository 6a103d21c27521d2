"""Questions of the bundled examinations as prompts, in token ids and files.

They are those of the accuracy gates, to the token: the tasks are asked through lm-eval, and a target in the
place of an engine keeps what it is asked. Importing this loads lm-eval.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter

from conformance.evaluation import EvaluationOptions, evaluate
from conformance.invariance.asking import Ids, Prompts
from conformance.invariance_suite import ExamPrompts
from conformance.oracles import Oracles
from conformance.targets.protocol import (
    GenerateRequest,
    GenerateResult,
    Generation,
    Target,
    TargetInfo,
)
from conformance.targets.reference_chat import Chat

_FILE = "prompts.json"
_PROMPTS = TypeAdapter(Prompts)


def prompts(spec: ExamPrompts, checkpoint: Path, oracles: Oracles) -> Prompts:
    """What a gate's target is given, in the gate's order.

    Args:
        spec: Names the task.
        checkpoint: Its tokenizer and template make the prompts.
        oracles: Keep them, and the files of pictures and sounds, until the session ends.

    Raises:
        EvaluationError, DataError: the task cannot be asked.
    """

    def ask(folder: Path) -> None:
        (folder / _FILE).write_bytes(_PROMPTS.dump_json(_ask(spec, checkpoint, folder)))

    folder = oracles.made(ask, "examined", str(checkpoint), spec.model_dump())
    return _PROMPTS.validate_json((folder / _FILE).read_bytes())


def _ask(spec: ExamPrompts, checkpoint: Path, folder: Path) -> Prompts:
    chat = Chat(checkpoint)
    keeper = _Keeper(folder, chat.stop_ids[0])
    options = EvaluationOptions(thinking=True, batch_size=spec.items)
    target = cast(Target, keeper)
    sheet = evaluate(target, spec.task, checkpoint=checkpoint, limit=spec.items, options=options)
    # Two questions may have the same words, about different pictures.
    asked = {(each.ids, each.digests): each for each in keeper.asked}
    ordered = [asked[chat.ids(item.prompt), tuple(item.media)] for item in sheet.items]
    return Prompts(
        ids=tuple(each.ids for each in ordered),
        images=tuple(each.images for each in ordered),
        sounds=tuple(each.sounds for each in ordered),
        stop_ids=chat.stop_ids,
        names=tuple(item.doc_id for item in sheet.items),
    )


@dataclass(frozen=True)
class _Asked:
    """A prompt, and its files."""

    ids: Ids
    images: tuple[str, ...]
    sounds: tuple[str, ...]

    @property
    def digests(self) -> tuple[str, ...]:
        """Of its media, which their files are named by."""
        return tuple(Path(path).stem for path in (*self.images, *self.sounds))


class _Keeper:
    """Keeps what it is asked, and says nothing but a stop token."""

    def __init__(self, folder: Path, stop: int) -> None:
        self.spec = "keeper"
        self.asked: list[_Asked] = []
        self._folder = folder
        self._stop = stop

    def describe(self) -> TargetInfo:
        """It can be asked whatever a task asks."""
        return TargetInfo(
            name=self.spec, version="1", capabilities=("generate",), features=("images", "sounds")
        )

    def generate(self, request: GenerateRequest) -> GenerateResult:
        """Keep the prompts, and copies of their files, which end with the evaluation."""
        none = ((),) * len(request.prompts)
        rows = zip(request.prompts, request.images or none, request.sounds or none, strict=True)
        self.asked += [_Asked(ids, self._kept(images), self._kept(sounds)) for ids, images, sounds in rows]
        answer = Generation(token_ids=(self._stop,), finish_reason="stop", logprobs=(0.0,))
        return GenerateResult(generations=(answer,) * len(request.prompts), effective={"dtype": "float32"})

    def close(self) -> None:
        """Nothing to release."""

    def _kept(self, files: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(shutil.copy(path, self._folder)) for path in files)
