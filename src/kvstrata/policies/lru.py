"""Least recently used, leaf first.

A request touches its blocks from the tail to the root, so that a block is always at least as recent
as everything below it: leaves leave before their parents, and no resident child is stranded behind a
missing parent. While a request is being placed, its resident blocks are held out of the list, so that
a request never evicts its own prefix to make room for its tail. (Plain LRU: Denning, CACM 1968.)
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvstrata.policies.base import Flags, Pins, Places, Policy
from kvstrata.policies.jit import kernel
from kvstrata.policies.lists import (
    Ints,
    coldest_unpinned,
    make_rings,
    push_recent,
    ring_order,
    unlink,
)

LISTED, HELD = 1, 2
USED, CAPACITY = 0, 1


@kernel
def _evict_until(
    needed: int, sentinel: int, prev: Ints, nxt: Ints, where: Places, state: Ints, sizes: Ints,
    pins: Pins, evicted: Ints, count: int,
) -> int:  # fmt: skip
    """Evict cold ids until `needed` bytes fit or nothing may leave; return the new count of evicted."""
    while state[USED] + needed > state[CAPACITY]:
        victim = coldest_unpinned(prev, pins, sentinel)
        if victim < 0:
            break
        unlink(prev, nxt, victim)
        where[victim] = 0
        state[USED] -= sizes[victim]
        evicted[count] = victim
        count += 1
    return count


@kernel
def _access(
    ids: Ints, admit: Flags, sizes: Ints, pins: Pins, prev: Ints, nxt: Ints, where: Places,
    state: Ints, hit: Flags, evicted: Ints,
) -> int:  # fmt: skip
    sentinel = len(where)
    for position in range(len(ids)):
        index = ids[position]
        hit[position] = where[index] == LISTED
        if where[index] == LISTED:
            unlink(prev, nxt, index)
            where[index] = HELD
    count = 0
    for position in range(len(ids) - 1, -1, -1):
        index = ids[position]
        if where[index] != HELD:
            size = sizes[index]
            if not admit[position] or size > state[CAPACITY]:
                continue
            count = _evict_until(size, sentinel, prev, nxt, where, state, sizes, pins, evicted, count)
            if state[USED] + size > state[CAPACITY]:
                continue
            state[USED] += size
        push_recent(prev, nxt, sentinel, index)
        where[index] = LISTED
    return count


@kernel
def _remove(ids: Ints, sizes: Ints, prev: Ints, nxt: Ints, where: Places, state: Ints) -> None:
    for index in ids:
        if where[index] == LISTED:
            unlink(prev, nxt, index)
            where[index] = 0
            state[USED] -= sizes[index]


class Lru(Policy):
    """Leaf-first LRU; remembers nothing of what left."""

    name: ClassVar[str] = "lru"

    def __init__(self, max_ids: int, capacity_bytes: int) -> None:
        self._prev, self._next = make_rings(max_ids, 1)
        self._state = np.zeros(2, dtype=np.int64)
        super().__init__(max_ids, capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        return int(self._state[CAPACITY])

    @property
    def used_bytes(self) -> int:
        return int(self._state[USED])

    def _set_capacity(self, capacity_bytes: int) -> None:
        self._state[CAPACITY] = capacity_bytes

    def access(
        self, ids: Ints, admit: Flags, sizes: Ints, pins: Pins, request: int
    ) -> tuple[Flags, Ints, Ints]:
        count = _access(
            ids, admit, sizes, pins, self._prev, self._next, self.where, self._state,
            self._hit, self._evicted,
        )  # fmt: skip
        evicted = self._evicted[:count]
        return self._hit[: len(ids)], evicted, evicted

    def remove(self, ids: Ints, sizes: Ints) -> None:
        _remove(ids, sizes, self._prev, self._next, self.where, self._state)

    def resize(self, capacity_bytes: int, sizes: Ints, pins: Pins) -> tuple[Ints, Ints]:
        self._set_capacity(capacity_bytes)
        count = _evict_until(
            0, self.max_ids, self._prev, self._next, self.where, self._state, sizes, pins,
            self._evicted, 0,
        )  # fmt: skip
        evicted = self._evicted[:count]
        return evicted, evicted

    def resident(self, index: int) -> bool:
        return bool(self.where[index] == LISTED)

    def order(self) -> Ints:
        out = np.zeros(self.max_ids, dtype=np.int64)
        return out[: ring_order(self._prev, self.max_ids, out)]
