"""Page-aligned memory for O_DIRECT: arenas on huge pages, and the slices that I/O reads into.

Private anonymous memory with MADV_HUGEPAGE, because 4 KiB pages split a 1 MiB transfer into hundreds
of segments, and because shared anonymous memory does not get huge pages everywhere.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

PAGE = 4096
HUGE_PAGE = 2 * 1024 * 1024


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class Arena:
    """`size` bytes of zeroed memory, aligned to a huge page where the size allows one."""

    def __init__(self, size: int) -> None:
        alignment = HUGE_PAGE if size >= HUGE_PAGE else PAGE
        self.size = size
        self._map = mmap.mmap(
            -1, round_up(size, PAGE) + alignment, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        if size >= HUGE_PAGE:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(self._map)
        start = -address_of(whole) % alignment
        self._view = whole[start : start + round_up(size, PAGE)]
        whole.release()

    @property
    def view(self) -> memoryview:
        """All of it, writable bytes."""
        return self._view

    def close(self) -> None:
        """Give the memory back. Raises BufferError while somebody still holds a view."""
        self._view.release()
        self._map.close()


def address_of(view: memoryview) -> int:
    """Address of the first byte of a contiguous buffer."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]) if len(view) else 0


class BufferPool:
    """At most `limit` equal buffers, made on first use and kept. `take` waits for one."""

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self._room = threading.Semaphore(limit)
        self._lock = threading.Lock()
        self._free: list[Arena] = []

    @contextmanager
    def take(self) -> Iterator[memoryview]:
        """A buffer for the length of a with-block; its bytes are whatever was there before."""
        with self._room:
            with self._lock:
                arena = self._free.pop() if self._free else None
            arena = arena or Arena(self.size)
            try:
                yield arena.view
            finally:
                with self._lock:
                    self._free.append(arena)
