"""MQ: a trace by hand after section 4 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from knob_kit import assert_agrees, assert_scale_free
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.lists import ring_order
from kvstrata.policies.mq import LIFETIME, Mq


def mq(capacity: int, sizes: list[int] | None = None, **knobs: float) -> CheckedPolicy:
    checked = CheckedPolicy("mq", 16, capacity, sizes or [1] * 16)
    checked.policy = make_policy("mq", 16, capacity, **knobs)
    return checked


def one(checked: CheckedPolicy, index: int) -> bool:
    return checked.access([index], [True]).hits == [True]


def queue(checked: CheckedPolicy, number: int) -> list[int]:
    """Head first; number 8 is Qout."""
    assert isinstance(checked.policy, Mq)
    out = np.zeros(16, np.int32)
    return out[: ring_order(checked.policy._links, 16 + number, out)].tolist()


def test_a_trace_by_hand() -> None:
    """3 blocks, a lifetime of 4. The access at time t ends at t+1, when heads with touch + 4 < t+1 move."""
    cache = mq(3, lifetime=4)
    assert not one(cache, 0) and not one(cache, 1)  # t 0, 1
    assert one(cache, 0)  # t 2: accessed twice, so Q1
    assert not one(cache, 2)  # t 3
    assert (queue(cache, 0), queue(cache, 1)) == ([1, 2], [0])

    assert cache.access([3], [True]).evicted == [1]  # t 4: the head of Q0 goes to Qout
    assert (queue(cache, 0), queue(cache, 1), queue(cache, 8)) == ([2, 3], [0], [1])

    assert cache.access([1], [True]).evicted == [2]  # t 5: Qout remembers one access of 1: Q1
    assert (queue(cache, 0), queue(cache, 1), queue(cache, 8)) == ([3], [0, 1], [2])

    assert one(cache, 3)  # t 6: to Q1; at 7 the lifetime of 0 (touched at 2) is over: to Q0
    assert (queue(cache, 0), queue(cache, 1)) == ([0], [1, 3])

    assert cache.access([4], [True]).evicted == [0]  # t 7
    assert (queue(cache, 0), queue(cache, 1), queue(cache, 8)) == ([4], [1, 3], [2, 0])

    assert cache.access([0], [True]).evicted == [4]  # t 8: its third access
    assert (queue(cache, 0), queue(cache, 1), queue(cache, 8)) == ([], [1, 3, 0], [2, 4])

    assert one(cache, 0)  # t 9: its fourth: Q2; 1 (touched at 5) is due, 3 (at 6) is not
    assert [queue(cache, number) for number in (0, 1, 2)] == [[1], [3], [0]]

    assert cache.policy.order().tolist() == [1, 3, 0]


def test_qout_forgets_the_oldest_beyond_one_capacity() -> None:
    cache = mq(2)
    for block in (0, 1, 2, 3):
        one(cache, block)
    assert queue(cache, 8) == [0, 1]
    assert cache.access([4], [True]).forgotten == [0]
    assert (queue(cache, 8), cache.policy.order().tolist()) == ([1, 2], [3, 4])


def test_the_newcomer_is_looked_up_before_qout_is_cut() -> None:
    cache = mq(2)
    for block in (0, 1, 2, 3):
        one(cache, block)
    assert cache.access([0], [True]).forgotten == []  # 2 comes into Qout, 0 out of it
    assert (queue(cache, 1), queue(cache, 8)) == ([0], [1, 2])


def test_one_queue_is_lru() -> None:
    rng = np.random.default_rng(2)
    ids = (rng.zipf(1.2, 5_000) % 100).astype(np.int32)
    starts, sizes = np.array([0, len(ids)], np.int64), np.ones(100, np.int64)
    single = make_policy("mq", 100, 20, queues=1)
    plain = make_policy("lru_forward", 100, 20)
    assert single.replay(ids, starts, sizes).tolist() == plain.replay(ids, starts, sizes).tolist()
    assert single.order().tolist() == plain.order().tolist()


def test_the_default_lifetime_is_the_number_of_blocks_that_fit() -> None:
    for sizes, expected in (([2] * 16, 5), ([1, 4, 4] + [3] * 13, 3)):
        cache = mq(10, sizes)
        cache.access([0, 1, 2], [True] * 3)
        assert isinstance(cache.policy, Mq)
        assert cache.policy._state[LIFETIME] == expected  # 10 // 2, 10 // (9 // 3)
    assert mq(10, lifetime=7).access([0, 1], [True] * 2).hits == [False, False]


def test_nothing_is_remembered_without_qout() -> None:
    cache = mq(2, ghosts=0)
    for block in (0, 0, 1, 2, 3):
        one(cache, block)
    assert cache.known() == cache.residents()


@pytest.mark.parametrize(
    ("knob", "value"),
    [("queues", 0), ("queues", 33), ("lifetime", -1), ("lifetime_capacities", 0), ("ghosts", 1.5)],
)
def test_parameters_that_cannot_work(knob: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{knob} is {value}"):
        make_policy("mq", 8, 4, **{knob: value})


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize(
    "knobs",
    [
        {"lifetime": 1},
        {"lifetime": 3},
        {"queues": 1},
        {"queues": 3, "lifetime": 9},
        {"lifetime_capacities": 4.0},
        {"lifetime_capacities": 0.1, "ghosts": 0.5},
        {"ghosts": 0},
    ],
    ids=str,
)
def test_other_parameters_agree_with_the_reference(knobs: dict[str, float], equal_sizes: bool) -> None:
    assert_agrees("mq", 6, equal_sizes=equal_sizes, **knobs)


def test_equal_sizes_are_blocks() -> None:
    assert_scale_free("mq")
