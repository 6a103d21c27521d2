"""Results are kept small, whatever a target answers: each is one line of a run file and a page.

A text that is too long keeps its beginning and its end, with its length and digest between them; the
result's `shortened` says which texts these are.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from conformance.results import Evidence, Problem, Result, Shortened

LONG_TEXT = 100_000
"""Characters above which a text of the evidence or of a problem is shortened."""

LONG_SENTENCE = 4_000
"""The same for reasons and messages, which are sentences."""

_BUDGET = 2_000_000
"""Characters of one result; what comes after is shortened to `LONG_SENTENCE`, lists to nothing."""

_ITEM = 16
"""What an item of a list counts beside its text."""


def shortened_result(result: Result) -> Result:
    """The result with long texts and lists shortened; the same object where there is nothing to do."""
    shortener = _Shortener()
    changes: dict[str, Any] = {
        name: shortener.text(getattr(result, name), name, LONG_SENTENCE) for name in ("reason", "own_reason")
    }
    # Problems come first: they say what is wrong, and the budget must not be spent when they are reached.
    changes["problems"] = tuple(_problem(p, shortener, n) for n, p in enumerate(result.problems))
    changes["evidence"] = _evidence(result.evidence, shortener)
    if not shortener.found:
        return result
    return result.model_copy(update={**changes, "shortened": (*result.shortened, *shortener.found)})


def _problem(problem: Problem, shortener: _Shortener, number: int) -> Problem:
    place = f"problems.{number}"
    changes: dict[str, Any] = {"message": shortener.text(problem.message, f"{place}.message", LONG_SENTENCE)}
    for name in ("expected", "got", "chunks"):
        changes[name] = shortener.value(getattr(problem, name), f"{place}.{name}")
    return problem.model_copy(update=changes)


def _evidence(evidence: Evidence, shortener: _Shortener) -> Evidence:
    changes: dict[str, Any] = {}
    for name in ("input", "prompt", "expected", "got", "spans"):
        changes[name] = shortener.value(getattr(evidence, name), f"evidence.{name}")
    if changes["input"] != evidence.input:
        changes["spans"] = None  # they speak about the whole input
    return evidence.model_copy(update=changes)


class _Shortener:
    def __init__(self) -> None:
        self.found: list[Shortened] = []
        self._left = _BUDGET

    def text(self, text: str, where: str, limit: int) -> str:
        if self._left <= 0:
            limit = min(limit, LONG_SENTENCE)
        if len(text) <= limit:
            self._left -= len(text)
            return text
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self.found.append(Shortened(where=where, length=len(text), sha256=digest))
        self._left -= limit
        tail = limit // 10
        mark = f" [… shortened: {len(text)} characters in all, sha256 {digest} …] "
        return f"{text[: limit - tail]}{mark}{text[-tail:]}"

    def value(self, value: Any, where: str) -> Any:
        if isinstance(value, str):
            return self.text(value, where, LONG_TEXT)
        if isinstance(value, dict):
            return self._mapping(value, where)
        if isinstance(value, list | tuple):
            return self._items(value, where)
        return value

    def _mapping(self, mapping: dict[str, Any], where: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, item in mapping.items():
            if self._left <= 0:
                kept["…"] = self._rest(mapping, where)
                break
            self._left -= _ITEM
            name = self.text(str(key), f"{where}.(key)", LONG_SENTENCE)
            kept[name] = self.value(item, f"{where}.{name[:100]}")
        return kept

    def _items(self, items: list[Any] | tuple[Any, ...], where: str) -> Any:
        kept: list[Any] = []
        for number, item in enumerate(items):
            if self._left <= 0:
                kept.append(self._rest(items, where))
                break
            self._left -= _ITEM
            kept.append(self.value(item, f"{where}.{number}"))
        return kept if isinstance(items, list) else tuple(kept)

    def _rest(self, whole: dict[str, Any] | list[Any] | tuple[Any, ...], where: str) -> str:
        digest = hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()
        self.found.append(Shortened(where=where, length=len(whole), sha256=digest))
        return f"[… shortened: {len(whole)} items in all, sha256 {digest} …]"
