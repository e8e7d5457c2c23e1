"""Doubly linked lists in two arrays: node i has prev[i] and next[i]; a list is a ring around its sentinel.

next[sentinel] is the most recent node, prev[sentinel] the least recent one. All operations are O(1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstrata.policies.jit import inlined, kernel

Ints = NDArray[np.int64]


def make_rings(max_ids: int, rings: int) -> tuple[Ints, Ints]:
    """prev and next for ids 0..max_ids-1 and `rings` empty lists with sentinels max_ids, max_ids+1, ..."""
    nodes = np.arange(max_ids + rings, dtype=np.int64)
    return nodes.copy(), nodes.copy()


@inlined
def unlink(prev: Ints, nxt: Ints, node: int) -> None:
    before, after = prev[node], nxt[node]
    nxt[before] = after
    prev[after] = before


@inlined
def push_recent(prev: Ints, nxt: Ints, sentinel: int, node: int) -> None:
    first = nxt[sentinel]
    prev[node] = sentinel
    nxt[node] = first
    nxt[sentinel] = node
    prev[first] = node


@kernel
def coldest_unpinned(prev: Ints, pins: NDArray[np.int32], sentinel: int) -> int:
    """Least recent node without pins, or -1. Costs one step per pinned node at the cold end."""
    node = prev[sentinel]
    while node != sentinel and pins[node] > 0:
        node = prev[node]
    return -1 if node == sentinel else int(node)


@kernel
def ring_order(prev: Ints, sentinel: int, out: Ints) -> int:
    """Write the ids of one list to out, coldest first; return how many."""
    count = 0
    node = prev[sentinel]
    while node != sentinel:
        out[count] = node
        count += 1
        node = prev[node]
    return count
