"""MQ from the pseudo-code of its paper, with a list per queue.

Zhou, Philbin and Li, "The Multi-Queue replacement algorithm for second level buffer caches", USENIX ATC
2001, section 4: on a miss EvictBlock first and the look into Qout after it, then the reference count, the
queue of its logarithm, and Adjust. Lists hold the head (what was touched first) first.

Choices: sizes instead of block counts. Qout weighs at most `ghosts` capacities, and is cut to that when
the newcomer has been taken out of it. A block expires `lifetime` accesses after it was last touched or
moved down, the lifetime being the present one; 0 makes it `lifetime_capacities` times the number of
blocks of the residents' mean size that fit. A miss that is kept out takes no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceMq:
    def __init__(
        self,
        capacity: int,
        queues: int = 8,
        lifetime: int = 0,
        lifetime_capacities: float = 1.0,
        ghosts: float = 1.0,
    ) -> None:
        self.capacity = capacity
        self.lifetime = lifetime
        self.lifetime_capacities = lifetime_capacities
        self.ghost_share = ghosts
        self.queues: list[list[Item]] = [[] for _ in range(queues)]
        self.out: list[Item] = []
        self.references: dict[Item, int] = {}  # of residents and of what is in Qout
        self.touched: dict[Item, int] = {}
        self.now = 0

    def _lifetime(self, sizes: Any) -> int:
        if self.lifetime:
            return self.lifetime
        mean = _weight(self.touched, sizes) // len(self.touched)
        return int(self.lifetime_capacities * (self.capacity // mean))

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        forgotten: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if self.resident(item):
                self._queue_of(item).remove(item)
            else:
                if not may or sizes[item] > self.capacity:
                    continue
                self._make_room(int(sizes[item]), sizes, pins, evicted)
                if self._used(sizes) + sizes[item] > self.capacity:
                    self._trim(sizes, forgotten)
                    continue
                if item in self.out:
                    self.out.remove(item)
                self._trim(sizes, forgotten)
            self.references[item] = self.references.get(item, 0) + 1
            self.queues[self._queue_number(self.references[item])].append(item)
            self.touched[item] = self.now
            self._adjust(self._lifetime(sizes))
        return Answer(hits, evicted, forgotten)

    def _used(self, sizes: Any) -> int:
        return _weight(self.touched, sizes)

    def _queue_of(self, item: Item) -> list[Item]:
        return next(queue for queue in self.queues if item in queue)

    def _queue_number(self, references: int) -> int:
        return min(references.bit_length() - 1, len(self.queues) - 1)

    def _adjust(self, lifetime: int) -> None:
        self.now += 1
        for level in range(1, len(self.queues)):
            if self.queues[level] and self.touched[self.queues[level][0]] + lifetime < self.now:
                head = self.queues[level].pop(0)
                self.queues[level - 1].append(head)
                self.touched[head] = self.now

    def _make_room(self, size: int, sizes: Any, pins: Any, evicted: list[Item]) -> None:
        while self._used(sizes) + size > self.capacity:
            victim = next((item for item in self.order() if not pins[item]), None)
            if victim is None:
                return
            self._queue_of(victim).remove(victim)
            del self.touched[victim]
            self.out.append(victim)
            evicted.append(victim)

    def _trim(self, sizes: Any, forgotten: list[Item]) -> None:
        while _weight(self.out, sizes) > int(self.ghost_share * self.capacity):
            oldest = self.out.pop(0)
            del self.references[oldest]
            forgotten.append(oldest)

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            if self.resident(item):
                self._queue_of(item).remove(item)
                del self.touched[item]
            if item in self.out:
                self.out.remove(item)
            self.references.pop(item, None)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted: list[Item] = []
        forgotten: list[Item] = []
        self._make_room(0, sizes, pins, evicted)
        self._trim(sizes, forgotten)
        return Answer([], evicted, forgotten)

    def resident(self, item: Item) -> bool:
        return item in self.touched

    def known(self, item: Item) -> bool:
        return item in self.references

    def order(self) -> list[Item]:
        return [item for queue in self.queues for item in queue]


def _weight(items: Any, sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
