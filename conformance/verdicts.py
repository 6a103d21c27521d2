"""Verdicts for people: their words, their colours, and how many there are of each."""

from __future__ import annotations

from collections import Counter

from rich.text import Text

from conformance.results import Verdict

BAD: frozenset[Verdict] = frozenset({"fail", "xpass", "error", "timeout"})
"""Those that fail a run."""

_WORDS: dict[Verdict, tuple[str, str, str]] = {
    "pass": ("passed", "passed", "green"),
    "fail": ("failed", "failed", "red"),
    "xfail": ("expected failure", "expected failures", "yellow"),
    "xpass": ("unexpected pass", "unexpected passes", "red"),
    "skip": ("skipped", "skipped", "dim"),
    "inconclusive": ("inconclusive", "inconclusive", "magenta"),
    "error": ("error", "errors", "red"),
    "timeout": ("timeout", "timeouts", "red"),
}
"""Verdict to its word, for one and for several, and its colour."""


def verdict_counts(counts: Counter[Verdict], not_run: int = 0) -> Text:
    """`12 passed, 1 failed, 3 not run`, coloured."""
    styles = [style for verdict, (_, _, style) in _WORDS.items() if counts[verdict]]
    parts = [Text(text, style=style) for text, style in zip(counted(counts), styles, strict=True)]
    if not_run:
        parts.append(Text(f"{not_run} not run", style="dim"))
    return Text(", ").join(parts)


def counted(counts: Counter[Verdict]) -> list[str]:
    """`12 passed`, `1 error`: a text for each verdict that occurs."""
    return [
        f"{counts[verdict]} {one if counts[verdict] == 1 else several}"
        for verdict, (one, several, _) in _WORDS.items()
        if counts[verdict]
    ]
