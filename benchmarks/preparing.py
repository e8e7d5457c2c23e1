"""What it is worth to write segments through once before there are blocks.

The same blocks are saved in new folders: into segments that are made when needed, into segments that were
prepared before, and while segments are prepared one ahead. Each side fills its folder once, durably.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest
from kvstrata.config import Config, NvmeTierConfig, StoreConfig
from kvstrata.telemetry import Telemetry
from kvstrata.tiers import NvmeTier
from kvstrata.tiers.nvme_format import slot_stride
from kvstrata.transfer.buffers import Arena
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import Namespace, Outcome

NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))
BLOCK_BYTES = (131_072, 1 << 20, 4 << 20)
BATCH_BYTES = 256 << 20
NEEDED, PREPARED, AHEAD = "made when needed", "prepared before", "prepared one ahead, meanwhile"


class Workload:
    """The blocks of one size that every side saves: `total_bytes` of them, from memory touched before."""

    def __init__(self, parent: Path, arena: Arena, block_bytes: int, total_bytes: int) -> None:
        self.parent = parent
        self.blocks = total_bytes // block_bytes
        batch = max(1, BATCH_BYTES // block_bytes)
        self.sources = [arena.view[at * block_bytes : (at + 1) * block_bytes] for at in range(batch)]
        keys = chain_keys(NAMESPACE.digest, np.arange(self.blocks) % 50_000, 1)
        self.batches = [keys[at : at + batch] for at in range(0, self.blocks, batch)]
        self.layout = BlockLayout(block_bytes, 1)
        self.settings = StoreConfig(
            io_deadline_seconds=600.0, queue_bytes=1 << 40, queue_blocks=self.blocks, close_seconds=600.0
        )
        # Room for a little more than the blocks, so that nothing is evicted.
        capacity = int(self.blocks * (slot_stride(block_bytes) + 72) * 1.1) + (16 << 20)
        self.tier = NvmeTierConfig(capacity_bytes=capacity, segment_bytes=128 << 20)

    def save(self, *, prepare: str) -> float:
        """Seconds to save every block in a new folder, flush included; preparing before is not."""
        with tempfile.TemporaryDirectory(dir=self.parent) as name:
            tier = dataclasses.replace(self.tier, path=name, prepare="no")
            if prepare == PREPARED:
                self._prepare(tier)
            if prepare == AHEAD:
                tier = dataclasses.replace(tier, prepare="ahead")
            with BlockStore(Config(tiers=(tier,), store=self.settings), self.layout, NAMESPACE) as store:
                return timed(lambda: self._save(store))

    def _prepare(self, config: NvmeTierConfig) -> None:
        tier = NvmeTier(config, self.layout, NAMESPACE, self.settings, Telemetry(), FileIO())
        tier.open()
        tier.prepare_all(lambda done, of: None)
        tier.close(clean=True)

    def _save(self, store: BlockStore) -> None:
        for keys in self.batches:
            transfer = store.save(keys, self.sources[: len(keys)])
            transfer.wait()
            assert set(transfer.outcomes) == {Outcome.SAVED}
        assert store.flush()


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "preparing")
    arguments.add_argument("--gib", type=float, default=1.0, help="of blocks, per side and round")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--dir", type=Path, default=Path(), help="where the folders are made")
    options = arguments.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)

    total = int(options.gib * (1 << 30))
    arena = Arena(BATCH_BYTES)
    arena.view[:] = np.random.default_rng(1).bytes(BATCH_BYTES)
    result: dict[str, Any] = {"benchmark": "preparing", "machine": machine(["kvstrata", "numpy", "numba"])}
    cells: list[dict[str, Any]] = []
    for block_bytes in BLOCK_BYTES:
        work = Workload(options.dir, arena, block_bytes, total)
        sides = in_turn(
            {side: partial(work.save, prepare=side) for side in (NEEDED, PREPARED, AHEAD)},
            options.rounds,
        )
        written = work.blocks * block_bytes / 1e9
        cells.append(
            {
                "block_bytes": block_bytes,
                "gigabytes": written,
                "gigabytes_per_second": {
                    side: spread([written / took for took in values])["median"]
                    for side, values in sides.items()
                },
                "prepared_over_needed": pair_ratio(sides[NEEDED], sides[PREPARED]),
                "ahead_over_needed": pair_ratio(sides[NEEDED], sides[AHEAD]),
            }
        )
    result |= {"rounds": options.rounds, "cells": cells}
    show(
        f"Saving {options.gib:g} GiB of blocks into new segments, GB/s",
        ["block KiB", NEEDED, PREPARED, "ratio", AHEAD, "ratio"],
        [
            [
                f"{cell['block_bytes'] >> 10}",
                f"{cell['gigabytes_per_second'][NEEDED]:.2f}",
                f"{cell['gigabytes_per_second'][PREPARED]:.2f}",
                f"{cell['prepared_over_needed']:.2f}",
                f"{cell['gigabytes_per_second'][AHEAD]:.2f}",
                f"{cell['ahead_over_needed']:.2f}",
            ]
            for cell in cells
        ],
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
