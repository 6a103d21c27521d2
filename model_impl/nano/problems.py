"""Word problems with two to four steps, and thoughts that solve them.

The thought has a sentence for each one of the problem that changes the count: its verb, and the arithmetic.
Numbers there have three digits, units first: ` buys:430+630=070.` says that 34 and 36 are 70. So each digit
depends on two digits and a carry that stand at fixed distances before it, and a small model can learn it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model_impl.nano.lesson import Lesson, Split
from model_impl.nano.phrases import FILLERS, NAMES, PHRASES, QUESTIONS, THINGS, Operation, Phrase

LARGEST = 999
"""No number in a problem, or on the way to its answer, is larger."""
FACTORS = range(2, 13)
_SHARERS = range(2, 10)
_TEST_PART = 10
"""One template of so many is held out, and one tuple of numbers of so many."""

_LINES: dict[Operation, int] = {
    "start": 0,
    "start-product": 1,
    "start-share": 1,
    "add": 1,
    "take": 1,
    "add-product": 2,
    "take-product": 2,
    "double": 1,
    "triple": 1,
}
"""Steps of arithmetic that an operation takes."""
_FEWEST, _MOST = 2, 4
_LIKELY: dict[Operation, int] = {
    "add": 8,
    "take": 8,
    "add-product": 4,
    "take-product": 4,
    "double": 2,
    "triple": 2,
}
_STARTS: dict[Operation, int] = {"start": 8, "start-product": 3, "start-share": 2}


@dataclass(frozen=True)
class Problem:
    """A word problem and its solution."""

    text: str
    thought: str
    solution: str
    """The steps of the thought, for people."""
    answer: int
    steps: int
    template: str
    """The text with all slots open."""
    numbers: tuple[int, ...]
    """In the order of the text."""


def split_of(identity: str) -> Split:
    """The split of a template or a tuple of numbers: decided by its digest, so never both."""
    digest = hashlib.sha256(identity.encode()).digest()
    return "test" if digest[0] * 256 + digest[1] < 65536 // _TEST_PART else "train"


def problem(rng: random.Random, split: Split) -> Problem:
    """Draw a problem of a split."""
    while True:
        template, shape = _template(rng)
        if split_of(template) != split:
            continue
        for _ in range(200):
            numbers = _numbers(rng, shape)
            if numbers is not None and split_of(repr(numbers)) == split:
                return _filled(rng, template, shape, numbers)


def lesson(rng: random.Random, split: Split) -> Lesson:
    """Draw a problem of a split, as a conversation with thinking."""
    drawn = problem(rng, split)
    return Lesson(
        messages=({"role": "user", "content": drawn.text},),
        answer=f"<|channel>thought\n{drawn.thought}<channel|>#### {drawn.answer}",
        key=drawn.template,
        numbers=drawn.numbers,
        thinking=True,
    )


def digits(number: int) -> str:
    """A number as thoughts write it: three digits, units first."""
    return f"{number:03d}"[::-1]


def _template(rng: random.Random) -> tuple[str, tuple[Phrase, ...]]:
    """A text with open slots, and its sentences that matter."""
    shape = _shape(rng)
    sentences = [phrase.text for phrase in shape]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        sentences.insert(rng.randint(1, len(sentences)), rng.choice(FILLERS))
    question = rng.choice(QUESTIONS)
    sentences.insert(0 if rng.random() < 0.2 else len(sentences), question)
    if len(set(sentences)) < len(sentences):
        return _template(rng)
    return " ".join(_capital(sentence) for sentence in sentences), shape


def _shape(rng: random.Random) -> tuple[Phrase, ...]:
    """A beginning and events, of two to four steps together."""
    wanted = rng.randint(_FEWEST, _MOST)
    chosen = [_pick(rng, _STARTS, ())]
    while (steps := sum(_LINES[phrase.operation] for phrase in chosen)) < wanted:
        fitting = {kind: weight for kind, weight in _LIKELY.items() if steps + _LINES[kind] <= wanted}
        chosen.append(_pick(rng, fitting, chosen))
    return tuple(chosen)


def _pick(rng: random.Random, weights: dict[Operation, int], used: Sequence[Phrase]) -> Phrase:
    kind = rng.choices(list(weights), list(weights.values()))[0]
    free = [phrase for phrase in PHRASES if phrase.operation == kind and phrase not in used]
    return rng.choice(free) if free else _pick(rng, weights, used)


def _numbers(rng: random.Random, shape: Sequence[Phrase]) -> tuple[int, ...] | None:
    """Numbers for all slots, in the order of the sentences; None if a count leaves its range."""
    found: list[int] = []
    count = 0
    for phrase in shape:
        match phrase.operation:
            case "start" | "add" | "take":
                own: tuple[int, ...] = (_magnitude(rng),)
            case "start-share":
                parts = rng.choice(_SHARERS)
                own = (parts * rng.choice(FACTORS), parts)
            case "double" | "triple":
                own = ()
            case _:
                own = (rng.choice(FACTORS), rng.choice(FACTORS))
        count = apply(phrase.operation, count, own)
        if not 0 < count <= LARGEST:
            return None
        found += own
    return tuple(found)


def _magnitude(rng: random.Random) -> int:
    """A number of one digit, or two, or three: all lengths are common."""
    low, high = rng.choice(((2, 9), (10, 99), (10, 99), (100, LARGEST), (100, LARGEST), (100, LARGEST)))
    return rng.randint(low, high)


def apply(operation: Operation, count: int, own: Sequence[int]) -> int:
    """The count after a sentence with these numbers."""
    match operation:
        case "start":
            return own[0]
        case "start-product":
            return own[0] * own[1]
        case "start-share":
            return own[0] // own[1]
        case "add":
            return count + own[0]
        case "take":
            return count - own[0]
        case "add-product":
            return count + own[0] * own[1]
        case "take-product":
            return count - own[0] * own[1]
        case "double":
            return count * 2
        case "triple":
            return count * 3


def arithmetic(
    operation: Operation, count: int, own: Sequence[int], write: Callable[[int], str] = digits
) -> str:
    """How `apply` is worked out.

    Args:
        operation: Of the sentence.
        count: Before it.
        own: The sentence's numbers.
        write: Makes text of a number; left out, as thoughts have them.
    """
    after, *numbers = map(write, (apply(operation, count, own), *own))
    before = write(count)
    sign = "+" if operation.startswith("add") else "-"
    match operation:
        case "start":
            return after
        case "start-product":
            return f"{numbers[0]}*{numbers[1]}={after}"
        case "start-share":
            return f"{numbers[0]}/{numbers[1]}={after}"
        case "add" | "take":
            return f"{before}{sign}{numbers[0]}={after}"
        case "add-product" | "take-product":
            product = write(own[0] * own[1])
            return f"{numbers[0]}*{numbers[1]}={product},{before}{sign}{product}={after}"
        case "double" | "triple":
            return f"{before}*{write(2 if operation == 'double' else 3)}={after}"


def _filled(rng: random.Random, template: str, shape: Sequence[Phrase], numbers: tuple[int, ...]) -> Problem:
    (name, he), (friend, _) = rng.sample(NAMES, 2)
    words = {"name": name, "he": he, "friend": friend, "things": rng.choice(THINGS)}
    rest, count, text = list(numbers), 0, template
    lines: list[str] = []
    worked: list[str] = []
    for phrase in shape:
        own = tuple(rest.pop(0) for slot in ("{a}", "{b}") if slot in phrase.text)
        lines.append(f" {phrase.verb}:{arithmetic(phrase.operation, count, own)}.")
        worked.append(f"{phrase.verb}: {arithmetic(phrase.operation, count, own, str)}")
        count = apply(phrase.operation, count, own)
        values = dict(zip(("a", "b"), own, strict=False))
        sentence = filled = _capital(phrase.text)
        for slot, value in values.items():
            filled = filled.replace(f"{{{slot}}}", str(value))
        text = text.replace(sentence, filled, 1)
    for slot, word in words.items():
        text = text.replace(f"{{{slot}}}", word).replace(f"{{{slot.capitalize()}}}", word.capitalize())
    return Problem(
        text=text,
        thought="".join(lines),
        solution="\n".join(worked),
        answer=count,
        steps=sum(_LINES[phrase.operation] for phrase in shape),
        template=template,
        numbers=numbers,
    )


def _capital(sentence: str) -> str:
    """A sentence whose first letter is a capital; `{he}` becomes `{He}`."""
    return sentence.replace("{he}", "{He}", 1) if sentence.startswith("{he}") else sentence
