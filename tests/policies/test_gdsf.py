"""GDSF: traces by hand after the report's formula, what is pinned, and libCacheSim's GDSF."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from knob_kit import assert_agrees, assert_scale_free
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.gdsf import Gdsf
from libcachesim_kit import block_hits, needs_libcachesim


def gdsf(capacity: int, sizes: list[int] | None = None, **knobs: float) -> CheckedPolicy:
    checked = CheckedPolicy("gdsf", 16, capacity, sizes or [1] * 16)
    checked.policy = make_policy("gdsf", 16, capacity, **knobs)
    return checked


def each(checked: CheckedPolicy, *pages: int) -> list[int]:
    """One access after another; returns what was evicted."""
    evicted = []
    for page in pages:
        evicted += checked.access([page], [True]).evicted
    return evicted  # type: ignore[return-value]


def clock(checked: CheckedPolicy) -> float:
    assert isinstance(checked.policy, Gdsf)
    return float(checked.policy._priority[-1])


def priorities(checked: CheckedPolicy) -> list[tuple[int, float]]:
    """Those of the residents, in the order in which they would leave."""
    assert isinstance(checked.policy, Gdsf)
    return [(index, float(checked.policy._priority[index])) for index in checked.policy.order().tolist()]


def test_a_trace_by_hand() -> None:
    cache = gdsf(7, [1, 2, 4, 2, 1] + [1] * 11)
    each(cache, 0, 1, 2)
    assert priorities(cache) == [(2, 0.25), (1, 0.5), (0, 1)]  # 1 / size
    each(cache, 2)
    assert priorities(cache) == [(1, 0.5), (2, 0.5), (0, 1)]  # twice / 4; 1 was touched earlier
    assert each(cache, 3) == [1]
    assert clock(cache) == 0.5
    assert priorities(cache) == [(2, 0.5), (0, 1), (3, 1)]  # 3: 0.5 + 1 / 2
    assert each(cache, 4) == [2]
    assert clock(cache) == 0.5
    each(cache, 0)
    assert priorities(cache) == [(3, 1), (4, 1.5), (0, 2.5)]  # 0: 0.5 + 2 / 1


def test_where_a_block_costs_its_size_only_frequency_and_age_count() -> None:
    cache = gdsf(7, [1, 2, 4, 2, 1] + [1] * 11, cost_is_size=1)
    each(cache, 0, 1, 2, 2)
    assert priorities(cache) == [(0, 1), (1, 1), (2, 2)]
    assert each(cache, 3) == [0, 1]
    assert clock(cache) == 1
    assert priorities(cache) == [(2, 2), (3, 2)]


def test_what_is_not_asked_for_any_more_is_overtaken() -> None:
    cache = gdsf(2)
    each(cache, 0, 0, 0, 0, 1)
    assert each(cache, 2, 3, 4) == [1, 2, 3]
    assert priorities(cache) == [(0, 4), (4, 4)]  # the clock was 3 when 4 came
    assert each(cache, 5, 6, 7) == [0, 4, 5]
    assert clock(cache) == 5


def test_what_was_pinned_below_the_clock_leaves_first_and_does_not_turn_it_back() -> None:
    cache = gdsf(3)
    each(cache, 0, 1, 2, 1, 2)
    cache.pin([0])
    assert each(cache, 3) == [1]
    assert clock(cache) == 2
    assert priorities(cache) == [(0, 1), (2, 2), (3, 3)]
    cache.unpin([0])
    assert each(cache, 4) == [0]
    assert clock(cache) == 2
    assert priorities(cache) == [(2, 2), (3, 3), (4, 3)]


def test_pinned_blocks_of_many_priorities_keep_their_order_below_the_clock() -> None:
    cache = gdsf(40, [5, 3, 7, 2, 6, 4, 1, 1, 9, 8] + [1] * 6)
    each(cache, 0, 1, 2, 3, 4, 5, 3, 6, 6, 6)  # 28
    cache.pin(range(6))
    each(cache, 8)  # 37; 1 / 9
    assert each(cache, 9) == [8]  # 36; 1 / 9 + 1 / 8
    assert each(cache, 8) == [9]
    assert [index for index, value in priorities(cache) if value < clock(cache)] == [2, 4, 0]
    each(cache, 8, 8, 8)  # 17 / 72 + 4 / 9
    assert each(cache, 9) == [8]  # 49 / 72 + 1 / 8
    assert [index for index, value in priorities(cache) if value < clock(cache)] == [2, 4, 0, 5, 1]
    cache.unpin(range(6))
    assert cache.resize(2).evicted == [2, 4, 0, 5, 1, 9, 3]


def test_nothing_may_leave() -> None:
    cache = gdsf(2)
    each(cache, 0, 1)
    cache.pin([0, 1])
    assert each(cache, 2) == []
    assert not cache.policy.resident(2)
    assert clock(cache) == 0


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize("cost_is_size", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_parameters_agree_with_the_reference(seed: int, cost_is_size: int, equal_sizes: bool) -> None:
    assert_agrees("gdsf", seed, equal_sizes=equal_sizes, cost_is_size=cost_is_size)


def test_parameters_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="cost_is_size is 2; it is a whole number from 0 to 1"):
        make_policy("gdsf", 8, 4, cost_is_size=2)


def test_the_unit_does_not_matter() -> None:
    assert_scale_free("gdsf")


@needs_libcachesim
@pytest.mark.parametrize("capacity", [40, 150])
def test_against_libcachesim(capacity: int) -> None:
    """It breaks ties otherwise: the hits are close, not the same."""
    rng = np.random.default_rng(capacity)
    ids = (rng.zipf(1.2, 20_000) % 300).astype(np.int32)
    outcome = make_policy("gdsf", 300, capacity).replay(
        ids, np.array([0, len(ids)], np.int64), np.ones(300, np.int64)
    )
    assert abs(np.count_nonzero(outcome == 1) - block_hits("gdsf", ids, capacity)) < 0.01 * len(ids)
