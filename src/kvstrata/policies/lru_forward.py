"""Least recently used, plain: every access in its order, the root of a request first.

Denning, "The working set model for program behavior", CACM 1968; the order in which libCacheSim and
other simulators of single objects see a request. The tail of a request ends as its most recent block,
so that roots leave before their children: kept for comparison, `lru` is the one for KV blocks.
"""

from __future__ import annotations

from typing import ClassVar

from kvstrata.jit import kernel
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
)
from kvstrata.policies.lists import PREV, Ids, Links, push_recent, push_run, unlink_run
from kvstrata.policies.lru import LISTED, OneList, make_room


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints,
    outcome: Outcomes, evicted: Ids,
) -> int:  # fmt: skip
    sentinel = len(where)
    used = state[USED]
    capacity = state[CAPACITY]
    end = len(ids)
    count = 0
    position = 0
    while position < end:
        index = ids[position]
        if where[index] == LISTED:
            # Neighbours that are touched in the order of the list keep it: they move as one run.
            recent = index
            outcome[position] = HIT
            position += 1
            while position < end and links[recent, PREV] == ids[position]:
                recent = ids[position]
                outcome[position] = HIT
                position += 1
            unlink_run(links, recent, index)
            push_run(links, sentinel, recent, index)
            continue
        size = sizes[index]
        outcome[position] = MISS
        if admit[position] and size <= capacity:
            used, count = make_room(size, used, capacity, links, where, sizes, pins, evicted, count)
            if used + size <= capacity:
                used += size
                push_recent(links, sentinel, index)
                where[index] = LISTED
                outcome[position] = ADMITTED
        position += 1
    state[USED] = used
    return count


class LruForward(OneList):
    """Plain LRU."""

    name: ClassVar[str] = "lru_forward"

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        self._state[OUT] = _access(
            ids, admit, sizes, pins, self._links, self.where, self._state, outcome, evicted
        )
