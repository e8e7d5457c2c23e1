"""SharedTier: one folder of which many processes are members. It moves no bytes of blocks itself.

Here its parts are put together: the index that look-ups ask, the extents that this member writes, and the
threads that beat, listen, publish and collect. A kind of tier says how the bytes of an extent are moved and
made visible to all (`_begin_extent`, `_finish_extent`, `_drop_extent`, `start_load`, `start_save`).

Threads: one is the member (beats, polls, reads grants, writes access logs), some publish, one collects.
Every call to the medium that they make counts for the breakers, so a folder that hangs takes the tier out
of service; look-ups, loads and saves touch memory only.
"""

from __future__ import annotations

import errno
import logging
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import Policy, PolicyOptions, StoreConfig, format_size
from kvstrata.errors import ConfigError, FormatVersionError
from kvstrata.table import Column, Placement, Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import OpenReport, Tier
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.shared.catalog import Catalog, Change
from kvstrata.tiers.shared.collector import Collector
from kvstrata.tiers.shared.extents import ExtentWriter, OpenExtent
from kvstrata.tiers.shared.format import (
    COLLECTOR,
    EXTENTS,
    FORMAT,
    LENGTH_LIMIT,
    MEMBERS,
    SETTINGS_FILE,
    VERSION,
    WRITING,
    Added,
    ExtentId,
    FolderSettings,
    extent_bytes,
    reserve_bytes,
    slot_stride,
    slots_within,
)
from kvstrata.tiers.shared.grants import Standing, read_grants
from kvstrata.tiers.shared.index import Place, SharedIndex
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import first_beat, own_version
from kvstrata.tiers.shared.session import Session
from kvstrata.tiers.shared.strikes import Strikes
from kvstrata.tiers.shared.watcher import Watcher
from kvstrata.types import BlockLayout, Namespace

EXTENTS_WANTED = 32
"""A small capacity is still cut into so many extents, so that one can leave alone."""
EXTENTS_LEAST = 4
"""With room for fewer extents of one block each, nothing could be rewritten."""
SETTLE_SECONDS = 0.2
"""A settings file that is being written is read again after so long."""
VERSIONS_TOLD = 16
"""Of so many different versions among the members people are told, this one's included."""
PUBLISHER_WAIT_SECONDS = 0.25

T = TypeVar("T")
log = logging.getLogger(__name__)


class SharedFields(Protocol):
    """What the configurations of all shared tiers have."""

    @property
    def capacity_bytes(self) -> int: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def policy_options(self) -> PolicyOptions: ...
    @property
    def ttl_seconds(self) -> float: ...
    @property
    def extent_bytes(self) -> int: ...
    @property
    def publish_seconds(self) -> float: ...
    @property
    def refresh_seconds(self) -> float: ...
    @property
    def lease_seconds(self) -> float: ...
    @property
    def access_seconds(self) -> float: ...
    @property
    def access_bytes(self) -> int: ...
    @property
    def burst_bytes(self) -> int: ...
    @property
    def live_share(self) -> float: ...
    @property
    def collect(self) -> bool: ...
    @property
    def rewrite_bytes_per_second(self) -> int: ...


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
        self._settings: FolderSettings | None = None
        self._index: SharedIndex | None = None
        self._catalog = Catalog(self._on_change)
        self._session: Session | None = None
        self._strikes = Strikes(store.breaker_retry_seconds)
        self._versions = {self._version}
        self._joining = threading.Lock()
        self._closing = threading.Event()
        self._ended = threading.Event()
        """Publishing has to stop."""
        self._first_turn = threading.Event()
        self._threads: list[threading.Thread] = []
        self._access_at = 0.0

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
        return self._session

    @property
    def settings(self) -> FolderSettings:
        """Of the folder, once the tier was opened."""
        assert self._settings is not None, f"tier {self.name} is not open"
        return self._settings

    # Opening

    def open(self) -> OpenReport:
        """Raises OSError also where the medium does not answer within the deadline."""
        started = time.monotonic()
        settings = self._settings = _within(self._store.io_deadline_seconds, self._enter)
        self._writer = ExtentWriter(
            slots=max(1, slots_within(settings.extent_bytes, self._stride)),
            stride=self._stride,
            namespace=self._namespace.digest,
            berth=lambda: self._session,
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
        self._watcher = Watcher(
            self._medium,
            self._catalog,
            self.telemetry,
            tier=self.name,
            lease_seconds=settings.lease_seconds,
            watch=self.reads.watch,
            between=self._beat_if_due,
        )
        self._start_moving()
        self._opened = True
        self._start_threads()
        self._first_turn.wait(self._store.io_deadline_seconds)
        return OpenReport(
            settings.capacity_bytes // self._stride,
            self._index.resident_blocks,
            seconds=time.monotonic() - started,
            from_index=True,
        )

    def _start_threads(self) -> None:
        works: list[tuple[str, Callable[[], None]]] = [("member", self._live)]
        works += [(f"publish-{number}", self._publish) for number in range(self.publishers)]
        if self._config.collect:
            works.append(("collect", self._collect))
        self._threads = [
            threading.Thread(target=work, name=f"kvstrata-{self.name}-{name}", daemon=True)
            for name, work in works
        ]
        for thread in self._threads:
            thread.start()

    def _enter(self) -> FolderSettings:
        """The folder's settings, made now if nobody has. Raises OSError, FormatVersionError."""
        data = self._medium.fetch(SETTINGS_FILE)
        if data is None:
            self._medium.prepare()
            self._prepare_layout()
            self._medium.create(SETTINGS_FILE, self._own_settings().encode())
            data = self._medium.fetch(SETTINGS_FILE)
        settings = FolderSettings.decode(data or b"")
        if settings is None:
            time.sleep(SETTLE_SECONDS)
            settings = FolderSettings.decode(self._medium.fetch(SETTINGS_FILE) or b"")
        if settings is None:
            raise FormatVersionError(
                f"{SETTINGS_FILE} is not what kvstrata wrote; choose an empty folder, or delete this one",
                tier=self.name,
            )
        if settings.version != VERSION:
            raise FormatVersionError(
                f"the folder holds format {FORMAT} version {settings.version}, this kvstrata reads version "
                f"{VERSION}; use the kvstrata that wrote it, or choose an empty folder",
                tier=self.name,
            )
        self._compare(settings)
        return settings

    def _own_settings(self) -> FolderSettings:
        config = self._config
        room = config.capacity_bytes - reserve_bytes(config.capacity_bytes)
        most = max(room // EXTENTS_WANTED, extent_bytes(1, self._stride))
        return FolderSettings(
            folder=secrets.token_hex(8),
            capacity_bytes=config.capacity_bytes,
            extent_bytes=min(config.extent_bytes, most),
            lease_seconds=config.lease_seconds,
            made_by=self._version,
        )

    def _compare(self, settings: FolderSettings) -> None:
        """The folder's settings hold for all its members; whose configuration differs is told."""
        own = self._own_settings()
        for name in ("capacity_bytes", "extent_bytes", "lease_seconds"):
            mine, theirs = getattr(own, name), getattr(settings, name)
            if mine != theirs:
                self.telemetry.event(
                    f"{self.name} settings differ",
                    f"{name} is {mine} here and {theirs} in the folder, which holds; to change it, stop "
                    f"all members and delete {SETTINGS_FILE}",
                )

    def _check_place(self) -> None:
        """Is this still the folder that was opened? Raises OSError (ENODEV) if not."""
        data = self._medium.fetch(SETTINGS_FILE)
        found = FolderSettings.decode(data) if data is not None else None
        if data is None or (found is not None and found.folder != self.settings.folder):
            raise OSError(errno.ENODEV, f"{self._where()} is not there any more; is it mounted?")

    def _where(self) -> str:
        """The folder's name, for people."""
        return "the folder"

    # The member

    def _live(self) -> None:
        """A thread's life."""
        wait = min(self._config.refresh_seconds, self.settings.lease_seconds / 10)
        poll_at = 0.0
        while True:
            try:
                polling = time.monotonic() >= poll_at
                self._turn(polling)
                if polling:
                    poll_at = time.monotonic() + self._config.refresh_seconds
            except Exception:
                log.exception("kvstrata: tier %s: a turn of the member raised", self.name)
            self._first_turn.set()
            if self._closing.wait(wait):
                return

    def _turn(self, polling: bool) -> None:
        self._look_after_session()
        if polling:
            self._try(self.reads, self._poll, watch=nullcontext)  # it is watched call by call
        session = self._session
        if session is None:
            return
        self._try(self.reads, lambda: self._read_grants(session))
        self._try(self.writes, lambda: self._write_down(session))

    def _look_after_session(self) -> None:
        """Beat, and leave a session that others may hold for dead."""
        self._beat_if_due()
        session = self._session
        if session is not None and not session.may_write:
            expelled = session.left or session.room.expelled
            silent = f"no beat for {session.member.silent_seconds:.1f} s"
            self._leave(session, "others hold it for dead" if expelled else silent)
        if self._session is None and self.writes.closed:
            try:
                with self.writes.watch(count_errors=False):
                    self._join()
            except OSError as error:
                self.writes.trip(f"cannot join the folder, so it is only read: {error}")

    def _beat_if_due(self) -> None:
        session = self._session
        if session is not None and session.beat_due:
            self._try(self.writes, lambda: self._beat(session))

    def _beat(self, session: Session) -> None:
        try:
            session.beat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self._check_place()
            session.left = True  # somebody removed this member's folder

    def _join(self) -> None:
        """Become a member under a new id. Raises OSError."""
        with self._joining:
            if self._session is not None or self._closing.is_set():
                return
            beat = first_beat(
                self.settings,
                self._version,
                self._config.capacity_bytes,
                collect=self._config.collect,
            )
            self._check_place()
            self._session = Session(
                self._medium,
                self.settings,
                beat,
                self._catalog,
                access_bytes=self._config.access_bytes,
                burst_bytes=self._config.burst_bytes,
            )
            self._writer.ask_again()

    def _leave(self, session: Session, why: str) -> None:
        """What is being written under this id must not be published any more."""
        session.left = True
        with self._joining:
            if self._session is session:
                self._session = None
        self._writer.drop_all()
        self.telemetry.count("rejoins_total", self.name)
        self.telemetry.event(f"{self.name} joins anew", f"member {session.member.word}: {why}")

    def _poll(self) -> None:
        session = self._session
        me = session.member.id if session is not None else None

        def check(members: list[int]) -> None:
            if me is None or me not in members:
                self._check_place()

        round_ = self._watcher.poll(me, check)
        if session is not None:
            if me not in round_.members:
                session.left = True
            session.member.see(round_.members, round_.beats)
            self._compare_versions(session)

    def _compare_versions(self, session: Session) -> None:
        """Members of another kvstrata that reads the same format are welcome, and people are told."""
        for member in session.member.others():
            beat = session.member.seen_beat(member)
            if beat is None or beat.version in self._versions or len(self._versions) >= VERSIONS_TOLD:
                continue
            self._versions.add(beat.version)
            self.telemetry.event(
                f"{self.name} other version",
                f"member {beat.member} on {beat.host} runs kvstrata {beat.version or 'unknown'}, this one "
                f"{self._version or 'unknown'}; both read format version {VERSION}",
            )

    def _read_grants(self, session: Session) -> None:
        if read_grants(self._medium, session.room) is Standing.CHANGED:
            self._writer.ask_again()
            self._try(self.writes, lambda: self._beat(session))

    def _write_down(self, session: Session) -> None:
        session.journal.flush()
        if time.monotonic() >= self._access_at:
            self._access_at = time.monotonic() + self._config.access_seconds
            session.access.flush()
        session.compact()

    def _try(
        self,
        breaker: Breaker,
        work: Callable[[], None],
        watch: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> bool:
        """Do what may fail or hang, unless it is known to. An error is counted and survived."""
        if not breaker.closed:
            return False
        try:
            with (watch or breaker.watch)():
                work()
        except OSError as error:
            if error.errno == errno.ENODEV:
                for each in (self.reads, self.writes):
                    each.trip(str(error))
            return False
        return True

    def _touched(self, request: int, words: NDArray[np.uint64]) -> None:
        session = self._session
        if session is not None:
            session.access.touch(request, words)

    # Collecting

    def _collect(self) -> None:
        """A thread's life."""
        session: Session | None = None
        collector: Collector | None = None
        while not self._closing.wait(self._config.refresh_seconds):
            try:
                if session is not self._session:
                    session = self._session
                    collector = None if session is None else self._make_collector(session)
                if collector is not None and self.reads.closed and self.writes.closed:
                    collector.cycle()
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, "unknown")
                self.telemetry.count("io_errors_total", self.name, "collect", name)
            except Exception:
                log.exception("kvstrata: tier %s: collecting raised", self.name)
        if collector is not None:
            try:
                collector.close()
            except OSError as error:
                log.warning(
                    "kvstrata: tier %s: the collector's epoch was not given up: %s", self.name, error
                )

    def _make_collector(self, session: Session) -> Collector:
        return Collector(
            self._medium,
            session.member,
            self._catalog,
            session.journal,
            self.settings,
            self._config,
            self.telemetry,
            self.name,
        )

    # Publishing

    def _publish(self) -> None:
        """A thread's life."""
        wait = min(PUBLISHER_WAIT_SECONDS, self._config.publish_seconds)
        while not self._ended.is_set():
            self._writer.close_old(self._config.publish_seconds)
            extent = self._writer.next_done(wait)
            if extent is None:
                continue
            try:
                self._publish_one(extent)
            except Exception:
                log.exception("kvstrata: tier %s: publishing raised", self.name)

    def _publish_one(self, extent: OpenExtent) -> None:
        session = self._session
        footer = extent.footer()
        mine = session is not None and session.member.id == extent.id.member and session.may_write
        if session is None or not mine or extent.dropped or not len(footer.entries):
            self._give_up(extent, len(footer.entries))
            return
        try:
            with self._watch_publishing():
                file_bytes = self._finish_extent(extent, footer.encode())
        except OSError as error:
            self.telemetry.event(f"{self.name} extent not published", f"{extent.id.name}: {error}")
            self._give_up(extent, len(footer.entries))
            return
        extent.published = True
        self.telemetry.count("published_extents_total", self.name)
        self.telemetry.count("published_bytes_total", self.name, by=file_bytes)
        added = Added(extent.id, file_bytes, self._stride, self._namespace.digest, footer.entries)
        try:
            with self.writes.watch():
                session.journal.add([added])
        except OSError as error:  # it waits in the journal, and is tried again
            self.telemetry.event(f"{self.name} journal not written", f"{extent.id.name}: {error}")
        finally:
            self._writer.close(extent, file_bytes)

    def _watch_publishing(self) -> AbstractContextManager[None]:
        """What a whole extent may cost, for the breaker of writes."""
        return self.writes.watch()

    def _give_up(self, extent: OpenExtent, blocks: int) -> None:
        """An extent that will not be published: its blocks and its file go."""
        self.table.forget(extent.id)
        self.telemetry.count("unpublished_blocks_total", self.name, by=blocks)
        try:
            with self.writes.watch(count_errors=False):
                self._drop_extent(extent)
        except OSError as error:
            self.telemetry.event(f"{self.name} part left behind", f"{extent.id.part}: {error}")
        self._writer.close(extent, 0)

    # What the catalog hears

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

    # What a kind of shared tier does

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
        session = self._session
        if session is None:
            self._join()
        else:
            self._beat(session)

    def flush(self) -> None:
        if not self.flush_by(time.monotonic() + self._store.io_deadline_seconds):
            raise OSError(errno.ETIMEDOUT, "the extents were not published in time")

    def flush_by(self, until: float) -> bool:
        """Publishes what is being written, whatever its size."""
        self._writer.close_old(0.0)
        if not self._writer.wait_published(until):
            return False
        session = self._session
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
        session = self._session
        if session is not None and self.writes.closed:
            try:
                session.journal.flush()
                session.access.flush()
                session.beat(state="closed")
            except OSError as error:
                log.warning("kvstrata: tier %s: no goodbye was left: %s", self.name, error)
        self._stop_moving()

    @abstractmethod
    def _stop_moving(self) -> None:
        """Let go of everything, after a clean end of all I/O."""

    def used_bytes_on_medium(self) -> int:
        folders = [EXTENTS, WRITING, COLLECTOR]
        folders += [f"{MEMBERS}/{word}" for word in self._medium.folders(MEMBERS)]
        return sum(sum(self._medium.names(folder).values()) for folder in folders)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Run what may hang on a thread of its own, for so long. Raises what it raises, or OSError."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="kvstrata-open", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise OSError(errno.ETIMEDOUT, f"no answer for {seconds:g} s")
    return results[0]
