"""What moves blocks to and from an object store, with a store that fails and waits as it is told."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstrata.config import ObjectStoreTierConfig, StoreConfig
from kvstrata.telemetry import Telemetry
from kvstrata.types import BlockKey, Lookup
from object_kit import LAYOUT, MIB, QUICK
from store_kit import NAMESPACE, WAIT_SECONDS, chain, content, eventually

pytest.importorskip("obstore", reason="obstore is not installed; run: pip install 'kvstrata[object-store]'")

from obstore.store import MemoryStore

from kvstrata.tiers.object_store import ObjectStoreTier
from kvstrata.tiers.shared.extent_file import extent_bytes, slot_stride
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.object_client import ObjectClient
from kvstrata.tiers.shared.object_mover import Fetched, ObjectMover, Staging
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Buffers, address_of
from kvstrata.transfer.job_pool import JobPoolSettings


class Gated(ObjectClient):
    """A store whose uploads wait, and then fail if they are told to."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.gate = threading.Event()
        self.uploads = 0
        self.error = 0

    def upload(self, name: str, data: Any) -> None:
        assert self.gate.wait(WAIT_SECONDS)
        self.uploads += 1
        if self.error:
            raise OSError(self.error, "as told")
        super().upload(name, data)


@pytest.fixture
def gated() -> Iterator[tuple[Gated, ObjectStoreTier]]:
    client = Gated()
    config = ObjectStoreTierConfig(**(QUICK | {"url": "s3://unused", "retries": 2}))
    settings = StoreConfig(breaker_retry_seconds=0.2, close_seconds=5.0)
    tier = ObjectStoreTier(config, LAYOUT, NAMESPACE, settings, Telemetry(100), client)
    tier.open()
    eventually(lambda: put(tier, chain(99, 1)) == 1, "no grant")
    yield client, tier
    client.gate.set()
    client.error = 0
    assert tier.stop(WAIT_SECONDS)
    tier.close(clean=True)


def put(tier: ObjectStoreTier, keys: list[BlockKey]) -> int:
    """Save blocks without a store around the tier; returns how many found room."""
    recorded = tier.table.record(keys, [True] * len(keys), request=0)
    placed = recorded.placed
    if not len(placed):
        return 0
    ended = threading.Event()
    left = [len(placed)]

    def on_done(rows: Any) -> None:
        assert not rows[:, k.RESULT].any()
        places = placed.take(placed.at(rows[:, k.POSITION]))
        tier.table.commit_all(places, rows[:, k.LENGTH], rows[:, k.CHECKSUM])
        left[0] -= len(rows)
        if not left[0]:
            ended.set()

    blocks = [content(key, LAYOUT.block_bytes) for key in placed.keys]
    tier.start_save(placed, Buffers.of(blocks, writable=False), k.NEVER_NS, on_done)
    assert ended.wait(WAIT_SECONDS)
    return len(placed)


def test_a_store_that_takes_nothing_costs_no_more_than_staging(
    gated: tuple[Gated, ObjectStoreTier],
) -> None:
    client, tier = gated
    saved = sum(put(tier, chain(number, 20)) for number in range(20))
    stride = slot_stride(LAYOUT.block_bytes)
    assert 0 < saved * stride <= 4 * MIB, "more is packed than may be"
    assert tier._staging.held_bytes <= 4 * MIB
    assert put(tier, chain(50, 1)) == 0
    before = tier.table.resident_blocks
    client.gate.set()
    eventually(lambda: put(tier, chain(50, 1)) == 1, "staging is not used again")
    assert tier.table.resident_blocks == before + 1
    assert tier.telemetry.value("unpublished_blocks_total") == 0


def test_an_upload_is_tried_again_and_then_given_up(
    gated: tuple[Gated, ObjectStoreTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.shared.object_mover.FIRST_PAUSE_SECONDS", 0.02)
    client, tier = gated
    client.error = errno.EIO
    keys = chain(1, 10)
    assert put(tier, keys) == 10
    client.gate.set()
    eventually(lambda: tier.table.lookup(keys) == [Lookup.MISS] * 10, "a failed upload leaves blocks")
    telemetry = tier.telemetry
    eventually(lambda: telemetry.value("unpublished_blocks_total") == 11, "they are not counted")
    assert telemetry.value("upload_retries_total") >= 2 and client.uploads % 3 == 0
    assert tier._staging.held_bytes == 0
    client.error = errno.EACCES  # no use in asking again
    retries, uploads = telemetry.value("upload_retries_total"), client.uploads
    eventually(lambda: tier.writable and put(tier, keys) == 10, "the tier does not come back")
    eventually(lambda: client.uploads == uploads + 1, "nothing is uploaded")
    eventually(lambda: telemetry.value("unpublished_blocks_total") == 21, "it is not given up")
    assert telemetry.value("upload_retries_total") == retries
    client.error = 0
    eventually(lambda: tier.writable and put(tier, keys) == 10, "the tier does not come back")
    tier.flush()
    assert tier.table.lookup(keys) == [Lookup.HIT] * 10


def test_a_slow_upload_does_not_take_the_tier_out_of_service() -> None:
    client = Gated()
    config = ObjectStoreTierConfig(**(QUICK | {"url": "s3://unused", "lease_seconds": 1.0}))
    settings = StoreConfig(io_deadline_seconds=0.3)
    tier = ObjectStoreTier(config, LAYOUT, NAMESPACE, settings, Telemetry(100), client)
    tier.open()
    eventually(lambda: put(tier, chain(1, 5)) == 5, "no grant")
    until = time.monotonic() + 1.5  # longer than the deadline and the lease
    while time.monotonic() < until:
        assert tier.writable and tier.readable
        time.sleep(0.05)
    client.gate.set()
    tier.flush()
    assert tier.telemetry.value("rejoins_total") == tier.telemetry.value("unpublished_blocks_total") == 0
    assert tier.stop(WAIT_SECONDS)
    tier.close(clean=True)


class Extent:
    """Four blocks of a mover's extent, and how to ask for them."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.stride = slot_stride(LAYOUT.block_bytes)
        self.staging = Staging(extent_bytes(4, self.stride), 1)
        self.mover = ObjectMover(
            "test",
            ObjectClient(self.store),
            self.staging,
            space=NAMESPACE.digest,
            settings=JobPoolSettings(2, 1, 100),
            part_bytes=5 * MIB,
            merge_gap_bytes=0,
        )
        self.id = ExtentId(1, 1)
        self.keys = chain(1, 4)
        assert self.staging.take(self.id)
        self.checksums = np.zeros(4, dtype=np.int64)
        sources = Buffers.of([content(key, LAYOUT.block_bytes) for key in self.keys], writable=False)
        done: list[Any] = []
        jobs = self.mover.save(self.rows(sources), [self.id], lambda rows: done.append(rows.copy()))
        jobs.wait(time.monotonic() + WAIT_SECONDS)
        for rows in done:
            self.checksums[rows[:, k.POSITION]] = rows[:, k.CHECKSUM]

    def rows(self, buffers: Buffers) -> Any:
        rows = np.zeros((4, k.COLUMNS), dtype=np.int64)
        rows[:, k.POSITION] = rows[:, k.NUMBER] = np.arange(4)
        rows[:, k.OFFSET] = rows[:, k.NUMBER] * self.stride
        rows[:, k.SEGMENT] = self.id.segment
        rows[:, k.KEY : k.KEY + 4] = np.frombuffer(b"".join(self.keys), np.int64).reshape(-1, 4)
        rows[:, k.ADDRESS], rows[:, k.LENGTH] = buffers.addresses, buffers.lengths
        rows[:, k.DEADLINE_NS] = k.NEVER_NS
        return rows


class Source:
    """Where a mover looks for blocks."""

    def __init__(self, extent: Extent) -> None:
        self.id = extent.id
        self.stride = extent.stride


def test_a_buffer_that_is_used_again_while_a_load_reads_it() -> None:
    extent = Extent()
    targets = [bytearray(LAYOUT.block_bytes) for _ in range(4)]
    rows = extent.rows(Buffers.of(targets, writable=True))
    rows[:, k.CHECKSUM] = extent.checksums
    fetched = extent.mover._fetch([Source(extent)], rows)
    assert fetched is not None and fetched.staged
    # Before the load looks at the bytes the extent is uploaded, and its buffer is another one's.
    extent.mover.upload(extent.id, b"footer", 4 * extent.stride)
    extent.staging.give_back(extent.id)
    assert extent.staging.take(ExtentId(1, 2))
    view = extent.staging.find(ExtentId(1, 2))
    assert view is not None and address_of(view) == address_of(fetched.data)
    view[: 2 * extent.stride] = os.urandom(2 * extent.stride)
    extent.mover._judge([Source(extent)], rows, fetched)
    assert not rows[:, k.RESULT].any()
    assert targets == [content(key, LAYOUT.block_bytes) for key in extent.keys]
    assert extent.mover.stop(WAIT_SECONDS)


def test_a_damaged_block_of_an_extent_that_is_being_packed() -> None:
    extent = Extent()
    view = extent.staging.find(extent.id)
    assert view is not None
    view[extent.stride + PAGE] ^= 1
    targets = [bytearray(LAYOUT.block_bytes) for _ in range(4)]
    rows = extent.rows(Buffers.of(targets, writable=True))
    rows[:, k.CHECKSUM] = extent.checksums
    extent.mover._judge([Source(extent)], rows, Fetched(view, 0, True))
    assert np.flatnonzero(rows[:, k.RESULT]).tolist() == [1]
    assert extent.mover.stop(WAIT_SECONDS)
