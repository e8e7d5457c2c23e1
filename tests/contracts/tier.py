"""What every tier that owns its table promises.

A test subclasses `TierContract` and says how its tier is made; the rest is inherited.
"""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
import xxhash

from kvstrata.errors import BlockCorruptError
from kvstrata.table import Placement
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.engine_tier import LocalTier
from kvstrata.transfer.buffers import Arena
from kvstrata.types import BlockKey, BlockLayout, Lookup
from store_kit import chain, content, eventually

SIZES = [1, 2, 255, 256, 4095, 4096, 4097, 8191, 8192, 12_288, 65_535, 65_536, 100_001]


class TierContract(ABC):
    """persistent: blocks are there again after close and open."""

    persistent: bool

    @abstractmethod
    def make(
        self,
        folder: Path,
        layout: BlockLayout,
        *,
        capacity_bytes: int = 4 * 2**20,
        ttl_seconds: float = 0.0,
    ) -> LocalTier:
        """A tier of at most so many bytes; not open yet."""

    @abstractmethod
    def damage(self, tier: LocalTier, placement: Placement) -> None:
        """Flip a bit of a block's payload, behind the tier's back."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> LocalTier:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1))
        tier.open()
        return tier

    def put(self, tier: LocalTier, keys: list[BlockKey], size: int, *, offset: int = 0) -> int:
        """Write blocks as the store does; returns how many found room."""
        recorded = tier.table.record(keys, [True] * len(keys), request=0, ttl_seconds=tier.ttl_seconds)
        for place in recorded.reserved:
            data = content(place.key, size)
            buffer = bytearray(size + offset)
            buffer[offset:] = data
            checksum = xxhash.xxh3_64_intdigest(data)
            tier.write(place, memoryview(buffer)[offset:], checksum)
            tier.table.commit(place, length=size, checksum=checksum)
        return len(recorded.reserved)

    def get(self, tier: LocalTier, key: BlockKey, size: int, *, offset: int = 0) -> bytes | None:
        """A block's bytes, or None if it is not there; raises what `read` raises."""
        pinned = tier.table.pin([key])
        if not pinned:
            return None
        target = memoryview(bytearray(b"\xa5" * (size + offset)))[offset:]
        try:
            tier.read(pinned[0], target)
        finally:
            tier.table.unpin(pinned)
        return bytes(target)

    def check_medium(self, tier: LocalTier, capacity_bytes: int = 4 * 2**20) -> None:
        tier.table.check_integrity()
        assert tier.used_bytes_on_medium() <= capacity_bytes

    @pytest.mark.parametrize("size", SIZES)
    def test_round_trip_of_every_size(self, size: int, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(size, 1))
        tier.open()
        for number, (out, back) in enumerate([(0, 0), (1, 0), (0, 3), (512, 7)]):
            keys = chain(number, 3)
            assert self.put(tier, keys, size, offset=out) == 3
            for key in keys:
                assert self.get(tier, key, size, offset=back) == content(key, size)
        self.check_medium(tier)
        tier.close(clean=True)

    def test_blocks_shorter_than_the_layout(self, tier: LocalTier) -> None:
        sizes = [1, 100, 4096, 5000, 8191, 8192]
        keys = chain(0, len(sizes))
        for key, size in zip(keys, sizes, strict=True):
            self.put(tier, [key], size)
        for key, size in zip(keys, sizes, strict=True):
            assert self.get(tier, key, size) == content(key, size)
        tier.close(clean=True)

    def test_page_aligned_buffers(self, tier: LocalTier) -> None:
        arena = Arena(3 * 8192)
        [key] = chain(0, 1)
        arena.view[:8192] = content(key)
        checksum = xxhash.xxh3_64_intdigest(arena.view[:8192])
        [place] = tier.table.record([key], [True], request=0).reserved
        tier.write(place, arena.view[:8192], checksum)
        tier.table.commit(place, length=8192, checksum=checksum)
        [pinned] = tier.table.pin([key])
        tier.read(pinned, arena.view[8192:16384])
        tier.table.unpin([pinned])
        assert arena.view[8192:16384] == content(key)
        assert arena.view[16384:] == bytes(8192), "a read wrote beyond its target"
        tier.close(clean=True)

    def test_a_wrong_length_is_refused(self, tier: LocalTier) -> None:
        [key] = chain(0, 1)
        self.put(tier, [key], 5000)
        for size in (1, 4999, 5001, 8192):
            with pytest.raises(BlockCorruptError) as caught:
                self.get(tier, key, size)
            assert caught.value.reason == "length"
            assert caught.value.tier == tier.name and caught.value.key == key
        assert self.get(tier, key, 5000) == content(key, 5000)
        tier.close(clean=True)

    def test_damage_is_caught(self, tier: LocalTier) -> None:
        keys = chain(0, 4)
        self.put(tier, keys, 8192)
        [bad] = tier.table.pin([keys[2]])
        self.damage(tier, bad)
        tier.table.unpin([bad])
        for key in keys:
            if key == keys[2]:
                with pytest.raises(BlockCorruptError) as caught:
                    self.get(tier, key, 8192)
                assert caught.value.reason == "checksum"
                assert caught.value.slot == bad.slot
                assert keys[2].hex()[:16] in str(caught.value)
            else:
                assert self.get(tier, key, 8192) == content(key)
        # Written again, it is whole again.
        assert tier.table.discard([keys[2]]) == 1
        self.put(tier, [keys[2]], 8192)
        assert self.get(tier, keys[2], 8192) == content(keys[2])
        tier.close(clean=True)

    @pytest.mark.parametrize("capacity_bytes", [400_000, 1_000_000, 3_000_001])
    def test_the_bound_holds_while_blocks_come_and_go(self, capacity_bytes: int, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1), capacity_bytes=capacity_bytes)
        report = tier.open()
        assert report.slots == tier.table.slots > 0
        for number in range(2 * report.slots):
            keys = chain(number, 2)
            self.put(tier, keys, 8192)
            assert self.get(tier, keys[0], 8192) == content(keys[0])
            if number % 7 == 0:
                self.check_medium(tier, capacity_bytes)
        assert tier.table.resident_blocks == report.slots, "the room is not used"
        self.check_medium(tier, capacity_bytes)
        tier.close(clean=True)

    def test_a_pinned_block_stays(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1), capacity_bytes=600_000)
        tier.open()
        keys = chain(0, 3)
        self.put(tier, keys, 8192)
        pinned = tier.table.pin(keys)
        for number in range(1, 2 * tier.table.slots):
            self.put(tier, chain(number, 1), 8192)
        for placement in pinned:
            target = memoryview(bytearray(8192))
            tier.read(placement, target)
            assert bytes(target) == content(placement.key)
        assert tier.table.pinned_blocks() == 3
        tier.table.unpin(pinned)
        for number in range(1000, 1000 + 2 * tier.table.slots):
            self.put(tier, chain(number, 1), 8192)
        assert tier.table.lookup(keys) == [Lookup.MISS] * 3
        assert tier.table.pinned_blocks() == 0
        self.check_medium(tier, 600_000)
        tier.close(clean=True)

    def test_a_full_tier_of_pins_takes_nothing(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1), capacity_bytes=400_000)
        slots = tier.open().slots
        keys = chain(0, slots)
        assert self.put(tier, keys, 8192) == slots
        pinned = tier.table.pin(keys)
        assert self.put(tier, chain(1, 4), 8192) == 0
        tier.table.unpin(pinned)
        assert self.put(tier, chain(1, 4), 8192) == 4
        self.check_medium(tier, 400_000)
        tier.close(clean=True)

    def test_time_to_live(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1), ttl_seconds=0.4)
        tier.open()
        keys = chain(0, 3)
        self.put(tier, keys, 8192)
        pinned = tier.table.pin(keys[:1])
        eventually(lambda: tier.table.lookup(keys) == [Lookup.MISS] * 3, "blocks do not expire")
        assert tier.telemetry.value("expired_total", tier.name) == 3
        # Whoever holds it may still read it.
        target = memoryview(bytearray(8192))
        for placement in pinned:
            tier.read(placement, target)
            assert bytes(target) == content(keys[0])
        tier.table.unpin(pinned)
        self.check_medium(tier)
        tier.close(clean=True)

    def test_flush_and_probes(self, tier: LocalTier) -> None:
        tier.probe_read()
        tier.probe_write()
        self.put(tier, chain(0, 3), 8192)
        tier.flush()
        tier.flush()
        tier.probe_read()
        tier.probe_write()
        tier.refresh()
        self.check_medium(tier)
        tier.close(clean=True)

    def test_open_and_closed(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1))
        assert not tier.opened and not tier.readable and not tier.writable
        tier.close(clean=True)
        tier.open()
        assert tier.opened and tier.readable and tier.writable
        tier.close(clean=True)
        assert not tier.opened and not tier.readable and not tier.writable
        tier.close(clean=True)

    def test_close_and_open_again(self, tmp_path: Path) -> None:
        saved: list[BlockKey] = []
        for run in range(4):
            tier = self.make(tmp_path / "tier", BlockLayout(8192, 1))
            report = tier.open()
            assert report.restored == (len(saved) if self.persistent else 0)
            for key in saved:
                assert self.get(tier, key, 8192) == (content(key) if self.persistent else None)
            keys = chain(run, 5)
            assert self.put(tier, keys, 8192) == 5
            saved += keys
            self.check_medium(tier)
            tier.close(clean=True)

    def test_many_threads(self, tmp_path: Path) -> None:
        """Reads and writes of different blocks at the same time never mix their bytes."""
        tier = self.make(tmp_path / "tier", BlockLayout(5000, 1), capacity_bytes=1_000_000)
        tier.open()
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(60):
                    keys = chain(rng.randrange(40), 2)
                    self.put(tier, keys, 5000)
                    for key in keys:
                        got = self.get(tier, key, 5000, offset=rng.randrange(3))
                        assert got is None or got == content(key, 5000)
            except BaseException as error:  # noqa: BLE001 - raised in the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert tier.table.pinned_blocks() == 0
        self.check_medium(tier, 1_000_000)
        tier.close(clean=True)


def silent() -> Telemetry:
    return Telemetry(100)
