"""Multi-queue replacement (MQ), in the unit of sizes.

Zhou, Philbin and Li, "The Multi-Queue replacement algorithm for second level buffer caches", USENIX ATC
2001, section 4. Queue k holds, least recent first, what has been accessed 2^k to 2^(k+1) - 1 times; what
leaves does so from the lowest queue that is not empty. Whatever is not accessed for a lifetime moves one
queue down, at most one block of each queue per access. Qout remembers how often its ghosts were accessed.
The order of the paper is kept: room is made before Qout is looked up, blocks move down after the access.

Where the paper leaves a choice or goes further: Qout is several times as large as the cache in the paper;
here it weighs at most `ghosts` <= 1 capacities, and is cut to that when the newcomer has been taken out
of it. A block is due when the present lifetime has passed since it was last accessed or moved down. A
miss that is kept out takes no time. The paper takes as lifetime the peak temporal distance of the
traffic: the distance in accesses that is the most frequent of those above the number of blocks in the
cache. The default is the least that this allows, and what it is where distances grow rarer beyond the
cache: one access per block that fits, at the mean size of the residents. For a small cache and known
traffic, give the traffic's own peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from kvstrata.errors import ConfigError
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

GHOST = -1  # where of what lies in queue k is k + 1

GHOST_CAPACITY, COUNT, GHOSTS, QUEUES, LIFETIME, NOW, OLDEST = range(OWN, OWN + 7)
"""COUNT: residents. OLDEST: no head of a queue above the lowest was touched before it. OUT, GONE: counts
of the call."""

REFERENCES, TOUCHED = 0, 1  # columns of an id's record: accesses so far, time of the last move

NEVER = 2**62  # beyond all times, and with a lifetime still an int64
LONGEST = 2.0**60


@kernel
def _queue_of(references: int, queues: int) -> int:
    queue = 0
    while queue < queues - 1 and references >> (queue + 1):
        queue += 1
    return queue


@inlined
def _move_down(links: Links, where: Places, record: Ints, state: Ints) -> None:
    """The paper's Adjust without its clock tick: the head of every queue that is due goes one lower."""
    sentinel = len(where)
    due = state[NOW] - state[LIFETIME]
    oldest = NEVER
    for queue in range(1, state[QUEUES]):
        head = links[sentinel + queue, PREV]
        if head < sentinel and record[head, TOUCHED] < due:
            unlink(links, head)
            push_recent(links, sentinel + queue - 1, head)
            record[head, TOUCHED] = state[NOW]
            where[head] = queue
            oldest = min(oldest, state[NOW])
            head = links[sentinel + queue, PREV]
        if head < sentinel:
            oldest = min(oldest, record[head, TOUCHED])
    state[OLDEST] = oldest


@inlined
def _make_room(
    needed: int, links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins, evicted: Ids
) -> None:
    sentinel = len(where)
    queue = 0
    while state[USED] + needed > state[CAPACITY]:
        victim = coldest_unpinned(links, pins, sentinel + queue)
        if victim < 0:
            queue += 1
            if queue == state[QUEUES]:
                return
            continue
        unlink(links, victim)
        push_recent(links, sentinel + state[QUEUES], victim)
        where[victim] = GHOST
        state[USED] -= sizes[victim]
        state[COUNT] -= 1
        state[GHOSTS] += sizes[victim]
        evicted[state[OUT]] = victim
        state[OUT] += 1


@inlined
def _trim(links: Links, where: Places, record: Ints, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Forget the oldest ghosts beyond the bound."""
    while state[GHOSTS] > state[GHOST_CAPACITY]:
        oldest = links[len(where) + state[QUEUES], PREV]
        unlink(links, oldest)
        where[oldest] = 0
        record[oldest, REFERENCES] = 0
        state[GHOSTS] -= sizes[oldest]
        forgotten[state[GONE]] = oldest
        state[GONE] += 1


@kernel
def _set_lifetime(lifetime: int, capacities: float, state: Ints) -> None:
    """In accesses; 0 means so many times the blocks that fit."""
    if lifetime == 0 and state[COUNT] > 0:
        blocks = state[CAPACITY] // (state[USED] // state[COUNT])
        lifetime = int(min(capacities * blocks, LONGEST))
    state[LIFETIME] = lifetime


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, record: Ints,
    state: Ints, lifetime: int, capacities: float, outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    sentinel = len(where)
    queues = state[QUEUES]
    end = len(ids)
    position = 0
    state[OUT] = 0
    state[GONE] = 0
    _set_lifetime(lifetime, capacities, state)
    while position < end:
        index = ids[position]
        now = state[NOW]
        if where[index] > 0:
            # Neighbours that are touched in the order of their queue and go to the same one move as one
            # run, unless something may move down in between.
            queue = _queue_of(record[index, REFERENCES] + 1, queues)
            below = NEVER if queue == queues - 1 else 2 << queue
            run = min(state[OLDEST], now) + state[LIFETIME] - now + 1
            stop = min(end, position + max(run, 1))
            recent = index
            while True:
                record[recent, REFERENCES] += 1
                record[recent, TOUCHED] = now
                where[recent] = queue + 1
                outcome[position] = HIT
                now += 1
                position += 1
                if position >= stop:
                    break
                following = ids[position]
                if links[recent, PREV] != following:
                    break
                references = record[following, REFERENCES] + 1
                if references >> queue == 0 or references >= below:
                    break
                recent = following
            unlink_run(links, recent, index)
            push_run(links, sentinel + queue, recent, index)
        else:
            size = sizes[index]
            outcome[position] = MISS
            position += 1
            if not admit[position - 1] or size > state[CAPACITY]:
                continue
            used = state[USED]
            count = state[COUNT]
            if used + size > state[CAPACITY]:
                _make_room(size, links, where, state, sizes, pins, evicted)
            room_is_there = state[USED] + size <= state[CAPACITY]
            if room_is_there:
                if where[index] == GHOST:
                    unlink(links, index)
                    state[GHOSTS] -= size
                record[index, REFERENCES] += 1
                record[index, TOUCHED] = now
                queue = _queue_of(record[index, REFERENCES], queues)
                push_recent(links, sentinel + queue, index)
                where[index] = queue + 1
                state[USED] += size
                state[COUNT] += 1
                outcome[position - 1] = ADMITTED
                now += 1
            _trim(links, where, record, state, sizes, forgotten)
            if state[USED] != used or state[COUNT] != count:
                _set_lifetime(lifetime, capacities, state)
            if not room_is_there:
                continue
        if queue > 0:
            state[OLDEST] = min(state[OLDEST], state[NOW])
        state[NOW] = now
        if state[OLDEST] + state[LIFETIME] < now:
            _move_down(links, where, record, state)


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, record: Ints, state: Ints) -> None:
    for index in ids:
        place = where[index]
        if place == 0:
            continue
        unlink(links, index)
        where[index] = 0
        record[index, REFERENCES] = 0
        if place == GHOST:
            state[GHOSTS] -= sizes[index]
        else:
            state[USED] -= sizes[index]
            state[COUNT] -= 1


@kernel
def _shrink(
    sizes: Ints, pins: Pins, links: Links, where: Places, record: Ints, state: Ints, evicted: Ids,
    forgotten: Ids,
) -> None:  # fmt: skip
    state[OUT] = 0
    state[GONE] = 0
    _make_room(0, links, where, state, sizes, pins, evicted)
    _trim(links, where, record, state, sizes, forgotten)


class Mq(Policy):
    """MQ.

    queues: how many, 1 to 32. lifetime: accesses after which a block moves down; 0 stands for
    lifetime_capacities times the blocks that fit. ghosts: weight of Qout over the capacity, at most 1.
    """

    name: ClassVar[str] = "mq"
    KNOBS: ClassVar[Mapping[str, float]] = {
        "queues": 8, "lifetime": 0, "lifetime_capacities": 1.0, "ghosts": 1.0
    }  # fmt: skip

    def _make(self) -> None:
        queues = whole(self.name, self.knobs, "queues", 1, 32)
        self._lifetime = whole(self.name, self.knobs, "lifetime", 0, int(LONGEST))
        self._capacities = float(self.knobs["lifetime_capacities"])
        if not 0 < self._capacities <= 1e6:
            raise ConfigError(
                f"policy mq: lifetime_capacities is {self._capacities}; take a number above 0, at most 1e6"
            )
        self._ghosts = share(self.name, self.knobs, "ghosts")
        self._links = make_rings(self.max_ids, queues + 1)  # the last one is Qout
        self._record = np.zeros((self.max_ids, 2), dtype=np.int64)
        self._state[QUEUES] = queues
        self._state[OLDEST] = NEVER

    def _set_capacity(self, capacity: int) -> None:
        super()._set_capacity(capacity)
        self._state[GHOST_CAPACITY] = int(self._ghosts * capacity)

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(
            ids, admit, sizes, pins, self._links, self.where, self._record, self._state,
            self._lifetime, self._capacities, outcome, evicted, forgotten,
        )  # fmt: skip

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._record, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(sizes, pins, self._links, self.where, self._record, self._state, evicted, forgotten)

    def order(self) -> Ids:
        return rings_in_order(self._links, self.max_ids, *range(int(self._state[QUEUES])))
