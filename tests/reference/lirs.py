"""LIRS from the rules of its paper, with two plain lists and a set.

Jiang and Zhang, "LIRS: an efficient low inter-reference recency set replacement policy to improve buffer
cache performance", SIGMETRICS 2002, section 3. The stack S is a list, bottom first; the queue Q is a
list, front first; what is resident and not in Q has LIR status.

Choices: sizes instead of block counts. The paper lets the stack grow without bound: here its non-resident
entries weigh at most one capacity, and the one that was evicted first goes. A newcomer has LIR status as
long as it comes in without an eviction and the LIR part has room for it. The bottom of S is a LIR block
or S is empty, after every step; after a removal from the next call on. Where all of Q is pinned, the
lowest unpinned LIR block of S leaves, as if it had been moved to Q first: nothing is remembered of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceLirs:
    def __init__(self, capacity: int, hir: float = 0.01) -> None:
        self.hir = hir
        self.stack: list[Item] = []
        self.queue: list[Item] = []
        self.lir: set[Item] = set()
        self.ghosts: list[Item] = []  # non-resident, in the order of their eviction
        self._set_capacity(capacity)

    def _set_capacity(self, capacity: int) -> None:
        self.capacity = capacity
        self.lir_capacity = max(0, capacity - max(1, int(self.hir * capacity)))

    def _used(self, sizes: Any) -> int:
        return _weight(self.lir, sizes) + _weight(self.queue, sizes)

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        forgotten: list[Item] = []
        self._prune(forgotten)
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if item in self.lir:
                self._to_top(item)
            elif item in self.queue:
                self.queue.remove(item)
                if item in self.stack:
                    self._to_top(item)
                    self.lir.add(item)
                    self._demote(sizes, forgotten)
                else:
                    self.stack.append(item)
                    self.queue.append(item)
            elif may and sizes[item] <= self.capacity:
                self._enter(item, sizes, pins, evicted, forgotten)
                self._trim(sizes, forgotten)
            self._prune(forgotten)
        return Answer(hits, evicted, forgotten)

    def _enter(self, item: Item, sizes: Any, pins: Any, evicted: list[Item], forgotten: list[Item]) -> None:
        size = int(sizes[item])
        room_was_there = self._used(sizes) + size <= self.capacity
        self._make_room(size, sizes, pins, evicted, forgotten)
        if self._used(sizes) + size > self.capacity:
            return
        if item in self.ghosts:
            self.ghosts.remove(item)
            self._to_top(item)
            self.lir.add(item)
            self._demote(sizes, forgotten)
        elif room_was_there and _weight(self.lir, sizes) + size <= self.lir_capacity:
            self.stack.append(item)
            self.lir.add(item)
        else:
            self.stack.append(item)
            self.queue.append(item)

    def _to_top(self, item: Item) -> None:
        self.stack.remove(item)
        self.stack.append(item)

    def _demote(self, sizes: Any, forgotten: list[Item]) -> None:
        """While LIR blocks weigh too much, the one at the bottom of S goes to the end of Q."""
        while _weight(self.lir, sizes) > self.lir_capacity:
            self._prune(forgotten)
            bottom = self.stack.pop(0)
            self.lir.remove(bottom)
            self.queue.append(bottom)
            self._prune(forgotten)

    def _prune(self, forgotten: list[Item]) -> None:
        """Take what has HIR status off the bottom of S."""
        while self.stack and self.stack[0] not in self.lir:
            bottom = self.stack.pop(0)
            if bottom in self.ghosts:
                self.ghosts.remove(bottom)
                forgotten.append(bottom)

    def _make_room(
        self, size: int, sizes: Any, pins: Any, evicted: list[Item], forgotten: list[Item]
    ) -> None:
        while self._used(sizes) + size > self.capacity:
            in_order = self.queue + [item for item in self.stack if item in self.lir]
            victim = next((item for item in in_order if not pins[item]), None)
            if victim is None:
                return
            evicted.append(victim)
            if victim in self.lir:
                self.lir.remove(victim)
                self.stack.remove(victim)
                self._prune(forgotten)
            else:
                self.queue.remove(victim)
                if victim in self.stack:
                    self.ghosts.append(victim)

    def _trim(self, sizes: Any, forgotten: list[Item]) -> None:
        while _weight(self.ghosts, sizes) > self.capacity:
            oldest = self.ghosts.pop(0)
            self.stack.remove(oldest)
            forgotten.append(oldest)

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            self.lir.discard(item)
            for part in (self.stack, self.queue, self.ghosts):
                if item in part:
                    part.remove(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self._set_capacity(capacity)
        evicted: list[Item] = []
        forgotten: list[Item] = []
        self._prune(forgotten)
        self._demote(sizes, forgotten)
        self._make_room(0, sizes, pins, evicted, forgotten)
        self._trim(sizes, forgotten)
        return Answer([], evicted, forgotten)

    def resident(self, item: Item) -> bool:
        return item in self.lir or item in self.queue

    def known(self, item: Item) -> bool:
        return self.resident(item) or item in self.ghosts

    def order(self) -> list[Item]:
        return self.queue + [item for item in self.stack if item in self.lir]


def _weight(items: Any, sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
