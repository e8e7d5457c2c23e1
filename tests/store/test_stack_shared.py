"""Two members of one shared folder: what one saved, the other reads through its local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import SharedFsTierConfig
from kvstrata.store import BlockStore
from kvstrata.types import Lookup, Outcome
from store_kit import (
    chain,
    check_bytes,
    check_quiet,
    eventually,
    finished,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    served,
)

KEYS = chain(1, 8)


def shared(folder: Path, **fields: Any) -> SharedFsTierConfig:
    quick = {"publish_seconds": 0.05, "refresh_seconds": 0.05, "lease_seconds": 2.0}
    return SharedFsTierConfig(
        path=str(folder / "shared"), capacity_bytes=256 * 2**20, extent_bytes=2**20, **(quick | fields)
    )


def cached(folder: Path, **fields: Any) -> BlockStore:
    """A member whose saves go to the shared folder, and whose reads are kept."""
    settings: dict[str, Any] = {"attach": "always", "write_mode": "none"} | fields
    tiers: Any = (nvme_tier(folder / "cache", **settings), shared(folder))
    return open_store(*tiers)


def publish(store: BlockStore) -> None:
    """Save until the shared tier has taken it all, which it does when room was granted."""
    eventually(
        lambda: (
            save(store, KEYS) and store.flush() and store.tiers[-1].table.lookup(KEYS) == [Lookup.HIT] * 8
        ),
        "the shared tier never takes the blocks",
    )


@pytest.mark.parametrize("mode", ["back", "through"])
def test_what_one_saved_the_other_reads_once_from_the_shared_folder(mode: str, tmp_path: Path) -> None:
    tiers: Any = (memory_tier(64), shared(tmp_path, write_mode=mode))
    with open_store(*tiers) as writer:
        publish(writer)
        with cached(tmp_path, attach_chunk="whole") as reader:
            eventually(lambda: reader.lookup(KEYS).blocks == 8, "the other member's blocks are not seen")
            targets = [bytearray(8192) for _ in range(2)]
            outcomes = finished(reader.load(reader.lookup(KEYS), targets))
            assert outcomes == [Outcome.LOADED] * 2
            check_bytes(KEYS[:2], targets, outcomes)
            check_quiet(reader)
            # The rest of the extent came along.
            assert reader.tiers[0].table.lookup(KEYS) == [Lookup.HIT] * 8
            read = reader.telemetry.value("read_bytes_total", "shared_fs")
            assert load(reader, KEYS) == [Outcome.LOADED] * 8
            assert reader.telemetry.value("read_bytes_total", "shared_fs") == read
            assert [status.shared for status in reader.status()] == [False, True]
    # The cache holds them when nobody else does.
    with open_store(nvme_tier(tmp_path / "cache")) as alone:
        assert served(alone, KEYS) == set(KEYS)


def test_a_bad_block_of_the_cache_comes_from_the_shared_folder(tmp_path: Path) -> None:
    with cached(tmp_path) as store:
        publish(store)
        assert store.tiers[0].table.lookup(KEYS) == [Lookup.MISS] * 8
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)
        for path in (tmp_path / "cache").glob("seg-*"):
            data = bytearray(path.read_bytes())
            data[4096 + 4096 + 100] ^= 1
            path.write_bytes(data)
        assert served(store, KEYS) == set(KEYS)
        assert store.telemetry.value("misses_total", "nvme", "corrupt_checksum") == 1
        check_quiet(store)
