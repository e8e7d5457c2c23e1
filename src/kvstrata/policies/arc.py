"""Adaptive replacement cache, in the unit of sizes.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4. T1 holds
what was seen once lately, T2 what was seen again, B1 and B2 the ghosts of each; the target size p of
T1 grows with hits in B1 and shrinks with hits in B2. With equal sizes and no pins this is the
published algorithm. Where the paper leaves a choice: blocks of a request are touched root first; p is
a real number; where the list that should give up a block has only pinned ones, the other list does.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.policies.base import ADMITTED, HIT, MISS, Flags, Ints, Outcomes, Pins, Places, Policy
from kvstrata.policies.jit import kernel
from kvstrata.policies.lists import (
    PREV,
    Ids,
    Links,
    coldest_unpinned,
    make_rings,
    push_recent,
    push_run,
    rings_in_order,
    unlink,
    unlink_run,
)

T1, T2, B1, B2 = 1, 2, -1, -2
CAPACITY = 0  # state[T1], state[T2], state[B1], state[B2]: sums of the sizes in each

Floats = NDArray[np.float64]


@kernel
def _ring(max_ids: int, place: int) -> int:
    """Sentinel of a list: T1, T2, B1, B2 in this order."""
    return max_ids + (place - 1 if place > 0 else 1 - place)


@kernel
def _move(index: int, to: int, links: Links, where: Places, state: Ints, size: int) -> None:
    """Take an id out of its list, if it is in one, and put it at the recent end of `to` (0: nowhere)."""
    come_from = where[index]
    if come_from:
        unlink(links, index)
        state[come_from] -= size
    where[index] = to
    if to:
        push_recent(links, _ring(len(where), to), index)
        state[to] += size


@kernel
def _forget(
    ghosts: int,
    bound: int,
    links: Links,
    where: Places,
    state: Ints,
    sizes: Ints,
    forgotten: Ids,
    count: int,
) -> int:
    """Forget the coldest of B1 (or B2) while L1 = T1 + B1 (or all four) weighs more than the bound."""
    while state[ghosts] > 0:
        weight = state[T1] + state[B1]
        if ghosts == B2:
            weight += state[T2] + state[B2]
        if weight <= bound:
            break
        index = links[_ring(len(where), ghosts), PREV]
        _move(index, 0, links, where, state, sizes[index])
        forgotten[count] = index
        count += 1
    return count


@kernel
def _replace(
    in_b2: bool, target: float, links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins
) -> int:
    """REPLACE of the paper: demote one block of T1 or T2 to its ghosts; return it, or -1."""
    from_t1 = state[T1] > 0 and (state[T1] > target or (in_b2 and state[T1] >= target))
    source = T1 if from_t1 else T2
    victim = coldest_unpinned(links, pins, _ring(len(where), source))
    if victim < 0:
        source = T2 if from_t1 else T1
        victim = coldest_unpinned(links, pins, _ring(len(where), source))
    if victim >= 0:
        _move(victim, -source, links, where, state, sizes[victim])
    return victim


@kernel
def _enter(
    index: int, sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints, target: Floats,
    evicted: Ids, out: int, forgotten: Ids, gone: int,
) -> tuple[int, int]:  # fmt: skip
    """Cases II, III and IV: the id is not resident and comes in if room can be made."""
    capacity = state[CAPACITY]
    size = sizes[index]
    place = where[index]
    if place == B1:
        target[0] = min(capacity, target[0] + max(state[B2] / state[B1], 1.0) * size)
    elif place == B2:
        target[0] = max(0.0, target[0] - max(state[B1] / state[B2], 1.0) * size)
    elif state[T1] + state[B1] + size > capacity:
        gone = _forget(B1, capacity - size, links, where, state, sizes, forgotten, gone)
        while state[T1] + size > capacity:
            victim = coldest_unpinned(links, pins, _ring(len(where), T1))
            if victim < 0:
                break
            _move(victim, 0, links, where, state, sizes[victim])
            evicted[out] = victim
            out += 1
    else:
        gone = _forget(B2, 2 * capacity - size, links, where, state, sizes, forgotten, gone)
    while state[T1] + state[T2] + size > capacity:
        victim = _replace(place == B2, target[0], links, where, state, sizes, pins)
        if victim < 0:
            return out, gone
        evicted[out] = victim
        out += 1
    _move(index, T2 if where[index] else T1, links, where, state, size)
    return out, gone


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints,
    target: Floats, outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> tuple[int, int]:  # fmt: skip
    capacity = state[CAPACITY]
    end = len(ids)
    out = 0
    gone = 0
    position = 0
    while position < end:
        index = ids[position]
        place = where[index]
        if place > 0:
            # Case I. Neighbours that are touched in the order of their list move as one run.
            recent = index
            outcome[position] = HIT
            position += 1
            while position < end and links[recent, PREV] == ids[position]:
                recent = ids[position]
                outcome[position] = HIT
                position += 1
            unlink_run(links, recent, index)
            if place == T1:
                node = index
                while True:
                    where[node] = T2
                    state[T1] -= sizes[node]
                    state[T2] += sizes[node]
                    if node == recent:
                        break
                    node = links[node, PREV]
            push_run(links, _ring(len(where), T2), recent, index)
            continue
        outcome[position] = MISS
        if admit[position] and sizes[index] <= capacity:
            out, gone = _enter(
                index, sizes, pins, links, where, state, target, evicted, out, forgotten, gone
            )
            if where[index] > 0:
                outcome[position] = ADMITTED
        position += 1
    # Pins and forced removals can leave more ghosts than the paper's bounds allow.
    gone = _forget(B1, capacity, links, where, state, sizes, forgotten, gone)
    gone = _forget(B2, 2 * capacity, links, where, state, sizes, forgotten, gone)
    return out, gone


@kernel
def _shrink(
    sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints, target: Floats, evicted: Ids,
    forgotten: Ids,
) -> tuple[int, int]:  # fmt: skip
    capacity = state[CAPACITY]
    target[0] = min(target[0], float(capacity))
    out = 0
    while state[T1] + state[T2] > capacity:
        victim = _replace(False, target[0], links, where, state, sizes, pins)
        if victim < 0:
            break
        evicted[out] = victim
        out += 1
    gone = _forget(B1, capacity, links, where, state, sizes, forgotten, 0)
    gone = _forget(B2, 2 * capacity, links, where, state, sizes, forgotten, gone)
    return out, gone


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, state: Ints) -> None:
    for index in ids:
        _move(index, 0, links, where, state, sizes[index])


class Arc(Policy):
    """ARC; residents and ghosts together weigh at most twice the capacity."""

    name: ClassVar[str] = "arc"

    def _make(self, capacity: int) -> None:
        self._links = make_rings(self.max_ids, 4)
        self._state = np.array([capacity, 0, 0, 0, 0], dtype=np.int64)
        self._target = np.zeros(1, dtype=np.float64)

    @property
    def capacity(self) -> int:
        return int(self._state[CAPACITY])

    @property
    def used(self) -> int:
        return int(self._state[T1] + self._state[T2])

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> tuple[int, int]:  # fmt: skip
        out, gone = _access(
            ids, admit, sizes, pins, self._links, self.where, self._state, self._target, outcome,
            evicted, forgotten,
        )  # fmt: skip
        return out, gone

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._state)

    def _resize(
        self, capacity: int, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids
    ) -> tuple[int, int]:
        self._state[CAPACITY] = capacity
        out, gone = _shrink(
            sizes, pins, self._links, self.where, self._state, self._target, evicted, forgotten
        )
        return out, gone

    def order(self) -> Ids:
        return rings_in_order(self._links, self.max_ids, 0, 1)
