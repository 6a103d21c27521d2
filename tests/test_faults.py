"""Every fault is noticed by cases that cite where it was seen, and by none when it is off."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from conformance import expectations
from conformance.cli import invoke
from conformance.commands import faults as commands
from conformance.errors import UsageError
from conformance.expectations import Expectations
from conformance.faults import ranks, registry, select
from conformance.faults.base import Fault
from conformance.faults.run import REQUEST_SECONDS, BaselineError, Detection, detect
from conformance.loading import LoadedCase, LoadedSuite, LoadedSuites, load_suites
from conformance.runner import TargetPool
from conformance.targets import registry as targets
from model_impl.parallel import group
from model_impl.parallel.messages import Preparation

FAULTS = list(registry().values())


@pytest.fixture(scope="module")
def suites() -> LoadedSuites:
    return load_suites()


@pytest.fixture(scope="module")
def known(suites: LoadedSuites) -> Expectations:
    return expectations.load(suites)


@pytest.fixture(scope="module")
def clean(suites: LoadedSuites) -> set[str]:
    """Cases that pass with no fault switched on: all, as running the suites themselves shows."""
    return {case.digest for case in suites.cases}


@pytest.fixture(scope="module")
def pool() -> Iterator[TargetPool]:
    with contextlib.closing(TargetPool(timeout=REQUEST_SECONDS)) as opened:
        yield opened


def citing(suites: LoadedSuites, fault: Fault) -> Iterator[LoadedSuites]:
    """The cases of the fault's area with one of its sources, one by one, those that take long last.

    `conformance faults measure` asks all quick cases there are.
    """
    own = [suite for suite in suites if suite.suite.kind == fault.kind and suite.suite.area == fault.area]
    cases = [case for suite in own for case in suite.cases if set(case.case.source) & set(fault.source)]
    for case in sorted(cases, key=lambda case: "slow" in case.case.tags):
        yield LoadedSuites((alone(case),))


def alone(case: LoadedCase) -> LoadedSuite:
    """A suite with nothing but one of its cases."""
    place = case.suite.suite.cases.index(case.case)
    kept = case.suite.suite.model_copy(update={"cases": (case.case,)})
    return replace(case.suite, suite=kept, lines=case.suite.lines[place : place + 1])


def test_there_are_enough_of_both_kinds() -> None:
    kinds = [fault.kind for fault in FAULTS]
    assert len(FAULTS) >= 15
    assert kinds.count("parser") >= 10
    assert kinds.count("template") >= 5
    assert kinds.count("parity") >= 60
    assert kinds.count("mask") >= 10
    assert kinds.count("processor") >= 20
    assert kinds.count("invariance") >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_case_that_cites_the_source_notices_the_fault(
    fault: Fault, suites: LoadedSuites, known: Expectations, pool: TargetPool, clean: set[str]
) -> None:
    asked = []
    for case in citing(suites, fault):
        (detection,) = detect([fault], case, known, pool=pool, clean=clean)
        if detection.detected and detection.localised and detection.by_source:
            return
        asked.append(detection)
    pytest.fail(f"no case notices it and where it is: {asked}")


def test_every_patch_is_gone_afterwards() -> None:
    before = members()
    for fault in FAULTS:
        with fault.applied():
            assert members() != before, f"{fault.id} patches nothing"
        assert members() == before, f"{fault.id} leaves something behind"


def members() -> dict[tuple[str, ...], int]:
    """What every name in the modules and classes of both packages stands for, by identity."""
    found: dict[tuple[str, ...], int] = {}
    for module_name, module in sys.modules.items():
        if module_name.partition(".")[0] not in ("model_impl", "conformance"):
            continue
        for name, value in vars(module).items():
            found[module_name, name] = id(value)
            if isinstance(value, type) and value.__module__ == module_name:
                found |= {(module_name, name, member): id(held) for member, held in vars(value).items()}
    return found


def test_faults_of_layouts_are_on_in_processes_started_meanwhile() -> None:
    there = [fault for fault in FAULTS if fault.in_ranks]
    assert {fault.id for fault in there} == {fault.id for fault in ranks.faults.faults}
    for fault in there:
        with fault.applied():
            expected = Preparation("conformance.faults.ranks", "switch_on", fault.id)
            assert expected == group.PREPARATION
        assert group.PREPARATION is None
    with pytest.raises(LookupError, match="label-kept"):
        ranks.switch_on("label-kept")


def test_a_case_passes_cleanly_once_for_all_faults(
    suites: LoadedSuites, known: Expectations, pool: TargetPool
) -> None:
    fault = registry()["label-kept"]
    chosen = next(citing(suites, fault))
    clean: set[str] = set()
    first = detect([fault], chosen, known, pool=pool, clean=clean)
    assert clean == {case.digest for case in chosen.cases}
    with fault.applied():
        again = detect([fault], chosen, known, pool=pool, clean=clean)
    assert again == first


def test_a_reference_that_fails_by_itself_proves_nothing(suites: LoadedSuites, known: Expectations) -> None:
    fault = registry()["label-kept"]
    with fault.applied(), pytest.raises(BaselineError, match="with no fault switched on"):
        detect([fault], next(citing(suites, fault)), known)


def test_a_case_that_cannot_run_proves_nothing(
    suites: LoadedSuites, known: Expectations, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = registry()["no-soft-cap"]
    monkeypatch.setattr(targets, "unavailable", lambda spec: f"{spec} is not installed")
    with pytest.raises(BaselineError, match=r"cannot run here .* transformers@.* is not installed"):
        detect([fault], next(citing(suites, fault)), known)


def test_an_unknown_fault_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no-such-fault"):
        select(["no-such-fault"])


@pytest.mark.parametrize(
    ("detected", "localised", "code", "says"),
    [
        (True, True, 0, "noticed by"),
        (True, False, 1, "NOTICED ELSEWHERE"),
        (False, False, 1, "NOT NOTICED"),
    ],
)
def test_the_command_wants_a_fault_noticed_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    detected: bool,
    localised: bool,
    code: int,
    says: str,
) -> None:
    fault = registry()["label-kept"]
    found = Detection(
        fault=fault.id, title=fault.title, source=fault.source, area=fault.area, module=fault.module,
        detected=detected, localised=localised, by_source=True, caught_by=(), cases=1,
    )  # fmt: skip

    def judged(
        faults: list[Fault], *_: object, progress: Callable[[Fault, Detection], None]
    ) -> list[Detection]:
        progress(faults[0], found)
        return [found]

    monkeypatch.setattr(commands, "detect", judged)
    assert invoke(["faults", "run", fault.id]) == code
    assert says in capsys.readouterr().err
