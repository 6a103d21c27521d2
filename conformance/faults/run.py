"""Which cases notice which fault: run the quick suites with each fault switched on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from conformance.errors import ConformanceError
from conformance.expectations import Expectations
from conformance.faults.base import Fault
from conformance.loading import LoadedCase, LoadedSuites
from conformance.results import Result, Verdict
from conformance.runner import TargetPool, run_case

REFERENCE = "reference"
REQUEST_SECONDS = 5.0
_ALARMS: tuple[Verdict, ...] = ("fail", "error", "timeout", "xpass")


class Catch(BaseModel):
    """One case that noticed a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: str
    """`suite-id::case-id`."""
    kind: str
    area: str
    verdict: Verdict
    rules: tuple[str, ...]
    module: str = ""
    """First module that differs from the oracle's; for parity cases."""


class Detection(BaseModel):
    """What the suites made of one fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fault: str
    title: str
    source: tuple[str, ...]
    area: str
    module: str
    detected: bool
    """Some case failed by a rule; a crash or a timeout alone does not count, unless the fault is one."""
    localised: bool
    """Some case of the fault's own area was among them, and a parity case named a module that the fault
    is allowed to show in first."""
    by_source: bool
    """Some case that cites one of the fault's catalogue ids was among them."""
    caught_by: tuple[Catch, ...]
    cases: int
    """How many cases ran."""


class BaselineError(ConformanceError):
    """The reference does not pass without any fault, so a failing case would prove nothing."""


def detect(
    faults: Sequence[Fault],
    suites: LoadedSuites,
    expectations: Expectations,
    *,
    pool: TargetPool | None = None,
    clean: set[str] | None = None,
    progress: Callable[[Fault, Detection], None] | None = None,
) -> list[Detection]:
    """Run every case of the fault's kind against the reference with the fault on.

    Streams are sampled here, not certified: a fault that only one chunking in a million shows is
    looked for by the ordinary run.

    Args:
        faults: Switched on one at a time.
        suites: Cases of other kinds than the faults' are left out.
        expectations: Of the suites.
        pool: Open targets and what oracles have answered; of this call alone if left out.
        clean: Digests of cases known to pass with no fault switched on, which need not show it again; those
            that do are added.
        progress: Called after each fault.

    Raises:
        BaselineError: With no fault switched on a case fails, or cannot run at all.
    """
    if pool is None:
        with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as own:
            return detect(faults, suites, expectations, pool=own, clean=clean, progress=progress)
    clean = set() if clean is None else clean
    kinds = {fault.kind for fault in faults}
    cases = [case for case in suites.cases if case.suite.suite.kind in kinds]
    fresh = [case for case in cases if case.digest not in clean]
    for case in fresh:
        _must_pass(case, run_case(case, REFERENCE, pool, expectations, search="none"))
    clean.update(case.digest for case in fresh)
    found = []
    for fault in faults:
        own_cases = [case for case in cases if case.suite.suite.kind == fault.kind]
        pool.oracles.forget()
        with fault.applied():
            caught = failures(own_cases, expectations, pool)
        pool.oracles.forget()
        found.append(_detection(fault, caught, own_cases))
        if progress is not None:
            progress(fault, found[-1])
    return found


def _must_pass(case: LoadedCase, result: Result) -> None:
    """Refuse a case that says nothing about faults."""
    if result.verdict in _ALARMS:
        raise BaselineError(
            f"the reference fails {case.address} with no fault switched on; run "
            f"`conformance run {case.address}` and mend that first"
        )
    if result.verdict == "skip":
        raise BaselineError(
            f"{case.address} cannot run here and would notice no fault: {result.reason}; "
            f"or name faults of another kind than {case.suite.suite.kind}"
        )


def failures(cases: Sequence[LoadedCase], expectations: Expectations, pool: TargetPool) -> list[Catch]:
    """The cases that the reference does not pass as it is now."""
    caught = []
    for loaded in cases:
        result = run_case(loaded, REFERENCE, pool, expectations, search="none")
        if result.verdict in _ALARMS:
            rules = tuple(dict.fromkeys(p.rule for p in result.problems))
            caught.append(
                Catch(
                    case=loaded.address,
                    kind=result.kind,
                    area=result.area,
                    verdict=result.verdict,
                    rules=rules,
                    module=_first_module(result),
                )
            )
    return caught


def _first_module(result: Result) -> str:
    parity = result.evidence.parity
    return parity.first.module if parity is not None and parity.first is not None else ""


def notices(catch: Catch) -> bool:
    """Whether a case that did not pass has noticed a fault.

    An exception says that something is broken, not what: the case must have judged an answer.
    """
    return catch.verdict == "fail" and bool(set(catch.rules) - {"raised"})


def _detection(fault: Fault, caught: list[Catch], cases: Sequence[LoadedCase]) -> Detection:
    judged = [c for c in caught if notices(c)]
    sources = {case.address: set(case.case.source) for case in cases}
    return Detection(
        fault=fault.id,
        title=fault.title,
        source=fault.source,
        area=fault.area,
        module=fault.module,
        detected=bool(judged),
        localised=any(c.area == fault.area and re.fullmatch(fault.where, c.module) for c in judged),
        by_source=any(sources[c.case] & set(fault.source) for c in judged),
        caught_by=tuple(caught),
        cases=len(cases),
    )
