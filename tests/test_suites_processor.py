"""The processor suites: counts are the fact sheet's, and public faults fail the cases about them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from conformance import resources
from conformance.checks import judge
from conformance.loading import LoadedCase, load_suites
from conformance.media import ImagePiece, SoundPiece, VideoPiece
from conformance.oracles import Oracles
from conformance.suites import ProcessorCase, ProcessorSuite
from tests.faulty_processing import FAULTS, Fault
from tests.lying_processors import REFERENCE, Patched
from tests.processor_sheet import image_tokens, soft_tokens

torch.set_num_threads(1)

CASES: dict[str, LoadedCase] = {
    case.address: case
    for suite in load_suites([resources.suites_dir()])
    if isinstance(suite.suite, ProcessorSuite)
    for case in suite.cases
}
BUDGETS = (70, 140, 280, 560, 1120)
MANY = 6
"""A case with more soft-token counts than that need not write them out."""


def case_of(address: str) -> ProcessorCase:
    case = CASES[address].case
    assert isinstance(case, ProcessorCase)
    return case


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("address", [address for address in CASES if not case_of(address).refused])
def test_counts_are_those_of_the_fact_sheet(address: str) -> None:
    case = case_of(address)
    expected = soft_tokens(case)
    if case.soft_tokens is None:
        assert len(expected) > MANY, "write its counts down"
        assert all(isinstance(piece, VideoPiece) for piece in case.pieces)
    else:
        assert case.soft_tokens == expected


def test_the_formula_gives_known_counts() -> None:
    assert image_tokens(512, 512, 280) == 256  # catalogue M12
    assert image_tokens(20_000, 1, 70) == 70
    with pytest.raises(ZeroDivisionError):
        image_tokens(0, 1, 70)


def test_every_budget_has_the_table_of_shapes() -> None:
    shapes: dict[int, set[tuple[int, int]]] = {budget: set() for budget in BUDGETS}
    for address in CASES:
        if address.startswith("processor/image-sizes::"):
            case = case_of(address)
            shapes[case.image_budget].update(
                (piece.image.width, piece.image.height)
                for piece in case.pieces
                if isinstance(piece, ImagePiece)
            )
    table = set.intersection(*shapes.values())
    assert len(table) >= 12
    asked = {(1, 1), (48, 48), (512, 512), (1920, 1080), (3, 900), (1, 1000), (20_000, 1), (20_000, 100)}
    assert asked <= table
    assert sum(max(size) > 10 * min(size) for size in table) >= 6


def test_lengths_of_the_fact_sheet_are_there() -> None:
    lengths = {
        piece.audio.samples
        for address in CASES
        for piece in case_of(address).pieces
        if isinstance(piece, SoundPiece)
    }
    assert {0, 1, 160, 161, 321, 479_999, 480_000, 480_001} <= lengths


# ------------------------------------------------------------------------------------------------ faults


@functools.cache
def honest(address: str) -> str:
    return verdict_of(address, Patched())[0]


def verdict_of(address: str, target: Any) -> tuple[str, list[str]]:
    case = CASES[address]
    oracles = Oracles(lambda spec: REFERENCE)
    oracles.unavailable = lambda spec, part="": ""  # type: ignore[method-assign,assignment]
    try:
        outcome = judge(case.case, case.suite.suite, target, oracles=oracles)
    finally:
        oracles.close()
    return outcome.verdict, [problem.rule for problem in outcome.problems]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.what}-{fault.case}")
def test_a_fault_fails_the_case_that_is_about_it(fault: Fault) -> None:
    address = f"processor/{fault.case}"
    verdict, rules = verdict_of(address, fault.target)
    assert verdict == "fail"
    assert fault.rule in rules
    assert honest(address) == "pass"


def test_every_suite_has_a_fault() -> None:
    suites = {address.partition("::")[0].removeprefix("processor/") for address in CASES}
    assert suites == {fault.case.partition("::")[0] for fault in FAULTS}
