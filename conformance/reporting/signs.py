"""Signs: one glyph and one word for each thing that can become of a planned result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from conformance.results import Result

Status = Literal[
    "pass",
    "fail",
    "xpass",
    "error",
    "timeout",
    "inconclusive",
    "xfail",
    "policy",
    "skip",
    "not-run",
]


@dataclass(frozen=True)
class Sign:
    """How a status looks and reads. Glyph and word always go together; colour only supports them."""

    status: Status
    glyph: str
    word: str
    meaning: str
    attention: bool = False
    """Someone should look at it: it makes a run's exit code other than 0."""


_ALL = (
    Sign("pass", "✓", "pass", "Every rule of the case held."),
    Sign("fail", "✗", "fail", "A rule was broken, and no recorded expectation says so.", attention=True),
    Sign(
        "xpass",
        "⊕",
        "unexpected pass",
        "A recorded expectation says that this case fails, yet it passed.",
        attention=True,
    ),
    Sign(
        "error",
        "!",
        "error",
        "The engine or its worker broke down before it could be judged.",
        attention=True,
    ),
    Sign("timeout", "◷", "timeout", "The target did not answer before the deadline.", attention=True),
    Sign("inconclusive", "?", "inconclusive", "The evidence decides neither way.", attention=True),
    Sign("xfail", "⊗", "expected failure", "A rule was broken, as a recorded expectation says."),
    Sign(
        "policy",
        "◇",
        "policy",
        "Engines disagree on the right answer; this one is reported, and broke no hard rule. "
        "The run file records the verdict as pass.",
    ),
    Sign("skip", "\u2013", "skip", "The target lacks what the case needs, or is exempt for a stated reason."),
    Sign("not-run", "○", "not run", "Planned, but the run holds no result for it."),
)
SIGNS: dict[Status, Sign] = {sign.status: sign for sign in _ALL}
"""All signs, in the order in which they are listed everywhere."""

if tuple(SIGNS) != get_args(Status):
    raise AssertionError("every status has one sign, in the order of `Status`")


def status_of(result: Result | None) -> Status:
    """Status of a planned result: its verdict, set apart where it is missing or contested."""
    if result is None:
        return "not-run"
    if result.verdict == "pass" and result.evidence.policy is not None:
        return "policy"
    return result.verdict
