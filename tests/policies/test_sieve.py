"""SIEVE: a trace by hand after algorithm 1 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

import numpy as np

from contracts.policy import CheckedPolicy
from kvstrata.policies.sieve import VISITED


def sieve(capacity: int, sizes: list[int] | None = None) -> CheckedPolicy:
    return CheckedPolicy("sieve", 12, capacity, sizes or [1] * 12)


def visited(checked: CheckedPolicy) -> set[int]:
    return set(np.flatnonzero(checked.policy.where == VISITED).tolist())


def each(checked: CheckedPolicy, *pages: int) -> list[bool]:
    return [checked.access([page], [True]).hits[0] for page in pages]


def evicted(checked: CheckedPolicy, page: int) -> list[object]:
    return list(checked.access([page], [True]).evicted)


def test_a_trace_by_hand() -> None:
    """3 blocks. The queue is written oldest first, ^ before the block at the hand, * after visited ones."""
    cache = sieve(3)
    assert each(cache, 0, 1, 2, 0) == [False, False, False, True]
    assert visited(cache) == {0}  # 0* 1 2

    assert evicted(cache, 3) == [1]  # 0 loses its mark, 1 leaves: 0 ^2 3
    assert visited(cache) == set()
    assert cache.policy.order().tolist() == [2, 3, 0]

    assert each(cache, 2) == [True]  # 0 ^2* 3
    assert evicted(cache, 4) == [3]  # 2 loses its mark; 3, the newest, leaves: ^0 2 4, the hand begins anew
    assert cache.policy.order().tolist() == [0, 2, 4]

    assert evicted(cache, 5) == [0]  # ^2 4 5
    assert all(each(cache, 2, 4, 5))  # ^2* 4* 5*
    assert evicted(cache, 6) == [2]  # once around, then 2: ^4 5 6
    assert visited(cache) == set()


def test_the_order_is_that_of_two_rounds() -> None:
    cache = sieve(5)
    each(cache, 0, 1, 2, 3, 4, 0, 3)
    assert evicted(cache, 5) == [1]  # 0 ^2 3* 4 5
    assert cache.policy.order().tolist() == [2, 4, 5, 0, 3]


def test_a_block_removed_at_the_hand_hands_it_on() -> None:
    cache = sieve(4)
    each(cache, 0, 1, 2, 3)
    assert evicted(cache, 4) == [0]  # ^1 2 3 4
    cache.remove([2])  # not at the hand
    cache.remove([1])  # ^3 4
    each(cache, 5, 6)  # ^3 4 5 6
    assert evicted(cache, 7) == [3]
    cache.remove([4, 5, 6, 7])
    each(cache, 8, 9, 10, 11)
    assert evicted(cache, 0) == [8]


def test_the_hand_passes_over_pinned_blocks() -> None:
    cache = sieve(3)
    each(cache, 0, 1, 2)
    cache.pin([0])
    assert evicted(cache, 3) == [1]
    each(cache, 2, 3)
    cache.pin([2, 3])
    assert evicted(cache, 4) == []  # nothing may leave; the marks are gone
    assert visited(cache) == set()
    cache.unpin([0, 2, 3])
    assert evicted(cache, 5) == [2]  # the hand is where it was


def test_sizes_count() -> None:
    cache = sieve(10, [4, 3, 3, 7] + [1] * 8)
    each(cache, 0, 1, 2, 0)
    assert evicted(cache, 3) == [1, 2, 0]  # 7: three blocks leave, 0 in the second round
    assert cache.policy.used == 7
