"""IdColumns: what a shared index knows of each of its ids, in columns that grow together. No locks here.

An id stands for one copy of a block: a slot of an extent. The states of an id:

    free -> RESERVED (a slot of an extent that this member writes) -> RESIDENT -> free
                                   \\-> DOOMED (left, but still pinned) -> free
"""

from __future__ import annotations

import numpy as np

from kvstrata.table import Column, Placements
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE, Entries
from kvstrata.types import BlockKey

FREE, RESERVED, RESIDENT, DOOMED = range(4)
NONE = -1
FIRST_IDS = 1024


class IdColumns:
    """extent: number of the extent among the index's `Places`. next: the id that is behind this one among
    the copies of a block (`KeyChains`). top: ids below it have been in use."""

    def __init__(self) -> None:
        self.top = 0
        self.state = np.zeros(FIRST_IDS, np.int8)
        self.extent = np.full(FIRST_IDS, NONE, np.int32)
        self.slot = np.zeros(FIRST_IDS, np.uint32)
        self.length = np.zeros(FIRST_IDS, np.uint32)
        self.checksum = np.zeros(FIRST_IDS, np.int64)
        self.sequence = np.zeros(FIRST_IDS, np.int64)
        self.expires_ms = np.zeros(FIRST_IDS, np.int64)
        self.pins = np.zeros(FIRST_IDS, np.int32)
        self.next = np.full(FIRST_IDS, NONE, np.int32)
        self._free: list[int] = []

    def take(self, count: int) -> Column:
        """So many free ids; whoever takes them fills in every column."""
        reused = min(count, len(self._free))
        ids = np.empty(count, np.int64)
        if reused:
            ids[:reused] = self._free[len(self._free) - reused :]
            del self._free[len(self._free) - reused :]
        fresh = count - reused
        while self.top + fresh > len(self.state):
            self._grow()
        ids[reused:] = np.arange(self.top, self.top + fresh)
        self.top += fresh
        return ids

    def _grow(self) -> None:
        size = 2 * len(self.state)
        for name, fill in (
            ("state", FREE), ("extent", NONE), ("slot", 0), ("length", 0), ("checksum", 0),
            ("sequence", 0), ("expires_ms", 0), ("pins", 0), ("next", NONE),
        ):  # fmt: skip
            old = getattr(self, name)
            new = np.full(size, fill, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def free(self, ids: Column) -> None:
        """Nobody finds or pins these any more."""
        self.state[ids] = FREE
        self.extent[ids] = NONE
        self._free.extend(ids.tolist())

    def reserve(self, ids: Column, sequences: Column, expires_ms: int) -> None:
        """These ids, whose slots are set, wait for their bytes, pinned by who writes them."""
        self.state[ids] = RESERVED
        self.pins[ids] = 1
        self.next[ids] = NONE
        self.length[ids] = 0
        self.checksum[ids] = 0
        self.sequence[ids] = sequences
        self.expires_ms[ids] = expires_ms

    def fill(self, ids: Column, extent: int, entries: Entries) -> None:
        """These ids are the blocks of a published extent, unpinned; their state is left to `KeyChains`."""
        self.extent[ids] = extent
        self.slot[ids] = entries["number"]
        self.length[ids] = entries["length"]
        self.checksum[ids] = entries["checksum"].view(np.int64)
        self.sequence[ids] = entries["sequence"]
        self.expires_ms[ids] = entries["expires_ms"]
        self.pins[ids] = 0
        self.next[ids] = NONE

    def placements(self, positions: Column, ids: Column, keys: list[BlockKey]) -> Placements:
        return Placements(
            positions, ids, self.slot[ids].astype(np.int64), keys, self.length[ids].astype(np.int64),
            self.checksum[ids], self.sequence[ids], self.expires_ms[ids],
        )  # fmt: skip

    def entries(self, keys: list[BlockKey], ids: Column) -> Entries:
        """As rows of ENTRY_DTYPE."""
        found = np.zeros(len(keys), ENTRY_DTYPE)
        if keys:
            found["key"] = np.frombuffer(b"".join(keys), "V32")
        found["number"] = self.slot[ids]
        found["length"] = self.length[ids]
        found["checksum"] = self.checksum[ids].view(np.uint64)
        found["expires_ms"] = self.expires_ms[ids]
        found["sequence"] = self.sequence[ids]
        return found

    def within(self, state: int) -> set[int]:
        """The ids in this state, below top."""
        return set(np.flatnonzero(self.state[: self.top] == state).tolist())

    def check_integrity(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), "an id is free twice"
        assert free == self.within(FREE), "a free id was lost"
        assert not np.any(self.state[self.top :]) and np.all(self.pins >= 0)
        states, pins = self.state[: self.top], self.pins[: self.top]
        assert not np.any(pins[states == FREE])
        assert np.all(pins[np.isin(states, (RESERVED, DOOMED))] > 0)
