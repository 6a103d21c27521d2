"""Two sheets, item by item. What cannot be compared is refused, never guessed.

1. Both were asked the same task, in the same version and way: the headers say so.
2. Items pair by document and prompt; another prompt under the same document is another question.
3. An item without an answer on either side is left out and counted: it is no wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from conformance.errors import ConformanceError
from conformance.scoring import Item, Sheet, SheetHeader

UNANSWERED = ("refused", "transport-error")
"""Outcomes without an answer."""

_SAME = (
    "task",
    "task_version",
    "filter",
    "metric",
    "thinking",
    "shots",
    "max_new_tokens",
    "seed",
    "order_seed",
)
_SAME_IF_KNOWN = ("template_sha256", "checkpoint_sha256")
_TURN_END = "<turn|>"
_SHOWN = 3


class ComparisonError(ConformanceError):
    """Two sheets cannot be compared: they are answers to different questions."""


@dataclass(frozen=True)
class Pair:
    """An item that both arms answered."""

    reference: Item
    target: Item

    @property
    def difference(self) -> int:
        """1 lost, -1 gained, 0 neither."""
        return int(self.reference.outcome == "correct") - int(self.target.outcome == "correct")


@dataclass(frozen=True)
class Pairing:
    """The items of a reference, in its order, and what became of them."""

    pairs: tuple[Pair, ...]
    missing: int
    """Items that the target has no line for."""
    lost_on_the_way: int
    """Items whose answer, by either side, was lost by transport; or that the reference was refused."""
    refused: int
    """Items that the target would not take."""
    begins: bool
    """The target's items are the reference's first ones, in its order."""
    texts_differ: int
    """Pairs whose answers have other words."""
    outcomes_differ: int
    """Pairs whose answers are of other classes."""

    @property
    def clusters(self) -> tuple[str, ...] | None:
        """Cluster of each pair; None where items are independent.

        Raises:
            ComparisonError: some have one and some have none.
        """
        return clusters_of([pair.target for pair in self.pairs])


def clusters_of(items: Sequence[Item]) -> tuple[str, ...] | None:
    """Cluster of each item; None where items are independent.

    Raises:
        ComparisonError: some have one and some have none, or all share one.
    """
    named = [item.cluster for item in items]
    if not any(named):
        return None
    if not all(named):
        lone = next(item.doc_id for item in items if not item.cluster)
        raise ComparisonError(
            f"item {lone!r} names no cluster and others do; the task has to name all or none"
        )
    if len(set(named)) < 2:
        raise ComparisonError(f"all items are of the cluster {named[0]!r}: nothing is known beyond it")
    return tuple(named)


def check_clusters(declared: int | Literal["all"] | None, reference: Sheet) -> None:
    """Refuse items that depend on each other in another way than a gate declares, and was planned with.

    Args:
        declared: The gate's `clusters`.
        reference: Whose items name clusters, or do not.

    Raises:
        ComparisonError: says what to declare.
    """
    named = clusters_of(reference.items)
    count = len(set(named)) if named is not None else None
    if declared is None and count is not None:
        raise ComparisonError(
            f"the reference's items name {count} clusters, such as {named[0] if named else ''!r}: declare "
            f"`clusters: {count}` with a measured `design_effect`, or `clusters: all` if there are no others"
        )
    if isinstance(declared, int) and count != declared:
        raise ComparisonError(
            f"the reference's items name {count or 'no'} clusters and the gate declares {declared}; make "
            "them equal"
        )


def pair(reference: Sheet, target: Sheet, *, other_checkpoint: bool = False) -> Pairing:
    """Pair the items of two sheets.

    Args:
        reference: Whose items are the whole.
        target: Some or all of them.
        other_checkpoint: The arms may have other weights.

    Raises:
        ComparisonError: names the difference that makes them answers to different questions.
    """
    check_headers(reference.header, target.header, other_checkpoint=other_checkpoint)
    for sheet in (reference, target):
        check_items(sheet)
    asked = {item.doc_id: item for item in reference.items}
    _check_questions(asked, target.items)
    answers = {item.doc_id: item for item in target.items}
    both = [Pair(item, answers[item.doc_id]) for item in reference.items if item.doc_id in answers]
    refused = [p for p in both if p.target.outcome == "refused" and p.reference.outcome not in UNANSWERED]
    answered = tuple(
        p for p in both if p.target.outcome not in UNANSWERED and p.reference.outcome not in UNANSWERED
    )
    return Pairing(
        pairs=answered,
        missing=len(asked) - len(both),
        lost_on_the_way=len(both) - len(answered) - len(refused),
        refused=len(refused),
        begins=[item.doc_id for item in target.items]
        == [item.doc_id for item in reference.items[: len(target.items)]],
        texts_differ=sum(_words(p.reference) != _words(p.target) for p in answered),
        outcomes_differ=sum(p.reference.outcome != p.target.outcome for p in answered),
    )


def _words(item: Item) -> str:
    """The whole answer, without the mark of the turn's end, which servers leave out."""
    return item.answer.strip().removesuffix(_TURN_END).strip()


def check_headers(reference: SheetHeader, target: SheetHeader, *, other_checkpoint: bool) -> None:
    """Refuse sheets that were not made in the same way.

    Raises:
        ComparisonError: names the field and both values.
    """
    for name in (*_SAME, *_SAME_IF_KNOWN):
        if name == "checkpoint_sha256" and other_checkpoint:
            continue
        ours, theirs = getattr(reference, name), getattr(target, name)
        unknown = name in _SAME_IF_KNOWN and not (ours and theirs)  # a server does not say
        if ours != theirs and not unknown:
            raise ComparisonError(
                f"the reference has {name} {ours!r} and the target {theirs!r}: they are answers to different "
                "questions; ask both in the same way"
            )


def check_items(sheet: Sheet) -> None:
    """Refuse a sheet with two items of one document, or with items that were asked several times.

    Raises:
        ComparisonError: names the item.
    """
    seen: set[str] = set()
    for item in sheet.items:
        if item.doc_id in seen:
            raise ComparisonError(
                f"{sheet.header.target}: item {item.doc_id!r} is there twice; which answer counts?"
            )
        seen.add(item.doc_id)
        if item.repeats != 1:
            raise ComparisonError(
                f"{sheet.header.target}: item {item.doc_id!r} was asked {item.repeats} times; gates "
                "judge one greedy answer to each"
            )
    if not seen:
        raise ComparisonError(f"{sheet.header.target}: the sheet has no items")


def _check_questions(asked: dict[str, Item], answers: Sequence[Item]) -> None:
    for name, what in (("doc_hash", "documents"), ("prompt_hash", "prompts")):
        changed = [
            item.doc_id
            for item in answers
            if item.doc_id in asked and getattr(item, name) != getattr(asked[item.doc_id], name)
        ]
        if changed:
            raise ComparisonError(
                f"{len(changed)} {what} differ from the reference's ({_some(changed)}): they are other "
                "questions; make a new reference, or ask the same ones"
            )
    extra = [item.doc_id for item in answers if item.doc_id not in asked]
    if extra:
        raise ComparisonError(
            f"the reference has no answer to {len(extra)} items ({_some(extra)}); ask the items that it has"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, …" if len(names) > _SHOWN else shown
