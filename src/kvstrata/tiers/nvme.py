"""The nvme tier: slots in preallocated segment files of one folder that this process owns.

Capacity is a promise about the disk: segments, index, marker and lock together never take more.
Segments are made when first needed. A folder may also hold segments of other block sizes (another
model's): they count, and they leave whole, least recently written first, before a new segment would
pass the bound. Blocks of other namespaces with the same block size share the slots and the policy.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import xxhash

from kvstrata.config import NvmeTierConfig, StoreConfig, format_size
from kvstrata.errors import BlockCorruptError, ConfigError
from kvstrata.table import BlockTable, Placement, unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import LocalTier, OpenReport
from kvstrata.tiers.nvme_folder import (
    LEFTOVER_GLOBS,
    FolderLock,
    IndexState,
    SegmentFile,
    bytes_on_disk,
    check_format,
    read_index,
    remember_namespace,
    segment_files,
    write_marker,
)
from kvstrata.tiers.nvme_format import (
    INDEX_ENTRY_DTYPE,
    INDEX_FILE,
    INDEX_SEGMENT_DTYPE,
    PROBE_FILE,
    IndexFile,
    SegmentHeader,
    SlotHeader,
    index_rows,
    segment_name,
    segment_size,
    slot_offset,
    slot_stride,
)
from kvstrata.tiers.nvme_restore import PlacedSegment, Restoration
from kvstrata.transfer.buffers import PAGE, Arena, BufferPool, address_of, round_up
from kvstrata.transfer.file_io import FileIO, supports_direct
from kvstrata.types import BlockLayout, Namespace

log = logging.getLogger(__name__)

FOLDER_RESERVE_BYTES = 128 * 1024
"""Folder, marker, lock, namespaces, and a probe, whatever the file system rounds them to."""
SEGMENT_RESERVE_BYTES = 16 * 1024
"""Extent blocks that a file system may need beside a segment's data."""
SEGMENTS_WANTED = 8
"""A small capacity is still cut into so many segments, so that one can be given up alone."""


@dataclass(slots=True)
class Segment:
    """A range of the table's slots, and the file behind them once there is one."""

    first_slot: int
    slots: int
    header: SegmentHeader | None = None
    fd: int = -1
    path: Path | None = None
    dirty: bool = False


class NvmeTier(LocalTier):
    """One process at a time; `open` raises FolderLockedError naming the holder otherwise."""

    name: ClassVar[str] = "nvme"

    def __init__(
        self,
        config: NvmeTierConfig,
        layout: BlockLayout,
        namespace: Namespace,
        store: StoreConfig,
        telemetry: Telemetry,
        io: FileIO,
    ) -> None:
        super().__init__(store, telemetry)
        self.ttl_seconds = config.ttl_seconds
        self.folder = Path(config.path).expanduser()
        self._config = config
        self._namespace = namespace
        self._store = store
        self._io = io
        self._payload_bytes = round_up(layout.block_bytes, PAGE)
        self._stride = slot_stride(layout.block_bytes)
        self._segment_slots = self._plan_segment()
        self._segments: list[Segment] = []
        self._foreign: list[SegmentFile] = []
        self._lock: FolderLock | None = None
        self._direct = config.direct_io
        self._grow_lock = threading.Lock()
        self._grow_retry_at = 0.0
        self._restore_at = 0.0
        self._pages = threading.local()
        self._bounce = BufferPool(self._payload_bytes, store.io_threads)

    # Sizes

    def _bytes_for(self, slots: int, segments: int) -> int:
        index = self._index_bytes(slots, segments)
        return slots * self._stride + segments * (PAGE + SEGMENT_RESERVE_BYTES) + index

    @staticmethod
    def _index_bytes(slots: int, segments: int) -> int:
        entries = segments * INDEX_SEGMENT_DTYPE.itemsize + slots * INDEX_ENTRY_DTYPE.itemsize
        return round_up(PAGE + entries, PAGE)

    def _plan_segment(self) -> int:
        """Slots per segment. Raises ConfigError if not even one block fits."""
        budget = self._config.capacity_bytes - FOLDER_RESERVE_BYTES
        if budget < self._bytes_for(1, 1):
            needed = FOLDER_RESERVE_BYTES + self._bytes_for(1, 1)
            raise ConfigError(
                f"tier nvme: capacity_bytes {format_size(self._config.capacity_bytes)} is too small: "
                f"one block of {format_size(self._payload_bytes)} and the tier's own files need "
                f"{format_size(needed)}; raise it"
            )
        wanted = min(self._config.segment_bytes, budget // SEGMENTS_WANTED)
        return max(1, wanted // self._stride)

    def _fits(self, slots: int, segments: int) -> bool:
        """May so many slots in so many segments lie in the folder?"""
        return FOLDER_RESERVE_BYTES + self._bytes_for(slots, segments) <= self._config.capacity_bytes

    # Opening

    def open(self) -> OpenReport:
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = check_format(self.folder)
        lock = FolderLock(self.folder)
        try:
            if not ours:
                write_marker(self.folder, self._io)
            for pattern in LEFTOVER_GLOBS:
                for leftover in self.folder.glob(pattern):
                    leftover.unlink(missing_ok=True)
            self._direct = self._config.direct_io and supports_direct(self._io, self.folder)
            if self._config.direct_io and not self._direct:
                self.telemetry.event("nvme buffered", f"{self.folder} does not support O_DIRECT")
            self._remember_namespace()
            report, table = self._take_over()
        except BaseException:
            self._close_files()
            lock.release()
            raise
        self._lock = lock
        self._table = table
        self._opened = True
        return OpenReport(
            report.slots,
            report.restored,
            report.dropped,
            time.monotonic() - started,
            report.from_index,
        )

    def _remember_namespace(self) -> None:
        """For people: a full disk is no reason not to serve what lies on it."""
        try:
            remember_namespace(self.folder, self._namespace.digest, self._namespace.fields, self._io)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.telemetry.event("nvme namespace not written down", str(error))

    def _take_over(self) -> tuple[OpenReport, BlockTable]:
        """Choose which segments stay, lay out the slots, and fill a new table."""
        dropped: Counter[str] = Counter()
        mine: list[SegmentFile] = []
        self._foreign = []
        for found in segment_files(self.folder):
            if isinstance(found, Path):
                self._io.remove(found)
                dropped["segment_header"] += 1
            elif found.header.stride == self._stride:
                mine.append(found)
            else:
                self._foreign.append(found)
        state, index = read_index(self.folder)
        dropped["index_damaged"] += state is IndexState.DAMAGED
        self._foreign.sort(key=lambda file: file.mtime_ns)
        mine.sort(key=lambda file: file.mtime_ns)
        while not self._room_for([file.header.slots for file in mine]):
            victim = (self._foreign or mine).pop(0)
            self._io.remove(victim.path)
            dropped["over_capacity"] += victim.header.slots
        self._segments = []
        placed: list[PlacedSegment] = []
        first_slot = 0
        for file in mine:
            fd = self._io.open(file.path, create=False, direct=self._direct)
            placed.append(PlacedSegment(file, first_slot, fd))
            self._segments.append(Segment(first_slot, file.header.slots, file.header, fd, file.path))
            first_slot += file.header.slots
        for slots in self._plan_rest(first_slot, len(self._segments)):
            self._segments.append(Segment(first_slot, slots))
            first_slot += slots
        table = BlockTable(
            self._slots,
            self._stride,
            self._config.policy,
            self._config.policy_options,
            batch_blocks=self._store.batch_blocks,
            on_expired=lambda count: self.telemetry.count("expired_total", self.name, by=count),
        )
        entries, from_index = Restoration(
            self._io,
            placed,
            index,
            stride=self._stride,
            payload_bytes=self._payload_bytes,
            threads=self._store.io_threads,
            dropped=dropped,
        ).entries()
        for segment in placed:
            if segment.file.size < segment.file.full_size:
                self._io.allocate(segment.fd, segment.file.full_size)
        restored = table.restore(entries)
        dropped["no_room"] += len({entry.key for entry in entries}) - restored
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        self._io.sync_folder(self.folder)
        self.telemetry.count("restored_blocks_total", self.name, by=restored)
        for reason, count in dropped.items():
            self.telemetry.count("restore_dropped_total", self.name, reason, by=count)
        return OpenReport(self._slots, restored, dict(+dropped), 0.0, from_index), table

    def _plan_rest(self, slots: int, segments: int) -> list[int]:
        """Slot counts of the segments that still fit beside those: full ones, then a smaller last one."""
        rest: list[int] = []
        while self._fits(slots + self._segment_slots, segments + 1):
            rest.append(self._segment_slots)
            slots, segments = slots + self._segment_slots, segments + 1
        last = bisect_right(
            range(self._segment_slots), 0, key=lambda more: not self._fits(slots + more, segments + 1)
        )
        return [*rest, last - 1] if last > 1 else rest

    @property
    def _slots(self) -> int:
        return sum(segment.slots for segment in self._segments)

    def _room_for(self, own: list[int]) -> bool:
        foreign = sum(file.full_size + SEGMENT_RESERVE_BYTES for file in self._foreign)
        size = FOLDER_RESERVE_BYTES + self._bytes_for(sum(own), len(own)) + foreign
        return size <= self._config.capacity_bytes

    # Bytes

    def _locate(self, slot: int) -> tuple[Segment, int]:
        """The segment of a slot, and the slot's number in it. Segments are few: a bisection by hand."""
        low, high = 0, len(self._segments) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._segments[middle].first_slot <= slot:
                low = middle
            else:
                high = middle - 1
        segment = self._segments[low]
        return segment, slot - segment.first_slot

    def _page(self) -> memoryview:
        """This thread's page for slot headers."""
        arena = getattr(self._pages, "arena", None)
        if arena is None:
            arena = self._pages.arena = Arena(PAGE)
        return arena.view

    def _fits_direct(self, view: memoryview) -> bool:
        return not self._direct or (len(view) % PAGE == 0 and address_of(view) % PAGE == 0)

    def read(self, placement: Placement, target: memoryview) -> None:
        if placement.length != len(target):
            raise self._corrupt("length", placement)
        segment, number = self._locate(placement.slot)
        page = self._page()
        started = time.monotonic()
        if self._fits_direct(target):
            self._read_slot(segment, number, page, target)
            self._check(segment, number, placement, page, target)
        else:
            with self._bounce.take() as buffer:
                self._read_slot(segment, number, page, buffer)
                self._check(segment, number, placement, page, buffer[: len(target)])
                target[:] = buffer[: len(target)]
        self.telemetry.observe("read_seconds", time.monotonic() - started, self.name)
        self.telemetry.count("read_bytes_total", self.name, by=len(target))

    def _read_slot(self, segment: Segment, number: int, page: memoryview, payload: memoryview) -> None:
        with self.reads.watch():
            read = self._io.read(segment.fd, [page, payload], slot_offset(number, self._stride))
        if read < PAGE:
            page[:8] = bytes(8)  # nothing was read: do not judge what this thread read before

    def _check(
        self,
        segment: Segment,
        number: int,
        placement: Placement,
        page: memoryview,
        payload: memoryview,
    ) -> None:
        header = SlotHeader.unpack(page)
        assert segment.header is not None
        if header is None:
            raise self._corrupt("header", placement)
        if header.segment_id != segment.header.segment_id or header.number != number:
            raise self._corrupt("place", placement)
        if header.key != placement.key:
            raise self._corrupt("key", placement)
        if header.length != len(payload):
            raise self._corrupt("length", placement)
        # The table's checksum too: an older copy of the slot is whole in itself, but is not what was saved.
        if xxhash.xxh3_64_intdigest(payload) != header.checksum or header.checksum != placement.checksum:
            raise self._corrupt("checksum", placement)

    def _corrupt(self, reason: str, placement: Placement) -> BlockCorruptError:
        return BlockCorruptError(
            f"wrong {reason}", reason=reason, tier=self.name, key=placement.key, slot=placement.slot
        )

    def write(self, placement: Placement, source: memoryview, checksum: int) -> None:
        started = time.monotonic()
        segment, number = self._locate(placement.slot)
        if segment.fd < 0:
            self._grow(segment)
        assert segment.header is not None
        if self._fits_direct(source):
            self._write_slot(segment, number, placement, source, len(source), checksum)
        else:
            with self._bounce.take() as buffer:
                size = len(source)
                buffer[:size] = source
                padded = buffer[: round_up(size, PAGE)] if self._direct else buffer[:size]
                self._write_slot(segment, number, placement, padded, size, checksum)
        self.telemetry.observe("write_seconds", time.monotonic() - started, self.name)
        self.telemetry.count("write_bytes_total", self.name, by=len(source))

    def _write_slot(
        self,
        segment: Segment,
        number: int,
        placement: Placement,
        payload: memoryview,
        length: int,
        checksum: int,
    ) -> None:
        assert segment.header is not None
        page = self._page()
        SlotHeader(
            placement.key, self._namespace.digest, segment.header.segment_id, number, length,
            checksum, placement.sequence, unix_ms(), placement.expires_ms,
        ).pack_into(page)  # fmt: skip
        with self.writes.watch():
            self._io.write(segment.fd, [page, payload], slot_offset(number, self._stride))
            if self._config.sync == "always":
                self._io.sync(segment.fd)
        # After the write: a flush in between would take the mark away and miss the bytes.
        segment.dirty = True

    # Growing

    def _grow(self, segment: Segment) -> None:
        """Put a file behind a planned segment. Raises OSError, at once while an earlier try is fresh."""
        with self._grow_lock:
            if segment.fd >= 0:
                return
            if time.monotonic() < self._grow_retry_at:
                raise OSError(errno.ENOSPC, "no room for a new segment lately")
            try:
                # A hang shows in the breaker; an error does not: what has a file goes on working.
                with self.writes.watch(count_errors=False):
                    self._create(segment)
            except OSError as error:
                self._grow_retry_at = time.monotonic() + self._store.breaker_retry_seconds
                name = errno.errorcode.get(error.errno or 0, "unknown")
                self.telemetry.count("io_errors_total", self.name, "grow", name)
                self.telemetry.event("nvme cannot grow", str(error))
                if not any(other.fd >= 0 for other in self._segments):
                    self.writes.trip(f"no segment can be made: {error}")
                raise

    def _create(self, segment: Segment) -> None:
        own = [other.slots for other in self._segments if other.fd >= 0]
        while self._foreign and not self._room_for([*own, segment.slots]):
            victim = self._foreign[0]
            with contextlib.suppress(FileNotFoundError):
                self._io.remove(victim.path)
            self._foreign.pop(0)  # only now: while it is on the disk, it counts
            self.telemetry.count("restore_dropped_total", self.name, "foreign_size", by=victim.header.slots)
        self._measure(segment)
        header = SegmentHeader(secrets.randbits(63), self._stride, segment.slots, unix_ms())
        path = self.folder / segment_name(header.segment_id)
        fd = self._io.open(path, create=True, direct=self._direct)
        try:
            self._io.allocate(fd, segment_size(segment.slots, self._stride))
            page = Arena(PAGE)
            page.view[:] = header.pack()
            self._io.write(fd, [page.view], 0)
            self._io.sync(fd)
            self._io.sync_folder(self.folder)
        except BaseException:
            self._io.close(fd)
            with contextlib.suppress(OSError):
                self._io.remove(path)
            raise
        segment.header, segment.path, segment.fd = header, path, fd

    def _measure(self, segment: Segment) -> None:
        """Raise ENOSPC if the disk says that the bound would be passed, whatever the plan says.

        The plan does not know of a file that could not be removed.
        """
        wanted = segment_size(segment.slots, self._stride) + SEGMENT_RESERVE_BYTES
        index = self._index_bytes(self._slots, len(self._segments))
        if bytes_on_disk(self.folder) + wanted + index > self._config.capacity_bytes:
            raise OSError(errno.ENOSPC, "a new segment would pass capacity_bytes; is a file in the way?")

    def write_failed(self, placement: Placement) -> None:
        segment, _ = self._locate(placement.slot)
        slots = range(placement.slot, placement.slot + 1)
        if segment.fd < 0:
            slots = range(segment.first_slot, segment.first_slot + segment.slots)
        self._restore_at = time.monotonic() + self._store.breaker_retry_seconds
        evicted = self.table.withdraw(slots)
        self.telemetry.count("evictions_total", self.name, by=evicted)

    def refresh(self) -> None:
        if self._restore_at and time.monotonic() >= self._restore_at:
            self._restore_at = 0.0
            self.table.restore_withdrawn()

    # Upkeep

    def probe_read(self) -> None:
        backed = next((segment for segment in self._segments if segment.fd >= 0), None)
        if backed is None:
            list(os.scandir(self.folder))
        else:
            self._io.read(backed.fd, [self._page()], 0)

    def probe_write(self) -> None:
        path = self.folder / PROBE_FILE
        path.unlink(missing_ok=True)
        fd = self._io.open(path, create=True, direct=self._direct)
        try:
            self._io.write(fd, [self._page()], 0)
            self._io.sync(fd)
        finally:
            self._io.close(fd)
            path.unlink(missing_ok=True)
        self._grow_retry_at = 0.0
        self._restore_at = 0.0
        self.table.restore_withdrawn()

    def flush(self) -> None:
        for segment in self._segments:
            if segment.dirty and segment.fd >= 0:
                segment.dirty = False
                try:
                    self._io.sync(segment.fd)
                except OSError:
                    segment.dirty = True
                    raise

    def close(self, *, clean: bool) -> None:
        if clean and self._opened:
            self._opened = False
            try:
                self.flush()
                # Without the lock the folder may be another process's by now.
                if self._lock is not None:
                    self._write_index(self.table)
            except OSError as error:
                log.warning("kvstrata: %s: the index was not kept: %s", self.folder, error)
            self._close_files()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write_index(self, table: BlockTable) -> None:
        rows: list[tuple[int, int, int, int]] = []
        row_of: dict[int, int] = {}
        for segment in self._segments:
            if segment.header is None or segment.path is None:
                continue
            try:
                stat = segment.path.stat()
            except FileNotFoundError:
                continue  # somebody took the file away: its blocks end with this process
            row_of[segment.first_slot] = len(rows)
            rows.append((segment.header.segment_id, segment.slots, stat.st_size, stat.st_mtime_ns))
        placed = []
        for entry in table.entries():
            segment, number = self._locate(entry.slot)
            if segment.first_slot in row_of:
                placed.append((row_of[segment.first_slot], number, entry))
        index = IndexFile(self._stride, np.array(rows, INDEX_SEGMENT_DTYPE), index_rows(placed))
        self._io.write_file(self.folder / INDEX_FILE, index.pack())

    def _close_files(self) -> None:
        for segment in self._segments:
            if segment.fd >= 0:
                self._io.close(segment.fd)
                segment.fd = -1

    def used_bytes_on_medium(self) -> int:
        return bytes_on_disk(self.folder)
