"""Places that blocks pass through: bounded, each somebody's alone, and memory that can be written."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.staging import Staging


@pytest.mark.parametrize(("block", "limit", "places"), [(1, 8192, 2), (4097, 8192, 1), (8192, 1, 1)])
def test_how_many_places(block: int, limit: int, places: int) -> None:
    staging = Staging(block, limit)
    assert staging.places == staging.free == places
    assert staging.place_bytes % PAGE == 0 and staging.place_bytes >= block


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_a_place_is_somebodys_alone(steps: list[tuple[bool, int]]) -> None:
    staging = Staging(PAGE, 8 * PAGE)
    held: list[int] = []
    for taking, count in steps:
        if taking:
            places = staging.take(count).tolist()
            assert len(places) == min(count, 8 - len(held))
            held += places
        else:
            given_back, held = held[:count], held[count:]
            staging.give(np.array(given_back, np.int64))
        assert len(set(held)) == len(held) and set(held) <= set(range(8))
        assert staging.used_bytes == len(held) * PAGE and staging.free == 8 - len(held)


def test_places_do_not_overlap() -> None:
    staging = Staging(5000, 10 * 8192)
    places = staging.take(10)
    buffers = staging.buffers(places, np.full(10, 5000, np.int64))
    for number, address in enumerate(buffers.addresses.tolist()):
        assert address % PAGE == 0
        ctypes.memset(address, number + 1, 5000)
    for number, address in enumerate(buffers.addresses.tolist()):
        assert ctypes.string_at(address, 5000) == bytes([number + 1]) * 5000


def test_giving_twice_is_a_bug() -> None:
    staging = Staging(PAGE, 4 * PAGE)
    places = staging.take(2)
    staging.give(places)
    with pytest.raises((AssertionError, ValueError)):
        staging.give(places)
