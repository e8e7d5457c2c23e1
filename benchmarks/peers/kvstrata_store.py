"""Ours: a BlockStore with a single tier, checksums on, through its public calls."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest
from kvstrata.config import MIB, parse_config
from kvstrata.tiers import base
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.transfer.engine import EngineSettings
from kvstrata.transfer.handle import Transfer
from kvstrata.types import BlockKey, Namespace, Outcome
from peers.base import Peer, PeerError, Shape

BLOCK_TOKENS = 16
SECONDS = 600.0
OVERHEAD_LOADS = 10
NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))
GOOD = {Outcome.LOADED, Outcome.SAVED}


class Chain(NamedTuple):
    """Blocks as an engine holds them: keys, root first, and the numbers of their rows in its memory."""

    keys: list[BlockKey]
    rows: NDArray[np.int64]


def save(store: BlockStore, memory: Region, chain: Chain) -> Transfer:
    """The caller's part of a save."""
    return store.save(chain.keys, memory.rows(chain.rows))


def load(store: BlockStore, memory: Region, chain: Chain) -> Transfer:
    """The caller's part of a load, with the look-up that every engine does before."""
    return store.load(store.lookup(chain.keys), memory.rows(chain.rows))


class KvstrataStore(Peer):
    """options: tier is "nvme" (default) or "memory"; io_engine as in the configuration; priority False
    switches off, in this process, what lets loads overtake stores: no configuration does that.
    """

    PACKAGES = ("kvstrata", "numpy", "numba", "xxhash")
    FILLS = 3  # so that every slot was written once

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        size = shape.block_bytes
        # Room for two runs and what a slot has beside its bytes: a third run evicts the first.
        capacity = 2 * shape.blocks * (size + 16_384) + 16 * MIB
        tier: dict[str, Any] = {"type": "memory", "capacity_bytes": capacity}
        if shape.options.get("tier", "nvme") == "nvme":
            path = str(shape.folder / "kvstrata")
            tier = {"type": "nvme", "path": path, "capacity_bytes": capacity}
        store: dict[str, Any] = {
            "io_deadline_seconds": SECONDS,
            "close_seconds": SECONDS,
            "queue_bytes": 4 * shape.blocks * size,
        }
        if "io_engine" in shape.options:
            store["io_engine"] = shape.options["io_engine"]
        if not shape.options.get("priority", True):
            base.EngineSettings = partial(EngineSettings, priority=False)  # type: ignore[misc,assignment]
        config = parse_config({"store": store, "tier": [tier]})
        self.store = BlockStore(config, BlockLayout(size, BLOCK_TOKENS), NAMESPACE)
        self.memory = Region(arena.view, size)
        self._keys: dict[int, list[BlockKey]] = {}

    def _chain(self, run: int) -> list[BlockKey]:
        """Keys of the blocks [run * blocks, (run + 1) * blocks): one request's chain."""
        if run not in self._keys:
            while len(self._keys) > 8:
                self._keys.pop(next(iter(self._keys)))
            tokens = np.arange(self.shape.blocks * BLOCK_TOKENS) % 50_000
            tokens[0] = 50_000 + run
            self._keys[run] = chain_keys(NAMESPACE.digest, tokens, BLOCK_TOKENS)
        return self._keys[run]

    def plan(self, blocks: Sequence[int]) -> Chain:
        runs, rows = np.divmod(np.asarray(blocks, dtype=np.int64), self.shape.blocks)
        places = zip(runs.tolist(), rows.tolist(), strict=True)
        return Chain([self._chain(run)[row] for run, row in places], rows)

    def start_save(self, plan: Chain) -> Transfer:
        return save(self.store, self.memory, plan)

    def start_load(self, plan: Chain) -> Transfer:
        return load(self.store, self.memory, plan)

    def wait(self, tickets: Sequence[Transfer]) -> None:
        for transfer in tickets:
            if not transfer.wait() or not transfer.wait_released(SECONDS):
                raise PeerError("a transfer did not end")
            if bad := set(transfer.outcomes) - GOOD:
                raise PeerError(f"blocks were {', '.join(sorted(outcome.value for outcome in bad))}")

    def sync(self) -> None:
        if not self.store.flush(SECONDS):
            raise PeerError("flush failed")

    def keep(self, plan: Chain) -> None:
        self.store.touch(plan.keys)

    def views_seconds(self, plan: Chain) -> float:
        """Seconds of handing out views of blocks in memory, and taking them back."""
        started = time.perf_counter()
        with self.store.views(plan.keys) as views:
            there = all(view is not None for view in views)
        seconds = time.perf_counter() - started
        if not there:
            raise PeerError("a block is not in the memory tier")
        return seconds

    def overhead(self, plan: Chain) -> dict[str, float]:
        """CPU seconds of one load of a batch: of the calling thread, and of the whole process.

        The process's user time holds the checksum, and the copy of a memory tier, beside all Python.
        """
        times, mine = os.times(), time.thread_time()
        for _ in range(OVERHEAD_LOADS):  # the kernel counts user and system time in ticks
            self.wait([self.start_load(plan)])
        thread, now = time.thread_time() - mine, os.times()
        seconds = {"thread": thread, "user": now.user - times.user, "system": now.system - times.system}
        return {name: value / OVERHEAD_LOADS for name, value in seconds.items()}

    def allocated(self, plan: Chain) -> dict[str, int]:
        """Bytes that Python holds at the peak of a load beyond those before, and after it."""
        self.wait([self.start_load(plan)])
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            self.wait([self.start_load(plan)])
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return {"peak": peak - before, "kept": after - before}

    def close(self) -> None:
        self.store.close()
