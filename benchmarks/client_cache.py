"""The read-only client cache: how fast blocks come from shared storage, and from the disk that kept them.

One process saves blocks to a shared folder; another, which has an nvme tier that attaches what is read in
front of the same folder, reads them twice. Its second read is compared, in turn, with a tier that was only
ever local; its first read with a plain sequential read of the same extents through the same mount. The
shared folder is a GlusterFS volume mounted twice, its second mount behind a link with a limit.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from harness import machine, pair_ratio, parser, show, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from backends.gluster import gluster_volume
from kvstrata import BlockLayout, BlockStore, chain_keys, namespace_digest
from kvstrata.config import Config, NvmeTierConfig, SharedFsTierConfig, StoreConfig
from kvstrata.telemetry import Telemetry
from kvstrata.tiers import NvmeTier
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockKey, Namespace, Outcome

BLOCK_BYTES = 1 << 20
LIMIT_BYTES_PER_SECOND = 200_000_000
"""Of payload."""
HEADERS = 1.046
"""What Ethernet, IP and TCP add to payload in full packets: the link's limit counts them."""
NAMESPACE = Namespace(namespace_digest({"model": "client cache"}))
LAYOUT = BlockLayout(BLOCK_BYTES, 16)
SETTINGS = StoreConfig(io_deadline_seconds=120, queue_bytes=1 << 31)
WRITE = "--write"
WAIT_SECONDS = 120.0
ROUNDS = 5


@dataclass(frozen=True)
class ReadRates:
    """Bytes per second. raw: what a plain read of other extents of that size got through the same mount."""

    first: float
    raw: float
    second: float
    local: float
    second_to_local: float
    rounds: int


def keys_of(blocks: int, seed: int = 0) -> list[BlockKey]:
    """A chain of that many keys."""
    tokens = np.arange(blocks * LAYOUT.block_tokens, dtype=np.uint32) + seed * 10_000_019
    return chain_keys(NAMESPACE.digest, tokens, LAYOUT.block_tokens)


def shared_tier(folder: Path, payload_bytes: int) -> SharedFsTierConfig:
    return SharedFsTierConfig(path=str(folder), capacity_bytes=4 * payload_bytes + (256 << 20))


def fill(folder: Path, payload_bytes: int) -> None:
    """Save blocks with random bytes to the shared folder, twice: the second chain is for the raw read."""
    blocks = payload_bytes // BLOCK_BYTES
    arena = Arena(payload_bytes)
    memory = np.frombuffer(arena.view, dtype=np.uint64)
    memory[:] = np.random.default_rng(1).integers(0, 2**63, len(memory), dtype=np.uint64)
    rows = Region(arena.view, BLOCK_BYTES).rows(np.arange(blocks))
    with BlockStore(Config(SETTINGS, (shared_tier(folder, payload_bytes),)), LAYOUT, NAMESPACE) as store:
        for seed in (0, 1):
            _save_all(store, keys_of(blocks, seed), rows)
            assert store.flush(WAIT_SECONDS), "the shared folder did not take the blocks in time"


def _save_all(store: BlockStore, keys: list[BlockKey], rows: object) -> None:
    """Until every block is there: at the start a member has no room of its own yet."""
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        transfer = store.save(keys, rows)  # type: ignore[arg-type]
        transfer.wait()
        transfer.wait_released(WAIT_SECONDS)
        if all(outcome in (Outcome.SAVED, Outcome.PRESENT) for outcome in transfer.outcomes):
            return
        time.sleep(0.2)
    raise SystemExit("the blocks could not be saved")


def read(store: BlockStore, keys: list[BlockKey], targets: Region) -> float:
    """Seconds from the look-up to the last verified block."""
    started = time.perf_counter()
    match = store.lookup(keys)
    transfer = store.load(match, targets.rows(np.arange(match.blocks)))
    transfer.wait()
    seconds = time.perf_counter() - started
    wrong = [outcome for outcome in transfer.outcomes if outcome is not Outcome.LOADED]
    if match.blocks != len(keys) or wrong:
        raise SystemExit(f"{match.blocks} of {len(keys)} blocks were there, {len(wrong)} not loaded")
    return seconds


def _raw_read(shared: Path, keys_bytes: int) -> float:
    """Bytes per second of reading extents from their start to their end, one after the other."""
    buffer = Arena(4 << 20)
    done = 0
    started = time.perf_counter()
    for path in sorted((shared / "extents").iterdir(), reverse=True):
        fd = os.open(path, os.O_RDONLY)
        while (count := os.readv(fd, [buffer.view])) and done < keys_bytes:
            done += count
        os.close(fd)
        if done >= keys_bytes:
            break
    return done / (time.perf_counter() - started)


def measure(
    shared: Path,
    scratch: Path,
    *,
    payload_bytes: int,
    writer_folder: Path | None = None,
    limit: Callable[[], None] = lambda: None,
    rounds: int = ROUNDS,
) -> ReadRates:
    """shared: the reader's mount. writer_folder: the writer's, if it has one of its own. scratch: local.

    limit: called once the blocks are written, before anything is read.
    """
    blocks = payload_bytes // BLOCK_BYTES
    writer = [sys.executable, __file__, WRITE, str(writer_folder or shared), str(payload_bytes)]
    subprocess.run(writer, check=True)
    limit()
    keys = keys_of(blocks)
    arena = Arena(payload_bytes)
    arena.view[:] = bytes(payload_bytes)
    targets = Region(arena.view, BLOCK_BYTES)
    nvme_bytes = payload_bytes * 5 // 4 + (64 << 20)
    cache = NvmeTierConfig(
        path=str(scratch / "cache"), capacity_bytes=nvme_bytes, attach="always", write_mode="none",
        attach_staging_bytes=payload_bytes, prepare="no",
    )  # fmt: skip
    local = NvmeTierConfig(path=str(scratch / "local"), capacity_bytes=nvme_bytes, prepare="no")
    for tier in (cache, local):
        _prepare(tier)
    behind = Config(SETTINGS, (cache, shared_tier(shared, payload_bytes)))
    with (
        BlockStore(behind, LAYOUT, NAMESPACE) as cached,
        BlockStore(Config(SETTINGS, (local,)), LAYOUT, NAMESPACE) as alone,
    ):
        _await_blocks(cached, keys)
        raw = _raw_read(shared, payload_bytes)
        first = read(cached, keys, targets)
        _await_attached(cached, blocks)
        _save_all(alone, keys, targets.rows(np.arange(blocks)))
        alone.flush(WAIT_SECONDS)
        second, alone_seconds = [], []
        for number in range(rounds + 1):
            pair = read(cached, keys, targets), read(alone, keys, targets)
            if number:  # the first is a warm-up
                second.append(pair[0])
                alone_seconds.append(pair[1])
    size = blocks * BLOCK_BYTES
    return ReadRates(
        first=size / first,
        raw=raw,
        second=size / statistics.median(second),
        local=size / statistics.median(alone_seconds),
        second_to_local=pair_ratio(alone_seconds, second),
        rounds=rounds,
    )


def _prepare(tier: NvmeTierConfig) -> None:
    """Write its segments once, as a tier that has been in use for a while has them."""
    nvme = NvmeTier(tier, LAYOUT, NAMESPACE, SETTINGS, Telemetry(), FileIO())
    nvme.open()
    nvme.prepare_all(lambda done, of: None)
    nvme.close(clean=True)


def _await_blocks(store: BlockStore, keys: list[BlockKey]) -> None:
    """Until this process has heard of what the other one published."""
    until = time.monotonic() + WAIT_SECONDS
    while store.lookup(keys, again=True).blocks < len(keys):
        if time.monotonic() > until:
            raise SystemExit("what the other process saved did not show up")
        time.sleep(0.05)


def _await_attached(store: BlockStore, blocks: int) -> None:
    """Until the local tier has kept everything that was read."""
    until = time.monotonic() + WAIT_SECONDS
    while store.status()[0].blocks < blocks:
        if time.monotonic() > until:
            raise SystemExit(f"{store.status()[0].blocks} of {blocks} blocks were attached")
        time.sleep(0.05)
    store.flush(WAIT_SECONDS)


def main() -> None:
    if sys.argv[1:2] == [WRITE]:
        fill(Path(sys.argv[2]), int(sys.argv[3]))
        return
    arguments = parser("A client cache in front of shared storage with a limit", "client_cache")
    arguments.add_argument("--mib", type=int, default=512, help="how much is read")
    arguments.add_argument(
        "--limit", type=int, default=LIMIT_BYTES_PER_SECOND, help="payload bytes per second"
    )
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    options = arguments.parse_args()
    result = machine(["kvstrata", "numpy"])
    with tempfile.TemporaryDirectory() as scratch, gluster_volume(2) as (_, (writer, reader)):
        rates = measure(
            reader.path,
            Path(scratch),
            payload_bytes=options.mib << 20,
            writer_folder=writer.path,
            limit=lambda: reader.limit(int(options.limit * HEADERS)),
            rounds=options.rounds,
        )
    show(
        f"{options.mib} MiB in blocks of 1 MiB, a link for {options.limit / 1e6:.0f} MB/s of payload",
        ["", "MB/s"],
        [
            ["plain read through the mount", f"{rates.raw / 1e6:.0f}"],
            ["first read, from the shared folder", f"{rates.first / 1e6:.0f}"],
            ["second read, from the client cache", f"{rates.second / 1e6:.0f}"],
            ["a tier that was only ever local", f"{rates.local / 1e6:.0f}"],
        ],
    )
    print(
        f"first / plain {rates.first / rates.raw:.2f}, first / limit {rates.first / options.limit:.2f}, "
        f"second / local {rates.second_to_local:.2f}"
    )
    write_json(
        options.json,
        result
        | {"payload_mib": options.mib, "limit_bytes_per_second": options.limit}
        | asdict(rates)
        | {"first_to_raw": rates.first / rates.raw, "first_to_limit": rates.first / options.limit},
    )


if __name__ == "__main__":
    main()
