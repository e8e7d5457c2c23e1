"""SIEVE, in the unit of sizes.

Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU: an efficient turn-key eviction
algorithm for web caches", NSDI 2024, algorithm 1. One queue in order of arrival; a hit marks its block
visited and moves nothing. A hand goes from the oldest block to the newest and round again, takes the mark
off what is visited and evicts the first block without one.

With equal sizes and no pins this is the published algorithm. Where the paper leaves a choice: blocks of a
request are touched root first; the hand passes over pinned blocks; where nothing may leave, the marks are
gone and the hand stays where it was; a block that is removed at the hand hands it to the next newer one.
"""

from __future__ import annotations

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
from kvstrata.policies.lists import PREV, Ids, Links, make_rings, push_recent, ring_order, unlink

PLAIN, VISITED = 1, 2
HAND = OWN
"""state[HAND]: the node at which the next search begins; the sentinel stands for the oldest."""


@kernel
def _victim(links: Links, where: Places, state: Ints, pins: Pins) -> int:
    """The block that leaves, or -1."""
    sentinel = len(where)
    node = state[HAND]
    rounds = 0
    while True:
        if node == sentinel:
            # Begun anywhere, the third time here is after two whole rounds: every mark is off by then.
            rounds += 1
            node = links[sentinel, PREV]
            if rounds == 3 or node == sentinel:
                return -1
        if where[node] == VISITED:
            where[node] = PLAIN
        elif pins[node] == 0:
            return int(node)
        node = links[node, PREV]


@kernel
def _leave(index: int, links: Links, where: Places, state: Ints, sizes: Ints) -> None:
    unlink(links, index)
    where[index] = 0
    state[USED] -= sizes[index]


@kernel
def _evict_until(
    needed: int, links: Links, where: Places, state: Ints, sizes: Ints, pins: Pins, evicted: Ids, count: int
) -> int:
    """Evict until `needed` more fits or nothing may leave; return the new count of evicted."""
    while state[USED] + needed > state[CAPACITY]:
        victim = _victim(links, where, state, pins)
        if victim < 0:
            break
        state[HAND] = links[victim, PREV]
        _leave(victim, links, where, state, sizes)
        evicted[count] = victim
        count += 1
    return count


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints,
    outcome: Outcomes, evicted: Ids,
) -> int:  # fmt: skip
    count = 0
    for position in range(len(ids)):
        index = ids[position]
        if where[index] > 0:
            where[index] = VISITED
            outcome[position] = HIT
            continue
        outcome[position] = MISS
        size = sizes[index]
        if admit[position] and size <= state[CAPACITY]:
            if state[USED] + size > state[CAPACITY]:
                count = _evict_until(size, links, where, state, sizes, pins, evicted, count)
            if state[USED] + size <= state[CAPACITY]:
                push_recent(links, len(where), index)
                where[index] = PLAIN
                state[USED] += size
                outcome[position] = ADMITTED
    return count


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, state: Ints) -> None:
    for index in ids:
        if where[index] > 0:
            if state[HAND] == index:
                state[HAND] = links[index, PREV]
            _leave(index, links, where, state, sizes)


class Sieve(Policy):
    """SIEVE; no parameters, no ghosts."""

    name: ClassVar[str] = "sieve"

    def _make(self) -> None:
        self._links = make_rings(self.max_ids, 1)
        self._state[HAND] = self.max_ids

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        self._state[OUT] = _access(
            ids, admit, sizes, pins, self._links, self.where, self._state, outcome, evicted
        )

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        self._state[OUT] = _evict_until(0, self._links, self.where, self._state, sizes, pins, evicted, 0)

    def order(self) -> Ids:
        """As the hand would take them if nothing else happened: two rounds, the marked in the second."""
        queue = np.zeros(self.max_ids, dtype=np.int32)
        queue = queue[: ring_order(self._links, self.max_ids, queue)]
        at_hand = np.flatnonzero(queue == self._state[HAND])
        if len(at_hand):
            queue = np.roll(queue, -int(at_hand[0]))
        visited = self.where[queue] == VISITED
        return np.concatenate([queue[~visited], queue[visited]])
