"""The shared_fs tier keeps the contracts of a tier and of a shared one, with and without O_DIRECT."""

from __future__ import annotations

from pathlib import Path

import pytest

from contracts.shared_tier import CAPACITY_BYTES, LAYOUT, SharedTierContract
from contracts.tier import silent
from kvstrata.config import SharedFsTierConfig, StoreConfig, parse_config
from kvstrata.errors import ConfigError
from kvstrata.table import Placement
from kvstrata.tiers.shared_fs import SharedFsTier
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockLayout
from store_kit import NAMESPACE, overwrite, read_at


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", ""),
        ("extent_bytes", 1000),
        ("access_bytes", 100),
        ("publish_seconds", 0.0),
        ("refresh_seconds", -1.0),
        ("lease_seconds", 0.0),
        ("access_seconds", 0.0),
        ("live_share", 0.0),
        ("live_share", 1.5),
        ("open_files", 0),
        ("open_threads", 0),
        ("rewrite_bytes_per_second", 1),
        ("stripe_count", -2),
        ("stripe_bytes", 100_000),
        ("dom_bytes", 1),
    ],
)
def test_values_that_cannot_work(key: str, value: object) -> None:
    tier = {"type": "shared_fs", "path": "/somewhere", key: value}
    with pytest.raises(ConfigError, match=rf"tier\[0\].{key}"):
        parse_config({"tier": [tier]})


def test_what_a_file_says_is_what_the_tier_gets() -> None:
    text = {"type": "shared_fs", "path": "/somewhere", "capacity_bytes": "2TiB", "lease_seconds": 3}
    [tier] = parse_config({"tier": [text]}).tiers
    assert isinstance(tier, SharedFsTierConfig)
    assert (tier.capacity_bytes, tier.lease_seconds, tier.type) == (2 * 2**40, 3.0, "shared_fs")


class SharedFsContract(SharedTierContract):
    direct_io: bool

    def member(
        self,
        folder: Path,
        layout: BlockLayout = LAYOUT,
        *,
        capacity_bytes: int = CAPACITY_BYTES,
        ttl_seconds: float = 0.0,
    ) -> SharedFsTier:
        config = SharedFsTierConfig(
            path=str(folder),
            capacity_bytes=capacity_bytes,
            ttl_seconds=ttl_seconds,
            direct_io=self.direct_io,
            extent_bytes=2**20,
            publish_seconds=0.1,
            refresh_seconds=0.05,
            lease_seconds=1.0,
            access_seconds=0.2,
        )
        return SharedFsTier(config, layout, NAMESPACE, StoreConfig(), silent(), FileIO())

    def damage(self, tier: SharedFsTier, placement: Placement) -> None:
        name, offset = self.slot_of(tier, placement)
        path, at = tier.folder / name, offset + PAGE + 1234
        overwrite(path, at, bytes([read_at(path, at, 1)[0] ^ 4]))

    def spoil(self, tier: SharedFsTier, name: str) -> None:
        path = tier.folder / name
        at = path.stat().st_size // 2
        overwrite(path, at, bytes([read_at(path, at, 1)[0] ^ 4]))


class TestDirect(SharedFsContract):
    direct_io = True


class TestBuffered(SharedFsContract):
    direct_io = False
