"""What the tests of a shared folder with faults share: members, with a disk of their own or without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fs_kit import events, fs_config

from kvstrata.config import Config, NvmeTierConfig, SharedFsTierConfig, StoreConfig
from kvstrata.store import BlockStore
from kvstrata.tiers.shared_fs import SharedFsTier
from kvstrata.types import BlockKey, Lookup
from store_kit import LAYOUT, NAMESPACE, WAIT_SECONDS, chain, eventually, nvme_tier, save

DEADLINE_SECONDS = 1.0
THEIRS, OWN = chain(0, 8), chain(1, 8)


def shared(store: BlockStore) -> SharedFsTier:
    tier = store.tiers[-1]
    assert isinstance(tier, SharedFsTier)
    return tier


def open_member(
    folder: Path, nvme: Path | None = None, *, deadline_seconds: float = DEADLINE_SECONDS, **fields: Any
) -> BlockStore:
    settings = StoreConfig(
        io_deadline_seconds=deadline_seconds,
        breaker_retry_seconds=0.2,
        close_seconds=3.0,
        io_threads=2,
        io_store_threads=1,
    )
    tiers: list[NvmeTierConfig | SharedFsTierConfig] = [fs_config(folder, **fields)]
    if nvme is not None:
        tiers.insert(0, nvme_tier(nvme))
    return BlockStore(Config(store=settings, tiers=tuple(tiers)), LAYOUT, NAMESPACE)


def told(store: BlockStore, what: Callable[[], bool], message: str) -> None:
    """`eventually`, with the events of a store if it never comes."""
    try:
        eventually(what, message)
    except AssertionError as error:
        raise AssertionError(f"{message}: {events(store)}") from error


def published(store: BlockStore, keys: list[BlockKey]) -> None:
    """Save until there is room, and until everybody can find it."""

    def good() -> bool:
        save(store, keys)
        store.flush(WAIT_SECONDS)
        index = shared(store).table
        return index.lookup(keys) == [Lookup.HIT] * len(keys)

    told(store, good, "nothing is published")


def await_found(store: BlockStore, keys: list[BlockKey]) -> None:
    index = shared(store).table
    told(store, lambda: index.lookup(keys) == [Lookup.HIT] * len(keys), "blocks are not found")
