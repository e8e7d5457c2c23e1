"""What a checksum costs: XXH3-64 by the compiled kernel and by the C library, alone and while copying.

Digest: the kernel `xxh3_64` against `xxhash.xxh3_64_intdigest`. Copy: numpy's copy alone, followed by a
digest of what was copied, and the kernel `copy_xxh3_64`, which does both in one pass. Every cell is
measured in the caches, as far as they hold it, with one block again and again, and cold, with blocks that
rotate over a gibibyte of huge pages on either side. One thread; all sides are called from Python, block by
block, and a call of a kernel from Python takes longer than one of the C library.

Start: seconds that a new process takes to make both kernels ready, without and with their machine code on
disk, Numba's own start excluded.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import numpy as np
import xxhash

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata.config import KIB, MIB
from kvstrata.transfer.buffers import Arena
from kvstrata.transfer.xxh3 import copy_xxh3_64, xxh3_64

BLOCK_SIZES = (128 * KIB, MIB, 4 * MIB, 16 * MIB)
OURS, THEIRS = "kvstrata digest", "xxhash digest"
COPY, COPY_OURS, COPY_THEIRS = "numpy copy", "numpy copy, kvstrata digest", "numpy copy, xxhash digest"
FUSED = "kvstrata copy with digest"

START = """
import time
import numba
numba.njit(lambda number: number + 1)(1)
from kvstrata.transfer.xxh3 import copy_xxh3_64, xxh3_64
started = time.perf_counter()
copy_xxh3_64(0, 0, 0)
xxh3_64(0, 0)
print(time.perf_counter() - started)
"""


class Space:
    """A source and a target of the same size, touched, cut into blocks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.source = np.frombuffer(Arena(size).view, np.uint8)
        self.target = np.frombuffer(Arena(size).view, np.uint8)
        self.source.view(np.uint64)[:] = np.arange(size // 8, dtype=np.uint64)
        self.target[:] = 0

    def sides(self, block: int, cold: bool, moved: int) -> dict[str, Callable[[], float]]:
        """Every side digests or copies `moved` bytes in blocks; cold, it goes on where the last one was."""
        places = range(0, self.size if cold else block, block)
        source = [(self.source[at : at + block], self.source.ctypes.data + at) for at in places]
        target = [(self.target[at : at + block], self.target.ctypes.data + at) for at in places]
        order = cycle(range(len(places)))

        def each(work: Callable[[int], object]) -> Callable[[], float]:
            def side() -> float:
                numbers = list(islice(order, moved // block))

                def run() -> None:
                    for number in numbers:
                        work(number)

                return timed(run)

            return side

        def copy(number: int) -> None:
            target[number][0][:] = source[number][0]

        def copy_ours(number: int) -> None:
            copy(number)
            xxh3_64(target[number][1], block)

        def copy_theirs(number: int) -> None:
            copy(number)
            xxhash.xxh3_64_intdigest(target[number][0])

        return {
            OURS: each(lambda number: xxh3_64(source[number][1], block)),
            THEIRS: each(lambda number: xxhash.xxh3_64_intdigest(source[number][0])),
            COPY: each(copy),
            COPY_OURS: each(copy_ours),
            COPY_THEIRS: each(copy_theirs),
            FUSED: each(lambda number: copy_xxh3_64(target[number][1], source[number][1], block)),
        }

    def check(self, block: int) -> None:
        """All sides agree on the digest, and the copy is exact."""
        expected = xxhash.xxh3_64_intdigest(self.source[:block])
        source, target = self.source.ctypes.data, self.target.ctypes.data
        mask = 0xFFFFFFFFFFFFFFFF
        assert xxh3_64(source, block) & mask == expected, "the kernel's digest is wrong"
        assert copy_xxh3_64(target, source, block) & mask == expected, "the copy's digest is wrong"
        assert np.array_equal(self.target[:block], self.source[:block]), "the copy is wrong"


def measure(space: Space, block: int, cold: bool, rounds: int, moved: int) -> dict[str, Any]:
    """Seconds of a round and bytes per second of every side, and ratios of pairs."""
    moved = max(moved // block, 1) * block
    seconds = in_turn(space.sides(block, cold, moved), rounds)
    return {
        "block_bytes": block,
        "cold": cold,
        "bytes_per_round": moved,
        "seconds": {name: spread(series) for name, series in seconds.items()},
        "bytes_per_second": {name: moved / statistics.median(series) for name, series in seconds.items()},
        "digest_speed_to_xxhash": pair_ratio(seconds[THEIRS], seconds[OURS]),
        "copy_with_digest_speed_to_numpy_copy": pair_ratio(seconds[COPY], seconds[FUSED]),
        "copy_with_digest_speed_to_copy_then_xxhash": pair_ratio(seconds[COPY_THEIRS], seconds[FUSED]),
    }


def measure_start() -> dict[str, float]:
    """Seconds until both kernels can run, in a new process."""
    with tempfile.TemporaryDirectory(prefix="kvstrata-checksum-") as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}

        def start() -> float:
            done = subprocess.run(
                [sys.executable, "-c", START], env=environment, check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        return {"compiling": start(), "from disk": start()}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "checksum")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--space-mib", type=int, default=1024, help="memory on either side")
    options = arguments.parse_args()

    result: dict[str, Any] = {
        "benchmark": "checksum",
        "machine": machine(["kvstrata", "numpy", "numba", "llvmlite", "xxhash"]),
        "rounds": options.rounds,
        "start_seconds": measure_start(),
    }
    space = Space(options.space_mib * MIB)
    cells = result["cells"] = []
    for block in BLOCK_SIZES:
        space.check(block)
        for cold in (False, True):
            cells.append(measure(space, block, cold, options.rounds, space.size // 8))

    cells.sort(key=lambda cell: cell["cold"])
    labels = [
        f"{cell['block_bytes'] // KIB} KiB, {'cold' if cell['cold'] else 'in cache'}" for cell in cells
    ]
    show(
        "GB/s, median; one thread",
        ["block", *cells[0]["bytes_per_second"]],
        [
            [label, *(f"{speed / 1e9:.1f}" for speed in cell["bytes_per_second"].values())]
            for label, cell in zip(labels, cells, strict=True)
        ],
    )
    show(
        "Speed of ours over theirs (median of pairs)",
        ["block", "digest / xxhash", "copy with digest / numpy copy", "/ numpy copy, xxhash"],
        [
            [
                label,
                f"{cell['digest_speed_to_xxhash']:.2f}",
                f"{cell['copy_with_digest_speed_to_numpy_copy']:.2f}",
                f"{cell['copy_with_digest_speed_to_copy_then_xxhash']:.2f}",
            ]
            for label, cell in zip(labels, cells, strict=True)
        ],
    )
    start = result["start_seconds"]
    show(
        "Start of a process: both kernels ready",
        ["", "seconds"],
        [[name, f"{seconds:.3f}"] for name, seconds in start.items()],
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
