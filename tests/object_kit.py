"""What the tests of objects share: quick configurations, and members that save and load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from backends.radosgw import S3Account
from kvstrata.config import ObjectStoreTierConfig
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, BlockLayout, Outcome
from store_kit import WAIT_SECONDS, eventually, load, save

pytest.importorskip("obstore", reason="obstore is not installed; run: pip install 'kvstrata[object-store]'")

from kvstrata.tiers.object_store import ObjectStoreTier

LAYOUT = BlockLayout(block_bytes=16_384, block_tokens=1)
MIB = 2**20
QUICK: dict[str, Any] = {
    "capacity_bytes": 64 * MIB,
    "extent_bytes": MIB,
    "part_bytes": 5 * MIB,
    "publish_seconds": 0.1,
    "refresh_seconds": 0.1,
    "lease_seconds": 2.0,
    "access_seconds": 0.2,
    "staging_bytes": 4 * MIB,
    "request_seconds": 5.0,
}


def local_config(folder: Path, **fields: Any) -> ObjectStoreTierConfig:
    return ObjectStoreTierConfig(**(QUICK | {"url": f"file://{folder}"} | fields))


def s3_config(account: S3Account, **fields: Any) -> ObjectStoreTierConfig:
    options = {
        "endpoint": account.endpoint,
        "region": account.region,
        "access_key_id": account.access_key,
        "secret_access_key": account.secret_key,
    }
    return ObjectStoreTierConfig(
        **(QUICK | {"url": f"s3://{account.bucket}/a/b", "options": options} | fields)
    )


def tier_of(store: BlockStore) -> ObjectStoreTier:
    [tier] = store.tiers
    assert isinstance(tier, ObjectStoreTier)
    return tier


def save_all(store: BlockStore, keys: Sequence[BlockKey]) -> None:
    """Until there is room for all of them."""

    def saved() -> bool:
        return {Outcome.SAVED, Outcome.PRESENT} >= set(save(store, keys))

    eventually(saved, "the collector gives no room")


def seen(store: BlockStore, keys: Sequence[BlockKey]) -> bool:
    return store.lookup(keys).blocks == len(keys)


def publish(store: BlockStore, keys: Sequence[BlockKey], *others: BlockStore) -> None:
    """Save, and wait until every other member knows of it."""
    save_all(store, keys)
    assert store.flush(WAIT_SECONDS)
    for other in others:
        eventually(lambda other=other: seen(other, keys), "another member does not see an extent")


def all_loaded(store: BlockStore, keys: Sequence[BlockKey]) -> bool:
    return set(load(store, keys)) == {Outcome.LOADED}
