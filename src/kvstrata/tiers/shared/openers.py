"""Openers: threads for calls that may hang and that no caller may wait for: opening and closing files."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]

log = logging.getLogger(__name__)


class Openers:
    """Jobs are begun in their order, on any of the threads. They must not raise.

    What is queued is bounded by those who queue it: a job holds blocks of a load, or closes a file.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._busy = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-open-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> bool:
        """False after close(): nobody will do it."""
        with self._changed:
            if not self._closing:
                self._jobs.append(job)
                self._changed.notify()
            return not self._closing

    @property
    def queued(self) -> int:
        return len(self._jobs)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy += 1
            try:
                job()
            except Exception:
                log.exception("kvstrata: opening a file raised")
            del job  # it holds the caller's buffers
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is queued or running; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def close(self, seconds: float) -> bool:
        """Finish what is queued, then stop. False if a thread hangs: it is left behind."""
        until = time.monotonic() + seconds
        drained = self.drain(seconds)
        with self._changed:
            self._closing = True
            if not drained:
                self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.1, until - time.monotonic()) if drained else 0.0)
        return drained and not any(thread.is_alive() for thread in self._threads)
