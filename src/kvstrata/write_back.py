"""WriteBack: carries saved blocks from the memory tier to the tier below, off the caller's thread.

Each block is pinned in memory until its copy is written, so nothing in the queue can vanish. The queue
is bounded by an `AdmissionGate`; when that is full the block stays in memory only, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstrata.admission import AdmissionGate
from kvstrata.table import Placement
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import LocalTier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.transfer.executor import TransferExecutor
from kvstrata.transfer.plan import Direction
from kvstrata.types import BlockKey, Outcome

WriteOne = Callable[[LocalTier, Placement, memoryview, int], Outcome]
"""Write one reserved block into a tier and commit or abort it."""


class WriteBack:
    """upper: where blocks are now. lower: where they go. write_one: the store's way to write a block."""

    def __init__(
        self,
        upper: MemoryTier,
        lower: LocalTier,
        executor: TransferExecutor,
        gate: AdmissionGate,
        telemetry: Telemetry,
        write_one: WriteOne,
    ) -> None:
        self._upper = upper
        self._lower = lower
        self._executor = executor
        self._gate = gate
        self._telemetry = telemetry
        self._write_one = write_one

    def push(self, keys: Sequence[BlockKey], request: int) -> None:
        """Queue a request's chain, root first: what the lower tier lacks is copied, the rest touched."""
        if not self._lower.writable:
            self._count(Outcome.UNAVAILABLE, len(keys))
            return
        pinned = self._upper.table.pin(keys)
        _, entered = self._gate.enter([placement.length for placement in pinned])
        self._upper.table.unpin(pinned[entered:])
        self._count(Outcome.REJECTED, len(pinned) - entered)
        by_key = {placement.key: placement for placement in pinned[:entered]}
        recorded = self._lower.table.record(
            keys,
            [key in by_key for key in keys],
            request=request,
            ttl_seconds=self._lower.ttl_seconds,
        )
        self._telemetry.count("evictions_total", self._lower.name, by=recorded.evicted)
        self._count(Outcome.PRESENT, len(recorded.hits))
        self._count(Outcome.REJECTED, len(recorded.refused))
        jobs = [self._job(by_key.pop(place.key), place) for place in recorded.reserved]
        idle = list(by_key.values())
        self._upper.table.unpin(idle)
        self._gate.leave(len(idle), sum(placement.length for placement in idle))
        self._executor.submit(Direction.STORE, jobs)

    def _job(self, source: Placement, place: Placement) -> Callable[[], None]:
        def run() -> None:
            try:
                with self._upper.view(source) as view:
                    outcome = self._write_one(self._lower, place, view, source.checksum)
                self._count(outcome, 1)
            finally:
                self._upper.table.unpin([source])
                self._gate.leave(1, source.length)

        return run

    def _count(self, outcome: Outcome, by: int) -> None:
        self._telemetry.count("blocks_total", "write_back", self._lower.name, outcome.value, by=by)
