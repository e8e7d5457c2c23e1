"""What every tier promises that many processes share, beside what every tier does.

A test subclasses `SharedTierContract` and says how a member is made; the rest is inherited. Members of one
test live in one process, with threads, ids and books of their own.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from contracts.tier import TierContract
from kvstrata.errors import ConfigError, FormatVersionError
from kvstrata.table import Placement
from kvstrata.tiers.shared.format import MEMBERS, SETTINGS_FILE, journal_name
from kvstrata.tiers.shared.tier import SharedTier
from kvstrata.types import BlockKey, BlockLayout, Lookup
from store_kit import WAIT_SECONDS, chain, content, eventually

CAPACITY_BYTES = 64 * 2**20
LAYOUT = BlockLayout(8192, 1)


class SharedTierContract(TierContract):
    """Inherited tests that do not fit are replaced: room comes from a collector, and blocks leave later."""

    persistent = True

    @abstractmethod
    def member(
        self, folder: Path, layout: BlockLayout = LAYOUT, *, capacity_bytes: int, ttl_seconds: float = 0.0
    ) -> SharedTier:
        """A tier on that folder, with short times; not open yet."""

    def make(
        self,
        folder: Path,
        layout: BlockLayout,
        *,
        capacity_bytes: int = CAPACITY_BYTES,
        ttl_seconds: float = 0.0,
    ) -> SharedTier:
        tier = self.member(folder, layout, capacity_bytes=capacity_bytes, ttl_seconds=ttl_seconds)
        self.made.append(tier)
        return tier

    @pytest.fixture(autouse=True)
    def close_members(self) -> Iterator[None]:
        self.made: list[SharedTier] = []
        yield
        for tier in self.made:
            tier.close(clean=True)

    @pytest.fixture
    def tier(self, tmp_path: Path) -> SharedTier:
        """Opened, and with room."""
        tier = self.make(tmp_path / "tier", LAYOUT)
        tier.open()
        self.wait_for_room(tier)
        return tier

    def wait_for_room(self, tier: SharedTier) -> None:
        eventually(lambda: tier.session is not None and tier.session.room.limit_bytes > 0, "no room comes")

    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[SharedTier, SharedTier]:
        """Two members of one folder."""
        first, second = (self.make(tmp_path / "tier", LAYOUT) for _ in range(2))
        for tier in (first, second):
            tier.open()
            self.wait_for_room(tier)
        return first, second

    def put(self, tier: SharedTier, keys: list[BlockKey], size: int = 8192, *, offset: int = 0) -> int:
        """Write blocks; waits for room."""
        left, written, until = keys, 0, time.monotonic() + WAIT_SECONDS
        while left:
            assert time.monotonic() < until, "no room comes"
            recorded = tier.table.record(left, [True] * len(left), request=1, ttl_seconds=tier.ttl_seconds)
            for place in recorded.reserved:
                data = content(place.key, size)
                buffer = bytearray(size + offset)
                buffer[offset:] = data
                checksum = xxhash.xxh3_64_intdigest(data)
                tier.write(place, memoryview(buffer)[offset:], checksum)
                tier.table.commit(place, length=size, checksum=checksum)
                written += 1
            left = [left[position] for position in recorded.refused]
            if left:
                time.sleep(0.01)
        return written

    def check_medium(self, tier: SharedTier, capacity_bytes: int = CAPACITY_BYTES) -> None:
        super().check_medium(tier, capacity_bytes)
        tier.catalog.check_integrity()

    def find(self, tier: SharedTier, keys: list[BlockKey]) -> None:
        """Wait until a member knows them all."""
        eventually(lambda: tier.table.lookup(keys) == [Lookup.HIT] * len(keys), "blocks are not found")

    # What does not hold for what many share

    @pytest.mark.skip(reason="who leaves is the collector's choice: test_the_bound_holds_for_all_members")
    def test_the_bound_holds_while_blocks_come_and_go(self) -> None: ...

    @pytest.mark.skip(reason="a pin keeps an extent open, not alive: test_a_pinned_block_can_be_read")
    def test_a_pinned_block_stays(self) -> None: ...

    @pytest.mark.skip(reason="a pin keeps an extent open, not alive")
    def test_a_full_tier_of_pins_takes_nothing(self) -> None: ...

    def test_time_to_live(self, tmp_path: Path) -> None:
        """The index forgets what has expired; the collector may be faster, and take the whole extent."""
        tier = self.make(tmp_path / "tier", LAYOUT, ttl_seconds=0.4)
        tier.open()
        keys = chain(0, 3)
        self.put(tier, keys)
        pinned = tier.table.pin(keys[:1])
        eventually(lambda: tier.table.lookup(keys) == [Lookup.MISS] * 3, "blocks do not expire")
        names = ("expired_total", "lost_blocks_total")  # counted just after the blocks are out of sight
        eventually(
            lambda: sum(tier.telemetry.value(name, tier.name) for name in names) == 3,
            "expired blocks are not counted",
        )
        tier.table.unpin(pinned)
        self.check_medium(tier)

    # One member

    def test_too_small_a_capacity_is_said_so(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="too small"):
            self.member(tmp_path / "tier", BlockLayout(2**20, 1), capacity_bytes=3 * 2**20)

    def test_a_run_of_blocks_lies_side_by_side(self, tier: SharedTier) -> None:
        keys = chain(0, 40)
        self.put(tier, chain(1, 1))
        recorded = tier.table.record(keys, [True] * 40, request=2)
        slots = recorded.placed.slots.tolist()
        numbers, extents = tier.table.extents_of(recorded.placed.indices)
        assert len(extents) == 1 and len(set(numbers.tolist())) == 1
        assert slots == list(range(slots[0], slots[0] + 40))
        tier.table.abort_all(recorded.placed)
        assert tier.table.lookup(keys) == [Lookup.MISS] * 40
        tier.table.check_integrity()

    def test_reserved_blocks_are_pending(self, tier: SharedTier) -> None:
        keys = chain(0, 2)
        self.put(tier, chain(1, 1))
        recorded = tier.table.record(keys, [True, True], request=2)
        assert tier.table.lookup(keys) == [Lookup.PENDING] * 2
        assert tier.table.record(keys, [True, True], request=3).hits == [0, 1]
        tier.table.abort_all(recorded.placed)
        assert tier.flush_by(time.monotonic() + WAIT_SECONDS)

    def test_flush_publishes(self, tier: SharedTier) -> None:
        self.put(tier, chain(0, 3))
        assert tier.flush_by(time.monotonic() + WAIT_SECONDS)
        [extent] = tier.catalog.extents()
        assert len(extent.entries) == 3
        assert tier.telemetry.value("published_extents_total", tier.name) == 1
        assert tier.telemetry.value("published_bytes_total", tier.name) == extent.file_bytes

    def test_the_bound_holds_for_all_members(self, tmp_path: Path) -> None:
        capacity = 4 * 2**20
        tiers = [self.make(tmp_path / "tier", LAYOUT, capacity_bytes=capacity) for _ in range(2)]
        for tier in tiers:
            tier.open()
        for number in range(60):
            tier = tiers[number % 2]
            self.put(tier, chain(number, 10))
            assert tier.used_bytes_on_medium() <= capacity
            self.get(tier, chain(number, 1)[0], 8192)
        assert sum(tier.telemetry.value("shared_collected_extents_total") for tier in tiers) > 0
        for tier in tiers:
            tier.table.check_integrity()
            tier.catalog.check_integrity()

    def test_many_threads(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(5000, 1))
        tier.open()
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for number in range(30):
                    keys = chain((seed * 7 + number * 3) % 40, 2)
                    self.put(tier, keys, 5000)
                    for key in keys:
                        got = self.get(tier, key, 5000, offset=number % 3)
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
        self.check_medium(tier)

    # Several members

    def test_what_one_writes_all_read(self, pair: tuple[SharedTier, SharedTier]) -> None:
        first, second = pair
        mine, theirs = chain(0, 30), chain(1, 30)
        self.put(first, mine)
        self.put(second, theirs)
        for tier, keys in ((second, mine), (first, theirs)):
            self.find(tier, keys)
            for key in keys:
                assert self.get(tier, key, 8192) == content(key)
        assert second.telemetry.value("found_blocks_total", second.name) == 30
        # What is there is a hit for all, and is not written twice.
        recorded = second.table.record(mine, [True] * 30, request=9)
        assert recorded.hits == list(range(30)) and not len(recorded.placed)

    def test_a_late_member_finds_what_was_there(self, tmp_path: Path) -> None:
        first = self.make(tmp_path / "tier", LAYOUT)
        first.open()
        self.put(first, chain(0, 20))
        first.flush()
        late = self.make(tmp_path / "tier", LAYOUT)
        assert late.open().restored == 20
        for key in chain(0, 20):
            assert self.get(late, key, 8192) == content(key)

    def test_a_member_that_closed_leaves_its_blocks(self, tmp_path: Path) -> None:
        first, second = (self.make(tmp_path / "tier", LAYOUT) for _ in range(2))
        first.open()
        second.open()
        self.put(first, chain(0, 20))
        first.close(clean=True)
        self.find(second, chain(0, 20))
        gone = first.session
        assert gone is not None
        eventually(
            lambda: gone.member.word not in second._medium.folders(MEMBERS),
            "a closed member is not adopted",
        )
        for key in chain(0, 20):
            assert self.get(second, key, 8192) == content(key)
        second.catalog.check_integrity()

    def test_the_same_block_twice(self, pair: tuple[SharedTier, SharedTier]) -> None:
        """Two members write one prefix at a time: both copies serve, and one may go."""
        first, second = pair
        keys = chain(0, 8)
        self.put(first, keys)
        self.put(second, keys)
        for tier in pair:
            tier.flush()
            eventually(lambda tier=tier: len(tier.catalog) == 2, "the other extent is not found")
            eventually(
                lambda tier=tier: tier.telemetry.value("duplicate_blocks_total", tier.name) == 8,
                "the second copies are not counted as duplicates",
            )
            for key in keys:
                assert self.get(tier, key, 8192) == content(key)
        [pinned] = first.table.pin(keys[:1])
        assert first.table.drop(pinned)
        first.table.unpin([pinned])
        assert self.get(first, keys[0], 8192) == content(keys[0]), "the other copy does not serve"
        assert first.table.discard(keys) == 8
        assert first.table.lookup(keys) == [Lookup.MISS] * 8
        first.table.check_integrity()

    def test_other_namespaces_are_passed_over(self, pair: tuple[SharedTier, SharedTier]) -> None:
        first, second = pair
        self.put(first, chain(0, 5))
        first.flush()
        eventually(lambda: len(second.catalog) == 1, "the extent is not found")
        [extent] = second.catalog.extents()
        assert extent.namespace == first._namespace.digest
        assert second.table.lookup(chain(5, 3)) == [Lookup.MISS] * 3

    def test_an_extent_that_is_gone_is_a_miss(self, pair: tuple[SharedTier, SharedTier]) -> None:
        """Removed behind everybody's back: what the index says is found out at the first load."""
        first, second = pair
        self.put(first, chain(0, 5))
        first.flush()
        self.find(second, chain(0, 5))
        [extent] = second.catalog.extents()
        second._medium.remove(extent.id.name)
        assert self.load_results(second, chain(0, 5)) == {"gone"}
        eventually(lambda: second.table.lookup(chain(0, 5)) == [Lookup.MISS] * 5, "blocks stay")
        assert second.reads.closed, "what was collected is no error of the medium"
        second.table.check_integrity()
        # And it can be written again.
        self.put(second, chain(0, 5))
        assert self.get(second, chain(0, 1)[0], 8192) == content(chain(0, 1)[0])

    def load_results(self, tier: SharedTier, keys: list[BlockKey]) -> set[str]:
        """How loads of these ended: "good", "gone", or the error's number."""
        found: set[str] = set()
        pinned = tier.table.pin(keys)
        for placement in pinned:
            try:
                tier.read(placement, memoryview(bytearray(8192)))
                found.add("good")
            except FileNotFoundError:
                found.add("gone")
            except OSError as error:
                found.add(str(error.errno))
        tier.table.unpin(pinned)
        return found

    def test_a_damaged_journal_is_survived(self, tmp_path: Path) -> None:
        first = self.make(tmp_path / "tier", LAYOUT)
        first.open()
        self.put(first, chain(0, 4))
        first.flush()
        session = first.session
        assert session is not None
        self.spoil(first, journal_name(session.member.id, 0))
        late = self.make(tmp_path / "tier", LAYOUT)
        late.open()
        self.find(late, chain(0, 4))
        assert late.telemetry.value("damaged_files_total", late.name, "journal") == 1
        assert any("journal damaged" in event.kind for event in late.telemetry.events())
        for key in chain(0, 4):
            assert self.get(late, key, 8192) == content(key)

    @abstractmethod
    def spoil(self, tier: SharedTier, name: str) -> None:
        """Flip a byte in the middle of a small file of the folder."""

    def test_a_folder_of_another_version(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", LAYOUT)
        tier._medium.prepare()
        tier._medium.create(
            SETTINGS_FILE, tier._entrance.own.encode().replace(b'"version": 1', b'"version": 9')
        )
        with pytest.raises(FormatVersionError, match="version 9"):
            tier.open()

    def test_a_folder_that_is_not_ours(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", LAYOUT)
        tier._medium.prepare()
        tier._medium.create(SETTINGS_FILE, b"something else")
        with pytest.raises(FormatVersionError, match="not what kvstrata wrote"):
            tier.open()

    def test_members_with_other_settings_keep_to_the_folder(self, tmp_path: Path) -> None:
        first = self.make(tmp_path / "tier", LAYOUT)
        second = self.make(tmp_path / "tier", LAYOUT, capacity_bytes=2 * CAPACITY_BYTES)
        first.open()
        second.open()
        assert second.settings == first.settings
        assert second.table.capacity_bytes == CAPACITY_BYTES
        assert any("settings differ" in event.kind for event in second.telemetry.events())

    def test_a_member_held_for_dead_joins_anew(self, pair: tuple[SharedTier, SharedTier]) -> None:
        first, second = pair
        self.put(first, chain(0, 3))
        first.flush()
        self.put(first, chain(1, 3))
        before = first.session
        assert before is not None
        first._medium.remove_folder(f"{MEMBERS}/{before.member.word}")
        eventually(
            lambda: first.session is not None and first.session is not before,
            "the member does not join anew",
        )
        assert first.telemetry.value("rejoins_total", first.name) == 1
        self.put(first, chain(2, 3))
        first.flush()
        self.find(second, chain(2, 3))
        for tier in pair:
            for key in chain(2, 3):
                assert self.get(tier, key, 8192) == content(key)
            tier.table.check_integrity()

    def test_a_pinned_block_can_be_read(self, tier: SharedTier) -> None:
        keys = chain(0, 3)
        self.put(tier, keys)
        tier.flush()
        for key in keys:
            assert self.get(tier, key, 8192) == content(key)
        pinned = tier.table.pin(keys)
        assert tier.table.discard(keys) == 3
        for placement in pinned:
            target = memoryview(bytearray(8192))
            tier.read(placement, target)
            assert bytes(target) == content(placement.key)
        tier.table.unpin(pinned)
        assert tier.table.pinned_blocks() == 0
        tier.table.check_integrity()

    def slot_of(self, tier: SharedTier, placement: Placement) -> tuple[str, int]:
        """Name of the extent's file and offset of a pinned block's slot there."""
        import numpy as np

        numbers, extents = tier.table.extents_of(np.array([placement.index]))
        extent = extents[int(numbers[0])]
        return (extent.id.name if extent.published else extent.id.part), placement.slot * extent.stride
