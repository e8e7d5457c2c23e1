"""Huge pages for shared memory that is there already, whatever the system does by itself. Moves no bytes.

O_DIRECT into pages of 4 KiB reaches half of a disk's speed or less, and shared memory has such pages on
most systems. MADV_COLLAPSE (Linux 6.1) copies 512 of them into a huge one, which every process that maps
the file has from then on. It leaves the contents alone and passes over pages that somebody has pinned.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import format_size
from kvstrata.telemetry import Telemetry
from kvstrata.transfer.at_exit import before_exit
from kvstrata.transfer.buffers import HUGE_PAGE, PAGE, Buffers
from kvstrata.transfer.shared_memory import Mapping, find_backing

STEP = 16
"""Huge pages in one call to the system: who wants to stop waits as long."""
ROUNDS = 12
"""How often the memory is gone through, because more of it may be there the next time."""
FIRST_PAUSE_SECONDS = 1.0
"""Before the second round; doubled up to LONGEST_PAUSE_SECONDS."""
LONGEST_PAUSE_SECONDS = 64.0
FRUITLESS_ROUNDS = 3
"""So many in a row that turn nothing of what is in memory are the last ones: it is pinned for good."""

_MADV_COLLAPSE = 25

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class HugePages:
    """The huge pages that a mapping has room for, and which of them it has got.

    refused: why the system makes none at all; "" while that is not known. passed_over: bytes that are in
    memory and could not be turned the last time.
    """

    def __init__(self, mapping: Mapping) -> None:
        skipped = -mapping.offset % HUGE_PAGE
        self._mapping = mapping
        self._address = mapping.address + skipped
        self._open: NDArray[np.bool_] = np.ones(max(0, mapping.size - skipped) // HUGE_PAGE, np.bool_)
        self._turned = 0
        self.refused = ""
        self.passed_over = 0

    @property
    def left(self) -> int:
        """Bytes that may still become huge pages."""
        return int(self._open.sum()) * HUGE_PAGE

    def turn(self) -> Iterator[int]:
        """Go through them once: after each step, the bytes that became huge pages in it.

        Only what is in memory whole is turned, so that no more is taken.
        """
        self.passed_over = 0
        for first in range(0, len(self._open), STEP):
            wanted = first + np.flatnonzero(self._open[first : first + STEP] & self._resident(first))
            if len(wanted) == STEP and self._collapse(first, STEP) == 0:
                done, code = wanted, 0
            else:
                done, code = self._one_by_one(wanted)
            self._open[done] = False
            self._turned += len(done)
            self.passed_over += (len(wanted) - len(done)) * HUGE_PAGE
            yield len(done) * HUGE_PAGE
            if self.refused or code in (errno.ENOMEM, errno.EBUSY):
                return  # no huge page is free, or none is granted: to go on would cost much for nothing

    def _one_by_one(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Those that were turned, and the error that the next ones would meet too, or 0."""
        done = []
        for page in wanted.tolist():
            code = self._collapse(page, 1)
            if code == 0:
                done.append(page)
            elif code == errno.EINVAL:
                self._open[page] = False  # never, says the system; of the first one it means all
                if not done and not self._turned:
                    self.refused = os.strerror(code)
                    break
            elif code in (errno.ENOMEM, errno.EBUSY):
                return np.array(done, np.int64), code
        return np.array(done, np.int64), 0

    def _resident(self, first: int) -> NDArray[np.bool_]:
        """Which huge pages of a step lie in memory with all their small ones."""
        count = min(STEP, len(self._open) - first)
        small = np.zeros((count, HUGE_PAGE // PAGE), np.uint8)
        start = self._address + first * HUGE_PAGE
        if _libc.mincore(start, count * HUGE_PAGE, small.ctypes.data) != 0:
            return np.zeros(count, np.bool_)
        whole: NDArray[np.bool_] = np.all(small & 1, axis=1)
        return whole

    def _collapse(self, first: int, count: int) -> int:
        """0, or the errno of the system."""
        start = self._address + first * HUGE_PAGE
        failed = _libc.madvise(start, count * HUGE_PAGE, _MADV_COLLAPSE) != 0
        return ctypes.get_errno() if failed else 0


class HugePageCare:
    """A thread that turns a mapping into huge pages, in a bounded number of rounds; `stop` ends it.

    counter: of the bytes, in telemetry. What does not work is one event, never an error. at_end: called on
    the thread when it does not touch the mapping any more.
    """

    def __init__(
        self,
        mapping: Mapping,
        telemetry: Telemetry,
        counter: str,
        *,
        name: str = "kvstrata-huge-pages",
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self._pages = HugePages(mapping)
        self._telemetry = telemetry
        self._counter = counter
        self._at_end = at_end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        before_exit(self)

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        whole, total, fruitless = self._pages.left, 0, 0
        try:
            for number in range(ROUNDS):
                if number:
                    if self._stop.wait(pause):
                        return
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                before = total
                for turned in self._pages.turn():
                    total += turned
                    self._telemetry.count(self._counter, by=turned)
                    if self._stop.is_set():
                        return
                fruitless = fruitless + 1 if self._pages.passed_over and total == before else 0
                if self._pages.refused or not self._pages.left or fruitless == FRUITLESS_ROUNDS:
                    return
        finally:
            if self._pages.refused:
                self._telemetry.event("no huge pages", self._pages.refused)
            elif whole:
                self._telemetry.event("huge pages", f"{format_size(total)} of {format_size(whole)}")
            if self._at_end is not None:
                self._at_end()

    @property
    def working(self) -> bool:
        """Is the thread still at it?"""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Do not begin another step. Returns at once."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread, which `stop` was called for: one step at most."""
        self._thread.join()

    def leave(self) -> list[threading.Thread]:
        """The interpreter ends: stop."""
        self.stop()
        return [self._thread]


def care_for(view: Any, telemetry: Telemetry, counter: str) -> HugePageCare | None:
    """Turn the file under this buffer into huge pages in the background, through a mapping of its own.

    The view is not kept: its owner may unmap it at any time. None, and an event, for what is not one
    shared, writable mapping of a file.
    """
    try:
        borrowed = Buffers.of([view], writable=True)
        address, size = int(borrowed.addresses[0]), int(borrowed.lengths[0])
        backing = find_backing(address, size)
        if backing is None:
            raise ValueError("the memory is no shared mapping of one file")
        inside = address % PAGE
        try:
            mapping = Mapping(backing.fd, backing.offset - inside, size + inside)
        finally:
            os.close(backing.fd)
    except (OSError, ValueError) as error:
        telemetry.event("no huge pages", str(error))
        return None
    return HugePageCare(mapping, telemetry, counter, at_end=mapping.close)
