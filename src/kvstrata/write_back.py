"""WriteBack: carries saved blocks from the memory tier to the tier below, off the caller's thread.

Each block is pinned in memory until its copy is written, so nothing in the queue can vanish. The queue
is bounded by an `AdmissionGate`; when that is full the block stays in memory only, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from kvstrata.admission import AdmissionGate
from kvstrata.table import Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import NEVER_NS, Tier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Mask
from kvstrata.types import BlockKey, Outcome

Stored = Callable[[Tier, Placements, Rows, Mask], Mask]
"""Commit or abort rows of reserved blocks; says which are committed."""


class WriteBack:
    """upper: where blocks are now. lower: where they go. stored: the store's way to end a write."""

    def __init__(
        self,
        upper: MemoryTier,
        lower: Tier,
        gate: AdmissionGate,
        telemetry: Telemetry,
        stored: Stored,
    ) -> None:
        self._upper = upper
        self._lower = lower
        self._gate = gate
        self._telemetry = telemetry
        self._stored = stored

    def push(self, keys: Sequence[BlockKey], request: int) -> None:
        """Queue a request's chain, root first: what the lower tier lacks is copied, the rest touched."""
        if not self._lower.writable:
            self._count(Outcome.UNAVAILABLE, len(keys))
            return
        pinned = self._upper.table.pin_all(keys)
        _, entered = self._gate.enter(pinned.lengths.tolist())
        self._upper.table.unpin(pinned.take(np.arange(entered, len(pinned))))
        self._count(Outcome.REJECTED, len(pinned) - entered)
        pinned = pinned.take(np.arange(entered))
        held = np.zeros(len(keys), dtype=np.bool_)
        held[pinned.positions] = True
        recorded = self._lower.table.record(
            keys, held.tolist(), request=request, ttl_seconds=self._lower.ttl_seconds
        )
        self._telemetry.count("evictions_total", self._lower.name, by=recorded.evicted)
        self._count(Outcome.PRESENT, len(recorded.hits))
        self._count(Outcome.REJECTED, len(recorded.refused))
        going = pinned.at(recorded.placed.positions)
        idle = pinned.take(np.delete(np.arange(len(pinned)), going))
        self._leave(idle)
        if not len(going):
            return
        sources = pinned.take(going)
        self._lower.start_save(
            recorded.placed,
            self._upper.buffers(sources),
            NEVER_NS,
            partial(self._done, sources, recorded.placed),
            sources.checksums,
        )

    def _done(self, sources: Placements, places: Placements, rows: Rows) -> None:
        at = places.at(rows[:, k.POSITION])
        try:
            committed = self._stored(self._lower, places.take(at), rows, np.ones(len(rows), np.bool_))
            self._count(Outcome.SAVED, int(committed.sum()))
            self._count(Outcome.IO_ERROR, int((~committed).sum()))
        finally:
            self._leave(sources.take(at))

    def _leave(self, sources: Placements) -> None:
        self._upper.table.unpin(sources)
        self._gate.leave(len(sources), int(sources.lengths.sum()))

    def _count(self, outcome: Outcome, by: int) -> None:
        self._telemetry.count("blocks_total", "write_back", self._lower.name, outcome.value, by=by)
