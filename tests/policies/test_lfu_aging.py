"""LFU with aging: traces by hand, its parameters, and libCacheSim's LFU where nothing ages."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from knob_kit import assert_agrees, assert_scale_free
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.lfu_aging import COUNT_SHIFT, MAX_COUNT, LfuAging
from libcachesim_kit import block_hits, needs_libcachesim


def lfu(capacity: int, sizes: list[int] | None = None, **knobs: float) -> CheckedPolicy:
    checked = CheckedPolicy("lfu_aging", 16, capacity, sizes or [1] * 16)
    checked.policy = make_policy("lfu_aging", 16, capacity, **knobs)
    return checked


def each(checked: CheckedPolicy, *pages: int) -> list[int]:
    """One access after another; returns what was evicted."""
    evicted = []
    for page in pages:
        evicted += checked.access([page], [True]).evicted
    return evicted  # type: ignore[return-value]


def counts(checked: CheckedPolicy) -> dict[int, int]:
    assert isinstance(checked.policy, LfuAging)
    key = checked.policy._key
    return {index: int(key[index] >> COUNT_SHIFT) for index in checked.policy.order().tolist()}


def test_a_trace_by_hand() -> None:
    cache = lfu(3, age_every=8)
    assert each(cache, 0, 0, 0, 1, 1, 2) == []
    assert counts(cache) == {2: 1, 1: 2, 0: 3}
    assert cache.policy.order().tolist() == [2, 1, 0]
    assert each(cache, 3) == [2]  # the lowest counter
    assert each(cache, 1) == []  # the eighth access: 0 has 3, 1 has 3, 3 has 1; then all are halved
    assert counts(cache) == {3: 0, 0: 1, 1: 1}
    assert cache.policy.order().tolist() == [3, 0, 1]
    assert each(cache, 4, 4) == [3]
    assert counts(cache) == {0: 1, 1: 1, 4: 2}
    assert each(cache, 5) == [0]  # of equal counters the least recent


def test_what_sinks_to_zero_later_is_put_where_its_last_touch_was() -> None:
    cache = lfu(5, age_every=4)
    each(cache, 0, 0, 0, 0)  # 4, halved to 2
    each(cache, 1, 2, 3, 1)  # 2, 1, 1, halved; 0 has 1
    assert counts(cache) == {2: 0, 3: 0, 0: 1, 1: 1}
    each(cache, 4, 4, 4, 4)  # 0 and 1 sink to the others, where time decides
    assert counts(cache) == {0: 0, 2: 0, 3: 0, 1: 0, 4: 2}
    assert cache.policy.order().tolist() == [0, 2, 3, 1, 4]


def test_an_aging_comes_within_a_request() -> None:
    cache = lfu(8, age_every=5)
    cache.access(range(4), [True] * 4)
    cache.access(range(4), [True] * 4)  # 0 is the fifth access
    # 0 had 2 and the others 1, all are halved, then 1, 2 and 3 get one more.
    assert counts(cache) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert cache.policy.order().tolist() == [0, 1, 2, 3]


def test_a_shift_of_two_bits_quarters() -> None:
    cache = lfu(4, age_every=9, age_shift=2)
    each(cache, *[0] * 5, 1, 1, 1, 2)
    assert counts(cache) == {1: 0, 2: 0, 0: 1}


def test_what_is_kept_out_takes_no_time() -> None:
    cache = lfu(2, age_every=3)
    each(cache, 0, 0)
    cache.access([1], [False])
    assert counts(cache) == {0: 2}
    cache.pin([0])
    each(cache, 2)  # the third access
    assert counts(cache) == {2: 0, 0: 1}


def test_pinned_blocks_are_passed_over() -> None:
    cache = lfu(3)
    each(cache, 0, 1, 1, 2, 2)
    cache.pin([0])
    assert each(cache, 3) == [1]
    cache.pin([2, 3])
    assert each(cache, 4) == []
    assert not cache.policy.resident(4)


def test_sizes_count() -> None:
    cache = lfu(10, [4, 3, 2, 5] + [1] * 12)
    each(cache, 0, 0, 1, 2)
    assert each(cache, 3) == [1, 2]
    assert cache.policy.used == 9


def test_a_counter_has_an_end() -> None:
    cache = make_policy("lfu_aging", 2, 2, age_every=0)
    ids = np.repeat(np.array([0, 1], np.int32), MAX_COUNT + 5)
    ids = np.append(ids, np.int32(0))
    cache.replay(ids, np.array([0, len(ids)], np.int64), np.ones(2, np.int64))
    assert cache.order().tolist() == [1, 0]  # both are at the end: time decides
    assert (cache._key >> COUNT_SHIFT).tolist() == [MAX_COUNT] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize("age_shift", [1, 2, 15])
@pytest.mark.parametrize("age_every", [0, 1, 2, 7, 60, 400])
def test_parameters_agree_with_the_reference(age_every: int, age_shift: int, equal_sizes: bool) -> None:
    assert_agrees("lfu_aging", age_every, equal_sizes=equal_sizes, age_every=age_every, age_shift=age_shift)


def test_parameters_that_cannot_work() -> None:
    for knob, value in (("age_every", -1), ("age_every", 0.5), ("age_shift", 0), ("age_shift", 16)):
        with pytest.raises(ConfigError, match=f"{knob} is {value}; it is a whole number"):
            make_policy("lfu_aging", 8, 4, **{knob: value})


def test_the_unit_does_not_matter() -> None:
    assert_scale_free("lfu_aging", age_every=500)


@needs_libcachesim
@pytest.mark.parametrize("capacity", [1, 7, 40, 150])
def test_without_aging_it_is_lfu(capacity: int) -> None:
    """Hit for hit libCacheSim's LFU, which breaks ties by recency too."""
    rng = np.random.default_rng(capacity)
    ids = (rng.zipf(1.2, 20_000) % 300).astype(np.int32)
    policy = make_policy("lfu_aging", 300, capacity, age_every=0)
    outcome = policy.replay(ids, np.array([0, len(ids)], np.int64), np.ones(300, np.int64))
    assert np.count_nonzero(outcome == 1) == block_hits("lfu", ids, capacity)
