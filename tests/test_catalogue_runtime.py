"""Every catalogue entry on layouts, speculation, caches and backends has a case, or a reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from conformance import resources
from conformance.faults import registry
from conformance.loading import load_suites

COVERAGE = tomllib.loads(Path(__file__).with_name("catalogue_coverage.toml").read_text(encoding="utf-8"))[
    "runtime"
]
ENTRIES: list[str] = COVERAGE["entries"]
NO_CASE: dict[str, str] = COVERAGE["no_case"]
CITED = {ref for case in load_suites([resources.suites_dir()]).cases for ref in case.case.source}


def test_nothing_else_is_cited() -> None:
    faults = {ref for fault in registry().values() for ref in fault.source}
    assert {ref for ref in CITED | faults if re.fullmatch(r"[PSB]\d{2}", ref)} <= set(ENTRIES)
    assert len(ENTRIES) == len(set(ENTRIES))
    assert set(NO_CASE) <= set(ENTRIES)
    assert all(reason.strip() for reason in NO_CASE.values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_a_case_or_a_reason(entry: str) -> None:
    assert (entry in CITED) != (entry in NO_CASE)
