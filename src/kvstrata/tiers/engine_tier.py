"""EngineTier: a tier whose bytes are moved by the I/O engine; LocalTier: one that this process owns alone.

A tier of this kind says where each block lies, as rows of the engine; queues, threads, deadlines and
checksums are the engine's.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import numpy as np

from kvstrata.config import StoreConfig
from kvstrata.errors import StoreClosedError
from kvstrata.table import BlockTable, Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import Tier, Words, describe_rows, refuse_lengths
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import Engine, EngineCounts, EngineSettings, Kind, OnDone, Rows
from kvstrata.transfer.handle import Cancellable
from kvstrata.transfer.mover import Mover


class EngineTier(Tier):
    """The engine starts when the tier opens."""

    def __init__(self, store: StoreConfig, telemetry: Telemetry) -> None:
        super().__init__(store, telemetry)
        self._engine: Mover | None = None

    # Moving blocks

    def start_load(
        self,
        placements: Placements,
        targets: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        copy_to: Words | None = None,
    ) -> Cancellable:
        rows = self._load_rows(placements, targets)
        describe_rows(rows, placements, targets, deadline_ns)
        rows[:, k.CHECKSUM] = placements.checksums
        if copy_to is not None:
            rows[:, k.COPY_TO] = copy_to
        finish = partial(self._loaded, on_done, targets.owner)
        wrong = placements.lengths != targets.lengths
        if not wrong.any():
            return self._submit_load(rows, placements, finish)
        right = np.flatnonzero(~wrong)
        batch = self._submit_load(rows[right], placements.take(right), finish)
        refuse_lengths(rows[wrong], on_done)
        return batch

    def start_save(
        self,
        placements: Placements,
        sources: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        checksums: Words | None = None,
    ) -> Cancellable:
        rows = self._save_rows(placements, sources)
        describe_rows(rows, placements, sources, deadline_ns)
        if checksums is not None:
            rows[:, k.CHECKSUM] = checksums
            rows[:, k.FLAGS] |= k.KNOWN
        return self._submit_save(rows, placements, partial(self._saved, on_done, sources.owner), on_done)

    def _submit_load(self, rows: Rows, placements: Placements, finish: OnDone) -> Cancellable:
        """rows: of those placements, in their order."""
        return self._running.submit(rows, loads=True, on_done=finish)

    def _submit_save(
        self, rows: Rows, placements: Placements, finish: OnDone, refuse: OnDone
    ) -> Cancellable:
        """refuse: for rows that no engine was asked to move."""
        return self._running.submit(rows, loads=False, on_done=finish)

    @abstractmethod
    def _load_rows(self, placements: Placements, targets: Buffers) -> Rows:
        """Rows with everything that this tier alone knows."""

    @abstractmethod
    def _save_rows(self, placements: Placements, sources: Buffers) -> Rows:
        """Rows with everything that this tier alone knows."""

    @property
    def _running(self) -> Mover:
        if self._engine is None:
            raise StoreClosedError("this store was closed; open a new one")
        return self._engine

    def _loaded(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        """owner: what keeps the buffers alive until here."""
        self._account("read", self.reads, rows)
        on_done(rows)

    def _saved(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        self._account("write", self.writes, rows)
        on_done(rows)

    # The engine

    def _start_engine(self, engine: Mover) -> None:
        self._engine = engine
        self.reads.watch_engine(partial(engine.oldest_seconds, loads=True), engine.forgive)
        self.writes.watch_engine(partial(engine.oldest_seconds, loads=False), engine.forgive)

    def _engine_settings(self, kind: Kind, in_flight: int, stores_in_flight: int) -> EngineSettings:
        store = self._store
        waiting = store.load_queue_blocks + 2 * store.queue_blocks
        return EngineSettings(
            kind=kind,
            workers=in_flight,
            store_workers=stores_in_flight,
            capacity=waiting + store.batch_blocks + in_flight * k.UNIT_BLOCKS,
        )

    @property
    def queued(self) -> tuple[int, int]:
        return self._engine.queued if self._engine else (0, 0)

    @property
    def counts(self) -> EngineCounts:
        return self._engine.counts if self._engine else EngineCounts()

    def drain(self, seconds: float) -> bool:
        return self.upkeep.drain(seconds) and (self._engine is None or self._engine.drain(seconds))

    def stop(self, seconds: float) -> bool:
        if not self._stopped:
            ended = self.upkeep.close(seconds)
            self._stopped = (self._engine is None or self._engine.close(seconds)) and ended
        return self._stopped


class LocalTier(EngineTier):
    """Nobody else writes to it: it holds a BlockTable, so it decides what leaves."""

    def __init__(self, store: StoreConfig, telemetry: Telemetry) -> None:
        super().__init__(store, telemetry)
        self._table: BlockTable | None = None

    @property
    def _running(self) -> Engine:
        engine = super()._running
        assert isinstance(engine, Engine), "what one process owns is moved by the engine"
        return engine

    @property
    def table(self) -> BlockTable:
        assert self._table is not None, f"tier {self.name} is not open"
        return self._table
