"""ObjectMover: blocks between the callers' buffers, the extents that are being packed, and an object store.

An extent is packed in memory (`Staging`) and goes to the store as one object. A load asks for the ranges of
an object that its blocks lie in, neighbours by one request, and verifies every block while it is copied.
Where a block lies is told by whoever calls; nothing here decides what is kept.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.object_client import ObjectClient
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, address_of
from kvstrata.transfer.engine import OnDone, Rows
from kvstrata.transfer.job_pool import JobPool, JobPoolSettings, Jobs, Unit
from kvstrata.transfer.packed_slots import (
    judge_slots,
    merged_ranges,
    pack_slots,
    request_bytes,
    warm_kernels,
)

LEAST_REQUEST_BYTES = 1024 * 1024
"""Shorter requests do not make a load faster, there are just more of them."""
LASTING = {errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.ENOSPC}
"""What a store answers again however often it is asked."""
FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 0.5, 5.0
"""Between two attempts to upload."""
COPY_BYTES = 8 * 1024 * 1024
"""So many bytes of a save are packed by one thread at a time."""


class Source(Protocol):
    """Where a block lies: an extent, published or not."""

    id: ExtentId
    stride: int


class Staging:
    """At most `buffers` extents of `extent_bytes` in memory, made on first use and kept.

    A buffer that was given back is soon another extent's. Who reads without owning the extent must look
    after reading whether it is still the same (`find`): what was verified is right in any case.
    """

    def __init__(self, extent_bytes: int, buffers: int) -> None:
        self.extent_bytes = extent_bytes
        self._room = buffers
        self._lock = threading.Lock()
        self._free: list[Arena] = []
        self._taken: dict[ExtentId, Arena] = {}

    def take(self, extent: ExtentId) -> bool:
        """A buffer for this extent; False if none is free. Memory only, and no waiting."""
        with self._lock:
            if extent in self._taken:
                return True
            if not self._free:
                if not self._room:
                    return False
                self._room -= 1
                self._free.append(Arena(self.extent_bytes))
            self._taken[extent] = self._free.pop()
            return True

    def find(self, extent: ExtentId) -> memoryview | None:
        """The extent's buffer while it has one."""
        with self._lock:
            arena = self._taken.get(extent)
            return None if arena is None else arena.view

    def give_back(self, extent: ExtentId) -> None:
        """Nobody packs or uploads this extent any more; nothing happens if it has no buffer."""
        with self._lock:
            arena = self._taken.pop(extent, None)
            if arena is not None:
                self._free.append(arena)

    @property
    def held_bytes(self) -> int:
        """Of extents that are being packed or uploaded."""
        return len(self._taken) * self.extent_bytes


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes of an extent from `start` on. staged: in a buffer that may be another extent's soon."""

    data: memoryview
    start: int
    staged: bool


class ObjectMover:
    """name: of its threads. space: the namespace's digest.

    part_bytes: a request for several blocks is no longer. merge_gap_bytes: what may lie between two blocks
    of one request. on_request: hears of each request's bytes and how many of them were asked for; on_retry
    of each upload that is tried again.
    """

    def __init__(
        self,
        name: str,
        client: ObjectClient,
        staging: Staging,
        *,
        space: bytes,
        settings: JobPoolSettings,
        part_bytes: int,
        merge_gap_bytes: int,
        attempts: int = 1,
        on_request: Callable[[int, int], None] = lambda fetched, asked: None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        self.pool = JobPool(name, settings)
        self._client = client
        self._staging = staging
        self._space = np.frombuffer(space, dtype=np.int64)
        self._part_bytes = part_bytes
        self._merge_gap_bytes = merge_gap_bytes
        self._attempts = attempts
        self._on_request = on_request
        self._on_retry = on_retry
        self._stopping = threading.Event()
        warm_kernels()

    def save(self, rows: Rows, extents: Sequence[ExtentId], on_done: OnDone) -> Jobs:
        """Pack blocks into extents that have a buffer. rows: FD is a number in `extents`, OFFSET the slot's
        place in the extent.
        """
        for number in np.unique(rows[:, k.FD]).tolist():
            view = self._staging.find(extents[number])
            assert view is not None, "a block was reserved in an extent that has no buffer"
            rows[rows[:, k.FD] == number, k.OFFSET] += address_of(view)
        order = np.arange(len(rows))
        ends = np.cumsum(rows[:, k.LENGTH])
        units = [unit for _, unit in _runs(order, (ends - 1) // COPY_BYTES)]
        return self.pool.submit(rows, self._pack, on_done, loads=False, units=units)

    def _pack(self, rows: Rows, fetched: Any) -> None:
        pack_slots(rows, self._space)

    def load(self, rows: Rows, sources: Sequence[Source], on_done: OnDone) -> Jobs:
        """Fetch and verify blocks. rows: FD is a number in `sources`, OFFSET the slot's place there."""
        units: list[Unit] = []
        total = int((rows[:, k.LENGTH] + PAGE).sum())
        limit = request_bytes(total, self.pool.settings.threads, LEAST_REQUEST_BYTES, self._part_bytes)
        for _, mine in _runs(np.argsort(rows[:, k.FD], kind="stable"), rows[:, k.FD]):
            starts = rows[mine, k.OFFSET]
            ends = starts + PAGE + rows[mine, k.LENGTH]
            gap = self._merge_gap_bytes
            units += [mine[part] for part in merged_ranges(starts, ends, gap_bytes=gap, limit_bytes=limit)]
        return self.pool.submit(
            rows,
            partial(self._judge, sources),
            on_done,
            loads=True,
            units=units,
            fetch=partial(self._fetch, sources),
        )

    def _fetch(self, sources: Sequence[Source], rows: Rows) -> Fetched | None:
        source = sources[int(rows[0, k.FD])]
        view = self._staging.find(source.id)
        return self._ask(source, rows) if view is None else Fetched(view, 0, True)

    def _ask(self, source: Source, rows: Rows) -> Fetched | None:
        start = int(rows[:, k.OFFSET].min())
        size = int((rows[:, k.OFFSET] + PAGE + rows[:, k.LENGTH]).max()) - start
        data = self._client.get_range(source.id.name, start, size)
        if data is None:
            return None
        self._on_request(len(data), int(rows[:, k.LENGTH].sum()) + PAGE * len(rows))
        return Fetched(data, start, False)

    def _judge(self, sources: Sequence[Source], rows: Rows, fetched: Fetched | None) -> None:
        offsets = rows[:, k.OFFSET].copy()
        self._judge_here(rows, offsets, fetched)
        if fetched is None or not fetched.staged or not rows[:, k.RESULT].any():
            return
        source = sources[int(rows[0, k.FD])]
        if self._staging.find(source.id) is None:  # uploaded meanwhile: the buffer is another extent's
            rows[:, k.OFFSET] = offsets
            self._judge_here(rows, offsets, self._ask(source, rows))

    @staticmethod
    def _judge_here(rows: Rows, offsets: Any, fetched: Fetched | None) -> None:
        if fetched is None:
            rows[:, k.RESULT] = k.GONE
            return
        base = address_of(fetched.data)
        rows[:, k.OFFSET] = base + offsets - fetched.start
        judge_slots(rows, base + len(fetched.data))
        rows[:, k.OFFSET] = offsets

    def upload(self, extent: ExtentId, footer: bytes, start: int) -> int:
        """Send an extent with its footer, which begins at `start`, to the store; returns its bytes.

        Blocks until it is there for everybody, and tries `attempts` times. Raises OSError: then nothing
        is there, as far as the store answers.
        """
        view = self._staging.find(extent)
        assert view is not None, "an extent without a buffer cannot be uploaded"
        size = start + len(footer)
        view[start:size] = footer
        pause = FIRST_PAUSE_SECONDS
        for left in range(self._attempts - 1, -1, -1):
            try:
                self._client.upload(extent.name, view[:size])
                break
            except OSError as error:
                if not left or error.errno in LASTING or self._stopping.wait(pause):
                    self._remove(extent)
                    raise
                self._on_retry()
                pause = min(2 * pause, MOST_PAUSE_SECONDS)
        return size

    def _remove(self, extent: ExtentId) -> None:
        """The answer to a good upload may have been lost."""
        with contextlib.suppress(OSError):
            self._client.delete([extent.name])

    def stop(self, seconds: float) -> bool:
        """No upload is tried again, and nothing more is moved. False if a thread hangs in the store."""
        self._stopping.set()
        return self.pool.close(seconds)


def _runs(order: Unit, values: Any) -> list[tuple[int, Unit]]:
    """Runs of equal values among rows in that order."""
    if not len(order):
        return []
    sorted_values = values[order]
    cuts = np.flatnonzero(np.diff(sorted_values)) + 1
    return [(int(values[run[0]]), run) for run in np.split(order, cuts)]
