"""What a large arena needs besides its address space: its place in the machine, its pages, its pins.

The first touch of fresh huge pages runs at half a gigabyte a second on a virtual machine that had given
them back; later ones at the speed of memory. So pages are touched once, ahead of the first saves, by a
thread that never holds the GIL while it touches, and never changes what is in them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading

import numpy as np
from numba import types
from numpy.typing import NDArray

from kvstrata.config import Touch, format_size
from kvstrata.jit import kernel
from kvstrata.telemetry import Telemetry
from kvstrata.transfer import cuda, numa
from kvstrata.transfer.at_exit import before_exit
from kvstrata.transfer.buffers import Arena, address_of
from kvstrata.transfer.native import atomic_load, last_error

LEAST_BYTES = 16 * 2**20
"""A smaller arena is not touched in the background: its first saves do that before a thread could."""
PART_BYTES = 8 * 2**20
"""Of one call to the kernel, which keeps other threads from mapping memory while it runs."""
STRETCH_BYTES = 256 * 2**20
"""After so many the counter of touched bytes moves."""
STOP_SECONDS = 1.0
"""How long close() waits for the thread; it lets go of the memory at the end of its part by itself."""

_MADV_POPULATE_WRITE = 23
"""Linux 5.14: fault pages in as if they were written, without changing them."""
_EINTR, _EAGAIN = errno.EINTR, errno.EAGAIN
_madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


@kernel
def _populate(address: int, size: int, part_bytes: int, stop: NDArray[np.int64]) -> int:
    """Touch `size` bytes from `address`, until stop[0] is set: 0, or the errno of the system."""
    done = 0
    while done < size and atomic_load(stop, 0) == 0:
        part = min(part_bytes, size - done)
        if _madvise(address + done, part, _MADV_POPULATE_WRITE) == 0:
            done += part
        else:
            code = last_error()
            if code not in (_EINTR, _EAGAIN):
                return code  # type: ignore[no-any-return]
    return 0


class ArenaCare:
    """Places, touches and pins one arena, from its opening on; `close` ends that before the arena ends.

    touch: "background" returns at once, "now" when every page is there, "no" leaves pages to their first
    use. numa: as `numa.choose` takes it. pin: register with the CUDA driver where there is one. What does
    not work is an event, never an error.
    """

    def __init__(
        self, arena: Arena, tier: str, telemetry: Telemetry, *, touch: Touch, numa_wish: str, pin: bool
    ) -> None:
        self._arena = arena  # kept by the thread too, so that the memory outlives every call
        self._address = address_of(arena.view)
        self._size = len(arena.view)
        self._tier = tier
        self._telemetry = telemetry
        self._stop = np.zeros(1, np.int64)
        self._lock = threading.Lock()
        self._closed = False
        self._pinned: cuda.Pinned | None = None
        self._thread: threading.Thread | None = None
        self._place(numa_wish)
        driver = self._driver() if pin else None
        touches = touch == "now" or (touch == "background" and self._size >= LEAST_BYTES)
        if touches:
            _populate(0, 0, PART_BYTES, self._stop)  # compiled here, so that no thread dies compiling
        if touch == "now":
            self._touch()
            touches = False
        if touches or driver is not None:
            self._thread = threading.Thread(
                target=self._run, args=(touches, driver), name=f"kvstrata-{tier}-touch", daemon=True
            )
            self._thread.start()
            before_exit(self)

    def _place(self, wish: str) -> None:
        policy = numa.choose(wish)
        if policy is None:
            return
        try:
            numa.apply(policy, self._address, self._size)
        except OSError as error:
            self._telemetry.event(f"{self._tier} not placed", f"{policy}: {error}")
        else:
            self._telemetry.event(f"{self._tier} placed", str(policy))

    def _driver(self) -> ctypes.CDLL | None:
        try:
            return cuda.load_driver()
        except cuda.PinError as error:
            self._telemetry.event(f"{self._tier} not pinned", str(error))
            return None

    def _run(self, touches: bool, driver: ctypes.CDLL | None) -> None:
        if touches:
            self._touch()
        if driver is not None and not self._closed:
            self._pin(driver)

    def _touch(self) -> None:
        done = 0
        while done < self._size and not self._closed:
            part = min(STRETCH_BYTES, self._size - done)
            code = _populate(self._address + done, part, PART_BYTES, self._stop)
            if code != 0:
                # EINVAL: a kernel before 5.14. Pages then come with their first use, as ever.
                detail = f"after {format_size(done)}: {os.strerror(code)}"
                self._telemetry.event(f"{self._tier} not touched", detail)
                return
            if not self._closed:
                self._telemetry.count("touched_bytes_total", self._tier, by=part)
            done += part
        if not self._closed:
            self._telemetry.event(f"{self._tier} touched", format_size(self._size))

    def _pin(self, driver: ctypes.CDLL) -> None:
        try:
            pinned = cuda.Pinned(driver, self._address, self._size)
        except cuda.PinError as error:
            self._telemetry.event(f"{self._tier} not pinned", str(error))
            return
        with self._lock:
            if not self._closed:
                self._pinned = pinned
                self._telemetry.event(f"{self._tier} pinned", format_size(self._size))
                return
        self._unpin(pinned)

    def _unpin(self, pinned: cuda.Pinned) -> None:
        try:
            pinned.release()
        except cuda.PinError as error:
            self._telemetry.event(f"{self._tier} not unpinned", str(error))

    @property
    def working(self) -> bool:
        """Is the thread still at it?"""
        return self._thread is not None and self._thread.is_alive()

    def leave(self) -> list[threading.Thread]:
        """The interpreter ends: stop touching."""
        self._closed = True
        self._stop[0] = 1
        return [self._thread] if self._thread is not None else []

    def close(self) -> None:
        """Stop touching and take the pin back; waits for one part at most. May be called again."""
        with self._lock:
            self._closed = True
            pinned, self._pinned = self._pinned, None
        self._stop[0] = 1
        if pinned is not None:
            self._unpin(pinned)
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
