"""What the tests of the store share: blocks whose bytes follow from their key, and folders on disk."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvstrata.config import Config, MemoryTierConfig, NvmeTierConfig, StoreConfig
from kvstrata.hashing import chain_keys, namespace_digest
from kvstrata.store import BlockStore
from kvstrata.tiers.nvme_format import SEGMENT_GLOB, SegmentHeader, SlotHeader, slot_offset
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.handle import Transfer
from kvstrata.types import BlockKey, BlockLayout, Namespace, Outcome, PrefixMatch

FIELDS: dict[str, object] = {"model": "tests", "dtype": "u8"}
NAMESPACE = Namespace(namespace_digest(FIELDS), FIELDS)
LAYOUT = BlockLayout(block_bytes=8192, block_tokens=1)
WAIT_SECONDS = 60.0
"""No test waits longer for what must happen; a pass never depends on how long it took."""


def chain(number: int, length: int, namespace: Namespace = NAMESPACE) -> list[BlockKey]:
    """Keys of conversation `number`, root first; chains of two numbers share nothing."""
    return chain_keys(namespace.digest, [number] * length, 1)


def content(key: bytes, size: int = LAYOUT.block_bytes) -> bytes:
    """The bytes of a block, known from its key."""
    return blake3(key).digest(length=size)


def contents(keys: Iterable[bytes], size: int = LAYOUT.block_bytes) -> list[bytes]:
    return [content(key, size) for key in keys]


def memory_tier(blocks: int, layout: BlockLayout = LAYOUT, **fields: Any) -> MemoryTierConfig:
    """A memory tier for exactly so many blocks."""
    stride = -(-layout.block_bytes // PAGE) * PAGE
    return MemoryTierConfig(capacity_bytes=blocks * stride, **fields)


def nvme_tier(folder: Path, capacity_bytes: int = 2 * 2**20, **fields: Any) -> NvmeTierConfig:
    return NvmeTierConfig(path=str(folder), capacity_bytes=capacity_bytes, **fields)


def store_config(**fields: Any) -> StoreConfig:
    """With the engine that the run of the tests asks for (`--engine`)."""
    engine: Any = os.environ.get("KVSTRATA_TEST_ENGINE", "auto")
    return StoreConfig(**({"io_engine": engine} | fields))


def make_config(*tiers: MemoryTierConfig | NvmeTierConfig, **store: Any) -> Config:
    return Config(store=store_config(**store), tiers=tiers)


def open_store(
    *tiers: MemoryTierConfig | NvmeTierConfig,
    layout: BlockLayout = LAYOUT,
    namespace: Namespace = NAMESPACE,
    file_io: Any = None,
    **store: Any,
) -> BlockStore:
    return BlockStore(make_config(*tiers, **store), layout, namespace, file_io=file_io)


def finished(transfer: Transfer) -> list[Outcome]:
    """Wait until a transfer is done and its buffers are free; its outcomes."""
    until = time.monotonic() + WAIT_SECONDS
    while not transfer.poll():
        assert time.monotonic() < until, "a transfer hangs"
        transfer.wait(1.0)
    assert transfer.wait_released(max(0.0, until - time.monotonic())), "a transfer is not released"
    return transfer.outcomes


def save(store: BlockStore, keys: Sequence[BlockKey], size: int = 0) -> list[Outcome]:
    """Save blocks with the content of their keys, and wait for the outcomes."""
    return finished(store.save(keys, contents(keys, size or store.layout.block_bytes)))


def load(store: BlockStore, keys: Sequence[BlockKey], size: int = 0) -> list[Outcome]:
    """Load all keys, present or not. What is LOADED has exactly the right bytes, or the test fails."""
    size = size or store.layout.block_bytes
    targets = [bytearray(b"\xa5" * size) for _ in keys]
    match: PrefixMatch = store.lookup(keys)
    outcomes = finished(store.load(match, targets))
    check_bytes(keys, targets, outcomes)
    return outcomes


def check_bytes(
    keys: Sequence[BlockKey], targets: Sequence[bytearray | memoryview], outcomes: Sequence[Outcome]
) -> None:
    for key, target, outcome in zip(keys, targets, outcomes, strict=True):
        if outcome is Outcome.LOADED:
            assert bytes(target) == content(key, len(target)), f"wrong bytes for {key.hex()[:16]}"


def served(store: BlockStore, keys: Sequence[BlockKey]) -> set[BlockKey]:
    """The keys that a load serves; their bytes are right. Each of the others is a counted miss."""
    before = store.telemetry.value("misses_total")
    outcomes = load(store, keys)
    good = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Outcome.LOADED}
    missed = store.telemetry.value("misses_total") - before
    # A bad copy in one tier is counted, too, when the tier below serves the block.
    assert missed >= len(set(keys) - good), "a block was not served and no miss was counted"
    if len(store.tiers) == 1:
        assert missed == len(keys) - outcomes.count(Outcome.LOADED)
    return good


def check_quiet(store: BlockStore) -> None:
    """When nothing runs any more, nothing is pinned, held or queued, and every table is sound."""
    assert store.flush(WAIT_SECONDS)
    assert [status.pinned_blocks for status in store.status()] == [0] * len(store.tiers)
    assert set(store.queued.values()) == {0}, store.queued
    store.check_integrity()


def eventually(what: Callable[[], bool], message: str, seconds: float = WAIT_SECONDS) -> None:
    """Poll until something is so; fails the test if it never is."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, message
        time.sleep(0.005)


def descriptors() -> Counter[str]:
    """What the open descriptors of this process point to."""
    found: Counter[str] = Counter()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(link.readlink())
            found[target] += target != f"/proc/{os.getpid()}/fd"
    return +found


def bytes_on_medium(folder: Path) -> int:
    """What `du -B1 -s` says: the folder and everything in it, whoever wrote it."""
    total = folder.stat().st_blocks * 512
    for path in folder.iterdir():
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


@dataclass(frozen=True)
class DiskSlot:
    """A slot of a segment file whose header is intact."""

    path: Path
    offset: int
    stride: int
    header: SlotHeader

    @property
    def key(self) -> BlockKey:
        return BlockKey(self.header.key)


def segments_of(folder: Path) -> list[Path]:
    return sorted(folder.glob(SEGMENT_GLOB))


def slots_of(folder: Path) -> list[DiskSlot]:
    """Every used slot in the folder, read through the page cache."""
    found = []
    for path in segments_of(folder):
        data = path.read_bytes()
        segment = SegmentHeader.unpack(data[:PAGE])
        assert segment is not None
        for number in range(segment.slots):
            offset = slot_offset(number, segment.stride)
            page = memoryview(data)[offset : offset + PAGE]
            header = SlotHeader.unpack(page)
            if header is not None:
                found.append(DiskSlot(path, offset, segment.stride, header))
    return found


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of a file in place, and make a reader with O_DIRECT see them."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
