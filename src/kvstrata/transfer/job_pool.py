"""JobPool: bounded threads for calls of client libraries that block, with the verbs of the I/O engine.

Tiers whose bytes travel through somebody's client (an object store, a pool) submit the engine's rows and
what to call for them. It moves no bytes itself: the work does, and fills the rows. It knows nothing of
tiers, and nothing hangs here but a thread that is inside such a call.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.at_exit import before_exit
from kvstrata.transfer.engine import EngineCounts, OnDone, Positions, Rows

log = logging.getLogger(__name__)

Unit = NDArray[np.integer[Any]]
"""Numbers of the rows that one call of the work moves together."""
Work = Callable[[Rows, Any], None]
"""Moves the rows it gets and fills RESULT (0, a verdict of `slot_header`, GONE, -errno) and CHECKSUM.

The second argument is what `fetch` brought, or None.
"""
Fetch = Callable[[Rows], Any]
"""Asks the client library, and touches none of the rows' buffers: a batch can be cancelled meanwhile."""


@dataclass(frozen=True, slots=True)
class JobPoolSettings:
    """threads: calls at a time. store_threads: how many of them may store. capacity: rows that may be
    queued or moving.
    """

    threads: int = 8
    store_threads: int = 6
    capacity: int = 65_536


@dataclass(slots=True, eq=False)
class Jobs:
    """Rows submitted together. cancel() takes back the units that no thread has begun, or only fetches."""

    pool: JobPool
    rows: Rows
    loads: bool
    fetch: Fetch | None
    work: Work
    on_done: OnDone
    left: int
    turn: threading.RLock = field(default_factory=threading.RLock)
    waiting: dict[int, Unit] = field(default_factory=dict)
    fetching: dict[int, Rows] = field(default_factory=dict)

    def cancel(self) -> Positions:
        """Positions whose buffers nobody touched and nobody will: on_done is not called for them."""
        return self.pool.cancel(self)

    def abandon(self, positions: Positions) -> Positions:
        """Which of these are being fetched, and will never be copied to their COPY_TO any more.

        on_done hears of them all the same, when the medium answers.
        """
        return self.pool.abandon(self, positions)

    def help(self) -> None:
        """Nothing to do: the thread that did a unit hands it out."""

    def wait(self, until: float) -> None:
        """Until on_done has heard of all of it, or to a moment of time.monotonic."""
        self.pool.wait_for(self, until)


class JobPool:
    """name: of its threads, which start with the pool.

    Loads are begun before stores. A row whose deadline has passed when its unit is begun is LATE.
    """

    def __init__(self, name: str, settings: JobPoolSettings) -> None:
        self.settings = settings
        self._changed = threading.Condition()
        self._loads: OrderedDict[int, Jobs] = OrderedDict()
        self._stores: OrderedDict[int, Jobs] = OrderedDict()
        self._number = 0
        self._queued = {True: 0, False: 0}
        self._units = {True: 0, False: 0}
        self._rows = 0
        self._merged = 0
        self._running: dict[int, tuple[bool, int]] = {}
        self._storing = 0
        self._forgiven_ns = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-job-{n}", daemon=True)
            for n in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()
        before_exit(self)

    # Submitting

    def submit(
        self,
        rows: Rows,
        work: Work,
        on_done: OnDone,
        *,
        loads: bool,
        units: Sequence[Unit] | None = None,
        fetch: Fetch | None = None,
    ) -> Jobs:
        """Queue a batch. rows: filled up to DEADLINE_NS and POSITION; they are copied.

        units: numbers of the rows that go to one call of `fetch` and `work` each, every row in one of
        them; without, all rows go to one call. The rest of the row is filled here: BEGAN_NS and ENDED_NS
        where the work left them 0, RESULT with -errno for an OSError that one of the two raises. on_done
        gets the rows of a unit when it is over, on any thread, one call per batch at a time. A batch that
        finds no room is LATE at once. After close() nothing is queued and nobody is called.
        """
        count = len(rows)
        jobs = Jobs(self, rows.copy(), loads, fetch, work, on_done, count)
        jobs.rows[:, [k.BEGAN_NS, k.ENDED_NS]] = 0
        if not count:
            return jobs
        with self._changed:
            full = self._rows + count > self.settings.capacity and not self._closing
            if not full:
                queue = self._loads if loads else self._stores
                for unit in units if units is not None else [np.arange(count)]:
                    self._number += 1
                    jobs.waiting[self._number] = unit
                    if not self._closing:
                        queue[self._number] = jobs
                if not self._closing:
                    self._rows += count
                    self._queued[loads] += count
                self._changed.notify_all()
        if full:
            jobs.left = 0
            self._hand_out(jobs, _late(jobs.rows))
        return jobs

    def cancel(self, jobs: Jobs) -> Positions:
        with self._changed:
            queue = self._loads if jobs.loads else self._stores
            queued = [number for number in jobs.waiting if queue.pop(number, None) is not None]
            taken = sum(len(jobs.waiting[number]) for number in queued)
            self._queued[jobs.loads] -= taken
            taken += sum(len(rows) for rows in jobs.fetching.values())
            back = [jobs.rows[unit, k.POSITION] for unit in jobs.waiting.values()]
            back += [rows[:, k.POSITION] for rows in jobs.fetching.values()]
            jobs.waiting.clear()
            jobs.fetching.clear()
            self._settle(jobs, taken)
        return np.concatenate(back) if back else np.zeros(0, dtype=np.int64)

    def abandon(self, jobs: Jobs, positions: Positions) -> Positions:
        back = [np.zeros(0, dtype=np.int64)]
        with self._changed:
            for rows in jobs.fetching.values():
                mine = np.isin(rows[:, k.POSITION], positions) & (rows[:, k.COPY_TO] != 0)
                rows[mine, k.COPY_TO] = 0
                back.append(rows[mine, k.POSITION])
        return np.concatenate(back)

    # Doing

    def _run(self) -> None:
        while (begun := self._begin()) is not None:
            number, jobs, rows, late = begun
            if len(late):
                self._finish(jobs, _late(late))
            done = len(rows) > 0 and self._do(number, jobs, rows)
            self._end_call(number)
            if done:
                self._finish(jobs, rows)
            del begun, jobs, rows, late  # they hold the caller's buffers

    def _do(self, number: int, jobs: Jobs, rows: Rows) -> bool:
        """Rows get their results, whatever the work does. False if they were taken back meanwhile."""
        began = time.monotonic_ns()
        fetched, taken_back = None, False
        try:
            if jobs.fetch is not None:
                try:
                    fetched = jobs.fetch(rows)
                finally:
                    with self._changed:
                        taken_back = jobs.fetching.pop(number, None) is None
            if not taken_back:
                jobs.work(rows, fetched)
        except OSError as error:
            rows[:, k.RESULT] = -(error.errno or errno.EIO)
        except Exception:
            log.exception("kvstrata: a job raised")
            rows[:, k.RESULT] = -errno.EIO
        if taken_back:
            return False
        for column, moment in ((k.BEGAN_NS, began), (k.ENDED_NS, time.monotonic_ns())):
            rows[rows[:, column] == 0, column] = moment
        return True

    def _begin(self) -> tuple[int, Jobs, Rows, Rows] | None:
        """Wait for a unit: rows to do, and those that are late. None when the pool has closed."""
        with self._changed:
            while True:
                if self._loads:
                    number, jobs = self._loads.popitem(last=False)
                elif self._stores and self._storing < self.settings.store_threads:
                    number, jobs = self._stores.popitem(last=False)
                    self._storing += 1
                elif self._closing:
                    return None
                else:
                    self._changed.wait()
                    continue
                unit = jobs.waiting.pop(number)
                self._queued[jobs.loads] -= len(unit)
                self._merged += len(unit) - 1
                now = time.monotonic_ns()
                self._running[number] = jobs.loads, now
                rows = jobs.rows[unit]
                late = rows[:, k.DEADLINE_NS] < now
                mine = rows[~late]
                if jobs.fetch is not None and len(mine):
                    jobs.fetching[number] = mine
                return number, jobs, mine, rows[late]

    def _end_call(self, number: int) -> None:
        """The work is over: what it took no longer counts for `oldest_seconds`."""
        with self._changed:
            ended = self._running.pop(number, None)
            if ended is None:
                return
            loads, _ = ended
            self._units[loads] += 1
            if not loads:
                self._storing -= 1
                self._changed.notify_all()

    def _hand_out(self, jobs: Jobs, rows: Rows) -> None:
        with jobs.turn:
            try:
                jobs.on_done(rows)
            except Exception:
                log.exception("kvstrata: taking in what a job did raised")

    def _finish(self, jobs: Jobs, rows: Rows) -> None:
        self._hand_out(jobs, rows)
        with self._changed:
            self._settle(jobs, len(rows))

    def _settle(self, jobs: Jobs, count: int) -> None:
        jobs.left -= count
        self._rows -= count
        if count and (not jobs.left or not self._rows):
            self._changed.notify_all()

    def wait_for(self, jobs: Jobs, until: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not jobs.left, max(0.0, until - time.monotonic()))

    # Looking after it

    @property
    def queued(self) -> tuple[int, int]:
        """Loads and stores that no thread has begun."""
        return self._queued[True], self._queued[False]

    @property
    def counts(self) -> EngineCounts:
        """Units done so far, and how many may be at it."""
        settings = self.settings
        return EngineCounts(
            loads=self._units[True],
            stores=self._units[False],
            merged=self._merged,
            load_depth=settings.threads,
            store_depth=min(settings.threads, settings.store_threads),
        )

    def oldest_seconds(self, *, loads: bool) -> float:
        """How long the oldest running unit has been running, 0.0 if none is."""
        with self._changed:
            began = [at for kind, at in self._running.values() if kind == loads and at > self._forgiven_ns]
        return max(0, time.monotonic_ns() - min(began)) / 1e9 if began else 0.0

    def forgive(self) -> None:
        """What runs now does not count for `oldest_seconds` any more."""
        self._forgiven_ns = time.monotonic_ns()

    def drain(self, seconds: float) -> bool:
        """Wait until everything submitted was handed out; False if that took longer than `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._rows, max(0.0, seconds))

    def leave(self) -> list[threading.Thread]:
        """The interpreter ends: what nobody has begun is dropped, and the threads end after their call."""
        with self._changed:
            self._drop()
        return self._threads

    def _drop(self) -> None:
        self._closing = True
        self._loads.clear()
        self._stores.clear()
        self._queued = {True: 0, False: 0}
        self._changed.notify_all()

    def close(self, seconds: float) -> bool:
        """Finish what is queued, then stop. False if a thread hangs in a call: it is left behind."""
        until = time.monotonic() + seconds
        drained = self.drain(seconds)
        with self._changed:
            self._drop()
        until = max(until, time.monotonic() + 0.1) if drained else time.monotonic() + 0.1
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return drained and not any(thread.is_alive() for thread in self._threads)


def _late(rows: Rows) -> Rows:
    rows[:, k.RESULT] = k.LATE
    rows[:, [k.BEGAN_NS, k.ENDED_NS]] = time.monotonic_ns()
    return rows
