"""LMCache's local disk back-end (a file per block), without its engine.

It loads into memory that it allocates itself; here its allocator hands out the rows of the arena.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from kvstrata.transfer.buffers import Arena
from peers.base import Peer, PeerError, Shape
from peers.lmcache_memory import memory_objects

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

SECONDS = 120.0
NO_LIMIT_GIB = 1024
"""What is not wanted any more is removed by the benchmark."""


class Objects(NamedTuple):
    keys: list[Any]
    objects: list[Any]


class Saving(NamedTuple):
    left: threading.Semaphore
    count: int


class Loading(NamedTuple):
    future: Any
    count: int


class _Rows:
    """Stands where the back-end expects its memory: gives the rows of the load that comes next."""

    def __init__(self) -> None:
        self.coming: deque[Any] = deque()

    def allocate(self, *shape: Any) -> Any:
        return self.coming.popleft()


class LmcacheDisk(Peer):
    """O_DIRECT, as many I/O threads as the depth says."""

    PACKAGES = ("lmcache", "torch")

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        import torch  # noqa: PLC0415
        from lmcache.utils import CacheEngineKey  # noqa: PLC0415
        from lmcache.v1.config import LMCacheEngineConfig  # noqa: PLC0415
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend  # noqa: PLC0415

        folder = shape.folder / "lmcache_disk"
        folder.mkdir()
        self._key, self._dtype = CacheEngineKey, torch.uint8
        self.objects = memory_objects(arena, shape)
        self.memory = _Rows()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        config = LMCacheEngineConfig.from_defaults(
            local_disk=f"file://{folder}/",
            max_local_disk_size=NO_LIMIT_GIB,
            extra_config={"use_odirect": True, "disk_io_threads": shape.depth},
        )
        self.disk = LocalDiskBackend(config, self.loop, self.memory, dst_device="cpu")
        self.pool = ThreadPoolExecutor(1)

    def plan(self, blocks: Sequence[int]) -> Objects:
        keys = [self._key("benchmark", 1, 0, n + 1, self._dtype) for n in blocks]
        return Objects(keys, [self.objects[n % self.shape.blocks] for n in blocks])

    def start_save(self, plan: Objects) -> Saving:
        left = threading.Semaphore(0)
        self.disk.batched_submit_put_task(
            plan.keys, plan.objects, on_complete_callback=lambda key: left.release()
        )
        return Saving(left, len(plan.keys))

    def start_load(self, plan: Objects) -> Loading:
        def run() -> list[Any]:
            self.memory.coming.extend(plan.objects)
            return self.disk.batched_get_blocking(plan.keys)

        return Loading(self.pool.submit(run), len(plan.keys))

    def wait(self, tickets: Sequence[Saving | Loading]) -> None:
        for ticket in tickets:
            if isinstance(ticket, Loading):
                if sum(loaded is not None for loaded in ticket.future.result()) != ticket.count:
                    raise PeerError("a block was not loaded")
                continue
            for _ in range(ticket.count):
                if not ticket.left.acquire(timeout=SECONDS):
                    raise PeerError("a block was not saved")

    def forget(self, plan: Objects) -> None:
        for key in plan.keys:
            self.disk.remove(key)

    def close(self) -> None:
        self.pool.shutdown()
        asyncio.run_coroutine_threadsafe(_end_others(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


async def _end_others() -> None:
    """Cancel what the back-end left running on its loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
