"""Least frequently used, with aging: all counters are shifted right every so many accesses.

Robinson and Devarakonda, "Data cache management using frequency-based replacement", SIGMETRICS 1990, where
all reference counts are halved when their mean has grown too large; without that paper's sections of the
cache. Here an aging comes after every age_every-th access instead, as in published studies of KV caches.

Choices: only accesses that hit or came in take time; a counter starts at 1, stays at 32,767, may be
shifted to 0, and is gone when its block leaves; of equal counters the least recently used block leaves;
blocks of a request are touched root first.

There is one list per counter value, most recent first, and a hit moves a block to the front of the next
one. An aging merges lists pairwise in order of time, and visits only blocks whose counter is not 0 yet: an
access makes a counter at most one bit longer and a shift one bit shorter, so that all agings together visit
no more blocks than there are accesses. Of the blocks that sank to 0 earlier, those are passed that were
touched after the oldest of the newly sunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

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
    unlink,
    unlink_run,
)

LISTED = 1
MAX_COUNT = 32_767
COUNT_SHIFT = 48
"""An id's key: its counter, and below it the time of its last touch; 0 for what is not resident."""

NEVER = 2**COUNT_SHIFT - 1

NOW, NEXT_AGING, LOWEST, HIGHEST, AGE_EVERY, AGE_SHIFT = range(OWN, OWN + 6)
"""LOWEST, HIGHEST: all lists outside are empty. OUT: evicted in this call."""


@kernel
def _merge(source: int, target: int, drop: int, links: Links, key: Ints) -> None:
    """Move a list into another in order of time; drop takes its keys to the counter of the target."""
    node = links[source, NEXT]
    place = links[target, NEXT]
    links[source, PREV] = source
    links[source, NEXT] = source
    while node != source:
        while place != target and key[place] > key[node] - drop:
            place = links[place, NEXT]
        newer_than = 0 if place == target else key[place]
        recent = node
        old = node
        while node != source and key[node] - drop > newer_than:
            key[node] -= drop
            old = node
            node = links[node, NEXT]
        before = links[place, PREV]
        links[before, NEXT] = recent
        links[recent, PREV] = before
        links[old, NEXT] = place
        links[place, PREV] = old


@kernel
def _age(links: Links, key: Ints, state: Ints, lists: int) -> None:
    """Shift every counter: as many halvings as the shift has bits. lists: sentinel of the counter 0."""
    for _ in range(state[AGE_SHIFT]):
        if state[HIGHEST] == 0:
            break
        for count in range(state[HIGHEST] // 2 + 1):
            even = 2 * count
            if even > 0:
                _merge(lists + even, lists + count, (even - count) << COUNT_SHIFT, links, key)
            if even < state[HIGHEST]:
                _merge(lists + even + 1, lists + count, (even + 1 - count) << COUNT_SHIFT, links, key)
        state[LOWEST] //= 2
        state[HIGHEST] //= 2


@kernel
def _evict_until(
    needed: int, links: Links, where: Places, key: Ints, state: Ints, sizes: Ints, pins: Pins, evicted: Ids
) -> None:
    """Evict until `needed` more fits or nothing may leave."""
    count = state[LOWEST]
    while state[USED] + needed > state[CAPACITY] and count <= state[HIGHEST]:
        sentinel = len(where) + count
        victim = coldest_unpinned(links, pins, sentinel)
        if victim < 0:
            if links[sentinel, PREV] == sentinel and count == state[LOWEST]:
                state[LOWEST] += 1
            count += 1
            continue
        unlink(links, victim)
        where[victim] = 0
        key[victim] = 0
        state[USED] -= sizes[victim]
        evicted[state[OUT]] = victim
        state[OUT] += 1


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, key: Ints, state: Ints,
    outcome: Outcomes, evicted: Ids,
) -> None:  # fmt: skip
    lists = len(where)
    end = len(ids)
    position = 0
    state[OUT] = 0
    while position < end:
        index = ids[position]
        if key[index] > 0:
            # Neighbours that are touched in the order of their list move to the next one as one run.
            count = min((key[index] >> COUNT_SHIFT) + 1, MAX_COUNT)
            stop = min(end, position + state[NEXT_AGING] - state[NOW])
            first = position
            stamp = (count << COUNT_SHIFT) + state[NOW] + 1 - first
            recent = index
            while True:
                key[recent] = stamp + position
                outcome[position] = HIT
                position += 1
                if position >= stop or links[recent, PREV] != ids[position]:
                    break
                recent = ids[position]
            unlink_run(links, recent, index)
            push_run(links, lists + count, recent, index)
            state[NOW] += position - first
            state[HIGHEST] = max(state[HIGHEST], count)
        else:
            size = sizes[index]
            outcome[position] = MISS
            position += 1
            if not admit[position - 1] or size > state[CAPACITY]:
                continue
            if state[USED] + size > state[CAPACITY]:
                _evict_until(size, links, where, key, state, sizes, pins, evicted)
                if state[USED] + size > state[CAPACITY]:
                    continue
            state[NOW] += 1
            state[USED] += size
            state[LOWEST] = min(state[LOWEST], 1)
            state[HIGHEST] = max(state[HIGHEST], 1)
            key[index] = (1 << COUNT_SHIFT) + state[NOW]
            where[index] = LISTED
            push_recent(links, lists + 1, index)
            outcome[position - 1] = ADMITTED
        if state[NOW] == state[NEXT_AGING]:
            _age(links, key, state, lists)
            state[NEXT_AGING] += state[AGE_EVERY]


@kernel
def _shrink(
    sizes: Ints, pins: Pins, links: Links, where: Places, key: Ints, state: Ints, evicted: Ids
) -> None:
    state[OUT] = 0
    _evict_until(0, links, where, key, state, sizes, pins, evicted)


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, key: Ints, state: Ints) -> None:
    for index in ids:
        if where[index] == LISTED:
            unlink(links, index)
            where[index] = 0
            key[index] = 0
            state[USED] -= sizes[index]


class LfuAging(Policy):
    """LFU with aging. age_every: accesses from one aging to the next, 0 for none. age_shift: bits."""

    name: ClassVar[str] = "lfu_aging"
    KNOBS: ClassVar[Mapping[str, float]] = {"age_every": 10_000, "age_shift": 1}

    def _make(self) -> None:
        age_every = whole(self.name, self.knobs, "age_every", 0, NEVER)
        self._links = make_rings(self.max_ids, MAX_COUNT + 1)
        self._key = np.zeros(self.max_ids, dtype=np.int64)
        self._state[AGE_EVERY] = age_every
        self._state[NEXT_AGING] = age_every or NEVER
        self._state[AGE_SHIFT] = whole(self.name, self.knobs, "age_shift", 1, 15)

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(ids, admit, sizes, pins, self._links, self.where, self._key, self._state, outcome, evicted)

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._key, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(sizes, pins, self._links, self.where, self._key, self._state, evicted)

    def order(self) -> Ids:
        """Lowest counter first, of equal ones the least recent."""
        residents = np.flatnonzero(self._key)
        return residents[np.argsort(self._key[residents])].astype(np.int32)
