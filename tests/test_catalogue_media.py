"""Every catalogue entry on images, videos and sounds has a case and a fault that it catches, or a reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from conformance import resources
from conformance.faults import registry
from conformance.loading import load_suites

COVERAGE = tomllib.loads(Path(__file__).with_name("catalogue_coverage.toml").read_text(encoding="utf-8"))[
    "media"
]
ENTRIES: list[str] = COVERAGE["entries"]
CITED = {ref for case in load_suites([resources.suites_dir()]).cases for ref in case.case.source}
FAULTS = {ref for fault in registry().values() for ref in fault.source}


def test_nothing_else_is_cited() -> None:
    assert {ref for ref in CITED | FAULTS if re.fullmatch(r"M\d{2}", ref)} <= set(ENTRIES)
    for reasons in (COVERAGE["no_case"], COVERAGE["no_fault"]):
        assert set(reasons) <= set(ENTRIES)
        assert all(reason.strip() for reason in reasons.values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_a_case_or_a_reason(entry: str) -> None:
    assert (entry in CITED) != (entry in COVERAGE["no_case"])


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_a_fault_or_a_reason(entry: str) -> None:
    assert (entry in FAULTS) != (entry in COVERAGE["no_fault"])
