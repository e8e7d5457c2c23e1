"""The I/O engine: batches of blocks between buffers and a tier's slots, moved by compiled threads.

Python fills rows of an array and hands them over; threads that never need the GIL move, make and verify
every block; one Python thread (or whoever polls first) hears of whole batches that are done. So a busy
interpreter delays the news of a batch, never the I/O.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.at_exit import before_exit
from kvstrata.transfer.buffers import PAGE, Arena
from kvstrata.transfer.file_io import FileIO, is_plain
from kvstrata.transfer.ring import Ring
from kvstrata.transfer.ring_kernels import work_ring

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]
"""(blocks, k.COLUMNS): one row per block, see `engine_kernels`."""
Positions = NDArray[np.int64]

RING_ENTRIES = 1024
"""Room for the parts of all units in flight."""
MUTEX_BYTES = 128
"""Room for a mutex or a condition of the C library, whatever the architecture."""

REAP_ROWS = 256
"""Handed out at a time: numpy gives the GIL up for arrays of 500 elements, and then has to wait for it."""
WAIT_SECONDS = 0.1
"""A wait comes back to Python so often, where Ctrl-C is noticed."""

Kind = Literal["memory", "threads", "ring"]
OnDone = Callable[[Rows], None]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """kind: what workers do. On rings two threads keep all units in flight, else a thread each waits.

    workers, store_workers: units in flight, and how many of them store at a time.

    capacity: blocks that may be queued or moving. merge_bytes: neighbours are moved by one call up to so
    much, headers included. part_bytes: a larger block moves in so many bytes a call. polite_bytes,
    polite_seconds: stores keep to one such part in flight so long after a load. priority: loads first, and
    all of that.
    adaptive: fewer in flight than those where that is as fast.
    """

    kind: Kind = "threads"
    workers: int = 8
    store_workers: int = 6
    capacity: int = 65_536
    merge_bytes: int = 4 * 1024 * 1024
    part_bytes: int = 4 * 1024 * 1024
    polite_bytes: int = 1024 * 1024
    polite_seconds: float = 0.02
    priority: bool = True
    adaptive: bool = True
    signal_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class EngineCounts:
    """loads, stores: units moved. merged: blocks that were moved together with the neighbour before them.
    load_depth, store_depth: units that may be in flight, as measurement has it.
    """

    loads: int = 0
    stores: int = 0
    merged: int = 0
    load_depth: int = 0
    store_depth: int = 0


@dataclass(slots=True)
class Batch:
    """Blocks submitted together. cancel() takes back those that no thread has begun."""

    engine: Engine
    group: int
    rows: NDArray[np.int32]
    positions: Positions
    on_done: OnDone
    left: int = field(default=0)

    def cancel(self) -> Positions:
        """Positions whose buffers nobody touched and nobody will: on_done is not called for them."""
        return self.engine.cancel(self)

    def abandon(self, positions: Positions) -> Positions:
        """Which of these still run in the medium, and will never be copied to their COPY_TO any more.

        on_done hears of them all the same, when the medium answers.
        """
        return self.engine.abandon(self, positions)

    def help(self) -> None:
        self.engine.reap()

    def wait(self, until: float) -> None:
        """Until on_done has heard of all of it, or to a moment of time.monotonic."""
        self.engine.wait_for(self, until)


class Engine:
    """name: of its threads. stride: bytes from slot to slot of the files. payload_bytes: of the largest
    block in whole pages, 0 for an engine that moves memory only. space: the namespace's digest.

    file_io: where it is not plain, calls go through it, one per block; not with a ring.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        *,
        stride: int = 0,
        payload_bytes: int = 0,
        space: bytes = bytes(32),
        file_io: FileIO | None = None,
    ) -> None:
        self.settings = settings
        capacity, workers = settings.capacity, settings.workers
        self._hook = _hook(file_io)
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._locks = np.zeros(3 * MUTEX_BYTES, dtype=np.uint8)
        self._control = np.zeros(k.CONTROL_WORDS, dtype=np.int64)
        self._pace = np.zeros((2, k.RATES + k.LEVELS), dtype=np.int64)
        for pace, most in zip(self._pace, (workers, settings.store_workers), strict=True):
            pace[[k.LIMIT, k.MOST, k.LEVEL]] = most, most, (most - 1).bit_length()
        self._control[k.LAST_LOAD_NS] = -(1 << 62)
        setup = np.zeros(k.SETUP_WORDS, dtype=np.int64)
        setup[k.MUTEX] = _address(self._locks)
        setup[k.WORK] = _address(self._locks) + MUTEX_BYTES
        setup[k.NEWS] = _address(self._locks) + 2 * MUTEX_BYTES
        setup[k.STRIDE] = stride
        setup[k.MERGE_BYTES] = 0 if self._hook else settings.merge_bytes
        setup[k.PART_BYTES] = 1 << 62 if self._hook else settings.part_bytes
        setup[k.POLITE_BYTES] = 1 << 62 if self._hook else settings.polite_bytes
        setup[k.POLITE_NS] = int(settings.polite_seconds * 1e9)
        setup[k.PRIORITY] = settings.priority
        setup[k.ADAPTIVE] = settings.adaptive
        setup[k.HOOK] = ctypes.cast(self._hook, ctypes.c_void_p).value or 0 if self._hook else 0
        setup[k.DONE_FD] = self._done_fd
        setup[k.SIGNAL_BYTES] = settings.signal_bytes
        setup[k.ONE] = 1
        setup[k.ONE_ADDRESS] = _address(setup) + 8 * k.ONE
        setup[k.SPACE : k.SPACE + 4] = np.frombuffer(space, dtype=np.int64)
        self._operations = np.zeros((capacity, k.COLUMNS), dtype=np.int64)
        self._desks = np.zeros((workers, k.DESK_WORDS), dtype=np.int64)
        vectors = np.zeros((workers, 2 * k.UNIT_BLOCKS, 2), dtype=np.int64)
        parts = np.zeros((workers, k.UNIT_PARTS, 2), dtype=np.int64)
        self._clocks = np.zeros((workers, 4), dtype=np.int64)
        self._arenas = [_pages(payload_bytes) for _ in range(workers)] if payload_bytes else []
        for number in range(workers):
            desk = self._desks[number]
            desk[k.DESK_PART] = _address(parts[number])
            desk[k.DESK_CLOCK] = _address(self._clocks[number])
            if self._arenas:
                desk[k.DESK_PAGES] = _address(np.frombuffer(self._arenas[number].view, dtype=np.uint8))
                desk[k.DESK_BOUNCE] = desk[k.DESK_PAGES] + k.UNIT_BLOCKS * PAGE
        self._shared = k.Shared(
            self._operations,
            self._pace,
            np.zeros(capacity, dtype=np.int32),
            np.zeros(capacity, dtype=np.int32),
            np.zeros(capacity, dtype=np.int32),
            # Rows are free again before their batch is settled: there may be more batches than rows.
            np.zeros(2 * capacity, dtype=np.int64),
            self._control,
            setup,
            self._desks,
            np.zeros((workers, k.UNIT_BLOCKS), dtype=np.int32),
            vectors,
            parts,
        )
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self._free_count = capacity
        self._free_groups: list[int] = []
        self._batches: dict[int, Batch] = {}
        self._outstanding = 0
        self._closed = False
        self._leaving = False
        self._reaped = np.zeros(REAP_ROWS, dtype=np.int32)
        self._book = threading.Lock()
        self._idle = threading.Condition(self._book)
        self._reaping = threading.RLock()
        self._forgiven_ns = 0
        self._rings = [Ring(RING_ENTRIES) for _ in range(_ring_count(settings))]
        for number, ring in enumerate(self._rings):
            setup[k.WAKE_FD + number] = ring.wake_fd
        self._threads = [
            threading.Thread(target=self._run, args=(n,), name=f"{name}-io-{n}", daemon=True)
            for n in range(len(self._rings) or workers)
        ]
        self._working = len(self._threads)
        self._reaper = threading.Thread(target=self._listen, name=f"{name}-done", daemon=True)
        self._warm()
        for thread in [*self._threads, self._reaper]:
            thread.start()
        before_exit(self)

    def _warm(self) -> None:
        """Load or compile every kernel now: a request's deadline does not wait for a compiler."""
        none = np.zeros(0, dtype=np.int32)
        self._control[k.CLOSING] = 1  # workers that begin now end at once
        self._work(0)
        rows = np.zeros((REAP_ROWS, k.COLUMNS), dtype=np.int64)
        k.enqueue(self._shared, none, rows, True, 0)
        k.reap(self._shared, self._reaped, rows)
        k.announce(self._shared)
        k.await_news(self._shared, 0, np.zeros(2, dtype=np.int64))
        k.cancel(self._shared, none, np.zeros(0, dtype=np.bool_))
        k.abandon(self._shared, none, np.zeros(0, dtype=np.bool_))
        k.shut(self._shared, False)
        self._control[k.CLOSING] = 0

    def _run(self, number: int) -> None:
        try:
            self._work(number)
        finally:
            with self._book:
                self._working -= 1
                self._tell()

    def _work(self, number: int) -> None:
        rings = len(self._rings)
        if rings:
            words = self._rings[number].words
            assert words is not None
            own = len(range(number, self.settings.workers, rings))
            desks = np.zeros((2, own), dtype=np.int32)
            work_ring(self._shared, words, number, rings, desks[0], desks[1])
        elif self.settings.kind == "memory":
            k.work_in_memory(self._shared, number)
        else:
            k.work(self._shared, number)

    # Submitting

    def submit(self, rows: Rows, *, loads: bool, on_done: OnDone) -> Batch:
        """Queue a batch. rows: filled up to DEADLINE_NS and POSITION; they are copied.

        on_done gets rows that are done, some or all at a time, with RESULT, CHECKSUM, BEGAN_NS and
        ENDED_NS; on any thread, one call at a time. After close() nothing is queued and nobody is called.
        """
        count = len(rows)
        positions = rows[:, k.POSITION].copy()
        with self._book:
            full = count > self._free_count or len(self._batches) == len(self._shared.groups)
            if self._closed:
                full = False
                batch = Batch(self, -1, np.zeros(0, np.int32), positions, on_done)
            elif full or not count:
                batch = Batch(self, -1, np.zeros(0, np.int32), np.zeros(0, np.int64), on_done)
            else:
                self._free_count -= count
                taken = self._free[self._free_count : self._free_count + count].copy()
                self._outstanding += count
                group = self._free_groups.pop() if self._free_groups else len(self._batches)
                batch = Batch(self, group, taken, positions, on_done, count)
                self._batches[group] = batch
                k.enqueue(self._shared, taken, rows, loads, group)
        if full:
            refused = rows.copy()
            refused[:, k.RESULT] = k.LATE
            on_done(refused)
        return batch

    def cancel(self, batch: Batch) -> Positions:
        # Never under `_reaping`: who hands out what one engine did may cancel what waits in another.
        with self._book:
            if batch.group < 0:
                refused, batch.positions = batch.positions, np.zeros(0, dtype=np.int64)
                return refused
            # A row that is done may belong to another batch by now.
            mine = self._operations[batch.rows, k.GROUP] == batch.group
            rows, positions = batch.rows[mine & (batch.left > 0)], batch.positions[mine & (batch.left > 0)]
            taken = np.zeros(len(rows), dtype=np.bool_)
            if not len(rows) or not k.cancel(self._shared, rows, taken):
                return np.zeros(0, dtype=np.int64)
            self._give_back(rows[taken])
            self._settle(batch, int(taken.sum()))
            self._tell()  # what is done already may have waited for these
            back: Positions = positions[taken]
            return back

    def abandon(self, batch: Batch, positions: Positions) -> Positions:
        with self._book:
            if batch.group < 0 or not batch.left:
                return np.zeros(0, dtype=np.int64)
            # A row that is done may belong to another batch by now.
            mine = self._operations[batch.rows, k.GROUP] == batch.group
            mine &= np.isin(batch.positions, positions)
            taken = np.zeros(int(mine.sum()), dtype=np.bool_)
            k.abandon(self._shared, batch.rows[mine], taken)
            called_off: Positions = batch.positions[mine][taken]
            return called_off

    # What is done

    def reap(self) -> None:
        """Hand out what is done. Returns at once if another thread is at it."""
        if not self._reaping.acquire(blocking=False):
            return
        try:
            self._reap()
        finally:
            self._reaping.release()

    def _reap(self) -> None:
        while self._reap_some():
            if self._leaving and threading.current_thread() is self._reaper:
                break
        k.announce(self._shared)

    def _reap_some(self) -> bool:
        rows = np.empty((REAP_ROWS, k.COLUMNS), dtype=np.int64)
        with self._book:
            count = k.reap(self._shared, self._reaped, rows)
            if not count:
                return False
            rows = rows[:count]
            self._give_back(self._reaped[:count])
            groups = rows[:, k.GROUP]
            batches = [self._batches[number] for number in dict.fromkeys(groups.tolist())]
        for batch in batches:
            mine = rows if len(batches) == 1 else rows[groups == batch.group]
            try:
                batch.on_done(mine)
            except Exception:
                log.exception("kvstrata: taking in what an engine did raised")
            finally:  # Ctrl-C may come in between: closing must not wait for these
                with self._book:
                    self._settle(batch, len(mine))
        return True

    def wait_for(self, batch: Batch, until: float) -> None:
        """Beside a busy thread this is a turn at the GIL sooner than to wait for the thread that reaps."""
        while batch.left and (left := until - time.monotonic()) > 0:
            seen = int(self._control[k.NEWS_COUNT])
            if not batch.left:
                return
            end = time.monotonic_ns() + int(min(left, WAIT_SECONDS) * 1e9)
            k.await_news(self._shared, seen, np.array(divmod(end, 10**9), dtype=np.int64))
            self.reap()

    def _give_back(self, rows: NDArray[np.int32]) -> None:
        self._free[self._free_count : self._free_count + len(rows)] = rows
        self._free_count += len(rows)

    def _settle(self, batch: Batch, count: int) -> None:
        batch.left -= count
        self._outstanding -= count
        if not batch.left:
            del self._batches[batch.group]
            self._free_groups.append(batch.group)
        if not self._outstanding:
            self._idle.notify_all()

    def _tell(self) -> None:
        if self._done_fd >= 0:
            os.eventfd_write(self._done_fd, 1)

    def _listen(self) -> None:
        while True:
            os.read(self._done_fd, 8)
            if self._leaving:
                return
            with self._reaping:
                self._reap()
            with self._book:
                if self._closed and not self._working:
                    os.close(self._done_fd)
                    self._done_fd = -1
                    break
        for ring in self._rings:
            ring.close()

    # Looking after it

    @property
    def queued(self) -> tuple[int, int]:
        """Loads and stores that no thread has begun."""
        c = self._control
        return int(c[k.LOAD_TAIL] - c[k.LOAD_HEAD]), int(c[k.STORE_TAIL] - c[k.STORE_HEAD])

    @property
    def counts(self) -> EngineCounts:
        """What was moved so far, and how deep the engine goes now."""
        c = self._control
        depths = self._pace[:, k.LIMIT]
        return EngineCounts(
            int(c[k.LOAD_UNITS]), int(c[k.STORE_UNITS]), int(c[k.MERGED]), int(depths[0]), int(depths[1])
        )

    def oldest_seconds(self, *, loads: bool) -> float:
        """How long the oldest running unit has been running, 0.0 if none is."""
        direction = k.LOADING if loads else k.STORING
        began = self._desks[self._desks[:, k.DESK_DIRECTION] == direction, k.DESK_BEGAN]
        began = began[began > self._forgiven_ns]
        return max(0, time.monotonic_ns() - int(began.min())) / 1e9 if len(began) else 0.0

    def forgive(self) -> None:
        """What runs now does not count for `oldest_seconds` any more."""
        self._forgiven_ns = time.monotonic_ns()

    def drain(self, seconds: float) -> bool:
        """Wait until everything submitted was handed out; False if that took longer than `seconds`."""
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            with self._book:
                if self._idle.wait_for(lambda: not self._outstanding, min(left, WAIT_SECONDS)):
                    return True
            if left <= WAIT_SECONDS:
                return False
            self.reap()  # at the end of the process nobody else does

    def leave(self) -> list[threading.Thread]:
        """The interpreter ends: from here on what is done is handed out only to who asks."""
        with self._book:
            self._leaving = True
            self._tell()
        return [self._reaper]

    def close(self, seconds: float) -> bool:
        """Finish what is queued, then stop. False if a thread hangs in the medium: it is left behind."""
        drained = self.drain(seconds)
        with self._book:
            self._closed = True
        k.shut(self._shared, not drained)
        until = time.monotonic() + (max(seconds, 0.1) if drained else 0.1)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        ended = not any(thread.is_alive() for thread in self._threads)
        if ended:
            self._reaper.join(max(0.1, until - time.monotonic()))
        return drained and ended


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _ring_count(settings: EngineSettings) -> int:
    """One per core, but no more than two, and none without work for two units."""
    if settings.kind != "ring":
        return 0
    return max(1, min(k.MOST_RINGS, len(os.sched_getaffinity(0)), settings.workers // 2))


def _pages(payload_bytes: int) -> Arena:
    """A worker's header pages, and behind them its buffer for blocks that O_DIRECT cannot take."""
    return Arena(k.UNIT_BLOCKS * PAGE + payload_bytes)


_HOOK_TYPE = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64
)


def _hook(io: FileIO | None) -> Any:
    """A C function that moves bytes through a FileIO of another class; None for FileIO itself."""
    if io is None or is_plain(io):
        return None

    def call(which: int, fd: int, vectors: int, count: int, offset: int) -> int:
        try:
            if which == k.HOOK_SYNC:
                io.sync(fd)
                return 0
            words = (ctypes.c_int64 * (2 * count)).from_address(vectors)
            views = [
                memoryview((ctypes.c_char * words[2 * n + 1]).from_address(words[2 * n])).cast("B")
                for n in range(count)
            ]
            move = io.write if which == k.HOOK_WRITE else io.read
            return move(fd, views, offset)
        except OSError as error:
            return -(error.errno or k.EIO)
        except BaseException:
            log.exception("kvstrata: a file layer raised")
            return -k.EIO

    return _HOOK_TYPE(call)
