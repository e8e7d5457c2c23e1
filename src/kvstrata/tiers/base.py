"""The contract of a tier: its books, its bytes, its health.

A tier moves batches of blocks and says of every block how it ended; it never decides what that means for
the engine of the caller, the store does. This module moves no bytes itself.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import StoreConfig
from kvstrata.errors import BlockCorruptError
from kvstrata.table import Placement, Placements, alone
from kvstrata.telemetry import BUCKETS_SECONDS, Telemetry
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.holdings import Holdings
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import EngineCounts, OnDone, Rows
from kvstrata.transfer.handle import Cancellable
from kvstrata.transfer.slot_header import REASONS, WRONG_LENGTH
from kvstrata.transfer.upkeep import Upkeep

NEVER_NS = k.NEVER_NS
Words = NDArray[np.int64]


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


class Tier(ABC):
    """name: the tier's word in the configuration and in metrics.

    shared: other processes write there too, so that blocks may come and go by themselves.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    ttl_seconds: float

    def __init__(self, store: StoreConfig, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self.upkeep = Upkeep(f"kvstrata-{self.name}")
        self._store = store
        self._opened = False
        self._stopped = False
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
    @abstractmethod
    def table(self) -> Holdings:
        """Once the tier was opened; also after close(), for a caller that came in just before."""

    @property
    def opened(self) -> bool:
        return self._opened

    @property
    def readable(self) -> bool:
        return self.opened and self.reads.closed

    @property
    def writable(self) -> bool:
        return self.opened and self.writes.closed

    # Moving blocks

    @abstractmethod
    def start_load(
        self,
        placements: Placements,
        targets: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        copy_to: Words | None = None,
    ) -> Cancellable:
        """Fill targets[i] with the block of placement i and verify it. Returns at once.

        deadline_ns: of time.monotonic_ns; a block that waits longer is not begun. copy_to: addresses
        where a good block is to lie too, 0 for nowhere. on_done gets rows of the engine as blocks end:
        POSITION is the placement's, LENGTH and CHECKSUM the block's, RESULT is 0, one of `slot_header`'s
        verdicts, LATE, GONE, or -errno.
        """

    @abstractmethod
    def start_save(
        self,
        placements: Placements,
        sources: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        checksums: Words | None = None,
    ) -> Cancellable:
        """Put sources[i] into the place of placement i. As `start_load`; rows also have the CHECKSUM.

        checksums: signed words, where they are known already.
        """

    def _account(self, op: str, breaker: Breaker, rows: Rows) -> None:
        """Metrics and the breaker, for rows that the medium was asked for."""
        results = rows[:, k.RESULT]
        begun = (results != k.LATE) & (results != k.GONE)
        breaker.saw((-np.minimum(results[begun], 0)).tolist())
        self._count_moved(op, rows)

    def _count_moved(self, op: str, rows: Rows) -> None:
        """Metrics alone, for rows that went by without the medium."""
        good = rows[rows[:, k.RESULT] == 0]
        if len(good):
            seconds = (good[:, k.ENDED_NS] - good[:, k.BEGAN_NS]) / 1e9
            buckets = np.bincount(
                np.searchsorted(BUCKETS_SECONDS, seconds), minlength=len(BUCKETS_SECONDS) + 1
            )
            self.telemetry.observe_all(f"{op}_seconds", buckets.tolist(), float(seconds.sum()), self.name)
            self.telemetry.count(f"{op}_bytes_total", self.name, by=int(good[:, k.LENGTH].sum()))

    def corrupt(self, verdict: int, placement: Placement) -> BlockCorruptError:
        """The error for a verdict above 0."""
        reason = REASONS[verdict]
        return BlockCorruptError(
            f"wrong {reason}", reason=reason, tier=self.name, key=placement.key, slot=placement.slot
        )

    def read(self, placement: Placement, target: memoryview) -> None:
        """`start_load` of one block, and wait for it. Raises BlockCorruptError, OSError (ENOENT: GONE)."""
        targets = Buffers.of([target], writable=True)
        with _one_row() as (rows, on_done):
            self.start_load(alone(placement), targets, NEVER_NS, on_done)
        result = int(rows[0][0, k.RESULT])
        if result == k.GONE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if result > 0:
            raise self.corrupt(result, placement)
        _raise_for(result)

    def write(self, placement: Placement, source: memoryview, checksum: int) -> None:
        """`start_save` of one block, and wait for it. checksum: XXH3-64 of source. Raises OSError."""
        sources = Buffers.of([source], writable=False)
        known = np.array([checksum], dtype=np.uint64).view(np.int64)
        with _one_row() as (rows, on_done):
            self.start_save(alone(placement), sources, NEVER_NS, on_done, known)
        _raise_for(int(rows[0][0, k.RESULT]))

    # Looking after it

    @property
    @abstractmethod
    def queued(self) -> tuple[int, int]:
        """Loads and stores that nobody has begun."""

    @property
    @abstractmethod
    def counts(self) -> EngineCounts:
        """What was moved so far."""

    @abstractmethod
    def drain(self, seconds: float) -> bool:
        """Wait for everything that was started; False if that took longer."""

    @abstractmethod
    def stop(self, seconds: float) -> bool:
        """Finish what was started and stop the threads. False if one hangs in the medium."""

    @abstractmethod
    def open(self) -> OpenReport:
        """Make the books, from what is on the medium if it keeps anything. Raises TierError, OSError."""

    @abstractmethod
    def write_failed(self, placements: Placements) -> None:
        """Writes failed and their placements were aborted: keep the slots from being tried again and
        again."""

    def lost(self, placement: Placement) -> bool:
        """The medium answered an error when this block was read: shall nobody find it any more?"""
        return True

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
    def flush_by(self, until: float) -> bool:
        """`flush` by the engine: False if the medium has not answered at a moment of time.monotonic."""

    @abstractmethod
    def close(self, *, clean: bool) -> None:
        """Release everything, after `stop`. clean: all I/O has ended, so that the index can be kept.

        Otherwise a thread may still be in the medium: only the claim on the medium is given up.
        """

    @abstractmethod
    def used_bytes_on_medium(self) -> int:
        """Bytes that the tier really occupies, with everything that it writes."""


def describe_rows(rows: Rows, placements: Placements, buffers: Buffers, deadline_ns: int) -> None:
    """What every row of a load or save has: where its bytes are in memory, until when, and its position."""
    rows[:, k.ADDRESS] = buffers.addresses
    rows[:, k.LENGTH] = buffers.lengths
    rows[:, k.DEADLINE_NS] = deadline_ns
    rows[:, k.POSITION] = placements.positions


def refuse_lengths(refused: Rows, on_done: OnDone) -> None:
    """These rows' targets have another length than their blocks: nobody is asked to move them."""
    if len(refused):
        refused[:, k.RESULT] = WRONG_LENGTH
        on_done(refused)


@contextmanager
def _one_row() -> Iterator[tuple[list[Rows], Callable[[Rows], None]]]:
    """Where a batch of one leaves its row; the with-block ends when it is there."""
    rows: list[Rows] = []
    there = threading.Event()

    def on_done(row: Rows) -> None:
        rows.append(row)
        there.set()

    yield rows, on_done
    there.wait()


def _raise_for(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
