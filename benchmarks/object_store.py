"""The object_store tier against obstore alone: what packing, headers, checksums and books cost.

    python benchmarks/object_store.py --dir FOLDER [--no-s3]

Both sides move the same payload in extents of 64 MiB, in turn, in this process: to a local folder, and to a
real S3 server (Ceph's radosgw with its data in memory, over the loopback of its own network namespace,
which needs root). Put: blocks are saved and flushed; alone, buffers of the same sizes are uploaded, as many
at a time and in parts of the same length. Get: another member, which holds nothing in memory, loads every
block into buffers; alone, the same bytes are asked for in ranges of the same length by as many threads, and
stay where obstore put them. In the local folder both puts end when the files are on the disk, and both gets
begin with nothing in the page cache; the server has its data in memory for both.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import obstore

from harness import in_turn, machine, pair_ratio, parser, show, spread, timed, write_json
from kvstrata.config import GIB, MIB, Config, ObjectStoreTierConfig, StoreConfig
from kvstrata.hashing import chain_keys
from kvstrata.store import BlockStore
from kvstrata.tiers.object_store import PUBLISHERS, ObjectStoreTier
from kvstrata.tiers.shared.extent_file import extent_bytes, slot_stride, slots_within
from kvstrata.tiers.shared.object_client import open_client
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.types import BlockKey, BlockLayout, Namespace, Outcome

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from backends import BackendMissing
from backends.radosgw import rados_gateway

BLOCK_BYTES = (MIB, 4 * MIB)
EXTENT_BYTES = 64 * MIB
PACKAGES = ("kvstrata", "obstore", "numba", "numpy")
SPACE = bytes(range(32))
WAIT_SECONDS = 60.0
_numbers = itertools.count(1)
Cell = dict[str, Any]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "object_store")
    arguments.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for the objects")
    arguments.add_argument("--extents", type=int, default=2, help="of one round")
    arguments.add_argument("--rounds", type=int, default=7, help="at most 11 fit into the server")
    arguments.add_argument("--no-s3", action="store_true", help="the local folder only")
    given = arguments.parse_args()
    about = machine(PACKAGES)
    cells: list[Cell] = []
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        for block_bytes in BLOCK_BYTES:
            config = _config(f"file://{folder}/{block_bytes}")
            cells += compare("local folder", config, block_bytes, given.extents, given.rounds)
    if not given.no_s3:
        try:
            for block_bytes in BLOCK_BYTES:
                # A server each: it frees the room of deleted objects hours later.
                with s3() as (url, options):
                    config = _config(url, options=options)
                    cells += compare("radosgw", config, block_bytes, given.extents, given.rounds)
        except BackendMissing as reason:
            left_out["radosgw"] = str(reason)
    write_json(
        given.json,
        {
            "machine": about,
            "extent_bytes": EXTENT_BYTES,
            "extents_per_round": given.extents,
            "rounds": given.rounds,
            "cells": cells,
            "left_out": left_out,
        },
    )
    show(
        "MB/s of payload, medians; ratio: ours / obstore alone, of the same round",
        ["", "block", "alone", "ours", "ratio"],
        [
            [
                f"{cell['store']}, {cell['what']}",
                f"{cell['block_bytes'] // MIB} MiB",
                f"{cell['alone_mb_per_second']:.0f}",
                f"{cell['ours_mb_per_second']:.0f}",
                f"{cell['ratio']:.3f}",
            ]
            for cell in cells
        ],
    )
    for name, reason in left_out.items():
        print(f"{name} was left out: {reason}", file=sys.stderr)


def _config(url: str, **fields: Any) -> ObjectStoreTierConfig:
    return ObjectStoreTierConfig(
        url=url,
        capacity_bytes=16 * GIB,
        extent_bytes=EXTENT_BYTES,
        staging_bytes=8 * EXTENT_BYTES,
        refresh_seconds=0.2,
        publish_seconds=30.0,
        **fields,
    )


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, dict[str, str]]]:
    """A server's bucket, and how to get in."""
    with rados_gateway() as gateway:
        account = gateway.account
        yield (
            f"s3://{account.bucket}/benchmark",
            {
                "endpoint": account.endpoint,
                "region": account.region,
                "access_key_id": account.access_key,
                "secret_access_key": account.secret_key,
            },
        )


def compare(
    name: str, config: ObjectStoreTierConfig, block_bytes: int, extents: int, rounds: int
) -> list[Cell]:
    layout = BlockLayout(block_bytes, 1)
    settings = StoreConfig(io_deadline_seconds=WAIT_SECONDS)
    stores = Config(store=settings, tiers=(config,))
    slots = slots_within(EXTENT_BYTES, slot_stride(block_bytes))
    blocks = extents * slots
    arena = Arena(blocks * block_bytes)
    np.frombuffer(arena.view, dtype=np.uint64)[:] = np.arange(len(arena.view) // 8)
    with (
        BlockStore(stores, layout, Namespace(SPACE)) as writer,
        BlockStore(stores, layout, Namespace(SPACE)) as reader,
        ThreadPoolExecutor(PUBLISHERS) as uploads,
        ThreadPoolExecutor(config.io_threads) as requests,
    ):
        ours = Ours(writer, reader, arena, block_bytes, blocks)
        alone = Alone(config, extents, extent_bytes(slots, slot_stride(block_bytes)), uploads, requests)
        cold = partial(write_out, config)
        puts = in_turn({"alone": lambda: alone.put(cold), "ours": lambda: ours.put(cold)}, rounds)
        gets = in_turn({"alone": lambda: alone.get(cold), "ours": lambda: ours.get(cold)}, rounds)
        alone.remove()
    return [
        _cell(name, what, block_bytes, blocks * block_bytes, seconds)
        for what, seconds in (("put", puts), ("get", gets))
    ]


def _cell(name: str, what: str, block_bytes: int, size: int, seconds: dict[str, list[float]]) -> Cell:
    cell: Cell = {"store": name, "what": what, "block_bytes": block_bytes, "payload_bytes": size}
    for side, series in seconds.items():
        cell[f"{side}_mb_per_second"] = round(size / 1e6 / spread(series)["median"], 1)
        cell[f"{side}_seconds"] = [round(value, 5) for value in series]
    cell["ratio"] = round(pair_ratio(seconds["alone"], seconds["ours"]), 3)
    return cell


def write_out(config: ObjectStoreTierConfig) -> None:
    """Objects of a local folder go to the disk, and nothing of them stays in memory."""
    scheme, _, folder = config.url.partition("://")
    for path in Path(folder).rglob("*/*") if scheme == "file" else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Ours:
    """Two members: one saves, the other loads."""

    def __init__(
        self, writer: BlockStore, reader: BlockStore, arena: Arena, block_bytes: int, blocks: int
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._region = Region(arena.view, block_bytes)
        self._blocks = blocks
        self._target = Arena(len(arena.view))
        np.frombuffer(self._target.view, dtype=np.uint8)[:] = 0  # its pages are there
        self._targets = Region(self._target.view, block_bytes)
        self._keys: list[BlockKey] = []

    def put(self, settle: Callable[[], None]) -> float:
        keys = chain_keys(SPACE, [next(_numbers)] * self._blocks, 1)
        self._await_room(keys)
        buffers = self._region.rows(range(self._blocks))

        def save() -> None:
            transfer = self._writer.save(keys, buffers)
            while not transfer.wait(1.0):
                pass
            assert set(transfer.outcomes) == {Outcome.SAVED}, transfer.outcomes
            assert self._writer.flush(WAIT_SECONDS)
            settle()

        took = timed(save)
        self._keys = keys
        return took

    def _await_room(self, keys: list[BlockKey]) -> None:
        """Until the collector has granted the bytes of a round: room is asked for ahead, as in service."""
        [tier] = self._writer.tiers
        assert isinstance(tier, ObjectStoreTier)
        until = time.monotonic() + WAIT_SECONDS
        while True:
            recorded = tier.table.record(keys, [True] * len(keys), request=0)
            tier.table.abort_all(recorded.placed)
            if not recorded.refused:
                break
            assert time.monotonic() < until, "no room is granted"
            time.sleep(0.05)
        assert self._writer.flush(WAIT_SECONDS)  # what was begun and is empty goes

    def get(self, cold: Callable[[], None]) -> float:
        until = time.monotonic() + WAIT_SECONDS
        while (match := self._reader.lookup(self._keys)).blocks < self._blocks:
            assert time.monotonic() < until, "the other member does not see the blocks"
            time.sleep(0.05)
        targets = self._targets.rows(range(self._blocks))
        cold()

        def load() -> None:
            transfer = self._reader.load(match, targets)
            while not transfer.wait(1.0):
                pass
            assert set(transfer.outcomes) == {Outcome.LOADED}

        return timed(load)


class Alone:
    """The same bytes by obstore."""

    def __init__(
        self,
        config: ObjectStoreTierConfig,
        extents: int,
        size: int,
        uploads: ThreadPoolExecutor,
        requests: ThreadPoolExecutor,
    ) -> None:
        self._config = config
        self._store = open_client(config)._store
        self._extents = extents
        self._names: list[str] = []
        self._arenas = [Arena(size) for _ in range(extents)]
        self._uploads = uploads
        self._requests = requests
        for arena in self._arenas:
            np.frombuffer(arena.view, dtype=np.uint64)[:] = np.arange(len(arena.view) // 8)

    def put(self, settle: Callable[[], None]) -> float:
        self.remove()
        config = self._config
        self._names = [f"alone/{next(_numbers)}" for _ in range(self._extents)]

        def one(number: int) -> None:
            obstore.put(
                self._store,
                self._names[number],
                self._arenas[number].view,
                use_multipart=True,
                chunk_size=config.part_bytes,
                max_concurrency=config.parts_in_flight,
            )

        def put() -> None:
            list(self._uploads.map(one, range(len(self._names))))
            settle()

        return timed(put)

    def get(self, cold: Callable[[], None]) -> float:
        cold()
        step = self._config.part_bytes
        pieces = [
            (name, start, min(step, arena.size - start))
            for name, arena in zip(self._names, self._arenas, strict=True)
            for start in range(0, arena.size, step)
        ]

        def one(piece: tuple[str, int, int]) -> int:
            name, start, size = piece
            return len(obstore.get_range(self._store, name, start=start, length=size))

        return timed(lambda: list(self._requests.map(one, pieces)))

    def remove(self) -> None:
        for name in self._names:
            obstore.delete(self._store, name)


if __name__ == "__main__":
    main()
