"""Charts over time: what is drawn stands where its axes say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.reporting import charts

SHARES = st.floats(0, 1)


def _reading(values: list[float], line: float | None, there: bool) -> charts.Reading:
    low, value, high = sorted(values) if there else (None, None, None)
    return charts.Reading("1 Nov", "words", "pass", value, low, high, (line,))


READINGS = st.lists(
    st.builds(_reading, st.lists(SHARES, min_size=3, max_size=3), st.none() | SHARES, st.booleans()),
    min_size=1,
    max_size=80,
)


@given(READINGS)
def test_a_chart_holds_what_it_draws(readings):
    drawn = charts.chart(readings)
    there = [reading for reading in readings if reading.value is not None]
    if not there:
        assert drawn is None
        return
    top, bottom = charts.TOP - 0.01, drawn.bottom + 0.01
    assert [mark.reading for mark in drawn.marks] == there
    assert sorted(mark.x for mark in drawn.marks) == [mark.x for mark in drawn.marks]
    for mark in drawn.marks:
        assert drawn.left < mark.x < drawn.right
        assert top <= mark.top <= mark.y <= mark.bottom <= bottom
    for stretch in drawn.lines[0]:
        places = [tuple(map(float, point.split(","))) for point in stretch.split()]
        assert all(
            drawn.left - 0.1 <= x <= drawn.right + 0.1 and top - 0.1 <= y <= bottom + 0.1 for x, y in places
        )
    labels = [row.label for row in drawn.rows]
    assert 2 <= len(set(labels)) == len(labels) <= 2 * charts.MOST_STEPS
    assert len(drawn.columns) <= charts.MOST_LABELS
    assert drawn.columns[-1].at == pytest.approx(drawn.right - (drawn.right - drawn.left) / len(readings) / 2)


@given(st.lists(SHARES, min_size=2, max_size=5, unique=True))
def test_a_mark_stands_where_the_axis_says(values):
    drawn = charts.chart([charts.Reading("", "", "pass", value=value) for value in values])
    ticks = {float(row.label.split()[0]) / 100: row.at for row in drawn.rows}
    (low, low_at), (high, high_at) = min(ticks.items()), max(ticks.items())
    for value, mark in zip(values, drawn.marks, strict=True):
        at = low_at + (value - low) / (high - low) * (high_at - low_at)
        assert mark.y == pytest.approx(at, abs=0.01)


def test_drops_have_a_line_at_zero_and_a_true_minus():
    reading = charts.Reading("", "", "pass", value=0.0, low=-0.012, high=0.012, lines=(0.02,))
    drawn = charts.chart([reading], percent=False)
    assert drawn.zero is not None
    assert "\u22121" in [row.label for row in drawn.rows]
    assert "+2" in [row.label for row in drawn.rows]
