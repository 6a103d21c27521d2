"""Sentences that word problems are made of.

Slots: `{name}` and `{he}` are the person that the problem is about, `{friend}` is another one, `{things}`
is what is counted, `{a}` and `{b}` are numbers. Each sentence that changes the count has a verb of its own,
which is how the thought refers to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operation = Literal["start", "start-product", "start-share", "add", "take", "add-product", "take-product",
                    "double", "triple"]  # fmt: skip


@dataclass(frozen=True)
class Phrase:
    """A sentence that says how many things there are, or how their number changes."""

    operation: Operation
    verb: str
    text: str


def _phrases(operation: Operation, **texts: str) -> tuple[Phrase, ...]:
    return tuple(Phrase(operation, verb, text.replace("_", verb, 1)) for verb, text in texts.items())


PHRASES: tuple[Phrase, ...] = (
    *_phrases(
        "start",
        has="{name} _ {a} {things}.",
        owns="{name} _ {a} {things}.",
        keeps="{name} _ {a} {things} on a shelf.",
        starts="{name} _ the day with {a} {things}.",
        counts="{name} _ {a} {things} in the room.",
        stores="In a box, {name} _ {a} {things}.",
    ),
    *_phrases(
        "start-product",
        packs="{name} _ {a} boxes with {b} {things} in each box.",
        lays="{name} _ out {a} rows of {b} {things}.",
        stacks="{name} _ {a} piles, and every pile is {b} {things} high.",
        hangs="{name} _ up {a} nets that hold {b} {things} each.",
    ),
    *_phrases(
        "start-share",
        splits="{name} _ {a} {things} evenly into {b} parts and takes one part.",
        divides="{name} _ {a} {things} among {b} people, and {he} is one of them.",
        cuts="A teacher _ a pile of {a} {things} into {b} equal piles, and {name} gets one.",
    ),
    *_phrases(
        "add",
        buys="{he} _ {a} {things} at the shop.",
        finds="{he} _ {a} more {things}.",
        wins="{he} _ {a} {things} in a game.",
        borrows="{he} _ {a} {things} from {friend}.",
        receives="Then {he} _ {a} {things}.",
        makes="At noon {he} _ {a} new {things}.",
        collects="In the garden {he} _ another {a} {things}.",
        brings="{friend} _ {a} {things} as a present.",
        adds="{friend} _ {a} {things} of the same kind.",
        earns="{he} _ {a} {things} by hard work.",
        picks="On the way home {he} _ up {a} {things}.",
        sends="An aunt _ {a} {things} by mail.",
    ),
    *_phrases(
        "take",
        gives="{he} _ {a} {things} to {friend}.",
        loses="{he} _ {a} {things} on the way.",
        sells="{he} _ {a} {things} at the market.",
        breaks="{he} _ {a} of the {things}.",
        spends="Then {he} _ {a} {things}.",
        drops="In the rain {he} _ {a} {things} into a river.",
        lends="{he} _ {friend} {a} {things}.",
        throws="Later {he} _ away {a} old {things}.",
        steals="A bird _ {a} {things}.",
        wants="{friend} _ {a} {things} and may have them.",
        leaves="{he} _ {a} {things} at school.",
        burns="A fire _ {a} {things}.",
    ),
    *_phrases(
        "add-product",
        orders="{he} _ {a} bags with {b} {things} in each bag.",
        carries="{friend} _ in {a} baskets of {b} {things} each.",
        opens="Then {he} _ {a} packets that hold {b} {things} each.",
        fetches="From the cellar {he} _ {a} crates of {b} {things}.",
        gains="For {a} days {he} _ {b} {things} a day.",
        unloads="A driver _ {a} carts with {b} {things} on every cart.",
    ),
    *_phrases(
        "take-product",
        hands="{he} _ {a} {things} to each of {b} children.",
        ships="{he} _ {a} parcels with {b} {things} in every parcel.",
        uses="For {a} days {he} _ {b} {things} a day.",
        fills="{he} _ {a} jars with {b} {things} each and sells the jars.",
        grabs="Each of {a} monkeys _ {b} {things}.",
        donates="To {a} schools {he} _ {b} {things} each.",
    ),
    *_phrases(
        "double",
        doubles="By luck the number of {things} _.",
        copies="A machine _ every one of the {things} once.",
    ),
    *_phrases(
        "triple",
        triples="By magic the number of {things} _.",
        multiplies="A wizard _ the {things} by three.",
    ),
)

FILLERS: tuple[str, ...] = (
    "It is a sunny day.",
    "The bus is late again.",
    "{friend} looks out of the window and sings a song.",
    "A dog barks in the street.",
    "Nobody knows why.",
    "{he} likes {things} very much.",
    "After that there is a short break, and everybody drinks a cup of tea.",
    "The weather is cold and wet.",
    "{friend} is the best friend of {name}.",
    "Many people talk about it.",
    "The clock on the wall is slow.",
    "{he} is tired but happy.",
)
"""Sentences that change nothing; no number stands in them."""

QUESTIONS: tuple[str, ...] = (
    "How many {things} does {name} have now?",
    "How many {things} are there in the end?",
    "What is the number of {things} at last?",
    "How many {things} does {name} have at the end of the day?",
    "Find the number of {things} that {name} has now.",
    "So how many {things} are left with {name}?",
)

_MEN = (
    "Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Noah", "Paul",
    "Omar", "Ravi", "Ken", "Luis", "Adam", "Hugo", "Ivan",
)  # fmt: skip
_WOMEN = (
    "Mia", "Ann", "Eva", "Zoe", "Lily", "Nora", "Ruth", "Jane",
    "Aisha", "Mei", "Sara", "Lena", "Rosa", "Olga", "Ida",
)  # fmt: skip
NAMES: tuple[tuple[str, str], ...] = (
    *((name, "he") for name in _MEN),
    *((name, "she") for name in _WOMEN),
)
"""Given names, and what stands for each."""

THINGS: tuple[str, ...] = (
    "apples", "pens", "books", "stones", "shells", "coins", "cards", "stamps",
    "eggs", "beads", "nuts", "pears", "plums", "cups", "balls", "dolls",
    "kites", "buttons", "flowers", "stickers", "cookies", "pencils", "lemons", "marbles",
    "tickets", "ribbons", "bottles", "candles", "spoons", "keys",
)  # fmt: skip
