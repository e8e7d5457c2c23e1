"""ARC twice: as published for pages, and with what a block cache needs beyond that.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003, figure 4.
`PublishedArc` is that figure, line by line: single accesses, equal sizes, no pins. `ReferenceArc`
adds sizes in bytes, requests of several items, pins, admission, removal and a changing capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class PublishedArc:
    """Lists hold the LRU page first. c: pages in the cache."""

    def __init__(self, c: int) -> None:
        self.c = c
        self.p = 0.0
        self.t1: list[Item] = []
        self.t2: list[Item] = []
        self.b1: list[Item] = []
        self.b2: list[Item] = []

    def request(self, x: Item) -> bool:
        """ARC(c), cases I to IV; True for a hit."""
        t1, t2, b1, b2 = self.t1, self.t2, self.b1, self.b2
        if x in t1 or x in t2:  # case I
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
            return True
        if x in b1:  # case II
            delta = 1.0 if len(b1) >= len(b2) else len(b2) / len(b1)
            self.p = min(self.p + delta, self.c)
            self._replace(x)
            b1.remove(x)
            t2.append(x)
            return False
        if x in b2:  # case III
            delta = 1.0 if len(b2) >= len(b1) else len(b1) / len(b2)
            self.p = max(self.p - delta, 0.0)
            self._replace(x)
            b2.remove(x)
            t2.append(x)
            return False
        in_l1, in_l2 = len(t1) + len(b1), len(t2) + len(b2)  # case IV
        if in_l1 == self.c:
            if len(t1) < self.c:
                del b1[0]
                self._replace(x)
            else:
                del t1[0]
        elif in_l1 + in_l2 >= self.c:
            if in_l1 + in_l2 == 2 * self.c:
                del b2[0]
            self._replace(x)
        t1.append(x)
        return False

    def _replace(self, x: Item) -> None:
        t1 = len(self.t1)
        if t1 > 0 and (t1 > self.p or (x in self.b2 and t1 == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))


class ReferenceArc:
    """Four plain lists, coldest first, and every sum taken anew."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.p = 0.0
        self.t1: list[Item] = []
        self.t2: list[Item] = []
        self.b1: list[Item] = []
        self.b2: list[Item] = []

    def _victim(self, resident: list[Item], stays: Any) -> Item | None:
        return next((item for item in resident if not stays(item)), None)

    def _replace(self, in_b2: bool, sizes: Any, stays: Any) -> Item | None:
        """REPLACE of the paper; the other list gives where the chosen one has nothing to give."""
        t1 = _bytes(self.t1, sizes)
        prefer_t1 = t1 > 0 and (t1 > self.p or (in_b2 and t1 >= self.p))
        pairs = [(self.t1, self.b1), (self.t2, self.b2)]
        for resident, ghosts in pairs if prefer_t1 else reversed(pairs):
            victim = self._victim(resident, stays)
            if victim is not None:
                resident.remove(victim)
                ghosts.append(victim)
                return victim
        return None

    def _trim(self, sizes: Any, coming: int, forgotten: list[Item], which: str) -> None:
        """Forget the coldest ghosts of B1 (or B2) while the bound of L1 (or of both) is passed."""
        if which == "b1":
            while self.b1 and _bytes(self.t1 + self.b1, sizes) + coming > self.capacity:
                forgotten.append(self.b1.pop(0))
        else:
            every = self.t1 + self.t2 + self.b1
            while self.b2 and _bytes(every + self.b2, sizes) + coming > 2 * self.capacity:
                forgotten.append(self.b2.pop(0))

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        evicted: list[Item] = []
        forgotten: list[Item] = []
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if hits[-1]:
                (self.t1 if item in self.t1 else self.t2).remove(item)
                self.t2.append(item)
            elif may and sizes[item] <= self.capacity:
                self._enter(item, sizes, lambda other: bool(pins[other]), evicted, forgotten)
        self._trim(sizes, 0, forgotten, "b1")
        self._trim(sizes, 0, forgotten, "b2")
        return Answer(hits, evicted, forgotten)

    def _enter(
        self, item: Item, sizes: Any, stays: Any, evicted: list[Item], forgotten: list[Item]
    ) -> None:
        size = int(sizes[item])
        was_b1, was_b2 = item in self.b1, item in self.b2
        b1, b2 = _bytes(self.b1, sizes), _bytes(self.b2, sizes)
        if was_b1:
            self.p = min(self.capacity, self.p + max(b2 / b1, 1.0) * size)
        elif was_b2:
            self.p = max(0.0, self.p - max(b1 / b2, 1.0) * size)
        elif _bytes(self.t1, sizes) + b1 + size > self.capacity:
            self._trim(sizes, size, forgotten, "b1")
            while _bytes(self.t1, sizes) + size > self.capacity:
                victim = self._victim(self.t1, stays)
                if victim is None:
                    break
                self.t1.remove(victim)
                evicted.append(victim)
                forgotten.append(victim)
        else:
            self._trim(sizes, size, forgotten, "b2")
        while _bytes(self.t1 + self.t2, sizes) + size > self.capacity:
            victim = self._replace(was_b2, sizes, stays)
            if victim is None:
                return
            evicted.append(victim)
        for ghosts in (self.b1, self.b2):
            if item in ghosts:
                ghosts.remove(item)
        (self.t2 if was_b1 or was_b2 else self.t1).append(item)

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            for part in (self.t1, self.t2, self.b1, self.b2):
                if item in part:
                    part.remove(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        self.capacity = capacity
        self.p = min(self.p, float(capacity))
        evicted: list[Item] = []
        forgotten: list[Item] = []
        while _bytes(self.t1 + self.t2, sizes) > capacity:
            victim = self._replace(False, sizes, lambda item: bool(pins[item]))
            if victim is None:
                break
            evicted.append(victim)
        self._trim(sizes, 0, forgotten, "b1")
        self._trim(sizes, 0, forgotten, "b2")
        return Answer([], evicted, forgotten)

    def resident(self, item: Item) -> bool:
        return item in self.t1 or item in self.t2

    def known(self, item: Item) -> bool:
        return self.resident(item) or item in self.b1 or item in self.b2

    def order(self) -> list[Item]:
        return self.t1 + self.t2


def _bytes(items: list[Item], sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
