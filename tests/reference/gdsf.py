"""Greedy-Dual-Size-Frequency from its report: a priority per resident item, and the clock.

Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1, 1998: Pr(f) = Clock + Fr(f) x Cost(f) / Size(f), set at every access; the unpinned item with
the lowest one leaves, of equal ones the least recently touched, and its priority becomes the clock. The
clock never goes back (as it would where an item that was pinned below it leaves later).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceGdsf:
    """cost_is_size: 0, every item costs 1; 1, it costs its size."""

    def __init__(self, capacity: int, cost_is_size: int = 0) -> None:
        self.capacity = capacity
        self.cost_is_size = cost_is_size
        self.clock = 0.0
        self.frequency: dict[Item, int] = {}
        self.priority: dict[Item, float] = {}
        self.touched: dict[Item, int] = {}
        self.now = 0

    def _used(self, sizes: Any) -> int:
        return sum(int(sizes[item]) for item in self.priority)

    def _rank(self, item: Item) -> tuple[float, int]:
        return self.priority[item], self.touched[item]

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(item in self.priority)
            if not hits[-1]:
                if not may or sizes[item] > self.capacity:
                    continue
                if not self._evict(int(sizes[item]), sizes, pins, evicted):
                    continue
            self.now += 1
            self.frequency[item] = self.frequency.get(item, 0) + 1
            cost = int(sizes[item]) if self.cost_is_size else 1
            self.priority[item] = self.clock + self.frequency[item] * cost / int(sizes[item])
            self.touched[item] = self.now
        return Answer(hits, evicted, list(evicted))

    def _evict(self, size: int, sizes: Any, pins: Any, evicted: list[Item]) -> bool:
        while self._used(sizes) + size > self.capacity:
            may_leave = [item for item in self.priority if not pins[item]]
            if not may_leave:
                return False
            victim = min(may_leave, key=self._rank)
            self.clock = max(self.clock, self.priority[victim])
            self.remove([victim])
            evicted.append(victim)
        return True

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            for known in (self.frequency, self.priority, self.touched):
                known.pop(item, None)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted: list[Item] = []
        self._evict(0, sizes, pins, evicted)
        return Answer([], evicted, list(evicted))

    def resident(self, item: Item) -> bool:
        return item in self.priority

    known = resident

    def order(self) -> list[Item]:
        return sorted(self.priority, key=self._rank)
