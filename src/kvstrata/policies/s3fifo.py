"""S3-FIFO, in the unit of sizes.

Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023,
algorithm 1. Three FIFOs: the small queue S, where most newcomers go, the main queue M, and the ghosts G of
what left S. A hit only counts, up to 3. S gives up a block while it has its share of the capacity; one
that was hit often enough there moves to M instead, and what comes in as a ghost enters M at once. M
reinserts what was hit, each time one count less.

With equal sizes and no pins this is the published algorithm, with its parameters: S 10 %, G 90 % of the
capacity, two hits to move to M. Where the paper leaves a choice, these are also libCacheSim's: a block that
moves to M starts there at 0; a ghost that comes in frees its place in G first; and as long as nothing was
ever evicted, S keeps to its share and newcomers that find it full enter M. (libCacheSim holds nothing at
all where S has room for only one block, below 20 blocks of capacity; this does not follow it there.)
Blocks of a request are touched root first; a pinned block that would leave is passed over; where the queue
that should give up a block has only pinned ones, the other does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kvstrata.jit import inlined, kernel
from kvstrata.policies.base import (
    ADMITTED,
    CAPACITY,
    GONE,
    HIT,
    MISS,
    OUT,
    OWN,
    USED,
    Flags,
    Ints,
    Outcomes,
    Pins,
    Places,
    Policy,
)
from kvstrata.policies.knobs import share, whole
from kvstrata.policies.lists import NEXT, PREV, Ids, Links, make_rings, push_recent, rings_in_order, unlink

SMALL, MAIN, GHOST = 4, 8, -1
"""Places. The frequency is added to SMALL and MAIN, so that a hit touches one byte."""
MAX_FREQUENCY = 3
SHARE, BOUND, THRESHOLD, SMALL_USED, GHOSTS, FULL_ONCE = range(OWN, OWN + 6)
"""SHARE, BOUND: of S and of the ghosts. FULL_ONCE: something was evicted. OUT, GONE: counts of the call."""


@kernel
def _evict_small(links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins) -> int:
    """EVICTS: from S to the ghosts; return the block, or -1 if all of S moved to M or is pinned."""
    small = len(where)
    node = links[small, PREV]
    while node != small:
        newer = links[node, PREV]
        often = where[node] - SMALL >= state[THRESHOLD]
        if often or pins[node] == 0:
            unlink(links, node)
            state[SMALL_USED] -= sizes[node]
            if not often:
                push_recent(links, small + 2, node)
                where[node] = GHOST
                state[GHOSTS] += sizes[node]
                return int(node)
            push_recent(links, small + 1, node)
            where[node] = MAIN
        node = newer
    return -1


@kernel
def _evict_main(links: Links, where: Places, pins: Pins) -> int:
    """EVICTM: reinsert what was hit until a block was not; return it, or -1 if all of M is pinned."""
    main = len(where) + 1
    node = links[main, PREV]
    while node != main:
        if where[node] > MAIN:
            where[node] -= 1
            older = links[node, NEXT]
            unlink(links, node)
            push_recent(links, main, node)
            node = links[older, PREV]
        elif pins[node] > 0:
            node = links[node, PREV]
        else:
            unlink(links, node)
            where[node] = 0
            return int(node)
    return -1


@inlined
def _make_room(
    needed: int, links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins, evicted: Ids
) -> None:
    """EVICT until `needed` more fits or nothing may leave. G is trimmed later."""
    while state[USED] + needed > state[CAPACITY]:
        victim = -1
        if state[SMALL_USED] < state[SHARE] or state[SMALL_USED] == 0:
            victim = _evict_main(links, where, pins)
        if victim < 0:
            victim = _evict_small(links, where, state, sizes, pins)
        if victim < 0:
            victim = _evict_main(links, where, pins)
            if victim < 0:
                return
        state[USED] -= sizes[victim]
        state[FULL_ONCE] = 1
        evicted[state[OUT]] = victim
        state[OUT] += 1


@kernel
def _trim(links: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Forget the oldest ghosts beyond their bound."""
    while state[GHOSTS] > state[BOUND]:
        oldest = links[len(where) + 2, PREV]
        unlink(links, oldest)
        where[oldest] = 0
        state[GHOSTS] -= sizes[oldest]
        forgotten[state[GONE]] = oldest
        state[GONE] += 1


@inlined
def _enter(
    index: int, links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins, evicted: Ids,
    forgotten: Ids,
) -> int:  # fmt: skip
    """INSERT if room can be made; return what became of the access."""
    small = len(where)
    size = sizes[index]
    if state[USED] + size > state[CAPACITY]:
        _make_room(size, links, where, state, sizes, pins, evicted)
    enters = state[USED] + size <= state[CAPACITY]
    if enters:
        state[USED] += size
        ghost = where[index] == GHOST
        if ghost:
            unlink(links, index)
            state[GHOSTS] -= size
        if ghost or (state[FULL_ONCE] == 0 and state[SMALL_USED] >= state[SHARE]):
            push_recent(links, small + 1, index)
            where[index] = MAIN
        else:
            push_recent(links, small, index)
            where[index] = SMALL
            state[SMALL_USED] += size
    _trim(links, where, state, sizes, forgotten)
    return ADMITTED if enters else MISS


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints,
    outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    state[OUT] = 0
    state[GONE] = 0
    for position in range(len(ids)):
        index = ids[position]
        place = where[index]
        if place > 0:
            if place & MAX_FREQUENCY != MAX_FREQUENCY:
                where[index] = place + 1
            outcome[position] = HIT
        elif admit[position] and sizes[index] <= state[CAPACITY]:
            outcome[position] = _enter(index, links, where, state, sizes, pins, evicted, forgotten)
        else:
            outcome[position] = MISS


@kernel
def _shrink(
    sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints, evicted: Ids, forgotten: Ids
) -> None:
    state[OUT] = 0
    state[GONE] = 0
    _make_room(0, links, where, state, sizes, pins, evicted)
    _trim(links, where, state, sizes, forgotten)


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, state: Ints) -> None:
    for index in ids:
        place = where[index]
        if place == 0:
            continue
        unlink(links, index)
        where[index] = 0
        if place == GHOST:
            state[GHOSTS] -= sizes[index]
            continue
        state[USED] -= sizes[index]
        if place < MAIN:
            state[SMALL_USED] -= sizes[index]


class S3Fifo(Policy):
    """S3-FIFO; small, ghost: shares of the capacity; threshold: hits in S that make a block move to M."""

    name: ClassVar[str] = "s3fifo"
    KNOBS: ClassVar[Mapping[str, float]] = {"small": 0.1, "ghost": 0.9, "threshold": 2}

    def _make(self) -> None:
        self._links = make_rings(self.max_ids, 3)  # S, M, G
        self._state[THRESHOLD] = whole(self.name, self.knobs, "threshold", 1, MAX_FREQUENCY)

    def _set_capacity(self, capacity: int) -> None:
        super()._set_capacity(capacity)
        self._state[SHARE] = int(share(self.name, self.knobs, "small") * capacity)
        self._state[BOUND] = int(share(self.name, self.knobs, "ghost") * capacity)

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(ids, admit, sizes, pins, self._links, self.where, self._state, outcome, evicted, forgotten)

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(sizes, pins, self._links, self.where, self._state, evicted, forgotten)

    def order(self) -> Ids:
        """S, then M, oldest first."""
        return rings_in_order(self._links, self.max_ids, 0, 1)
