"""The pool tier against Mooncake's own client, and the NIXL mover against NIXL: what our way of it costs.

    python benchmarks/pool.py --dir FOLDER

Both sides of a pair move the same bytes between the same buffers, in turn, in this process. Mooncake: a
real master, and a second process that lends all memory, over TCP on the loopback of a network namespace of
their own, which needs root. Its client is called directly with one batch of registered buffers, its fastest
way here; the tier adds look-up, keys, headers, a checksum on every block both ways, and books. NIXL: its
POSIX back-end with io_uring on one file, all blocks in one prepared transfer; the mover adds headers and
checksums. Without one of the two packages its half is left out.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata.config import MIB, Config, PoolTierConfig, StoreConfig
from kvstrata.errors import ConfigError
from kvstrata.hashing import chain_keys
from kvstrata.store import BlockStore
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, Buffers, address_of
from kvstrata.transfer.nixl_mover import NixlMover, NixlSettings
from kvstrata.types import BlockLayout, Lookup, Namespace
from peers.base import PeerError, Shape, open_direct
from peers.mooncake import METRICS, RPC, _network_of_our_own
from peers.nixl import Nixl

BLOCK_BYTES = (MIB, 4 * MIB)
PACKAGES = ("kvstrata", "mooncake-transfer-engine-non-cuda", "nixl-cu12", "numba", "numpy")
SPACE = bytes(range(32))
START_SECONDS = 20.0
LENDER = """
import os, sys, time
os.environ.update(MC_LOG_LEVEL="ERROR", GLOG_minloglevel="3")
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[1]), 16 << 20, "tcp", "", sys.argv[2])
print("ready" if code == 0 else f"setup gives {code}", flush=True)
time.sleep(3600)
"""
_numbers = itertools.count()
Cell = dict[str, Any]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "pool")
    arguments.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for NIXL's file")
    arguments.add_argument("--bytes", type=int, default=128 * MIB, help="of one round")
    arguments.add_argument("--rounds", type=int, default=15)
    given = arguments.parse_args()
    about = machine(PACKAGES)
    arena = Arena(given.bytes)
    np.frombuffer(arena.view, dtype=np.uint64)[:] = np.arange(given.bytes // 8)
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    for name, part in (("mooncake", pool_cells), ("nixl", nixl_cells)):
        try:
            cells += part(arena, given.dir, given.rounds)
        except (PeerError, ConfigError, ImportError) as reason:
            left_out[name] = str(reason)
    write_json(
        given.json,
        {
            "machine": about,
            "bytes_per_round": given.bytes,
            "rounds": given.rounds,
            "cells": cells,
            "left_out": left_out,
        },
    )
    show(
        "GB/s, medians; ratio: ours / theirs, of the same round, and of the best rounds",
        ["", "block", "theirs", "ours", "ratio", "best", "CPU s/GB", "ours"],
        [
            [
                cell["what"],
                f"{cell['block_bytes'] // MIB} MiB",
                f"{cell['theirs_gb_per_second']:.2f}",
                f"{cell['ours_gb_per_second']:.2f}",
                f"{cell['ratio']:.3f}",
                f"{cell['ratio_of_best']:.3f}",
                f"{cell['theirs_cpu_seconds_per_gb']:.2f}",
                f"{cell['ours_cpu_seconds_per_gb']:.2f}",
            ]
            for cell in cells
        ],
    )
    for name, reason in left_out.items():
        print(f"{name} was left out: {reason}", file=sys.stderr)


def compare(
    what: str,
    block_bytes: int,
    size: int,
    rounds: int,
    theirs: Callable[[], float],
    ours: Callable[[], float],
) -> Cell:
    """One pair of sides, each of which returns its seconds; and this process's CPU time of each."""
    spent: dict[str, list[float]] = {"theirs": [], "ours": []}

    def weighed(name: str, side: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            before = time.process_time()
            took = side()
            spent[name].append(time.process_time() - before)
            return took

        return run

    sides = {"theirs": weighed("theirs", theirs), "ours": weighed("ours", ours)}
    seconds = in_turn(sides, rounds, warm_up=2)
    cell: Cell = {"what": what, "block_bytes": block_bytes}
    for side, series in seconds.items():
        cell[f"{side}_gb_per_second"] = round(size / 1e9 / spread(series)["median"], 3)
        cell[f"{side}_best_gb_per_second"] = round(size / 1e9 / min(series), 3)
        cell[f"{side}_cpu_seconds_per_gb"] = round(spread(spent[side][2:])["median"] * 1e9 / size, 3)
        cell[f"{side}_seconds"] = [round(value, 6) for value in series]
    cell["ratio"] = round(pair_ratio(seconds["theirs"], seconds["ours"]), 3)
    cell["ratio_of_best"] = round(min(seconds["theirs"]) / min(seconds["ours"]), 3)
    return cell


# Mooncake


def pool_cells(arena: Arena, folder: Path, rounds: int) -> list[Cell]:
    os.environ.update(MC_LOG_LEVEL="ERROR", GLOG_minloglevel="3")
    _network_of_our_own()
    with _master() as master, _lender(master, 16 * arena.size):
        from mooncake.store import MooncakeDistributedStore  # noqa: PLC0415

        client = MooncakeDistributedStore()
        if client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", master):
            raise PeerError("setup failed")
        client.register_buffer(address_of(arena.view), arena.size)
        cells = []
        for block_bytes in BLOCK_BYTES:
            cells += _pool_pair(client, master, arena, block_bytes, rounds)
        client.close()
        return cells


def _pool_pair(client: Any, master: str, arena: Arena, block_bytes: int, rounds: int) -> list[Cell]:
    count = arena.size // block_bytes
    addresses = [address_of(arena.view) + number * block_bytes for number in range(count)]
    sizes = [block_bytes] * count
    buffers = Buffers(np.array(addresses), np.array(sizes), arena)
    config = Config(StoreConfig(), (PoolTierConfig(master=master, missing_seconds=0.0),))
    with BlockStore(config, BlockLayout(block_bytes, 1), Namespace(SPACE)) as store:
        names = [f"direct-{block_bytes}-{number}" for number in range(count)]
        keys = chain_keys(SPACE, [block_bytes] * count, 1)

        def put_theirs() -> float:
            # What a side removed is gone when the other's round is over.
            fresh = [f"{name}-{next(_numbers)}" for name in names]
            took = timed(lambda: _good(client.batch_put_from(fresh, addresses, sizes), 0))
            client.batch_remove(fresh, True)
            return took

        def put_ours() -> float:
            fresh = chain_keys(SPACE, [next(_numbers)] * count, 1)
            took = timed(lambda: _finish(store.save(fresh, buffers), "saved"))
            client.batch_remove([f"kvstrata/1/{key.hex()}" for key in fresh], True)
            return took

        def get_theirs() -> float:
            return timed(lambda: _good(client.batch_get_into(names, addresses, sizes), block_bytes))

        def get_ours() -> float:
            return timed(lambda: _finish(store.load(store.lookup(keys), buffers), "loaded"))

        size = count * block_bytes
        saves = compare("pool: save", block_bytes, size, rounds, put_theirs, put_ours)
        _good(client.batch_put_from(names, addresses, sizes), 0)
        _finish(store.save(keys, buffers), "saved")
        loads = compare("pool: load", block_bytes, size, rounds, get_theirs, get_ours)
        asked = [f"kvstrata/1/{key.hex()}" for key in keys]

        def ask_theirs() -> float:
            return timed(lambda: _good(client.batch_is_exist(asked), 1))

        def ask_ours() -> float:
            store.tiers[0].table.clear()  # type: ignore[attr-defined]
            return timed(lambda: _until_known(store, keys))

        asks = compare("pool: first look-up", block_bytes, size, rounds, ask_theirs, ask_ours)
        for side in ("theirs", "ours"):
            for unit in ("gb_per_second", "best_gb_per_second", "cpu_seconds_per_gb"):
                del asks[f"{side}_{unit}"]
            asks[f"{side}_us"] = round(spread(asks[f"{side}_seconds"])["median"] * 1e6, 1)
        saves["look_up"] = asks
        return [saves, loads]


def _good(codes: Sequence[int], wanted: int) -> None:
    if any(code != wanted for code in codes):
        raise PeerError(f"Mooncake answered {sorted(set(codes))}")


def _finish(transfer: Any, wanted: str) -> None:
    transfer.wait()
    ends = {outcome.value for outcome in transfer.outcomes}
    if ends != {wanted}:
        raise PeerError(f"blocks ended as {ends}")


def _until_known(store: BlockStore, keys: Sequence[Any]) -> None:
    while Lookup.PENDING in store.lookup(keys).states:
        time.sleep(2e-5)


@contextmanager
def _master() -> Iterator[str]:
    program = Path(sys.executable).with_name("mooncake_master")
    if not program.exists():
        raise PeerError("mooncake_master is not installed")
    process = subprocess.Popen(
        [
            str(program), "-rpc_address=127.0.0.1", f"-rpc_port={RPC}", f"-metrics_port={METRICS}",
            "-rpc_thread_num=2",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(1)
        yield f"127.0.0.1:{RPC}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _lender(master: str, size: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", LENDER, str(size), master], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise PeerError("the lender was not set up")
        yield
    finally:
        process.kill()
        process.wait()


# NIXL


def nixl_cells(arena: Arena, folder: Path, rounds: int) -> list[Cell]:
    cells = []
    for block_bytes in BLOCK_BYTES:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            cells += _nixl_pair(arena, Path(place), block_bytes, rounds)
    return cells


def _nixl_pair(arena: Arena, folder: Path, block_bytes: int, rounds: int) -> list[Cell]:
    count = arena.size // block_bytes
    stride = block_bytes + PAGE
    direct = Nixl(Shape(folder, block_bytes, count, 1, {"engine": "uring"}), arena)
    mover = NixlMover("kvstrata-nixl", NixlSettings(), payload_bytes=block_bytes, space=SPACE)
    fd = open_direct(folder / "mover.bin")
    os.posix_fallocate(fd, 0, count * stride)
    rows = np.zeros((count, k.COLUMNS), dtype=np.int64)
    rows[:, k.FD] = fd
    rows[:, k.OFFSET] = np.arange(count) * stride
    rows[:, k.ADDRESS] = address_of(arena.view) + np.arange(count) * block_bytes
    rows[:, k.LENGTH] = block_bytes
    rows[:, k.FLAGS] = k.DIRECT
    rows[:, k.DEADLINE_NS] = k.NEVER_NS
    rows[:, k.POSITION] = rows[:, k.NUMBER] = rows[:, k.KEY] = np.arange(count)

    def move(loads: bool) -> None:
        left, done = [count], threading.Event()
        rows[:, k.KIND] = k.READ if loads else k.WRITE

        def hear(ended: Any) -> None:
            if ended[:, k.RESULT].any():
                raise PeerError("the mover failed")
            rows[ended[:, k.POSITION], k.CHECKSUM] = ended[:, k.CHECKSUM]
            left[0] -= len(ended)
            if not left[0]:
                done.set()

        mover.submit(rows, loads=loads, on_done=hear)
        if not done.wait(60):
            raise PeerError("the mover hangs")

    plan = direct.plan(range(count))

    def save() -> None:
        direct.wait([direct.start_save(plan)])

    def load() -> None:
        direct.wait([direct.start_load(plan)])

    size = count * block_bytes
    move(False)
    rows[:, k.FLAGS] |= k.KNOWN  # as for blocks that come from the memory tier
    try:
        return [
            compare(
                "nixl: write",
                block_bytes,
                size,
                rounds,
                lambda: timed(save),
                lambda: timed(lambda: move(False)),
            ),
            compare(
                "nixl: read",
                block_bytes,
                size,
                rounds,
                lambda: timed(load),
                lambda: timed(lambda: move(True)),
            ),
        ]
    finally:
        mover.close(10)
        direct.close()
        os.close(fd)


if __name__ == "__main__":
    main()
