"""The memory tier: one arena in DRAM, fixed slots, views without a copy."""

from __future__ import annotations

import time
from typing import ClassVar

import xxhash

from kvstrata.config import MemoryTierConfig, StoreConfig, format_size
from kvstrata.errors import BlockCorruptError, ConfigError, StoreClosedError
from kvstrata.table import BlockTable, Placement
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import LocalTier, OpenReport
from kvstrata.transfer.buffers import PAGE, Arena, round_up
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
        self._batch_blocks = store.batch_blocks
        self._slot_bytes = round_up(layout.block_bytes, PAGE)
        self._slots = config.capacity_bytes // self._slot_bytes
        if self._slots < 1:
            raise ConfigError(
                f"tier memory: capacity_bytes {format_size(config.capacity_bytes)} is too small for one "
                f"block of {format_size(self._slot_bytes)}; raise it"
            )
        self._arena: Arena | None = None

    def open(self) -> OpenReport:
        started = time.monotonic()
        self._arena = Arena(self._slots * self._slot_bytes)
        self._table = BlockTable(
            self._slots,
            self._slot_bytes,
            self._config.policy,
            self._config.policy_options,
            batch_blocks=self._batch_blocks,
            on_expired=lambda count: self.telemetry.count("expired_total", self.name, by=count),
        )
        self._opened = True
        return OpenReport(self._slots, seconds=time.monotonic() - started)

    def view(self, placement: Placement) -> memoryview:
        """The block's bytes in place; valid while the placement is pinned. Raises StoreClosedError."""
        arena = self._arena
        if arena is None:
            raise StoreClosedError("this store was closed; open a new one")
        start = placement.slot * self._slot_bytes
        return arena.view[start : start + placement.length]

    def read(self, placement: Placement, target: memoryview) -> None:
        self._expect(placement.length == len(target), "length", placement)
        with self.view(placement) as view:
            target[:] = view
        if self._config.verify == "always":
            # Checked in the target, so that a change on the way shows too.
            good = xxhash.xxh3_64_intdigest(target) == placement.checksum
            self._expect(good, "checksum", placement)

    def _expect(self, good: bool, reason: str, placement: Placement) -> None:
        if not good:
            raise BlockCorruptError(
                f"wrong {reason}",
                reason=reason,
                tier=self.name,
                key=placement.key,
                slot=placement.slot,
            )

    def write(self, placement: Placement, source: memoryview, checksum: int) -> None:
        assert self._arena is not None
        start = placement.slot * self._slot_bytes
        self._arena.view[start : start + len(source)] = source

    def write_failed(self, placement: Placement) -> None:
        raise AssertionError("writing to memory does not fail")

    def refresh(self) -> None:
        pass

    def probe_read(self) -> None:
        pass

    def probe_write(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, *, clean: bool) -> None:
        if clean and self._arena is not None:
            self._opened = False
            self._arena = None  # the memory goes with the last view that somebody still holds

    def used_bytes_on_medium(self) -> int:
        return self._arena.size if self._arena else 0
