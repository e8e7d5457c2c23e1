"""CLOCK-Pro from the text of its paper: the clock is a list, the hands are where the text says they are.

Jiang, Chen and Zhang, "CLOCK-Pro: an effective improvement of the CLOCK replacement", USENIX ATC 2005,
sections 4.2 to 4.4. The list begins at its tail, where HAND_hot is, and ends at its head. To move
HAND_hot past a page is to leave the page at the head. HAND_cold is at the resident cold page nearest to
the tail, HAND_test at the page in its test period nearest to the tail: both are looked for anew each
time.

Choices: sizes instead of page counts, m_c too. m_c begins at `cold` of the capacity, by default all of
it, and stays between 1 and the capacity. HAND_hot stands still while there is no hot page. A test period
that ends with the reference bit set does not lower m_c. A pinned cold page is passed over as it is; where
all of them are pinned, HAND_hot moves on until an unpinned page has turned cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reference.policy import Answer, Item


class ReferenceClockPro:
    def __init__(self, capacity: int, cold: float = 1.0) -> None:
        self.cold_share = cold
        self.capacity = capacity
        self.target = max(1, int(cold * capacity))  # m_c
        self.clock: list[Item] = []
        self.hot: set[Item] = set()
        self.cold: set[Item] = set()  # resident
        self.test: set[Item] = set()  # in their test period; those that are not in cold are non-resident
        self.referenced: set[Item] = set()
        self.forgotten: list[Item] = []
        self.evicted: list[Item] = []

    def _used(self, sizes: Any) -> int:
        return _weight(self.hot, sizes) + _weight(self.cold, sizes)

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer:
        hits: list[bool] = []
        self.evicted, self.forgotten = [], []
        for item, may in zip(items, admit, strict=True):
            hits.append(self.resident(item))
            if self.resident(item):
                self.referenced.add(item)
            elif may and sizes[item] <= self.capacity:
                self._fault(item, sizes, pins)
                self._hand_test(sizes)
        return Answer(hits, self.evicted, self.forgotten)

    def _fault(self, item: Item, sizes: Any, pins: Any) -> None:
        size = int(sizes[item])
        self._hand_cold(size, sizes, pins)
        if self._used(sizes) + size > self.capacity:
            return
        if item in self.test:
            self._accessed_in_test(item, sizes)
        else:
            self.cold.add(item)
            self.test.add(item)
            self.clock.append(item)

    def _accessed_in_test(self, item: Item, sizes: Any) -> None:
        """A cold page, resident or not, becomes hot."""
        self.target = min(self.capacity, self.target + int(sizes[item]))
        self.test.remove(item)
        self.cold.discard(item)
        self.hot.add(item)
        self._to_head(item)
        self._hand_hot(sizes)

    def _to_head(self, item: Item) -> None:
        self.clock.remove(item)
        self.clock.append(item)

    def _hand_cold(self, size: int, sizes: Any, pins: Any) -> None:
        while self._used(sizes) + size > self.capacity:
            item = next((item for item in self.clock if item in self.cold and not pins[item]), None)
            if item is None:
                if all(pins[item] for item in self.hot):
                    return
                self._hand_hot(sizes, pins)
            elif item not in self.referenced:
                self.cold.remove(item)
                self.evicted.append(item)
                if item not in self.test:
                    self.clock.remove(item)
            else:
                self.referenced.remove(item)
                if item in self.test:
                    self._accessed_in_test(item, sizes)
                else:
                    self._to_head(item)

    def _hand_hot(self, sizes: Any, pins: Any = None) -> None:
        """Until hot pages weigh what they may; with pins, until an unpinned one has turned cold."""
        moved = turned = False
        while self.hot:
            over = _weight(self.hot, sizes) > self.capacity - self.target
            goes_on = over if pins is None else not turned
            item = self.clock[0]
            if not goes_on and (item in self.hot or not moved):
                return
            moved = True
            if item in self.test:
                self._end_test(item, sizes)
            elif item in self.hot and (pins is None or not pins[item]):
                if item in self.referenced:
                    self.referenced.remove(item)
                else:
                    self.hot.remove(item)
                    self.cold.add(item)
                    turned = True
            if self.clock[0] == item:
                self._to_head(item)

    def _hand_test(self, sizes: Any) -> None:
        while _weight(self.test - self.cold, sizes) > self.capacity:
            self._end_test(next(item for item in self.clock if item in self.test), sizes)

    def _end_test(self, item: Item, sizes: Any) -> None:
        self.test.remove(item)
        if item not in self.referenced:
            self.target = max(1, self.target - int(sizes[item]))
        if item not in self.cold:
            self.clock.remove(item)
            self.forgotten.append(item)

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            if item in self.clock:
                self.clock.remove(item)
            for part in (self.hot, self.cold, self.test, self.referenced):
                part.discard(item)

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer:
        scaled = (
            self.target * capacity // self.capacity if self.capacity else int(self.cold_share * capacity)
        )
        self.target = max(1, scaled)
        self.capacity = capacity
        self.evicted, self.forgotten = [], []
        self._hand_hot(sizes)
        self._hand_cold(0, sizes, pins)
        self._hand_test(sizes)
        return Answer([], self.evicted, self.forgotten)

    def resident(self, item: Item) -> bool:
        return item in self.hot or item in self.cold

    def known(self, item: Item) -> bool:
        return item in self.clock

    def order(self) -> list[Item]:
        return [item for item in self.clock if item in self.cold] + [
            item for item in self.clock if item in self.hot
        ]


def _weight(items: Any, sizes: Any) -> int:
    return sum(int(sizes[item]) for item in items)
