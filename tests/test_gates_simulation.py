"""What gates promise, in 2 000 seeded runs each; and lying gates, which break the same promises.

A promise of "at most alpha" is broken where the lower 99 % Clopper-Pearson limit of the share is above alpha.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from conformance.gates import rule as rules
from conformance.gates import statistics
from conformance.gates.decide import decide
from conformance.gates.planning import chances
from conformance.gates.sequential import SequentialTest
from conformance.gates.spec import PairedRule
from conformance.scoring import Sheet
from tests.gate_sheets import paired, sheet

RUNS = 2000
ITEMS = 1319
ALPHA = 0.05
NOISE = (0.035, 0.06)
"""Shares of items that are discordant where there is no drop."""

Counts = NDArray[np.int64]
Judge = Callable[[PairedRule, Counts, Counts, int], rules.Judged]


def runs(drop: float, discordance: float, *, items: int = ITEMS, seed: int = 0) -> tuple[Counts, Counts]:
    """Lost and gained items of each run."""
    rng = np.random.default_rng([seed, round(drop * 1e6), round(discordance * 1e6), items])
    half = discordance / 2
    drawn = rng.multinomial(items, [half + drop, half, 1 - discordance - drop], size=RUNS)
    return drawn[:, 0], drawn[:, 1]


def exceeds(count: int, alpha: float = ALPHA) -> bool:
    """Whether so many of the runs are surely more than alpha allows."""
    lower = stats.binomtest(int(count), RUNS).proportion_ci(0.99, method="exact").low
    return bool(lower > alpha)


def broken_promises(judge: Judge, gate: PairedRule) -> list[str]:
    """Which promises a way of judging breaks."""
    broken = []
    for noise in NOISE:
        nothing = judge(gate, *runs(0.0, noise), ITEMS)
        if exceeds(int(nothing.alarms.sum())) or exceeds(int(nothing.fails.sum())):
            broken.append(f"false alarms at {noise}")
        as_bad = judge(gate, *runs(gate.margin, noise), ITEMS)
        if exceeds(int(as_bad.passes.sum())):
            broken.append(f"passes at the margin at {noise}")
        least = 0.90 if noise == 0.035 else 0.77
        if as_bad.alarms.mean() < least or as_bad.fails.mean() < least:
            broken.append(f"power at {noise}")
    return broken


@pytest.mark.parametrize("mid_p", [False, True])
def test_a_gate_keeps_its_promises(mid_p: bool) -> None:
    """Alarms at no drop, passes at a drop of the margin, and power for 2 points with 1 319 items."""
    assert broken_promises(rules.judge_pairs, paired(items=ITEMS, margin=0.02, mid_p=mid_p)) == []


@pytest.mark.parametrize("margin", [0.01, 0.03])
@pytest.mark.parametrize("items", [300, 500])
@pytest.mark.parametrize("discordance", [0.0, 0.004, 0.02, 0.1])
def test_smaller_gates_keep_their_promises(items: int, margin: float, discordance: float) -> None:
    gate = paired(items=items, margin=margin)
    nothing = rules.judge_pairs(gate, *runs(0.0, discordance, items=items), items)
    assert not exceeds(int(nothing.alarms.sum()))
    as_bad = rules.judge_pairs(gate, *runs(margin, discordance, items=items), items)
    assert not exceeds(int(as_bad.passes.sum()))


def test_planned_chances_are_those_of_the_runs() -> None:
    for noise in NOISE:
        for drop in (0.0, 0.01, 0.02):
            gate = paired(items=ITEMS, discordance=noise)
            judged = rules.judge_pairs(gate, *runs(drop, noise, seed=1), ITEMS)
            planned = chances(gate, drop)
            for seen, expected in [
                (judged.passes, planned.passes),
                (judged.fails, planned.fails),
                (judged.alarms, planned.alarms),
            ]:
                assert seen.mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / RUNS))


# ---------------------------------------------------------------------------- lying gates


def swapped(gate: PairedRule, lost: Counts, gained: Counts, items: int) -> rules.Judged:
    """Takes the target for the reference."""
    return rules.judge_pairs(gate, gained, lost, items)


def as_if_unpaired(gate: PairedRule, lost: Counts, gained: Counts, items: int) -> rules.Judged:
    """Forgets which items are the same; the reference has 90 % right."""
    right = 0.9 * items
    return rules.judge_shares(gate, right, items, right - lost + gained, items)


def passes_without_alarm(gate: PairedRule, lost: Counts, gained: Counts, items: int) -> rules.Judged:
    """Takes "no alarm" for "no drop"."""
    judged = rules.judge_pairs(gate, lost, gained, items)
    return rules.Judged(~judged.alarms, judged.fails, judged.alarms, judged.beyond)


def two_sided(gate: PairedRule, lost: Counts, gained: Counts, items: int) -> rules.Judged:
    """Alarms at improvements too, each side with the whole alpha."""
    judged = rules.judge_pairs(gate, lost, gained, items)
    better = statistics.mcnemar_p(gained, lost, mid=True) <= gate.alpha
    worse = statistics.mcnemar_p(lost, gained, mid=True) <= gate.alpha
    return rules.Judged(judged.passes, worse | better, worse | better, judged.beyond)


@pytest.mark.parametrize(
    ("liar", "promise"),
    [
        (swapped, "power at 0.035"),
        (as_if_unpaired, "power at 0.035"),
        (passes_without_alarm, "passes at the margin at 0.06"),
        (two_sided, "false alarms at 0.06"),
    ],
)
def test_lying_gates_break_promises(liar: Judge, promise: str) -> None:
    assert promise in broken_promises(liar, paired(items=ITEMS, margin=0.02))


# ---------------------------------------------------------------------------- looking after every item


def in_turn(drop: float, discordance: float, count: int = RUNS) -> NDArray[np.int8]:
    """Differences of the items of each run, in order."""
    rng = np.random.default_rng([7, round(drop * 1e6), round(discordance * 1e6)])
    drawn = rng.random((count, ITEMS))
    half = discordance / 2
    return (drawn < half + drop).astype(np.int8) - (drawn > 1 - half).astype(np.int8)


@pytest.mark.parametrize("discordance", NOISE)
@pytest.mark.parametrize("floor", [0.0, 0.005])
def test_the_sequential_test_seldom_stops_a_target_that_is_no_worse(discordance: float, floor: float) -> None:
    stops = 0
    for differences in in_turn(0.0, discordance):
        test = SequentialTest(ALPHA, floor)
        stops += test.see_all(differences.tolist())
    assert stops > 0
    assert not exceeds(stops)


def test_the_sequential_test_stops_real_breakage_early() -> None:
    """A drop of 5 points is found within a third of the items, in nearly all runs."""
    stopped = []
    for differences in in_turn(0.05, 0.035, count=300):
        test = SequentialTest(ALPHA, 0.005)
        test.see_all(differences.tolist())
        stopped.append(test.stopped_at)
    found = [items for items in stopped if items is not None]
    assert len(found) > 0.99 * 300
    assert np.median(found) < ITEMS / 3


def test_peeking_with_the_p_value_of_the_end_would_break_the_promise() -> None:
    """Why no p-value can be had on the way."""
    differences = in_turn(0.0, 0.06)
    lost, gained = np.cumsum(differences > 0, axis=1), np.cumsum(differences < 0, axis=1)
    looks = slice(50, None, 10)
    alarms = (statistics.mcnemar_p(lost[:, looks], gained[:, looks]) <= ALPHA).any(axis=1)
    assert exceeds(int(alarms.sum()))


def test_both_tests_of_a_sequential_gate_share_alpha() -> None:
    """The stop and the test at the end together alarm no more often than alpha says."""
    gate = paired(items=ITEMS, stop_alpha=0.02)
    differences = in_turn(0.0, 0.06)
    lost, gained = (differences > 0).sum(axis=1), (differences < 0).sum(axis=1)
    at_the_end = rules.judge_pairs(gate, lost, gained, ITEMS).fails
    stopped = np.array(
        [SequentialTest(0.02, gate.floor).see_all(row.tolist()) for row in differences], dtype=bool
    )
    assert stopped.any()
    assert at_the_end.any()
    assert not exceeds(int((stopped | at_the_end).sum()))


# ---------------------------------------------------------------------------- clusters


def clustered_run(rng: np.random.Generator, clusters: int, each: int) -> tuple[list[int], list[str]]:
    """Differences without a drop on average, but each cluster is better or worse as a whole."""
    lean = rng.choice([-0.12, 0.12], clusters)
    chance = 0.15 + np.repeat(lean, each)
    drawn = rng.random(clusters * each)
    differences = (drawn < chance).astype(int) - (drawn > 1 - (0.3 - chance)).astype(int)
    return differences.tolist(), [str(c) for c in np.repeat(np.arange(clusters), each)]


def test_clusters_need_their_own_error() -> None:
    """Where whole subjects change, McNemar's test alone alarms far too often; with clusters it does not."""
    rng = np.random.default_rng(11)
    alone = careful = 0
    for _ in range(RUNS):
        differences, clusters = clustered_run(rng, 10, 50)
        lost, gained = differences.count(1), differences.count(-1)
        alarm = statistics.mcnemar_p(lost, gained) <= ALPHA
        alone += bool(alarm)
        careful += bool(alarm and statistics.clustered(differences, clusters).p_value() <= ALPHA)
    assert exceeds(alone)
    assert not exceeds(careful)


def clustered_verdicts(
    gate: PairedRule, drop: float, spread: float, *, seed: int, runs: int = 400
) -> dict[str, float]:
    """What `decide` makes of whole sheets with clusters, whose drops lie `spread` above or below `drop`."""
    rng = np.random.default_rng(seed)
    count = gate.clusters
    assert isinstance(count, int)
    each = gate.items // count
    names = [f"kind-{number}" for number in np.repeat(np.arange(count), each)]
    right = np.arange(gate.items) % 2 == 0  # of the reference
    arm = {flag: sheet([flag] * gate.items, clusters=names).items for flag in (True, False)}
    reference = sheet(right.tolist(), clusters=names)
    found: Counter[str] = Counter()
    for _ in range(runs):
        lost_share = gate.discordance / 2 + drop + np.repeat(rng.choice([-spread, spread], count), each)
        drawn = rng.random(gate.items)
        # Half the items can be lost, and the other half gained.
        flips = drawn < 2 * np.where(right, lost_share, gate.discordance / 2)
        items = tuple(arm[bool(flag)][number] for number, flag in enumerate(right ^ flips))
        target = Sheet.model_construct(header=reference.header, items=items)
        found[decide(gate, reference, target).verdict] += 1
    return {verdict: number / runs for verdict, number in found.items()}


@pytest.mark.parametrize(("clusters", "spread", "widened"), [(10, 0.0, 1.0), (30, 0.02, 1.2)])
@pytest.mark.parametrize("drop", [0.0, 0.03])
def test_planned_chances_are_those_of_sheets_with_clusters(
    clusters: int, spread: float, widened: float, drop: float
) -> None:
    """A gate that was planned as if items were independent would promise more than it can do."""
    gate = paired(
        items=30 * 30 if clusters == 30 else 500,
        margin=0.03,
        floor=0.01,
        discordance=0.04,
        clusters=clusters,
        design_effect=widened,
    )
    seen = clustered_verdicts(gate, drop, spread, seed=clusters)
    planned = chances(gate, drop)
    near = 4 * np.sqrt(0.25 / 400)
    assert seen.get("fail", 0) == pytest.approx(planned.fails, abs=near)
    assert seen.get("pass", 0) == pytest.approx(planned.passes, abs=near)
    if clusters == 10 and drop:
        alone = chances(gate.model_copy(update={"clusters": None}), drop)
        assert alone.fails > planned.fails + 0.05


def test_what_the_promise_of_a_pass_leaves_out() -> None:
    """One subject in ten loses thirty points: ten subjects often hold none, and then nothing shows it."""
    gate = paired(items=500, margin=0.03, floor=0.01, clusters=10, design_effect=2.0)
    rng = np.random.default_rng(2)
    names = [str(number) for number in np.repeat(np.arange(10), 50)]
    passes = {"even": 0, "unequal": 0}
    runs = 400
    for _ in range(runs):
        for kind, drops in (("even", np.full(10, 0.03)), ("unequal", 0.3 * (rng.random(10) < 0.1))):
            drawn = rng.random(500)
            differences = (drawn < 0.01 + np.repeat(drops, 50)).astype(int) - (drawn > 0.99).astype(int)
            spread = statistics.clustered(differences.tolist(), names)
            lost, gained = int((differences > 0).sum()), int((differences < 0).sum())
            _, high = statistics.tango_limits(lost, gained, 500, gate.alpha)
            passes[kind] += max(float(high), spread.limits(gate.alpha)[1]) < gate.margin
    assert passes["even"] <= 0.05 * runs
    assert 0.2 * runs < passes["unequal"] < 0.5 * runs


def test_decide_judges_as_the_rule_does() -> None:
    """Whole sheets, in fewer runs: the decision is the rule's."""
    rng = np.random.default_rng(5)
    gate = paired(items=150, margin=0.05, floor=0.01)
    seen = set()
    for _ in range(60):
        drop = rng.choice([0.0, 0.05, 0.1])
        reference = rng.random(150) < 0.9
        target = reference & (rng.random(150) > drop) | (~reference & (rng.random(150) < 0.1))
        decision = decide(gate, sheet(reference.tolist()), sheet(target.tolist(), target="other"))
        lost, gained = int((reference & ~target).sum()), int((~reference & target).sum())
        judged = rules.judge_pairs(gate, lost, gained, 150)
        expected = "fail" if judged.fails else "pass" if judged.passes else "inconclusive"
        assert decision.discordant == (lost, gained)
        assert decision.verdict == expected
        seen.add(expected)
    assert seen == {"fail", "pass", "inconclusive"}
