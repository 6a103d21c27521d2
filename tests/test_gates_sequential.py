"""The e-process: a fair game for the gambler, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from conformance.gates.sequential import SequentialTest, e_value


def test_the_stake_is_the_mixture_of_all_bets() -> None:
    for lost, gained in [(0, 0), (1, 0), (0, 1), (5, 2), (20, 30), (40, 3)]:
        mixture = integrate.quad(lambda s, b=lost, c=gained: 2 * (2 * s) ** b * (2 - 2 * s) ** c, 0.5, 1)[0]
        assert e_value(lost, gained) == pytest.approx(mixture)


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_game_is_fair_at_even_odds(lost: int, gained: int) -> None:
    """The mean of the next two stakes is the present one, so nobody can expect to win by looking often."""
    after = (e_value(lost + 1, gained) + e_value(lost, gained + 1)) / 2
    assert after == pytest.approx(e_value(lost, gained), rel=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_game_is_lost_where_the_target_is_better(lost: int, gained: int) -> None:
    after = 0.4 * e_value(lost + 1, gained) + 0.6 * e_value(lost, gained + 1)
    assert after <= e_value(lost, gained) * (1 + 1e-9)


@given(st.lists(st.sampled_from([1, -1, 0, 0]), max_size=60))
def test_watching_is_counting(differences: list[int]) -> None:
    test = SequentialTest(0.05, 0.0)
    test.see_all(differences)
    lost = np.cumsum([d > 0 for d in differences])
    gained = np.cumsum([d < 0 for d in differences])
    stakes = e_value(lost, gained) if differences else np.array([1.0])
    over = np.flatnonzero((stakes >= 20) & (lost > gained)) if differences else np.array([])
    expected = int(over[0]) + 1 if len(over) else None
    assert test.stopped_at == expected
    until = len(differences) if expected is None else expected
    assert test.largest == pytest.approx(max(1.0, *stakes[:until]) if until else 1.0)


def test_it_does_not_stop_below_the_floor() -> None:
    """Eight lost items in a thousand are sure, and do not matter to a gate with a floor of a point."""
    differences = [1, *[0] * 124] * 8
    assert SequentialTest(0.05, 0.0).see_all(differences)
    assert not SequentialTest(0.05, 0.01).see_all(differences)


def test_once_stopped_it_stays_stopped() -> None:
    test = SequentialTest(0.05, 0.0)
    assert test.see_all([1] * 10)
    stopped_at = test.stopped_at
    assert test.see(-1)
    assert test.stopped_at == stopped_at


def test_there_is_nothing_to_pass_by() -> None:
    """The test says when to stop and fail; a p-value for a part of the items cannot be had from it."""
    public = {name for name in vars(SequentialTest(0.05, 0.0)) | vars(SequentialTest) if name[0] != "_"}
    assert public == {"threshold", "largest", "stopped_at", "see", "see_all"}
