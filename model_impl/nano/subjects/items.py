"""Examinations: held-out questions of all subjects, and their form as documents of lm-eval's tasks."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from model_impl.nano.subjects.drawing import png
from model_impl.nano.subjects.exercise import LETTERS, Exercise, Subject
from model_impl.nano.subjects.figures import FIGURES
from model_impl.nano.subjects.scattered import SCATTERED
from model_impl.nano.subjects.sounding import flac
from model_impl.nano.subjects.tones import TONES

EXAMINATIONS: Mapping[str, Sequence[Subject]] = {
    "nano_mmmu": (*SCATTERED, *FIGURES),
    "nano_sounds": TONES,
}
"""The subjects of each task."""
COUNT = 500
"""Questions of each task, as many about one subject as about another."""
SEED = 2_000_003


def examination(task: str) -> Iterator[Exercise]:
    """All questions of a task, each letter as often the right one as any other, or once more.

    Args:
        task: One of `EXAMINATIONS`.
    """
    subjects = EXAMINATIONS[task]
    for subject in subjects:
        rng = random.Random(f"{SEED} {subject.name}")  # noqa: S311 - not a secret
        seen: set[tuple[int, ...]] = set()
        while len(seen) < COUNT // len(subjects):
            drawn = subject.exercise(rng, "test")
            if drawn.letter == LETTERS[len(seen) % len(LETTERS)] and drawn.scene.numbers not in seen:
                seen.add(drawn.scene.numbers)
                yield drawn


def documents(task: str) -> Iterator[dict[str, str]]:
    """The questions with the fields of MMMU's data set; media are files in base64.

    A document's pictures are PNGs in `image_1` and `image_2`, its sound is a FLAC in `audio_1`.
    """
    numbers: dict[str, int] = {}
    for exercise in examination(task):
        name = exercise.subject.name
        numbers[name] = numbers.get(name, 0) + 1
        media = exercise.scene.make()
        files = {f"image_{place}": png(picture) for place, picture in enumerate(media.pictures, 1)}
        files |= {f"audio_{place}": flac(sound) for place, sound in enumerate(media.sounds, 1)}
        marks = [f"<{field.replace('_', ' ')}>" for field in files]
        yield {
            "id": f"{task}_{name}_{numbers[name]}",
            "subject": name,
            "question_type": "multiple-choice",
            "question": " ".join([*marks, exercise.question]),
            "options": repr(list(exercise.scene.options)),
            "answer": exercise.letter,
            **{field: base64.b64encode(data).decode() for field, data in files.items()},
        }


def write(task: str, folder: Path) -> Path:
    """Write a task's documents as JSON Lines; return the file."""
    path = folder / f"{task}.jsonl"
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents(task)]
    path.write_text("".join(lines), encoding="utf-8")
    return path
