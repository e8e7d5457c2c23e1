"""CLOCK-Pro, in the unit of sizes.

Jiang, Chen and Zhang, "CLOCK-Pro: an effective improvement of the CLOCK replacement", USENIX ATC 2005,
sections 4.2 to 4.4: LIRS with reference bits, so that a hit sets a bit and moves nothing. One clock holds
hot pages, resident cold pages and the ghosts of cold pages that were evicted in their test period; a cold
page that is accessed in its test period becomes hot. The target m_c of cold pages grows when that happens
and shrinks when a test period ends without an access.

The clock is a ring from its tail, where HAND_hot is, to its head: HAND_hot moves past a page by leaving
it at the head. HAND_cold is at the resident cold page nearest to the tail, HAND_test at the page in its
test period nearest to the tail. Pages become either only at the head, so each hand is the old end of a
ring of its own, in the order of the clock, and no hand searches.

Where the paper leaves a choice: m_c begins at `cold` of the capacity, by default all of it, which is
plain CLOCK until something has been learnt; it stays between 1 and the capacity and is scaled when that
changes. HAND_hot stands still while there is no hot page. A test period that ends with the reference bit
set does not lower m_c. HAND_cold passes over a pinned page and leaves it as it is; where there is no
other, HAND_hot moves until an unpinned page has turned cold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

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
    ring_order,
    unlink,
    unlink_run,
)

REFERENCED = 1  # is added to the place
COLD, TEST, HOT, GHOST = 2, 4, 6, -1
"""Resident and cold; the same in its test period; hot; cold in its test period and not resident."""

TARGET, HOT_USED, GHOSTS = range(OWN, OWN + 3)
"""TARGET: m_c."""


@kernel
def _end_test(
    index: int, clock: Links, test: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids
) -> None:
    unlink(test, index)
    if not where[index] & REFERENCED or where[index] == GHOST:
        state[TARGET] = max(1, state[TARGET] - sizes[index])
    if where[index] != GHOST:
        where[index] -= TEST - COLD
        return
    unlink(clock, index)
    where[index] = 0
    state[GHOSTS] -= sizes[index]
    forgotten[state[GONE]] = index
    state[GONE] += 1


@kernel
def _hand_hot(
    forced: bool, clock: Links, cold: Links, test: Links, where: Places, state: Ints, sizes: Ints,
    pins: Pins, forgotten: Ids,
) -> None:  # fmt: skip
    """Until the hot pages weigh what they may; forced: until an unpinned one has turned cold."""
    sentinel = len(where)
    moved = False
    turned = False
    while state[HOT_USED] > 0:
        goes_on = not turned if forced else state[HOT_USED] > state[CAPACITY] - state[TARGET]
        node = clock[sentinel, PREV]
        place = where[node]
        if not goes_on and (place >= HOT or not moved):
            return
        moved = True
        if place < HOT:
            if place < 0 or place >= TEST:
                _end_test(node, clock, test, where, state, sizes, forgotten)
            if place > 0:
                unlink(clock, node)
                push_recent(clock, sentinel, node)
                unlink(cold, node)
                push_recent(cold, sentinel, node)
        elif place == HOT and not (forced and pins[node] > 0):
            where[node] = COLD
            state[HOT_USED] -= sizes[node]
            turned = True
            unlink(clock, node)
            push_recent(clock, sentinel, node)
            push_recent(cold, sentinel, node)
        else:
            # Hot pages that are spared, one after the other, are left at the head as one run.
            recent = node
            while True:
                if not (forced and pins[recent] > 0):
                    where[recent] = HOT
                following = clock[recent, PREV]
                if following == sentinel or where[following] != HOT + REFERENCED:
                    break
                recent = following
            unlink_run(clock, recent, node)
            push_run(clock, sentinel, recent, node)


@inlined
def _make_hot(
    index: int, clock: Links, cold: Links, test: Links, where: Places, state: Ints, sizes: Ints,
    pins: Pins, forgotten: Ids,
) -> None:  # fmt: skip
    """A cold page was accessed in its test period."""
    size = sizes[index]
    state[TARGET] = min(state[CAPACITY], state[TARGET] + size)
    unlink(test, index)
    if where[index] == GHOST:
        state[GHOSTS] -= size
        state[USED] += size
    else:
        unlink(cold, index)
    unlink(clock, index)
    push_recent(clock, len(where), index)
    where[index] = HOT
    state[HOT_USED] += size
    _hand_hot(False, clock, cold, test, where, state, sizes, pins, forgotten)


@kernel
def _unpinned_hot(clock: Links, where: Places, pins: Pins) -> bool:
    node = clock[len(where), PREV]
    while node != len(where) and (where[node] < HOT or pins[node] > 0):
        node = clock[node, PREV]
    return bool(node != len(where))


@inlined
def _hand_cold(
    needed: int, clock: Links, cold: Links, test: Links, where: Places, state: Ints, sizes: Ints,
    pins: Pins, evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    """Evict until `needed` more fits or nothing may leave."""
    sentinel = len(where)
    while state[USED] + needed > state[CAPACITY]:
        index = coldest_unpinned(cold, pins, sentinel)
        if index < 0:
            if not _unpinned_hot(clock, where, pins):
                return
            _hand_hot(True, clock, cold, test, where, state, sizes, pins, forgotten)
            continue
        place = where[index]
        if place == TEST + REFERENCED:
            _make_hot(index, clock, cold, test, where, state, sizes, pins, forgotten)
            continue
        unlink(cold, index)
        if place == COLD + REFERENCED:
            where[index] = COLD
            unlink(clock, index)
            push_recent(clock, sentinel, index)
            push_recent(cold, sentinel, index)
            continue
        if place == TEST:
            where[index] = GHOST
            state[GHOSTS] += sizes[index]
        else:
            where[index] = 0
            unlink(clock, index)
        state[USED] -= sizes[index]
        evicted[state[OUT]] = index
        state[OUT] += 1


@inlined
def _hand_test(clock: Links, test: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Until the ghosts weigh one capacity."""
    while state[GHOSTS] > state[CAPACITY]:
        _end_test(test[len(where), PREV], clock, test, where, state, sizes, forgotten)


@inlined
def _fault(
    index: int, clock: Links, cold: Links, test: Links, where: Places, state: Ints, sizes: Ints,
    pins: Pins, evicted: Ids, forgotten: Ids,
) -> int:  # fmt: skip
    """An access to a page that is not resident; return what became of it."""
    sentinel = len(where)
    size = sizes[index]
    _hand_cold(size, clock, cold, test, where, state, sizes, pins, evicted, forgotten)
    if state[USED] + size > state[CAPACITY]:
        return MISS
    if where[index] == GHOST:
        _make_hot(index, clock, cold, test, where, state, sizes, pins, forgotten)
        return ADMITTED
    state[USED] += size
    where[index] = TEST
    push_recent(clock, sentinel, index)
    push_recent(cold, sentinel, index)
    push_recent(test, sentinel, index)
    return ADMITTED


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, clock: Links, cold: Links, test: Links,
    where: Places, state: Ints, outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    state[OUT] = 0
    state[GONE] = 0
    for position in range(len(ids)):
        index = ids[position]
        place = where[index]
        if place > 0:
            where[index] = place | REFERENCED
            outcome[position] = HIT
        elif admit[position] and sizes[index] <= state[CAPACITY]:
            outcome[position] = _fault(
                index, clock, cold, test, where, state, sizes, pins, evicted, forgotten
            )
            _hand_test(clock, test, where, state, sizes, forgotten)
        else:
            outcome[position] = MISS


@kernel
def _remove(
    ids: Ids, sizes: Ints, clock: Links, cold: Links, test: Links, where: Places, state: Ints
) -> None:
    for index in ids:
        place = where[index]
        if place == 0:
            continue
        where[index] = 0
        unlink(clock, index)
        if place == GHOST or TEST <= place < HOT:
            unlink(test, index)
        if place == GHOST:
            state[GHOSTS] -= sizes[index]
            continue
        state[USED] -= sizes[index]
        if place < HOT:
            unlink(cold, index)
        else:
            state[HOT_USED] -= sizes[index]


@kernel
def _shrink(
    sizes: Ints, pins: Pins, clock: Links, cold: Links, test: Links, where: Places, state: Ints,
    evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    state[OUT] = 0
    state[GONE] = 0
    _hand_hot(False, clock, cold, test, where, state, sizes, pins, forgotten)
    _hand_cold(0, clock, cold, test, where, state, sizes, pins, evicted, forgotten)
    _hand_test(clock, test, where, state, sizes, forgotten)


@kernel
def _order(clock: Links, cold: Links, where: Places, out: Ids) -> int:
    """Cold pages, then hot ones, each from the tail to the head; return how many."""
    sentinel = len(where)
    count = ring_order(cold, sentinel, out)
    node = clock[sentinel, PREV]
    while node != sentinel:
        if where[node] >= HOT:
            out[count] = node
            count += 1
        node = clock[node, PREV]
    return count


class ClockPro(Policy):
    """CLOCK-Pro; cold: the share of the capacity at which the target of cold pages begins."""

    name: ClassVar[str] = "clock_pro"
    KNOBS: ClassVar[Mapping[str, float]] = {"cold": 1.0}

    def _make(self) -> None:
        self._cold_share = share(self.name, self.knobs, "cold")
        self._clock = make_rings(self.max_ids, 1)
        self._cold = make_rings(self.max_ids, 1)
        self._test = make_rings(self.max_ids, 1)

    def _set_capacity(self, capacity: int) -> None:
        before, target = self.capacity, int(self._state[TARGET])
        scaled = target * capacity // before if before else int(self._cold_share * capacity)
        self._state[TARGET] = max(1, scaled)
        super()._set_capacity(capacity)

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(
            ids, admit, sizes, pins, self._clock, self._cold, self._test, self.where, self._state,
            outcome, evicted, forgotten,
        )  # fmt: skip

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._clock, self._cold, self._test, self.where, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(
            sizes, pins, self._clock, self._cold, self._test, self.where, self._state, evicted,
            forgotten,
        )  # fmt: skip

    def order(self) -> Ids:
        out = np.zeros(self.max_ids, dtype=np.int32)
        return out[: _order(self._clock, self._cold, self.where, out)]
