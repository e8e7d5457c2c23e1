"""Files that are memory of this process: found by address, mapped a second time. Moves no bytes.

Who maps a file trusts its owner not to cut it short: touching what is gone ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from kvstrata.transfer.buffers import HUGE_PAGE, PAGE

PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
MAP_FAILED = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

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

    offset: of its first byte in the file. Lies so that huge pages of the file can be mapped whole. Does not
    keep fd. Raises OSError for what cannot be mapped, ValueError for what the file does not hold.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        there = os.fstat(fd)
        inside = offset >= 0 and size >= 1 and offset + size <= there.st_size
        if not stat.S_ISREG(there.st_mode) or offset % PAGE or not inside:
            raise ValueError(f"{size} bytes at {offset} of a file of {there.st_size}")
        self.size = size
        self.offset = offset
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


def _map(address: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    found = _libc.mmap(address, size, protection, flags, fd, offset)
    if found == MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)
