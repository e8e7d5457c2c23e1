"""What a load or a save keeps in memory does not grow with its blocks: arrays do, their number does not.

A block of a store that is full takes the place of another one, so that in steady state nothing is left
of a call either. Counted are live blocks of Python's memory, of any size.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from faulty_io import FaultyIO
from kvstrata.store import BlockStore
from kvstrata.tiers import MemoryTier
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.transfer.handle import Transfer
from kvstrata.types import BlockKey, Outcome
from store_kit import WAIT_SECONDS, chain, check_quiet, finished, memory_tier, nvme_tier, open_store

FEW, MANY = 32, 512
BYTES = 8192
SPARE = 100
"""Live blocks that one call may have more than another: far below one per block."""
ROUNDS = 6


OF_AN_INT = 32
"""Bytes of a Python integer above 256."""


def live() -> int:
    """Blocks of memory that are allocated, but for those of the counting and of the file layer of tests.

    The table's integers are left out: it holds one per block that is there, and those up to 256 are
    Python's own, so that their number changes with which blocks are there.
    """
    gc.collect()
    mine = [tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, "*faulty_io.py")]
    traces = tracemalloc.take_snapshot().filter_traces(mine).traces
    return sum(
        trace.size > OF_AN_INT or not trace.traceback[0].filename.endswith("table.py") for trace in traces
    )


class Caller:
    """A store in steady state, and calls of two sizes."""

    def __init__(self, store: BlockStore, io: FaultyIO) -> None:
        self.store = store
        self.io = io
        self.region = Region(Arena(MANY * BYTES).view, BYTES)
        self.chains = iter([chain(number, MANY) for number in range(2, 40)])
        self.loaded = chain(1, MANY)

    def save(self, blocks: int) -> tuple[list[BlockKey], Transfer]:
        keys = next(self.chains)[:blocks]
        return keys, self.store.save(keys, self.region.rows(range(blocks)))

    def fill(self) -> None:
        """Until every block that comes takes another one's place, in every tier."""
        for _ in range(ROUNDS):
            finished(self.save(MANY)[1])
            assert self.store.flush()
        for tier in self.store.tiers:
            assert tier.table.resident_blocks == tier.table.slots

    def keep(self) -> None:
        """What is to be loaded is there, in the last tier only if there are two."""
        finished(self.store.save(self.loaded, self.region.rows(range(MANY))))
        assert self.store.flush()

    def costs(self, call: Iterator[Transfer]) -> tuple[int, int]:
        """Live blocks more while a call is on its way, and when all of it is over."""
        before = live() if tracemalloc.is_tracing() else 0
        transfer = next(call)
        if isinstance(self.store.tiers[0], MemoryTier):
            assert self.store.tiers[0].drain(WAIT_SECONDS)
        flying = live() if tracemalloc.is_tracing() else 0
        self.io.release()
        outcomes = finished(transfer)
        assert set(outcomes) in ({Outcome.LOADED}, {Outcome.SAVED})
        del transfer, outcomes
        next(call, None)
        check_quiet(self.store)
        return flying - before, (live() if tracemalloc.is_tracing() else 0) - before


@pytest.mark.parametrize("tiers", ["memory", "nvme", "memory above nvme"])
@pytest.mark.parametrize("op", ["load", "save"])
def test_nothing_is_kept_per_block(tiers: str, op: str, tmp_path: Path) -> None:
    io = FaultyIO()
    memory, nvme = memory_tier(MANY + 100), nvme_tier(tmp_path, 12 * 2**20)
    chosen = {"memory": [memory], "nvme": [nvme], "memory above nvme": [memory, nvme]}[tiers]
    with open_store(
        *chosen, file_io=io, io_threads=4, io_store_threads=2, io_deadline_seconds=600.0
    ) as store:
        caller = Caller(store, io)

        def load(blocks: int) -> Iterator[Transfer]:
            match = store.lookup(caller.loaded[:blocks])
            rows = caller.region.rows(range(blocks))
            io.hang("read")
            transfer = store.load(match, rows)
            yield transfer

        def save(blocks: int) -> Iterator[Transfer]:
            io.hang("write")
            _, transfer = caller.save(blocks)
            yield transfer

        caller.fill()
        if op == "load":
            caller.keep()
        calls = {"load": load, "save": save}[op]
        caller.costs(calls(MANY))
        tracemalloc.start(1)
        try:
            for blocks in (MANY, FEW):
                caller.costs(calls(blocks))
            few, few_left = caller.costs(calls(FEW))
            many, many_left = caller.costs(calls(MANY))
        finally:
            tracemalloc.stop()
        assert many - few <= SPARE, f"{many} live blocks for {MANY}, {few} for {FEW}"
        assert many_left <= SPARE and few_left <= SPARE, (many_left, few_left)
