"""Every catalogue entry that can be put as text has a case and a negative control, or a reason."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from conformance import resources
from conformance.loading import LoadedCase, load_suites
from conformance.suites import ParserSuite, TemplateSuite

COVERAGE: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("catalogue_coverage.toml").read_text(encoding="utf-8")
)
ENTRIES: list[str] = [entry for group in COVERAGE["entries"].values() for entry in group]
NOT_TEXT: dict[str, str] = COVERAGE["not_text"]
NO_CONTROL: dict[str, str] = COVERAGE["no_control"]
CASES = [
    case
    for suite in load_suites([resources.suites_dir()])
    if isinstance(suite.suite, (ParserSuite, TemplateSuite))
    for case in suite.cases
]
PARSER_INPUT = {"output", "prompt", "thinking", "tools", "tool_choice"}
TEMPLATE_INPUT = {"messages", "tools", "thinking", "preserve_thinking", "add_generation_prompt", "families"}


@cache
def citing() -> dict[str, list[LoadedCase]]:
    """The cases that name each entry as their source."""
    cases: dict[str, list[LoadedCase]] = defaultdict(list)
    for case in CASES:
        for source in case.case.source:
            if re.fullmatch(r"[RTC]\d{2}", source):
                cases[source].append(case)
    return cases


def pairs() -> Iterator[tuple[LoadedCase, LoadedCase]]:
    """Every negative control with the case that it controls."""
    by_id = {(case.suite.suite.id, case.case.id): case for case in CASES}
    for case in CASES:
        if case.case.control_of is not None:
            yield case, by_id[case.suite.suite.id, case.case.control_of]


@cache
def controlled() -> frozenset[str]:
    """Addresses of the cases that have or are a negative control."""
    return frozenset(case.address for pair in pairs() for case in pair)


def test_the_lists_fit_together() -> None:
    assert len(ENTRIES) == len(set(ENTRIES)), "an entry is listed twice"
    for reasons in (NOT_TEXT, NO_CONTROL):
        assert set(reasons) <= set(ENTRIES), "a reason for an entry that is not listed"
        assert all(reason.strip() for reason in reasons.values()), "an empty reason"


def test_no_case_cites_an_unknown_entry() -> None:
    assert {
        entry: [c.address for c in cases] for entry, cases in citing().items() if entry not in ENTRIES
    } == {}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_a_case_or_a_reason(entry: str) -> None:
    cases = [case.address for case in citing()[entry]]
    if entry in NOT_TEXT:
        assert not cases, "it has cases, so it can be put as text: take its reason away"
    else:
        assert cases, "write a case that cites it, or a reason in tests/catalogue_coverage.toml"


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in NOT_TEXT])
def test_an_entry_has_a_negative_control_or_a_reason(entry: str) -> None:
    tied = controlled().intersection(case.address for case in citing()[entry])
    if entry in NO_CONTROL:
        assert not tied, "it has a control: take its reason away"
    else:
        assert tied, "no case that cites it has a negative control (`control_of`) or is one"


@pytest.mark.parametrize(("control", "case"), [pytest.param(*pair, id=pair[0].address) for pair in pairs()])
def test_a_control_is_another_input(control: LoadedCase, case: LoadedCase) -> None:
    fields = PARSER_INPUT | TEMPLATE_INPUT
    assert control.case.model_dump(include=fields) != case.case.model_dump(include=fields)
