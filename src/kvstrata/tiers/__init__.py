"""Where blocks lie. `make_tier` builds one from its section of the configuration."""

from __future__ import annotations

from kvstrata.config import MemoryTierConfig, StoreConfig, TierConfig
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import Tier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.nvme import NvmeTier
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockLayout, Namespace

__all__ = ["MemoryTier", "NvmeTier", "Tier", "make_tier"]


def make_tier(
    config: TierConfig,
    layout: BlockLayout,
    namespace: Namespace,
    store: StoreConfig,
    telemetry: Telemetry,
    file_io: FileIO,
) -> Tier:
    """The tier that one [[tier]] table describes; not open yet."""
    if isinstance(config, MemoryTierConfig):
        return MemoryTier(config, layout, store, telemetry)
    return NvmeTier(config, layout, namespace, store, telemetry, file_io)
