"""What a gate can detect: the chances of its verdicts, the items that it needs, the least drop it finds.

Chances are exact: the probabilities of all tables that can come about (but for a part below 1e-12) are added
up under the rule itself. Connor's formula (1987) only says where the search for the number of items begins,
because it is an approximation that is too small where few items are discordant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from conformance.errors import ConformanceError
from conformance.gates import rule as rules
from conformance.gates import statistics
from conformance.gates.spec import PairedRule, Rule, UnpairedGate

_TAIL = 1e-13
_MOST_ITEMS = 1_000_000
_STEP = 1e-4
"""Drops and margins are given to a hundredth of a point."""


class GateError(ConformanceError):
    """A gate that cannot do what it declares."""


@dataclass(frozen=True)
class Chances:
    """Of each verdict, at one true drop."""

    passes: float
    fails: float
    alarms: float

    @property
    def inconclusive(self) -> float:
        """What is left."""
        return max(0.0, 1.0 - self.passes - self.fails)


@dataclass(frozen=True)
class Plan:
    """What a gate with so many items can do."""

    items: int
    needed: int | None
    """Items with which it reaches its margin; None: more than a million."""
    detectable: float
    """The least drop that it fails with its power: the minimum detectable effect."""
    certifiable: float
    """The least margin that a target without any drop passes with that power."""
    at_margin: Chances
    """Where the true drop is the margin."""
    at_zero: Chances
    """Where there is none."""

    def reaches(self, rule: Rule) -> bool:
        """Whether the power is there for both questions."""
        return self.at_margin.fails >= rule.power and self.at_zero.passes >= rule.power


def chances(rule: Rule, drop: float, *, items: int | None = None, margin: float | None = None) -> Chances:
    """Chances of the verdicts of a gate.

    Args:
        rule: A paired or an unpaired one.
        drop: True drop.
        items: Instead of the rule's own number.
        margin: Instead of the rule's own.
    """
    changed = rule.model_copy(update={} if margin is None else {"margin": margin})
    effective = max(1, math.floor((items or rule.items) / _widening(rule)))
    if isinstance(changed, PairedRule):
        return _paired(changed, drop, effective)
    if isinstance(changed, UnpairedGate):
        return _unpaired(changed, drop, effective)
    raise TypeError(f"{type(rule).__name__} is neither a paired nor an unpaired gate")


def _widening(rule: Rule) -> float:
    """How many times more items it takes than if they were independent.

    Clusters widen the variance by the design effect, and their limits stand on t instead of the normal
    distribution: so many times as wide, squared.
    """
    if not isinstance(rule, PairedRule) or not isinstance(rule.clusters, int):
        return rule.design_effect
    alpha = rule.final_alpha
    reach = stats.t.isf(alpha, rule.clusters - 1) / stats.norm.isf(alpha)
    return float(rule.design_effect * reach**2)


def make_plan(rule: Rule) -> Plan:
    """Work out what a gate can do."""
    return Plan(
        items=rule.items,
        needed=items_needed(rule),
        detectable=detectable_drop(rule),
        certifiable=certifiable_margin(rule),
        at_margin=chances(rule, rule.margin),
        at_zero=chances(rule, 0.0),
    )


def check(rule: Rule) -> None:
    """Refuse a gate whose items cannot reach its margin.

    Raises:
        GateError: names what the items can do, and how many it takes.
    """
    at_margin, at_zero = chances(rule, rule.margin), chances(rule, 0.0)
    if at_margin.fails >= rule.power and at_zero.passes >= rule.power:
        return
    needed = items_needed(rule)
    raise GateError(
        f"{rule.items} items cannot certify a margin of {points(rule.margin)} at alpha {rule.alpha:g} and "
        f"power {rule.power:g}: a drop of the margin fails with probability {at_margin.fails:.2f}, and no "
        f"drop passes with {at_zero.passes:.2f}. The least drop that fails with that power (MDE) is "
        f"{points(detectable_drop(rule))}, the least margin that no drop passes is "
        f"{points(certifiable_margin(rule))}. Ask {'more than a million' if needed is None else needed} "
        "items, or widen the margin"
    )


def items_needed(rule: Rule) -> int | None:
    """The least number of items with which a gate reaches its margin; None where it takes over a million.

    Chances rise with the items, but not at each step, because counts are whole: a few items more may fall
    short of the power again by a little.
    """

    def reaches(items: int) -> bool:
        return (
            chances(rule, rule.margin, items=items).fails >= rule.power
            and chances(rule, 0.0, items=items).passes >= rule.power
        )

    high = max(8, approximate_items(rule))
    while not reaches(high):
        high *= 2
        if high > _MOST_ITEMS:
            return None
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def approximate_items(rule: Rule) -> int:
    """Connor's number for a paired gate, and the usual one of two shares for an unpaired gate."""
    z_alpha, z_power = stats.norm.isf(rule.final_alpha), stats.norm.ppf(rule.power)
    delta = rule.margin
    if isinstance(rule, PairedRule):
        share = min(rule.discordance + delta, 1.0)
        root = z_alpha * math.sqrt(share) + z_power * math.sqrt(share - delta**2)
        return math.ceil(float(_widening(rule) * (root / delta) ** 2))
    if isinstance(rule, UnpairedGate):
        variance = rule.score * (1 - rule.score)
        widened = rule.design_effect * variance
        room = (delta / (z_alpha + z_power)) ** 2 - widened / rule.of
        return _MOST_ITEMS if room <= 0 else min(_MOST_ITEMS, math.ceil(widened / room))
    raise TypeError(f"{type(rule).__name__} is neither a paired nor an unpaired gate")


def detectable_drop(rule: Rule) -> float:
    """The least true drop that fails with the rule's power; 1 where none does."""
    top = rule.score if isinstance(rule, UnpairedGate) else 1.0
    return _least(lambda drop: chances(rule, drop).fails >= rule.power, rule.floor, top)


def certifiable_margin(rule: Rule) -> float:
    """The least margin that a target without any drop passes with the rule's power; 1 where none does."""
    return _least(lambda margin: chances(rule, 0.0, margin=margin).passes >= rule.power, rule.floor, 1.0)


def points(share: float) -> str:
    """A share in points: `1.25 points`."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + (
        " point" if round(100 * share, 2) == 1 else " points"
    )


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least value, in steps, from which a condition holds that holds at the top, or else 1."""
    first, last = math.floor(low / _STEP) + 1, math.floor(high / _STEP)
    if not holds(last * _STEP):
        return 1.0
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if holds(middle * _STEP) else (middle + 1, last)
    return last * _STEP


def _paired(rule: PairedRule, drop: float, items: int) -> Chances:
    p_gained = rule.discordance / 2
    p_lost = min(p_gained + drop, 1 - p_gained)  # a drop comes on top of the noise
    lost = _likely(items, p_lost)[:, None]
    gained = _likely(items, p_gained)[None, :]
    weights = np.exp(statistics.log_trinomial(lost, gained, items, p_lost, p_gained))
    possible = np.minimum(gained, items - lost)  # what cannot be has no weight
    return _sum(rules.judge_pairs(rule, lost, possible, items), weights)


def _unpaired(gate: UnpairedGate, drop: float, items: int) -> Chances:
    """The published figure is one draw of its own: its true score is taken to be what was published."""
    of = max(1, math.floor(gate.of / gate.design_effect))
    right = _likely(items, gate.score - drop)[:, None]
    published = _likely(of, gate.score)[None, :]
    weights = np.exp(
        statistics.log_binomial(right, items, gate.score - drop)
        + statistics.log_binomial(published, of, gate.score)
    )
    return _sum(rules.judge_shares(gate, published, of, right, items), weights)


def _likely(items: int, share: float) -> NDArray[np.int64]:
    """Counts that are not all but impossible."""
    share = min(max(share, 0.0), 1.0)
    low, high = stats.binom.ppf(_TAIL, items, share), stats.binom.isf(_TAIL, items, share)
    return np.arange(max(0, int(low)), min(items, int(high)) + 1)


def _sum(judged: rules.Judged, weights: NDArray[np.float64]) -> Chances:
    return Chances(
        passes=float(np.sum(weights * judged.passes)),
        fails=float(np.sum(weights * judged.fails)),
        alarms=float(np.sum(weights * judged.alarms)),
    )
