"""An io_uring of the kernel, set up by its system calls: what the compiled worker needs to use it.

The layout of the shared rings is the kernel's ABI (linux/io_uring.h, io_uring_setup(2)).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SETUP, ENTER = 425, 426
"""Numbers of the system calls, the same on every architecture."""
_SQ_RING, _SQES = 0, 0x10000000
_SINGLE_MMAP, _NODROP = 1, 2
_SQE_WORDS, _CQE_WORDS = 8, 2

Words = NDArray[Any]


class RingWords(NamedTuple):
    """Arrays on the memory that is shared with the kernel."""

    ring: Words
    """int32 words of both rings' heads, tails and the submission array."""
    entries: Words
    """(depth, 8) int64: submissions."""
    completions: Words
    """(2 * depth, 2) int64: user data; result in the lower half of the second word."""
    where: Words
    """int64: the words of `ring` named below, the masks, and descriptors."""


(SQ_TAIL, SQ_ARRAY, CQ_HEAD, CQ_TAIL, SQ_MASK, CQ_MASK, RING_FD, WAKE_FD, WHERE_WORDS) = range(9)


class Ring:
    """depth: submissions at a time, rounded up to a power of two. Raises OSError where it cannot be had."""

    def __init__(self, depth: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        parameters = (ctypes.c_uint32 * 30)()
        self.fd = self._libc.syscall(ctypes.c_long(SETUP), ctypes.c_long(depth), ctypes.byref(parameters))
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"io_uring: {os.strerror(number)}")
        os.set_inheritable(self.fd, False)
        try:
            self._map(list(parameters))
        except BaseException:
            os.close(self.fd)
            raise
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        assert self.words is not None
        self.words.where[[RING_FD, WAKE_FD]] = self.fd, self.wake_fd

    def _map(self, parameters: list[int]) -> None:
        sq_entries, cq_entries, features = parameters[0], parameters[1], parameters[5]
        if not features & _SINGLE_MMAP or not features & _NODROP:
            raise OSError(errno.ENOSYS, "io_uring: this kernel is too old")
        sq, cq = parameters[10:17], parameters[20:26]
        size = max(sq[6] + 4 * sq_entries, cq[5] + 8 * _CQE_WORDS * cq_entries)
        rings = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_SQ_RING)
        entries = mmap.mmap(
            self.fd, 8 * _SQE_WORDS * sq_entries, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_SQES
        )
        where = np.zeros(WHERE_WORDS, dtype=np.int64)
        where[[SQ_TAIL, SQ_ARRAY, CQ_HEAD, CQ_TAIL]] = sq[1] // 4, sq[6] // 4, cq[0] // 4, cq[1] // 4
        where[[SQ_MASK, CQ_MASK]] = sq_entries - 1, cq_entries - 1
        completions = np.frombuffer(rings, np.int64, _CQE_WORDS * cq_entries, cq[5])
        self._maps = [rings, entries]
        self.words: RingWords | None = RingWords(
            np.frombuffer(rings, np.int32, size // 4),
            np.frombuffer(entries, np.int64).reshape(-1, _SQE_WORDS),
            completions.reshape(-1, _CQE_WORDS),
            where,
        )

    def close(self) -> None:
        """When nobody uses it any more."""
        self.words = None
        for shared in self._maps:
            shared.close()
        os.close(self.fd)
        os.close(self.wake_fd)


def ring_refused() -> str:
    """Why io_uring cannot be used here; empty if it can."""
    try:
        Ring(2).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
