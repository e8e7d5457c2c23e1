"""Least recently used, leaf first.

A request touches its blocks from the tail to the root, so that a block is always at least as recent
as everything below it: leaves leave before their parents, and no resident child is stranded behind a
missing parent. While a request is being placed, its resident blocks are held out of the list, so that
a request never evicts its own prefix to make room for its tail. (Plain LRU: Denning, "The working set
model for program behavior", CACM 1968; the order within a request is ours.)
"""

from __future__ import annotations

from typing import ClassVar

from kvstrata.jit import inlined, kernel
from kvstrata.policies.base import (
    ADMITTED,
    CAPACITY,
    HIT,
    MISS,
    OUT,
    USED,
    Flags,
    Ints,
    Outcomes,
    Pins,
    Places,
    Policy,
)
from kvstrata.policies.lists import (
    NEXT,
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

LISTED = 1
NOTHING = -1


@inlined
def make_room(
    needed: int, used: int, capacity: int, links: Links, where: Places, sizes: Ints, pins: Pins,
    evicted: Ids, count: int,
) -> tuple[int, int]:  # fmt: skip
    """Evict cold ids until `needed` more fits or nothing may leave.

    Returns what is used then and the new count of evicted.
    """
    while used + needed > capacity:
        victim = coldest_unpinned(links, pins, len(where))
        if victim < 0:
            break
        unlink(links, victim)
        where[victim] = 0
        used -= sizes[victim]
        evicted[count] = victim
        count += 1
    return used, count


@kernel
def _shrink(links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins, evicted: Ids) -> int:
    used, count = make_room(0, state[USED], state[CAPACITY], links, where, sizes, pins, evicted, 0)
    state[USED] = used
    return count


@kernel
def _hold_hits(
    first: int, end: int, ids: Ids, links: Links, where: Places, outcome: Outcomes
) -> tuple[int, int]:
    """Take the resident blocks of ids[first:end] out of the list, a run of neighbours at a time.

    The runs form a stack in their own free links: the PREV of a run's head is the start of the run
    before it, the NEXT of its tail the end of that run. Returns start and end of the last one.
    """
    start = NOTHING
    stop = NOTHING
    position = first
    while position < end:
        head = ids[position]
        if where[head] != LISTED:
            outcome[position] = MISS
            position += 1
            continue
        run = position
        tail = head
        outcome[position] = HIT
        position += 1
        while position < end and links[tail, NEXT] == ids[position]:
            tail = ids[position]
            outcome[position] = HIT
            position += 1
        unlink_run(links, head, tail)
        links[head, PREV] = start
        links[tail, NEXT] = stop
        start = run - first
        stop = position - first
    return start, stop


@kernel
def _access(
    ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places,
    state: Ints, outcome: Outcomes, evicted: Ids,
) -> int:  # fmt: skip
    sentinel = len(where)
    used = state[USED]
    capacity = state[CAPACITY]
    count = 0
    for request in range(len(starts) - 1):
        first = starts[request]
        end = starts[request + 1]
        start, stop = _hold_hits(first, end, ids, links, where, outcome)
        position = end
        while True:
            misses_from = first if start < 0 else first + stop
            while position > misses_from:
                position -= 1
                index = ids[position]
                size = sizes[index]
                if not admit[position] or size > capacity:
                    continue
                used, count = make_room(size, used, capacity, links, where, sizes, pins, evicted, count)
                if used + size > capacity:
                    continue
                used += size
                push_recent(links, sentinel, index)
                where[index] = LISTED
                outcome[position] = ADMITTED
            if start < 0:
                break
            head = ids[first + start]
            tail = ids[first + stop - 1]
            position = first + start
            start = links[head, PREV]
            stop = links[tail, NEXT]
            push_run(links, sentinel, head, tail)
    state[USED] = used
    return count


@kernel
def remove_listed(ids: Ids, sizes: Ints, links: Links, where: Places, state: Ints) -> None:
    for index in ids:
        if where[index] == LISTED:
            unlink(links, index)
            where[index] = 0
            state[USED] -= sizes[index]


class OneList(Policy):
    """What is resident lies in one list, and nothing is remembered of what left."""

    COUNTS_REPEATS: ClassVar[bool] = True

    def _make(self) -> None:
        self._links = make_rings(self.max_ids, 1)

    def remove(self, ids: Ids, sizes: Ints) -> None:
        remove_listed(ids, sizes, self._links, self.where, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        self._state[OUT] = _shrink(self._links, self.where, self._state, sizes, pins, evicted)

    def order(self) -> Ids:
        return rings_in_order(self._links, self.max_ids, 0)


class Lru(OneList):
    """Leaf-first LRU."""

    name: ClassVar[str] = "lru"

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        self._state[OUT] = _access(
            ids, starts, admit, sizes, pins, self._links, self.where, self._state, outcome, evicted
        )
