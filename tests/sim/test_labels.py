"""Labels of pictures cover nothing."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.sim.report.labels import Box, place_labels, spread_out

PLACES = st.lists(st.floats(0, 1), min_size=1, max_size=16).map(sorted)


@given(PLACES)
def test_spread_out_keeps_the_gap_the_order_and_the_bounds(wanted: list[float]) -> None:
    places = spread_out(wanted, 0.06, 0.0, 1.0)
    assert len(places) == len(wanted)
    assert places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
    for one, other in itertools.pairwise(places):
        assert other - one >= min(0.06, 1 / (len(wanted) - 1)) - 1e-9


def test_spread_out_moves_nothing_that_has_room() -> None:
    assert spread_out([0.1, 0.5, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_out([0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55])
    assert spread_out([1.0, 1.0], 0.1, 0.0, 1.0) == pytest.approx([0.9, 1.0])


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(100, 900), st.integers(100, 500)), min_size=1, max_size=10))
def test_labels_overlap_no_label(points: list[tuple[int, int]]) -> None:
    frame = Box(0, 0, 1000, 600)
    spots = place_labels(
        [(float(x), float(y)) for x, y in points], [(90.0, 16.0)] * len(points), frame, 6.0
    )
    assert len(spots) == len(points)
    for one, other in itertools.combinations(spots, 2):
        assert not one.overlaps(other)
    assert all(frame.left <= spot.left and spot.right <= frame.right for spot in spots)
