"""Questions about pictures and sounds: right, held out, and not to be guessed without what they are about."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lm_eval.tasks.mmmu import utils as mmmu
from PIL import Image

from model_impl.chat.parser import parse
from model_impl.nano.families import WINDOW
from model_impl.nano.lesson import Lesson, Picture, Sound
from model_impl.nano.subjects import (
    RHYTHM,
    SOUND_SUBJECTS,
    SUBJECTS,
    Exercise,
    Subject,
    glance,
    glimpse,
    listening,
    reciting,
    telling,
)
from model_impl.nano.subjects.drawing import CELL, COLOURS, GROUND, TEXTURES, Canvas, Tile, png
from model_impl.nano.subjects.exercise import LETTERS
from model_impl.nano.subjects.items import COUNT, EXAMINATIONS, documents, examination
from model_impl.nano.subjects.sounding import RATE, flac
from model_impl.preprocess.images import load_image, prepare_images, target_size

DATA = Path(__file__).parents[1] / "conformance" / "tasks" / "data"
EVERY = (*SUBJECTS, *SOUND_SUBJECTS, RHYTHM)
NAMES = {subject.name: subject for subject in EVERY}
Eye = dict[tuple[int, int], tuple[str, str, int]]
"""What a reader sees: colour, texture and number of pixels by row and column."""


def drawn(subject: Subject, split: Any, count: int, seed: str) -> list[Exercise]:
    rng = random.Random(f"{seed} {split} {subject.name}")
    return [subject.exercise(rng, split) for _ in range(count)]


# --------------------------------------------------------- a reader of its own, which sees only the media


def masks() -> dict[str, np.ndarray[Any, Any]]:
    """Each texture, as a whole tile has it."""
    found = {}
    for texture in TEXTURES:
        canvas = Canvas(1, 1)
        canvas.put([Tile("red", texture, 0, 0)])
        found[texture] = coloured(canvas.pixels)
    return found


def coloured(pixels: Picture) -> np.ndarray[Any, Any]:
    """Pixels that are neither black nor of the ground."""
    return (pixels != GROUND).any(axis=-1) & pixels.any(axis=-1)


MASKS = masks()


def seen(picture: Picture) -> Eye:
    """Cells that are not empty."""
    found: Eye = {}
    for row in range(picture.shape[0] // CELL):
        for column in range(picture.shape[1] // CELL):
            cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            mask = coloured(cell)
            if mask.any():
                colour = tuple(int(value) for value in cell[mask][0])
                name = next(name for name, own in COLOURS.items() if own == colour)
                texture = min(MASKS, key=lambda texture: int((MASKS[texture] ^ mask).sum()))
                found[row, column] = (name, texture, int(mask.sum()))
    return found


def word(question: str, words: Sequence[str]) -> str:
    """The word of a kind that a question holds."""
    return next(w for w in question.replace("?", " ").replace(".", " ").split() if w in words)


def commonest_colour(question: str, pictures: Sequence[Picture]) -> str:
    del question
    return Counter(colour for colour, _, _ in seen(pictures[0]).values()).most_common(1)[0][0]


def colour_of_texture(question: str, pictures: Sequence[Picture]) -> str | None:
    asked = word(question, tuple(TEXTURES))
    return next((colour for colour, texture, _ in seen(pictures[0]).values() if texture == asked), None)


def texture_of_colour(question: str, pictures: Sequence[Picture]) -> str | None:
    asked = word(question, tuple(COLOURS))
    return next((texture for colour, texture, _ in seen(pictures[0]).values() if colour == asked), None)


def corner_of_block(question: str, pictures: Sequence[Picture]) -> str:
    del question
    rows, columns = zip(*seen(pictures[0]), strict=True)
    return ("north" if max(rows) < 3 else "south") + ("west" if max(columns) < 4 else "east")


def second_of_first(question: str, pictures: Sequence[Picture]) -> str | None:
    del question
    ((_, wanted, _),) = seen(pictures[0]).values()
    return next((colour for colour, texture, _ in seen(pictures[1]).values() if texture == wanted), None)


def clock_hour(question: str, pictures: Sequence[Picture]) -> str | None:
    asked = COLOURS[word(question, tuple(COLOURS))]
    rows, columns = (pictures[0] == asked).all(axis=-1).nonzero()
    ring = ((pictures[0] != GROUND).any(axis=-1) & ~(pictures[0] == asked).all(axis=-1)).nonzero()
    if len(rows) == 0 or len(ring[0]) == 0:
        return None
    down = rows.mean() - (ring[0].min() + ring[0].max()) / 2
    right = columns.mean() - (ring[1].min() + ring[1].max()) / 2
    return str(round(math.degrees(math.atan2(right, -down)) / 30) % 12 or 12)


def arrow_target(question: str, pictures: Sequence[Picture]) -> str:
    del question
    tiles = seen(pictures[0])
    centre = next(at for at in tiles if sum(abs(at[0] - r) + abs(at[1] - c) == 1 for r, c in tiles) == 4)
    cell = pictures[0][centre[0] * CELL : (centre[0] + 1) * CELL, centre[1] * CELL : (centre[1] + 1) * CELL]
    patch = coloured(cell)[16:32, 16:32]
    # An arrowhead is a triangle: there is more of it where it does not point.
    down, across = patch[8:].sum() - patch[:8].sum(), patch[:, 8:].sum() - patch[:, :8].sum()
    upright, sideways = (-1 if down > 0 else 1, 0), (0, -1 if across > 0 else 1)
    step = upright if abs(down) > abs(across) else sideways
    return tiles[centre[0] + step[0], centre[1] + step[1]][0]


def next_colour(question: str, pictures: Sequence[Picture]) -> str:
    del question
    row = [colour for _, (colour, _, _) in sorted(seen(pictures[0]).items())]
    period = next(period for period in (2, 3) if all(a == b for a, b in zip(row, row[period:], strict=False)))
    return row[len(row) - period]


def heard(sound: Sound) -> list[tuple[str, str]]:
    """Height and length of each tone."""
    loud = np.abs(sound).reshape(-1, RATE // 100).max(axis=1) > 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
    found = []
    for start, stop in edges.reshape(-1, 2):
        piece = sound[start * RATE // 100 : stop * RATE // 100]
        hertz = np.abs(np.fft.rfft(piece)).argmax() * RATE / len(piece)
        found.append(("high" if hertz > 1000 else "low", "long" if len(piece) > RATE // 5 else "short"))
    return found


def count_tones(question: str, sounds: Sequence[Sound]) -> str:
    del question
    return str(len(heard(sounds[0])))


def place_of_odd(question: str, sounds: Sequence[Sound]) -> str | None:
    asked = word(question, ("low", "high", "short", "long"))
    found = [place for place, tone in enumerate(heard(sounds[0])) if asked in tone]
    return ("first", "second", "third", "fourth")[found[0]] if len(found) == 1 else None


READERS: dict[str, Callable[[str, Any], str | None]] = {
    "majority": commonest_colour,
    "colour": colour_of_texture,
    "texture": texture_of_colour,
    "position": corner_of_block,
    "comparison": second_of_first,
    "size": commonest_colour,
    "chart": commonest_colour,
    "clock": clock_hour,
    "path": arrow_target,
    "sequence": next_colour,
    "count": count_tones,
    "melody": place_of_odd,
    "rhythm": place_of_odd,
}


def media(exercise: Exercise) -> Sequence[Any]:
    made = exercise.scene.make()
    return made.pictures or made.sounds


@pytest.mark.parametrize("name", NAMES)
def test_the_right_option_is_what_the_media_show(name: str) -> None:
    for split in ("train", "test"):
        for exercise in drawn(NAMES[name], split, 40, f"right {split}"):
            read = READERS[name](exercise.question, media(exercise))
            assert read == exercise.scene.options[exercise.scene.right], exercise.text
            assert len(set(exercise.scene.options)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_media_of_another_question_are_no_help(name: str) -> None:
    exercises = drawn(NAMES[name], "test", 120, "swapped")
    right = 0.0
    for exercise, other in zip(exercises, exercises[1:] + exercises[:1], strict=True):
        read = READERS[name](exercise.question, media(other))
        options = exercise.scene.options
        # Who reads something that is no option can only guess.
        right += options[exercise.scene.right] == read if read in options else 1 / 4
    assert right / len(exercises) <= 0.35


# -------------------------------------------------------------------------------- what words give away


def features(exercise: Exercise) -> Counter[str]:
    """Words of the text, each option with its letter, and the numbers' ranks."""
    found = Counter(exercise.text.lower().split())
    options = exercise.scene.options
    order = sorted(options, key=lambda option: (len(option), option))
    for letter, option in zip(LETTERS, options, strict=True):
        found[f"{letter}={option}"] += 3
        found[f"{letter} is of rank {order.index(option)}"] += 3
    return found


@pytest.mark.parametrize("task", EXAMINATIONS)
def test_words_alone_are_no_help(task: str) -> None:
    learned = [e for subject in EXAMINATIONS[task] for e in drawn(subject, "train", 400, "baseline")]
    asked = [e for subject in EXAMINATIONS[task] for e in drawn(subject, "test", 100, "baseline")]
    bayes = nearest = 0
    tables: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for exercise in learned:
        tables[exercise.subject.name][exercise.letter].update(features(exercise))
    for exercise in asked:
        own = features(exercise)
        table = tables[exercise.subject.name]

        def likelihood(letter: str, own: Counter[str] = own, table: Any = table) -> float:
            total = sum(table[letter].values())
            return sum(count * math.log((table[letter][f] + 1) / (total + 500)) for f, count in own.items())

        bayes += max(LETTERS, key=likelihood) == exercise.letter
    for exercise in asked[::4]:
        own = features(exercise)
        near = max(
            (e for e in learned if e.subject is exercise.subject),
            key=lambda e: sum((features(e) & own).values()),
        )
        nearest += near.letter == exercise.letter
    assert bayes / len(asked) <= 0.30
    assert nearest / len(asked[::4]) <= 0.30


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_as_likely_as_any_other_option(name: str) -> None:
    offered, chosen = Counter[str](), Counter[str]()
    for exercise in drawn(NAMES[name], "train", 1200, "likely"):
        offered.update(exercise.scene.options)
        chosen[exercise.scene.options[exercise.scene.right]] += 1
    for option, count in offered.items():
        # Four standard deviations of a binomial share of one in four.
        assert abs(chosen[option] / count - 0.25) < 4 * math.sqrt(0.1875 / count), option


# -------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("name", NAMES)
def test_neither_templates_nor_media_occur_in_both_splits(name: str) -> None:
    subject = NAMES[name]
    train, test = (drawn(subject, split, 600, "splits") for split in ("train", "test"))
    assert {e.template for e in train} == set(subject.templates("train"))
    assert {e.template for e in test} == set(subject.templates("test"))
    assert not set(subject.templates("train")) & set(subject.templates("test"))
    assert not {e.scene.numbers for e in train} & {e.scene.numbers for e in test}
    for phrases in (subject.leads, subject.asks):
        for phrase in phrases:
            assert any(phrase in template for template in subject.templates("train"))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_all_that_media_are_made_of(name: str) -> None:
    by_numbers: dict[tuple[int, ...], bytes] = {}
    for exercise in drawn(NAMES[name], "train", 80, "numbers"):
        made = b"".join(piece.tobytes() for piece in media(exercise))
        assert by_numbers.setdefault(exercise.scene.numbers, made) == made
    assert len(set(by_numbers.values())) == len(by_numbers)


@pytest.mark.parametrize(
    "generator", [glance, glimpse, listening, reciting, telling, *(subject.lesson for subject in EVERY)]
)
def test_a_seed_gives_the_same_lessons(generator: Callable[..., Lesson]) -> None:
    first, second = ([generator(random.Random(seed), "train") for seed in range(3)] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert (one.messages, one.answer, one.numbers) == (other.messages, other.answer, other.numbers)
        for a, b in zip((*one.pictures, *one.sounds), (*other.pictures, *other.sounds), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "generator", [glance, glimpse, listening, reciting, telling, *(subject.lesson for subject in EVERY)]
)
def test_lessons_keep_their_splits_apart(generator: Callable[..., Lesson]) -> None:
    rng = random.Random(5)
    train, test = ([generator(rng, split) for _ in range(200)] for split in ("train", "test"))
    assert not {lesson.numbers for lesson in train} & {lesson.numbers for lesson in test}
    if generator in [subject.lesson for subject in EVERY]:
        assert not {lesson.key for lesson in train} & {lesson.key for lesson in test}


@pytest.mark.parametrize("generator", [glance, glimpse])
def test_a_glimpse_names_what_there_is(generator: Callable[..., Lesson]) -> None:
    for seed in range(40):
        lesson = generator(random.Random(seed), "train")
        tiles = sorted(seen(lesson.pictures[0]).items())
        assert lesson.answer.split(", ") == [
            f"row {row + 1} column {column + 1}: {colour} {texture}"
            for (row, column), (colour, texture, _) in tiles
        ]


def test_listening_names_what_there_is() -> None:
    for seed in range(50):
        lesson = listening(random.Random(seed), "train")
        assert lesson.answer == " ".join(f"{height} {length}" for height, length in heard(lesson.sounds[0]))


def test_the_length_of_a_sound_does_not_tell_how_many_tones_it_has() -> None:
    lengths: dict[str, set[int]] = defaultdict(set)
    for exercise in drawn(NAMES["count"], "train", 300, "length"):
        (sound,) = exercise.scene.make().sounds
        lengths[exercise.scene.options[exercise.scene.right]].add(len(sound))
    assert lengths.keys() == set("123456")
    assert len({frozenset(found) for found in lengths.values()}) == 1


def test_what_is_told_decides_the_letter() -> None:
    for seed in range(100):
        lesson = telling(random.Random(seed), "train")
        question, options, _ = lesson.messages[0]["content"].split("\n\n")
        offered = dict(line[1:].split(") ") for line in options.split("\n"))
        right = offered[lesson.answer[-1]]
        assert f" {question} ".replace(",", " ").rpartition(f" {right} ")[1], lesson.messages
        assert not lesson.pictures + lesson.sounds


def test_what_is_recited_stands_in_the_list() -> None:
    for seed in range(100):
        lesson = reciting(random.Random(seed), "train")
        asked, options, _ = lesson.messages[0]["content"].split("\n\n")
        offered = {line[4:]: line[1] for line in options.split("\n")}
        choices, found = lesson.answer.removeprefix("Choices: ").split(". ")
        words, letters = found.split(" ")[::2], found.split(" ")[1::2]
        assert asked == f"Recite: {' '.join(words)}."
        assert dict(zip(words, letters, strict=True)) == offered
        assert choices == " ".join(f"{word} {letter}" for word, letter in offered.items())


# ------------------------------------------------------------------------------------- media and lessons


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_pictures_are_longer_than_the_window_and_never_resized(subject: Subject) -> None:
    lesson = subject.lesson(random.Random(1), "test")
    assert len(lesson.pictures) == subject.pictures == (2 if subject.name == "comparison" else 1)
    for picture in lesson.pictures:
        height, width, _ = picture.shape
        assert target_size(height, width, 70) == (height, width)
        (count,) = prepare_images([load_image(png(picture), "it")], 70).soft_tokens
        assert count == height * width // CELL**2 == (70 if subject.name == "chart" else 56) > WINDOW


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_picture_survives_its_file(subject: Subject) -> None:
    for exercise in drawn(subject, "train", 5, "files"):
        for picture in media(exercise):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture))).convert("RGB")), picture)


@pytest.mark.parametrize("subject", [*SOUND_SUBJECTS, RHYTHM], ids=lambda subject: subject.name)
def test_a_sound_survives_its_file(subject: Subject) -> None:
    for exercise in drawn(subject, "train", 5, "files"):
        (sound,) = media(exercise)
        read, rate = soundfile.read(io.BytesIO(flac(sound)), dtype="float32")
        assert rate == RATE
        assert np.array_equal(read, sound)
        assert len(sound) <= 2 * RATE


@pytest.mark.parametrize("name", NAMES)
def test_lm_eval_reads_the_letter_that_a_lesson_teaches(name: str) -> None:
    for exercise in drawn(NAMES[name], "train", 8, "letters"):
        for thinking in (False, True):
            lesson = exercise.lesson(thinking=thinking)
            said = parse(lesson.answer + lesson.stop)
            assert bool(said.reasoning) == lesson.thinking == thinking
            options = dict(zip(LETTERS, exercise.scene.options, strict=True))
            assert mmmu.parse_multi_choice_response(said.content, list(LETTERS), options) == exercise.letter
            right = exercise.scene.options[exercise.scene.right]
            assert exercise.scene.seen.split()[-1] == right
            assert not thinking or f". {exercise.scene.seen} {exercise.letter}<channel|>" in lesson.answer


# ------------------------------------------------------------------------------------------- documents


@pytest.fixture(scope="module", params=EXAMINATIONS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stored(task: str) -> list[dict[str, str]]:
    path = DATA / f"{task}.jsonl"
    assert path.stat().st_size < 4_000_000
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decoded(document: dict[str, str], field: str) -> Any:
    data = base64.b64decode(document[field], validate=True)
    if field.startswith("image"):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def test_stored_documents_are_what_the_generators_draw(task: str, stored: list[dict[str, str]]) -> None:
    made = list(documents(task))
    assert len(made) == len(stored) == COUNT
    for own, there in zip(made, stored, strict=True):
        assert own.keys() == there.keys()
        for field in own:
            if field.startswith(("image", "audio")):
                assert np.array_equal(decoded(own, field), decoded(there, field))
            else:
                assert own[field] == there[field]


def test_stored_documents_are_balanced_and_differ(task: str, stored: list[dict[str, str]]) -> None:
    assert len({document["id"] for document in stored}) == len(stored)
    assert len({json.dumps({**d, "id": ""}) for d in stored}) == len(stored)
    for subject in EXAMINATIONS[task]:
        letters = Counter(d["answer"] for d in stored if d["subject"] == subject.name)
        assert set(letters) == set(LETTERS)
        assert max(letters.values()) - min(letters.values()) <= 1


def test_a_document_is_asked_as_its_lesson_is(task: str, stored: list[dict[str, str]]) -> None:
    for exercise, document in zip(examination(task), stored, strict=True):
        if not document["id"].endswith("_7"):
            continue
        (message,) = exercise.lesson(thinking=False).messages
        *before, text = message["content"]
        marks = " ".join(f"<{part['type']} {n}>" for n, part in enumerate(before, 1))
        assert mmmu._doc_to_text(document) == f"{marks} {text['text']}"
        assert document["answer"] == exercise.letter
