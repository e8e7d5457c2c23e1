"""2Q from its paper, plain: three lists and sums taken anew.

Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement algorithm", VLDB
1994, section 2.2, "2Q, full version": Am is an LRU list, A1in a FIFO of what is new, A1out the FIFO of
the names of what left A1in. `reclaim` is the paper's reclaimfor; a free page is taken first. A block
whose name is in A1out gives its place there up before others are put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceTwoQ:
    """Lists hold what leaves first at the front."""

    def __init__(self, capacity: int, kin: float = 0.25, kout: float = 0.5) -> None:
        self.capacity = capacity
        self.kin = kin
        self.kout = kout
        self.a1in: list[Item] = []
        self.a1out: list[Item] = []
        self.am: list[Item] = []

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        forgotten: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if item in self.am:
                self.am.remove(item)
                self.am.append(item)
            elif item not in self.a1in and may and sizes[item] <= self.capacity:
                if self._reclaim(int(sizes[item]), sizes, pins, evicted):
                    if item in self.a1out:
                        self.a1out.remove(item)
                        self.am.append(item)
                    else:
                        self.a1in.append(item)
                self._trim(sizes, forgotten)
        return Answer(hits, evicted, forgotten)

    def _reclaim(self, size: int, sizes: Any, pins: Any, evicted: list[Item]) -> bool:
        """Free pages until `size` fits; False if nothing more may leave."""
        while _bytes(self.a1in + self.am, sizes) + size > self.capacity:
            first, other = self.a1in, self.am
            if _bytes(self.a1in, sizes) <= int(self.kin * self.capacity):
                first, other = other, first
            victim = next((item for item in first + other if not pins[item]), None)
            if victim is None:
                return False
            if victim in self.a1in:
                self.a1in.remove(victim)
                self.a1out.append(victim)
            else:
                self.am.remove(victim)
            evicted.append(victim)
        return True

    def _trim(self, sizes: Any, forgotten: list[Item]) -> None:
        while _bytes(self.a1out, sizes) > int(self.kout * self.capacity):
            forgotten.append(self.a1out.pop(0))

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            for part in (self.a1in, self.a1out, self.am):
                if item in part:
                    part.remove(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted: list[Item] = []
        forgotten: list[Item] = []
        self._reclaim(0, sizes, pins, evicted)
        self._trim(sizes, forgotten)
        return Answer([], evicted, forgotten)

    def resident(self, item: Item) -> bool:
        return item in self.a1in or item in self.am

    def known(self, item: Item) -> bool:
        return self.resident(item) or item in self.a1out

    def order(self) -> list[Item]:
        return self.a1in + self.am


def _bytes(items: list[Item], sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
