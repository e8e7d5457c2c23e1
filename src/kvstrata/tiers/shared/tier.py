"""SharedTier: one folder of which many processes are members. It moves no bytes of blocks itself.

Here its parts are put together: the index that look-ups ask, the extents that this member writes, and the
loops that beat and listen (`MemberLoop`), publish (`Publisher`) and collect (`CollectLoop`), on threads of
their own. A kind of tier says how the bytes of an extent are moved and made visible to all
(`_begin_extent`, `_finish_extent`, `_drop_extent`, `start_load`, `start_save`).

Every call to the medium that they make counts for the breakers, so a folder that hangs takes the tier out
of service; look-ups, loads and saves touch memory only.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from abc import abstractmethod
from contextlib import AbstractContextManager
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import StoreConfig, format_size
from kvstrata.errors import ConfigError
from kvstrata.table import Column, Placement, Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import OpenReport, Tier
from kvstrata.tiers.shared.catalog import Catalog, Change
from kvstrata.tiers.shared.collect_loop import CollectLoop
from kvstrata.tiers.shared.entrance import Entrance, own_settings
from kvstrata.tiers.shared.extent_file import LENGTH_LIMIT, extent_bytes, slot_stride, slots_within
from kvstrata.tiers.shared.extents import ExtentWriter, OpenExtent
from kvstrata.tiers.shared.fields import SharedFields
from kvstrata.tiers.shared.format import COLLECTOR, EXTENTS, MEMBERS, WRITING, ExtentId
from kvstrata.tiers.shared.index import SharedIndex
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import own_version
from kvstrata.tiers.shared.member_loop import MemberLoop
from kvstrata.tiers.shared.places import Place
from kvstrata.tiers.shared.publisher import Publisher
from kvstrata.tiers.shared.session import Session
from kvstrata.tiers.shared.small_files import FolderSettings, reserve_bytes
from kvstrata.tiers.shared.strikes import Strikes
from kvstrata.types import BlockLayout, Namespace

EXTENTS_LEAST = 4
"""With room for fewer extents of one block each, nothing could be rewritten."""

log = logging.getLogger(__name__)


class SharedTier(Tier):
    """medium: the folder. version: of this kvstrata, for people; by default the installed one's."""

    shared: ClassVar[bool] = True
    publishers: ClassVar[int] = 1

    def __init__(
        self,
        config: SharedFields,
        layout: BlockLayout,
        namespace: Namespace,
        store: StoreConfig,
        telemetry: Telemetry,
        medium: Medium,
        version: str = "",
    ) -> None:
        super().__init__(store, telemetry)
        self.ttl_seconds = config.ttl_seconds
        self._config = config
        self._namespace = namespace
        self._medium = medium
        self._version = version or own_version()
        self._stride = slot_stride(layout.block_bytes)
        self._check_sizes(layout.block_bytes)
        self._entrance = Entrance(
            medium,
            own_settings(config, self._stride, self._version),
            telemetry,
            self.name,
            lay_out=self._prepare_layout,
            where=self._where,
        )
        self._index: SharedIndex | None = None
        self._catalog = Catalog(self._on_change)
        self._member: MemberLoop | None = None
        self._strikes = Strikes(store.breaker_retry_seconds)
        self._closing = threading.Event()
        self._ended = threading.Event()
        """Publishing has to stop."""
        self._threads: list[threading.Thread] = []

    def _check_sizes(self, block_bytes: int) -> None:
        capacity = self._config.capacity_bytes
        one = extent_bytes(1, self._stride)
        if block_bytes >= LENGTH_LIMIT:
            raise ConfigError(f"tier {self.name}: blocks of {format_size(block_bytes)} are too large")
        if capacity - reserve_bytes(capacity) < EXTENTS_LEAST * one:
            raise ConfigError(
                f"tier {self.name}: capacity_bytes {format_size(capacity)} is too small: {EXTENTS_LEAST} "
                f"extents of one block of {format_size(block_bytes)} and the tier's own files need "
                f"{format_size(EXTENTS_LEAST * one + 2**20)}; raise it"
            )

    @property
    def table(self) -> SharedIndex:
        assert self._index is not None, f"tier {self.name} is not open"
        return self._index

    @property
    def catalog(self) -> Catalog:
        """What lies in the folder; for inspection and tests."""
        return self._catalog

    @property
    def session(self) -> Session | None:
        """This process as a member; None while it may only read. For inspection and tests."""
        return None if self._member is None else self._member.session

    @property
    def settings(self) -> FolderSettings:
        """Of the folder, once the tier was opened."""
        return self._entrance.settings

    # Opening

    def open(self) -> OpenReport:
        """Raises OSError also where the medium does not answer within the deadline."""
        started = time.monotonic()
        settings = self._entrance.enter(self._store.io_deadline_seconds)
        self._writer = ExtentWriter(
            slots=max(1, slots_within(settings.extent_bytes, self._stride)),
            stride=self._stride,
            namespace=self._namespace.digest,
            berth=lambda: self.session,
            begin=self._begin_extent,
            ask_seconds=self._config.refresh_seconds / 2,
        )
        count = partial(self.telemetry.count)
        self._index = SharedIndex(
            self._writer,
            namespace=self._namespace.digest,
            stride=self._stride,
            batch_blocks=self._store.batch_blocks,
            on_touch=self._touched,
            on_duplicates=lambda blocks: count("duplicate_blocks_total", self.name, by=blocks),
            on_expired=lambda blocks: count("expired_total", self.name, by=blocks),
            on_refused=lambda blocks: count("no_grant_blocks_total", self.name, by=blocks),
            used_bytes=lambda: self._catalog.live_bytes + self._writer.taken_bytes,
            capacity_bytes=lambda: settings.capacity_bytes,
        )
        member = self._member = MemberLoop(
            self._medium,
            self._catalog,
            self._entrance,
            self._writer,
            self._config,
            self.telemetry,
            (self.reads, self.writes),
            tier=self.name,
            version=self._version,
            closing=self._closing,
        )
        self._start_moving()
        self._opened = True
        self._start_threads(member)
        member.turned.wait(self._store.io_deadline_seconds)
        return OpenReport(
            settings.capacity_bytes // self._stride,
            self._index.resident_blocks,
            seconds=time.monotonic() - started,
            from_index=True,
        )

    def _start_threads(self, member: MemberLoop) -> None:
        publisher = Publisher(
            self._writer,
            lambda: self.session,
            self.telemetry,
            self.writes,
            tier=self.name,
            publish_seconds=self._config.publish_seconds,
            finish=self._finish_extent,
            watch=self._watch_publishing,
            drop=self._drop_extent,
            forget=self.table.forget,
            ended=self._ended,
        )
        works = [("member", member.run)]
        works += [(f"publish-{number}", publisher.run) for number in range(self.publishers)]
        if self._config.collect:
            collect = CollectLoop(
                self._medium,
                self._catalog,
                self.settings,
                lambda: self.session,
                self._config,
                self.telemetry,
                (self.reads, self.writes),
                tier=self.name,
                closing=self._closing,
            )
            works.append(("collect", collect.run))
        self._threads = [
            threading.Thread(target=work, name=f"kvstrata-{self.name}-{name}", daemon=True)
            for name, work in works
        ]
        for thread in self._threads:
            thread.start()

    # What its parts hear and ask

    def _touched(self, request: int, words: NDArray[np.uint64]) -> None:
        session = self.session
        if session is not None:
            session.access.touch(request, words)

    def _on_change(self, change: Change) -> None:
        if self._index is None:
            return
        added, lost = self._index.take_in(change)
        self.telemetry.count("found_blocks_total", self.name, by=added)
        self.telemetry.count("lost_blocks_total", self.name, by=lost)
        for extent in change.added:
            if extent.namespace == self._namespace.digest and extent.stride != self._stride:
                self.telemetry.count("damaged_files_total", self.name, "stride")
                self.telemetry.event(
                    f"{self.name} extent of another shape",
                    f"{extent.id.name} has this namespace, but slots of {extent.stride} bytes",
                )
        if change.gone:
            self._extents_left([extent.id for extent in change.gone])

    def _lost(self, extent: ExtentId) -> None:
        """Somebody found that this extent's file is not there."""
        self._catalog.lose([extent])

    def _extents_of(self, placements: Placements) -> tuple[Column, dict[int, OpenExtent | Place]]:
        """Of pinned or reserved placements: each one's extent by number, and the extents."""
        return self.table.extents_of(placements.indices)

    def _check_place(self) -> None:
        """Is this still the folder that was opened? Raises OSError (ENODEV) if not."""
        self._entrance.check()

    # What a kind of shared tier does

    def _watch_publishing(self) -> AbstractContextManager[None]:
        """What a whole extent may cost, for the breaker of writes."""
        return self.writes.watch()

    def _where(self) -> str:
        """The folder's name, for people."""
        return "the folder"

    def _prepare_layout(self) -> None:
        """The folder was made just now: say how files in it are to be laid out. Raises OSError."""

    @abstractmethod
    def _start_moving(self) -> None:
        """Blocks may be moved from here on."""

    @abstractmethod
    def _begin_extent(self, extent: OpenExtent) -> bool:
        """Take what is needed to write it, in memory only, under locks. False: there is none now."""

    @abstractmethod
    def _finish_extent(self, extent: OpenExtent, footer: bytes) -> int:
        """All its blocks are written: add the footer behind its last slot, make it durable and visible to
        all under its name. Returns bytes on the medium. Raises OSError; `_drop_extent` follows then."""

    @abstractmethod
    def _drop_extent(self, extent: OpenExtent) -> None:
        """It will not be published: take away what there is of it. Raises OSError."""

    @abstractmethod
    def _extents_left(self, extents: list[ExtentId]) -> None:
        """Nobody will ask for these any more, but who has pinned them. Memory only."""

    @abstractmethod
    def _stop_moving(self) -> None:
        """Let go of everything, after a clean end of all I/O."""

    # The contract

    def write_failed(self, placements: Placements) -> None:
        """Slots are not used again; a medium that fails opens the breaker."""

    def refresh(self) -> None:
        """The member's thread does what there is to do."""

    def lost(self, placement: Placement) -> bool:
        """Nobody would tell of it again: so not at the first error."""
        return self._strikes.out(placement.key)

    def probe_read(self) -> None:
        self._check_place()

    def probe_write(self) -> None:
        assert self._member is not None, f"tier {self.name} is not open"
        self._member.probe()

    def flush(self) -> None:
        if not self.flush_by(time.monotonic() + self._store.io_deadline_seconds):
            raise OSError(errno.ETIMEDOUT, "the extents were not published in time")

    def flush_by(self, until: float) -> bool:
        """Publishes what is being written, whatever its size."""
        self._writer.close_old(0.0)
        if not self._writer.wait_published(until):
            return False
        session = self.session
        if session is None or not session.journal.pending:
            return True
        session.journal.flush()
        return True

    def close(self, *, clean: bool) -> None:
        clean = clean and self.stop(self._store.close_seconds)
        self._closing.set()
        if not clean or not self._opened:
            self._ended.set()
            return
        self._opened = False
        until = time.monotonic() + self._store.close_seconds
        if self.writes.closed:
            self._writer.close_old(0.0)
            self._writer.wait_published(until)
        self._ended.set()
        for thread in self._threads:
            thread.join(max(0.1, until - time.monotonic()))
        session = self.session
        if session is not None and self.writes.closed:
            try:
                session.journal.flush()
                session.access.flush()
                session.beat(state="closed")
            except OSError as error:
                log.warning("kvstrata: tier %s: no goodbye was left: %s", self.name, error)
        self._stop_moving()

    def used_bytes_on_medium(self) -> int:
        folders = [EXTENTS, WRITING, COLLECTOR]
        folders += [f"{MEMBERS}/{word}" for word in self._medium.folders(MEMBERS)]
        return sum(sum(self._medium.names(folder).values()) for folder in folders)
