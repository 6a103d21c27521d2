"""Planning: what a gate can detect, what it needs, and when it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conformance.gates import planning
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
