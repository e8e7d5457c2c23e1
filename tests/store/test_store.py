"""What BlockStore promises to an engine: over memory, over nvme, and over both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from faulty_io import FaultyIO
from kvstrata.config import Config, MemoryTierConfig, NvmeTierConfig
from kvstrata.errors import (
    ConfigError,
    FolderLockedError,
    FormatVersionError,
    LayoutMismatchError,
    StoreClosedError,
)
from kvstrata.hashing import namespace_digest, wrap_keys
from kvstrata.store import BlockStore
from kvstrata.tiers.nvme_format import INDEX_FILE, MARKER_FILE, NAMESPACES_FILE, SegmentHeader
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome
from store_kit import (
    NAMESPACE,
    WAIT_SECONDS,
    bytes_on_medium,
    chain,
    check_quiet,
    content,
    contents,
    descriptors,
    eventually,
    finished,
    load,
    make_config,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    segments_of,
    served,
    slots_of,
)

Tiers = tuple[MemoryTierConfig | NvmeTierConfig, ...]
KEYS = chain(1, 8)

SHAPES: dict[str, Callable[[Path], Tiers]] = {
    "memory": lambda folder: (memory_tier(64),),
    "nvme": lambda folder: (nvme_tier(folder),),
    "nvme-buffered": lambda folder: (nvme_tier(folder, direct_io=False),),
    "nvme-synced": lambda folder: (nvme_tier(folder, sync="always"),),
    "arc": lambda folder: (memory_tier(64, policy="arc"), nvme_tier(folder, policy="arc")),
    "write-back": lambda folder: (memory_tier(64), nvme_tier(folder)),
    "write-through": lambda folder: (memory_tier(64), nvme_tier(folder, write_mode="through")),
}


@pytest.fixture(params=SHAPES)
def tiers(request: pytest.FixtureRequest, tmp_path: Path) -> Tiers:
    return SHAPES[request.param](tmp_path / "cache")


# What every shape does


def test_save_lookup_load(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        assert store.lookup(KEYS).blocks == 0
        assert store.lookup(KEYS).states == (Lookup.MISS,) * 8
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        match = store.lookup(KEYS)
        assert match.keys == tuple(KEYS)
        assert match.blocks == 8 and match.states == (Lookup.HIT,) * 8
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        assert save(store, KEYS) == [Outcome.PRESENT] * 8
        assert store.lookup([]).blocks == 0
        assert load(store, []) == []
        assert save(store, []) == []
        check_quiet(store)


def test_lookup_counts_the_leading_blocks_and_shows_the_others(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        save(store, KEYS[:2])
        finished(store.save(KEYS[:5], [None, None, None, *contents(KEYS[3:5])]))
        match = store.lookup(KEYS)
        assert match.blocks == 2
        hit, miss = Lookup.HIT, Lookup.MISS
        assert match.states == (hit, hit, miss, hit, hit, miss, miss, miss)
        loaded, absent = Outcome.LOADED, Outcome.ABSENT
        assert load(store, KEYS) == [loaded, loaded, absent, loaded, loaded, absent, absent, absent]
        assert store.telemetry.value("misses_total", "any", "absent") == 4
        assert store.telemetry.value("blocks_total", "load", "any", "absent") == 4
        assert store.telemetry.value("lookup_blocks_total", "hit") == 8


def test_lookup_has_no_side_effects(tmp_path: Path) -> None:
    """Blocks that are only looked up leave as if nobody had."""
    with open_store(memory_tier(8)) as store:
        save(store, KEYS[:4])
        save(store, chain(2, 4))
        for _ in range(20):
            assert store.lookup(KEYS[:4]).blocks == 4
        save(store, chain(3, 4))
        assert store.lookup(KEYS[:4]).blocks == 0
        assert store.lookup(chain(2, 4)).blocks == 4


def test_a_touched_chain_stays(tmp_path: Path) -> None:
    with open_store(memory_tier(8)) as store:
        save(store, KEYS[:4])
        save(store, chain(2, 4))
        store.touch(KEYS[:4])
        save(store, chain(3, 4))
        assert store.lookup(KEYS[:4]).blocks == 4
        assert store.lookup(chain(2, 4)).blocks == 0


def test_a_save_without_bytes_is_a_touch(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        save(store, KEYS[:3])
        outcomes = finished(store.save(KEYS[:4], [None] * 4))
        assert outcomes == [Outcome.PRESENT] * 3 + [Outcome.ABSENT]
        assert store.lookup(KEYS[:4]).blocks == 3


def test_short_blocks(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        sizes = [1, 4095, 4096, 4097, 8191, 8192]
        keys = KEYS[:6]
        sources = [content(key, size) for key, size in zip(keys, sizes, strict=True)]
        assert finished(store.save(keys, sources)) == [Outcome.SAVED] * 6
        targets = [bytearray(size) for size in sizes]
        assert finished(store.load(store.lookup(keys), targets)) == [Outcome.LOADED] * 6
        assert [bytes(target) for target in targets] == sources


def test_a_target_of_another_length_is_a_miss(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        save(store, KEYS[:1], 5000)
        assert finished(store.load(store.lookup(KEYS[:1]), [bytearray(5001)])) == [Outcome.CORRUPT]


def test_load_takes_as_many_targets_as_it_is_given(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        save(store, KEYS)
        targets = [bytearray(8192) for _ in range(3)]
        assert finished(store.load(store.lookup(KEYS), targets)) == [Outcome.LOADED] * 3
        assert [bytes(target) for target in targets] == contents(KEYS[:3])


def test_a_match_is_no_promise(tiers: Tiers) -> None:
    with open_store(*tiers) as store:
        save(store, KEYS)
        store.flush()
        match = store.lookup(KEYS)
        places = len(tiers)
        assert store.discard(KEYS[3:5]) == 2 * places
        assert store.discard(KEYS[3:5]) == 0
        outcomes = finished(store.load(match, [bytearray(8192) for _ in KEYS]))
        loaded, absent = Outcome.LOADED, Outcome.ABSENT
        assert outcomes == [loaded] * 3 + [absent] * 2 + [loaded] * 3


def test_wrong_shapes_are_refused(tiers: Tiers) -> None:
    with open_store(*tiers, batch_blocks=16) as store:
        save(store, KEYS)
        match = store.lookup(KEYS[:1])
        for bad in (bytearray(8193), bytearray(0)):
            with pytest.raises(LayoutMismatchError):
                store.load(match, [bad])
            with pytest.raises(LayoutMismatchError):
                store.save(KEYS[:1], [bad])
        with pytest.raises(LayoutMismatchError, match="writable"):
            store.load(match, [bytes(8192)])
        with pytest.raises(LayoutMismatchError):
            store.load(match, [bytearray(8192)] * 2)
        with pytest.raises(LayoutMismatchError):
            store.save(KEYS, [bytes(8192)])
        with pytest.raises(LayoutMismatchError, match="batch_blocks"):
            store.save(chain(2, 17), [bytes(8192)] * 17)
        check_quiet(store)


def test_after_close_every_call_says_so(tiers: Tiers) -> None:
    store = open_store(*tiers)
    save(store, KEYS)
    match = store.lookup(KEYS)
    store.close()
    store.close()
    calls: list[Callable[[], Any]] = [
        lambda: store.lookup(KEYS),
        lambda: store.load(match, [bytearray(8192)]),
        lambda: store.save(KEYS, contents(KEYS)),
        lambda: store.touch(KEYS),
        lambda: store.discard(KEYS),
        store.flush,
        lambda: store.views(KEYS).__enter__(),
    ]
    for call in calls:
        with pytest.raises(StoreClosedError):
            call()
    assert [status.opened for status in store.status()] == [False] * len(tiers)


def test_close_under_traffic(tiers: Tiers) -> None:
    """Whoever is inside when the store closes gets an outcome or StoreClosedError, and nobody hangs."""
    for turn in range(5):
        store = open_store(*tiers, close_seconds=20.0)
        failures: list[BaseException] = []

        def work(number: int, store: BlockStore = store, failures: list[BaseException] = failures) -> None:
            try:
                while True:
                    keys = chain(number, 3)
                    save_transfer = store.save(keys, contents(keys))
                    save_transfer.wait(0.01)
                    store.touch(keys)
                    load_transfer = store.load(store.lookup(keys), [bytearray(8192) for _ in keys])
                    load_transfer.wait(0.01)
                    with store.views(keys) as views:
                        for key, view in zip(keys, views, strict=True):
                            assert view is None or bytes(view) == content(key)
                    number += 100
            except StoreClosedError:
                pass
            except BaseException as error:  # noqa: BLE001 - raised in the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(n + 10_000 * turn,), daemon=True) for n in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda store=store: store.telemetry.value("lookups_total") > 20, "no traffic")  # type: ignore[misc]
        closer = threading.Thread(target=store.close, daemon=True)
        closer.start()
        closer.join(WAIT_SECONDS)
        assert not closer.is_alive(), "close() hangs under traffic"
        for thread in threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a caller hangs in a closed store"
        assert not failures, failures


def test_closing_ends_all_threads_and_descriptors(tiers: Tiers) -> None:
    threads, files = threading.active_count(), descriptors()
    for number in range(3):
        with open_store(*tiers) as store:
            save(store, chain(number, 6))
    assert threading.active_count() == threads
    assert descriptors() == files


def test_closing_writes_what_was_saved(tmp_path: Path) -> None:
    """close() without waiting for the transfers: everything is there in the next run."""
    tiers = (memory_tier(64), nvme_tier(tmp_path))
    store = open_store(*tiers)
    chains = [chain(number, 6) for number in range(8)]
    transfers = [store.save(keys, contents(keys)) for keys in chains]
    store.close()
    assert all(transfer.outcomes == [Outcome.SAVED] * 6 for transfer in transfers)
    with open_store(*tiers) as store:
        for keys in chains:
            assert served(store, keys) == set(keys)


def test_time_to_live(tmp_path: Path) -> None:
    tiers = (memory_tier(64, ttl_seconds=0.3), nvme_tier(tmp_path, ttl_seconds=0.3))
    with open_store(*tiers) as store:
        save(store, KEYS)
        store.flush()
        eventually(lambda: store.lookup(KEYS).states == (Lookup.MISS,) * 8, "blocks do not expire")
        assert load(store, KEYS) == [Outcome.ABSENT] * 8
        assert store.telemetry.value("expired_total", "memory") == 8
        assert store.telemetry.value("expired_total", "nvme") == 8
        store.check_integrity()
        assert save(store, KEYS) == [Outcome.SAVED] * 8


@pytest.mark.parametrize("crashed", [False, True])
def test_what_expires_between_two_runs_is_not_taken_over(crashed: bool, tmp_path: Path) -> None:
    config = nvme_tier(tmp_path, ttl_seconds=0.3)
    forever = chain(2, 4)
    with open_store(nvme_tier(tmp_path)) as store:
        save(store, forever)
    with open_store(config) as store:
        save(store, KEYS)
        latest = max(slot.header.expires_ms for slot in slots_of(tmp_path))
    if crashed:
        (tmp_path / INDEX_FILE).unlink()
    from kvstrata.table import unix_ms

    eventually(lambda: unix_ms() > latest, "the clock stands still")
    with open_store(config) as store:
        assert store.telemetry.value("restore_dropped_total", "nvme", "expired") == 8
        assert store.lookup(KEYS).blocks == 0
        assert served(store, forever) == set(forever)
        store.check_integrity()


# Several tiers


def test_a_chain_longer_than_memory_goes_on_in_nvme(tmp_path: Path) -> None:
    keys = chain(1, 40)
    with open_store(memory_tier(8), nvme_tier(tmp_path)) as store:
        outcomes = save(store, keys)
        assert outcomes == [Outcome.SAVED] * 40
        assert store.flush()
        assert store.lookup(keys).blocks == 40
        # The root stays in the fast tier.
        assert store.tiers[0].table.lookup(keys[:8]) == [Lookup.HIT] * 8
        assert served(store, keys) == set(keys)
        store.check_integrity()


def test_write_back_puts_everything_below(tmp_path: Path) -> None:
    with open_store(memory_tier(8), nvme_tier(tmp_path)) as store:
        for number in range(8):
            save(store, chain(number, 4))
            assert store.flush()
        for number in range(8):
            assert store.tiers[1].table.lookup(chain(number, 4)) == [Lookup.HIT] * 4
            assert served(store, chain(number, 4)) == set(chain(number, 4))
        assert store.telemetry.value("blocks_total", "write_back", "nvme", "saved") == 32
        assert store.telemetry.value("evictions_total", "memory") >= 24
        check_quiet(store)


def test_write_through_is_below_when_the_save_is_done(tmp_path: Path) -> None:
    with open_store(memory_tier(8), nvme_tier(tmp_path, write_mode="through")) as store:
        for number in range(8):
            save(store, chain(number, 4))
            assert store.tiers[1].table.lookup(chain(number, 4)) == [Lookup.HIT] * 4
        for number in range(8):
            assert served(store, chain(number, 4)) == set(chain(number, 4))


def test_what_is_read_from_nvme_is_promoted(tmp_path: Path) -> None:
    with open_store(memory_tier(16), nvme_tier(tmp_path)) as store:
        save(store, KEYS)
    with open_store(memory_tier(16), nvme_tier(tmp_path)) as store:
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        assert store.telemetry.value("blocks_total", "promote", "memory", "saved") == 8
        assert store.tiers[0].table.lookup(KEYS) == [Lookup.HIT] * 8
        read = store.telemetry.value("read_bytes_total", "nvme")
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        assert store.telemetry.value("read_bytes_total", "nvme") == read
        store.check_integrity()


def test_promotion_can_be_turned_off(tmp_path: Path) -> None:
    tiers = (memory_tier(16, promote=False), nvme_tier(tmp_path))
    with open_store(*tiers) as store:
        save(store, KEYS)
    with open_store(*tiers) as store:
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        assert store.tiers[0].table.lookup(KEYS) == [Lookup.MISS] * 8


def test_views_are_pinned_and_read_only(tmp_path: Path) -> None:
    with open_store(memory_tier(8), nvme_tier(tmp_path)) as store:
        save(store, KEYS[:4])
        with store.views([*KEYS[:4], KEYS[6]]) as views:
            assert [view is None for view in views] == [False] * 4 + [True]
            for number in range(10, 30):
                save(store, chain(number, 4))
            assert store.tiers[0].table.pinned_blocks() >= 4
            for key, view in zip(KEYS, views, strict=False):
                if view is not None:
                    assert bytes(view) == content(key)
                    with pytest.raises(TypeError):
                        view[0] = 1
        store.flush()
        assert store.tiers[0].table.pinned_blocks() == 0
        for number in range(30, 40):
            save(store, chain(number, 4))
        with store.views(KEYS[:4]) as views:
            assert views == [None] * 4
        store.check_integrity()


def test_views_without_memory(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path)) as store:
        save(store, KEYS)
        with store.views(KEYS) as views:
            assert views == [None] * 8


def test_views_held_over_close(tmp_path: Path) -> None:
    """The engine is slow to let go: the store closes all the same, and keeps its index."""
    store = open_store(memory_tier(8), nvme_tier(tmp_path))
    save(store, KEYS)
    with store.views(KEYS) as views:
        store.close()
        assert [bytes(view or b"") for view in views] == contents(KEYS)
    with open_store(nvme_tier(tmp_path)) as again:
        report = again.status()[0].open_report
        assert report is not None and report.from_index
        assert served(again, KEYS) == set(KEYS)


def test_no_tier_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tier"):
        BlockStore(Config(), BlockLayout(8192, 1), NAMESPACE)


# Bounds of the queues


@pytest.fixture
def hung() -> Any:
    io = FaultyIO()
    yield io
    io.release()


@pytest.mark.parametrize("bound", [{"queue_blocks": 10}, {"queue_bytes": 10 * 8192}], ids=str)
def test_a_full_queue_drops_and_counts(bound: dict[str, Any], tmp_path: Path, hung: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=hung, **bound) as store:
        hung.hang("write")
        first = store.save(KEYS, contents(KEYS))
        hung.wait_hanging("write")
        assert store.queued["held_blocks"] == 8 and store.queued["held_bytes"] == 8 * 8192
        # There is room for two more: the front of the chain comes in, its tail does not.
        second = store.save(chain(2, 3), contents(chain(2, 3)))
        assert not second.done
        third = store.save(chain(3, 2), contents(chain(3, 2)))
        assert third.done and third.outcomes == [Outcome.REJECTED] * 2
        assert third.released
        assert store.queued["held_blocks"] == 10 and store.queued["held_bytes"] == 10 * 8192
        assert store.telemetry.value("blocks_total", "save", "any", "rejected") == 3
        hung.release()
        assert finished(first) == [Outcome.SAVED] * 8
        assert finished(second) == [Outcome.SAVED, Outcome.SAVED, Outcome.REJECTED]
        check_quiet(store)
        assert save(store, chain(2, 3)) == [Outcome.PRESENT, Outcome.PRESENT, Outcome.SAVED]


def test_a_full_queue_throttles_and_counts(tmp_path: Path, hung: FaultyIO) -> None:
    fields: dict[str, Any] = {"queue_blocks": 8, "full_queue": "throttle"}
    with open_store(nvme_tier(tmp_path), file_io=hung, throttle_seconds=WAIT_SECONDS, **fields) as store:
        hung.hang("write")
        first = store.save(KEYS, contents(KEYS))
        hung.wait_hanging("write")
        entered = threading.Event()
        waited: list[list[Outcome]] = []

        def caller() -> None:
            entered.set()
            waited.append(save(store, chain(2, 3)))

        thread = threading.Thread(target=caller, daemon=True)
        thread.start()
        assert entered.wait(WAIT_SECONDS)
        hung.release()
        thread.join(WAIT_SECONDS)
        assert waited == [[Outcome.SAVED] * 3]
        assert finished(first) == [Outcome.SAVED] * 8
    with open_store(nvme_tier(tmp_path), file_io=hung, throttle_seconds=0.05, **fields) as store:
        hung.hang("write")
        first = store.save(chain(3, 8), contents(chain(3, 8)))
        hung.wait_hanging("write")
        assert save(store, chain(4, 1)) == [Outcome.REJECTED], (
            "a throttled save waits no longer than it may"
        )
        hung.release()
        finished(first)


def test_throttling_is_counted(tmp_path: Path, hung: FaultyIO) -> None:
    with open_store(
        nvme_tier(tmp_path),
        file_io=hung,
        queue_blocks=1,
        full_queue="throttle",
        throttle_seconds=WAIT_SECONDS,
    ) as store:
        hung.slow(0.02, "write")
        transfers = [store.save([key], contents([key])) for key in KEYS]
        assert [finished(transfer) for transfer in transfers] == [[Outcome.SAVED]] * 8
        assert store.telemetry.value("throttle_waits_total") > 0


def test_a_full_write_back_queue_leaves_blocks_in_memory_and_counts(tmp_path: Path, hung: FaultyIO) -> None:
    with open_store(memory_tier(64), nvme_tier(tmp_path), file_io=hung, queue_blocks=8) as store:
        hung.hang("write")
        save(store, KEYS)
        hung.wait_hanging("write")
        assert save(store, chain(2, 4)) == [Outcome.SAVED] * 4
        eventually(
            lambda: store.telemetry.value("blocks_total", "write_back", "nvme", "rejected") == 4,
            "what the write-back turned away is not counted",
        )
        assert served(store, chain(2, 4)) == set(chain(2, 4))
        hung.release()
        assert store.flush()
        assert store.tiers[1].table.lookup(KEYS) == [Lookup.HIT] * 8
        assert store.tiers[1].table.lookup(chain(2, 4)) == [Lookup.MISS] * 4
        # The next request of that chain brings it below.
        save(store, chain(2, 4))
        assert store.flush()
        assert store.tiers[1].table.lookup(chain(2, 4)) == [Lookup.HIT] * 4


def test_a_full_load_queue_is_a_counted_miss(tmp_path: Path, hung: FaultyIO) -> None:
    with open_store(
        nvme_tier(tmp_path), file_io=hung, load_queue_blocks=4, io_threads=1, io_store_threads=1
    ) as store:
        save(store, KEYS)
        hung.hang("read")
        first = store.load(store.lookup(KEYS[:4]), [bytearray(8192) for _ in range(4)])
        hung.wait_hanging("read")
        second = store.load(store.lookup(KEYS), [bytearray(8192) for _ in range(2)])
        assert second.done and second.outcomes == [Outcome.REJECTED] * 2
        assert store.telemetry.value("misses_total", "any", "rejected") == 2
        hung.release()
        assert finished(first) == [Outcome.LOADED] * 4
        check_quiet(store)


def test_loads_come_before_stores(tmp_path: Path) -> None:
    """One thread, a store that hangs, then stores and a load: the load is next."""
    order: list[str] = []

    class Noting(FaultyIO):
        def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            order.append("read")
            return super().read(fd, views, offset)

        def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            done = super().write(fd, views, offset)
            order.append("write")
            return done

    io = Noting()
    with open_store(nvme_tier(tmp_path), file_io=io, io_threads=1, io_store_threads=1) as store:
        save(store, KEYS)
        order.clear()
        io.hang("write")
        saving = store.save(chain(2, 6), contents(chain(2, 6)))
        io.wait_hanging("write")
        loading = store.load(store.lookup(KEYS), [bytearray(8192) for _ in range(3)])
        io.release()
        assert finished(saving) == [Outcome.SAVED] * 6
        assert finished(loading) == [Outcome.LOADED] * 3
        assert order == ["write"] + ["read"] * 3 + ["write"] * 5


def test_a_pending_block_is_told_from_a_missing_one(tmp_path: Path, hung: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=hung) as store:
        hung.hang("write")
        saving = store.save(KEYS[:2], contents(KEYS[:2]))
        hung.wait_hanging("write")
        match = store.lookup(KEYS[:3])
        assert match.states == (Lookup.PENDING, Lookup.PENDING, Lookup.MISS) and match.blocks == 0
        assert finished(store.load(match, [bytearray(8192)])) == [Outcome.ABSENT]
        # A second save of the same blocks has nothing to do.
        assert finished(store.save(KEYS[:2], contents(KEYS[:2]))) == [Outcome.PRESENT] * 2
        hung.release()
        assert finished(saving) == [Outcome.SAVED] * 2
        assert served(store, KEYS[:2]) == set(KEYS[:2])


# From run to run


def report_of(store: BlockStore) -> Any:
    report = store.status()[-1].open_report
    assert report is not None
    return report


def test_a_clean_close_is_read_from_the_index(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path)) as store:
        assert not report_of(store).from_index and report_of(store).restored == 0
        save(store, KEYS)
        assert not (tmp_path / INDEX_FILE).exists(), (
            "an index beside an owner would be believed after a crash"
        )
    assert (tmp_path / INDEX_FILE).exists()
    with open_store(nvme_tier(tmp_path)) as store:
        assert report_of(store).from_index and report_of(store).restored == 8
        assert store.telemetry.value("restored_blocks_total", "nvme") == 8
        assert not (tmp_path / INDEX_FILE).exists()
        assert served(store, KEYS) == set(KEYS)


def test_after_a_crash_the_segments_are_scanned(tmp_path: Path) -> None:
    """A copy of the folder while it is in use is what a crash leaves behind."""
    import shutil

    folder, copy = tmp_path / "folder", tmp_path / "copy"
    with open_store(nvme_tier(folder)) as store:
        save(store, KEYS)
        assert store.flush()
        shutil.copytree(folder, copy)
        save(store, chain(2, 4))
    with open_store(nvme_tier(copy)) as store:
        report = report_of(store)
        assert not report.from_index and report.restored == 8 and report.dropped == {}
        assert report.slots == store.tiers[0].table.slots
        assert served(store, KEYS) == set(KEYS)
        assert store.lookup(chain(2, 4)).blocks == 0


def test_the_order_of_eviction_survives_a_clean_restart(tmp_path: Path) -> None:
    config = nvme_tier(tmp_path, 600_000)
    old, new = chain(1, 4), chain(2, 4)
    with open_store(config) as store:
        save(store, old)
        save(store, new)
        store.touch(old)
        order = store.tiers[0].table.entries()["key"].tolist()
        assert order == [*reversed(new), *reversed(old)]
    with open_store(config) as store:
        assert store.tiers[0].table.entries()["key"].tolist() == order
        room = report_of(store).slots - 8
        for number in range(10, 10 + room + 4):
            save(store, chain(number, 1))
        assert store.lookup(old).blocks == 4, "what was touched last left first"
        assert store.lookup(new).states == (Lookup.MISS,) * 4


def test_the_order_of_saving_survives_a_crash(tmp_path: Path) -> None:
    config = nvme_tier(tmp_path, 600_000)
    with open_store(config) as store:
        for number in range(5):
            save(store, chain(number, 4))
        order = store.tiers[0].table.entries()["key"].tolist()
    (tmp_path / INDEX_FILE).unlink()
    with open_store(config) as store:
        assert store.tiers[0].table.entries()["key"].tolist() == order


@pytest.mark.parametrize("crashed", [False, True])
def test_a_lower_capacity_between_two_runs(crashed: bool, tmp_path: Path) -> None:
    keys = [key for number in range(40) for key in chain(number, 4)]
    with open_store(nvme_tier(tmp_path, 3_000_000)) as store:
        for number in range(40):
            save(store, chain(number, 4))
        assert served(store, keys) == set(keys)
    if crashed:
        (tmp_path / INDEX_FILE).unlink()
    with open_store(nvme_tier(tmp_path, 1_000_000)) as store:
        assert bytes_on_medium(tmp_path) <= 1_000_000
        assert store.telemetry.value("restore_dropped_total", "nvme", "over_capacity") > 0
        left = served(store, keys)
        assert 0 < len(left) < len(keys)
        store.check_integrity()
        for number in range(100, 160):
            save(store, chain(number, 2))
            assert bytes_on_medium(tmp_path) <= 1_000_000
        store.check_integrity()
    with open_store(nvme_tier(tmp_path, 3_000_000)) as store:
        last = chain(159, 2)
        assert served(store, last) == set(last)
        slots = report_of(store).slots
        for number in range(slots):
            save(store, chain(1000 + number, 1))
        assert store.status()[0].blocks == slots
        assert bytes_on_medium(tmp_path) <= 3_000_000


def stride_of(path: Path) -> int:
    header = SegmentHeader.unpack(path.read_bytes()[:4096])
    assert header is not None
    return header.stride


def test_segments_of_another_block_size_stay_until_the_room_is_needed(tmp_path: Path) -> None:
    config = nvme_tier(tmp_path, 2_000_000)
    other = BlockLayout(40_000, 1)
    with open_store(config, layout=other) as store:
        for number in range(20):
            save(store, chain(number, 1))
        foreign = segments_of(tmp_path)
    with open_store(config) as store:
        assert report_of(store).restored == 0
        assert store.lookup(chain(0, 1)).blocks == 0, "a block of another shape is not ours"
        save(store, KEYS)
        assert set(foreign) & set(segments_of(tmp_path)), "they left although there was room"
        assert bytes_on_medium(tmp_path) <= config.capacity_bytes
    with open_store(config, layout=other) as store:
        # The other model comes back: what was not given up is served.
        again = {chain(number, 1)[0] for number in range(20)}
        assert served(store, list(again))
        store.check_integrity()
    with open_store(config) as store:
        for number in range(report_of(store).slots + 5):
            save(store, chain(1000 + number, 1))
            assert bytes_on_medium(tmp_path) <= config.capacity_bytes
        assert {stride_of(path) for path in segments_of(tmp_path)} == {4096 + 8192}
        assert store.telemetry.value("restore_dropped_total", "nvme", "foreign_size") > 0
        store.check_integrity()


def test_two_namespaces_in_one_folder_never_see_each_other(tmp_path: Path) -> None:
    """The same prompts and the same engine hashes, and two models: no block crosses over."""
    models = [
        {"model": "a", "dtype": "bf16"},
        {"model": "a", "dtype": "fp8"},
        {"model": "b", "dtype": "bf16"},
    ]
    spaces = [Namespace(namespace_digest(fields), fields) for fields in models]
    engine_hashes = [bytes([number]) * 32 for number in range(6)]

    def keys_of(space: Namespace) -> list[BlockKey]:
        return [*chain(1, 6, space), *wrap_keys(space.digest, engine_hashes)]

    for space in spaces:
        with open_store(nvme_tier(tmp_path), namespace=space) as store:
            assert store.lookup(keys_of(space)).states == (Lookup.MISS,) * 12
            assert save(store, keys_of(space)) == [Outcome.SAVED] * 12
    for crashed in (False, True):
        if crashed:
            (tmp_path / INDEX_FILE).unlink()
        for space in spaces:
            with open_store(nvme_tier(tmp_path), namespace=space) as store:
                assert report_of(store).restored == 36
                assert served(store, keys_of(space)) == set(keys_of(space))
    known = json.loads((tmp_path / NAMESPACES_FILE).read_text())
    assert known == {space.digest.hex(): dict(space.fields) for space in spaces}
    assert {slot.header.namespace for slot in slots_of(tmp_path)} == {space.digest for space in spaces}


# Whose folder


def test_a_second_opener_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path)) as store:
        save(store, KEYS)
        files = descriptors()
        threads = threading.active_count()
        with pytest.raises(FolderLockedError, match=f"process {os.getpid()} on ") as caught:
            open_store(memory_tier(8), nvme_tier(tmp_path))
        assert str(tmp_path) in str(caught.value) and caught.value.tier == "nvme"
        assert descriptors() == files
        assert threading.active_count() == threads
        assert served(store, KEYS) == set(KEYS)
    open_store(nvme_tier(tmp_path)).close()


HOLDER = """
import sys
from pathlib import Path
from store_kit import chain, nvme_tier, open_store, save
store = open_store(nvme_tier(Path(sys.argv[1])))
save(store, chain(1, 8))
print("open", flush=True)
sys.stdin.readline()
"""


def test_the_folder_of_another_process(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here)},
    ) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "open\n"
            with pytest.raises(FolderLockedError, match=f"process {holder.pid} on "):
                open_store(nvme_tier(tmp_path))
        finally:
            holder.kill()
        holder.wait()
    # The system gave the lock back with the process, and what it had written is there.
    with open_store(nvme_tier(tmp_path)) as store:
        assert served(store, KEYS) == set(KEYS)


def test_a_forked_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    """An engine forks its workers: the lock must go with the process that opened the folder."""
    store = open_store(nvme_tier(tmp_path))
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    try:
        with pytest.raises(FolderLockedError):
            open_store(nvme_tier(tmp_path))
        store.close()
        open_store(nvme_tier(tmp_path)).close()
    finally:
        os.close(write_end)
        os.close(read_end)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "marker",
    [
        '{"format": "kvstrata-nvme", "version": 2}',
        '{"format": "somebody-else", "version": 1}',
        '{"format": "kvstrata-nvme"}',
        "[]",
        "no json",
        "",
    ],
)
def test_a_folder_of_another_format_is_left_alone(marker: str, tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path)) as store:
        save(store, KEYS)
    (tmp_path / MARKER_FILE).write_text(marker)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FormatVersionError, match="folder"):
        open_store(memory_tier(8), nvme_tier(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(FormatVersionError):
        BlockStore(make_config(nvme_tier(tmp_path)), BlockLayout(1, 1), NAMESPACE)
