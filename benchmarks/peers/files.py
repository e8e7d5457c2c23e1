"""A file per block, as SGLang's file back-end and vLLM's fs tier keep them, written durably.

Write to a temporary name, fsync, rename; the folder is synced once per batch, because without that the
names may be lost. Two ways: through the page cache, and with O_DIRECT. One thread or several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kvstrata.transfer.buffers import Arena
from peers.base import Peer, PeerError, Shape, evict_file


class Entry(NamedTuple):
    path: Path
    row: memoryview


class Files(Peer):
    """options: direct, threads."""

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        self.folder = shape.folder / "files"
        self.folder.mkdir()
        self.flag = os.O_DIRECT if shape.options["direct"] else 0
        if self.flag:
            self.flag = self._direct_if_there()
        self.pool = ThreadPoolExecutor(shape.options["threads"])

    def _direct_if_there(self) -> int:
        probe = self.folder / "probe"
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600))
        except OSError:
            return 0
        finally:
            probe.unlink(missing_ok=True)
        return os.O_DIRECT

    def plan(self, blocks: Sequence[int]) -> list[Entry]:
        return [Entry(self.folder / f"{n:032x}.bin", self.rows[n % self.shape.blocks]) for n in blocks]

    def _submit(self, call: Callable[[Entry], None], plan: list[Entry]) -> list[Future[None]]:
        return [self.pool.submit(call, entry) for entry in plan]

    def start_save(self, plan: list[Entry]) -> list[Future[None]]:
        return self._submit(self._write, plan)

    def start_load(self, plan: list[Entry]) -> list[Future[None]]:
        return self._submit(self._read, plan)

    def _write(self, entry: Entry) -> None:
        new = entry.path.with_suffix(".tmp")
        fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | self.flag, 0o600)
        try:
            if os.write(fd, entry.row) != len(entry.row):
                raise PeerError(f"{entry.path.name}: short write")
            os.fsync(fd)
        finally:
            os.close(fd)
        new.rename(entry.path)

    def _read(self, entry: Entry) -> None:
        fd = os.open(entry.path, os.O_RDONLY | self.flag)
        try:
            if os.readv(fd, [entry.row]) != len(entry.row):
                raise PeerError(f"{entry.path.name}: short read")
        finally:
            os.close(fd)

    def wait(self, tickets: Sequence[list[Future[None]]]) -> None:
        for futures in tickets:
            for future in futures:
                future.result()

    def sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def forget(self, plan: list[Entry]) -> None:
        for entry in plan:
            entry.path.unlink(missing_ok=True)

    def drop_cache(self, plan: list[Entry]) -> None:
        if not self.flag:
            for entry in plan:
                evict_file(entry.path)

    def close(self) -> None:
        self.pool.shutdown()
