"""CLOCK-Pro: a trace by hand after section 4 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from knob_kit import assert_agrees, assert_scale_free
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.base import HIT
from kvstrata.policies.clock_pro import COLD, GHOST, HOT, REFERENCED, TARGET, TEST, ClockPro
from kvstrata.policies.lists import ring_order

LETTERS = {COLD: "c", TEST: "t", HOT: "h", GHOST: "g"}


def clock_pro(capacity: int, sizes: list[int] | None = None) -> CheckedPolicy:
    return CheckedPolicy("clock_pro", 16, capacity, sizes or [1] * 16)


def each(checked: CheckedPolicy, *pages: int) -> list[bool]:
    return [checked.access([page], [True]).hits[0] for page in pages]


def clock(checked: CheckedPolicy) -> str:
    """From the tail to the head: cold, cold in its test, hot, ghost; * for a set reference bit; and m_c."""
    policy = checked.policy
    assert isinstance(policy, ClockPro)
    out = np.zeros(16, np.int32)
    words = []
    for page in out[: ring_order(policy._clock, 16, out)].tolist():
        place = int(policy.where[page])
        if place > 0 and place & REFERENCED:
            words.append(f"{page}{LETTERS[place - REFERENCED]}*")
        else:
            words.append(f"{page}{LETTERS[place]}")
    return f"{' '.join(words)} | {policy._state[TARGET]}"


def test_a_trace_by_hand() -> None:
    """3 pages; m_c begins at 3."""
    cache = clock_pro(3)
    each(cache, 0, 1, 2, 0)
    assert clock(cache) == "0t* 1t 2t | 3"

    # HAND_cold: 0 was accessed in its test, so hot. HAND_hot (1 hot page, 3 - 3 may be) moves past 1, ends
    # its test, m_c 2: one hot page may be. It goes on to a hot page, past 2, m_c 1. HAND_cold: 1 leaves.
    answer = cache.access([3], [True])
    assert (answer.evicted, answer.forgotten) == ([1], [1])
    assert clock(cache) == "0h 2c 3t | 1"

    each(cache, 3)
    assert cache.access([4], [True]).evicted == [2]
    assert clock(cache) == "0h 3t* 4t | 1"

    # 3 becomes hot, m_c 2; HAND_hot turns 0 cold, and on its way to a hot page ends the test of 4, m_c 1.
    # The cold page nearest to the tail is now 0.
    assert cache.access([5], [True]).evicted == [0]
    assert clock(cache) == "3h 4c 5t | 1"

    assert cache.access([6], [True]).evicted == [4]
    answer = cache.access([7], [True])  # 5 leaves in its test: a ghost
    assert (answer.evicted, answer.forgotten) == ([5], [])
    assert clock(cache) == "3h 5g 6t 7t | 1"

    # 6 leaves as a ghost. 5 is in its test: hot, m_c 2. HAND_hot turns 3 cold, removes 6, m_c 1, ends
    # the test of 7, m_c stays 1, and stops at 5.
    answer = cache.access([5], [True])
    assert (answer.evicted, answer.forgotten) == ([6], [6])
    assert clock(cache) == "5h 3c 7c | 1"

    each(cache, 5, 7)
    assert cache.access([8], [True]).evicted == [3]
    assert clock(cache) == "5h* 7c* 8t | 1"

    # HAND_cold: 7 was accessed outside its test: to the head, cold as before. 8 leaves.
    assert cache.access([9], [True]).evicted == [8]
    assert clock(cache) == "5h* 8g 7c 9t | 1"

    # 8 becomes hot, m_c 2. HAND_hot spares 5, whose bit was set, and ends the test of 9, m_c 1: two may be
    # hot.
    assert cache.access([8], [True]).evicted == [7]
    assert clock(cache) == "8h 5h 9c | 1"
    assert cache.policy.order().tolist() == [9, 8, 5]


def test_a_hit_sets_a_bit_and_nothing_else() -> None:
    cache = clock_pro(4)
    each(cache, 0, 1, 2, 3)
    assert each(cache, 2, 0, 2) == [True] * 3
    assert clock(cache) == "0t* 1t 2t* 3t | 4"


def test_hand_test_keeps_the_ghosts_within_one_capacity() -> None:
    cache = clock_pro(2)
    each(cache, 0, 1, 2, 3)
    assert clock(cache) == "0g 1g 2t 3t | 2"
    assert cache.access([4], [True]).forgotten == [0]  # and its test ends without an access: m_c 1
    assert clock(cache) == "1g 2g 3t 4t | 1"


def test_where_cold_pages_are_pinned_hand_hot_gives() -> None:
    cache = clock_pro(3)
    each(cache, 0, 1, 2, 0, 3)
    assert clock(cache) == "0h 2c 3t | 1"
    cache.pin([2, 3])
    assert cache.access([4], [True]).evicted == [0]
    assert clock(cache) == "2c 3t 4t | 1"
    cache.pin([4])
    answer = cache.access([5], [True])
    assert (answer.evicted, answer.forgotten) == ([], [])
    assert clock(cache) == "2c 3t 4t | 1"


def test_a_resize_scales_the_target() -> None:
    cache = clock_pro(8)
    each(cache, *range(8))
    assert clock(cache).endswith("| 8")
    cache.resize(4)
    assert clock(cache) == "0g 1g 2g 3g 4t 5t 6t 7t | 4"
    cache.resize(0)
    assert (cache.known(), cache.policy.used) == (set(), 0)


def test_a_loop_larger_than_the_cache_hits() -> None:
    """100 pages in turn in 60: LRU and CLOCK never hit."""
    policy = make_policy("clock_pro", 100, 60)
    loop = np.tile(np.arange(100, dtype=np.int32), 40)
    hits = policy.replay(loop, np.array([0, len(loop)], np.int64), np.ones(100, np.int64)) == HIT
    assert hits[-1_000:].mean() > 0.4


def test_the_first_target() -> None:
    policy = make_policy("clock_pro", 16, 10, cold=0.3)
    assert isinstance(policy, ClockPro)
    assert policy._state[TARGET] == 3
    with pytest.raises(ConfigError, match="cold is -1"):
        make_policy("clock_pro", 16, 10, cold=-1)


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize("cold", [0.0, 0.1, 0.5])
def test_other_targets_agree_with_the_reference(cold: float, equal_sizes: bool) -> None:
    assert_agrees("clock_pro", 7, equal_sizes=equal_sizes, cold=cold)


def test_equal_sizes_are_pages() -> None:
    assert_scale_free("clock_pro")
