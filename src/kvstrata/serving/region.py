"""Memory that a client and the server both map: taken in slots, told apart by number. Moves no bytes.

A client's region is any shared mapping of a file (an engine's host memory in /dev/shm, a memfd).
"""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstrata.transfer.buffers import PAGE, Buffers, round_up
from kvstrata.transfer.shared_memory import Mapping


class SharedArena:
    """Slots of equal size in a memfd, for buffers that no region holds. All its memory is taken at once.

    slot_bytes: of the largest block. limit_bytes: of all slots; at least one slot is made.
    """

    def __init__(self, slot_bytes: int, limit_bytes: int) -> None:
        self.slot_bytes = round_up(slot_bytes, PAGE)
        self.slots = max(1, limit_bytes // self.slot_bytes)
        size = self.slots * self.slot_bytes
        self.fd = os.memfd_create("kvstrata-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._mapping = Mapping(self.fd, 0, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = self._mapping.address
        self.size = size
        self._lock = threading.Lock()
        self._free = list(range(self.slots - 1, -1, -1))

    def take(self, count: int) -> NDArray[np.int64]:
        """Offsets of free slots, `count` of them or as many as there are."""
        with self._lock:
            start = max(0, len(self._free) - count)
            taken = self._free[start:]
            del self._free[start:]
        return np.array(taken[::-1], dtype=np.int64) * self.slot_bytes

    def give_back(self, offsets: NDArray[np.int64]) -> None:
        with self._lock:
            self._free.extend((offsets[::-1] // self.slot_bytes).tolist())

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def close(self) -> None:
        """Let go of the file; the memory goes with the last mapping."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True, slots=True)
class NamedRegion:
    """A range of this process's memory under a number that the server knows."""

    number: int
    address: int
    size: int


def locate(regions: list[NamedRegion], buffers: Buffers) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number of the region and offset in it of every buffer; -1 for one that lies in no region whole."""
    numbers = np.full(len(buffers), -1, dtype=np.int32)
    offsets = np.zeros(len(buffers), dtype=np.int64)
    for region in regions:
        start = buffers.addresses - region.address
        inside = (start >= 0) & (start + buffers.lengths <= region.size)
        numbers[inside] = region.number
        offsets[inside] = start[inside]
    return numbers, offsets
