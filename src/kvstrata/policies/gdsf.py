"""Greedy-Dual-Size-Frequency, in the unit of sizes.

Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1, 1998. An access sets the priority of its block to clock + frequency x cost / size; the block
with the lowest priority leaves, and the clock becomes that priority, so that what is not asked for any more
is overtaken. Cost 1 keeps many small blocks (block hits); cost = size keeps bytes and is LFU with dynamic
aging (Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating content management techniques for web
proxy caches", Performance Evaluation Review 2000).

Choices: the frequency starts at 1 and is gone when its block leaves; of equal priorities the least
recently used leaves; blocks of a request are touched root first; where a block that was pinned below the
clock leaves later, the clock stays.

Instead of the report's heap this is a radix heap of lists (Ahuja, Mehlhorn, Orlin and Tarjan, "Faster
algorithms for the shortest path problem", JACM 1990): no priority is ever set below the clock, and list b
holds those that differ from it in bit b - 1 and in no higher one. A hit moves a block to the front of its
new list. When list 0 has nothing to give, the lowest list that has is spread over those below it, so that a
block goes down at most 63 times after an access. Lists stay in order of time, which settles ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.policies.base import (
    ADMITTED,
    CAPACITY,
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
from kvstrata.policies.knobs import whole
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
LISTS = 64

LOWEST, COST_IS_SIZE = range(OWN, OWN + 2)
"""LOWEST: all lists from 1 up to it are empty. OUT: evicted in this call."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int32]


@kernel
def _list_of(index: int, bits: Ints) -> int:
    """Length in bits of the difference between a priority and the clock. bits[-1] is the clock's."""
    difference = bits[index] ^ bits[-1]
    length = 0
    step = 32
    while step:
        if difference >> step:
            difference >>= step
            length += step
        step >>= 1
    return length + 1 if difference else 0


@kernel
def _sink(last: int, links: Links, priority: Floats, state: Ints, sentinel: int) -> None:
    """Move what is below the clock (it is pinned) from the lists up to `last` into list 0, by priority."""
    for ring in range(sentinel + state[LOWEST], sentinel + last + 1):
        node = links[ring, PREV]
        while node != ring:
            newer = links[node, PREV]
            if priority[node] < priority[-1]:
                unlink(links, node)
                place = links[sentinel, NEXT]
                while place != sentinel and priority[place] > priority[node]:
                    place = links[place, NEXT]
                push_recent(links, links[place, PREV], node)
            node = newer


@kernel
def _spread(last: int, links: Links, priority: Floats, bits: Ints, state: Ints, sentinel: int) -> None:
    """Spread the lowest list that is not empty over those below it, equal neighbours as one run."""
    ring = sentinel + last
    node = links[ring, PREV]
    links[ring, PREV] = ring
    links[ring, NEXT] = ring
    state[LOWEST] = last + 1
    while node != ring:
        old = node
        recent = node
        node = links[node, PREV]
        while node != ring and priority[node] == priority[old]:
            recent = node
            node = links[node, PREV]
        bucket = _list_of(old, bits)
        push_run(links, sentinel + bucket, recent, old)
        if bucket:
            state[LOWEST] = min(state[LOWEST], bucket)


@kernel
def _victim(links: Links, priority: Floats, bits: Ints, state: Ints, pins: Pins, sentinel: int) -> int:
    """The block that leaves, or -1; the clock is set to its priority unless it is past it."""
    victim = coldest_unpinned(links, pins, sentinel)
    if victim >= 0:
        return victim
    least = np.inf
    pinned_below = False
    for bucket in range(state[LOWEST], LISTS):
        ring = sentinel + bucket
        node = links[ring, PREV]
        while node != ring:
            if priority[node] < least:
                if pins[node] > 0:
                    pinned_below = True
                else:
                    victim = node
                    least = priority[node]
            node = links[node, PREV]
        if victim >= 0:
            priority[-1] = least
            if pinned_below:
                _sink(bucket, links, priority, state, sentinel)
            _spread(bucket, links, priority, bits, state, sentinel)
            break
    return victim


@kernel
def _evict_until(
    needed: int, links: Links, where: Places, frequency: Counts, priority: Floats, bits: Ints, state: Ints,
    sizes: Ints, pins: Pins, evicted: Ids,
) -> None:  # fmt: skip
    """Evict until `needed` more fits or nothing may leave."""
    while state[USED] + needed > state[CAPACITY]:
        victim = _victim(links, priority, bits, state, pins, len(where))
        if victim < 0:
            break
        unlink(links, victim)
        where[victim] = 0
        frequency[victim] = 0
        state[USED] -= sizes[victim]
        evicted[state[OUT]] = victim
        state[OUT] += 1


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, frequency: Counts,
    priority: Floats, bits: Ints, state: Ints, outcome: Outcomes, evicted: Ids,
) -> None:  # fmt: skip
    sentinel = len(where)
    end = len(ids)
    position = 0
    bucket = 0
    known_value = 0.0
    known_clock = 0.0
    state[OUT] = 0
    while position < end:
        index = ids[position]
        size = sizes[index]
        count = frequency[index] + 1
        if count == 1:
            outcome[position] = MISS
            if not admit[position] or size > state[CAPACITY]:
                position += 1
                continue
            if state[USED] + size > state[CAPACITY]:
                _evict_until(size, links, where, frequency, priority, bits, state, sizes, pins, evicted)
                if state[USED] + size > state[CAPACITY]:
                    position += 1
                    continue
            state[USED] += size
            where[index] = LISTED
            outcome[position] = ADMITTED
        else:
            outcome[position] = HIT
        value = priority[-1] + count / (1 if state[COST_IS_SIZE] else size)
        frequency[index] = count
        priority[index] = value
        position += 1
        if value != known_value or priority[-1] != known_clock:
            known_value = value
            known_clock = priority[-1]
            bucket = _list_of(index, bits)
        if bucket:
            state[LOWEST] = min(state[LOWEST], bucket)
        recent = index
        if count > 1:
            # Neighbours in their list that get the same priority, in this order, move as one run.
            while position < end and links[recent, PREV] == ids[position]:
                following = ids[position]
                if frequency[following] + 1 != count or sizes[following] != size:
                    break
                recent = following
                frequency[recent] = count
                priority[recent] = value
                outcome[position] = HIT
                position += 1
            unlink_run(links, recent, index)
        push_run(links, sentinel + bucket, recent, index)


@kernel
def _shrink(
    sizes: Ints, pins: Pins, links: Links, where: Places, frequency: Counts, priority: Floats, bits: Ints,
    state: Ints, evicted: Ids,
) -> None:  # fmt: skip
    state[OUT] = 0
    _evict_until(0, links, where, frequency, priority, bits, state, sizes, pins, evicted)


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, frequency: Counts, state: Ints) -> None:
    for index in ids:
        if where[index] == LISTED:
            unlink(links, index)
            where[index] = 0
            frequency[index] = 0
            state[USED] -= sizes[index]


class Gdsf(Policy):
    """GDSF. cost_is_size: 0, every block costs 1 to fetch; 1, it costs its size (LFU, dynamic aging)."""

    name: ClassVar[str] = "gdsf"
    KNOBS: ClassVar[Mapping[str, float]] = {"cost_is_size": 0}

    def _make(self) -> None:
        self._links = make_rings(self.max_ids, LISTS)
        self._frequency = np.zeros(self.max_ids, dtype=np.int32)
        self._priority = np.zeros(self.max_ids + 1, dtype=np.float64)  # the last one is the clock
        # As integers the bits of floats that are not negative have the order of the floats.
        self._bits = self._priority.view(np.int64)
        self._state[LOWEST] = LISTS
        self._state[COST_IS_SIZE] = whole(self.name, self.knobs, "cost_is_size", 0, 1)

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(
            ids, admit, sizes, pins, self._links, self.where, self._frequency, self._priority, self._bits,
            self._state, outcome, evicted,
        )  # fmt: skip

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._frequency, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(
            sizes, pins, self._links, self.where, self._frequency, self._priority, self._bits, self._state,
            evicted,
        )  # fmt: skip

    def order(self) -> Ids:
        """Lowest priority first, of equal ones the least recent."""
        residents = rings_in_order(self._links, self.max_ids, *range(LISTS))
        return residents[np.argsort(self._priority[residents], kind="stable")]
