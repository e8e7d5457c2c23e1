"""SIEVE from its paper, plain: one list, a set of what was visited, and the item at the hand.

Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is simpler than LRU: an efficient turn-key eviction
algorithm for web caches", NSDI 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceSieve:
    """queue: oldest first. hand: where the next search begins; None is the tail, the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue: list[Item] = []
        self.visited: set[Item] = set()
        self.hand: Item | None = None

    def _used(self, sizes: Any) -> int:
        return sum(int(sizes[item]) for item in self.queue)

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(item in self.queue)
            if hits[-1]:
                self.visited.add(item)
            elif (
                may and sizes[item] <= self.capacity and self._evict(int(sizes[item]), sizes, pins, evicted)
            ):
                self.queue.append(item)
        return Answer(hits, evicted, list(evicted))

    def _rotated(self) -> list[Item]:
        """The queue as the hand will pass it."""
        start = 0 if self.hand is None else self.queue.index(self.hand)
        return self.queue[start:] + self.queue[:start]

    def _evict(self, size: int, sizes: Any, pins: Any, evicted: list[Item]) -> bool:
        while self._used(sizes) + size > self.capacity:
            # Twice around: after once, nobody is visited.
            for item in self._rotated() * 2:
                if item in self.visited:
                    self.visited.remove(item)
                elif not pins[item]:
                    self.remove([item], at_hand=item)
                    evicted.append(item)
                    break
            else:
                return False
        return True

    def remove(self, items: Sequence[Item], at_hand: Item | None = None) -> None:
        """Where the item at the hand goes, the hand goes on to the next newer one."""
        self.hand = self.hand if at_hand is None else at_hand
        for item in items:
            if item not in self.queue:
                continue
            newer = self.queue[self.queue.index(item) + 1 :]
            if item == self.hand:
                self.hand = newer[0] if newer else None
            self.queue.remove(item)
            self.visited.discard(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        evicted: list[Item] = []
        self._evict(0, sizes, pins, evicted)
        return Answer([], evicted, list(evicted))

    def resident(self, item: Item) -> bool:
        return item in self.queue

    known = resident

    def order(self) -> list[Item]:
        """As the hand would take them if nothing else happened."""
        rotated = self._rotated()
        return [item for item in rotated if item not in self.visited] + [
            item for item in rotated if item in self.visited
        ]
