"""diskcache: a general cache of Python values in SQLite and files. It copies: values are bytes objects."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from kvstrata.transfer.buffers import Arena
from peers.base import Peer, PeerError, Shape, evict_file


class Entry(NamedTuple):
    key: int
    row: memoryview


class DiskCache(Peer):
    PACKAGES = ("diskcache",)

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        import diskcache  # noqa: PLC0415

        self.folder = shape.folder / "diskcache"
        self.cache = diskcache.Cache(str(self.folder), size_limit=8 * shape.blocks * shape.block_bytes)
        self.pool = ThreadPoolExecutor(shape.depth)

    def plan(self, blocks: Sequence[int]) -> list[Entry]:
        return [Entry(n, self.rows[n % self.shape.blocks]) for n in blocks]

    def start_save(self, plan: list[Entry]) -> list[Future[None]]:
        return [self.pool.submit(self._write, entry) for entry in plan]

    def start_load(self, plan: list[Entry]) -> list[Future[None]]:
        return [self.pool.submit(self._read, entry) for entry in plan]

    def _write(self, entry: Entry) -> None:
        self.cache.set(entry.key, bytes(entry.row))

    def _read(self, entry: Entry) -> None:
        value = self.cache.get(entry.key)
        if value is None:
            raise PeerError("a block was not loaded")
        entry.row[:] = value

    def wait(self, tickets: Sequence[list[Future[None]]]) -> None:
        for futures in tickets:
            for future in futures:
                future.result()

    def forget(self, plan: list[Entry]) -> None:
        with self.cache.transact():
            for entry in plan:
                self.cache.delete(entry.key)

    def drop_cache(self, plan: list[Entry]) -> None:
        for path in self.folder.rglob("*.val"):
            evict_file(path)

    def close(self) -> None:
        self.pool.shutdown()
        self.cache.close()
