"""Adaptive replacement cache, in bytes.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4. T1 holds
what was seen once lately, T2 what was seen again, B1 and B2 the ghosts of each; the target size p of
T1 grows with hits in B1 and shrinks with hits in B2. With equal sizes and no pins this is the
published algorithm. Where the paper leaves a choice: blocks of a request are touched root first; a
second touch within one request does not promote (it is the same reference); what a request has hit
stays until the request is placed; where the list that should give up a block has only pinned ones,
the other list does.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

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

T1, T2, B1, B2 = 1, 2, 3, 4
NAMED = -1  # in `where` while a call makes its list of forgotten ids
CAPACITY = 0  # state[1..4]: bytes in T1, T2, B1, B2

Floats = NDArray[np.float64]


@kernel
def _move(index: int, to: int, prev: Ints, nxt: Ints, where: Places, state: Ints, sizes: Ints) -> None:
    """Take an id out of its list, if it is in one, and put it at the recent end of `to` (0: nowhere)."""
    come_from = where[index]
    if come_from:
        unlink(prev, nxt, index)
        state[come_from] -= sizes[index]
    where[index] = to
    if to:
        push_recent(prev, nxt, len(where) + to - 1, index)
        state[to] += sizes[index]


@kernel
def _forget_coldest(
    ghosts: int, prev: Ints, nxt: Ints, where: Places, state: Ints, sizes: Ints,
    forgotten: Ints, count: int,
) -> int:  # fmt: skip
    index = prev[len(where) + ghosts - 1]
    _move(index, 0, prev, nxt, where, state, sizes)
    forgotten[count] = index
    return count + 1


@kernel
def _replace(
    in_b2: bool, target: float, prev: Ints, nxt: Ints, where: Places, state: Ints, sizes: Ints,
    pins: Pins,
) -> int:  # fmt: skip
    """REPLACE of the paper: demote one block of T1 or T2 to its ghosts; return it, or -1."""
    sentinel = len(where)
    from_t1 = state[T1] > 0 and (state[T1] > target or (in_b2 and state[T1] >= target))
    first, second = (T1, T2) if from_t1 else (T2, T1)
    source = first
    victim = coldest_unpinned(prev, pins, sentinel + first - 1)
    if victim < 0:
        source = second
        victim = coldest_unpinned(prev, pins, sentinel + second - 1)
    if victim >= 0:
        _move(victim, B1 if source == T1 else B2, prev, nxt, where, state, sizes)
    return victim


@kernel
def _access(
    ids: Ints, admit: Flags, request: int, sizes: Ints, pins: Pins, prev: Ints, nxt: Ints,
    where: Places, stamp: Ints, state: Ints, target: Floats, hit: Flags, evicted: Ints,
    forgotten: Ints,
) -> tuple[int, int]:  # fmt: skip
    capacity = state[CAPACITY]
    out = 0
    gone = 0
    for position in range(len(ids)):
        index = ids[position]
        hit[position] = where[index] == T1 or where[index] == T2
        pins[index] += hit[position]  # a request never evicts what it has just hit
    for position in range(len(ids)):
        index = ids[position]
        size = sizes[index]
        place = where[index]
        if place == T1 or place == T2:
            again = stamp[index] == request
            _move(index, place if again else T2, prev, nxt, where, state, sizes)
            stamp[index] = request
            continue
        if not admit[position] or size > capacity:
            continue
        if place == B1:
            target[0] = min(capacity, target[0] + max(state[B2] / state[B1], 1.0) * size)
        elif place == B2:
            target[0] = max(0.0, target[0] - max(state[B1] / state[B2], 1.0) * size)
        elif state[T1] + state[B1] + size > capacity:
            while state[B1] > 0 and state[T1] + state[B1] + size > capacity:
                gone = _forget_coldest(B1, prev, nxt, where, state, sizes, forgotten, gone)
            while state[T1] + size > capacity:
                victim = coldest_unpinned(prev, pins, len(where) + T1 - 1)
                if victim < 0:
                    break
                _move(victim, 0, prev, nxt, where, state, sizes)
                evicted[out] = victim
                forgotten[gone] = victim
                out += 1
                gone += 1
        else:
            while state[B2] > 0 and state[T1] + state[T2] + state[B1] + state[B2] + size > 2 * capacity:
                gone = _forget_coldest(B2, prev, nxt, where, state, sizes, forgotten, gone)
        while state[T1] + state[T2] + size > capacity:
            victim = _replace(place == B2, target[0], prev, nxt, where, state, sizes, pins)
            if victim < 0:
                break
            evicted[out] = victim
            out += 1
        if state[T1] + state[T2] + size <= capacity:
            ghost = where[index] == B1 or where[index] == B2
            _move(index, T2 if ghost else T1, prev, nxt, where, state, sizes)
            stamp[index] = request
    for position in range(len(ids)):
        pins[ids[position]] -= hit[position]
    # Pins and forced removals can leave more ghosts than the paper's bounds allow.
    while state[B1] > 0 and state[T1] + state[B1] > capacity:
        gone = _forget_coldest(B1, prev, nxt, where, state, sizes, forgotten, gone)
    while state[B2] > 0 and state[T1] + state[T2] + state[B1] + state[B2] > 2 * capacity:
        gone = _forget_coldest(B2, prev, nxt, where, state, sizes, forgotten, gone)
    # A ghost of this very request may have been forgotten and have come in again, even twice.
    kept = 0
    for entry in range(gone):
        index = forgotten[entry]
        if where[index] == 0:
            where[index] = NAMED
            forgotten[kept] = index
            kept += 1
    for entry in range(kept):
        where[forgotten[entry]] = 0
    return out, kept


@kernel
def _shrink(
    sizes: Ints, pins: Pins, prev: Ints, nxt: Ints, where: Places, state: Ints, target: Floats,
    evicted: Ints, forgotten: Ints,
) -> tuple[int, int]:  # fmt: skip
    capacity = state[CAPACITY]
    target[0] = min(target[0], float(capacity))
    out = 0
    gone = 0
    while state[T1] + state[T2] > capacity:
        victim = _replace(False, target[0], prev, nxt, where, state, sizes, pins)
        if victim < 0:
            break
        evicted[out] = victim
        out += 1
    while state[B1] > 0 and state[T1] + state[B1] > capacity:
        gone = _forget_coldest(B1, prev, nxt, where, state, sizes, forgotten, gone)
    while state[B2] > 0 and state[T1] + state[T2] + state[B1] + state[B2] > 2 * capacity:
        gone = _forget_coldest(B2, prev, nxt, where, state, sizes, forgotten, gone)
    return out, gone


@kernel
def _remove(ids: Ints, sizes: Ints, prev: Ints, nxt: Ints, where: Places, state: Ints) -> None:
    for index in ids:
        _move(index, 0, prev, nxt, where, state, sizes)


class Arc(Policy):
    """ARC; remembers ghosts of at most twice the capacity, residents included."""

    name: ClassVar[str] = "arc"

    def __init__(self, max_ids: int, capacity_bytes: int) -> None:
        self._prev, self._next = make_rings(max_ids, 4)
        self._stamp = np.full(max_ids, -1, dtype=np.int64)
        self._state = np.zeros(5, dtype=np.int64)
        self._target = np.zeros(1, dtype=np.float64)
        super().__init__(max_ids, capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        return int(self._state[CAPACITY])

    @property
    def used_bytes(self) -> int:
        return int(self._state[T1] + self._state[T2])

    def _set_capacity(self, capacity_bytes: int) -> None:
        self._state[CAPACITY] = capacity_bytes

    def access(
        self, ids: Ints, admit: Flags, sizes: Ints, pins: Pins, request: int
    ) -> tuple[Flags, Ints, Ints]:
        out, gone = _access(
            ids, admit, request, sizes, pins, self._prev, self._next, self.where, self._stamp,
            self._state, self._target, self._hit, self._evicted, self._forgotten,
        )  # fmt: skip
        return self._hit[: len(ids)], self._evicted[:out], self._forgotten[:gone]

    def remove(self, ids: Ints, sizes: Ints) -> None:
        _remove(ids, sizes, self._prev, self._next, self.where, self._state)

    def resize(self, capacity_bytes: int, sizes: Ints, pins: Pins) -> tuple[Ints, Ints]:
        self._set_capacity(capacity_bytes)
        out, gone = _shrink(
            sizes, pins, self._prev, self._next, self.where, self._state, self._target,
            self._evicted, self._forgotten,
        )  # fmt: skip
        return self._evicted[:out], self._forgotten[:gone]

    def resident(self, index: int) -> bool:
        return bool(self.where[index] == T1 or self.where[index] == T2)

    def order(self) -> Ints:
        once = np.zeros(self.max_ids, dtype=np.int64)
        again = np.zeros(self.max_ids, dtype=np.int64)
        return np.concatenate(
            [
                once[: ring_order(self._prev, self.max_ids, once)],
                again[: ring_order(self._prev, self.max_ids + 1, again)],
            ]
        )
