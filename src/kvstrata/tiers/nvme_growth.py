"""Saves that wait until their segment has a file."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.engine import Engine, OnDone, Rows
from kvstrata.transfer.handle import Cancellable, Positions


class Growth:
    """grow: gives the rows their file, or raises OSError. finish, refuse: for rows that the engine moved,
    and for those that got no file.
    """

    def __init__(
        self, grow: Callable[[Rows], None], rows: Rows, engine: Engine, finish: OnDone, refuse: OnDone
    ) -> None:
        self._grow = grow
        self._rows: Rows | None = rows
        self._engine = engine
        self._finish = finish
        self._refuse = refuse
        self._lock = threading.RLock()  # a full engine refuses within `submit`, and may cancel
        self._batch: Cancellable | None = None

    def run(self) -> None:
        """The job: on a thread that may hang."""
        rows = self._rows
        if rows is None:
            return
        failed = 0
        try:
            self._grow(rows)
        except OSError as error:
            failed = error.errno or k.EIO
        with self._lock:
            rows, self._rows = self._rows, None
            if rows is None:
                return  # the deadline came first
            if not failed:
                self._batch = self._engine.submit(rows, loads=False, on_done=self._finish)
                return
        rows[:, k.RESULT] = -failed
        self._refuse(rows)

    def cancel(self) -> Positions:
        with self._lock:
            batch, rows = self._batch, self._rows
            self._rows = None
        if rows is not None:
            return rows[:, k.POSITION].copy()
        return np.zeros(0, dtype=np.int64) if batch is None else batch.cancel()

    def help(self) -> None:
        if self._batch is not None:
            self._batch.help()

    def wait(self, until: float) -> None:
        """Whoever needs the file waits for more than the engine: see `Transfer.wait`."""
        if self._batch is not None:
            self._batch.wait(until)
