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

from kvstrata.jit import inlined, kernel
from kvstrata.policies.base import (
    ADMITTED,
    GONE,
    HIT,
    MISS,
    OUT,
    Flags,
    Ints,
    Outcomes,
    Pins,
    Places,
    Policy,
)
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
"""The lists; weights[T1], weights[T2], weights[B1], weights[B2] are the sums of the sizes in each."""

Floats = NDArray[np.float64]


@inlined
def _demote(from_t1: bool, rings: int, links: Links, where: Places, pins: Pins) -> tuple[int, bool]:
    """Send the least recent unpinned block of T1 (or T2), else of the other one, to its ghosts.

    rings: sentinel of T1; those of T2, B1 and B2 follow. Returns the block, or -1, and whether T1 gave it.
    """
    victim = coldest_unpinned(links, pins, rings if from_t1 else rings + 1)
    if victim < 0:
        from_t1 = not from_t1
        victim = coldest_unpinned(links, pins, rings if from_t1 else rings + 1)
    if victim >= 0:
        unlink(links, victim)
        where[victim] = B1 if from_t1 else B2
        push_recent(links, rings + 2 if from_t1 else rings + 3, victim)
    return victim, from_t1


@inlined
def _forget(ghosts: int, links: Links, where: Places) -> int:
    """Forget the least recent ghost of a list, given by its sentinel, that has one."""
    victim = links[ghosts, PREV]
    unlink(links, victim)
    where[victim] = 0
    return int(victim)


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, capacity: int, links: Links, where: Places,
    weights: Ints, target: Floats, outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> tuple[int, int]:  # fmt: skip
    """All accesses, then what a smaller bound asks for. One function, with the sums in local variables:
    calls between compiled functions and sums in an array made a miss cost more than twice as much."""
    rings = len(where)
    t1, t2, b1, b2 = weights[T1], weights[T2], weights[B1], weights[B2]
    p = min(target[0], capacity)
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
                    t1 -= sizes[node]
                    t2 += sizes[node]
                    if node == recent:
                        break
                    node = links[node, PREV]
            push_run(links, rings + 1, recent, index)
            continue
        size = sizes[index]
        outcome[position] = MISS
        position += 1
        if not admit[position - 1] or size > capacity:
            continue
        if place == B1:  # case II
            p = min(capacity, p + max(b2 / b1, 1.0) * size)
        elif place == B2:  # case III
            p = max(0.0, p - max(b1 / b2, 1.0) * size)
        elif t1 + b1 + size > capacity:  # case IV, A
            while b1 > 0 and t1 + b1 + size > capacity:
                forgotten[gone] = _forget(rings + 2, links, where)
                b1 -= sizes[forgotten[gone]]
                gone += 1
            while t1 + size > capacity:
                victim = coldest_unpinned(links, pins, rings)
                if victim < 0:
                    break
                unlink(links, victim)
                where[victim] = 0
                t1 -= sizes[victim]
                evicted[out] = victim
                out += 1
        else:  # case IV, B
            while b2 > 0 and t1 + t2 + b1 + b2 + size > 2 * capacity:
                forgotten[gone] = _forget(rings + 3, links, where)
                b2 -= sizes[forgotten[gone]]
                gone += 1
        while t1 + t2 + size > capacity:  # REPLACE
            from_t1 = t1 > 0 and (t1 > p or (place == B2 and t1 >= p))
            victim, from_t1 = _demote(from_t1, rings, links, where, pins)
            if victim < 0:
                break
            if from_t1:
                t1 -= sizes[victim]
                b1 += sizes[victim]
            else:
                t2 -= sizes[victim]
                b2 += sizes[victim]
            evicted[out] = victim
            out += 1
        if t1 + t2 + size > capacity:
            continue
        outcome[position - 1] = ADMITTED
        if place == 0:
            where[index] = T1
            t1 += size
            push_recent(links, rings, index)
            continue
        unlink(links, index)
        if place == B1:
            b1 -= size
        else:
            b2 -= size
        where[index] = T2
        t2 += size
        push_recent(links, rings + 1, index)
    while t1 + t2 > capacity:
        victim, from_t1 = _demote(t1 > 0 and t1 > p, rings, links, where, pins)
        if victim < 0:
            break
        if from_t1:
            t1 -= sizes[victim]
            b1 += sizes[victim]
        else:
            t2 -= sizes[victim]
            b2 += sizes[victim]
        evicted[out] = victim
        out += 1
    # A smaller bound, pins and forced removals can leave more ghosts than the paper's bounds allow.
    while b1 > 0 and t1 + b1 > capacity:
        forgotten[gone] = _forget(rings + 2, links, where)
        b1 -= sizes[forgotten[gone]]
        gone += 1
    while b2 > 0 and t1 + t2 + b1 + b2 > 2 * capacity:
        forgotten[gone] = _forget(rings + 3, links, where)
        b2 -= sizes[forgotten[gone]]
        gone += 1
    weights[T1], weights[T2], weights[B1], weights[B2] = t1, t2, b1, b2
    target[0] = p
    return out, gone


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, weights: Ints) -> None:
    for index in ids:
        if where[index]:
            unlink(links, index)
            weights[where[index]] -= sizes[index]
            where[index] = 0


class Arc(Policy):
    """ARC; residents and ghosts together weigh at most twice the capacity."""

    name: ClassVar[str] = "arc"

    def _make(self) -> None:
        self._links = make_rings(self.max_ids, 4)
        self._weights = np.zeros(5, dtype=np.int64)
        self._target = np.zeros(1, dtype=np.float64)

    @property
    def used(self) -> int:
        return int(self._weights[T1] + self._weights[T2])

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        self._state[OUT], self._state[GONE] = _access(
            ids, admit, sizes, pins, self.capacity, self._links, self.where, self._weights,
            self._target, outcome, evicted, forgotten,
        )  # fmt: skip

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._weights)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        """No access at all: the kernel ends with what a smaller bound asks for."""
        nothing = np.zeros(0, dtype=np.int32)
        starts, no = np.zeros(1, dtype=np.int64), nothing.astype(np.bool_)
        self._run(nothing, starts, no, sizes, pins, nothing.astype(np.int8), evicted, forgotten)

    def order(self) -> Ids:
        return rings_in_order(self._links, self.max_ids, 0, 1)
