"""How long an nvme tier takes to open and to close: after a clean close, and after its process was killed.

Small blocks make the number of slots, not of bytes, what is measured; `--block-bytes` takes real ones. The
ways in turn, on one folder; one of them reads slot headers through Python's file calls, as the tests that
make disks fail do: what it is worth to read them in compiled code.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest
from kvstrata.config import Config, NvmeTierConfig
from kvstrata.tiers.nvme_format import INDEX_ENTRY_DTYPE, slot_stride
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import Namespace

NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))
BLOCK_TOKENS, BATCH = 16, 2_500
SPARE_BYTES = 8 << 20
"""Of capacity, for the tier's own files."""
OPEN_AND_DIE = "--open-and-die"
INDEX, SCAN, SCAN_IN_PYTHON = (
    "index, after a clean close",
    "scan, after kill -9",
    "scan, Python's file calls",
)


class PythonIO(FileIO):
    """Not `FileIO` itself, so every header is read through this method."""

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        return super().read(fd, views, offset)


class Folder:
    """A folder with `blocks` blocks in it."""

    def __init__(self, path: Path, blocks: int, block_bytes: int) -> None:
        self.path = path
        self.blocks = blocks
        self.block_bytes = block_bytes
        self.slots = 0
        self.closes: list[float] = []

    def store(self, file_io: FileIO | None = None) -> BlockStore:
        capacity = self.blocks * (slot_stride(self.block_bytes) + INDEX_ENTRY_DTYPE.itemsize) + SPARE_BYTES
        tier = NvmeTierConfig(path=str(self.path), capacity_bytes=capacity)
        layout = BlockLayout(self.block_bytes, BLOCK_TOKENS)
        return BlockStore(Config(tiers=(tier,)), layout, NAMESPACE, file_io=file_io)

    def fill(self) -> None:
        tokens = np.arange(self.blocks * BLOCK_TOKENS) % 50_000
        keys = chain_keys(NAMESPACE.digest, tokens, BLOCK_TOKENS)
        source = memoryview(os.urandom(self.block_bytes))
        with self.store() as store:
            for start in range(0, self.blocks, BATCH):
                part = keys[start : start + BATCH]
                store.save(part, [source] * len(part)).wait()

    def open_and_close(self, *, from_index: bool, file_io: FileIO | None = None) -> float:
        """Seconds to open; the seconds to close go to `closes`."""
        store = self.store(file_io)
        report = store.status()[0].open_report
        assert report is not None
        assert report.restored == self.blocks and report.from_index is from_index
        self.slots = report.slots
        self.closes.append(timed(store.close))
        return report.seconds

    def open_and_die(self, cache: str | None = None) -> float:
        """Seconds to open in a process that is killed then. cache: where it keeps compiled kernels."""
        environment = os.environ | ({"NUMBA_CACHE_DIR": cache} if cache else {})
        done = subprocess.run(
            [sys.executable, __file__, OPEN_AND_DIE, self.path, str(self.blocks), str(self.block_bytes)],
            env=environment,
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL
        return float(done.stdout)


def open_and_die(path: str, blocks: str, block_bytes: str) -> None:
    store = Folder(Path(path), int(blocks), int(block_bytes)).store()
    report = store.status()[0].open_report
    assert report is not None
    print(report.seconds, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def first_starts(folder: Folder) -> dict[str, float]:
    """Seconds to open in new processes, with no kernel compiled yet and with all of them."""
    seconds = {}
    for way in ("index", "scan"):
        with tempfile.TemporaryDirectory() as empty:
            seconds[f"{way}, on a fresh installation"] = folder.open_and_die(empty)
    seconds["scan, in a new process"] = folder.open_and_die()
    folder.open_and_close(from_index=False)
    seconds["index, in a new process"] = folder.open_and_die()
    return seconds


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "opening")
    arguments.add_argument("--blocks", type=int, default=100_000)
    arguments.add_argument("--block-bytes", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--dir", type=Path, default=Path(), help="where the folder is made")
    options = arguments.parse_args()

    def after_kill(file_io: FileIO | None = None) -> float:
        folder.open_and_die()
        return folder.open_and_close(from_index=False, file_io=file_io)

    result: dict[str, Any] = {"benchmark": "opening", "machine": machine(["kvstrata", "numpy", "numba"])}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Folder(Path(name), options.blocks, options.block_bytes)
        folder.fill()
        sides = in_turn(
            {
                INDEX: lambda: folder.open_and_close(from_index=True),
                SCAN: after_kill,
                SCAN_IN_PYTHON: lambda: after_kill(PythonIO()),
            },
            options.rounds,
        )
        closes = folder.closes[len(sides) :]
        starts = first_starts(folder)
    seconds = {side: spread(values) for side, values in sides.items()} | {"close": spread(closes)}
    result |= {
        "slots": folder.slots,
        "blocks": options.blocks,
        "block_bytes": options.block_bytes,
        "rounds": options.rounds,
        "seconds": seconds,
        "scan_over_index": pair_ratio(sides[SCAN], sides[INDEX]),
        "python_over_compiled_scan": pair_ratio(sides[SCAN_IN_PYTHON], sides[SCAN]),
        "one_start_seconds": starts,
    }
    show(
        f"Opening {folder.slots:,} slots with {options.blocks:,} blocks of {options.block_bytes:,} bytes",
        ["way", "median s", "best s"],
        [[side, f"{part['median']:.3f}", f"{part['best']:.3f}"] for side, part in seconds.items()]
        + [[f"once: {way}", f"{took:.3f}", ""] for way, took in starts.items()],
    )
    write_json(options.json, result)


if __name__ == "__main__":
    if sys.argv[1:2] == [OPEN_AND_DIE]:
        open_and_die(*sys.argv[2:])
    else:
        main()
