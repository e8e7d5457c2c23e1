"""Holdings: what the store asks of a tier's books, whoever keeps them. No bytes move here.

A tier that one process owns keeps a `BlockTable`; a tier that many write to keeps an index of what all of
them have published. The store treats both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvstrata.table import Column, Placement, Placements, Recorded
from kvstrata.types import BlockKey, Lookup


class Holdings(Protocol):
    """Every method takes a batch and touches memory only: none waits for a medium or another process.

    batch_blocks: largest batch of `record`. The other numbers are for people and metrics.
    """

    batch_blocks: int

    def lookup(self, keys: Sequence[BlockKey]) -> list[Lookup]:
        """State of every key, as it is known now."""

    def pin_all(self, keys: Sequence[BlockKey]) -> Placements:
        """Pin every key that is loadable; the others are left out. Unpin each placement once."""

    def unpin(self, placements: Placements) -> None:
        """Give pins back."""

    def record(
        self,
        keys: Sequence[BlockKey],
        admit: Sequence[bool] | None = None,
        *,
        request: int,
        ttl_seconds: float = 0.0,
    ) -> Recorded:
        """One request's chain, root first: touch what is there, reserve a place for what is not.

        admit: per key, may it be stored now (default: none may: a touch).
        """

    def commit_all(self, placements: Placements, lengths: Column, checksums: Column) -> None:
        """The bytes of reserved placements are there: they become loadable and lose the writer's pin."""

    def abort_all(self, placements: Placements) -> None:
        """Reserved placements were not written."""

    def drop(self, placement: Placement) -> bool:
        """A pinned block turned out bad: nobody finds it any more. False if it had already left."""

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """Forget resident blocks by key; returns how many were there."""

    def chunk(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Keys of all blocks that lie in the same objects as these; none where blocks lie alone."""

    @property
    def resident_blocks(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def capacity_bytes(self) -> int: ...

    def pinned_blocks(self) -> int: ...

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and `verify`."""
