"""SharedIndex against a slow plain model: what is found, where it lies, and that no id is ever lost."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstrata.table import Placements
from kvstrata.tiers.shared.batches import Added, Batch, BatchKind
from kvstrata.tiers.shared.catalog import Catalog, Change, Extent
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE, extent_bytes
from kvstrata.tiers.shared.extents import ExtentWriter, OpenExtent
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.index import SharedIndex
from kvstrata.types import BlockKey, Lookup

STRIDE = 8192
SPACE = bytes(range(32))
KEYS = [BlockKey(bytes([number]) * 32) for number in range(24)]
SLOTS = 4
ME = 7


class Room:
    """As an allowance, with what a test grants."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.published_bytes = 0
        self.taken_bytes = 0
        self.asked_bytes = 0

    def take(self, size: int) -> bool:
        if self.published_bytes + self.taken_bytes + size > self.limit_bytes:
            return False
        self.taken_bytes += size
        return True

    def ask(self, size: int) -> None:
        self.asked_bytes += size

    def refund(self, size: int) -> None:
        self.taken_bytes -= size

    def publish(self, taken: int, size: int) -> None:
        self.taken_bytes -= taken
        self.published_bytes += size


@dataclass
class Berth:
    room: Room
    sequence: int = 0
    may_write: bool = True

    def next_extent(self) -> ExtentId:
        self.sequence += 1
        return ExtentId(ME, self.sequence)


@dataclass
class Rig:
    """An index and all that feeds it."""

    room: Room = field(default_factory=lambda: Room(2**40))
    now_ms: int = 1_000

    def __post_init__(self) -> None:
        self.berth = Berth(self.room)
        self.writer = ExtentWriter(slots=SLOTS, stride=STRIDE, namespace=SPACE, berth=lambda: self.berth)
        self.duplicates = self.expired = self.refused = 0
        self.touched: list[tuple[int, list[int]]] = []
        self.index = SharedIndex(
            self.writer,
            namespace=SPACE,
            stride=STRIDE,
            clock_ms=lambda: self.now_ms,
            on_touch=lambda request, words: self.touched.append((request, words.tolist())),
            on_duplicates=self.count_duplicates,
            on_expired=self.count_expired,
            on_refused=self.count_refused,
        )

    def count_duplicates(self, count: int) -> None:
        self.duplicates += count

    def count_expired(self, count: int) -> None:
        self.expired += count

    def count_refused(self, count: int) -> None:
        self.refused += count

    def publish(self) -> list[Extent]:
        """Everything that is full and has nothing in flight."""
        found = []
        while (extent := self.writer.next_done(0.0)) is not None:
            footer = extent.footer()
            if not len(footer.entries):
                self.index.forget(extent.id)
                self.writer.close(extent, 0)
                continue
            size = footer.start + len(footer.encode())
            self.writer.close(extent, size)
            known = Extent(extent.id, size, STRIDE, SPACE, footer.entries, {ME})
            self.index.take_in(Change(added=(known,)))
            found.append(known)
        return found

    def add(self, sequence: int, keys: list[BlockKey], expires_ms: int = 0, member: int = 1) -> Extent:
        extent = Extent(
            ExtentId(member, sequence), 1, STRIDE, SPACE, entries_of(keys, expires_ms), {member}
        )
        self.index.take_in(Change(added=(extent,)))
        return extent


def entries_of(keys: list[BlockKey], expires_ms: int = 0) -> np.ndarray:
    entries = np.zeros(len(keys), ENTRY_DTYPE)
    entries["key"] = np.frombuffer(b"".join(keys), "V32")
    entries["number"] = np.arange(len(keys))
    entries["length"] = 4096 - np.arange(len(keys))
    entries["checksum"] = np.arange(len(keys), dtype=np.uint64) + np.uint64(2**63)
    entries["expires_ms"] = expires_ms
    return entries


@dataclass
class Block:
    """The model: a copy of a block. extent, slot: where."""

    key: BlockKey
    extent: ExtentId
    slot: int


key_lists = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.index = self.rig.index
        self.copies: dict[BlockKey, list[Block]] = {}
        self.extents: dict[ExtentId, Extent] = {}
        self.writing: list[Placements] = []
        self.pinned: list[tuple[Placements, list[Block]]] = []
        self.sequence = 0

    def where(self, placements: Placements) -> list[tuple[ExtentId, int]]:
        numbers, extents = self.index.extents_of(placements.indices)
        return [
            (extents[number].id, slot)
            for number, slot in zip(numbers.tolist(), placements.slots.tolist(), strict=True)
        ]

    @rule(keys=key_lists)
    def others_publish(self, keys: list[BlockKey]) -> None:
        self.sequence += 1
        extent = self.rig.add(self.sequence, keys)
        self.extents[extent.id] = extent
        for slot, key in enumerate(keys):
            self.copies.setdefault(key, []).append(Block(key, extent.id, slot))

    @rule(data=st.data())
    @precondition(lambda self: self.extents)
    def an_extent_goes(self, data: st.DataObject) -> None:
        extent = self.extents.pop(data.draw(st.sampled_from(sorted(self.extents))))
        before = sum(map(len, self.copies.values()))
        self.forget(extent.id)
        _, gone = self.index.take_in(Change(gone=(extent,)))
        assert gone == before - sum(map(len, self.copies.values()))

    def forget(self, extent: ExtentId) -> None:
        for key in list(self.copies):
            self.copies[key] = [copy for copy in self.copies[key] if copy.extent != extent]
            if not self.copies[key]:
                del self.copies[key]

    @rule(keys=key_lists, data=st.data())
    def record(self, keys: list[BlockKey], data: st.DataObject) -> None:
        admit = [data.draw(st.booleans()) for _ in keys]
        reserved = {key for placements in self.writing for key in placements.keys}
        recorded = self.index.record(keys, admit, request=1)
        hits = [n for n, key in enumerate(keys) if key in self.copies or key in reserved]
        assert recorded.hits == hits and not recorded.refused
        wanted = [n for n in range(len(keys)) if admit[n] and n not in hits]
        assert recorded.placed.positions.tolist() == wanted
        places = self.where(recorded.placed)
        assert len(set(places)) == len(places) and all(0 <= slot < SLOTS for _, slot in places)
        if wanted:
            self.writing.append(recorded.placed)

    @rule(data=st.data(), good=st.booleans())
    @precondition(lambda self: self.writing)
    def a_write_ends(self, data: st.DataObject, good: bool) -> None:
        placements = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if not good:
            self.index.abort_all(placements)
            return
        places = self.where(placements)
        lengths = np.arange(len(placements)) + 1
        self.index.commit_all(placements, lengths, np.arange(len(placements)))
        for key, (extent, slot) in zip(placements.keys, places, strict=True):
            self.copies.setdefault(key, []).append(Block(key, extent, slot))

    @rule(whole=st.booleans())
    def publish(self, whole: bool) -> None:
        if whole:
            self.rig.writer.close_old(0.0)
        for extent in self.rig.publish():
            self.extents[extent.id] = extent

    @rule(keys=key_lists)
    def pin(self, keys: list[BlockKey]) -> None:
        placements = self.index.pin_all(keys)
        assert placements.keys == [key for key in keys if key in self.copies]
        held = []
        for key, (extent, slot) in zip(placements.keys, self.where(placements), strict=True):
            [copy] = [c for c in self.copies[key] if (c.extent, c.slot) == (extent, slot)]
            held.append(copy)
        if len(placements):
            self.pinned.append((placements, held))

    @rule(data=st.data())
    @precondition(lambda self: self.pinned)
    def unpin(self, data: st.DataObject) -> None:
        self.index.unpin(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))[0])

    @rule(data=st.data())
    @precondition(lambda self: self.pinned)
    def a_copy_turns_out_bad(self, data: st.DataObject) -> None:
        placements, held = data.draw(st.sampled_from(self.pinned))
        row = data.draw(st.integers(0, len(held) - 1))
        copies = self.copies.get(held[row].key, [])
        there = held[row] in copies
        assert self.index.drop(placements[row]) == there
        if there:
            copies.remove(held[row])
            if not copies:
                del self.copies[held[row].key]

    @rule(keys=key_lists)
    def discard(self, keys: list[BlockKey]) -> None:
        assert self.index.discard(keys) == sum(key in self.copies for key in keys)
        for key in keys:
            self.copies.pop(key, None)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        self.index.check_integrity()
        reserved = {key for placements in self.writing for key in placements.keys}
        expected = [
            Lookup.HIT if key in self.copies else Lookup.PENDING if key in reserved else Lookup.MISS
            for key in KEYS
        ]
        assert self.index.lookup(KEYS) == expected
        assert self.index.resident_blocks == len(self.copies)
        # A pinned block stays where it is.
        for placements, held in self.pinned:
            assert self.where(placements) == [(copy.extent, copy.slot) for copy in held]

    def teardown(self) -> None:
        for placements in self.writing:
            self.index.abort_all(placements)
        for placements, _ in self.pinned:
            self.index.unpin(placements)
        self.rig.writer.close_old(0.0)
        self.rig.publish()
        assert self.index.pinned_blocks() == 0 and self.rig.writer.unpublished == 0
        self.index.check_integrity()


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40)


def placed(rig: Rig, keys: list[BlockKey], ttl_seconds: float = 0.0) -> Placements:
    placements = rig.index.record(keys, [True] * len(keys), request=1, ttl_seconds=ttl_seconds).placed
    rig.index.commit_all(placements, np.full(len(keys), 100), np.arange(len(keys)))
    return placements


def test_room_is_asked_before_a_slot_is_given() -> None:
    rig = Rig(Room(extent_bytes(SLOTS, STRIDE) + extent_bytes(2, STRIDE)))
    recorded = rig.index.record(KEYS[:10], [True] * 10, request=1)
    assert recorded.placed.positions.tolist() == list(range(6)) and recorded.refused == [6, 7, 8, 9]
    assert rig.refused == 4 and rig.room.asked_bytes == 4 * STRIDE
    assert rig.room.taken_bytes <= rig.room.limit_bytes
    rig.index.commit_all(recorded.placed, np.full(6, 100), np.arange(6))
    rig.publish()
    assert rig.room.taken_bytes == 0 and rig.room.published_bytes <= rig.room.limit_bytes


def test_a_member_that_may_be_held_for_dead_takes_nothing() -> None:
    rig = Rig()
    placed(rig, KEYS[:2])
    rig.berth.may_write = False
    assert rig.index.record(KEYS[2:4], [True] * 2, request=1).refused == [0, 1]
    rig.berth.may_write = True
    assert rig.index.record(KEYS[2:4], [True] * 2, request=1).placed.slots.tolist() == [2, 3]


def test_what_failed_leaves_no_entry_and_gives_its_room_back() -> None:
    rig = Rig()
    placements = rig.index.record(KEYS[:4], [True] * 4, request=1).placed
    rig.index.abort_all(placements.take(np.array([1, 3])))
    rig.index.commit_all(placements.take(np.array([0, 2])), np.array([10, 20]), np.array([1, 2]))
    [extent] = rig.publish()
    assert extent.entries["number"].tolist() == [0, 2]
    assert extent.entries["length"].tolist() == [10, 20]
    assert extent.entries["key"].tolist() == [KEYS[0], KEYS[2]]
    assert rig.index.lookup(KEYS[:4]) == [Lookup.HIT, Lookup.MISS, Lookup.HIT, Lookup.MISS]
    rig.index.abort_all(rig.index.record(KEYS[4:8], [True] * 4, request=1).placed)
    assert rig.publish() == [] and rig.room.taken_bytes == 0 and rig.writer.unpublished == 0


def test_an_extent_waits_for_what_is_in_flight() -> None:
    rig = Rig()
    first = rig.index.record(KEYS[:2], [True] * 2, request=1).placed
    rig.writer.close_old(0.0)
    assert rig.writer.next_done(0.0) is None
    second = placed(rig, KEYS[2:4])
    assert rig.writer.next_done(0.0) is None, "a new extent takes what comes now"
    rig.index.commit_all(first, np.array([1, 2]), np.array([3, 4]))
    [extent] = rig.publish()
    assert len(extent.entries) == 2 and len(second) == 2


def test_hits_are_told_and_misses_are_not() -> None:
    rig = Rig()
    rig.add(1, KEYS[:3])
    rig.index.record(KEYS[:5], request=42)
    words = [int.from_bytes(key[:8], "little") for key in KEYS[:3]]
    assert rig.touched == [(42, words)]


def test_alternates_take_over() -> None:
    rig = Rig()
    first = rig.add(1, KEYS[:4])
    second = rig.add(2, KEYS[2:6])
    assert rig.duplicates == 2
    rig.index.take_in(Change(gone=(first,)))
    assert rig.index.lookup(KEYS[:6]) == [Lookup.MISS] * 2 + [Lookup.HIT] * 4
    [pinned] = rig.index.pin(KEYS[2:3])
    assert pinned.slot == 0
    rig.index.unpin([pinned])
    rig.index.take_in(Change(gone=(second,)))
    assert rig.index.resident_blocks == 0 and rig.index.extents == 0
    rig.index.check_integrity()


def test_blocks_expire_in_open_and_in_published_extents() -> None:
    rig = Rig()
    rig.add(1, KEYS[:2], expires_ms=2_000)
    rig.add(2, KEYS[2:4], expires_ms=3_000)
    rig.add(3, KEYS[4:5])
    placed(rig, KEYS[5:7], ttl_seconds=1.0)
    rig.now_ms = 1_999
    assert rig.index.lookup(KEYS[:7]) == [Lookup.HIT] * 7
    rig.now_ms = 2_000
    assert rig.index.lookup(KEYS[:7]) == [Lookup.MISS] * 2 + [Lookup.HIT] * 3 + [Lookup.MISS] * 2
    assert rig.expired == 4
    rig.now_ms = 10_000
    assert rig.index.lookup(KEYS[:7]) == [Lookup.MISS] * 4 + [Lookup.HIT] + [Lookup.MISS] * 2
    rig.index.check_integrity()


def test_a_chunk_is_what_lies_in_the_same_extents() -> None:
    rig = Rig()
    rig.add(1, KEYS[:4])
    rig.add(2, KEYS[4:8])
    rig.add(3, KEYS[8:9])
    assert set(rig.index.chunk([KEYS[1], KEYS[8], KEYS[20]])) == {*KEYS[:4], KEYS[8]}
    assert rig.index.chunk([KEYS[20]]) == []


def test_other_shapes_and_namespaces_are_passed_over() -> None:
    rig = Rig()
    entries = entries_of(KEYS[:3])
    for space, stride in ((bytes(32), STRIDE), (SPACE, 2 * STRIDE)):
        extent = Extent(ExtentId(1, 1), 1, stride, space, entries, {1})
        assert rig.index.take_in(Change(added=(extent,))) == (0, 0)
        assert rig.index.take_in(Change(gone=(extent,))) == (0, 0)
    assert rig.index.resident_blocks == 0


def test_a_block_costs_little_memory() -> None:
    """Beside its entry, which the catalog keeps: the key, a place in a dict, and columns."""
    rig = Rig()
    count = 100_000
    keys = np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)
    entries = np.zeros(count, ENTRY_DTYPE)
    entries["key"] = keys.view("V32").reshape(-1)
    entries["number"] = np.arange(count) % 1000
    entries["length"] = 4096
    tracemalloc.start()
    for number in range(count // 1000):
        part = entries[number * 1000 : (number + 1) * 1000]
        extent = Extent(ExtentId(1, number), 1, STRIDE, SPACE, part, {1})
        rig.index.take_in(Change(added=(extent,)))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rig.index.resident_blocks == count
    assert held / count < 320, f"{held / count:.0f} bytes a block"


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    made = Catalog()
    yield made
    made.check_integrity()


def said(
    kind: BatchKind, *extents: ExtentId, gone: tuple[ExtentId, ...] = (), adopted: bool = False
) -> Batch:
    added = tuple(Added(extent, 10, STRIDE, SPACE, entries_of(KEYS[:1]), adopted) for extent in extents)
    return Batch(kind, 0, 0, added=added, gone=gone)


A, B = ExtentId(1, 1), ExtentId(1, 2)


def test_what_is_gone_stays_gone_in_any_order(catalog: Catalog) -> None:
    catalog.apply(2, said(BatchKind.GONE, gone=(A,)))
    assert not catalog.apply(1, said(BatchKind.ADD, A, B)).gone
    assert [extent.id for extent in catalog.extents()] == [B]
    catalog.apply(1, said(BatchKind.SNAPSHOT, A, B))
    assert [extent.id for extent in catalog.extents()] == [B] and catalog.live_bytes == 10


def test_an_extent_lives_while_somebody_stands_for_it(catalog: Catalog) -> None:
    catalog.apply(1, said(BatchKind.ADD, A))
    assert not catalog.apply(2, said(BatchKind.ADD, A, adopted=True))
    assert not catalog.forget_member(1)
    assert [extent.id for extent in catalog.forget_member(2).gone] == [A]
    # It was not declared gone: its writer may have been away only.
    assert [extent.id for extent in catalog.apply(1, said(BatchKind.ADD, A)).added] == [A]


def test_a_snapshot_replaces_what_was_said(catalog: Catalog) -> None:
    catalog.apply(1, said(BatchKind.ADD, A))
    change = catalog.apply(1, said(BatchKind.SNAPSHOT, B))
    assert [extent.id for extent in change.added] == [B] and [extent.id for extent in change.gone] == [A]


def test_a_feed_hears_everything_once_and_in_order(catalog: Catalog) -> None:
    catalog.apply(1, said(BatchKind.ADD, A))
    feed = catalog.follow()
    catalog.apply(1, said(BatchKind.ADD, B))
    catalog.lose([A])
    heard = [([e.id for e in change.added], [e.id for e in change.gone]) for change in feed.take()]
    assert heard == [([A], []), ([B], []), ([], [A])]
    feed.close()
    catalog.lose([B])
    assert feed.take() == []


def test_open_extents_say_what_they_are() -> None:
    extent = OpenExtent(A, SLOTS, STRIDE, SPACE, 0.0, Room(0))
    assert extent.footer().slots == 0 and extent.taken_bytes == extent_bytes(SLOTS, STRIDE)
    assert extent.segment == A.segment and not extent.published
