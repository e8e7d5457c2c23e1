"""2Q, full version, in the unit of sizes.

Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement algorithm", VLDB
1994, section 2.2. A1in is a FIFO of what is new; what leaves it is remembered in the FIFO A1out, and comes
into Am, an LRU list, if it is asked for again from there. A hit in A1in changes nothing, so that the
references of one burst (a conversation's next turn) count once.

With equal sizes and no pins this is the published algorithm, with the paper's recommended parameters:
A1in 25 % of the capacity (evicted from when it weighs more than that), names worth 50 % in A1out. Where
the paper leaves a choice: blocks of a request are touched root first; a block that comes in from A1out
frees its place there before others are put in (the paper's order of steps would have A1out forget one
name more; libCacheSim frees it first too); where the list that should give up a block has only pinned
ones, the other does.
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
from kvstrata.policies.knobs import share
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

A1IN, AM, A1OUT = 1, 2, -1
KIN, KOUT, A1IN_USED, GHOSTS = range(OWN, OWN + 4)
"""KIN, KOUT: bounds of A1in and A1out."""


@inlined
def _make_room(
    needed: int, links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins, evicted: Ids
) -> None:
    """The paper's reclaimfor, until `needed` more fits or nothing may leave. A1out is trimmed later."""
    a1in = len(where)
    am = a1in + 1
    while state[USED] + needed > state[CAPACITY]:
        from_a1in = state[A1IN_USED] > state[KIN]
        victim = coldest_unpinned(links, pins, a1in if from_a1in else am)
        if victim < 0:
            victim = coldest_unpinned(links, pins, am if from_a1in else a1in)
            if victim < 0:
                return
        unlink(links, victim)
        state[USED] -= sizes[victim]
        if where[victim] == A1IN:
            state[A1IN_USED] -= sizes[victim]
            state[GHOSTS] += sizes[victim]
            push_recent(links, am + 1, victim)
            where[victim] = A1OUT
        else:
            where[victim] = 0
        evicted[state[OUT]] = victim
        state[OUT] += 1


@kernel
def _trim(links: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Forget the oldest names of A1out beyond its bound."""
    while state[GHOSTS] > state[KOUT]:
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
    """Bring an id in if room can be made; return what became of the access."""
    sentinel = len(where)
    size = sizes[index]
    if state[USED] + size > state[CAPACITY]:
        _make_room(size, links, where, state, sizes, pins, evicted)
    enters = state[USED] + size <= state[CAPACITY]
    if enters:
        state[USED] += size
        if where[index] == A1OUT:
            unlink(links, index)
            state[GHOSTS] -= size
            push_recent(links, sentinel + 1, index)
            where[index] = AM
        else:
            state[A1IN_USED] += size
            push_recent(links, sentinel, index)
            where[index] = A1IN
    _trim(links, where, state, sizes, forgotten)
    return ADMITTED if enters else MISS


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints,
    outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    am = len(where) + 1
    end = len(ids)
    state[OUT] = 0
    state[GONE] = 0
    position = 0
    while position < end:
        index = ids[position]
        place = where[index]
        outcome[position] = HIT
        if place == AM:
            # Neighbours that are touched in the order of the list keep it: they move as one run.
            recent = index
            position += 1
            while position < end and links[recent, PREV] == ids[position]:
                recent = ids[position]
                outcome[position] = HIT
                position += 1
            unlink_run(links, recent, index)
            push_run(links, am, recent, index)
            continue
        if place != A1IN:
            if admit[position] and sizes[index] <= state[CAPACITY]:
                outcome[position] = _enter(index, links, where, state, sizes, pins, evicted, forgotten)
            else:
                outcome[position] = MISS
        position += 1


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
        if place == A1OUT:
            state[GHOSTS] -= sizes[index]
            continue
        state[USED] -= sizes[index]
        if place == A1IN:
            state[A1IN_USED] -= sizes[index]


class TwoQ(Policy):
    """2Q; kin, kout: shares of the capacity for A1in, and for what A1out remembers."""

    name: ClassVar[str] = "twoq"
    KNOBS: ClassVar[Mapping[str, float]] = {"kin": 0.25, "kout": 0.5}

    def _make(self) -> None:
        self._links = make_rings(self.max_ids, 3)  # A1in, Am, A1out

    def _set_capacity(self, capacity: int) -> None:
        super()._set_capacity(capacity)
        self._state[KIN] = int(share(self.name, self.knobs, "kin") * capacity)
        self._state[KOUT] = int(share(self.name, self.knobs, "kout") * capacity)

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
        """A1in, oldest first, then Am, least recent first."""
        return rings_in_order(self._links, self.max_ids, 0, 1)
