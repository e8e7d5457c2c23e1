"""How long an nvme tier takes to open: from the index of a clean close, and by reading every slot header.

Small blocks make the number of slots, not of bytes, what is measured. Both ways in turn, on one folder.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, write_json
from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest
from kvstrata.config import Config, NvmeTierConfig
from kvstrata.tiers.nvme_format import INDEX_FILE
from kvstrata.types import Namespace

NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))
BLOCK_BYTES, BLOCK_TOKENS, BATCH = 4096, 16, 5_000


def fill(folder: Path, blocks: int, capacity: int) -> None:
    """Save `blocks` small blocks and close."""
    keys = chain_keys(NAMESPACE.digest, np.arange(blocks * BLOCK_TOKENS) % 50_000, BLOCK_TOKENS)
    source = memoryview(os.urandom(BLOCK_BYTES))
    with opened(folder, capacity) as store:
        for start in range(0, blocks, BATCH):
            part = keys[start : start + BATCH]
            store.save(part, [source] * len(part)).wait()


def opened(folder: Path, capacity: int) -> BlockStore:
    tier = NvmeTierConfig(path=str(folder), capacity_bytes=capacity)
    return BlockStore(Config(tiers=(tier,)), BlockLayout(BLOCK_BYTES, BLOCK_TOKENS), NAMESPACE)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "opening")
    arguments.add_argument("--blocks", type=int, default=50_000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--dir", type=Path, default=Path(), help="where the folder is made")
    options = arguments.parse_args()
    capacity = options.blocks * 9_400 + (1 << 20)
    slots = 0

    def seconds(*, scan: bool) -> float:
        nonlocal slots
        if scan:
            (folder / INDEX_FILE).unlink()
        with opened(folder, capacity) as store:
            report = store.status()[0].open_report
            assert report is not None
            assert report.restored == options.blocks and report.from_index is not scan
            slots = report.slots
            return report.seconds

    result: dict[str, Any] = {"benchmark": "opening", "machine": machine(["kvstrata", "numpy", "numba"])}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        fill(folder, options.blocks, capacity)
        sides = in_turn(
            {"index": lambda: seconds(scan=False), "scan": lambda: seconds(scan=True)}, options.rounds
        )
    ratio = pair_ratio(sides["scan"], sides["index"])
    result |= {
        "slots": slots,
        "blocks": options.blocks,
        "rounds": options.rounds,
        "seconds": {side: spread(values) for side, values in sides.items()},
        "scan_over_index": ratio,
    }
    show(
        f"Opening {slots} slots with {options.blocks} blocks",
        ["way", "median s"],
        [[side, f"{spread(values)['median']:.2f}"] for side, values in sides.items()],
    )
    print(f"scan / index: {ratio:.1f}")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
