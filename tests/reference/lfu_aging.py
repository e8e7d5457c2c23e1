"""LFU with aging from its definition: a counter and the time of the last touch per resident item.

After Robinson and Devarakonda, "Data cache management using frequency-based replacement", SIGMETRICS 1990:
all counters are divided now and then. Here that is after every age_every-th access that hit or came in
(never if it is 0), by a right shift of every counter. The unpinned item with the lowest counter leaves, of
equal ones the least recently touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item

MAX_COUNT = 32_767


class ReferenceLfuAging:
    def __init__(self, capacity: int, age_every: int = 10_000, age_shift: int = 1) -> None:
        self.capacity = capacity
        self.age_every = age_every
        self.age_shift = age_shift
        self.counts: dict[Item, int] = {}
        self.touched: dict[Item, int] = {}
        self.now = 0

    def _used(self, sizes: Any) -> int:
        return sum(int(sizes[item]) for item in self.counts)

    def _rank(self, item: Item) -> tuple[int, int]:
        return self.counts[item], self.touched[item]

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(item in self.counts)
            if not hits[-1]:
                if not may or sizes[item] > self.capacity:
                    continue
                if not self._evict(int(sizes[item]), sizes, pins, evicted):
                    continue
            self.now += 1
            self.counts[item] = min(MAX_COUNT, self.counts.get(item, 0) + 1)
            self.touched[item] = self.now
            if self.age_every and self.now % self.age_every == 0:
                self.counts = {item: count >> self.age_shift for item, count in self.counts.items()}
        return Answer(hits, evicted, list(evicted))

    def _evict(self, size: int, sizes: Any, pins: Any, evicted: list[Item]) -> bool:
        while self._used(sizes) + size > self.capacity:
            may_leave = [item for item in self.counts if not pins[item]]
            if not may_leave:
                return False
            victim = min(may_leave, key=self._rank)
            self.remove([victim])
            evicted.append(victim)
        return True

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            self.counts.pop(item, None)
            self.touched.pop(item, None)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted: list[Item] = []
        self._evict(0, sizes, pins, evicted)
        return Answer([], evicted, list(evicted))

    def resident(self, item: Item) -> bool:
        return item in self.counts

    known = resident

    def order(self) -> list[Item]:
        return sorted(self.counts, key=self._rank)
