"""The object_store tier: packed extents as objects of one bucket (S3, GCS, Azure, a local folder).

New blocks are packed in memory; a full or old extent is uploaded as one object, and then is everybody's.
Until then only this member serves its blocks: they are lost if it dies. Loads fetch ranges of objects. What
lies where, who may write how much and what leaves is the shared tier's work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import ClassVar

import numpy as np

from kvstrata.config import ObjectStoreTierConfig, StoreConfig, format_size
from kvstrata.errors import ConfigError, StoreClosedError
from kvstrata.table import Placements, unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import Words, describe_rows, refuse_lengths
from kvstrata.tiers.shared.extent_file import extent_bytes, slots_within
from kvstrata.tiers.shared.extents import OpenExtent
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.object_client import ObjectClient, open_client
from kvstrata.tiers.shared.object_mover import ObjectMover, Staging
from kvstrata.tiers.shared.objects import ObjectMedium
from kvstrata.tiers.shared.places import Place
from kvstrata.tiers.shared.tier import SharedTier
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import EngineCounts, OnDone, Rows
from kvstrata.transfer.handle import Cancellable
from kvstrata.transfer.job_pool import JobPoolSettings
from kvstrata.types import BlockLayout, Namespace

PUBLISHERS = 2
"""Uploads at a time: while one waits for the end of its last parts the next has begun."""


class ObjectStoreTier(SharedTier):
    """client: in place of the one that the configuration describes, for tests."""

    name: ClassVar[str] = "object_store"
    publishers: ClassVar[int] = PUBLISHERS

    def __init__(
        self,
        config: ObjectStoreTierConfig,
        layout: BlockLayout,
        namespace: Namespace,
        store: StoreConfig,
        telemetry: Telemetry,
        client: ObjectClient | None = None,
        version: str = "",
    ) -> None:
        """Raises ConfigError, also without the package obstore."""
        client = client or open_client(config)
        medium = ObjectMedium(client, settle_seconds=2 * config.request_seconds)
        super().__init__(config, layout, namespace, store, telemetry, medium, version)
        self._client = client
        self._bounds = config
        self._space = namespace.digest
        self._mover: ObjectMover | None = None
        if config.staging_bytes < extent_bytes(1, self._stride):
            raise ConfigError(
                f"tier {self.name}: staging_bytes {format_size(config.staging_bytes)} holds no extent of "
                f"one block of {format_size(layout.block_bytes)}; raise it"
            )

    # Moving blocks

    def _start_moving(self) -> None:
        config, store = self._bounds, self._store
        one = extent_bytes(self._writer.slots, self._stride)
        if config.staging_bytes < one:
            # The folder's extents are larger than this member's: its own are as large as it can hold.
            self._writer.slots = slots_within(config.staging_bytes, self._stride)
            one = extent_bytes(self._writer.slots, self._stride)
        self._staging = Staging(one, max(1, config.staging_bytes // one))
        waiting = store.load_queue_blocks + 2 * store.queue_blocks + store.batch_blocks
        self._mover = ObjectMover(
            f"kvstrata-{self.name}",
            self._client,
            self._staging,
            space=self._space,
            settings=JobPoolSettings(config.io_threads, max(1, config.io_threads // 2), waiting),
            part_bytes=config.part_bytes,
            merge_gap_bytes=config.merge_gap_bytes,
            attempts=1 + config.retries,
            on_request=self._requested,
            on_retry=partial(self.telemetry.count, "upload_retries_total", self.name),
        )
        pool = self._mover.pool
        self.reads.watch_engine(partial(pool.oldest_seconds, loads=True), pool.forgive)

    def _requested(self, fetched: int, asked: int) -> None:
        self.telemetry.count("object_requests_total", self.name)
        self.telemetry.count("object_gap_bytes_total", self.name, by=max(0, fetched - asked))

    @property
    def _moving(self) -> ObjectMover:
        if self._mover is None:
            raise StoreClosedError("this store was closed; open a new one")
        return self._mover

    def start_load(
        self,
        placements: Placements,
        targets: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        copy_to: Words | None = None,
    ) -> Cancellable:
        rows, sources = self._rows(placements, targets, deadline_ns)
        rows[:, k.CHECKSUM] = placements.checksums
        if copy_to is not None:
            rows[:, k.COPY_TO] = copy_to
        finish = partial(self._loaded, sources, on_done, targets.owner)
        wrong = placements.lengths != targets.lengths
        batch = self._moving.load(rows[~wrong], sources, finish)
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
        rows, extents = self._rows(placements, sources, deadline_ns)
        rows[:, k.SEQUENCE] = placements.sequences
        rows[:, k.EXPIRES_MS] = placements.expires_ms
        rows[:, k.CREATED_MS] = unix_ms()
        if checksums is not None:
            rows[:, k.CHECKSUM] = checksums
            rows[:, k.FLAGS] |= k.KNOWN
        finish = partial(self._saved, on_done, sources.owner)
        return self._moving.save(rows, [extent.id for extent in extents], finish)

    def _rows(
        self, placements: Placements, buffers: Buffers, deadline_ns: int
    ) -> tuple[Rows, list[OpenExtent | Place]]:
        """Rows with what loads and saves have in common, and the extents that their FD counts."""
        rows = np.zeros((len(placements), k.COLUMNS), dtype=np.int64)
        numbers, places = self._extents_of(placements)
        extents = list(places.values())
        counted = {number: place for place, number in enumerate(places)}
        rows[:, k.FD] = [counted[number] for number in numbers.tolist()]
        segments = np.array([extent.segment for extent in extents], dtype=np.int64)
        if len(rows):
            rows[:, k.SEGMENT] = segments[rows[:, k.FD]]
            rows[:, k.KEY : k.KEY + 4] = placements.key_words()
        rows[:, k.NUMBER] = placements.slots
        rows[:, k.OFFSET] = placements.slots * self._stride
        describe_rows(rows, placements, buffers, deadline_ns)
        return rows, extents

    def _loaded(
        self, sources: list[OpenExtent | Place], on_done: OnDone, owner: object, rows: Rows
    ) -> None:
        """owner: what keeps the buffers alive until here."""
        self._account("read", self.reads, rows)
        on_done(rows)
        for number in np.unique(rows[rows[:, k.RESULT] == k.GONE, k.FD]).tolist():
            self._lost(sources[number].id)

    def _saved(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        """The store was not asked yet: that these are packed says nothing of it."""
        self._count_moved("write", rows)
        on_done(rows)

    # Extents

    def _begin_extent(self, extent: OpenExtent) -> bool:
        return self._staging.take(extent.id)

    @contextlib.contextmanager
    def _no_hang(self) -> Iterator[None]:
        """An upload may take longer than a block's deadline: its requests have their own."""
        try:
            yield
        except OSError as error:
            self.writes.saw([error.errno or 0])
            raise
        self.writes.saw([0])

    def _watch_publishing(self) -> AbstractContextManager[None]:
        return self._no_hang()

    def _finish_extent(self, extent: OpenExtent, footer: bytes) -> int:
        start = extent.footer().start
        size = self._moving.upload(extent.id, footer, start)
        self._staging.give_back(extent.id)
        return size

    def _drop_extent(self, extent: OpenExtent) -> None:
        self._staging.give_back(extent.id)

    def _extents_left(self, extents: list[ExtentId]) -> None:
        """Nothing is kept of published extents."""

    # The contract

    @property
    def queued(self) -> tuple[int, int]:
        return self._mover.pool.queued if self._mover else (0, 0)

    @property
    def counts(self) -> EngineCounts:
        return self._mover.pool.counts if self._mover else EngineCounts()

    def drain(self, seconds: float) -> bool:
        return self.upkeep.drain(seconds) and (self._mover is None or self._mover.pool.drain(seconds))

    def stop(self, seconds: float) -> bool:
        if not self._stopped:
            ended = self.upkeep.close(seconds)
            self._stopped = (self._mover is None or self._mover.pool.close(seconds)) and ended
        return self._stopped

    def _stop_moving(self) -> None:
        if self._mover is not None:
            self._mover.stop(0.0)
