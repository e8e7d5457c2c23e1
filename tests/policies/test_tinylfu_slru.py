"""TinyLFU with a segmented LRU: traces by hand, the sketch, and the parameters."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from knob_kit import assert_agrees, assert_scale_free
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.base import Policy
from kvstrata.policies.tinylfu_slru import COUNTED, PROBATION, PROTECTED, TinyLfuSlru, _estimate
from reference.tinylfu_slru import digest_of


def tinylfu(capacity: int, sizes: list[int] | None = None, **knobs: float) -> CheckedPolicy:
    checked = CheckedPolicy("tinylfu_slru", 16, capacity, sizes or [1] * 16)
    checked.policy = make_policy("tinylfu_slru", 16, capacity, **knobs)
    return checked


def each(checked: CheckedPolicy, *pages: int) -> list[int]:
    """One access after another; returns what was evicted."""
    evicted = []
    for page in pages:
        evicted += checked.access([page], [True]).evicted
    return evicted  # type: ignore[return-value]


def segments(checked: CheckedPolicy) -> tuple[list[int], list[int]]:
    """Probation and protected, least recent first."""
    order = checked.policy.order()
    place = checked.policy.where[order]
    return order[place == PROBATION].tolist(), order[place == PROTECTED].tolist()


def estimate(policy: Policy, index: int) -> int:
    assert isinstance(policy, TinyLfuSlru)
    return int(_estimate(index, policy.digest, policy._sketch))


def test_a_trace_by_hand() -> None:
    """Five blocks, three of them protected."""
    cache = tinylfu(5, prob_frac=0.4)
    each(cache, 0, 1, 2, 3, 4)  # there is room: everybody comes in
    assert segments(cache) == ([0, 1, 2, 3, 4], [])
    each(cache, 0, 1, 2)
    assert segments(cache) == ([3, 4], [0, 1, 2])
    each(cache, 3)  # a fourth one: 0 goes back
    assert segments(cache) == ([4, 0], [1, 2, 3])
    assert each(cache, 5) == []  # once, as 4: not more
    assert not cache.policy.resident(5)
    assert each(cache, 5) == [4]  # twice
    assert segments(cache) == ([0, 5], [1, 2, 3])
    assert each(cache, 6, 6) == []  # 0 was there twice
    assert each(cache, 6) == [0]
    assert segments(cache) == ([5, 6], [1, 2, 3])
    assert [estimate(cache.policy, page) for page in range(7)] == [2, 2, 2, 2, 1, 2, 3]


def test_a_sample_is_a_multiple_of_the_blocks_that_fit() -> None:
    cache = tinylfu(20, [10] * 16, sample=2)  # two blocks fit: the fourth access ends a sample
    each(cache, 0, 0, 0)
    assert estimate(cache.policy, 0) == 3
    each(cache, 0)
    assert estimate(cache.policy, 0) == 2
    assert cache.policy._state[COUNTED] == 2  # type: ignore[attr-defined]
    each(cache, 0, 1)
    assert [estimate(cache.policy, page) for page in (0, 1)] == [1, 0]


def test_a_counter_ends_at_fifteen() -> None:
    cache = tinylfu(5)
    each(cache, *[0] * 20)
    assert estimate(cache.policy, 0) == 15


def test_what_may_not_come_in_is_not_counted() -> None:
    cache = tinylfu(4, [1, 5] + [1] * 14)
    cache.access([0], [False])
    each(cache, 1)
    assert [estimate(cache.policy, page) for page in (0, 1)] == [0, 0]
    each(cache, 0)
    cache.access([0], [False])  # but a hit is
    assert estimate(cache.policy, 0) == 2


def test_a_newcomer_must_win_against_all_who_would_leave() -> None:
    cache = tinylfu(10, [4, 4, 2, 6] + [1] * 12)
    each(cache, 0, 1, 2, 1, 2)
    assert segments(cache) == ([0], [1, 2])
    assert each(cache, 3) == []
    assert each(cache, 3) == []  # more often than 0, but not than 1, and both must go
    assert cache.residents() == {0, 1, 2}
    assert each(cache, 3) == [0, 1]
    assert segments(cache) == ([3], [2])


def test_pinned_blocks_are_passed_over() -> None:
    cache = tinylfu(2, prob_frac=0.5)
    each(cache, 0, 1, 0)
    assert segments(cache) == ([1], [0])
    cache.pin([1])
    assert each(cache, 2, 2) == []
    assert each(cache, 2) == [0]  # probation has only 1: the protected segment gives
    cache.pin([2])
    assert each(cache, 3, 3, 3, 3, 3) == []


def test_a_smaller_capacity_evicts_whatever_the_frequency() -> None:
    cache = tinylfu(5, prob_frac=0.4)
    each(cache, 0, 1, 2, 3, 4, 0, 1, 2)
    assert cache.resize(3).evicted == [3, 4]
    assert segments(cache) == ([0], [1, 2])  # two may be protected: 0 went back
    assert cache.resize(1).evicted == [0, 1]
    assert segments(cache) == ([], [2])


def test_a_frequency_belongs_to_the_digest_and_not_to_the_id() -> None:
    policy = make_policy("tinylfu_slru", 8, 4)
    assert policy.digest.tolist() == [digest_of(index) for index in range(8)]
    ids = np.array([0, 0, 0], np.int32)
    policy.replay(ids, np.array([0, 3], np.int64), np.ones(8, np.int64))
    policy.digest[[0, 5]] = policy.digest[[5, 0]]
    assert (estimate(policy, 0), estimate(policy, 5)) == (0, 3)


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {"prob_frac": 0},
        {"prob_frac": 0.5},
        {"prob_frac": 1},
        {"sample": 1},
        {"cms_width": 1},
        {"cms_width": 32, "sample": 5, "prob_frac": 0.8},
        {"cms_width": 65_536},
    ],
    ids=str,
)
def test_parameters_agree_with_the_reference(knobs: dict[str, float], equal_sizes: bool) -> None:
    assert_agrees("tinylfu_slru", 3, equal_sizes=equal_sizes, **knobs)


def test_parameters_that_cannot_work() -> None:
    for knob, value in (("cms_width", 0), ("cms_width", 0.5), ("sample", 0)):
        with pytest.raises(ConfigError, match=f"{knob} is {value}; it is a whole number"):
            make_policy("tinylfu_slru", 8, 4, **{knob: value})
    with pytest.raises(ConfigError, match="cms_width is 1000; it is a power of two"):
        make_policy("tinylfu_slru", 8, 4, cms_width=1000)
    with pytest.raises(ConfigError, match="prob_frac is 2; it is a share"):
        make_policy("tinylfu_slru", 8, 4, prob_frac=2)


def test_the_unit_does_not_matter() -> None:
    assert_scale_free("tinylfu_slru")
