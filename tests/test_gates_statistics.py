"""Statistics of gates: published examples, other packages, and what must hold for all tables."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import (
    confint_proportions_2indep,
    proportion_confint,
    proportions_ztest,
)

from conformance.gates import rule as rules
from conformance.gates import statistics
from tests.gate_sheets import paired


@st.composite
def tables(draw: st.DrawFn, most: int = 400) -> tuple[int, int, int]:
    """Lost, gained, items."""
    items = draw(st.integers(2, most))
    lost = draw(st.integers(0, items))
    return lost, draw(st.integers(0, items - lost)), items


@pytest.mark.parametrize(
    ("lost", "gained", "items", "alpha", "low", "high"),
    [
        # Tango 1998: contact lenses, 44 pairs of which one is discordant; 90 %.
        (0, 1, 44, 0.05, -0.096, 0.037),
        # Fagerland, Lydersen & Laake 2014: airway reactivity before and after a transplantation; 95 %.
        (1, 7, 21, 0.025, -0.517, -0.026),
    ],
)
def test_tango_as_published(
    lost: int, gained: int, items: int, alpha: float, low: float, high: float
) -> None:
    limits = statistics.tango_limits(lost, gained, items, alpha, shift=0.0)
    assert np.round(limits, 3) == pytest.approx((low, high))


def test_mcnemar_as_published() -> None:
    """Fagerland, Lydersen & Laake 2013, the same children: two-sided 0.070 exact and 0.039 mid-p."""
    assert 2 * statistics.mcnemar_p(7, 1) == pytest.approx(0.0703, abs=5e-5)
    assert 2 * statistics.mcnemar_p(7, 1, mid=True) == pytest.approx(0.0391, abs=5e-5)


@given(tables())
def test_mcnemar_agrees_with_statsmodels(table: tuple[int, int, int]) -> None:
    lost, gained, _ = table
    two_sided = mcnemar([[0, lost], [gained, 0]], exact=True).pvalue
    one_sided = min(statistics.mcnemar_p(lost, gained), statistics.mcnemar_p(gained, lost))
    assert min(1.0, 2 * one_sided) == pytest.approx(two_sided)


@given(tables())
def test_mid_p_values_of_both_directions_add_up(table: tuple[int, int, int]) -> None:
    lost, gained, _ = table
    both = statistics.mcnemar_p(lost, gained, mid=True) + statistics.mcnemar_p(gained, lost, mid=True)
    assert both == pytest.approx(1.0)
    assert statistics.mcnemar_p(lost, gained, mid=True) <= statistics.mcnemar_p(lost, gained)


@given(tables(), st.floats(-0.9, 0.9).filter(lambda drop: abs(drop) > 1e-6))
def test_tango_takes_the_likeliest_share(table: tuple[int, int, int], drop: float) -> None:
    """The closed form of the nuisance share, against a search over the likelihood."""
    lost, gained, items = table

    def unlikelihood(share: float) -> float:
        kept = special.xlogy(items - lost - gained, 1 - 2 * share - drop)
        return -float(special.xlogy(lost, share + drop) + special.xlogy(gained, share) + kept)

    span = (max(0.0, -drop), (1 - drop) / 2)
    best = optimize.minimize_scalar(unlikelihood, bounds=span, method="bounded", options={"xatol": 1e-13})
    ends = [share for share in (*span, best.x) if np.isfinite(unlikelihood(share))]
    share = min(ends, key=unlikelihood)
    variance = items * (2 * share + drop * (1 - drop))
    distance = lost - gained - items * drop
    z = statistics.tango_z(lost, gained, items, drop)
    assert z * np.sqrt(variance) == pytest.approx(distance, rel=1e-3, abs=1e-3)


@given(tables(), st.sampled_from([0.01, 0.025, 0.05, 0.2]))
def test_swapping_the_arms_swaps_the_limits(table: tuple[int, int, int], alpha: float) -> None:
    lost, gained, items = table
    low, high = statistics.tango_limits(lost, gained, items, alpha)
    swapped_low, swapped_high = statistics.tango_limits(gained, lost, items, alpha)
    assert (low, high) == pytest.approx((-swapped_high, -swapped_low), abs=1e-9)
    assert low <= (lost - gained) / items + 1e-9
    assert high >= (lost - gained) / items - 1e-9


@given(tables(), st.sampled_from([0.01, 0.05, 0.2]))
def test_one_more_lost_item_moves_both_limits_up(table: tuple[int, int, int], alpha: float) -> None:
    lost, gained, items = table
    if lost + gained == items:
        return
    before = np.asarray(statistics.tango_limits(lost, gained, items, alpha))
    after = np.asarray(statistics.tango_limits(lost + 1, gained, items, alpha))
    assert (after > before - 1e-9).all()


@given(tables(), st.sampled_from([0.005, 0.02, 0.1, 0.4]), st.sampled_from([0.01, 0.05]))
def test_the_rule_and_the_limits_agree(table: tuple[int, int, int], margin: float, alpha: float) -> None:
    lost, gained, items = table
    gate = paired(margin=margin, floor=margin / 4, alpha=alpha)
    low, high = statistics.tango_limits(lost, gained, items, alpha)
    if min(abs(low - margin), abs(high - margin)) < 1e-9:
        return
    judged = rules.judge_pairs(gate, lost, gained, items)
    assert judged.beyond == (low > margin)
    assert judged.passes == (high < margin and not judged.fails)


def _size(items: int, drop: float, p_gained: float, shift: float) -> float:
    """Chance that the upper limit is below the true drop, over all tables that can come about."""
    lost = np.arange(stats.binom.isf(1e-12, items, p_gained + drop) + 1)[:, None]
    gained = np.arange(max(0, stats.binom.isf(1e-12, items, p_gained)) + 1)[None, :]
    lost, gained = (values[lost + gained <= items] for values in np.broadcast_arrays(lost, gained))
    weights = np.exp(statistics.log_trinomial(lost, gained, items, p_gained + drop, p_gained))
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    z = statistics.tango_z(lost, gained, items, drop, shift=shift)
    return float(np.sum(weights * (z < -stats.norm.isf(0.05))))


_SHARES = [0, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1]


@pytest.mark.parametrize("items", [50, 100, 200, 300, 500, 1319])
@pytest.mark.parametrize("drop", [0.01, 0.02, 0.03, 0.06])
def test_upper_limit_covers(items: int, drop: float) -> None:
    """However many items are discordant besides, a drop of the margin passes no more often than alpha."""
    worst = max(_size(items, drop, share, statistics.HALF_AN_ITEM) for share in _SHARES)
    assert 0.03 < worst <= 0.05


def test_without_half_an_item_the_limit_does_not_cover() -> None:
    assert max(_size(300, 0.02, share, 0.0) for share in _SHARES) > 0.06


def test_limits_of_rates_agree_with_statsmodels() -> None:
    for count, of in [(0, 300), (1, 7), (45, 50), (1232, 1319), (50, 50)]:
        wilson = proportion_confint(count, of, alpha=0.1, method="wilson")
        assert statistics.wilson_limits(count, of, 0.05) == pytest.approx(wilson, abs=1e-12)
        exact = proportion_confint(count, of, alpha=0.1, method="beta")
        assert statistics.clopper_pearson_limits(count, of, 0.05) == pytest.approx(exact, abs=1e-12)


def test_rule_of_three() -> None:
    """No failure among 300 certifies fewer than one in a hundred."""
    assert statistics.clopper_pearson_limits(0, 300, 0.05)[1] == pytest.approx(0.00994, abs=1e-5)


def test_unpaired_statistics_agree_with_statsmodels() -> None:
    for k0, n0, k1, n1 in [(56, 70, 48, 80), (9, 10, 3, 10), (1232, 1319, 1200, 1319), (6, 7, 2, 7)]:
        newcombe = confint_proportions_2indep(k0, n0, k1, n1, method="newcomb", alpha=0.05)
        assert statistics.newcombe_limits(k0, n0, k1, n1, 0.025) == pytest.approx(newcombe, abs=1e-10)
        z_test = proportions_ztest([k0, k1], [n0, n1], alternative="larger")[1]
        assert statistics.two_proportions_p(k0, n0, k1, n1) == pytest.approx(z_test, abs=1e-12)


def test_newcombe_as_published() -> None:
    """Newcombe 1998, his first example by his method 10: 56 of 70 against 48 of 80."""
    limits = statistics.newcombe_limits(56, 70, 48, 80, 0.025)
    assert np.round(limits, 4) == pytest.approx((0.0524, 0.3339))


def test_clustered_error_agrees_with_statsmodels() -> None:
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 9, 200)
    differences = rng.choice([-1, 0, 0, 0, 1], 200)
    fitted = sm.OLS(differences, np.ones(200)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    found = statistics.clustered(differences.tolist(), [str(c) for c in clusters])
    assert found.clusters == len(set(clusters.tolist()))
    assert found.drop == pytest.approx(fitted.params[0])
    assert found.error == pytest.approx(fitted.bse[0])
    assert found.limits(0.025) == pytest.approx(tuple(fitted.conf_int()[0]))


def test_clusters_must_be_at_least_two() -> None:
    with pytest.raises(ValueError, match="at least two"):
        statistics.clustered([1, 0], ["same", "same"])


def test_a_clustered_drop_without_spread_is_certain_only_if_there_is_one() -> None:
    assert statistics.Clustered(0.0, 0.0, 5).p_value() == 1.0
    assert statistics.Clustered(0.1, 0.0, 5).p_value() == 0.0


def test_design_effect_of_identical_items() -> None:
    """Clusters of k copies hold as much as one item each."""
    right = [int(k % 3 == 0) for k in range(60) for _ in range(4)]
    clusters = [str(k) for k in range(60) for _ in range(4)]
    assert statistics.design_effect(right, clusters) == pytest.approx(4, rel=0.05)
    assert statistics.design_effect([1, 1, 1, 1], ["a", "a", "b", "b"]) == 1.0
