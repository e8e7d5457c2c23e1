"""S3-FIFO from its paper, plain: three lists, a dict of frequencies, and sums taken anew.

Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023,
algorithm 1: S is the small queue, M the main queue, G the ghost queue. A block that moves from S to M
starts there with frequency 0. Until the first eviction, S keeps to its share: what finds it full enters M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceS3Fifo:
    """Lists hold the tail of the paper (what leaves first) at the front."""

    def __init__(self, capacity: int, small: float = 0.1, ghost: float = 0.9, threshold: int = 2) -> None:
        self.capacity = capacity
        self.small = small
        self.ghost = ghost
        self.threshold = threshold
        self.s: list[Item] = []
        self.m: list[Item] = []
        self.g: list[Item] = []
        self.freq: dict[Item, int] = {}
        self.filling = True

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        forgotten: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if hits[-1]:
                self.freq[item] = min(self.freq[item] + 1, 3)
            elif may and sizes[item] <= self.capacity:
                if self._evict(int(sizes[item]), sizes, pins, evicted):
                    self._insert(item, sizes)
                self._trim(sizes, forgotten)
        return Answer(hits, evicted, forgotten)

    def _insert(self, item: Item, sizes: Any) -> None:
        if item in self.g:
            self.g.remove(item)
            self.m.append(item)
        elif self.filling and self._small_is_full(sizes):
            self.m.append(item)
        else:
            self.s.append(item)
        self.freq[item] = 0

    def _small_is_full(self, sizes: Any) -> bool:
        return _bytes(self.s, sizes) >= int(self.small * self.capacity)

    def _evict(self, size: int, sizes: Any, pins: Any, evicted: list[Item]) -> bool:
        while _bytes(self.s + self.m, sizes) + size > self.capacity:
            if self._small_is_full(sizes) and self.s:
                turns = [self._evict_s, self._evict_m]
            else:
                turns = [self._evict_m, self._evict_s, self._evict_m]
            for turn in turns:
                victim = turn(pins)
                if victim is not None:
                    break
            else:
                return False
            evicted.append(victim)
            self.filling = False
        return True

    def _evict_s(self, pins: Any) -> Item | None:
        for item in list(self.s):
            if self.freq[item] >= self.threshold:
                self.s.remove(item)
                self.m.append(item)
                self.freq[item] = 0
            elif not pins[item]:
                self.s.remove(item)
                self.g.append(item)
                return item
        return None

    def _evict_m(self, pins: Any) -> Item | None:
        place = 0
        while place < len(self.m):
            item = self.m[place]
            if self.freq[item] > 0:
                self.m.append(self.m.pop(place))
                self.freq[item] -= 1
            elif pins[item]:
                place += 1
            else:
                del self.m[place]
                return item
        return None

    def _trim(self, sizes: Any, forgotten: list[Item]) -> None:
        while _bytes(self.g, sizes) > int(self.ghost * self.capacity):
            forgotten.append(self.g.pop(0))

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            for part in (self.s, self.m, self.g):
                if item in part:
                    part.remove(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted: list[Item] = []
        forgotten: list[Item] = []
        self._evict(0, sizes, pins, evicted)
        self._trim(sizes, forgotten)
        return Answer([], evicted, forgotten)

    def resident(self, item: Item) -> bool:
        return item in self.s or item in self.m

    def known(self, item: Item) -> bool:
        return self.resident(item) or item in self.g

    def order(self) -> list[Item]:
        return self.s + self.m


def _bytes(items: list[Item], sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
