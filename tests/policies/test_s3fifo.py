"""S3-FIFO: a trace by hand after algorithm 1 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.s3fifo import GHOST, MAIN, SMALL


def s3fifo(capacity: int, sizes: list[int] | None = None) -> CheckedPolicy:
    return CheckedPolicy("s3fifo", 16, capacity, sizes or [1] * 16)


def queues(checked: CheckedPolicy) -> tuple[dict[int, int], dict[int, int], set[int]]:
    """S and M with their frequencies, and G."""
    where = dict(enumerate(checked.policy.where.tolist()))
    return (
        {index: place - SMALL for index, place in where.items() if SMALL <= place < MAIN},
        {index: place - MAIN for index, place in where.items() if place >= MAIN},
        {index for index, place in where.items() if place == GHOST},
    )


def each(checked: CheckedPolicy, *pages: int) -> list[bool]:
    return [checked.access([page], [True]).hits[0] for page in pages]


def test_a_trace_by_hand() -> None:
    """10 blocks: 1 in S, names of 9 in G."""
    cache = s3fifo(10)
    each(cache, *range(10))  # S has its share with 0; until something is evicted the others go to M
    assert queues(cache) == ({0: 0}, dict.fromkeys(range(1, 10), 0), set())

    assert all(each(cache, 0, 1))  # hits only count
    answer = cache.access([10], [True])  # S gives: one hit is not enough for 0 to stay
    assert (answer.evicted, answer.forgotten) == ([0], [])
    assert queues(cache) == ({10: 0}, {1: 1} | dict.fromkeys(range(2, 10), 0), {0})

    assert all(each(cache, 10, 10))
    answer = cache.access([11], [True])  # 10 moves to M and starts at 0; M reinserts 1, and 2 leaves
    assert (answer.evicted, answer.forgotten) == ([2], [2])
    assert cache.policy.order().tolist() == [11, 3, 4, 5, 6, 7, 8, 9, 10, 1]
    assert queues(cache)[1][10] == queues(cache)[1][1] == 0

    answer = cache.access([0], [True])  # a ghost enters M; S gives 11 for it
    assert answer.evicted == [11]
    assert cache.policy.order().tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 1, 0]
    assert queues(cache)[2] == {11}

    answer = cache.access([12], [True])  # S is below its share: M gives
    assert answer.evicted == [3]
    assert cache.policy.order().tolist() == [12, 4, 5, 6, 7, 8, 9, 10, 1, 0]


def test_a_frequency_ends_at_three() -> None:
    cache = s3fifo(10)
    each(cache, *[0] * 8, *[1] * 8)
    assert queues(cache)[:2] == ({0: 3}, {1: 3})


def test_after_the_first_eviction_newcomers_enter_s() -> None:
    cache = s3fifo(10)
    each(cache, *range(11))
    cache.remove([1, 2, 3])
    each(cache, 11, 12, 13)  # there is room again
    assert set(queues(cache)[0]) == {10, 11, 12, 13}


def test_pinned_blocks_are_passed_over() -> None:
    cache = s3fifo(10)
    each(cache, *range(11))  # S: 10; M: 1 to 9
    cache.pin([10, 1])
    assert cache.access([11], [True]).evicted == [2]  # all of S is pinned, so is the oldest of M
    cache.pin([11, *range(3, 10)])
    assert cache.access([12], [True]).evicted == []
    assert not cache.policy.resident(12)


def test_sizes_count() -> None:
    cache = s3fifo(20, [2, 5, 5, 8, 18, 1] + [1] * 10)  # S has its share with 2; G remembers 18
    each(cache, 0, 1, 2, 3)
    assert queues(cache)[:2] == ({0: 0}, {1: 0, 2: 0, 3: 0})
    answer = cache.access([4], [True])  # 18: first S gives, then M till it fits
    assert (answer.evicted, answer.forgotten) == ([0, 1, 2, 3], [1, 2, 3])
    assert queues(cache) == ({4: 0}, {}, {0})
    cache.access([5, 6, 7], [True] * 3)
    assert queues(cache) == ({5: 0, 6: 0, 7: 0}, {}, {4})  # 2 + 18 are too much to remember


def test_the_parameters() -> None:
    sizes = np.ones(16, np.int64)
    ids = np.array([*range(10), 0, 10, 0], np.int32)
    starts = np.arange(len(ids) + 1, dtype=np.int64)
    eager = make_policy("s3fifo", 16, 10, threshold=1)
    assert eager.replay(ids, starts, sizes)[-1] == 1  # one hit was enough for 0 to move to M
    forgetful = make_policy("s3fifo", 16, 10, ghost=0)
    forgetful.replay(ids, starts, sizes)
    assert SMALL <= forgetful.where[0] < MAIN
    large = make_policy("s3fifo", 16, 10, small=1)
    large.replay(ids[:10], starts[:11], sizes)
    assert (large.where[:10] == SMALL).all()
    for knob, value, wanted in (("small", 2, "share"), ("ghost", -1, "share"), ("threshold", 1.5, "whole")):
        with pytest.raises(ConfigError, match=f"{knob} is {value}; it is a {wanted}"):
            make_policy("s3fifo", 16, 10, **{knob: value})
    with pytest.raises(ConfigError, match="threshold is 4"):
        make_policy("s3fifo", 16, 10, threshold=4)
