"""What it costs that the tiers are in another process: `kvstrata serve` against a store of this process.

The same tiers, in turn. "embedded" and "serve" move the same rows of shared memory (a memfd, as an
engine's host memory is) in place. The server has made huge pages of them, which both use; "embedded, 4 KiB
pages" has rows of its own that nobody registered. "serve, arena" takes these too, with one copy in the
client. Timed are loads and saves of many blocks, from the call to the release of the buffers, and the round
trip of a look-up.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata import BlockLayout, BlockStore, namespace_digest, wrap_keys
from kvstrata.config import MIB, Config, ServeConfig, load_config
from kvstrata.serving import RemoteStore
from kvstrata.transfer.buffers import Region
from kvstrata.transfer.handle import Transfer
from kvstrata.types import BlockKey, Namespace

NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))
SHAPES = ((512, 128 * 1024), (128, 4 * MIB))
LOOKUPS = (1, 64, 512)
MAIN = "from kvstrata.cli.app import main; main()"
WAIT_SECONDS = 120

Store = BlockStore | RemoteStore


class Rows:
    """Rows in a memfd, touched once."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        fd = os.memfd_create("rows")
        os.ftruncate(fd, rows * row_bytes)
        self.map = mmap.mmap(fd, rows * row_bytes)
        os.close(fd)
        np.frombuffer(self.map, dtype=np.uint64)[:] = np.arange(rows * row_bytes // 8, dtype=np.uint64)
        self.region = Region(self.map, row_bytes)


def write_toml(folder: Path, tier: str, capacity_bytes: int, socket: bool) -> Path:
    path = folder / ("served.toml" if socket else "embedded.toml")
    nvme = f'path = "{folder / ("served" if socket else "embedded")}"\n' if tier == "nvme" else ""
    path.write_text(
        f'[store]\nio_deadline_seconds = {WAIT_SECONDS}\nqueue_bytes = "4GiB"\n'
        f'[serve]\nsocket = "{folder / "socket"}"\nclient_bytes = "4GiB"\n'
        f'[[tier]]\ntype = "{tier}"\n{nvme}capacity_bytes = {capacity_bytes}\n'
    )
    return path


def start_server(toml: Path) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", str(toml)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stdout.readline().startswith("serving ")
    return server


def connect(folder: Path, layout: BlockLayout, memory: Any, arena_bytes: int = 64 * MIB) -> RemoteStore:
    serve = ServeConfig(connect=str(folder / "socket"), call_seconds=30.0, arena_bytes=arena_bytes)
    return RemoteStore(replace(Config(), serve=serve), layout, NAMESPACE, memory=memory)


def wait_for(transfer: Transfer, outcome: str) -> None:
    assert transfer.wait(WAIT_SECONDS) and transfer.wait_released(WAIT_SECONDS)
    failed = sum(one.value != outcome for one in transfer.outcomes)
    assert not failed, f"{failed} of {len(transfer.outcomes)} blocks were not {outcome}"


def measure_shape(folder: Path, tier: str, blocks: int, block_bytes: int, rounds: int) -> dict[str, Any]:
    """Seconds of loads and saves, per side."""
    layout = BlockLayout(block_bytes, 256)
    moved = blocks * block_bytes
    capacity = (5 if tier == "memory" else 6) * moved + 64 * MIB
    with ExitStack() as close:
        server = start_server(write_toml(folder, tier, capacity, socket=True))
        close.callback(server.wait)
        close.callback(server.terminate)
        rows, plain = Rows(blocks, block_bytes), Rows(blocks, block_bytes)
        embedded = close.enter_context(
            BlockStore(load_config(write_toml(folder, tier, capacity, socket=False)), layout, NAMESPACE)
        )
        sides: dict[str, tuple[Store, Rows]] = {
            "embedded": (embedded, rows),
            "serve": (close.enter_context(connect(folder, layout, [rows.map])), rows),
            "embedded, 4 KiB pages": (embedded, plain),
            "serve, arena": (close.enter_context(connect(folder, layout, (), 2 * moved)), plain),
        }
        numbers = itertools.count()
        there: dict[str, list[BlockKey]] = {}

        def save(side: str) -> float:
            seed = next(numbers).to_bytes(8, "little")
            keys = wrap_keys(NAMESPACE.digest, (seed + n.to_bytes(8, "little") for n in range(blocks)))
            store, memory = sides[side]
            buffers = memory.region.rows(range(blocks))
            seconds = timed(lambda: wait_for(store.save(keys, buffers), "saved"))
            there[side] = keys
            return seconds

        def load(side: str) -> float:
            keys = there[side]
            store, memory = sides[side]
            buffers = memory.region.rows(range(blocks))
            match = store.lookup(keys)
            return timed(lambda: wait_for(store.load(match, buffers), "loaded"))

        saves = in_turn({side: partial(save, side) for side in sides}, rounds, warm_up=4)
        loads = in_turn({side: partial(load, side) for side in sides}, rounds, warm_up=2)
        assert rows.map[:8] == bytes(8), "what was loaded is not what was saved"
    for leftover in ("served", "embedded"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    return {
        "tier": tier,
        "blocks": blocks,
        "block_bytes": block_bytes,
        "rounds": rounds,
        "ops": {
            op: {
                side: {
                    "seconds": spread(times[side]),
                    "bytes_per_second": moved / statistics.median(times[side]),
                    "speed_against_embedded": pair_ratio(times["embedded"], times[side]),
                }
                for side in sides
            }
            for op, times in (("save", saves), ("load", loads))
        },
    }


def measure_lookup(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of one look-up, all blocks there, per number of keys and side."""
    layout = BlockLayout(4096, 256)
    with ExitStack() as close:
        server = start_server(write_toml(folder, "memory", 64 * MIB, socket=True))
        close.callback(server.wait)
        close.callback(server.terminate)
        config = load_config(write_toml(folder, "memory", 64 * MIB, socket=False))
        sides: dict[str, Store] = {
            "embedded": close.enter_context(BlockStore(config, layout, NAMESPACE)),
            "serve": close.enter_context(connect(folder, layout, ())),
        }
        keys = wrap_keys(NAMESPACE.digest, (n.to_bytes(8, "little") for n in range(max(LOOKUPS))))
        for store in sides.values():
            wait_for(store.save(keys, [bytes(4096)] * len(keys)), "saved")
        result: dict[str, Any] = {}
        for count in LOOKUPS:
            asked = keys[:count]

            def ask(name: str, asked: list[BlockKey] = asked) -> float:
                store = sides[name]
                assert store.lookup(asked).blocks == len(asked)
                return timed(lambda: store.lookup(asked))

            times = in_turn({name: partial(ask, name) for name in sides}, rounds, warm_up=50)
            result[str(count)] = {name: spread(series) for name, series in times.items()}
    return {"rounds": rounds, "seconds_by_keys": result}


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__.splitlines()[0], "serving")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--lookups", type=int, default=1000)
    arguments.add_argument("--dir", type=Path, help="where folders are made, and removed after")
    options = arguments.parse_args()
    result: dict[str, Any] = {
        "benchmark": "serving",
        "machine": machine(["kvstrata", "numpy", "numba"]),
        "moves": [],
    }
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        result["lookup"] = measure_lookup(folder, options.lookups)
        for tier, (blocks, block_bytes) in itertools.product(("memory", "nvme"), SHAPES):
            result["moves"].append(measure_shape(folder, tier, blocks, block_bytes, options.rounds))
            time.sleep(1.0)
    show(
        "Loads and saves: GB/s, and speed against embedded (median of pairs)",
        ["tier, blocks, op", "emb.", "serve", "x", "4K", "x", "arena", "x"],
        [
            [
                f"{move['tier']}, {move['blocks']} x {move['block_bytes'] // 1024} KiB, {op}",
                f"{sides['embedded']['bytes_per_second'] / 1e9:.2f}",
                *(
                    text
                    for side in list(sides)[1:]
                    for text in (
                        f"{sides[side]['bytes_per_second'] / 1e9:.2f}",
                        f"{sides[side]['speed_against_embedded']:.2f}",
                    )
                ),
            ]
            for move in result["moves"]
            for op, sides in move["ops"].items()
        ],
    )
    show(
        "Look-up of blocks that are all there: median (best) microseconds",
        ["keys", "embedded", "serve"],
        [
            [count, *(f"{1e6 * sides[s]['median']:.0f} ({1e6 * sides[s]['best']:.0f})" for s in sides)]
            for count, sides in result["lookup"]["seconds_by_keys"].items()
        ],
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
