"""Blocks on their way that need a file of an extent: it stays open for them, and they wait until it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from kvstrata.tiers.shared.descriptors import Descriptors
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.engine import OnDone, Rows
from kvstrata.transfer.handle import Abandonable, Positions
from kvstrata.transfer.mover import Mover


class Hold:
    """Files in use by so many rows: given back with the last row that ends."""

    def __init__(self, files: Descriptors, extents: Sequence[ExtentId], rows: int, on_done: OnDone) -> None:
        self._files = files
        self._extents = extents
        self._left = rows
        self._on_done = on_done
        self._lock = threading.Lock()

    def done(self, rows: Rows) -> None:
        """What the engine tells."""
        try:
            self._on_done(rows)
        finally:
            self.ended(len(rows))

    def ended(self, rows: int) -> None:
        """So many rows need the files no more."""
        with self._lock:
            self._left -= rows
            last = self._left == 0 and rows > 0
        if last:
            self._files.release(self._extents)


class HeldBatch:
    """A batch of an engine whose files are held."""

    def __init__(self, batch: Abandonable, hold: Hold) -> None:
        self._batch = batch
        self._hold = hold

    def cancel(self) -> Positions:
        positions = self._batch.cancel()
        self._hold.ended(len(positions))
        return positions

    def abandon(self, positions: Positions) -> Positions:
        return self._batch.abandon(positions)

    def help(self) -> None:
        self._batch.help()

    def wait(self, until: float) -> None:
        self._batch.wait(until)


class Waiting:
    """Rows of one extent whose file is to be opened first, by `run` on a thread that may hang.

    open_file: a descriptor that is acquired, and whether it is O_DIRECT; raises OSError, with the number
    `k.GONE` where the extent is no more. refuse: hears of rows that no engine was asked to move.
    """

    def __init__(
        self,
        open_file: Callable[[], tuple[int, bool]],
        extent: ExtentId,
        rows: Rows,
        engine: Mover,
        files: Descriptors,
        *,
        loads: bool,
        finish: OnDone,
        refuse: OnDone,
    ) -> None:
        self._open_file = open_file
        self._extent = extent
        self._rows: Rows | None = rows
        self._engine = engine
        self._files = files
        self._loads = loads
        self._finish = finish
        self._refuse = refuse
        self._lock = threading.RLock()  # a full engine refuses within `submit`, and may cancel
        self._batch: HeldBatch | None = None

    def run(self) -> None:
        if self._rows is None:
            return
        try:
            fd, direct = self._open_file()
        except OSError as error:
            self._fail(error.errno or k.EIO)
            return
        with self._lock:
            rows, self._rows = self._rows, None
            if rows is not None:
                set_file(rows, fd, direct=direct)
                hold = Hold(self._files, [self._extent], len(rows), self._finish)
                batch = self._engine.submit(rows, loads=self._loads, on_done=hold.done)
                self._batch = HeldBatch(batch, hold)
                return
        self._files.release([self._extent])  # the deadline came first

    def _fail(self, number: int) -> None:
        with self._lock:
            rows, self._rows = self._rows, None
        if rows is not None:
            rows[:, k.RESULT] = k.GONE if number == k.GONE else -number
            self._refuse(rows)

    def cancel(self) -> Positions:
        with self._lock:
            batch, rows = self._batch, self._rows
            self._rows = None
        if rows is not None:
            return rows[:, k.POSITION].copy()
        return np.zeros(0, dtype=np.int64) if batch is None else batch.cancel()

    def abandon(self, positions: Positions) -> Positions:
        batch = self._batch
        return np.zeros(0, dtype=np.int64) if batch is None else batch.abandon(positions)

    def help(self) -> None:
        if self._batch is not None:
            self._batch.help()

    def wait(self, until: float) -> None:
        """Who waits for the file waits for more than the engine: see `Transfer.wait`."""
        if self._batch is not None:
            self._batch.wait(until)


def set_file(rows: Rows, fd: int, *, direct: bool) -> None:
    """These rows move by this descriptor. Before, BOUNCE marks what O_DIRECT could not take as it is."""
    rows[:, k.FD] = fd
    if direct:
        rows[:, k.FLAGS] |= k.DIRECT
    else:
        rows[:, k.FLAGS] &= ~k.BOUNCE
