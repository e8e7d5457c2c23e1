"""TierStack: the tiers of one store, fastest first: opened, probed and brought back; who may enter each of
them, and what ends a write.

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

from kvstrata.config import MediumFields, MemoryTierConfig, TierConfig, WriteMode
from kvstrata.errors import KVStrataError
from kvstrata.table import BlockTable, Placement, Placements, Recorded
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

DRAIN_PAUSE_SECONDS = 0.001

log = logging.getLogger(__name__)


Left = Callable[[Placements, int], None]
"""Hears which blocks a tier's policy put out, with their slots, and how many more had to go at once."""


class TierStack:
    """tiers and their configurations, in the same order.

    memory: the memory tier if it comes first. promote: blocks that a lower tier served go there too.
    modes: the write mode of each tier. direct: those that saves may write to themselves; primary: the first
    of them, -1 for none. through: the others of them that a save waits for.
    moving: blocks on their way between tiers, with nobody who waits for them.
    """

    def __init__(self, tiers: Sequence[Tier], configs: Sequence[TierConfig], telemetry: Telemetry) -> None:
        self.tiers = list(tiers)
        self.telemetry = telemetry
        self.reports: dict[str, OpenReport] = {}
        self.closed = False
        self._reopen_lock = threading.Lock()
        self.memory: MemoryTier | None = None
        self.promote = False
        first, config = tiers[0], configs[0]
        if isinstance(first, MemoryTier) and isinstance(config, MemoryTierConfig):
            self.memory = first
            self.promote = config.promote and len(tiers) > 1
        self.configs = list(configs)
        self.modes = [_mode(config) for config in configs]
        direct = [number for number, mode in enumerate(self.modes) if mode in ("back", "through")]
        self.direct = direct
        self.primary = direct[0] if direct else -1
        self.through = [number for number in direct[1:] if self.modes[number] == "through"]
        self.hear_left: dict[int, Left] = {}
        self._promoting = 0
        self._promotion_lock = threading.Lock()
        self._moving = 0
        self._moving_lock = threading.Lock()

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
        self._keep_spare(tier)
        self.telemetry.event(
            f"{tier.name} opened",
            f"{report.restored} blocks in {report.slots} slots, {report.seconds:.3f} s, "
            f"{'index' if report.from_index else 'scan'}",
        )

    def _keep_spare(self, tier: Tier) -> None:
        """Slots of a tier for blocks on their way to the next one, which takes what this one gives up."""
        below = self.tiers.index(tier) + 1
        if below == len(self.tiers) or self.modes[below] != "on_evict":
            return
        config, table = self.configs[below], tier.table
        assert isinstance(config, MediumFields) and isinstance(table, BlockTable)
        evicted = table.set_spare(max(1, config.demote_bytes // table.slot_bytes))
        self.telemetry.count("evictions_total", tier.name, by=evicted)

    def deadline_seconds(self, number: int) -> float:
        """The tier's own, which is shorter than a load's; 0: it has none."""
        config = self.configs[number]
        return config.deadline_seconds if isinstance(config, MediumFields) else 0.0

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
        except BaseException:
            breaker.probed(OSError("the probe raised"))  # or nobody would probe this tier again
            raise
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

        What one tier has done may go on to another: until nothing is on its way any more.
        """
        while all(tier.drain(max(0.0, until - time.monotonic())) for tier in self.tiers):
            if not self.moving:
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(DRAIN_PAUSE_SECONDS)
        return False

    def stop(self, until: float) -> bool:
        """Finish, and stop all threads, also behind a tier that hangs. False if one does."""
        self.drain(until)
        stopped = [tier.stop(max(0.0, until - time.monotonic())) for tier in self.tiers]
        return all(stopped)

    @property
    def moving(self) -> int:
        return self._moving

    def move(self, blocks: int) -> None:
        """So many more are on their way between tiers; or fewer."""
        with self._moving_lock:
            self._moving += blocks
            assert self._moving >= 0

    # Who comes in

    def admit(
        self, number: int, keys: Sequence[BlockKey], admit: Sequence[bool], *, request: int = 0
    ) -> Recorded:
        """One policy call: touch what a tier has, reserve what it lacks and may take, pass on who left."""
        tier = self.tiers[number]
        tier.refresh()
        recorded = tier.table.record(keys, admit, request=request, ttl_seconds=tier.ttl_seconds)
        if recorded.evicted:
            self.telemetry.count("evictions_total", tier.name, by=recorded.evicted)
            if recorded.left is not None:
                self.hear_left[number](recorded.left, recorded.evicted - len(recorded.left))
        return recorded

    # Promotion

    def reserve_promotion(self, keys: Sequence[BlockKey]) -> Placements:
        """Room in memory for leading blocks of a load that a lower tier serves, and that it lacks.

        All that is reserved so takes a share of memory at most: a tier that hangs while it is read must
        not empty memory for blocks that never come.
        """
        memory = self.memory
        assert memory is not None
        most = max(1, memory.table.slots // PROMOTING_SHARE)
        with self._promotion_lock:
            leading = keys[: min(max(0, most - self._promoting), memory.table.batch_blocks)]
            self._promoting += len(leading)
        recorded = self.admit(0, leading, [True] * len(leading))
        with self._promotion_lock:
            self._promoting -= len(leading) - len(recorded.placed)
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

    def drop_bad(self, tier: Tier, placement: Placement, result: int) -> None:
        """A pinned block that could not be read, or is not what was saved, is in its tier no more.

        After an error of the medium the tier says whether it is.
        """
        if result >= 0 or tier.lost(placement):
            tier.table.drop(placement)
        if result == k.GONE:
            self.telemetry.count("misses_total", tier.name, "collected")
        elif result > 0:
            error = tier.corrupt(result, placement)
            self.telemetry.event("corrupt block dropped", str(error))
            self.telemetry.count("misses_total", tier.name, f"corrupt_{error.reason}")
        else:
            where = f"({tier.name}, slot {placement.slot})"
            self.telemetry.event("read failed", f"{os.strerror(-result)} {where}")

    def count_loads(self, outcome: Outcome, tier: str, by: int) -> None:
        self.telemetry.count("blocks_total", "load", tier, outcome.value, by=by)
        if outcome not in (Outcome.LOADED, Outcome.CORRUPT):
            self.telemetry.count("misses_total", tier, outcome.value, by=by)

    def count_saves(self, outcome: Outcome, tier: str, by: int) -> None:
        self.telemetry.count("blocks_total", "save", tier, outcome.value, by=by)


def _mode(config: TierConfig) -> WriteMode:
    """Memory takes what is saved; how the others get blocks is in their configuration."""
    return config.write_mode if isinstance(config, MediumFields) else "back"
