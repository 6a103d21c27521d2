"""Every catalogue entry on layouts, speculation, caches and backends has a case and a fault, or a reason."""

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
NO_FAULT: dict[str, str] = COVERAGE["no_fault"]
CITED = {ref for case in load_suites([resources.suites_dir()]).cases for ref in case.case.source}
FAULTS = {ref for fault in registry().values() for ref in fault.source}


def test_nothing_else_is_cited() -> None:
    assert {ref for ref in CITED | FAULTS if re.fullmatch(r"[PSB]\d{2}", ref)} <= set(ENTRIES)
    assert len(ENTRIES) == len(set(ENTRIES))
    for reasons in (NO_CASE, NO_FAULT):
        assert set(reasons) <= set(ENTRIES)
        assert all(reason.strip() for reason in reasons.values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_a_case_or_a_reason(entry: str) -> None:
    """One of the two: a reason for what is there is out of date."""
    assert (entry in CITED) != (entry in NO_CASE)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_has_a_fault_or_a_reason(entry: str) -> None:
    assert (entry in FAULTS) != (entry in NO_FAULT)


def test_where_a_reason_names_a_test_there_is_one() -> None:
    folder = Path(__file__).parent
    for reason in (*NO_CASE.values(), *NO_FAULT.values()):
        for name in re.findall(r"tests/(\w+\.py)", reason):
            text = (folder / name).read_text(encoding="utf-8")
            for function in re.findall(r"\(`(\w+)`\)", reason):
                assert f"def {function}(" in text, (name, function)
