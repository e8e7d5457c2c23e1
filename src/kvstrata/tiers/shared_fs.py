"""The shared_fs tier: extents as files of one folder that several machines mount.

A part file grows under `writing` while this member writes it, and is renamed into `extents` when it is
whole and durable; nobody changes it after that. Blocks move by the I/O engine, as those of the nvme tier
do, so that neighbours go together. Files are opened on threads of their own, and a bounded number stays
open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from kvstrata.config import SharedFsTierConfig, StoreConfig
from kvstrata.table import Placements, unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.engine_tier import EngineTier
from kvstrata.tiers.shared import lustre
from kvstrata.tiers.shared.descriptors import Descriptors
from kvstrata.tiers.shared.extents import OpenExtent
from kvstrata.tiers.shared.format import EXTENTS, WRITING, ExtentId
from kvstrata.tiers.shared.medium import MISSING, PosixMedium, occupied_bytes
from kvstrata.tiers.shared.openers import Openers
from kvstrata.tiers.shared.places import Place
from kvstrata.tiers.shared.tier import SharedTier
from kvstrata.tiers.shared.waiting import HeldBatch, Hold, Waiting, set_file
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, Buffers, round_up
from kvstrata.transfer.engine import Engine, OnDone, Rows
from kvstrata.transfer.file_io import FileIO, is_plain
from kvstrata.transfer.handle import Batches, Cancellable
from kvstrata.transfer.mover import Mover
from kvstrata.transfer.nixl_mover import NixlMover, NixlSettings
from kvstrata.types import BlockLayout, Namespace


class SharedFsTier(SharedTier, EngineTier):
    """Every process that opens the folder is a member; none of them is needed by the others."""

    name: ClassVar[str] = "shared_fs"

    def __init__(
        self,
        config: SharedFsTierConfig,
        layout: BlockLayout,
        namespace: Namespace,
        store: StoreConfig,
        telemetry: Telemetry,
        io: FileIO,
    ) -> None:
        self.folder = Path(config.path).expanduser()
        super().__init__(config, layout, namespace, store, telemetry, PosixMedium(self.folder))
        self._fs_config = config
        self._io = io
        self._payload_bytes = round_up(layout.block_bytes, PAGE)
        self._direct_writes = self._direct_reads = config.direct_io
        self._reads_tried = self._writes_tried = False
        self._making = threading.Lock()
        self._openers: Openers | None = None
        self._files = Descriptors(config.open_files, self._close_later)

    # Opening and closing

    def _where(self) -> str:
        return str(self.folder)

    def _prepare_layout(self) -> None:
        for note in lustre.lay_out(self.folder, self._fs_config):
            self.telemetry.event(f"{self.name} layout", note)

    def _start_moving(self) -> None:
        store = self._store
        self._openers = Openers(f"kvstrata-{self.name}", self._fs_config.open_threads)
        name = f"kvstrata-{self.name}"
        # Network file systems block in their own code: threads serve them as well as io_uring.
        settings = self._engine_settings("threads", store.io_threads, store.io_store_threads)
        mover: Mover
        if self._fs_config.mover == "nixl" and is_plain(self._io):
            mover = NixlMover(
                name,
                NixlSettings(capacity=settings.capacity),
                payload_bytes=self._payload_bytes,
                space=self._namespace.digest,
            )
        else:
            mover = Engine(
                name,
                settings,
                stride=self._stride,
                payload_bytes=self._payload_bytes,
                space=self._namespace.digest,
                file_io=self._io,
            )
        self._start_engine(mover)

    def _stop_moving(self) -> None:
        for fd in self._files.take_all():
            self._close(fd)

    @property
    def queued(self) -> tuple[int, int]:
        loads, stores = super().queued
        return loads + (self._openers.queued if self._openers else 0), stores

    def drain(self, seconds: float) -> bool:
        return (self._openers is None or self._openers.drain(seconds)) and super().drain(seconds)

    def stop(self, seconds: float) -> bool:
        if self._stopped:
            return True
        opened = self._openers is None or self._openers.close(seconds)
        return super().stop(seconds) and opened

    def _close_later(self, fd: int) -> None:
        if self._openers is None or not self._openers.submit(partial(self._close, fd)):
            self._close(fd)

    def _close(self, fd: int) -> None:
        """The descriptor is free afterwards, also where a broken mount answers an error."""
        with contextlib.suppress(OSError):
            self._io.close(fd)

    # Loading

    def _load_rows(self, placements: Placements, targets: Buffers) -> Rows:
        return self._rows(placements, targets, k.READ)

    def _rows(self, placements: Placements, buffers: Buffers, kind: int) -> Rows:
        """Rows whose FD is the number of the extent, until it is known which file that is."""
        numbers, extents = self._extents_of(placements)
        rows = np.zeros((len(placements), k.COLUMNS), dtype=np.int64)
        rows[:, k.KIND] = kind
        rows[:, k.FD] = numbers
        for number, extent in extents.items():
            rows[numbers == number, k.SEGMENT] = extent.segment
        rows[:, k.NUMBER] = placements.slots
        rows[:, k.OFFSET] = placements.slots * self._stride
        rows[:, k.KEY : k.KEY + 4] = placements.key_words()
        odd = (buffers.addresses % PAGE != 0) | (buffers.lengths % PAGE != 0)
        rows[:, k.FLAGS] = np.where(odd, k.BOUNCE, 0)
        return rows

    def _submit_load(self, rows: Rows, placements: Placements, finish: OnDone) -> Cancellable:
        def wait(extent: OpenExtent | Place, lacking: Rows) -> Waiting:
            waiting = self._waiting(
                partial(self._open_extent, extent.id), extent, lacking, loads=True, finish=finish
            )
            assert self._openers is not None
            if not self._openers.submit(waiting.run):
                waiting.run()  # the store closes: its engine refuses
            return waiting

        return self._submit(rows, placements, wait, loads=True, finish=finish)

    def _submit(
        self,
        rows: Rows,
        placements: Placements,
        wait: Callable[[OpenExtent | Place, Rows], Waiting],
        *,
        loads: bool,
        finish: OnDone,
    ) -> Cancellable:
        """What has a file goes to the engine in one batch; the rest waits until its file is open."""
        numbers, extents = rows[:, k.FD].copy(), self._extents_of(placements)[1]
        held: list[ExtentId] = []
        lacking: list[tuple[OpenExtent | Place, Rows]] = []
        there = np.ones(len(rows), dtype=np.bool_)
        for number, extent in extents.items():
            mine = numbers == number
            file = self._files.acquire(extent.id)
            if file is None:
                there[mine] = False
                lacking.append((extent, rows[mine]))
                continue
            held.append(extent.id)
            part = rows[mine]
            set_file(part, file[0], direct=file[1])
            rows[mine] = part
        batches: list[HeldBatch | Waiting] = []
        if held or not len(rows):
            hold = Hold(self._files, held, int(there.sum()), finish)
            batch = self._running.submit(rows[there], loads=loads, on_done=hold.done)
            batches.append(HeldBatch(batch, hold))
        batches += [wait(extent, part) for extent, part in lacking]
        return batches[0] if len(batches) == 1 else Batches(batches)

    def _waiting(
        self,
        open_file: Callable[[], tuple[int, bool]],
        extent: OpenExtent | Place,
        rows: Rows,
        *,
        loads: bool,
        finish: OnDone,
        refuse: OnDone | None = None,
    ) -> Waiting:
        return Waiting(
            open_file,
            extent.id,
            rows,
            self._running,
            self._files,
            loads=loads,
            finish=finish,
            refuse=refuse or finish,
        )

    def _open_extent(self, extent: ExtentId) -> tuple[int, bool]:
        """Open a published extent to read it. Raises OSError, k.GONE where it was collected."""
        known = self._files.acquire(extent)
        if known is not None:
            return known
        with self.reads.watch(count_errors=False):
            try:
                fd, direct = self._open_to_read(self.folder / extent.name)
            except OSError as error:
                if error.errno not in MISSING:
                    raise
                self._check_place()
                fd = -1
        if fd < 0:
            self._lost(extent)
            raise OSError(k.GONE, "the extent was collected")
        return self._files.add(extent, fd, direct=direct)

    def _open_to_read(self, path: Path) -> tuple[int, bool]:
        if self._direct_reads:
            try:
                fd = self._io.open_to_read(path, direct=True)
                if self._reads_tried or self._reads_direct(fd):
                    return fd, True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._direct_reads = False
            self.telemetry.event(f"{self.name} buffered", f"{self.folder} is not read with O_DIRECT")
        return self._io.open_to_read(path, direct=False), False

    def _reads_direct(self, fd: int) -> bool:
        """Some file systems take the flag and refuse the reads: try one, once."""
        try:
            self._io.read(fd, [Arena(PAGE).view], 0)
        except OSError as error:
            self._io.close(fd)
            if error.errno == errno.EINVAL:
                return False
            raise
        self._reads_tried = True
        return True

    def _loaded(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        failed = rows[:, k.RESULT] < 0
        if not failed.any():
            super()._loaded(on_done, owner, rows)
            return
        # A descriptor may be broken for ever, and its file well: the next load opens it anew.
        self._files.forget_segments(set(rows[failed, k.SEGMENT].tolist()))
        # ESTALE: the server has forgotten the file, mostly because the extent was collected while it was
        # open. That says nothing of the medium; opening it anew will tell whether it is gone.
        stale = rows[:, k.RESULT] == -errno.ESTALE
        self.telemetry.count("io_errors_total", self.name, "read", "ESTALE", by=int(stale.sum()))
        rows[stale, k.RESULT] = k.GONE
        self._account("read", self.reads, rows)
        rows[stale, k.RESULT] = -errno.ESTALE
        on_done(rows)

    # Saving

    def _save_rows(self, placements: Placements, sources: Buffers) -> Rows:
        rows = self._rows(placements, sources, k.WRITE)
        rows[:, k.SEQUENCE] = placements.sequences
        rows[:, k.CREATED_MS] = unix_ms()
        rows[:, k.EXPIRES_MS] = placements.expires_ms
        return rows

    def _submit_save(
        self, rows: Rows, placements: Placements, finish: OnDone, refuse: OnDone
    ) -> Cancellable:
        def wait(extent: OpenExtent | Place, lacking: Rows) -> Waiting:
            assert isinstance(extent, OpenExtent), "only what this member writes can be saved"
            make = partial(self._make_part, extent)
            waiting = self._waiting(make, extent, lacking, loads=False, finish=finish, refuse=refuse)
            self.upkeep.submit(waiting.run)
            return waiting

        return self._submit(rows, placements, wait, loads=False, finish=finish)

    def _begin_extent(self, extent: OpenExtent) -> bool:
        return True

    def _make_part(self, extent: OpenExtent) -> tuple[int, bool]:
        """The part file of an extent, made by whoever comes first. Raises OSError."""
        with self._making:
            known = self._files.acquire(extent.id)
            if known is not None:
                return known
            if extent.dropped:
                raise OSError(errno.ECANCELED, "this member was held for dead")
            with self.writes.watch():
                fd, direct = self._create(self.folder / extent.id.part)
            self._files.add(extent.id, fd, direct=direct)  # held until it is published or dropped
            extent.place = fd
            held = self._files.acquire(extent.id)
            assert held is not None
            return held

    def _create(self, path: Path) -> tuple[int, bool]:
        if self._direct_writes:
            try:
                fd = self._io.open(path, create=True, direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)  # some file systems make it, and refuse the flag then
            else:
                if self._writes_tried or self._writes_direct(fd, path):
                    return fd, True
            self._direct_writes = False
            self.telemetry.event(f"{self.name} buffered", f"{self.folder} is not written with O_DIRECT")
        return self._io.open(path, create=True, direct=False), False

    def _writes_direct(self, fd: int, path: Path) -> bool:
        """As `_reads_direct`, by the first page of a part file, which its first block overwrites."""
        try:
            self._io.write(fd, [Arena(PAGE).view], 0)
        except OSError as error:
            self._io.close(fd)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            if error.errno == errno.EINVAL:
                return False
            raise
        self._writes_tried = True
        return True

    def _finish_extent(self, extent: OpenExtent, footer: bytes) -> int:
        fd = extent.place
        arena = Arena(len(footer))
        arena.view[:] = footer
        start = extent.footer().start
        self._io.write(fd, [arena.view], start)
        # What was allocated ahead, and slots behind the last good one, are given back.
        os.ftruncate(fd, start + len(footer))
        self._io.sync(fd)
        occupied = occupied_bytes(os.fstat(fd))
        part, path = self.folder / extent.id.part, self.folder / extent.id.name
        self._io.rename(part, path)
        with contextlib.suppress(OSError):  # some file systems do not sync folders; the name is there
            self._io.sync_folder(self.folder / EXTENTS)
        self._files.release([extent.id])
        extent.place = None
        return occupied

    def _drop_extent(self, extent: OpenExtent) -> None:
        if extent.place is None:
            return
        extent.place = None
        self._files.forget([extent.id])
        self._files.release([extent.id])
        for path in (self.folder / extent.id.part, self.folder / extent.id.name):
            try:
                self._io.remove(path)
            except OSError as error:
                if error.errno not in MISSING:
                    raise

    def _extents_left(self, extents: list[ExtentId]) -> None:
        self._files.forget(extents)

    # Upkeep

    def probe_read(self) -> None:
        super().probe_read()
        self._files.forget_all()  # what was opened before the fault may be broken for ever

    def probe_write(self) -> None:
        super().probe_write()
        session = self.session
        if session is None:
            return
        path = self.folder / WRITING / f"{session.member.word}-probe"
        fd = self._io.open(path, create=True, direct=False)
        try:
            self._io.write(fd, [Arena(PAGE).view], 0)
            self._io.sync(fd)
        finally:
            self._io.close(fd)
            path.unlink(missing_ok=True)
