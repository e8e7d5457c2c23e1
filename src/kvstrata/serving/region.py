"""Memory that a client and the server both map: found, made, passed as a descriptor, mapped. Moves no
bytes.

A client's region is any shared mapping of a file (an engine's host memory in /dev/shm, a memfd). Who maps a
file trusts its owner not to cut it short: touching what is gone ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstrata.transfer.buffers import PAGE, Buffers, round_up

HUGE_PAGE = 2 * 1024 * 1024
COLLAPSE_BYTES = 16 * HUGE_PAGE
"""In one call: who wants to stop waits as long."""
MADV_COLLAPSE = 25
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
MAP_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(.*)")


@dataclass(frozen=True, slots=True)
class Backing:
    """The file under a range of this process's memory. fd: open for reading and writing, the caller's."""

    fd: int
    offset: int


def find_backing(address: int, size: int) -> Backing | None:
    """The file under [address, address + size); None where that is not one shared, writable mapping."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            found = _MAPS_LINE.match(line)
            assert found, f"/proc/self/maps has a line of another form: {line!r}"
            start, end = int(found[1], 16), int(found[2], 16)
            if not start <= address < end:
                continue
            if address + size > end or found[3][:2] != "rw" or found[3][3] != "s":
                return None
            device = os.makedev(int(found[5], 16), int(found[6], 16))
            fd = _open_again(device, int(found[7]), found[8])
            return None if fd is None else Backing(fd, int(found[4], 16) + address - start)
    return None


def _open_again(device: int, inode: int, path: str) -> int | None:
    """A descriptor of the file, from one that this process has, or by its name."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names alone
        with contextlib.suppress(OSError):
            fd = int(name)
            if _is(os.fstat(fd), device, inode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR:
                return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if _is(os.fstat(fd), device, inode):
        return fd
    os.close(fd)
    return None


def _is(there: os.stat_result, device: int, inode: int) -> bool:
    return there.st_ino == inode and there.st_dev == device and stat.S_ISREG(there.st_mode)


class Mapping:
    """`size` bytes of a shared file from `offset` on, mapped until close(), or as long as this is held.

    Lies so that huge pages of the file can be mapped whole. Does not keep fd. Raises OSError for what
    cannot be mapped, ValueError for what the file does not hold.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        there = os.fstat(fd)
        inside = offset >= 0 and size >= 1 and offset + size <= there.st_size
        if not stat.S_ISREG(there.st_mode) or offset % PAGE or not inside:
            raise ValueError(f"{size} bytes at {offset} of a file of {there.st_size}")
        self.size = size
        self._offset = offset
        self._all_there = there.st_blocks * 512 >= there.st_size
        self._reserved = size + HUGE_PAGE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._base = _map(None, self._reserved, PROT_NONE, private, -1, 0)
        self.address = self._base + (offset - self._base) % HUGE_PAGE
        both = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            _map(self.address, size, both, mmap.MAP_SHARED | MAP_FIXED, fd, offset)
        except OSError:
            _libc.munmap(self._base, self._reserved)
            raise

    def close(self) -> None:
        """Unmap it. Nobody may be using it any more, whoever may still hold this."""
        if self._reserved:
            _libc.munmap(self._base, self._reserved)
            self._reserved = 0

    def __del__(self) -> None:
        if hasattr(self, "address") and not sys.is_finalizing():
            self.close()

    def use_huge_pages(self, go_on: Callable[[], bool]) -> int:
        """Turn the file's memory into huge pages, whatever the system does by itself; how many bytes.

        O_DIRECT into pages of 4 KiB reaches half of a disk's speed or less. Only a file whose memory is all
        taken already: this takes no more. Uses MADV_COLLAPSE (Linux 6.1), which leaves the contents alone
        and passes over pages that somebody else has pinned. go_on: asked before every step.
        """
        first = round_up(self._offset, HUGE_PAGE) - self._offset
        end = (self._offset + self.size) // HUGE_PAGE * HUGE_PAGE - self._offset
        done = 0
        for start in range(first, end if self._all_there else first, COLLAPSE_BYTES):
            if not go_on():
                break
            size = min(COLLAPSE_BYTES, end - start)
            if _libc.madvise(self.address + start, size, MADV_COLLAPSE) == 0:
                done += size
            elif ctypes.get_errno() == errno.EINVAL:
                break  # this system, or this file system, cannot
        return done


def _map(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, offset)
    if found == MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)


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
