"""Items of accuracy evidence: their outcome classes, and the lists in which the dashboard shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conformance.gates.decision import Decision
from conformance.reporting.signs import Status
from conformance.reporting.values import Block, block
from conformance.scoring import OUTCOMES, Item

ITEMS_ON_A_PAGE = 50
SHORT_PROMPT = 1_000
"""Characters up to which a prompt is shown without being opened."""
_PAIRS = ("lost", "gained", "")
"""What an item is beside the reference's, in the order in which they are listed."""


@dataclass(frozen=True)
class Class:
    """How an outcome class looks and reads."""

    name: str
    glyph: str
    look: Status
    """The sign whose colours it has."""
    meaning: str


CLASSES: dict[str, Class] = {
    shown.name: shown
    for shown in (
        Class("correct", "✓", "pass", "The answer is right."),
        Class("wrong", "✗", "fail", "An answer was read, and it is another one."),
        Class("unparsable", "¿", "xpass", "No answer can be read in what came; it counts as wrong."),
        Class("truncated", "…", "timeout", "It broke off at the limit of tokens; it counts as wrong."),
        Class("empty", "∅", "inconclusive", "Nothing was said besides the thought; it counts as wrong."),
        Class(
            "refused", "⊘", "policy", "The target would not take the question; it is left out of the score."
        ),
        Class("transport-error", "!", "error", "No answer came; it is left out of the score."),
    )
}
if tuple(CLASSES) != OUTCOMES:
    raise AssertionError("every outcome class has its sign, in the order of `OUTCOMES`")


@dataclass(frozen=True)
class Share:
    """A stretch of a bar of 100 units."""

    shown: Class
    number: int
    start: float
    width: float


def bar(outcomes: Mapping[str, int]) -> list[Share]:
    """Outcome classes as stretches of a bar."""
    total = sum(outcomes.values())
    shares, at = [], 0.0
    for name, shown in CLASSES.items():
        if number := outcomes.get(name, 0):
            width = 100 * number / total
            shares.append(Share(shown, number, at, width))
            at += width
    return shares


@dataclass(frozen=True)
class ItemView:
    """An item, drawn."""

    item: Item
    shown: Class
    pair: str
    """`lost`, `gained`, or empty."""

    @property
    def prompt(self) -> Block:
        """What was asked."""
        return block(self.item.prompt)

    @property
    def answer(self) -> Block | None:
        """What came, if anything did."""
        return block(self.item.answer) if self.item.answer else None


@dataclass(frozen=True)
class ItemPage:
    """A page of a list of items."""

    list: ItemList
    number: int
    """From 1."""
    views: Sequence[ItemView]

    @property
    def page(self) -> str:
        """Where it is, from the site's root."""
        return self.list.page(self.number)

    @property
    def first(self) -> int:
        """Number of its first item in the list, from 1."""
        return (self.number - 1) * ITEMS_ON_A_PAGE + 1


@dataclass(frozen=True)
class ItemList:
    """Items that are listed together."""

    folder: str
    """Where its pages are, from the site's root."""
    name: str
    """`discordant`, or an outcome class."""
    views: Sequence[ItemView]

    def page(self, number: int) -> str:
        """Where one of its pages is, from the site's root."""
        return f"{self.folder}/{self.name}-{number}.html"

    @property
    def pages(self) -> list[ItemPage]:
        """The list, cut into pages."""
        starts = range(0, len(self.views), ITEMS_ON_A_PAGE)
        return [
            ItemPage(self, number, self.views[start : start + ITEMS_ON_A_PAGE])
            for number, start in enumerate(starts, start=1)
        ]


def item_lists(items: Sequence[Item], decision: Decision | None, folder: str) -> list[ItemList]:
    """Items by list: discordant pairs, then each class that occurs, `correct` last.

    Args:
        items: Of a sheet.
        decision: It says which items are discordant.
        folder: Where the lists' pages are, from the site's root.
    """
    pairs: dict[str, str] = {}
    if decision is not None:
        pairs = dict.fromkeys(decision.lost, "lost") | dict.fromkeys(decision.gained, "gained")
    views = [ItemView(item, CLASSES[item.outcome], pairs.get(item.doc_id, "")) for item in items]
    views.sort(key=lambda view: _PAIRS.index(view.pair))
    listed = {"discordant": [view for view in views if view.pair]}
    for name in [*(name for name in CLASSES if name != "correct"), "correct"]:
        listed[name] = [view for view in views if view.item.outcome == name]
    return [ItemList(folder, name, found) for name, found in listed.items() if found]
