"""What is measured of rounding in bfloat16, and that the limits of parity leave room for it."""

from __future__ import annotations

import math

from bench import rounding
from bench.rounding import Apart
from conformance.checks import parity
from conformance.loading import load_suites

ORACLE = "transformers@5.19.0"


def test_one_module_beyond_a_limit_is_enough() -> None:
    fine, norm, largest = Apart(1.9, 1.9, 2.0), Apart(2.1, 1.0, 2.0), Apart(1.0, 2.1, 2.0)
    assert not rounding.beyond([fine, fine], extremes=1.0)
    assert rounding.beyond([fine, norm], extremes=2.0)
    assert rounding.beyond([fine, largest], extremes=1.0)
    assert not rounding.beyond([fine, largest], extremes=2.0)


def test_ratios_and_quantiles() -> None:
    assert rounding.ratio(3.0, 2.0) == 1.5
    assert rounding.ratio(0.0, 0.0) == 1.0
    assert rounding.ratio(1e-9, 0.0) == math.inf
    assert rounding.quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert rounding.quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_the_table_counts_passes() -> None:
    one, other = [Apart(1.0, 3.0, 2.0), Apart(1.0, 1.0, 2.0)], [Apart(1.0, 5.0, 2.0)]
    lines = list(rounding.table([{"a": one}, {"a": other}]))
    assert lines[0] == "2 passes, 3 modules"
    assert lines[2].split() == ["a", "1.00", "1.00", "1.00", "5.00", "5.00", "5.00", "2", "1"]


def test_right_implementations_are_within_the_limits() -> None:
    """Draws that no case has: the oracle's other backend and ours, judged as the check judges."""
    cases = [
        case
        for case in load_suites().cases
        if case.address in ("parity/e2b-like::whole", "parity/e2b-like::ragged")
    ]
    found = list(rounding.passes(cases, draws=2))
    assert len(found) == 4
    for one in found:
        for who, modules in one.items():
            assert not rounding.beyond(modules, parity.EXTREMES), who
        assert any(at.largest > 1.0 for at in one[rounding.ORACLES_OTHER]), "it rounds otherwise"
