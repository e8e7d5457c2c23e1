"""Staging: memory that blocks pass through on their way between two tiers. It knows places, no blocks."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from kvstrata.transfer.buffers import PAGE, Arena, Buffers, address_of, round_up

Column = NDArray[np.int64]


class Staging:
    """limit_bytes: of all places together, but one block always fits. The memory comes with first use."""

    def __init__(self, block_bytes: int, limit_bytes: int) -> None:
        self.place_bytes = round_up(block_bytes, PAGE)
        self.places = max(1, limit_bytes // self.place_bytes)
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._base = 0
        self._free = np.arange(self.places - 1, -1, -1, dtype=np.int64)
        self._count = self.places

    def take(self, wanted: int) -> Column:
        """As many places as are free, `wanted` at most. Each must be given back."""
        with self._lock:
            if self._arena is None and wanted:
                self._arena = Arena(self.places * self.place_bytes)
                self._base = address_of(self._arena.view)
            taken = min(wanted, self._count)
            self._count -= taken
            return self._free[self._count : self._count + taken][::-1].copy()

    def give(self, places: Column) -> None:
        with self._lock:
            self._free[self._count : self._count + len(places)] = places
            self._count += len(places)
            assert self._count <= self.places, "a place was given back twice"

    def buffers(self, places: Column, lengths: Column) -> Buffers:
        """The memory of these places, which keeps the arena alive."""
        return Buffers(self._base + places * self.place_bytes, lengths, self._arena)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._count

    @property
    def used_bytes(self) -> int:
        """Bytes of places that somebody has."""
        return (self.places - self._count) * self.place_bytes
