"""One thread per tier for what may hang and moves no blocks: probing, opening, making files."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]

log = logging.getLogger(__name__)


class Upkeep:
    """Jobs run one after another. They must not raise; if one does, that is logged as a bug."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._busy = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-upkeep", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. After close() it is dropped."""
        with self._changed:
            if not self._closing:
                self._jobs.append(job)
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
            try:
                job()
            except Exception:
                log.exception("kvstrata: an upkeep job raised")
            del job  # it holds the caller's buffers

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is queued or running; False if that took longer than `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def close(self, seconds: float) -> bool:
        """Finish what is queued, then stop the thread. False if it hangs: it is left behind.

        From a job of its own: the thread ends after it.
        """
        if threading.current_thread() is self._thread:
            self._stop(drop=True)
            return True
        until = time.monotonic() + seconds
        drained = self.drain(seconds)
        self._stop(drop=not drained)
        self._thread.join(max(0.1, until - time.monotonic()) if drained else 0.1)
        return drained and not self._thread.is_alive()

    def _stop(self, *, drop: bool) -> None:
        with self._changed:
            self._closing = True
            if drop:
                self._jobs.clear()
            self._changed.notify_all()
