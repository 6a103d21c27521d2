"""A result in words, for terminals and pytest's failure section.

Model output is untrusted: characters that a terminal would obey are shown as escapes.
"""

from __future__ import annotations

import difflib
import itertools
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from conformance.results import Problem, Result

WORDS = {
    "pass": "passed",
    "fail": "failed",
    "xfail": "failed as expected",
    "xpass": "passed unexpectedly",
    "skip": "skipped",
    "inconclusive": "inconclusive",
    "error": "ended in an error",
    "timeout": "ran out of time",
}
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MAX_DIFF_LINES = 60
_MOST_COMPARED = 10_000
"""Characters of both sides above which lines are compared whole: `ndiff` takes seconds then."""

_LONG = 2_000
"""Characters above which a text is cut."""

_CONTEXT = 200
"""Characters that are shown before the first difference of two long texts."""

_MAX_CHUNKS = 12


def visible(text: str) -> str:
    """The text with control and direction characters escaped; newlines stay."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _OBEYED else _escape(char)
        for char in text
    )


def headline(result: Result) -> str:
    """`parser/reasoning::label-is-dropped on vllm@0.32.0 failed: reason`."""
    line = f"{result.suite}::{result.case} on {result.target} {WORDS[result.verdict]}"
    reason = result.reason or ", ".join(dict.fromkeys(problem.rule for problem in result.problems))
    return visible(f"{line}: {reason}" if reason else line)


def explain(result: Result) -> str:
    """Headline, every broken rule with its difference, the engine's last words, how to repeat."""
    lines = [headline(result)]
    for problem in result.problems:
        lines += ["", *explain_problem(problem, result.kind)]
    if result.evidence.input and result.problems:
        lines += ["", f"input: {quoted(_cut(result.evidence.input))}"]
    if result.expectation:
        lines += ["", f"expectation: {result.expectation}"]
    if result.stderr:
        lines += ["", "standard error of the target, last lines:"]
        lines += [f"  {line}" for line in visible(result.stderr).splitlines()[-20:]]
    return "\n".join([*lines, "", f"repeat: {result.repeat}"])


def explain_problem(problem: Problem, kind: str) -> list[str]:
    """One broken rule: what it says, the difference, and the smallest chunking that shows it.

    Args:
        problem: It.
        kind: Kind of the suite; the answers of a parser are whole or streamed.
    """
    lines = [f"[{problem.rule}] {visible(problem.message)}{_way(problem) if kind == 'parser' else ''}"]
    if problem.expected is not None:
        lines += diff(problem.expected, problem.got)
    elif problem.got is not None:
        got = [f"    {line}" for line in _pretty(_short_alone(_filled(problem.got)))]
        lines += ["  got", *got[:_MAX_DIFF_LINES]]
        if len(got) > _MAX_DIFF_LINES:
            lines.append(f"    … {len(got) - _MAX_DIFF_LINES} more lines")
    if problem.chunks is not None:
        chunks = " | ".join(quoted(_cut(chunk)) for chunk in problem.chunks[:_MAX_CHUNKS])
        more = f" | … {len(problem.chunks) - _MAX_CHUNKS} more" if len(problem.chunks) > _MAX_CHUNKS else ""
        name = f" ({problem.chunking.name})" if problem.chunking is not None else ""
        lines.append(f"  smallest chunking that shows it{name}: {chunks}{more}")
    return lines


def _way(problem: Problem) -> str:
    """Which answer of a parser broke the rule."""
    if problem.chunking is None:
        return " (whole answer)"
    return f" (streamed by {problem.chunking.unit}: {problem.chunking.name})"


def diff(expected: Any, got: Any) -> list[str]:
    """Lines of a difference between two JSON values: `-` expected, `+` got.

    Empty fields are left out: absent, null and empty mean the same in an answer.
    """
    lines = ["  - expected", "  + got"]
    left, right = (_pretty(side) for side in _short_pair(_filled(expected), _filled(got)))
    lines += [f"    {line}" for line in _compared(left, right)]
    if len(lines) > _MAX_DIFF_LINES:
        lines = [*lines[:_MAX_DIFF_LINES], f"    … {len(lines) - _MAX_DIFF_LINES} more lines"]
    return lines


def quoted(text: str) -> str:
    """The text as one JSON string, with its markers readable."""
    return visible(json.dumps(text, ensure_ascii=False))


def _compared(left: list[str], right: list[str]) -> Iterator[str]:
    if sum(map(len, left)) + sum(map(len, right)) <= _MOST_COMPARED:
        yield from (line for line in difflib.ndiff(left, right) if not line.startswith("?"))
        return
    # Lines beyond those that are shown need no comparison.
    left, right = left[: _MAX_DIFF_LINES * 10], right[: _MAX_DIFF_LINES * 10]
    for tag, i, j, k, m in difflib.SequenceMatcher(None, left, right).get_opcodes():
        if tag == "equal":
            yield from (f"  {line}" for line in left[i:j])
        else:
            yield from (f"- {line}" for line in left[i:j])
            yield from (f"+ {line}" for line in right[k:m])


def _cut(text: str, start: int = 0) -> str:
    """The text from a place on, as far as a terminal should show it."""
    if len(text) <= _LONG:
        return text
    end = start + _LONG
    before = f"[{start} characters …] " if start else ""
    after = f" [… {len(text) - end} characters]" if end < len(text) else ""
    return f"{before}{text[start:end]}{after}"


def _short_pair(expected: Any, got: Any) -> tuple[Any, Any]:
    """Two values whose long texts are cut: to the first difference where both have a text."""
    if isinstance(expected, str) and isinstance(got, str):
        start = 0 if expected == got else max(0, _common_prefix(expected, got) - _CONTEXT)
        return _cut(expected, start), _cut(got, start)
    if isinstance(expected, dict) and isinstance(got, dict):
        pairs = {k: _short_pair(expected.get(k), got.get(k)) for k in {**expected, **got}}
        return {k: pairs[k][0] for k in expected}, {k: pairs[k][1] for k in got}
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        items = [_short_pair(a, b) for a, b in itertools.zip_longest(expected, got)]
        return [a for a, _ in items[: len(expected)]], [b for _, b in items[: len(got)]]
    return _short_alone(expected), _short_alone(got)


def _short_alone(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, dict):
        return {key: _short_alone(item) for key, item in value.items()}
    return [_short_alone(item) for item in value] if isinstance(value, list | tuple) else value


def _common_prefix(a: str, b: str) -> int:
    """How many characters both begin with; by halves, as whole slices compare quickly."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item not in (None, "", [], ())}
    return value


def _pretty(value: Any) -> list[str]:
    return visible(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)).splitlines()


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
