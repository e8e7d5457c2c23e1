"""Where blocks lie. `make_tier` builds one from its section of the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from kvstrata.config import (
    MediumFields,
    MemoryTierConfig,
    ObjectStoreTierConfig,
    PoolTierConfig,
    SharedFsTierConfig,
    StoreConfig,
    TierConfig,
)
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import Tier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.nvme import NvmeTier
from kvstrata.tiers.pool import PoolTier
from kvstrata.tiers.shared_fs import SharedFsTier
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockLayout, Namespace

T = TypeVar("T", bound=Tier)

__all__ = ["MemoryTier", "NvmeTier", "PoolTier", "SharedFsTier", "Tier", "make_tier"]


def make_tier(
    config: TierConfig,
    layout: BlockLayout,
    namespace: Namespace,
    store: StoreConfig,
    telemetry: Telemetry,
    file_io: FileIO,
    name: str = "",
) -> Tier:
    """The tier that one [[tier]] table describes; not open yet. name: its word in metrics, if not its type.

    What the table says of deadlines and failures holds in place of the store's.
    """
    if isinstance(config, MemoryTierConfig):
        return MemoryTier(config, layout, store, telemetry)
    store = _own_bounds(config, store)
    if isinstance(config, SharedFsTierConfig):
        return _named(SharedFsTier, name)(config, layout, namespace, store, telemetry, file_io)
    if isinstance(config, ObjectStoreTierConfig):
        from kvstrata.tiers.object_store import ObjectStoreTier  # noqa: PLC0415 (an extra)

        return _named(ObjectStoreTier, name)(config, layout, namespace, store, telemetry)
    if isinstance(config, PoolTierConfig):
        return _named(PoolTier, name)(config, layout, namespace, store, telemetry)
    return _named(NvmeTier, name)(config, layout, namespace, store, telemetry, file_io)


def _own_bounds(config: MediumFields, store: StoreConfig) -> StoreConfig:
    return replace(
        store,
        io_deadline_seconds=config.deadline_seconds or store.io_deadline_seconds,
        breaker_failures=config.breaker_failures or store.breaker_failures,
        breaker_retry_seconds=config.breaker_retry_seconds or store.breaker_retry_seconds,
    )


def _named(kind: type[T], name: str) -> type[T]:
    """A tier's name is its class's: the second tier of a kind gets a class of its own."""
    return kind if name in ("", kind.name) else type(kind.__name__, (kind,), {"name": name})
