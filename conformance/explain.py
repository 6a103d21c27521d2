"""A result in words, for terminals and pytest's failure section.

Model output is untrusted: characters that a terminal would obey are shown as escapes.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
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
        lines += ["", *explain_problem(problem)]
    if result.evidence.input and result.problems:
        lines += ["", f"input: {quoted(result.evidence.input)}"]
    if result.expectation:
        lines += ["", f"expectation: {result.expectation}"]
    if result.stderr:
        lines += ["", "standard error of the target, last lines:"]
        lines += [f"  {line}" for line in visible(result.stderr).splitlines()[-20:]]
    return "\n".join([*lines, "", f"repeat: {result.repeat}"])


def explain_problem(problem: Problem) -> list[str]:
    """One broken rule: what it says, the difference, and the smallest chunking that shows it."""
    lines = [f"[{problem.rule}] {visible(problem.message)}"]
    if problem.expected is not None:
        lines += diff(problem.expected, problem.got)
    elif problem.got is not None:
        lines += ["  got", *(f"    {line}" for line in _pretty(_filled(problem.got)))]
    if problem.chunks is not None:
        chunks = " | ".join(quoted(chunk) for chunk in problem.chunks[:_MAX_CHUNKS])
        more = f" | … {len(problem.chunks) - _MAX_CHUNKS} more" if len(problem.chunks) > _MAX_CHUNKS else ""
        name = f" ({problem.chunking.name})" if problem.chunking is not None else ""
        lines.append(f"  smallest chunking that shows it{name}: {chunks}{more}")
    return lines


def diff(expected: Any, got: Any) -> list[str]:
    """Lines of a difference between two JSON values: `-` expected, `+` got.

    Empty fields are left out: absent, null and empty mean the same in an answer.
    """
    lines = ["  - expected", "  + got"]
    compared = difflib.ndiff(_pretty(_filled(expected)), _pretty(_filled(got)))
    lines += [f"    {line}" for line in compared if not line.startswith("?")]
    if len(lines) > _MAX_DIFF_LINES:
        lines = [*lines[:_MAX_DIFF_LINES], f"    … {len(lines) - _MAX_DIFF_LINES} more lines"]
    return lines


def quoted(text: str) -> str:
    """The text as one JSON string, with its markers readable."""
    return visible(json.dumps(text, ensure_ascii=False))


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item not in (None, "", [], ())}
    return value


def _pretty(value: Any) -> list[str]:
    return visible(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)).splitlines()


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
