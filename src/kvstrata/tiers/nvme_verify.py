"""Reads every block in a folder of the nvme tier, and drops the bad ones if told to.

Holds the folder's lock meanwhile. Not the tier: blocks of every size and namespace are checked alike,
by header and payload checksums, and against the index of the last clean close where there is one: only
the index knows that a block should be where now is nothing, or another block.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from kvstrata.errors import TierUnavailableError
from kvstrata.table import unix_ms
from kvstrata.tiers.nvme_audit import require_folder
from kvstrata.tiers.nvme_folder import FolderLock, IndexState, SegmentFile, read_index, segment_files
from kvstrata.tiers.nvme_format import INDEX_FILE, IndexFile, slot_offset
from kvstrata.tiers.nvme_scan import ProgressHook, ScannedSlot, SlotState, judge_slot
from kvstrata.transfer.buffers import PAGE, Arena, BufferPool, round_up
from kvstrata.transfer.file_io import FileIO

THREADS = 8
SLOTS_PER_TASK = 16

REASONS = {
    "damaged": "the slot header is not intact",
    "misplaced": "an intact header of another place",
    "missing": "the slot lies beyond the end of a truncated file",
    "short": "the file ends within the payload",
    "length": "the header claims more bytes than a slot holds, or none",
    "checksum": "the payload is not what was saved",
    "io_error": "the disk answers an error",
    "lost": "the index of the last clean close names a block, the slot is empty",
    "replaced": "the index of the last clean close names another block",
    "segment_header": "the segment's first page is not intact, or names another file: its blocks are lost",
    "segment_missing": "the file of a segment with blocks is gone",
    "index_damaged": "the index is not intact: the next open scans the segments instead",
}
"""What is reported of bad blocks and files."""


@dataclass(frozen=True, slots=True)
class BadSlot:
    """A slot, or with slot None a file, that is not what was saved. reason: a key of REASONS."""

    file: str
    slot: int | None
    reason: str
    key: str = ""
    namespace: str = ""
    detail: str = ""


@dataclass(slots=True)
class VerifyReport:
    """slots: all of the readable segments. checked_blocks: those with an intact header in its place.

    lost_blocks: blocks in segments whose file is gone, by the index. repaired: the bad ones were dropped.
    """

    index: IndexState
    slots: int = 0
    empty_slots: int = 0
    checked_blocks: int = 0
    good_blocks: int = 0
    expired_blocks: int = 0
    lost_blocks: int = 0
    payload_bytes: int = 0
    seconds: float = 0.0
    repaired: bool = False
    bad: list[BadSlot] = field(default_factory=list)

    @property
    def by_reason(self) -> dict[str, int]:
        return dict(Counter(bad.reason for bad in self.bad))


def verify_folder(
    folder: Path, progress: ProgressHook, *, repair: bool = False, io: FileIO | None = None
) -> VerifyReport:
    """Check every used slot. repair: empty the bad slots, so that the next open finds good ones only.

    Raises ConfigError, FormatVersionError, FolderLockedError naming the holder, OSError, and
    TierUnavailableError if the disk does not take the repair.
    """
    require_folder(folder)
    lock = FolderLock(folder)
    try:
        return _Verification(folder, io or FileIO()).run(progress, repair=repair)
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Verdict:
    """One slot. reason: empty if it is as it should be."""

    slot: ScannedSlot
    reason: str = ""
    detail: str = ""


class _Verification:
    """One pass over a locked folder."""

    def __init__(self, folder: Path, io: FileIO) -> None:
        self._folder = folder
        self._io = io
        state, self._index = read_index(folder)
        self._report = VerifyReport(state)
        self._files: list[SegmentFile] = []
        self._unreadable: list[Path] = []
        for found in segment_files(folder):
            if isinstance(found, SegmentFile):
                self._files.append(found)
            else:
                self._unreadable.append(found)

    def run(self, progress: ProgressHook, *, repair: bool) -> VerifyReport:
        started = time.monotonic()
        report = self._report
        self._check_files()
        report.slots = sum(file.header.slots for file in self._files)
        done, now = 0, unix_ms()
        with ThreadPoolExecutor(THREADS, "kvstrata-verify") as pool:
            for file in self._files:
                for verdicts in self._check_segment(file, pool):
                    for verdict in verdicts:
                        self._count(file, verdict, now)
                    done += len(verdicts)
                    progress(done, report.slots)
        if repair and report.bad:
            self._repair()
            report.repaired = True
        report.seconds = time.monotonic() - started
        return report

    def _check_files(self) -> None:
        report = self._report
        if report.index is IndexState.DAMAGED:
            report.bad.append(BadSlot(INDEX_FILE, None, "index_damaged"))
        report.bad += [BadSlot(path.name, None, "segment_header") for path in self._unreadable]
        for segment_id, blocks in _indexed_segments(self._index):
            if blocks and not any(file.header.segment_id == segment_id for file in self._files):
                name = f"segment {segment_id:016x}"
                detail = f"{blocks} blocks"
                report.lost_blocks += blocks
                report.bad.append(BadSlot(name, None, "segment_missing", detail=detail))

    def _check_segment(self, file: SegmentFile, pool: ThreadPoolExecutor) -> Iterator[list[_Verdict]]:
        expected = _expected_keys(self._index, file.header.segment_id)
        buffers = BufferPool(file.header.stride, THREADS)
        with self._open(file) as fd:

            def check(first: int) -> list[_Verdict]:
                with buffers.take() as buffer:
                    numbers = range(first, min(first + SLOTS_PER_TASK, file.header.slots))
                    return [
                        self._check_slot(file, fd, number, expected.get(number), buffer)
                        for number in numbers
                    ]

            yield from pool.map(check, range(0, file.header.slots, SLOTS_PER_TASK))

    @contextmanager
    def _open(self, file: SegmentFile) -> Iterator[int]:
        """Past the page cache where that works: what is checked is what the disk holds.

        Reads of a truncated file may end anywhere, which O_DIRECT does not allow.
        """
        direct = file.size >= file.full_size and self._reads_direct(file.path)
        fd = self._io.open(file.path, create=False, direct=direct)
        try:
            yield fd
        finally:
            self._io.close(fd)

    def _reads_direct(self, path: Path) -> bool:
        page = Arena(PAGE)
        try:
            fd = self._io.open(path, create=False, direct=True)
            try:
                self._io.read(fd, [page.view], 0)
            finally:
                self._io.close(fd)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        finally:
            page.close()
        return True

    def _check_slot(
        self, file: SegmentFile, fd: int, number: int, expected: bytes | None, buffer: memoryview
    ) -> _Verdict:
        page, room = buffer[:PAGE], buffer[PAGE:]
        offset = slot_offset(number, file.header.stride)
        try:
            slot = judge_slot(page, self._io.read(fd, [page], offset), file.header.segment_id, number)
            if slot.state is SlotState.EMPTY:
                return _Verdict(slot, "lost" if expected else "")
            if slot.state is not SlotState.USED or slot.header is None:
                return _Verdict(slot, slot.state.value)
            length = slot.header.length
            if not 0 < length <= len(room):
                return _Verdict(slot, "length")
            payload = room[: round_up(length, PAGE)]
            if self._io.read(fd, [payload], offset + PAGE) < length:
                return _Verdict(slot, "short")
        except OSError as error:
            return _Verdict(ScannedSlot(number, SlotState.DAMAGED), "io_error", error.strerror or "")
        if xxhash.xxh3_64_intdigest(payload[:length]) != slot.header.checksum:
            return _Verdict(slot, "checksum")
        if expected not in (None, slot.header.key):
            return _Verdict(slot, "replaced")
        return _Verdict(slot)

    def _count(self, file: SegmentFile, verdict: _Verdict, now: int) -> None:
        report, slot, header = self._report, verdict.slot, verdict.slot.header
        if slot.state is SlotState.USED and header is not None:
            report.checked_blocks += 1
            report.payload_bytes += header.length
            report.good_blocks += not verdict.reason
            report.expired_blocks += bool(header.expires_ms and header.expires_ms <= now)
        report.empty_slots += slot.state is SlotState.EMPTY
        if verdict.reason:
            key, namespace = (header.key.hex(), header.namespace.hex()) if header else ("", "")
            report.bad.append(
                BadSlot(file.path.name, slot.number, verdict.reason, key, namespace, verdict.detail)
            )

    def _repair(self) -> None:
        """The index goes first: after a crash in between, the next open scans what is there."""
        (self._folder / INDEX_FILE).unlink(missing_ok=True)
        for path in self._unreadable:
            self._io.remove(path)
        self._io.sync_folder(self._folder)
        slots: dict[str, list[int]] = {}
        for bad in self._report.bad:
            if bad.slot is not None:
                slots.setdefault(bad.file, []).append(bad.slot)
        for file in self._files:
            if file.path.name in slots:
                try:
                    self._empty_slots(file, slots[file.path.name])
                except OSError as error:
                    raise TierUnavailableError(
                        f"{file.path}: the bad slots could not be emptied: {error.strerror}; "
                        "check the disk, or remove this file",
                        tier="nvme",
                    ) from error

    def _empty_slots(self, file: SegmentFile, numbers: list[int]) -> None:
        page = Arena(PAGE)
        fd = self._io.open(file.path, create=False, direct=False)
        try:
            if file.size < file.full_size:
                self._io.allocate(fd, file.full_size)
            for number in numbers:
                self._io.write(fd, [page.view], slot_offset(number, file.header.stride))
            self._io.sync(fd)
        finally:
            self._io.close(fd)
            page.close()


def _indexed_segments(index: IndexFile | None) -> Iterator[tuple[int, int]]:
    """Segment id and number of blocks, as the index has them."""
    if index is not None:
        for row, segment_id in enumerate(index.segments["id"].tolist()):
            yield segment_id, int(np.count_nonzero(index.entries["segment"] == row))


def _expected_keys(index: IndexFile | None, segment_id: int) -> dict[int, bytes]:
    """Slot -> key of one segment by the index."""
    if index is None:
        return {}
    rows = np.flatnonzero(index.segments["id"] == segment_id)
    mine = index.entries[np.isin(index.entries["segment"], rows)]
    return dict(zip(mine["slot"].tolist(), mine["key"].tolist(), strict=True))
