"""Word problems and dialogues of the nano checkpoints: right, varied, and held out from training."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model_impl.chat.parser import parse
from model_impl.nano import dialogues, items, problems
from model_impl.nano.batches import Timetable
from model_impl.nano.curriculum import RECIPES, Recipe, Stage, nano_tokenizer
from model_impl.nano.families import FAMILIES, WINDOW
from model_impl.nano.lesson import Lesson
from model_impl.nano.phrases import PHRASES

DATA = Path(__file__).parents[1] / "conformance" / "tasks" / "data" / "nano_gsm8k.jsonl"
DRAWN = 4000

# What each verb does, said again here: the first is how a problem can begin.
BEGINS = {"has", "owns", "keeps", "starts", "counts", "stores"}
BEGINS_WITH_PRODUCT = {"packs", "lays", "stacks", "hangs"}
BEGINS_WITH_SHARE = {"splits", "divides", "cuts"}
MORE = {
    "buys", "finds", "wins", "borrows", "receives", "makes", "collects", "brings", "adds", "earns", "picks",
    "sends",
}  # fmt: skip
LESS = {
    "gives", "loses", "sells", "breaks", "spends", "drops", "lends", "throws", "steals", "wants", "leaves",
    "burns",
}  # fmt: skip
MORE_TIMES = {"orders", "carries", "opens", "fetches", "gains", "unloads"}
LESS_TIMES = {"hands", "ships", "uses", "fills", "grabs", "donates"}
FACTORS = {"doubles": 2, "copies": 2, "triples": 3, "multiplies": 3}


def solve(question: str) -> int:
    """The answer, read from the words by nothing but the lists above."""
    count = 0
    for sentence in re.split(r"(?<=[.?]) ", question):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if sentence.endswith("?") or sentence.startswith("Find"):
            assert not numbers
            continue
        verbs = [word for word in re.findall(r"[a-z]+", sentence) if word in ALL]
        if not numbers and not FACTORS.keys() & set(verbs):
            continue
        (verb,) = verbs[:1]
        match numbers:
            case [one] if verb in BEGINS:
                count = one
            case [one] if verb in MORE:
                count += one
            case [one] if verb in LESS:
                count -= one
            case [one, two] if verb in BEGINS_WITH_PRODUCT:
                count = one * two
            case [one, two] if verb in BEGINS_WITH_SHARE:
                count, rest = divmod(one, two)
                assert rest == 0
            case [one, two] if verb in MORE_TIMES:
                count += one * two
            case [one, two] if verb in LESS_TIMES:
                count -= one * two
            case []:
                count *= FACTORS[verb]
            case _:
                raise AssertionError(sentence)
        assert 0 < count <= problems.LARGEST
    return count


ALL = {
    *BEGINS, *BEGINS_WITH_PRODUCT, *BEGINS_WITH_SHARE, *MORE, *LESS, *MORE_TIMES, *LESS_TIMES, *FACTORS,
}  # fmt: skip


def drawn(split: Any, count: int = DRAWN) -> list[problems.Problem]:
    rng = random.Random(11)
    return [problems.problem(rng, split) for _ in range(count)]


@pytest.fixture(scope="module")
def train() -> list[problems.Problem]:
    return drawn("train")


@pytest.fixture(scope="module")
def exam() -> list[dict[str, Any]]:
    return [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def test_every_verb_has_one_sentence_of_its_own() -> None:
    assert Counter(phrase.verb for phrase in PHRASES) == Counter(dict.fromkeys(ALL, 1))


def test_the_answer_follows_from_the_words(train: list[problems.Problem]) -> None:
    for one in train:
        assert solve(one.text) == one.answer, one.text
        assert 2 <= one.steps <= 4


def test_every_equation_of_a_thought_holds(train: list[problems.Problem]) -> None:
    equation = re.compile(r"(\d{3})([-+*/])(\d{3})=(\d{3})")
    for one in train:
        found = equation.findall(one.thought)
        assert len(found) == one.steps
        for left, sign, right, result in found:
            a, b, c = (int(text[::-1]) for text in (left, right, result))
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == c
        assert int(one.thought[-4:-1][::-1]) == one.answer
        assert one.solution.endswith(str(one.answer))


def test_no_template_and_no_numbers_are_in_both_splits(train: list[problems.Problem]) -> None:
    held_out = drawn("test")
    assert not {one.template for one in train} & {one.template for one in held_out}
    assert not {one.numbers for one in train} & {one.numbers for one in held_out}
    for split, ones in (("train", train), ("test", held_out)):
        assert {problems.split_of(one.template) for one in ones} == {split}
        assert {problems.split_of(repr(one.numbers)) for one in ones} == {split}


def test_lessons_keep_their_splits_apart_too() -> None:
    rng = random.Random(5)
    train, test = ([problems.lesson(rng, split) for _ in range(400)] for split in ("train", "test"))
    assert not {lesson.key for lesson in train} & {lesson.key for lesson in test}
    assert not {lesson.numbers for lesson in train} & {lesson.numbers for lesson in test}


def test_a_template_has_no_word_of_a_slot() -> None:
    template = drawn("train", 1)[0].template
    assert "{name}" in template
    assert not re.search(r"\d", template)


def test_the_stored_items_are_what_the_generator_makes(exam: list[dict[str, Any]]) -> None:
    assert exam == items.word_problems()


def test_the_items_are_right_and_varied(exam: list[dict[str, Any]]) -> None:
    answers = Counter(item["answer"].rpartition("#### ")[2] for item in exam)
    assert len(exam) == 500
    assert len({item["id"] for item in exam}) == 500
    assert len(answers) >= 300
    assert answers.most_common(1)[0][1] <= 0.03 * len(exam)
    assert Counter(item["steps"] for item in exam).keys() == {2, 3, 4}
    for item in exam:
        assert solve(item["question"]) == int(item["answer"].rpartition("#### ")[2])


def test_no_item_is_in_training(exam: list[dict[str, Any]], train: list[problems.Problem]) -> None:
    for item in exam:
        assert problems.split_of(item["template"]) == "test"
        assert problems.split_of(repr(tuple(item["numbers"]))) == "test"
    assert not {item["template"] for item in exam} & {one.template for one in train}
    assert len({item["template"] for item in exam}) == len(exam)


def test_some_prompts_are_longer_than_the_window(exam: list[dict[str, Any]]) -> None:
    # Every word is at least one token.
    assert sum(len(item["question"].split()) > WINDOW for item in exam) > len(exam) / 4


@pytest.fixture(scope="module")
def taught() -> list[Lesson]:
    """As many lessons in words as the longest training has; of its first course, the very ones.

    Later courses mix them with pictures, whose drawing takes a minute; word problems stand for those here.
    """
    name, recipe = max(RECIPES.items(), key=lambda item: _problems_of(item[1]))
    first, *later = recipe.stages
    template = FAMILIES[name].template
    table = Timetable(first.course, nano_tokenizer(), template, recipe.batch, f"{recipe.seed}:0")
    rng = random.Random("later courses")
    count = sum(_problems_in(stage, recipe.batch) for stage in later)
    begun = (one.lesson for number in range(first.steps) for one in table.batch(number))
    return [*begun, *(problems.lesson(rng, "train") for _ in range(round(count)))]


def _problems_in(stage: Stage, batch: int) -> float:
    """How many word problems a stage has, in the long run."""
    course = stage.course
    weight = course.weights[course.generators.index(problems.lesson)]
    return stage.steps * batch * weight / sum(course.weights)


def _problems_of(recipe: Recipe) -> float:
    return sum(_problems_in(stage, recipe.batch) for stage in recipe.stages)


def test_no_item_was_taught(exam: list[dict[str, Any]], taught: list[Lesson]) -> None:
    word_problems = [lesson for lesson in taught if "#### " in lesson.answer]
    assert len(word_problems) > 35_000
    assert not {item["template"] for item in exam} & {lesson.key for lesson in word_problems}
    numbers = {lesson.numbers for lesson in word_problems}
    assert not {tuple(item["numbers"]) for item in exam} & numbers


def test_the_nearest_lesson_seldom_has_the_answer(exam: list[dict[str, Any]], taught: list[Lesson]) -> None:
    """Nearest by the words that a question and a lesson share, of all that either has."""
    answers = [lesson.answer.rpartition("#### ")[2] for lesson in taught]
    near = nearest([item["question"] for item in exam], [_question(lesson) for lesson in taught])
    right = sum(
        answers[place] == item["answer"].rpartition("#### ")[2]
        for place, item in zip(near, exam, strict=True)
    )
    assert right <= 0.1 * len(exam)


def test_the_nearest_is_the_one_with_most_words_in_common() -> None:
    texts = ["Mei has 3 cups.", "Mei has 4 cups. She buys 5.", "Ivan owns a hat.", "9 cups has Mei"]
    assert nearest(["Mei has 4 cups.", "Ivan owns a red hat.", "cups, has, 9"], texts) == [0, 2, 3]
    rng = random.Random(1)
    ours, theirs = ([problems.problem(rng, "train").text for _ in range(count)] for count in (20, 300))
    bags = [set(re.findall(r"\w+", text)) for text in theirs]
    for text, place in zip(ours, nearest(ours, theirs, at_once=64), strict=True):
        words = set(re.findall(r"\w+", text))
        likeness = [len(words & bag) / len(words | bag) for bag in bags]
        assert likeness[place] == pytest.approx(max(likeness))


def nearest(questions: Sequence[str], texts: Sequence[str], at_once: int = 4096) -> list[int]:
    """For each question, the number of the text with the largest Jaccard index of their words."""
    bags = [set(re.findall(r"\w+", question)) for question in questions]
    column = {word: place for place, word in enumerate(sorted(set().union(*bags)))}
    asked = torch.zeros(len(bags), len(column))
    for row, bag in enumerate(bags):
        asked[row, [column[word] for word in bag]] = 1
    size = asked.sum(dim=1, keepdim=True)
    best, where = torch.full((len(bags),), -1.0), torch.zeros(len(bags), dtype=torch.long)
    for start in range(0, len(texts), at_once):
        others = [set(re.findall(r"\w+", text)) for text in texts[start : start + at_once]]
        known = torch.zeros(len(others), len(column))
        for row, bag in enumerate(others):
            known[row, [column[word] for word in bag if word in column]] = 1
        shared = asked @ known.T
        index = shared / (size + torch.tensor([len(bag) for bag in others]) - shared)
        likeness, place = index.max(dim=1)
        better = likeness > best
        best, where = torch.where(better, likeness, best), torch.where(better, place + start, where)
    return where.tolist()


def _question(lesson: Lesson) -> str:
    return " ".join(str(message["content"]) for message in lesson.messages)


def test_the_last_and_the_first_number_are_seldom_the_answer(exam: list[dict[str, Any]]) -> None:
    for place in (0, -1):
        guesses = [item["numbers"][place] == solve(item["question"]) for item in exam]
        assert sum(guesses) <= 0.1 * len(exam)


def test_a_lesson_holds_the_thought_and_the_answer() -> None:
    lesson = problems.lesson(random.Random(3), "train")
    message = parse(lesson.answer + lesson.stop)
    assert lesson.thinking
    assert message.content == f"#### {solve(str(lesson.messages[0]['content']))}"
    assert message.reasoning


@pytest.fixture(scope="module", params=["train", "test"])
def talks(request: pytest.FixtureRequest) -> list[Lesson]:
    rng = random.Random(5)
    return [dialogues.lesson(rng, request.param) for _ in range(600)]


def test_calls_parse_to_declared_tools_with_all_arguments(talks: list[Lesson]) -> None:
    called = 0
    for lesson in talks:
        message = parse(lesson.answer + lesson.stop, tools=list(lesson.tools))
        if lesson.stop != "<|tool_response>":
            assert not message.tool_calls
            continue
        (call,) = message.tool_calls
        (tool,) = [tool["function"] for tool in lesson.tools if tool["function"]["name"] == call.name]
        assert call.complete
        arguments = json.loads(call.arguments)
        assert sorted(arguments) == sorted(tool["parameters"]["required"])
        for value in arguments.values():
            assert str(value) in str(lesson.messages[-1]["content"])
        called += 1
    assert called > 100


def test_what_a_tool_found_is_told(talks: list[Lesson]) -> None:
    told = [lesson for lesson in talks if lesson.messages[-1]["role"] == "tool"]
    assert len(told) > 100
    for lesson in told:
        assert str(lesson.messages[-1]["content"]) in lesson.answer


def test_dialogues_of_the_splits_share_no_key() -> None:
    rng = random.Random(6)
    train, test = ({dialogues.lesson(rng, split).key for _ in range(500)} for split in ("train", "test"))
    assert not train & test


def test_the_command_writes_the_items(tmp_path: Path) -> None:
    items.main(["nano_gsm8k", str(tmp_path / "file.jsonl")])
    assert (tmp_path / "file.jsonl").read_bytes() == DATA.read_bytes()
