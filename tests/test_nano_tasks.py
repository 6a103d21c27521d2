"""The committed nano tasks: lm-eval asks in the very words, pictures and sounds that checkpoints learn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import soundfile  # type: ignore[import-untyped]
from lm_eval import evaluator

from conformance import evaluation_tasks, resources
from conformance.answering import picture_sha256, sound_sha256
from conformance.lm_eval_model import Asked, ConformanceLM
from conformance.targets import bundled
from conformance.targets.reference_chat import Chat
from conformance.tasks import mmmu, nano
from model_impl.chat.render import render
from model_impl.nano.conversations import FAMILY
from model_impl.nano.items import lessons
from model_impl.nano.lesson import Lesson
from tests.speaking_targets import Generates

TASKS = ("nano_gsm8k", "nano_mmmu", "nano_sounds")
FEATURES = ("images", "sounds")


@cache
def asked(name: str) -> Sequence[Asked]:
    """What a model is asked in a task."""
    model = ConformanceLM(
        Generates(lambda prompt: "no<turn|>", features=FEATURES),
        "scripted",
        thinking=True,
        keep_failures=True,
    )
    loaded = evaluation_tasks.load(name)
    evaluator.evaluate(
        model,
        task_dict={"tasks": dict(loaded.parts), "groups": {}},
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    return model.asked


def digests(lesson: Lesson) -> list[str]:
    from PIL import Image

    pictures = [picture_sha256(Image.fromarray(picture)) for picture in lesson.pictures]
    return pictures + [sound_sha256(played(sound)) for sound in lesson.sounds]


def played(sound: Any) -> Any:
    """Samples as a file of 16 bits holds them."""
    made = io.BytesIO()
    soundfile.write(made, sound, 16_000, format="FLAC", subtype="PCM_16")
    return soundfile.read(io.BytesIO(made.getvalue()), dtype="float32")[0]


@pytest.mark.parametrize("name", TASKS)
def test_every_item_is_asked_as_it_is_learned(name: str) -> None:
    found = asked(name)
    learned = lessons(name)
    assert len(found) == len(learned) >= 100
    for each, lesson in zip(found, learned, strict=True):
        assert each.answer.prompt == render(list(lesson.messages), thinking=True, family=FAMILY)
        assert [medium.sha256 for medium in each.question.media] == digests(lesson)


@pytest.mark.parametrize("name", TASKS)
def test_a_perfect_pupil_scores_everything(name: str) -> None:
    """The answers of the lessons, thoughts and all, are right under the task's first filter; no other is."""
    loaded = evaluation_tasks.load(name)
    part = loaded.parts[name]
    chat = Chat(bundled.checkpoint())
    first = part._filters[0]
    for doc, lesson in zip(part.eval_docs, lessons(name), strict=True):
        said = chat.read(chat.ids(f"{lesson.answer}<turn|>"), "").content
        for text, score in ((said, 1.0), ("Answer: E", 0.0), ("", 0.0)):
            request = type("Request", (), {})()
            request.resps, request.doc, request.filtered_resps = [text], doc, {}
            first.apply([request])
            (metric,) = part.process_results(doc, list(request.filtered_resps.values())).values()
            assert metric == score, (doc["id"], text)


def test_letters_are_balanced_and_subjects_many() -> None:
    documents = nano.documents(resources.task_data("nano_mmmu"))
    letters = [doc["answer"] for doc in documents]
    assert {letter: letters.count(letter) for letter in "ABCD"} == pytest.approx(
        dict.fromkeys("ABCD", len(letters) / 4), rel=0.1
    )
    assert len({doc["subject"] for doc in documents}) == 10
    assert any(len(mmmu.doc_to_image(doc)) == 2 for doc in documents)


def test_a_damaged_file_says_where(tmp_path: Any) -> None:
    path = tmp_path / "nano_mmmu.jsonl"
    path.write_text('{"id": "1"}\n{"id": "2", "image_1": "no base64"}\n')
    with pytest.raises(nano.DataError, match=r"nano_mmmu.jsonl: line 2 cannot be read"):
        nano.documents(path)
    path.write_text("")
    with pytest.raises(nano.DataError, match=r"nano_mmmu.jsonl: line 1"):
        nano.documents(path)
