"""Memory that I/O reads into: page-aligned arenas on huge pages, and many buffers named at once.

Private anonymous memory with MADV_HUGEPAGE, because 4 KiB pages split a 1 MiB transfer into hundreds
of segments, and because shared anonymous memory does not get huge pages everywhere.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from kvstrata.jit import holding_gil

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


Bytes = memoryview | bytearray | bytes
"""What `Buffers.of` takes, beside numpy arrays: anything that lends out its memory."""

_SIMPLE, _WRITABLE = 0, 1
_EXPORT_WORDS = 10
"""Py_buffer of CPython 3.11 and later: buf, obj, len, itemsize, readonly and ndim, then four pointers."""
_get_buffer = types.ExternalFunction(
    "PyObject_GetBuffer", types.int32(types.int64, types.int64, types.int32)
)
_release_buffer = types.ExternalFunction("PyBuffer_Release", types.void(types.int64))
_clear_error = types.ExternalFunction("PyErr_Clear", types.void())


@holding_gil
def _borrow(objects: NDArray[np.int64], none: int, flags: int, exports: NDArray[np.int64]) -> int:
    """Fill exports (n, 10), a Py_buffer per object; zeros for None. The first that refuses, or -1."""
    for i in range(len(objects)):
        if objects[i] != none and _get_buffer(objects[i], exports.ctypes.data + i * 80, flags) != 0:
            _clear_error()
            exports[i] = 0
            return i
    return -1


@holding_gil
def _give_back(exports: NDArray[np.int64]) -> None:
    for i in range(len(exports)):
        if exports[i, 1] != 0:
            _release_buffer(exports.ctypes.data + i * 80)


class _Exports:
    """Borrowed buffers: while this lives, their memory stays where it is and cannot be released."""

    def __init__(self, objects: tuple[Any, ...], flags: int) -> None:
        self.words: NDArray[np.int64] = np.zeros((len(objects), _EXPORT_WORDS), np.int64)
        self.refused = _borrow(
            np.fromiter(map(id, objects), np.int64, len(objects)), id(None), flags, self.words
        )

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _give_back(self.words)


class Buffers:
    """Many buffers as two arrays, for compiled code that moves bytes by address.

    addresses: (n,) int64, 0 where there is no buffer. lengths: (n,) int64, in bytes. owner: what must
    stay alive for as long as the addresses are used.
    """

    __slots__ = ("addresses", "lengths", "owner")

    def __init__(self, addresses: NDArray[np.int64], lengths: NDArray[np.int64], owner: object) -> None:
        self.addresses = addresses
        self.lengths = lengths
        self.owner = owner

    @classmethod
    def of(cls, views: Sequence[Bytes | NDArray[Any] | None], *, writable: bool) -> Buffers:
        """The memory of `views`, borrowed until the last Buffers with this owner is gone.

        None has address 0 and length 0. Raises ValueError for a view that is read-only though `writable`
        is asked for, that is not contiguous, or that was released; TypeError for what is no buffer.
        """
        objects = tuple(views)  # nobody else can change it, and it keeps every object alive
        exports = _Exports(objects, _WRITABLE if writable else _SIMPLE)
        if exports.refused >= 0:
            raise ValueError(f"buffer {exports.refused}: {_why_refused(objects[exports.refused])}")
        return cls(exports.words[:, 0].copy(), exports.words[:, 2].copy(), exports)

    def __len__(self) -> int:
        return len(self.addresses)

    def take(self, positions: NDArray[np.integer[Any]] | Sequence[int]) -> Buffers:
        """Those at the positions, in their order, with the same owner."""
        chosen = np.asarray(positions, np.intp)
        return Buffers(self.addresses[chosen], self.lengths[chosen], self.owner)


def _why_refused(refused: Any) -> str:
    with memoryview(refused) as view:  # TypeError for what is no buffer, ValueError for a released view
        return "not contiguous" if not view.c_contiguous else "read-only"


class Region:
    """Equal rows in one buffer, such as an engine's block pool: buffers named by number, none made.

    buffer: contiguous; bytes behind the last whole row are left alone. row_bytes: of one row.
    """

    def __init__(self, buffer: Bytes | NDArray[Any], row_bytes: int) -> None:
        """Raises ValueError if the buffer is not contiguous or does not hold one row."""
        exports = _Exports((buffer,), _SIMPLE)
        if exports.refused >= 0:
            raise ValueError(f"region: {_why_refused(buffer)}")
        size = int(exports.words[0, 2])
        if not 0 < row_bytes <= size:
            raise ValueError(f"region: rows of {row_bytes} bytes in a buffer of {size}")
        self.row_bytes = row_bytes
        self.address = int(exports.words[0, 0])
        self.writable = exports.words[0, 4] & 0xFFFFFFFF == 0  # `readonly` is the lower half of that word
        self._rows = size // row_bytes
        self._exports = exports

    def __len__(self) -> int:
        """How many rows there are."""
        return self._rows

    def rows(self, ids: NDArray[np.integer[Any]] | Sequence[int], length: int | None = None) -> Buffers:
        """The first `length` bytes (default: all) of the rows `ids`, which may come in any order.

        Raises IndexError for a row that is not there, ValueError for a length that is not within a row.
        """
        size = self.row_bytes if length is None else length
        if not 0 < size <= self.row_bytes:
            raise ValueError(f"region: {size} bytes of rows of {self.row_bytes}")
        numbers = np.asarray(ids)
        if len(numbers) == 0:
            numbers = np.zeros(0, np.int64)
        elif numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise ValueError(f"region: row numbers of type {numbers.dtype} and shape {numbers.shape}")
        elif numbers.min() < 0 or numbers.max() >= self._rows:
            wrong = numbers[(numbers < 0) | (numbers >= self._rows)][0]
            raise IndexError(f"region: no row {wrong} among {self._rows}")
        addresses = self.address + numbers.astype(np.int64) * self.row_bytes
        return Buffers(addresses, np.full(len(numbers), size, np.int64), self)
