"""The rule of a gate, on counts: the same code decides, plans and is simulated.

*Fail*: the lower limit of the drop is above the margin, or the test of "no worse" alarms and the drop exceeds
the floor. Else *pass*: the upper limit is below the margin. Else *inconclusive*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from conformance.gates import statistics
from conformance.gates.spec import PairedRule, Rule, UnpairedGate

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """What the rule says of each table; what neither passes nor fails is inconclusive."""

    passes: Flags
    fails: Flags
    alarms: Flags
    beyond: Flags
    """The lower limit is above the margin."""


def verdicts(rule: Rule, drop: ArrayLike, beyond: ArrayLike, within: ArrayLike, alarms: ArrayLike) -> Judged:
    """The rule itself.

    Args:
        rule: Its floor counts here.
        drop: As observed.
        beyond: The lower limit is above the margin.
        within: The upper limit is below the margin.
        alarms: The test of "no worse" alarms.
    """
    above, alarm = np.asarray(beyond, dtype=bool), np.asarray(alarms, dtype=bool)
    fails = above | (alarm & (np.asarray(drop) > rule.floor))
    return Judged(np.asarray(within, dtype=bool) & ~fails, fails, alarm, above)


def judge_pairs(rule: PairedRule, lost: ArrayLike, gained: ArrayLike, items: ArrayLike) -> Judged:
    """Judge tables of paired answers, whose items are independent."""
    b, c, n = (np.asarray(value, dtype=np.float64) for value in (lost, gained, items))
    # A limit is on one side of the margin exactly where the score statistic at the margin is beyond z.
    half, critical = statistics.HALF_AN_ITEM, stats.norm.isf(rule.final_alpha)
    beyond = statistics.tango_z(b, c, n, rule.margin, shift=-half) > critical
    within = statistics.tango_z(b, c, n, rule.margin, shift=half) < -critical
    alarms = statistics.mcnemar_p(b, c, mid=rule.mid_p) <= rule.final_alpha
    return verdicts(rule, (b - c) / n, beyond, within, alarms)


def judge_share(gate: UnpairedGate, right: ArrayLike, items: ArrayLike) -> Judged:
    """Judge shares of right answers against the published one."""
    k, n = (np.asarray(value, dtype=np.float64) for value in (right, items))
    return judge_shares(gate, gate.score * gate.of, gate.of, k, n)


def judge_shares(
    gate: Rule, reference_right: ArrayLike, reference_items: ArrayLike, right: ArrayLike, items: ArrayLike
) -> Judged:
    """Judge shares of right answers against those of a reference with items of its own."""
    counts = reference_right, reference_items, right, items
    k0, n0, k, n = (np.asarray(value, dtype=np.float64) for value in counts)
    low, high = statistics.shares_limits(k0, n0, k, n, gate.final_alpha)
    alarms = statistics.two_proportions_p(k0, n0, k, n) <= gate.final_alpha
    return verdicts(gate, k0 / n0 - k / n, low > gate.margin, high < gate.margin, alarms)
