"""The memory tier: one arena in DRAM, fixed slots, views without a copy."""

from __future__ import annotations

import os
import time
from typing import ClassVar

import numpy as np

from kvstrata.config import MemoryTierConfig, StoreConfig, format_size
from kvstrata.errors import ConfigError, StoreClosedError
from kvstrata.table import BlockTable, Placement, Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import OpenReport
from kvstrata.tiers.engine_tier import LocalTier
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.arena_care import ArenaCare
from kvstrata.transfer.buffers import PAGE, Arena, Buffers, address_of, round_up
from kvstrata.transfer.engine import Engine, Rows
from kvstrata.types import BlockLayout


class MemoryTier(LocalTier):
    """Holds capacity_bytes // slot size blocks; the slot size is the block size in whole pages."""

    name: ClassVar[str] = "memory"

    def __init__(
        self,
        config: MemoryTierConfig,
        layout: BlockLayout,
        store: StoreConfig,
        telemetry: Telemetry,
    ) -> None:
        super().__init__(store, telemetry)
        self.ttl_seconds = config.ttl_seconds
        self._config = config
        self._slot_bytes = round_up(layout.block_bytes, PAGE)
        self._slots = config.capacity_bytes // self._slot_bytes
        if self._slots < 1:
            raise ConfigError(
                f"tier memory: capacity_bytes {format_size(config.capacity_bytes)} is too small for one "
                f"block of {format_size(self._slot_bytes)}; raise it"
            )
        self._arena: Arena | None = None
        self._base = 0
        self._care: ArenaCare | None = None

    def open(self) -> OpenReport:
        started = time.monotonic()
        self._arena = Arena(self._slots * self._slot_bytes)
        self._base = address_of(self._arena.view)
        self._care = ArenaCare(
            self._arena,
            self.name,
            self.telemetry,
            touch=self._config.touch,
            numa_wish=self._config.numa,
            pin=self._config.pin == "auto",
        )
        self._table = BlockTable(
            self._slots,
            self._slot_bytes,
            self._config.policy,
            self._config.policy_options,
            batch_blocks=self._store.batch_blocks,
            on_expired=lambda count: self.telemetry.count("expired_total", self.name, by=count),
        )
        workers = min(self._store.io_threads, len(os.sched_getaffinity(0)))
        self._start_engine(
            Engine(f"kvstrata-{self.name}", self._engine_settings("memory", workers, workers))
        )
        self._opened = True
        return OpenReport(self._slots, seconds=time.monotonic() - started)

    def view(self, placement: Placement) -> memoryview:
        """The block's bytes in place; valid while the placement is pinned. Raises StoreClosedError."""
        start = placement.slot * self._slot_bytes
        return self._bytes[start : start + placement.length]

    def views(self, placements: Placements) -> list[memoryview]:
        """`view` of many, read-only."""
        whole = self._bytes.toreadonly()
        starts = (placements.slots * self._slot_bytes).tolist()
        ends = (placements.slots * self._slot_bytes + placements.lengths).tolist()
        return [whole[start:end] for start, end in zip(starts, ends, strict=True)]

    @property
    def _bytes(self) -> memoryview:
        if self._arena is None:
            raise StoreClosedError("this store was closed; open a new one")
        return self._arena.view

    def _load_rows(self, placements: Placements, targets: Buffers) -> Rows:
        rows = self._rows_at(placements, k.FETCH)
        if self._config.verify == "always":
            rows[:, k.FLAGS] = k.VERIFY
        return rows

    def _save_rows(self, placements: Placements, sources: Buffers) -> Rows:
        return self._rows_at(placements, k.KEEP)

    def _rows_at(self, placements: Placements, kind: int) -> Rows:
        rows = np.zeros((len(placements), k.COLUMNS), dtype=np.int64)
        rows[:, k.KIND] = kind
        rows[:, k.OFFSET] = self.buffers(placements).addresses
        return rows

    def buffers(self, placements: Placements) -> Buffers:
        """The blocks' bytes in place; valid while the placements are pinned. Raises StoreClosedError."""
        arena = self._arena
        if arena is None:
            raise StoreClosedError("this store was closed; open a new one")
        return Buffers(self._base + placements.slots * self._slot_bytes, placements.lengths, arena)

    def write_failed(self, placements: Placements) -> None:
        raise AssertionError("writing to memory does not fail")

    def refresh(self) -> None:
        pass

    def probe_read(self) -> None:
        pass

    def probe_write(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def flush_by(self, until: float) -> bool:
        return True

    def close(self, *, clean: bool) -> None:
        if self._care is not None:
            self._care.close()
        if clean and self.stop(self._store.close_seconds) and self._arena is not None:
            self._opened = False
            self._arena = None  # the memory goes with the last view that somebody still holds

    def used_bytes_on_medium(self) -> int:
        return self._arena.size if self._arena else 0
