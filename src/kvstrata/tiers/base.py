"""The contract of a tier that this process owns alone: it holds a BlockTable, so it decides what leaves.

read and write run in executor threads and raise what happens: OSError from the medium, BlockCorruptError
for bytes that are not what was saved. They never decide; the store turns exceptions into outcomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from kvstrata.config import StoreConfig
from kvstrata.table import BlockTable, Placement
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.breaker import Breaker


@dataclass(frozen=True, slots=True)
class OpenReport:
    """What opening found. slots: places of the current block size; dropped: reason -> count.

    from_index: nothing had to be scanned.
    """

    slots: int
    restored: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    from_index: bool = False


class LocalTier(ABC):
    """name: the tier's word in the configuration and in metrics."""

    name: ClassVar[str]
    ttl_seconds: float

    def __init__(self, store: StoreConfig, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self._table: BlockTable | None = None
        self._opened = False
        self.reads, self.writes = (
            Breaker(
                self.name,
                op,
                failures=store.breaker_failures,
                deadline_seconds=store.io_deadline_seconds,
                retry_seconds=store.breaker_retry_seconds,
                telemetry=telemetry,
            )
            for op in ("read", "write")
        )

    @property
    def table(self) -> BlockTable:
        """Once the tier was opened; also after close(), for a caller that came in just before."""
        assert self._table is not None, f"tier {self.name} is not open"
        return self._table

    @property
    def opened(self) -> bool:
        return self._opened

    @property
    def readable(self) -> bool:
        return self.opened and self.reads.closed

    @property
    def writable(self) -> bool:
        return self.opened and self.writes.closed

    @abstractmethod
    def open(self) -> OpenReport:
        """Make the table, from what is on the medium if it keeps anything. Raises TierError, OSError."""

    @abstractmethod
    def read(self, placement: Placement, target: memoryview) -> None:
        """Fill target with the block and verify its checksum. Raises BlockCorruptError, OSError."""

    @abstractmethod
    def write(self, placement: Placement, source: memoryview, checksum: int) -> None:
        """Put source into the slot. checksum: XXH3-64 of source, taken by the store. Raises OSError."""

    @abstractmethod
    def write_failed(self, placement: Placement) -> None:
        """A write raised and its placement was aborted: keep its slot from being tried over and over."""

    @abstractmethod
    def refresh(self) -> None:
        """Called now and then from save(): cheap upkeep that must not block."""

    @abstractmethod
    def probe_read(self) -> None:
        """One small read that shows whether the medium answers. Raises OSError."""

    @abstractmethod
    def probe_write(self) -> None:
        """One small write that shows whether the medium answers. Raises OSError."""

    @abstractmethod
    def flush(self) -> None:
        """What was written survives a power loss from here on. Raises OSError."""

    @abstractmethod
    def close(self, *, clean: bool) -> None:
        """Release everything. clean: all I/O has ended, so buffers can go and the index can be kept.

        Otherwise a thread may still be in the medium: only the claim on the medium is given up.
        """

    @abstractmethod
    def used_bytes_on_medium(self) -> int:
        """Bytes that the tier really occupies, with everything that it writes."""
