"""ARC: a trace by hand after figure 4 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

from contracts.policy import CheckedPolicy
from kvstrata.policies.arc import B1, B2, T1, T2, Arc


def arc(capacity: int, sizes: list[int] | None = None) -> CheckedPolicy:
    return CheckedPolicy("arc", 16, capacity, sizes or [1] * 16)


def lists(checked: CheckedPolicy) -> dict[int, set[int]]:
    where = checked.policy.where.tolist()
    return {part: {i for i, place in enumerate(where) if place == part} for part in (T1, T2, B1, B2)}


def target(checked: CheckedPolicy) -> float:
    assert isinstance(checked.policy, Arc)
    return float(checked.policy._target[0])


def one(checked: CheckedPolicy, index: int) -> bool:
    return checked.access([index], [True]).hits == [True]


def test_a_trace_by_hand() -> None:
    """c = 3. Comments name the case of figure 4."""
    cache = arc(3)
    for page in (0, 1, 2):
        assert not one(cache, page)  # IV, room left
    assert lists(cache) == {T1: {0, 1, 2}, T2: set(), B1: set(), B2: set()}

    assert one(cache, 0)  # I: to T2
    assert lists(cache) == {T1: {1, 2}, T2: {0}, B1: set(), B2: set()}

    assert not one(cache, 3)  # IV B: |L1| = 2 < c, cache full, |T1| > p = 0: 1 goes to B1
    assert lists(cache) == {T1: {2, 3}, T2: {0}, B1: {1}, B2: set()}

    assert not one(cache, 1)  # II: p = 1, REPLACE takes T1's 2, and 1 goes to T2
    assert target(cache) == 1
    assert lists(cache) == {T1: {3}, T2: {0, 1}, B1: {2}, B2: set()}

    assert not one(cache, 4)  # IV B: |T1| = 1 is not above p = 1, so T2's LRU page 0 goes to B2
    assert lists(cache) == {T1: {3, 4}, T2: {1}, B1: {2}, B2: {0}}

    assert not one(cache, 0)  # III: p = 0, REPLACE takes T1's 3, and 0 goes to T2
    assert target(cache) == 0
    assert lists(cache) == {T1: {4}, T2: {0, 1}, B1: {2, 3}, B2: set()}

    answer = cache.access([5], [True])  # IV A: |L1| = c: B1 forgets 2, REPLACE sends 4 to B1
    assert (answer.evicted, answer.forgotten) == ([4], [2])
    assert lists(cache) == {T1: {5}, T2: {0, 1}, B1: {3, 4}, B2: set()}


def test_once_seen_pages_leave_without_a_ghost_when_t1_fills_the_cache() -> None:
    cache = arc(3)
    for page in (0, 1, 2):
        one(cache, page)
    answer = cache.access([3], [True])  # IV A, B1 empty: the LRU page of T1 is deleted
    assert (answer.evicted, answer.forgotten) == ([0], [0])
    assert lists(cache) == {T1: {1, 2, 3}, T2: set(), B1: set(), B2: set()}


def test_the_target_moves_by_the_ratio_of_the_ghosts() -> None:
    cache = arc(4)
    for page in (0, 1, 2, 3):
        one(cache, page)
    for page in (0, 1, 2):
        one(cache, page)  # T1 {3}, T2 {0, 1, 2}
    one(cache, 4)  # 3 to B1
    assert lists(cache) == {T1: {4}, T2: {0, 1, 2}, B1: {3}, B2: set()}
    one(cache, 3)  # p 1; |T1| = 1 is not above it: 0 from T2 to B2
    assert (target(cache), lists(cache)[B2]) == (1, {0})
    one(cache, 5)  # |T1| 1 is not above p 1: 1 from T2 to B2
    one(cache, 6)  # |T1| 2 is above: 4 to B1
    assert lists(cache) == {T1: {5, 6}, T2: {2, 3}, B1: {4}, B2: {0, 1}}
    one(cache, 4)  # delta = |B2| / |B1| = 2
    assert target(cache) == 3


def test_a_second_touch_within_one_request_is_the_same_reference() -> None:
    cache = arc(4)
    cache.access([0, 1], [True] * 2)
    cache.access([0, 1], [True] * 2, same_request=True)
    assert lists(cache)[T1] == {0, 1}
    cache.access([0, 1], [True] * 2)
    assert lists(cache)[T2] == {0, 1}


def test_blocks_of_a_request_are_touched_root_first() -> None:
    cache = arc(4)
    cache.access([3, 1, 2], [True] * 3)
    assert cache.policy.order().tolist() == [3, 1, 2]


def test_where_one_list_is_pinned_the_other_gives() -> None:
    cache = arc(3)
    cache.access([0, 1, 2], [True] * 3)
    cache.access([0], [True])
    cache.pin([1, 2])  # all of T1
    answer = cache.access([3], [True])
    assert answer.evicted == [0]
    assert lists(cache) == {T1: {1, 2, 3}, T2: set(), B1: set(), B2: {0}}


def test_sizes_count_in_bytes() -> None:
    cache = arc(10, [4, 4, 5, 1] + [1] * 12)
    cache.access([0, 1], [True] * 2)
    cache.access([0, 1], [True] * 2)  # T2: 8 bytes
    answer = cache.access([2], [True])  # 5 do not fit beside 8
    assert answer.evicted == [0]
    assert cache.policy.used == 9
    assert not cache.access([0], [True]).hits[0]  # a ghost of 4 bytes in B2: p falls, stays 0
    assert target(cache) == 0
    assert lists(cache) == {T1: set(), T2: {0, 1}, B1: {2}, B2: set()}
    cache.access([2], [True])
    assert target(cache) == 5  # 5 bytes, the ratio of the ghosts being below 1


def test_a_request_that_outgrows_the_cache_forgets_each_id_once() -> None:
    """Its own ghosts are forgotten, come in again and leave again, all in one call."""
    cache = arc(3)
    cache.access([0, 1, 2], [True] * 3)
    cache.access([0], [True])
    cache.access([3, 4], [True] * 2)
    assert lists(cache)[B1] == {2}
    cache.access([5, 6, 7, 2, 8, 9, 10, 11], [True] * 8)  # the contract is checked inside
    assert cache.policy.used == 3
