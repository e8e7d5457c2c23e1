"""Relay: copies blocks from one tier to another, with nobody who waits for them.

From memory a block is written from where it lies. From any other tier it is read and verified into a place
of a bounded arena and written from there; what finds no place waits in line, its source pinned. What may
stand in that line is bounded by those who fill it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from kvstrata.table import Column, Placements
from kvstrata.tier_stack import TierStack
from kvstrata.tiers.base import NEVER_NS, Tier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Mask
from kvstrata.transfer.staging import Staging

Done = Callable[[Column, Mask], None]
"""Hears of rows that are over: their numbers in the batch, and which of them are in the lower tier now."""


@dataclass(slots=True)
class _Copy:
    """One batch. Row n of places gets what row n of sources holds. pinned: the sources are blocks of their
    tier, not slots of blocks that left. begun: rows that have had a place.
    """

    source: Tier
    sources: Placements
    target: Tier
    places: Placements
    done: Done
    pinned: bool
    begun: int = 0


class Relay:
    """staging: what blocks pass through that do not come from memory; others may use it too."""

    def __init__(self, stack: TierStack, staging: Staging, deadline_seconds: float) -> None:
        self._stack = stack
        self._staging = staging
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()
        self._waiting: deque[_Copy] = deque()
        self._pumping = False
        self._again = False

    def copy(
        self,
        source: Tier,
        sources: Placements,
        target: Tier,
        places: Placements,
        done: Done,
        *,
        pinned: bool = True,
    ) -> None:
        """sources: held until `done` hears of them. places: reserved; committed or aborted here."""
        numbers = np.arange(len(sources))
        sources, places = replace(sources, positions=numbers), replace(places, positions=numbers)
        batch = _Copy(source, sources, target, places, done, pinned)
        self._stack.move(len(sources))
        if isinstance(source, MemoryTier):
            self._write(batch, numbers, source.buffers(sources), sources.checksums, None)
            return
        with self._lock:
            self._waiting.append(batch)
        self._pump()

    def _pump(self) -> None:
        """Begin what there are places for. One thread at a time: another makes it look once more."""
        with self._lock:
            self._again = True
            if self._pumping:
                return
            self._pumping = True
        while True:
            with self._lock:
                piece = self._next_piece()
                if piece is None and not self._again:
                    self._pumping = False
                    return
                self._again = False
            if piece is not None:
                self._read(*piece)

    def _next_piece(self) -> tuple[_Copy, Column, Column] | None:
        if not self._waiting:
            return None
        batch = self._waiting[0]
        places = self._staging.take(len(batch.sources) - batch.begun)
        if not len(places):
            return None
        rows = np.arange(batch.begun, batch.begun + len(places))
        batch.begun += len(places)
        if batch.begun == len(batch.sources):
            self._waiting.popleft()
        return batch, rows, places

    def _read(self, batch: _Copy, rows: Column, staged: Column) -> None:
        sources = batch.sources.take(rows)
        deadline_ns = int((time.monotonic() + self._deadline_seconds) * 1e9)
        batch.source.start_load(
            sources,
            self._staging.buffers(staged, sources.lengths),
            deadline_ns,
            partial(self._have_read, batch, int(rows[0]), staged),
        )

    def _have_read(self, batch: _Copy, first: int, staged: Column, ended: Rows) -> None:
        ended = ended[np.argsort(ended[:, k.POSITION])]
        rows, results = ended[:, k.POSITION], ended[:, k.RESULT]
        mine = staged[rows - first]
        good = results == 0
        if good.any():
            sources = batch.sources.take(rows[good])
            buffers = self._staging.buffers(mine[good], sources.lengths)
            self._write(batch, rows[good], buffers, sources.checksums, mine[good])
        if good.all():
            return
        bad = rows[~good]
        for row, result in zip(bad.tolist(), results[~good].tolist(), strict=True):
            if batch.pinned and result != k.LATE:
                self._stack.drop_bad(batch.source, batch.sources[row], result)
        batch.target.table.abort_all(batch.places.take(bad))
        self._end(batch, bad, np.zeros(len(bad), np.bool_), mine[~good])

    def _write(
        self, batch: _Copy, rows: Column, buffers: Buffers, checksums: Column, staged: Column | None
    ) -> None:
        batch.target.start_save(
            batch.places.take(rows),
            buffers,
            NEVER_NS,
            partial(self._written, batch, rows, staged),
            checksums,
        )

    def _written(self, batch: _Copy, begun: Column, staged: Column | None, ended: Rows) -> None:
        rows = ended[:, k.POSITION]
        mine = None if staged is None else staged[np.searchsorted(begun, rows)]
        committed = np.zeros(len(rows), np.bool_)
        try:
            whole = np.ones(len(rows), np.bool_)
            committed = self._stack.stored(batch.target, batch.places.take(rows), ended, whole)
        finally:
            self._end(batch, rows, committed, mine)

    def _end(self, batch: _Copy, rows: Column, committed: Mask, staged: Column | None) -> None:
        if staged is not None:
            self._staging.give(staged)
        try:
            batch.done(rows, committed)
        finally:
            self._stack.move(-len(rows))
        if staged is not None:
            self._pump()
