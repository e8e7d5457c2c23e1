"""Threads that move bytes: loads before stores, and never so many stores that a load has to wait."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from kvstrata.transfer.plan import Direction

Job = Callable[[], None]

log = logging.getLogger(__name__)


class TransferExecutor:
    """threads: all of them. store_threads: at most so many run stores at a time.

    The queues are bounded by whoever submits: loads by the engine's own requests, stores by the
    admission gate. A job must not raise; if it does, that is logged as a bug and the thread goes on.
    """

    def __init__(self, threads: int, store_threads: int, name: str = "kvstrata") -> None:
        self._store_threads = store_threads
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._loads: deque[Job] = deque()
        self._stores: deque[Job] = deque()
        self._storing = 0
        self._busy = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-io-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, direction: Direction, jobs: list[Job]) -> None:
        """Queue jobs in order. After close() they are dropped."""
        with self._work:
            if self._closing:
                return
            (self._loads if direction is Direction.LOAD else self._stores).extend(jobs)
            self._work.notify(len(jobs))

    def _next(self) -> tuple[Job, bool] | None:
        if self._loads:
            return self._loads.popleft(), False
        if self._stores and self._storing < self._store_threads:
            self._storing += 1
            return self._stores.popleft(), True
        return None

    def _run(self) -> None:
        while True:
            with self._work:
                while (found := self._next()) is None:
                    if self._closing and not self._stores:
                        # A store that came in last may have kept others waiting for their turn.
                        self._work.notify_all()
                        return
                    self._work.wait()
                self._busy += 1
            job, storing = found
            try:
                job()
            except Exception:
                log.exception("kvstrata: a transfer job raised")
            finally:
                with self._work:
                    self._busy -= 1
                    if storing:
                        self._storing -= 1
                        self._work.notify()
                    if not (self._busy or self._loads or self._stores):
                        self._idle.notify_all()
            del job, found  # they hold the caller's buffers

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is queued or running; False if that took longer than `seconds`."""
        until = time.monotonic() + seconds
        with self._work:
            while self._loads or self._stores or self._busy:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._idle.wait(left)
            return True

    def close(self, seconds: float) -> bool:
        """Finish what is queued, then stop the threads. False if one hangs: it is left behind."""
        drained = self.drain(seconds)
        with self._work:
            self._closing = True
            if not drained:
                self._loads.clear()
                self._stores.clear()
            self._work.notify_all()
        until = time.monotonic() + (max(seconds, 0.1) if drained else 0.1)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return drained and not any(thread.is_alive() for thread in self._threads)

    @property
    def queued(self) -> tuple[int, int]:
        """Loads and stores that wait."""
        with self._work:
            return len(self._loads), len(self._stores)
