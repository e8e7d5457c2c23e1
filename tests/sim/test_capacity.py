"""Capacities as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError
from kvstrata.sim.capacity import Footprint, normal, resolve, split_capacities

CONVERSATION = Footprint(182_790, 182_790 * 2**26, 2**26)


@pytest.mark.parametrize(
    ("text", "blocks", "fraction"),
    [
        ("1%", 1_827, 0.01),
        (" 1.0 % ", 1_827, 0.01),
        ("0.1%", 182, 0.001),
        ("1.1%", 2_010, 0.011),
        ("40%", 73_116, 0.4),
        ("0.0001%", 1, 0.000001),
        ("5000b", 5_000, 5_000 / 182_790),
        ("5000 blocks", 5_000, 5_000 / 182_790),
        ("64GiB", 1_024, 1_024 / 182_790),
        ("68719476736", 1_024, 1_024 / 182_790),
    ],
)
def test_words(text: str, blocks: int, fraction: float) -> None:
    found = resolve(text, CONVERSATION)
    assert (found.blocks, found.units, found.bytes) == (blocks, blocks, blocks * 2**26)
    assert found.fraction == fraction


@given(st.decimals(min_value="0.001", max_value=400, places=3))
def test_a_share_is_reported_as_it_was_asked_for(percent: object) -> None:
    assert resolve(f"{percent}%", CONVERSATION).fraction == pytest.approx(
        float(str(percent)) / 100, rel=1e-15
    )


def test_sizes_that_differ_are_counted_in_bytes() -> None:
    footprint = Footprint(10, 1_000, 0)
    assert resolve("50%", footprint).units == 500
    assert resolve("4b", footprint).units == 400
    assert resolve("250B", footprint).units == 250
    assert resolve("250B", footprint).blocks == 2


@pytest.mark.parametrize("text", ["", "5", "x", "0%", "0b", "0GiB", "-1%", "1e3%", "٣%", "9" * 19 + "b"])
def test_what_is_no_capacity(text: str) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        resolve(text, CONVERSATION)


def test_one_spelling_for_each() -> None:
    assert split_capacities("1%,1.00%, 5000b,5000 blocks,64GiB,65536 MiB,") == [
        "1%",
        "5000b",
        "68719476736B",
    ]
    assert all(normal(word) == word for word in ("1%", "0.05%", "7b", "4096B"))
    with pytest.raises(ConfigError, match="no capacity"):
        split_capacities(" , ")
