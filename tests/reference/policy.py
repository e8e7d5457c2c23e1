"""What a slow, plain policy looks like: the definitions again, with dicts and lists instead of arrays.

Items are anything hashable. sizes and pins are looked up by item. Every answer is a list of items.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Item = Hashable


@dataclass(frozen=True)
class Answer:
    """hits: per position. evicted and forgotten: items in the order in which they left."""

    hits: list[bool]
    evicted: list[Item]
    forgotten: list[Item]


class ReferencePolicy(Protocol):
    """The contract of `kvstrata.policies.Policy` on plain items."""

    capacity: int

    def access(
        self, items: Sequence[Item], admit: Sequence[bool], sizes: Any, pins: Any, request: int
    ) -> Answer: ...

    def remove(self, items: Sequence[Item]) -> None: ...

    def resize(self, capacity: int, sizes: Any, pins: Any) -> Answer: ...

    def resident(self, item: Item) -> bool: ...

    def known(self, item: Item) -> bool: ...

    def order(self) -> list[Item]: ...
