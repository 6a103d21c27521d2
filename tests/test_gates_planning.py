"""Planning: what a gate can detect, what it needs, and when it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conformance.gates import planning, statistics
from conformance.gates.planning import GateError, chances, check, make_plan
from tests.gate_sheets import paired, unpaired


def test_connors_formula() -> None:
    """By hand: 1.6449 sqrt(0.055) + 0.8416 sqrt(0.055 - 0.0004), over 0.02, squared."""
    assert planning.approximate_items(paired(margin=0.02, discordance=0.035)) == 849


def test_unpaired_number_of_items() -> None:
    """By hand, both shares 0.934: 6.18 * 2 * 0.0616 / n = 0.03² where the published n equals ours."""
    gate = unpaired(of=847, margin=0.03, score=0.934)
    assert planning.approximate_items(gate) == pytest.approx(847, abs=5)


def test_a_published_figure_limits_what_can_be_detected() -> None:
    """Its own chance is not made smaller by asking more."""
    gate = unpaired(of=200, margin=0.03)
    assert planning.items_needed(gate) is None
    with pytest.raises(GateError, match="Ask more than a million items"):
        check(gate)


def test_power_for_two_points_on_gsm8k() -> None:
    assert chances(paired(items=1319, discordance=0.035), 0.02).fails >= 0.90
    assert chances(paired(items=1319, discordance=0.06), 0.02).fails >= 0.77


def test_a_gate_that_cannot_reach_its_margin_is_refused() -> None:
    gate = paired(items=200, margin=0.01, floor=0.002, discordance=0.033)
    with pytest.raises(GateError) as refused:
        check(gate)
    message = str(refused.value)
    assert "200 items cannot certify a margin of 1 point at alpha 0.05 and power 0.8" in message
    assert f"(MDE) is {planning.points(planning.detectable_drop(gate))}" in message
    assert f"Ask {planning.items_needed(gate)} items" in message


@pytest.mark.parametrize("design_effect", [1.0, 2.0])
@pytest.mark.parametrize("stop_alpha", [None, 0.02])
def test_the_number_of_items_that_a_refusal_names_is_accepted(
    design_effect: float, stop_alpha: float | None
) -> None:
    gate = paired(items=100, margin=0.03, design_effect=design_effect, stop_alpha=stop_alpha)
    needed = planning.items_needed(gate)
    assert needed is not None
    check(gate.model_copy(update={"items": needed}))
    with pytest.raises(GateError):
        check(gate.model_copy(update={"items": int(needed * 0.9)}))


def test_dependence_and_a_sequential_test_cost_items() -> None:
    def needed(**fields: object) -> int:
        found = planning.items_needed(paired(margin=0.03, **fields))
        assert found is not None
        return found

    assert needed(design_effect=2.0) == pytest.approx(2 * needed(), abs=2)
    assert needed(stop_alpha=0.02) > needed()
    assert needed(mid_p=True) <= needed()
    assert needed(power=0.95) > needed()
    assert needed(alpha=0.01) > needed()


def test_few_clusters_cost_items_besides_their_design_effect() -> None:
    """Their limits stand on t: 1.833 instead of 1.645 with ten of them, squared."""

    def needed(**fields: object) -> int:
        found = planning.items_needed(paired(margin=0.03, design_effect=1.5, **fields))
        assert found is not None
        return found

    assert needed(clusters=10) == pytest.approx(needed() * (1.8331 / 1.6449) ** 2, rel=0.01)
    assert needed(clusters="all") == needed()
    assert needed() < needed(clusters=30) < needed(clusters=10)


def test_a_published_gate_passes_a_drop_of_the_margin_no_more_often_than_alpha() -> None:
    """Exact sums; without half an item they are up to 0.0511, which the last line shows."""
    gates = [
        unpaired(),
        unpaired(score=0.6535, margin=0.05),
        unpaired(score=0.4496, margin=0.05),
        unpaired(score=0.56667, margin=0.08, items=900, of=900, design_effect=1.5),
    ]
    for gate in gates:
        assert chances(gate, gate.margin).passes <= gate.alpha
        assert chances(gate, 0.0).fails <= gate.alpha
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "HALF_AN_ITEM", 0.0)
        assert chances(gates[2], gates[2].margin).passes > gates[2].alpha


def test_an_unpaired_gate_with_few_items_alarms_a_little_too_often() -> None:
    """Where the figure has many more items than are asked; docs/gates.md says how often."""
    worst = 0.0
    for score in (0.9, 0.97):
        gate = unpaired(score=score, margin=0.08, items=200, of=5000)
        assert chances(gate, gate.margin).passes <= gate.alpha
        worst = max(worst, chances(gate, 0.0).alarms)
    assert 0.05 < worst < 0.0605


def test_detectable_and_certifiable_are_where_the_power_is_reached() -> None:
    for gate in (paired(), paired(discordance=0.08), unpaired()):
        plan = make_plan(gate)
        assert chances(gate, plan.detectable).fails >= gate.power
        assert chances(gate, plan.detectable - 2e-4).fails < gate.power
        assert chances(gate, 0.0, margin=plan.certifiable).passes >= gate.power
        assert chances(gate, 0.0, margin=plan.certifiable - 2e-4).passes < gate.power
        assert plan.reaches(gate) == (plan.needed is not None and plan.needed <= gate.items)


def test_pairing_detects_less_than_half_of_what_unpaired_shares_do() -> None:
    alone = planning.detectable_drop(unpaired(score=0.86, of=1319))
    assert alone == pytest.approx(0.034, abs=0.002)
    assert planning.detectable_drop(paired(items=1319, discordance=0.033)) < alone / 2


@settings(max_examples=40)
@given(
    items=st.integers(2, 800),
    drop=st.floats(0, 0.5),
    discordance=st.floats(0.001, 0.6),
    margin=st.floats(0.006, 0.3),
)
def test_chances_are_chances(items: int, drop: float, discordance: float, margin: float) -> None:
    found = chances(paired(items=items, margin=margin, floor=0.005, discordance=discordance), drop)
    assert 0 <= found.passes <= 1 + 1e-9
    assert 0 <= found.fails <= 1 + 1e-9
    assert 0 <= found.inconclusive <= 1
    assert found.passes + found.fails <= 1 + 1e-9


def test_all_tables_are_counted() -> None:
    """Under a rule by which everything passes or fails, the weights of all tables add up to one."""
    found = chances(paired(items=900, margin=0.9, floor=0.1, discordance=0.05), 0.01)
    assert found.passes + found.fails == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"floor": 0.02}, "`floor` 0.02 must be below `margin` 0.02"),
        ({"max_transport_errors": 0.015, "max_refused": 0.01}, "what is left out could hide it"),
        ({"clusters": 30}, "`design_effect` has to say by how much"),
        ({"clusters": 1, "design_effect": 1.5}, "greater than or equal to 2"),
        ({"clusters": 30, "design_effect": 1.5, "stop_alpha": 0.02}, "`stop_alpha` does not go with"),
        ({"stop_alpha": 0.05}, "`stop_alpha` 0.05 must be below `alpha` 0.05"),
        ({"margin": 2.0}, "less than 1"),
        ({"alpha": 0.5}, "less than 0.5"),
        ({"free": 1}, "Extra inputs are not permitted"),
    ],
)
def test_gates_that_contradict_themselves(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        paired(**fields)


def test_points() -> None:
    assert [planning.points(share) for share in (0.01, 0.0125, 0.2, -0.01)] == [
        "1 point",
        "1.25 points",
        "20 points",
        "-1 points",
    ]
