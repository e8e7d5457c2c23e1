"""Damage is a counted miss and never a wrong byte: every kind, many seeds, open or between two runs."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstrata.config import NvmeTierConfig
from kvstrata.store import BlockStore
from kvstrata.tiers.nvme_format import INDEX_FILE, SlotHeader, slot_offset
from kvstrata.transfer.buffers import PAGE
from kvstrata.types import BlockKey, BlockLayout, Outcome
from store_kit import (
    DiskSlot,
    bytes_on_medium,
    chain,
    check_quiet,
    content,
    contents,
    finished,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    overwrite,
    read_at,
    save,
    segments_of,
    served,
    slots_of,
)

SEEDS = range(8)
CHAINS = [chain(number, 6) for number in range(6)]
KEYS = [key for keys in CHAINS for key in keys]

Damage = Callable[[Path, random.Random], set[BlockKey]]
"""Does harm to a folder; returns the keys whose blocks it may have hit."""


@dataclass(frozen=True)
class Case:
    """One seed's shape of store. A block of 5000 bytes goes through a bounce buffer, 8192 does not."""

    config: NvmeTierConfig
    layout: BlockLayout

    def open(self) -> BlockStore:
        return open_store(self.config, layout=self.layout)


def make_case(folder: Path, rng: random.Random) -> Case:
    config = nvme_tier(folder, 1_200_000, direct_io=rng.random() < 0.5)
    return Case(config, BlockLayout(rng.choice([8192, 5000]), 1))


def fill(store: BlockStore) -> None:
    for keys in CHAINS:
        assert save(store, keys) == [Outcome.SAVED] * len(keys)
    assert store.flush()


def pick(folder: Path, rng: random.Random, count: int = 1) -> list[DiskSlot]:
    return rng.sample(slots_of(folder), count)


def zero_slot(folder: Path, rng: random.Random) -> set[BlockKey]:
    [slot] = pick(folder, rng)
    overwrite(slot.path, slot.offset, bytes(slot.stride))
    return {slot.key}


def zero_payload(folder: Path, rng: random.Random) -> set[BlockKey]:
    [slot] = pick(folder, rng)
    overwrite(slot.path, slot.offset + PAGE, bytes(slot.stride - PAGE))
    return {slot.key}


def flip(slot: DiskSlot, at: int, mask: int) -> set[BlockKey]:
    byte = read_at(slot.path, slot.offset + at, 1)[0]
    overwrite(slot.path, slot.offset + at, bytes([byte ^ mask]))
    return {slot.key}


def flip_header_bytes(folder: Path, rng: random.Random) -> set[BlockKey]:
    hit: set[BlockKey] = set()
    for slot in pick(folder, rng, 3):
        hit |= flip(slot, rng.randrange(256), rng.randrange(1, 256))
    return hit


def flip_payload_bytes(folder: Path, rng: random.Random) -> set[BlockKey]:
    hit: set[BlockKey] = set()
    for slot in pick(folder, rng, 3):
        hit |= flip(slot, PAGE + rng.randrange(slot.header.length), rng.randrange(1, 256))
    return hit


def flip_one_bit(folder: Path, rng: random.Random) -> set[BlockKey]:
    [slot] = pick(folder, rng)
    place = rng.choice([rng.randrange(256), PAGE + rng.randrange(slot.header.length)])
    return flip(slot, place, 1 << rng.randrange(8))


def truncate(folder: Path, rng: random.Random) -> set[BlockKey]:
    [slot] = pick(folder, rng)
    # At a slot's start, in its header, at its payload, in it, and at no multiple of anything.
    size = slot.offset + rng.choice([0, 100, PAGE, PAGE + 512, PAGE + 777])
    hit = {
        other.key
        for other in slots_of(folder)
        if other.path == slot.path and other.offset + PAGE + other.header.length > size
    }
    with slot.path.open("r+b") as file:
        file.truncate(size)
    return hit


def swap(first: DiskSlot, second: DiskSlot, start: int) -> set[BlockKey]:
    size = first.stride - start
    here = read_at(first.path, first.offset + start, size)
    there = read_at(second.path, second.offset + start, size)
    overwrite(first.path, first.offset + start, there)
    overwrite(second.path, second.offset + start, here)
    return {first.key, second.key}


def swap_slots(folder: Path, rng: random.Random) -> set[BlockKey]:
    first, second = pick(folder, rng, 2)
    return swap(first, second, 0)


def swap_payloads(folder: Path, rng: random.Random) -> set[BlockKey]:
    first, second = pick(folder, rng, 2)
    return swap(first, second, PAGE)


def copy_slot(folder: Path, rng: random.Random) -> set[BlockKey]:
    """A block's whole slot also stands where another block was."""
    first, second = pick(folder, rng, 2)
    overwrite(second.path, second.offset, read_at(first.path, first.offset, first.stride))
    return {second.key}


def garbage(folder: Path, rng: random.Random) -> set[BlockKey]:
    """Random bytes over a stretch that does not care for slots."""
    [slot] = pick(folder, rng)
    start = slot.offset + rng.randrange(slot.stride)
    size = min(rng.randrange(1, 3 * slot.stride), slot.path.stat().st_size - start)
    hit = {
        other.key
        for other in slots_of(folder)
        if other.path == slot.path and start < other.offset + other.stride and other.offset < start + size
    }
    overwrite(slot.path, start, rng.randbytes(size))
    return hit


def in_segment(folder: Path, path: Path) -> set[BlockKey]:
    return {slot.key for slot in slots_of(folder) if slot.path == path}


def missing_segment(folder: Path, rng: random.Random) -> set[BlockKey]:
    [slot] = pick(folder, rng)
    hit = in_segment(folder, slot.path)
    slot.path.unlink()
    return hit


def destroyed_segment_header(folder: Path, rng: random.Random) -> set[BlockKey]:
    [slot] = pick(folder, rng)
    hit = in_segment(folder, slot.path)
    overwrite(slot.path, rng.randrange(48), rng.randbytes(64))
    return hit


def damaged_index(folder: Path, rng: random.Random) -> set[BlockKey]:
    path = folder / INDEX_FILE
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    return set()


def truncated_index(folder: Path, rng: random.Random) -> set[BlockKey]:
    path = folder / INDEX_FILE
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return set()


def lying_index(folder: Path, rng: random.Random) -> set[BlockKey]:
    """Another index of this format, whole in itself, but of another time: one slot has changed since.

    The segment's time stamp is put back, so that nothing shows before the block is read.
    """
    [slot] = pick(folder, rng)
    stat = slot.path.stat()
    hit = zero_slot_at(slot)
    os.utime(slot.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return hit


def zero_slot_at(slot: DiskSlot) -> set[BlockKey]:
    overwrite(slot.path, slot.offset, bytes(slot.stride))
    return {slot.key}


ON_SEGMENTS: list[Damage] = [
    zero_slot,
    zero_payload,
    flip_header_bytes,
    flip_payload_bytes,
    flip_one_bit,
    truncate,
    swap_slots,
    swap_payloads,
    copy_slot,
    garbage,
    missing_segment,
    destroyed_segment_header,
]
ON_INDEX: list[Damage] = [damaged_index, truncated_index, lying_index]


def name(damage: Damage) -> str:
    return damage.__name__


def check_after(store: BlockStore, hit: set[BlockKey]) -> set[BlockKey]:
    """Right bytes or counted misses, all undamaged blocks served; returns what was served."""
    good = served(store, KEYS)
    assert good >= set(KEYS) - hit, "an undamaged block was not served"
    store.check_integrity()
    # What was bad is gone now: the same again gives the same blocks.
    assert served(store, KEYS) == good
    return good


def check_healed(store: BlockStore) -> None:
    for keys in CHAINS:
        assert set(save(store, keys)) <= {Outcome.SAVED, Outcome.PRESENT}
    assert load(store, KEYS) == [Outcome.LOADED] * len(KEYS)
    store.check_integrity()


@pytest.mark.parametrize("damage", ON_SEGMENTS, ids=name)
def test_damage_while_open(damage: Damage, tmp_path: Path) -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        case = make_case(folder, rng)
        with case.open() as store:
            fill(store)
            hit = damage(folder, rng)
            good = check_after(store, hit)
            if damage in (missing_segment, destroyed_segment_header):
                assert good == set(KEYS)  # the open descriptor still reaches every slot
            else:
                assert not good & hit, "a block was served that its own bytes no longer say"
                assert store.telemetry.value("misses_total", "nvme") > 0
            check_healed(store)
        with case.open() as store:
            # Whole files that were lost stay lost when their descriptor goes; all else was healed.
            gone = hit if damage in (missing_segment, destroyed_segment_header) else set()
            good = check_after(store, gone)
            assert not good & gone
            if damage is destroyed_segment_header:
                assert store.telemetry.value("restore_dropped_total", "nvme", "segment_header") == 1
            check_healed(store)
            assert bytes_on_medium(folder) <= case.config.capacity_bytes


@pytest.mark.parametrize("crashed", [False, True], ids=["clean", "crashed"])
@pytest.mark.parametrize("damage", ON_SEGMENTS, ids=name)
def test_damage_between_runs(damage: Damage, crashed: bool, tmp_path: Path) -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        case = make_case(folder, rng)
        with case.open() as store:
            fill(store)
        hit = damage(folder, rng)
        if crashed:
            (folder / INDEX_FILE).unlink()
        with case.open() as store:
            good = check_after(store, hit)
            # A whole slot in another place is the one damage that needs no repair to stay unseen.
            assert not good & hit
            if not crashed and hit:
                dropped = store.telemetry.value("restore_dropped_total", "nvme")
                missed = store.telemetry.value("misses_total", "nvme")
                assert dropped + missed > 0, "an index knew these blocks; their loss must show"
            check_healed(store)
            assert bytes_on_medium(folder) <= case.config.capacity_bytes
        with case.open() as store:
            assert served(store, KEYS) == set(KEYS)


@pytest.mark.parametrize("damage", ON_INDEX, ids=name)
def test_damage_to_the_index(damage: Damage, tmp_path: Path) -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        case = make_case(folder, rng)
        with case.open() as store:
            fill(store)
        hit = damage(folder, rng)
        with case.open() as store:
            report = store.status()[0].open_report
            assert report is not None
            if damage is not lying_index:
                assert not report.from_index
                assert report.restored == len(KEYS)
                assert store.telemetry.value("restore_dropped_total", "nvme", "index_damaged") == 1
            good = check_after(store, hit)
            assert not good & hit
            check_healed(store)


def stale_folder(case: Case, folder: Path, rng: random.Random) -> tuple[list[Path], list[BlockKey]]:
    """Fill a folder, keep copies of its segments, then let other blocks take the same slots.

    Returns the copies and the blocks of the second run.
    """
    with case.open() as store:
        fill(store)
    copies = []
    for path in segments_of(folder):
        copy = folder.parent / f"{folder.name}-{path.name}"
        shutil.copy2(path, copy)
        copies.append(copy)
    with case.open() as store:
        slots = store.status()[0].open_report
        assert slots is not None
        later: list[BlockKey] = []
        while len(later) < slots.slots + rng.randrange(6):
            keys = chain(1000 + len(later), 4)
            save(store, keys)
            later += keys
    return copies, later


@pytest.mark.parametrize("when", ["open", "clean", "crashed", "clean-same-time"])
def test_stale_copy_of_a_segment(when: str, tmp_path: Path) -> None:
    """A segment file of an older run comes back, with its own blocks, all of them whole."""
    for seed in SEEDS:
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        case = make_case(folder, rng)
        copies, later = stale_folder(case, folder, rng)
        stale = rng.choice(copies)
        path = folder / stale.name.removeprefix(f"{folder.name}-")

        def put_back(stale: Path = stale, path: Path = path) -> None:
            times = path.stat()
            overwrite(path, 0, stale.read_bytes())
            if when == "clean-same-time":
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

        hit = set()
        before = {slot.offset: slot.key for slot in slots_of(folder) if slot.path == path}
        if when != "open":
            put_back()
        if when == "crashed":
            (folder / INDEX_FILE).unlink()
        with case.open() as store:
            if when == "open":
                put_back()
            hit = set(before.values()) - {s.key for s in slots_of(folder) if s.path == path}
            here = {key for key in later if key in before.values()} | in_other(folder, path)
            good = served(store, [*later, *KEYS])
            assert good >= (here & set(later)) - hit
            assert not good & hit
            store.check_integrity()
            check_healed(store)
        with case.open() as store:
            assert served(store, KEYS) == set(KEYS)


def in_other(folder: Path, path: Path) -> set[BlockKey]:
    return {slot.key for slot in slots_of(folder) if slot.path != path}


@pytest.mark.parametrize("crashed", [False, True], ids=["clean", "crashed"])
def test_a_second_copy_of_a_segment(crashed: bool, tmp_path: Path) -> None:
    """Somebody's backup of a segment lies beside it, under a name of ours and with the same time."""
    for seed in SEEDS:
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        case = make_case(folder, rng)
        copies, later = stale_folder(case, folder, rng)
        shutil.copy2(rng.choice(copies), folder / f"seg-{rng.randrange(2**60):016x}.kv")
        path = rng.choice(segments_of(folder))
        shutil.copy2(path, folder / f"seg-{rng.randrange(2**60):016x}.kv")
        if crashed:
            (folder / INDEX_FILE).unlink()
        with case.open() as store:
            assert bytes_on_medium(folder) <= case.config.capacity_bytes
            served(store, [*later, *KEYS])
            store.check_integrity()
            check_healed(store)
        with case.open() as store:
            assert bytes_on_medium(folder) <= case.config.capacity_bytes
            assert served(store, KEYS) == set(KEYS)


def test_an_old_block_of_the_same_key_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    """The key is the same, the bytes are whole, and still they are not what was saved last."""
    [key] = chain(0, 1)
    with open_store(nvme_tier(tmp_path)) as store:
        finished(store.save([key], [b"o" * 8192]))
        store.flush()
        [old] = slots_of(tmp_path)
        stale = read_at(old.path, old.offset, old.stride)
        store.discard([key])
        finished(store.save([key], [content(key)]))
        [new] = [slot for slot in slots_of(tmp_path) if slot.header.sequence > old.header.sequence]
        assert new.offset == old.offset and new.path == old.path
        overwrite(old.path, old.offset, stale)
        assert load(store, [key]) == [Outcome.CORRUPT]


def test_damage_of_a_block_that_memory_has_too(tmp_path: Path) -> None:
    """Memory serves; the bad copy below shows when memory no longer has the block."""
    keys = CHAINS[0]
    with open_store(memory_tier(12), nvme_tier(tmp_path)) as store:
        save(store, keys)
        assert store.flush()
        slot = next(slot for slot in slots_of(tmp_path) if slot.key == keys[2])
        overwrite(slot.path, slot.offset + PAGE, b"bad")
        assert load(store, keys) == [Outcome.LOADED] * 6
        for number in range(50, 54):
            save(store, chain(number, 6))
        assert store.flush()
        assert served(store, keys) == set(keys) - {keys[2]}
        assert store.telemetry.value("misses_total", "nvme", "corrupt_checksum") == 1
        save(store, keys)
        assert served(store, keys) == set(keys)


def test_damage_in_memory_is_served_by_nvme_and_healed(tmp_path: Path) -> None:
    keys = CHAINS[0]
    with open_store(memory_tier(12), nvme_tier(tmp_path)) as store:
        save(store, keys)
        assert store.flush()
        memory = store.tiers[0]
        [placement] = memory.table.pin([keys[3]])
        arena = memory.view(placement)  # type: ignore[attr-defined]
        arena[100] ^= 1
        arena.release()
        memory.table.unpin([placement])
        assert load(store, keys) == [Outcome.LOADED] * 6
        assert store.telemetry.value("misses_total", "memory", "corrupt_checksum") == 1
        # The next load finds a good copy in memory again.
        reads = store.telemetry.value("read_bytes_total", "nvme")
        assert load(store, keys) == [Outcome.LOADED] * 6
        assert store.telemetry.value("read_bytes_total", "nvme") == reads


def test_damage_in_memory_alone_is_a_miss() -> None:
    keys = CHAINS[0]
    with open_store(memory_tier(12)) as store:
        save(store, keys)
        memory = store.tiers[0]
        [placement] = memory.table.pin([keys[3]])
        arena = memory.view(placement)  # type: ignore[attr-defined]
        arena[0] ^= 128
        arena.release()
        memory.table.unpin([placement])
        assert served(store, keys) == set(keys) - {keys[3]}
        assert store.telemetry.value("misses_total", "memory", "corrupt_checksum") == 1
        assert store.telemetry.events()[-1].kind == "corrupt block dropped"


def test_damage_is_named_by_its_reason(tmp_path: Path) -> None:
    """Each check of the read path is met by the damage that only it can see."""
    with open_store(nvme_tier(tmp_path)) as store:
        fill(store)
        a, b, c, d, e = slots_of(tmp_path)[:5]
        overwrite(a.path, a.offset, b"XXXXXXXX")
        overwrite(b.path, b.offset, read_at(c.path, c.offset, PAGE))
        page = bytearray(read_at(d.path, d.offset, PAGE))
        other = SlotHeader(
            e.header.key, d.header.namespace, d.header.segment_id, d.header.number, d.header.length,
            d.header.checksum, d.header.sequence, d.header.created_ms, d.header.expires_ms,
        )  # fmt: skip
        other.pack_into(memoryview(page))
        overwrite(d.path, d.offset, bytes(page))
        overwrite(e.path, e.offset + PAGE + 17, b"\0\1")
        assert served(store, KEYS) == set(KEYS) - {a.key, b.key, d.key, e.key}
        for reason in ("header", "place", "key", "checksum"):
            assert store.telemetry.value("misses_total", "nvme", f"corrupt_{reason}") == 1, reason


def test_slots_beyond_a_truncated_end_are_counted(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path)) as store:
        fill(store)
    path = segments_of(tmp_path)[0]
    lost = [slot for slot in slots_of(tmp_path) if slot.path == path][2:]
    with path.open("r+b") as file:
        file.truncate(slot_offset(2, lost[0].stride))
    (tmp_path / INDEX_FILE).unlink()
    with open_store(nvme_tier(tmp_path)) as store:
        dropped = store.telemetry.value("restore_dropped_total", "nvme", "slot_missing")
        assert dropped >= len(lost)
        assert served(store, KEYS) == set(KEYS) - {slot.key for slot in lost}


def test_late_heal_of_a_hit_in_flight(tmp_path: Path) -> None:
    """A bad block that several loads hold pinned is dropped once; the others count their own miss."""
    keys = CHAINS[0]
    with open_store(nvme_tier(tmp_path)) as store:
        save(store, keys)
        [slot] = [slot for slot in slots_of(tmp_path) if slot.key == keys[0]]
        overwrite(slot.path, slot.offset + PAGE, b"bad")
        match = store.lookup(keys)
        transfers = [store.load(match, [bytearray(8192)]) for _ in range(20)]
        for transfer in transfers:
            assert finished(transfer)[0] in (Outcome.CORRUPT, Outcome.ABSENT)
        assert store.telemetry.value("misses_total") == 20
        check_quiet(store)
        assert finished(store.save(keys, contents(keys)))[0] is Outcome.SAVED
        assert load(store, keys) == [Outcome.LOADED] * 6
