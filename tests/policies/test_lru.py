"""Leaf-first LRU: a trace by hand, and what it promises to prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.policy import CheckedPolicy


def all_of(ids: Sequence[int]) -> list[bool]:
    return [True] * len(ids)


def test_a_trace_by_hand() -> None:
    """Four places; a tree with root 0, branches 0-1-2 and 0-3-4, and another root 5."""
    lru = CheckedPolicy("lru", 8, 4, [1] * 8)

    lru.access([0, 1, 2], [True] * 3)
    assert lru.policy.order().tolist() == [2, 1, 0]  # leaves first, the root is the most recent

    answer = lru.access([0, 3, 4], [True] * 3)
    assert answer.hits == [True, False, False]
    assert answer.evicted == [2]  # 4 takes the free place, 3 takes the oldest leaf's
    assert lru.policy.order().tolist() == [1, 4, 3, 0]

    answer = lru.access([5], [True])
    assert answer.evicted == [1]
    assert lru.policy.order().tolist() == [4, 3, 0, 5]

    answer = lru.access([0, 1, 2], [True] * 3)
    assert answer.hits == [True, False, False]
    assert answer.evicted == [4, 3]  # the cold branch goes leaf first; 0 was held for its own request
    assert lru.policy.order().tolist() == [5, 2, 1, 0]
    assert answer.forgotten == answer.evicted


def test_a_chain_longer_than_the_cache_keeps_its_root() -> None:
    lru = CheckedPolicy("lru", 8, 3, [1] * 8)
    assert lru.access(range(6), [True] * 6).evicted == [5, 4, 3]
    assert lru.policy.order().tolist() == [2, 1, 0]


def test_a_request_does_not_evict_what_it_hit() -> None:
    lru = CheckedPolicy("lru", 12, 4, [1] * 12)
    lru.access([0, 1], [True] * 2)
    lru.access([8, 9], [True] * 2)
    answer = lru.access([8, 2, 3, 9], [True] * 4)
    assert answer.hits == [True, False, False, True]
    assert lru.policy.order().tolist() == [9, 3, 2, 8]


def test_a_pinned_leaf_stays_and_the_next_one_goes() -> None:
    lru = CheckedPolicy("lru", 8, 3, [1] * 8)
    lru.access([0, 1, 2], [True] * 3)
    lru.pin([2])
    assert lru.access([5], [True]).evicted == [1]
    assert lru.policy.order().tolist() == [2, 0, 5]


def test_a_touch_without_admission_refreshes_what_is_there() -> None:
    lru = CheckedPolicy("lru", 8, 3, [1] * 8)
    lru.access([0], [True])
    lru.access([1], [True])
    lru.access([0, 7], [False, False])
    assert lru.policy.order().tolist() == [1, 0]


def test_resize_evicts_the_coldest() -> None:
    lru = CheckedPolicy("lru", 8, 6, [1, 2, 3, 1, 1, 1, 1, 1])
    lru.access([0, 1, 2], [True] * 3)
    assert lru.resize(3).evicted == [2]
    assert lru.policy.order().tolist() == [1, 0]


def random_tree(rng: np.random.Generator, nodes: int) -> list[list[int]]:
    """For every node of a random tree, the chain from its root."""
    chains: list[list[int]] = []
    for node in range(nodes):
        if node == 0 or rng.random() < 0.05:
            chains.append([node])
        else:
            chains.append([*chains[int(rng.integers(max(0, node - 20), node))], node])
    return chains


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 7, 40, 150])
def test_no_child_is_stranded(seed: int, capacity: int) -> None:
    """Requests that are whole chains: what is resident of one is always its beginning."""
    rng = np.random.default_rng(seed)
    nodes = 300
    chains = random_tree(rng, nodes)
    parent = {chain[-1]: chain[-2] for chain in chains if len(chain) > 1}
    lru = CheckedPolicy("lru", nodes, capacity, [1] * nodes)
    hits = 0
    for _ in range(400):
        chain = chains[int(rng.integers(nodes))]
        answer = lru.access(chain, all_of(chain))
        prefix = (*answer.hits, False).index(False)
        assert prefix == sum(answer.hits), "a block was resident behind a missing one"
        hits += prefix
        residents = lru.residents()
        assert all(parent[node] in residents for node in residents if node in parent)
    assert hits > 0


@given(
    chains=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=30),
    capacity=st.integers(1, 20),
)
def test_no_child_is_stranded_in_any_tree(chains: list[list[int]], capacity: int) -> None:
    """A chain is a path of choices: equal beginnings are the same blocks."""
    ids: dict[tuple[int, ...], int] = {}
    lru = CheckedPolicy("lru", 200, capacity, [1] * 200)
    for path in chains:
        chain = [
            ids.setdefault(tuple(path[: depth + 1]), len(ids))
            for depth in range(len(path))
        ]  # fmt: skip
        answer = lru.access(chain, all_of(chain))
        assert (*answer.hits, False).index(False) == sum(answer.hits)
