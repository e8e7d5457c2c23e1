"""LRU from its definition, leaf first and plain: every resident item has the time of its last touch.

Leaf first, a request touches its items from the last to the first. The resident items of the request
are out of reach until the request has touched them; otherwise the unpinned item with the oldest touch
leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceLru:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.touched: dict[Item, int] = {}
        self.now = 0

    def _used(self, sizes: Any) -> int:
        return sum(int(sizes[item]) for item in self.touched)

    def _make_room(self, size: int, sizes: Any, pins: Any, out_of_reach: set[Item]) -> list[Item]:
        evicted: list[Item] = []
        while self._used(sizes) + size > self.capacity:
            may_leave = [item for item in self.touched if not pins[item] and item not in out_of_reach]
            if not may_leave:
                break
            oldest = min(may_leave, key=self.touched.__getitem__)
            del self.touched[oldest]
            evicted.append(oldest)
        return evicted

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits = [item in self.touched for item in items]
        waiting = {item for item, hit in zip(items, hits, strict=True) if hit}
        evicted: list[Item] = []
        for item, may in reversed(list(zip(items, admit, strict=True))):
            if item in waiting:
                waiting.remove(item)
            else:
                if not may or sizes[item] > self.capacity:
                    continue
                evicted += self._make_room(int(sizes[item]), sizes, pins, waiting)
                if self._used(sizes) + sizes[item] > self.capacity:
                    continue
            self.now += 1
            self.touched[item] = self.now
        return Answer(hits, evicted, list(evicted))

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            self.touched.pop(item, None)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted = self._make_room(0, sizes, pins, set())
        return Answer([], evicted, list(evicted))

    def resident(self, item: Item) -> bool:
        return item in self.touched

    known = resident

    def order(self) -> list[Item]:
        return sorted(self.touched, key=self.touched.__getitem__)


class ReferenceLruForward(ReferenceLru):
    """Plain: the items one after another, nothing out of reach."""

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            answer = super().access([item], [may], sizes, pins, request)
            hits += answer.hits
            evicted += answer.evicted
        return Answer(hits, evicted, list(evicted))
