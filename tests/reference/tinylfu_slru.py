"""TinyLFU before a segmented LRU, from the papers, plain: a table of counters and two lists.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions on
Storage 2017, section 3: a Count-Min sketch of small counters; when as many accesses were counted as make a
sample, this number and all counters are halved. Karedla, Love and Wherry, "Caching strategies to improve
disk system performance", Computer 1994: probation and protected segment. No doorkeeper, no window.
A newcomer that does not fit must be estimated higher than every one of those that would have to leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item

ROWS = 4
MAX_COUNT = 15
WORD = 2**64 - 1


def digest_of(item: Item) -> int:
    """Of an id, splitmix64 (Steele, Lea, Flood 2014); of a key, its first eight bytes."""
    if isinstance(item, bytes):
        return int.from_bytes(item[:8], "little")
    assert isinstance(item, int)
    word = item + 0x9E3779B97F4A7C15 & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


class ReferenceTinyLfuSlru:
    """Lists hold what leaves first at the front. sample: in multiples of the blocks that fit."""

    def __init__(
        self, capacity: int, prob_frac: float = 0.2, cms_width: int = 16_384, sample: int = 10
    ) -> None:
        self.capacity = capacity
        self.prob_frac = prob_frac
        self.width = cms_width
        self.sample = sample
        self.probation: list[Item] = []
        self.protected: list[Item] = []
        self.rows: list[dict[int, int]] = [{} for _ in range(ROWS)]
        self.counted = 0

    def _cells(self, item: Item) -> list[int]:
        """One position per row, by double hashing (Kirsch and Mitzenmacher, ESA 2006)."""
        digest = digest_of(item)
        first, step = digest & 0xFFFF_FFFF, digest >> 32 | 1
        return [(first + row * step) % self.width for row in range(ROWS)]

    def estimate(self, item: Item) -> int:
        return min(row.get(cell, 0) for row, cell in zip(self.rows, self._cells(item), strict=True))

    def _count(self, item: Item, sizes: Any) -> None:
        for row, cell in zip(self.rows, self._cells(item), strict=True):
            row[cell] = min(MAX_COUNT, row.get(cell, 0) + 1)
        self.counted += 1
        residents = self.order()
        if residents:
            mean = max(1, _bytes(residents, sizes) // len(residents))
            if self.counted >= self.sample * max(1, self.capacity // mean):
                self.counted //= 2
                self.rows = [{cell: count // 2 for cell, count in row.items()} for row in self.rows]

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if hits[-1]:
                self._count(item, sizes)
                (self.probation if item in self.probation else self.protected).remove(item)
                self.protected.append(item)
                self._demote(sizes)
            elif may and sizes[item] <= self.capacity:
                self._count(item, sizes)
                losers = self._must_leave(int(sizes[item]), sizes, pins)
                if losers is None or any(self.estimate(item) <= self.estimate(loser) for loser in losers):
                    continue
                self.remove(losers)
                evicted += losers
                self.probation.append(item)
        return Answer(hits, evicted, list(evicted))

    def _demote(self, sizes: Any) -> None:
        bound = self.capacity - int(self.prob_frac * self.capacity)
        while _bytes(self.protected, sizes) > bound:
            self.probation.append(self.protected.pop(0))

    def _must_leave(self, size: int, sizes: Any, pins: Any) -> list[Item] | None:
        """Who makes room, in order; None if all together do not."""
        losers: list[Item] = []
        order = self.order()
        while _bytes(order, sizes) - _bytes(losers, sizes) + size > self.capacity:
            victim = next((item for item in order if not pins[item] and item not in losers), None)
            if victim is None:
                return None
            losers.append(victim)
        return losers

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            for segment in (self.probation, self.protected):
                if item in segment:
                    segment.remove(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        """Who leaves now does so whatever its frequency."""
        self.capacity = capacity
        self._demote(sizes)
        evicted: list[Item] = []
        for item in self.order():
            if _bytes(self.order(), sizes) > capacity and not pins[item]:
                self.remove([item])
                evicted.append(item)
        return Answer([], evicted, list(evicted))

    def resident(self, item: Item) -> bool:
        return item in self.probation or item in self.protected

    known = resident

    def order(self) -> list[Item]:
        return self.probation + self.protected


def _bytes(items: Sequence[Item], sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
