"""TierStack: the tiers of one store, fastest first, opened, probed and brought back; and what ends a write.

What a tier's failure means for a block is decided by whoever moves the block (`loading`, `saving`,
`write_back`); that the tier gets asked again is decided here.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvstrata.config import MemoryTierConfig, TierConfig
from kvstrata.errors import KVStrataError
from kvstrata.table import Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tiers import MemoryTier, Tier
from kvstrata.tiers.base import OpenReport
from kvstrata.tiers.breaker import Breaker
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Mask
from kvstrata.types import BlockKey, Outcome

PROMOTING_SHARE = 2
"""Half of memory, at most, is reserved for blocks that are being promoted."""

log = logging.getLogger(__name__)


class TierStack:
    """tiers and their configurations, in the same order.

    memory: the memory tier if it comes first. promote: blocks that a lower tier served go there too.
    through: a save ends when the block is in the second tier as well.
    """

    def __init__(self, tiers: Sequence[Tier], configs: Sequence[TierConfig], telemetry: Telemetry) -> None:
        self.tiers = list(tiers)
        self.telemetry = telemetry
        self.reports: dict[str, OpenReport] = {}
        self.closed = False
        self._reopen_lock = threading.Lock()
        self.memory: MemoryTier | None = None
        self.promote = self.through = False
        first, config = tiers[0], configs[0]
        if isinstance(first, MemoryTier) and isinstance(config, MemoryTierConfig):
            self.memory = first
            self.promote = config.promote and len(tiers) > 1
            self.through = config.write_mode == "through" and len(tiers) > 1
        self._promoting = 0
        self._promotion_lock = threading.Lock()

    def __iter__(self) -> Iterator[Tier]:
        return iter(self.tiers)

    def __getitem__(self, number: int) -> Tier:
        return self.tiers[number]

    def __len__(self) -> int:
        return len(self.tiers)

    # In service

    def open_tier(self, tier: Tier) -> None:
        """Open it, or leave it out of service. Raises TierError."""
        try:
            report = tier.open()
        except OSError as error:
            for breaker in (tier.reads, tier.writes):
                breaker.trip(f"cannot be opened: {error}")
            name = errno.errorcode.get(error.errno or 0, "unknown")
            self.telemetry.count("io_errors_total", tier.name, "open", name)
            log.warning("kvstrata: tier %s is out of service: %s", tier.name, error)
            return
        self.reports[tier.name] = report
        self.telemetry.event(
            f"{tier.name} opened",
            f"{report.restored} blocks in {report.slots} slots, {report.seconds:.3f} s, "
            f"{'index' if report.from_index else 'scan'}",
        )

    def probe_later(self, tier: Tier) -> None:
        """Ask a tier that is out of service whether it is back, at most once per retry time."""
        if tier.reads.wants_probe():
            tier.upkeep.submit(lambda: self._probe(tier, tier.reads, tier.probe_read))
        if tier.writes.wants_probe():
            tier.upkeep.submit(lambda: self._probe(tier, tier.writes, tier.probe_write))

    def _probe(self, tier: Tier, breaker: Breaker, ask: Callable[[], None]) -> None:
        try:
            self._reopen(tier)
            if not tier.opened:
                breaker.probed(OSError("still cannot be opened"))
                return
            ask()
        except (OSError, KVStrataError) as error:
            breaker.probed(error)
        else:
            breaker.probed(None)

    def _reopen(self, tier: Tier) -> None:
        with self._reopen_lock:
            if tier.opened or self.closed:
                return
            self.open_tier(tier)
            if self.closed:
                tier.close(clean=True)  # close() did not wait for this: nobody else would let go of it

    # All of them

    @property
    def queued(self) -> tuple[int, int]:
        """Loads and stores that nobody has begun."""
        each = [tier.queued for tier in self.tiers]
        return sum(loads for loads, _ in each), sum(stores for _, stores in each)

    def drain(self, until: float) -> bool:
        """Wait for everything that was started, to a moment of time.monotonic; False if that came first.

        Fastest first: what a tier has done goes on to a slower one, never back.
        """
        return all(tier.drain(max(0.0, until - time.monotonic())) for tier in self.tiers)

    def stop(self, until: float) -> bool:
        """Stop all threads, also behind a tier that hangs. False if one does."""
        stopped = [tier.stop(max(0.0, until - time.monotonic())) for tier in self.tiers]
        return all(stopped)

    # Promotion

    def reserve_promotion(self, keys: Sequence[BlockKey]) -> Placements:
        """Room in memory for leading blocks of a load that a lower tier serves, and that it lacks.

        All that is reserved so takes a share of memory at most: a tier that hangs while it is read must
        not empty memory for blocks that never come.
        """
        memory = self.memory
        assert memory is not None
        with self._promotion_lock:
            most = max(1, memory.table.slots // PROMOTING_SHARE)
            leading = keys[: min(max(0, most - self._promoting), memory.table.batch_blocks)]
            recorded = memory.table.record(
                leading, [True] * len(leading), request=0, ttl_seconds=memory.ttl_seconds
            )
            self._promoting += len(recorded.placed)
        self.telemetry.count("evictions_total", memory.name, by=recorded.evicted)
        return recorded.placed

    def end_promotion(self, placements: Placements, rows: Rows | None = None) -> None:
        """What was verified and copied is in memory; without rows, nothing was."""
        memory = self.memory
        assert memory is not None
        with self._promotion_lock:
            self._promoting -= len(placements)
        good = np.zeros(len(placements), np.bool_) if rows is None else rows[:, k.RESULT] == 0
        if rows is not None and good.any():
            kept = placements.take(np.flatnonzero(good))
            memory.table.commit_all(kept, rows[good, k.LENGTH], rows[good, k.CHECKSUM])
            self.telemetry.count("blocks_total", "promote", memory.name, Outcome.SAVED.value, by=len(kept))
        if not good.all():
            memory.table.abort_all(placements.take(np.flatnonzero(~good)))

    # What ends a transfer

    def stored(self, tier: Tier, placements: Placements, rows: Rows, claimed: Mask) -> Mask:
        """Commit what was written and is claimed; what failed leaves no trace but counters.

        placements and claimed: for the rows, in their order. Returns which are committed.
        """
        good: Mask = (rows[:, k.RESULT] == 0) & claimed
        if good.any():
            mine = placements.take(np.flatnonzero(good))
            tier.table.commit_all(mine, rows[good, k.LENGTH], rows[good, k.CHECKSUM])
        if not good.all():
            tier.table.abort_all(placements.take(np.flatnonzero(~good)))
        failed = np.flatnonzero(rows[:, k.RESULT] < 0)
        if len(failed):
            tier.write_failed(placements.take(failed))
        for row in failed.tolist():
            error = os.strerror(-int(rows[row, k.RESULT]))
            self.telemetry.event("write failed", f"{error} ({tier.name}, slot {placements.slots[row]})")
        return good

    def count_loads(self, outcome: Outcome, tier: str, by: int) -> None:
        self.telemetry.count("blocks_total", "load", tier, outcome.value, by=by)
        if outcome not in (Outcome.LOADED, Outcome.CORRUPT):
            self.telemetry.count("misses_total", tier, outcome.value, by=by)

    def count_saves(self, outcome: Outcome, tier: str, by: int) -> None:
        self.telemetry.count("blocks_total", "save", tier, outcome.value, by=by)
