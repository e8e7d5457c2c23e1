"""LIRS: a trace by hand after section 3 of the paper, and the choices that the paper leaves."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.policy import CheckedPolicy
from knob_kit import assert_agrees, assert_scale_free
from kvstrata.errors import ConfigError
from kvstrata.policies import make_policy
from kvstrata.policies.base import HIT
from kvstrata.policies.lirs import GHOST, LIR, QUEUED, STACKED, Lirs
from kvstrata.policies.lists import ring_order

A, D, B, C, E = range(5)


def lirs(capacity: int, sizes: list[int] | None = None) -> CheckedPolicy:
    return CheckedPolicy("lirs", 16, capacity, sizes or [1] * 16)


def one(checked: CheckedPolicy, index: int) -> bool:
    return checked.access([index], [True]).hits == [True]


def places(checked: CheckedPolicy, place: int) -> set[int]:
    return set(np.flatnonzero(checked.policy.where == place).tolist())


def stack(checked: CheckedPolicy) -> list[int]:
    """S, bottom first."""
    assert isinstance(checked.policy, Lirs)
    out = np.zeros(16, np.int32)
    return out[: ring_order(checked.policy._stack, 16, out)].tolist()


def test_a_trace_by_hand() -> None:
    """Cache of 3: 2 LIR, 1 HIR. S bottom first, a ghost in brackets."""
    cache = lirs(3)
    assert not one(cache, A) and not one(cache, D)  # the LIR part has room
    assert places(cache, LIR) == {A, D}

    assert not one(cache, B)  # HIR. S: A D B, Q: B
    assert (stack(cache), places(cache, STACKED)) == ([A, D, B], {B})

    answer = cache.access([C], [True])  # B leaves Q and stays in S: A D (B) C, Q: C
    assert (answer.evicted, answer.forgotten) == ([B], [])
    assert (stack(cache), places(cache, GHOST)) == ([A, D, B, C], {B})

    # C leaves; B is in S, so LIR; A from the bottom goes to Q. S: D (C) B, Q: A
    assert cache.access([B], [True]).evicted == [C]
    assert stack(cache) == [D, C, B]
    assert (places(cache, LIR), places(cache, QUEUED), places(cache, GHOST)) == ({B, D}, {A}, {C})

    assert one(cache, A)  # HIR and not in S: stays HIR. S: D (C) B A, Q: A
    assert (stack(cache), places(cache, STACKED)) == ([D, C, B, A], {A})

    answer = cache.access([D], [True])  # LIR from the bottom: C is pruned. S: B A D
    assert (answer.hits, answer.forgotten) == ([True], [C])
    assert stack(cache) == [B, A, D]

    assert one(cache, A)  # HIR and in S: LIR; B from the bottom goes to Q. S: D A, Q: B
    assert (stack(cache), places(cache, LIR), places(cache, QUEUED)) == ([D, A], {A, D}, {B})

    answer = cache.access([E], [True])  # B leaves and is not in S: forgotten. S: D A E, Q: E
    assert (answer.evicted, answer.forgotten) == ([B], [B])
    assert (stack(cache), cache.policy.order().tolist()) == ([D, A, E], [E, D, A])


def test_a_loop_larger_than_the_cache_hits_in_its_lir_blocks() -> None:
    """12 blocks in turn, 9 LIR and 1 HIR: LRU would never hit, LIRS hits 9 of 12."""
    policy = make_policy("lirs", 12, 10)
    loop = np.tile(np.arange(12, dtype=np.int32), 5)
    hits = policy.replay(loop, np.array([0, 60], np.int64), np.ones(12, np.int64)) == HIT
    assert hits.reshape(5, 12).sum(axis=1).tolist() == [0, 9, 9, 9, 9]


def test_ghosts_weigh_at_most_the_capacity() -> None:
    cache = lirs(4)  # LIR 0, 1, 2; one HIR at a time
    for block in (0, 1, 2, 3, 4, 5, 6, 7):
        one(cache, block)
    assert places(cache, GHOST) == {3, 4, 5, 6}
    assert cache.access([8], [True]).forgotten == [3]  # the paper would go on to keep it
    assert stack(cache) == [0, 1, 2, 4, 5, 6, 7, 8]


def test_where_the_queue_is_pinned_the_lowest_lir_block_leaves() -> None:
    cache = lirs(3)
    cache.access([A, D, B], [True] * 3)
    cache.pin([A, B])
    answer = cache.access([C], [True])
    assert (answer.evicted, answer.forgotten) == ([D], [D])
    assert places(cache, LIR) == {A}


def test_a_removal_leaves_the_others_known_until_the_next_call() -> None:
    cache = lirs(3)
    cache.access([A, D, B, C], [True] * 4)  # S: A D (B) C
    cache.remove([A, D])
    assert cache.known() == {B, C}
    answer = cache.access([], [])  # no LIR block is left, so S is pruned to nothing
    assert (answer.evicted, answer.forgotten) == ([], [B])
    assert (stack(cache), cache.residents()) == ([], {C})
    assert not one(cache, A) and places(cache, LIR) == {A}  # there is room for LIR blocks again


def test_the_hir_share() -> None:
    policy = make_policy("lirs", 16, 10, hir=0.4)
    policy.replay(np.arange(10, dtype=np.int32), np.array([0, 10], np.int64), np.ones(16, np.int64))
    assert np.flatnonzero(policy.where == LIR).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match=r"hir is 1\.5"):
        make_policy("lirs", 16, 10, hir=1.5)


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize("hir", [0.0, 0.2, 0.6, 1.0])
def test_other_shares_agree_with_the_reference(hir: float, equal_sizes: bool) -> None:
    assert_agrees("lirs", 5, equal_sizes=equal_sizes, hir=hir)


def test_equal_sizes_are_blocks() -> None:
    assert_scale_free("lirs")
