"""The memory tier keeps the contract of a local tier, and serves views in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from contracts.tier import TierContract, silent
from kvstrata.config import MemoryTierConfig, StoreConfig
from kvstrata.errors import ConfigError
from kvstrata.table import Placement
from kvstrata.tiers import MemoryTier
from kvstrata.tiers.engine_tier import LocalTier
from kvstrata.transfer.buffers import PAGE, address_of
from kvstrata.types import BlockLayout
from store_kit import chain, content


class TestMemoryTier(TierContract):
    persistent = False

    def make(
        self,
        folder: Path,
        layout: BlockLayout,
        *,
        capacity_bytes: int = 4 * 2**20,
        ttl_seconds: float = 0.0,
    ) -> MemoryTier:
        config = MemoryTierConfig(capacity_bytes=capacity_bytes, ttl_seconds=ttl_seconds)
        return MemoryTier(config, layout, StoreConfig(), silent())

    def damage(self, tier: LocalTier, placement: Placement) -> None:
        assert isinstance(tier, MemoryTier)
        with tier.view(placement) as view:
            view[17] ^= 4

    def test_views_are_in_place_and_aligned(self, tier: LocalTier) -> None:
        assert isinstance(tier, MemoryTier)
        keys = chain(0, 3)
        self.put(tier, keys, 8192)
        pinned = tier.table.pin(keys)
        places = set()
        for placement in pinned:
            with tier.view(placement) as view:
                assert bytes(view) == content(placement.key)
                assert address_of(view) % PAGE == 0
                places.add(address_of(view))
        assert len(places) == 3
        tier.table.unpin(pinned)
        tier.close(clean=True)

    def test_closing_while_a_view_is_held(self, tier: LocalTier) -> None:
        """The memory goes with the last view, and the tier is closed all the same."""
        assert isinstance(tier, MemoryTier)
        [key] = chain(0, 1)
        self.put(tier, [key], 8192)
        view = tier.view(tier.table.pin([key])[0])
        tier.close(clean=True)
        assert not tier.opened
        assert bytes(view) == content(key)
        view.release()

    def test_checking_can_be_turned_off(self, tmp_path: Path) -> None:
        tier = MemoryTier(MemoryTierConfig(verify="never"), BlockLayout(8192, 1), StoreConfig(), silent())
        tier.open()
        keys = chain(0, 1)
        self.put(tier, keys, 8192)
        [placement] = tier.table.pin(keys)
        self.damage(tier, placement)
        tier.table.unpin([placement])
        assert self.get(tier, keys[0], 8192) != content(keys[0])
        tier.close(clean=True)

    def test_too_small_for_one_block(self) -> None:
        with pytest.raises(ConfigError, match="raise it"):
            MemoryTier(MemoryTierConfig(capacity_bytes=8191), BlockLayout(8192, 1), StoreConfig(), silent())
