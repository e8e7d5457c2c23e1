"""2Q: a trace by hand after section 2.2 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.twoq import A1IN, A1OUT, AM


def twoq(capacity: int, sizes: list[int] | None = None) -> CheckedPolicy:
    return CheckedPolicy("twoq", 16, capacity, sizes or [1] * 16)


def lists(checked: CheckedPolicy) -> tuple[set[int], set[int], set[int]]:
    """A1in, Am and A1out."""
    where = checked.policy.where
    a1in, am, a1out = (set(np.flatnonzero(where == place).tolist()) for place in (A1IN, AM, A1OUT))
    return a1in, am, a1out


def each(checked: CheckedPolicy, *pages: int) -> list[bool]:
    return [checked.access([page], [True]).hits[0] for page in pages]


def test_a_trace_by_hand() -> None:
    """8 pages: Kin = 2, Kout = 4."""
    cache = twoq(8)
    assert not any(each(cache, *range(8)))  # free pages first, whatever Kin
    assert lists(cache) == ({0, 1, 2, 3, 4, 5, 6, 7}, set(), set())

    assert each(cache, 0, 8) == [True, False]  # a hit in A1in changes nothing: 0 is still the oldest
    assert lists(cache) == ({1, 2, 3, 4, 5, 6, 7, 8}, set(), {0})

    assert each(cache, 0) == [False]  # known in A1out: to Am, and 1 leaves A1in for it
    assert lists(cache) == ({2, 3, 4, 5, 6, 7, 8}, {0}, {1})

    each(cache, 9, 10, 11)
    assert lists(cache) == ({5, 6, 7, 8, 9, 10, 11}, {0}, {1, 2, 3, 4})

    answer = cache.access([12], [True])  # A1out is full: its oldest name, 1, is forgotten
    assert (answer.evicted, answer.forgotten) == ([5], [1])
    assert lists(cache) == ({6, 7, 8, 9, 10, 11, 12}, {0}, {2, 3, 4, 5})

    answer = cache.access([2], [True])  # 2 gives its place in A1out to 6: nothing is forgotten
    assert (answer.evicted, answer.forgotten) == ([6], [])
    assert lists(cache) == ({7, 8, 9, 10, 11, 12}, {0, 2}, {3, 4, 5, 6})

    each(cache, 3, 4, 5, 6)
    assert lists(cache) == ({11, 12}, {0, 2, 3, 4, 5, 6}, {7, 8, 9, 10})
    assert cache.policy.order().tolist() == [11, 12, 0, 2, 3, 4, 5, 6]

    assert each(cache, 0) == [True]  # Am is LRU: 2 is the oldest now
    answer = cache.access([13], [True])  # A1in is not above Kin: Am gives, and keeps no name of it
    assert (answer.evicted, answer.forgotten) == ([2], [2])
    assert cache.policy.order().tolist() == [11, 12, 13, 3, 4, 5, 6, 0]


def test_where_one_list_is_pinned_the_other_gives() -> None:
    cache = twoq(4)  # Kin = 1, Kout = 2
    each(cache, 0, 1, 2, 3, 4, 0)
    assert lists(cache) == ({2, 3, 4}, {0}, {1})
    cache.pin([2, 3, 4])
    assert cache.access([5], [True]).evicted == [0]
    cache.pin([5])
    assert not cache.access([1], [True]).evicted
    assert lists(cache) == ({2, 3, 4, 5}, set(), {1})


def test_sizes_count() -> None:
    cache = twoq(12, [4, 4, 4, 8, 3] + [1] * 11)  # Kin = 3, Kout = 6
    each(cache, 0, 1, 2)
    answer = cache.access([3], [True])  # 8: two blocks of 4 leave, and only one of their names fits
    assert (answer.evicted, answer.forgotten) == ([0, 1], [0])
    assert lists(cache) == ({2, 3}, set(), {1})


def test_the_parameters() -> None:
    sizes = np.ones(16, np.int64)
    ids = np.array([*range(8), 8, 0], np.int32)  # 0 leaves, and is asked for again
    starts = np.arange(len(ids) + 1, dtype=np.int64)
    nameless = make_policy("twoq", 16, 8, kout=0)
    nameless.replay(ids, starts, sizes)
    assert nameless.where[0] == A1IN
    assert not (nameless.where == A1OUT).any()
    large = make_policy("twoq", 16, 8, kin=1)  # A1in is never above it, so that Am would give
    large.replay(ids, starts, sizes)
    assert large.where[0] == AM
    for knob in ("kin", "kout"):
        with pytest.raises(ConfigError, match=f"{knob} is 1.5; it is a share"):
            make_policy("twoq", 16, 8, **{knob: 1.5})
