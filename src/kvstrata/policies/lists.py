"""Doubly linked lists in one array: node i has links[i, PREV] and links[i, NEXT]; a list is a ring around
its sentinel.

links[sentinel, NEXT] is the most recent node, links[sentinel, PREV] the least recent one. A run is a
row of nodes that are neighbours in one ring; it is cut out and put in as one. All operations are O(1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import inlined, kernel

Ids = NDArray[np.int32]
Links = NDArray[np.int32]

PREV, NEXT = 0, 1


def make_rings(max_ids: int, rings: int) -> Links:
    """Links for ids 0..max_ids-1 and `rings` empty lists with sentinels max_ids, max_ids+1, ..."""
    nodes = np.arange(max_ids + rings, dtype=np.int32)
    return np.column_stack([nodes, nodes])


@inlined
def unlink_run(links: Links, recent: int, old: int) -> None:
    """Cut the run from its most recent to its oldest node out of its ring; the run keeps its own links."""
    before, after = links[recent, PREV], links[old, NEXT]
    links[before, NEXT] = after
    links[after, PREV] = before


@inlined
def push_run(links: Links, sentinel: int, recent: int, old: int) -> None:
    """Put a run in as the most recent part of a ring."""
    first = links[sentinel, NEXT]
    links[recent, PREV] = sentinel
    links[old, NEXT] = first
    links[sentinel, NEXT] = recent
    links[first, PREV] = old


@inlined
def unlink(links: Links, node: int) -> None:
    before, after = links[node, PREV], links[node, NEXT]
    links[before, NEXT] = after
    links[after, PREV] = before


@inlined
def push_recent(links: Links, sentinel: int, node: int) -> None:
    first = links[sentinel, NEXT]
    links[node, PREV] = sentinel
    links[node, NEXT] = first
    links[sentinel, NEXT] = node
    links[first, PREV] = node


@inlined
def coldest_unpinned(links: Links, pins: NDArray[np.int32], sentinel: int) -> int:
    """Least recent node without pins, or -1. Costs one step per pinned node at the cold end."""
    node = links[sentinel, PREV]
    while node != sentinel and pins[node] > 0:
        node = links[node, PREV]
    return -1 if node == sentinel else node


@kernel
def ring_order(links: Links, sentinel: int, out: Ids) -> int:
    """Write the ids of one list to out, coldest first; return how many."""
    count = 0
    node = links[sentinel, PREV]
    while node != sentinel:
        out[count] = node
        count += 1
        node = links[node, PREV]
    return count


def rings_in_order(links: Links, max_ids: int, *rings: int) -> Ids:
    """The ids of several lists, one list after the other, each coldest first."""
    parts = []
    for ring in rings:
        out = np.zeros(max_ids, dtype=np.int32)
        parts.append(out[: ring_order(links, max_ids + ring, out)])
    return np.concatenate(parts)
