"""Every fault is noticed by cases that cite where it was seen, and by none when it is off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from conformance import expectations
from conformance.errors import UsageError
from conformance.faults import registry, select
from conformance.faults.base import Fault
from conformance.faults.run import REQUEST_SECONDS, BaselineError, detect
from conformance.loading import LoadedSuite, LoadedSuites, load_suites
from conformance.runner import TargetPool

FAULTS = list(registry().values())


@pytest.fixture(scope="module")
def suites() -> LoadedSuites:
    return load_suites()


@pytest.fixture(scope="module")
def pool() -> Iterator[TargetPool]:
    with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as opened:
        yield opened


def citing(suites: LoadedSuites, fault: Fault) -> LoadedSuites:
    """The suites of the fault's area that hold a case with one of its sources: enough, and quick."""
    chosen = tuple(
        suite
        for suite in suites
        if suite.suite.kind == fault.kind
        and suite.suite.area == fault.area
        and any(set(case.source) & set(fault.source) for case in suite.suite.cases)
    )
    if fault.kind == "parity":
        chosen = tuple(few_cases(suite, fault) for suite in chosen)
    return LoadedSuites(chosen)


def few_cases(suite: LoadedSuite, fault: Fault) -> LoadedSuite:
    """A parity suite with two of the cases that cite the fault; each of them runs a model."""
    cases = [
        (c, line)
        for c, line in zip(suite.suite.cases, suite.lines, strict=True)
        if set(c.source) & set(fault.source)
    ]
    kept, lines = zip(*cases[:2], strict=True)
    return replace(suite, suite=suite.suite.model_copy(update={"cases": kept}), lines=lines)


def test_there_are_enough_of_both_kinds() -> None:
    kinds = [fault.kind for fault in FAULTS]
    assert len(FAULTS) >= 15
    assert kinds.count("parser") >= 10
    assert kinds.count("template") >= 5
    assert kinds.count("parity") >= 20


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_case_that_cites_the_source_notices_the_fault(
    fault: Fault, suites: LoadedSuites, pool: TargetPool
) -> None:
    chosen = citing(suites, fault)
    (detection,) = detect([fault], chosen, expectations.load(suites), pool=pool)
    assert detection.detected
    assert detection.localised
    assert detection.by_source, f"only {[c.case for c in detection.caught_by]} noticed it"


def test_the_patch_is_gone_afterwards(suites: LoadedSuites) -> None:
    fault = registry()["label-kept"]
    chosen = citing(suites, fault)
    known = expectations.load(suites)
    first = detect([fault], chosen, known)
    assert detect([fault], chosen, known) == first


def test_a_reference_that_fails_by_itself_proves_nothing(suites: LoadedSuites) -> None:
    fault = registry()["label-kept"]
    with fault.applied(), pytest.raises(BaselineError, match="with no fault switched on"):
        detect([fault], citing(suites, fault), expectations.load(suites))


def test_an_unknown_fault_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no-such-fault"):
        select(["no-such-fault"])
