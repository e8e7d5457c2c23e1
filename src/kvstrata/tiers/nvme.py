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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from kvstrata.config import NvmeTierConfig, StoreConfig, format_size
from kvstrata.errors import ConfigError
from kvstrata.table import BlockTable, Placements, unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import NEVER_NS, OpenReport, Words
from kvstrata.tiers.engine_tier import LocalTier
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
    index_rows,
    segment_name,
    segment_size,
    slot_stride,
)
from kvstrata.tiers.nvme_growth import Growth
from kvstrata.tiers.nvme_prepare import STOP_SECONDS, PrepareReport, SegmentPreparer
from kvstrata.tiers.nvme_restore import PlacedSegment, Restoration
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, Buffers, round_up
from kvstrata.transfer.engine import Batch, Engine, Kind, OnDone, Rows
from kvstrata.transfer.file_io import FileIO, is_plain, supports_direct
from kvstrata.transfer.handle import Batches, Cancellable
from kvstrata.transfer.ring import ring_refused
from kvstrata.types import BlockLayout, Namespace

log = logging.getLogger(__name__)

FOLDER_RESERVE_BYTES = 128 * 1024
"""Folder, marker, lock, namespaces, and a probe, whatever the file system rounds them to."""
SEGMENT_RESERVE_BYTES = 16 * 1024
"""Extent blocks that a file system may need beside a segment's data."""
SEGMENTS_WANTED = 8
"""A small capacity is still cut into so many segments, so that one can be given up alone."""
PREPARE_LEAST_BYTES = 4 * 2**20
"""A smaller segment is made when it is needed: that takes less than a thread would."""


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
        self._io = io
        self._payload_bytes = round_up(layout.block_bytes, PAGE)
        self._stride = slot_stride(layout.block_bytes)
        self._segment_slots = self._plan_segment()
        self._segments: list[Segment] = []
        self._by_fd: dict[int, Segment] = {}
        self._flush_lock = threading.Lock()
        self._flushing: Batch | None = None
        self._foreign: list[SegmentFile] = []
        self._lock: FolderLock | None = None
        self._direct = config.direct_io
        self._grow_lock = threading.Lock()
        self._grow_retry_at = 0.0
        self._preparer: SegmentPreparer | None = None
        self._all_slots = 0
        self._backed_slots = 0
        self._restore_at = 0.0
        self._look_over()

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
            engine = Engine(
                f"kvstrata-{self.name}",
                self._engine_settings(*self._choose_engine()),
                stride=self._stride,
                payload_bytes=self._payload_bytes,
                space=self._namespace.digest,
                file_io=self._io,
            )
        except BaseException:
            self._close_files()
            lock.release()
            raise
        self._lock = lock
        self._table = table
        self._start_engine(engine)
        self._preparer = self._make_preparer()
        self._opened = True
        self._prepare_ahead()
        return OpenReport(
            report.slots,
            report.restored,
            report.dropped,
            time.monotonic() - started,
            report.from_index,
        )

    def _choose_engine(self) -> tuple[Kind, int, int]:
        """Its kind, units in flight, and how many of them store; what was asked for, where it can be.

        Without O_DIRECT the kernel hands what io_uring is given to threads of its own: ours know more.
        """
        store = self._store
        asked, refused = store.io_engine, ""
        if not is_plain(self._io):
            asked = "threads"
        if asked != "threads":
            refused = ring_refused() if self._direct else "no O_DIRECT in this folder"
        if asked == "threads" or refused:
            if refused:
                self.telemetry.event("nvme without io_uring", f"{self.folder}: {refused}")
            return "threads", store.io_threads, store.io_store_threads
        return "ring", store.io_depth, max(1, store.io_depth * store.io_store_threads // store.io_threads)

    def _remember_namespace(self) -> None:
        """For people: a full disk is no reason not to serve what lies on it."""
        if not self._namespace.fields:
            return
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
        self._all_slots, self._backed_slots = self._slots, sum(file.header.slots for file in mine)
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
            dropped=dropped,
        ).entries()
        for segment in placed:
            if segment.file.size < segment.file.full_size:
                self._io.allocate(segment.fd, segment.file.full_size)
        self._look_over()
        restored, keys = table.restore(entries)
        dropped["no_room"] += keys - restored
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

    def _look_over(self) -> None:
        """Columns of what segments are, for whole batches; after every change of a file."""
        self._firsts = np.array([segment.first_slot for segment in self._segments], dtype=np.int64)
        ids = [segment.header.segment_id if segment.header else 0 for segment in self._segments]
        self._ids = np.array(ids, dtype=np.int64)
        self._by_fd = {segment.fd: segment for segment in self._segments if segment.fd >= 0}
        # Last: who sees a file here finds everything else about it.
        self._fds = np.array([segment.fd for segment in self._segments], dtype=np.int64)

    def _segments_of(self, slots: Words) -> Words:
        """Number of the segment that each slot lies in."""
        return np.searchsorted(self._firsts, slots, "right") - 1

    def _places(self, placements: Placements, buffers: Buffers) -> Rows:
        """Rows with file, offset and identity of each slot."""
        which = self._segments_of(placements.slots)
        numbers = placements.slots - self._firsts[which]
        rows = np.zeros((len(placements), k.COLUMNS), dtype=np.int64)
        rows[:, k.FD] = self._fds[which]
        rows[:, k.SEGMENT] = self._ids[which]
        rows[:, k.NUMBER] = numbers
        rows[:, k.OFFSET] = PAGE + numbers * self._stride
        rows[:, k.KEY : k.KEY + 4] = placements.key_words()
        if self._direct:
            odd = (buffers.addresses % PAGE != 0) | (buffers.lengths % PAGE != 0)
            rows[:, k.FLAGS] = np.where(odd, k.DIRECT | k.BOUNCE, k.DIRECT)
        return rows

    def _load_rows(self, placements: Placements, targets: Buffers) -> Rows:
        rows = self._places(placements, targets)
        rows[:, k.KIND] = k.READ
        return rows

    def _save_rows(self, placements: Placements, sources: Buffers) -> Rows:
        rows = self._places(placements, sources)
        rows[:, k.KIND] = k.WRITE
        rows[:, k.SEQUENCE] = placements.sequences
        rows[:, k.CREATED_MS] = unix_ms()
        rows[:, k.EXPIRES_MS] = placements.expires_ms
        if self._config.sync == "always":
            rows[:, k.FLAGS] |= k.SYNC
        return rows

    def _submit_save(
        self, rows: Rows, placements: Placements, finish: OnDone, refuse: OnDone
    ) -> Cancellable:
        """What has a file goes to the engine; the rest waits until its segment has one."""
        lacking = rows[:, k.FD] < 0
        if not lacking.any():
            return self._running.submit(rows, loads=False, on_done=finish)
        batches = (
            [self._running.submit(rows[~lacking], loads=False, on_done=finish)] if any(~lacking) else []
        )
        which = self._segments_of(placements.slots)
        waiting = []
        for number in np.unique(which[lacking]).tolist():
            growth = Growth(
                partial(self._rows_of, number), rows[which == number], self._running, finish, refuse
            )
            waiting.append(growth)
            self.upkeep.submit(growth.run)
        return Batches([*batches, *waiting])

    def _rows_of(self, number: int, rows: Rows) -> None:
        """Give the segment its file, and the rows that segment. Raises OSError."""
        if self._fds[number] < 0:
            self._grow(self._segments[number])
        rows[:, k.FD] = self._fds[number]
        rows[:, k.SEGMENT] = self._ids[number]

    def _saved(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        # After the write: a flush in between would take the mark away and miss the bytes.
        for fd in set(rows[rows[:, k.RESULT] != k.LATE, k.FD].tolist()):
            self._by_fd[fd].dirty = True
        super()._saved(on_done, owner, rows)

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
                    if self._preparer is not None:
                        self._preparer.hurry(segment.slots)
                        self._adopt_prepared()
                    if segment.fd < 0:
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
        own = self._taken()
        while self._foreign and not self._room_for([*own, segment.slots]):
            victim = self._foreign[0]
            with contextlib.suppress(FileNotFoundError):
                self._io.remove(victim.path)
            self._foreign.pop(0)  # only now: while it is on the disk, it counts
            self.telemetry.count("restore_dropped_total", self.name, "foreign_size", by=victim.header.slots)
        self._measure(segment.slots)
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
        self._attach(segment, header, path, fd)

    def _attach(self, segment: Segment, header: SegmentHeader, path: Path, fd: int) -> None:
        segment.header, segment.path, segment.fd = header, path, fd
        self._backed_slots += segment.slots
        self._look_over()

    def _taken(self) -> list[int]:
        """Slots of every segment that has a file, or is about to."""
        held = self._preparer.held if self._preparer is not None else []
        return [segment.slots for segment in self._segments if segment.fd >= 0] + held

    def _measure(self, slots: int) -> None:
        """Raise ENOSPC if the disk says that the bound would be passed, whatever the plan says.

        The plan does not know of a file that could not be removed.
        """
        wanted = segment_size(slots, self._stride) + SEGMENT_RESERVE_BYTES
        wanted += self._preparer.unseen_bytes if self._preparer is not None else 0
        index = self._index_bytes(self._slots, len(self._segments))
        if bytes_on_disk(self.folder) + wanted + index > self._config.capacity_bytes:
            raise OSError(errno.ENOSPC, "a new segment would pass capacity_bytes; is a file in the way?")

    def write_failed(self, placements: Placements) -> None:
        slots = set(placements.slots.tolist())
        for number in np.unique(self._segments_of(placements.slots)).tolist():
            segment = self._segments[number]
            if segment.fd < 0:
                slots.update(range(segment.first_slot, segment.first_slot + segment.slots))
        self._restore_at = time.monotonic() + self._store.breaker_retry_seconds
        evicted = self.table.withdraw(slots)
        self.telemetry.count("evictions_total", self.name, by=evicted)

    def refresh(self) -> None:
        if self._restore_at and time.monotonic() >= self._restore_at:
            self._restore_at = 0.0
            self.table.restore_withdrawn()
        self._prepare_ahead()

    # Preparing

    def _make_preparer(self) -> SegmentPreparer:
        return SegmentPreparer(
            self._io,
            self.folder,
            self._stride,
            self.telemetry,
            tier=self.name,
            direct=self._direct,
            retry_seconds=self._store.breaker_retry_seconds,
            grow_lock=self._grow_lock,
            plan=self._next_to_prepare,
            adopt=self._adopt_prepared,
            busy=self._busy,
        )

    def _busy(self) -> bool:
        """Does anybody wait for the disk now?"""
        engine = self._engine
        return engine is not None and any(engine.oldest_seconds(loads=loads) > 0 for loads in (True, False))

    def _prepare_ahead(self) -> None:
        if self._preparer is not None and self._wants_more():
            self._preparer.start()

    def _wants_more(self) -> bool:
        """Will segments be needed soon? "ahead": when the last one that has a file is half full."""
        mode, lacking = self._config.prepare, self._all_slots - self._backed_slots
        # Buffered writes come to the disk later, and those of a small segment are soon done.
        if mode == "no" or lacking <= 0 or not self._direct:
            return False
        if segment_size(self._segment_slots, self._stride) < PREPARE_LEAST_BYTES:
            return False
        free = self._backed_slots - self.table.used_bytes // self._stride
        ahead = (self._config.prepare_segments - 0.5) * self._segment_slots
        return mode == "all" or (self._backed_slots > 0 and free < ahead)

    def _next_to_prepare(self) -> int | None:
        """Slots of a planned segment without a file that fits; segments of other sizes stay for it."""
        if not self.writes.closed or time.monotonic() < self._grow_retry_at or not self._wants_more():
            return None
        return self._first_unmade()

    def _first_unmade(self) -> int | None:
        assert self._preparer is not None
        held = self._preparer.held
        for segment in self._segments:
            if segment.fd >= 0:
                continue
            if segment.slots in held:
                held.remove(segment.slots)
                continue
            if not self._room_for([*self._taken(), segment.slots]):
                return None
            self._measure(segment.slots)
            return segment.slots
        return None

    def _adopt_prepared(self) -> None:
        """Put what is ready behind planned segments."""
        assert self._preparer is not None
        for ready in self._preparer.pop_ready():
            for segment in self._segments:
                if segment.fd < 0 and segment.slots == ready.header.slots:
                    self._attach(segment, ready.header, ready.path, ready.fd)
                    break
            else:
                self._io.close(ready.fd)
                with contextlib.suppress(OSError):
                    self._io.remove(ready.path)

    def prepare_all(self, progress: Callable[[int, int], None]) -> PrepareReport:
        """Make and write through every planned segment that has no file, in this thread.

        progress: bytes written, of how many. Segments of other sizes stay, and what does not fit beside
        them is left out. Raises OSError; what is prepared until then stays.
        """
        assert self._preparer is not None and self._config.prepare == "no", "a thread prepares already"
        started, own, size = time.monotonic(), self._taken(), 0
        lacking = [segment.slots for segment in self._segments if segment.fd < 0]
        fitting: list[int] = []
        for slots in lacking:
            if not self._room_for([*own, *fitting, slots]):
                break
            fitting.append(slots)
            size += segment_size(slots, self._stride) - PAGE
        written = 0

        def more(part: int) -> None:
            nonlocal written
            written += part
            progress(written, size)

        prepared = self._preparer.run_all(self._first_unmade, more)
        return PrepareReport(
            len(self._segments), prepared, written, len(lacking) - prepared, time.monotonic() - started
        )

    # Upkeep

    def probe_read(self) -> None:
        backed = next((segment for segment in self._segments if segment.fd >= 0), None)
        if backed is None:
            list(os.scandir(self.folder))
        else:
            self._io.read(backed.fd, [Arena(PAGE).view], 0)

    def probe_write(self) -> None:
        path = self.folder / PROBE_FILE
        path.unlink(missing_ok=True)
        fd = self._io.open(path, create=True, direct=self._direct)
        try:
            self._io.write(fd, [Arena(PAGE).view], 0)
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

    def flush_by(self, until: float) -> bool:
        with self._flush_lock:
            if self._flushing is not None:
                # However often this is called, one flush at a time waits for a medium that hangs.
                self._flushing.wait(until)
                if self._flushing.left:
                    return False
            return self._flush_dirty(until)

    def _flush_dirty(self, until: float) -> bool:
        dirty = [segment for segment in self._segments if segment.dirty and segment.fd >= 0]
        rows = np.zeros((len(dirty), k.COLUMNS), dtype=np.int64)
        rows[:, k.KIND] = k.FLUSH
        rows[:, k.FD] = [segment.fd for segment in dirty]
        rows[:, k.DEADLINE_NS] = NEVER_NS
        rows[:, k.POSITION] = np.arange(len(dirty))
        for segment in dirty:
            segment.dirty = False
        failed: list[int] = []

        def on_done(ended: Rows) -> None:
            for position, result in ended[:, [k.POSITION, k.RESULT]].tolist():
                if result:
                    dirty[position].dirty = True
                    failed.append(-result if result < 0 else errno.EBUSY)

        self._flushing = self._running.submit(rows, loads=False, on_done=on_done)
        self._flushing.wait(until)
        if failed:
            raise OSError(failed[0], os.strerror(failed[0]))
        return not self._flushing.left

    def close(self, *, clean: bool) -> None:
        clean = clean and self.stop(self._store.close_seconds)
        if clean and self._opened:
            self._opened = False
            if self._preparer is not None and self._preparer.stop(STOP_SECONDS):
                self._adopt_prepared()
            try:
                self.flush()
                # Without the lock the folder may be another process's by now.
                if self._lock is not None:
                    self._write_index(self.table)
            except OSError as error:
                log.warning("kvstrata: %s: the index was not kept: %s", self.folder, error)
            self._close_files()
        elif self._preparer is not None:
            self._preparer.stop(0.0)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write_index(self, table: BlockTable) -> None:
        rows: list[tuple[int, int, int, int]] = []
        row_of = np.full(len(self._segments), -1, np.int64)
        for number, segment in enumerate(self._segments):
            if segment.header is None or segment.path is None:
                continue
            try:
                stat = segment.path.stat()
            except FileNotFoundError:
                continue  # somebody took the file away: its blocks end with this process
            row_of[number] = len(rows)
            rows.append((segment.header.segment_id, segment.slots, stat.st_size, stat.st_mtime_ns))
        entries = table.entries()
        segments = self._segments_of(entries["slot"])
        here = row_of[segments] >= 0
        entries, segments = entries[here], segments[here]
        placed = index_rows(entries, row_of[segments], entries["slot"] - self._firsts[segments])
        index = IndexFile(self._stride, np.array(rows, INDEX_SEGMENT_DTYPE), placed)
        self._io.write_file(self.folder / INDEX_FILE, index.pack())

    def _close_files(self) -> None:
        for segment in self._segments:
            if segment.fd >= 0:
                self._io.close(segment.fd)
                segment.fd = -1

    def used_bytes_on_medium(self) -> int:
        return bytes_on_disk(self.folder)
