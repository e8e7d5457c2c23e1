"""The shared_fs tier against the raw path: dd and fio through the same mounts of the same volume.

A GlusterFS volume is mounted twice. Blocks are saved through the first mount until they are published, and
loaded, every one verified, through the second, where nothing of them is cached. dd and fio write and read
one file of the same size the same way, with O_DIRECT. All in turn; the ratio is to the better of the two.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from client_cache import LAYOUT, NAMESPACE, SETTINGS, WAIT_SECONDS, keys_of, read
from harness import machine, pair_ratio, parser, show, spread, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from backends.gluster import gluster_volume
from kvstrata import BlockLayout, BlockStore
from kvstrata.config import Config, SharedFsTierConfig
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.types import Outcome

BLOCKS = (1 << 20, 4 << 20)


def fio(file: Path, mode: str, size: int) -> float:
    """Seconds that fio says it took."""
    command = ["fio", "--name=raw", f"--filename={file}", f"--rw={mode}", "--bs=4M", f"--size={size}"]
    command += ["--ioengine=libaio", "--iodepth=8", "--direct=1", "--end_fsync=1", "--output-format=json"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(out[out.index("{") :])["jobs"][0]
    return float(job["job_runtime"]) / 1000


def dd(source: Path, target: Path, *flags: str) -> float:
    started = time.perf_counter()
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", *flags]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


class Sides:
    """Stores on both mounts, and the raw ways; every call writes or reads something new."""

    def __init__(self, mounts: list[Path], block_bytes: int, size: int, rounds: int) -> None:
        self.mounts = mounts
        self.block_bytes = block_bytes
        self.blocks = size // block_bytes
        self.size = self.blocks * block_bytes
        self.layout = BlockLayout(block_bytes, LAYOUT.block_tokens)
        # A member keeps 1/64 of the capacity ready at most, and a whole round is saved at once.
        capacity = 160 * size
        self.stores = [
            BlockStore(
                Config(
                    SETTINGS,
                    (
                        SharedFsTierConfig(
                            path=str(mount / f"blocks-{block_bytes}"),
                            capacity_bytes=capacity,
                            burst_bytes=2 * size,
                        ),
                    ),
                ),
                self.layout,
                NAMESPACE,
            )
            for mount in mounts
        ]
        self._arena = Arena(self.size)
        memory = np.frombuffer(self._arena.view, dtype=np.uint64)
        memory[:] = np.random.default_rng(1).integers(0, 2**63, len(memory), dtype=np.uint64)
        self._region = Region(self._arena.view, block_bytes)
        self._shm = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self._payload = self._shm / "payload"
        self._payload.write_bytes(self._arena.view)
        self.turn = 0

    def save(self) -> float:
        """Until everything is durable and announced. Waits before for room, as a member at work has it."""
        self.turn += 1
        keys, rows = keys_of(self.blocks, self.turn), self._region.rows(np.arange(self.blocks))
        until = time.monotonic() + WAIT_SECONDS
        while self._room() < 1.2 * self.size and time.monotonic() < until:
            time.sleep(0.05)
        started = time.perf_counter()
        transfer = self.stores[0].save(keys, rows)
        transfer.wait()
        assert self.stores[0].flush(WAIT_SECONDS)
        seconds = time.perf_counter() - started
        refused = [end for end in transfer.outcomes if end is not Outcome.SAVED]
        if refused:
            raise SystemExit(f"{len(refused)} of {len(keys)} blocks were not saved: {refused[0].value}")
        return seconds

    def _room(self) -> int:
        session = self.stores[0].tiers[0].session  # type: ignore[attr-defined]
        if session is None:
            return 0
        room = session.room
        return int(room.limit_bytes - room.published_bytes - room.taken_bytes)

    def load(self) -> float:
        keys = keys_of(self.blocks, self.turn)
        until = time.monotonic() + WAIT_SECONDS
        while self.stores[1].lookup(keys, again=True).blocks < len(keys) and time.monotonic() < until:
            time.sleep(0.05)
        return read(self.stores[1], keys, self._region)

    def raw_path(self, tool: str, mount: int) -> Path:
        return self.mounts[mount] / f"{tool}-{self.turn}"

    def close(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self._shm)
        for path in self.mounts[0].iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def sides(self) -> dict[str, Callable[[], float]]:
        return {
            "save": self.save,
            "dd write": lambda: dd(self._payload, self.raw_path("dd", 0), "oflag=direct", "conv=fsync"),
            "fio write": lambda: fio(self.raw_path("fio", 0), "write", self.size),
            "load": self.load,
            "dd read": lambda: dd(self.raw_path("dd", 1), Path("/dev/null"), "iflag=direct"),
            "fio read": lambda: fio(self.raw_path("fio", 1), "read", self.size),
        }


def main() -> None:
    arguments = parser("The shared_fs tier against dd and fio on the same mounts", "shared_fs")
    arguments.add_argument("--mib", type=int, default=256, help="bytes of a round")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    result = machine(["kvstrata", "numpy"])
    cells, rows = [], []
    with gluster_volume(2) as (_, mounts):
        for block_bytes in BLOCKS:
            sides = Sides([mount.path for mount in mounts], block_bytes, options.mib << 20, options.rounds)
            seconds: dict[str, list[float]] = {name: [] for name in sides.sides()}
            for number in range(options.rounds + 1):
                for name, side in sides.sides().items():
                    took = side()
                    if number:  # the first round warms up
                        seconds[name].append(took)
            sides.close()
            for ours, raw in (("save", "write"), ("load", "read")):
                dd_seconds, fio_seconds = seconds[f"dd {raw}"], seconds[f"fio {raw}"]
                best = [min(pair) for pair in zip(dd_seconds, fio_seconds, strict=True)]
                ratio = pair_ratio(best, seconds[ours])
                speeds = {
                    side: sides.size / spread(values)["median"]
                    for side, values in ((ours, seconds[ours]), ("dd", dd_seconds), ("fio", fio_seconds))
                }
                cells.append(
                    {"block_bytes": block_bytes, "direction": ours, "ratio_to_best": ratio}
                    | {f"{side}_bytes_per_second": speed for side, speed in speeds.items()}
                )
                rows.append(
                    [f"{ours}, {block_bytes >> 20} MiB"]
                    + [f"{speeds[side] / 1e6:.0f}" for side in (ours, "dd", "fio")]
                    + [f"{ratio:.2f}"]
                )
    show("MB/s through GlusterFS", ["", "shared_fs", "dd", "fio", "ratio to the better"], rows)
    write_json(
        options.json, result | {"payload_mib": options.mib, "rounds": options.rounds, "cells": cells}
    )


if __name__ == "__main__":
    main()
