"""Reading slot headers off segments: how an index is rebuilt, and what inspect and verify look at.

The headers of 100,000 slots are as many single pages, read one by one: calling the system from Python takes
longer than the disk does. So compiled code reads and judges them without the GIL, many threads at a time,
and Python sees arrays.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.tiers.nvme_folder import SegmentFile
from kvstrata.tiers.nvme_format import SLOT_HEADER_DTYPE, SlotHeader, slot_offset
from kvstrata.transfer.buffers import PAGE, Arena, address_of
from kvstrata.transfer.file_io import FileIO
from kvstrata.transfer.native import (
    atomic_add,
    atomic_load,
    atomic_store,
    last_error,
    load_i64,
    memcpy,
    preadv,
)
from kvstrata.transfer.slot_header import intact

SCAN_THREADS = 32
"""Each reads one page at a time, so this is the queue depth: what a disk needs to show its speed."""
SLOTS_PER_TASK = 64
PROGRESS_SECONDS = 0.1

ProgressHook = Callable[[int, int], None]
"""Told now and then how many slots are done, and how many there are."""


class SlotState(Enum):
    """What the header of one slot says."""

    EMPTY = "empty"
    """All zero: never written, or dropped on purpose."""
    USED = "used"
    DAMAGED = "damaged"
    MISPLACED = "misplaced"
    """An intact header of another place."""
    MISSING = "missing"
    """Beyond the end of a truncated file."""


STATES = tuple(SlotState)
"""By the number that compiled code and `ScannedSegment.states` use."""
EMPTY, USED, DAMAGED, MISPLACED, MISSING = range(5)


@dataclass(frozen=True, slots=True)
class ScannedSlot:
    number: int
    state: SlotState
    header: SlotHeader | None = None


@dataclass(frozen=True, slots=True)
class ScannedSegment:
    """Every slot of a segment. states: (slots,) places in STATES. headers: (slots,) SLOT_HEADER_DTYPE.

    Where the state is neither USED nor MISPLACED, the header is zeros.
    """

    states: NDArray[np.int8]
    headers: NDArray[Any]

    def count(self) -> Counter[SlotState]:
        """How many slots are in each state, for those in which there are any."""
        counts = np.bincount(self.states, minlength=len(STATES)).tolist()
        return Counter({state: count for state, count in zip(STATES, counts, strict=True) if count})


_SEGMENT, _NUMBER = (SLOT_HEADER_DTYPE.fields[name][1] for name in ("segment_id", "number"))  # type: ignore[index]
_KEPT_BYTES = SLOT_HEADER_DTYPE.itemsize
_EINTR = 4

FD, SEGMENT_ID, STRIDE, SIZE, FIRST, COLUMNS = range(6)
"""Columns of the kernel's segments. FIRST: row of `states` and `headers` where a segment's slots begin."""


@kernel
def _judge_page(page: int, read: int, segment_id: int, number: int, header: int) -> int:
    """State of the slot whose first page lies at an address; an intact header's fields go to `header`."""
    if read < PAGE:
        return MISSING
    if not intact(page):
        for place in range(0, PAGE, 8):
            if load_i64(page + place) != 0:
                return DAMAGED
        return EMPTY
    memcpy(header, page, _KEPT_BYTES)
    here = load_i64(page + _SEGMENT) == segment_id and load_i64(page + _NUMBER) == number
    return USED if here else MISPLACED


@kernel
def _read_page(fd: int, offset: int, page: int, vector: NDArray[np.int64]) -> int:
    """Bytes read of a page, fewer at the end of the file, or the error's number below zero."""
    done = 0
    while done < PAGE:
        vector[0], vector[1] = page + done, PAGE - done
        moved: int = preadv(fd, vector.ctypes.data, 1, offset + done)
        if moved < 0:
            error: int = last_error()
            if error == _EINTR:
                continue
            return -error
        if moved == 0:
            break
        done += moved
    return done


@kernel
def _scan(
    segments: NDArray[np.int64], cursor: NDArray[np.int64], failure: NDArray[np.int64], page: int,
    vector: NDArray[np.int64], states: NDArray[np.int8], headers: int,
) -> None:  # fmt: skip
    """Take slots off the shared cursor until all are judged, or a thread met an error.

    failure: the error's number and the segment's row. page: this thread's. headers: address of the array.
    """
    slots = len(states)
    while atomic_load(failure, 0) == 0:
        first = atomic_add(cursor, 0, SLOTS_PER_TASK)
        if first >= slots:
            return
        row = 0
        for slot in range(first, min(first + SLOTS_PER_TASK, slots)):
            while row + 1 < len(segments) and segments[row + 1, FIRST] <= slot:
                row += 1
            number = slot - segments[row, FIRST]
            offset = PAGE + number * segments[row, STRIDE]
            # O_DIRECT answers an error, not a short read, where a file ends at an odd place.
            read = 0
            if offset + PAGE <= segments[row, SIZE]:
                read = _read_page(segments[row, FD], offset, page, vector)
            if read < 0:
                failure[1] = row
                atomic_store(failure, 0, -read)
                return
            header = headers + slot * _KEPT_BYTES
            states[slot] = _judge_page(page, read, segments[row, SEGMENT_ID], number, header)


def _word(value: int) -> int:
    """An unsigned 64-bit integer as the signed one that kernels use."""
    return value - (1 << 64) if value >> 63 else value


def judge_slot(page: memoryview, read: int, segment_id: int, number: int) -> ScannedSlot:
    """page: the slot's first page as read, `read` bytes of it."""
    kept = np.zeros(1, SLOT_HEADER_DTYPE)
    code = _judge_page(address_of(page), read, _word(segment_id), number, kept.ctypes.data)
    header = SlotHeader.unpack(page) if code in (USED, MISPLACED) else None
    return ScannedSlot(number, STATES[code], header)


class _Scan:
    """One pass over the slots of some segments, shared by the threads that make it."""

    def __init__(self, io: FileIO, segments: Sequence[tuple[int, SegmentFile]]) -> None:
        self._io = io
        self._files = [file for _, file in segments]
        counts = [file.header.slots for file in self._files]
        self.firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._rows = np.zeros((len(segments), COLUMNS), np.int64)
        for row, (fd, file) in enumerate(segments):
            header = file.header
            place = int(self.firsts[row])
            self._rows[row] = (fd, _word(header.segment_id), header.stride, file.size, place)
        self.slots = int(self.firsts[-1])
        self.states = np.zeros(self.slots, np.int8)
        self.headers = np.zeros(self.slots, SLOT_HEADER_DTYPE)
        self._cursor = np.zeros(1, np.int64)
        self._failure = np.zeros(2, np.int64)
        self._parts = iter(range(0, self.slots, SLOTS_PER_TASK))
        # Who changes how pages are read, as the tests do to make disks fail, is asked for every page.
        self._compiled = type(io).read is FileIO.read

    @property
    def done(self) -> int:
        """Slots that threads have taken."""
        return min(int(self._cursor[0]), self.slots)

    def work(self) -> None:
        """What each thread does. Raises OSError; the other threads stop then."""
        arena = Arena(PAGE)
        try:
            if self._compiled:
                vector = np.zeros(2, np.int64)
                headers = self.headers.ctypes.data
                page = address_of(arena.view)
                _scan(self._rows, self._cursor, self._failure, page, vector, self.states, headers)
            else:
                self._work_through_io(arena.view)
        finally:
            arena.close()

    def _work_through_io(self, page: memoryview) -> None:
        for first in self._parts:
            if self._failure[0]:
                return
            for slot in range(first, min(first + SLOTS_PER_TASK, self.slots)):
                row = int(np.searchsorted(self.firsts, slot, "right")) - 1
                fd, segment_id, stride, size, place = self._rows[row].tolist()
                offset = slot_offset(slot - place, stride)
                try:
                    read = self._io.read(fd, [page], offset) if offset + PAGE <= size else 0
                except BaseException:
                    self._failure[:] = -1
                    raise
                header = self.headers[slot : slot + 1].ctypes.data
                self.states[slot] = _judge_page(address_of(page), read, segment_id, slot - place, header)
            self._cursor[0] += SLOTS_PER_TASK

    def check(self) -> None:
        """Raises the OSError that compiled code met."""
        error, row = self._failure.tolist()
        if error > 0:
            raise OSError(error, os.strerror(error), str(self._files[row].path))

    def results(self) -> list[ScannedSegment]:
        return [
            ScannedSegment(self.states[first:end], self.headers[first:end])
            for first, end in zip(self.firsts[:-1].tolist(), self.firsts[1:].tolist(), strict=True)
        ]


def scan_segments(
    io: FileIO, segments: Sequence[tuple[int, SegmentFile]], progress: Callable[[int], None] | None = None
) -> list[ScannedSegment]:
    """The state of every slot of opened segments. progress: told how many slots are done.

    Raises OSError where a page cannot be read.
    """
    scan = _Scan(io, segments)
    threads = min(SCAN_THREADS, -(-scan.slots // SLOTS_PER_TASK))
    with ThreadPoolExecutor(max(1, threads), "kvstrata-scan") as pool:
        working = [pool.submit(scan.work) for _ in range(threads)]
        while progress and wait(working, PROGRESS_SECONDS).not_done:
            progress(scan.done)
        for future in working:
            future.result()
    scan.check()
    return scan.results()
