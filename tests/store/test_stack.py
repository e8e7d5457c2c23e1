"""Tiers in any order, each with its own way to get blocks from those above it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faulty_io import FaultyIO
from kvstrata.config import KIB, Config, tier_names
from kvstrata.errors import ConfigError
from kvstrata.store import BlockStore
from kvstrata.types import Lookup, Outcome
from store_kit import (
    chain,
    check_quiet,
    contents,
    eventually,
    finished,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    served,
)

KEYS = chain(1, 8)
HIT, MISS = [Lookup.HIT] * 8, [Lookup.MISS] * 8


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    faulty = FaultyIO()
    yield faulty
    faulty.heal()
    faulty.release()


def there(store: BlockStore, keys: list[bytes]) -> list[list[Lookup]]:
    return [tier.table.lookup(keys) for tier in store.tiers]  # type: ignore[arg-type]


def count(store: BlockStore, op: str, tier: str, outcome: str) -> int:
    return store.telemetry.value("blocks_total", op, tier, outcome)


def test_names_are_one_for_each_tier(tmp_path: Path) -> None:
    config = Config(tiers=(memory_tier(8), nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b")))
    assert tier_names(config.tiers) == ["memory", "nvme", "nvme2"]
    with open_store(*config.tiers) as store:  # type: ignore[arg-type]
        assert [status.name for status in store.status()] == ["memory", "nvme", "nvme2"]
        save(store, KEYS)
        store.flush()
        assert store.telemetry.value("write_bytes_total", "nvme2") == 8 * 8192


@pytest.mark.parametrize("with_memory", [True, False])
def test_back_reaches_every_tier(with_memory: bool, tmp_path: Path) -> None:
    """From memory where there is one; without, through the arena, which is far too small for it all."""
    tiers = [nvme_tier(tmp_path / name) for name in "abc"]
    tiers = [memory_tier(64), *tiers] if with_memory else tiers  # type: ignore[list-item]
    with open_store(*tiers, staging_bytes=3 * 8192) as store:
        for number in range(1, 6):
            assert save(store, chain(number, 8)) == [Outcome.SAVED] * 8
        check_quiet(store)
        lowest = store.tiers[-1].table
        assert all(lowest.lookup(chain(number, 8)) == HIT for number in range(1, 6))
        for name in tier_names(store.config.tiers)[1:]:
            assert count(store, "write_back", name, "saved") == 40
        read = store.telemetry.value("read_bytes_total", "nvme")
        assert (read == 0) == with_memory
        save(store, KEYS)
        check_quiet(store)
        assert count(store, "write_back", "nvme3" if with_memory else "nvme2", "present") == 8
    with open_store(nvme_tier(tmp_path / "c")) as store:
        assert served(store, KEYS) == set(KEYS)


def test_through_is_in_every_tier_when_the_save_ends(tmp_path: Path) -> None:
    lower = [nvme_tier(tmp_path / name, write_mode="through") for name in "ab"]
    with open_store(memory_tier(16), *lower) as store:
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        assert there(store, KEYS) == [HIT] * 3  # type: ignore[arg-type]
        assert count(store, "save", "memory", "saved") == 8
        assert count(store, "write_through", "nvme", "saved") == 8
        assert count(store, "write_through", "nvme2", "saved") == 8
        assert save(store, KEYS) == [Outcome.PRESENT] * 8
        check_quiet(store)


def test_through_without_memory(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b", write_mode="through")) as store:
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        assert there(store, KEYS) == [HIT] * 2  # type: ignore[arg-type]


def test_a_failing_tier_on_the_way_keeps_the_next_one_from_nothing(tmp_path: Path, io: FaultyIO) -> None:
    lower = [nvme_tier(tmp_path / name, write_mode="through") for name in "ab"]
    with open_store(memory_tier(16), *lower, file_io={"nvme": io}, breaker_retry_seconds=60) as store:
        io.fail(5, "write", "allocate")
        assert set(save(store, KEYS)) <= {Outcome.IO_ERROR, Outcome.UNAVAILABLE}
        assert there(store, KEYS) == [HIT, MISS, HIT]  # type: ignore[arg-type]
        check_quiet(store)


def test_none_is_never_written_by_saves(tmp_path: Path) -> None:
    """First, in the middle, or everywhere."""
    first = (nvme_tier(tmp_path / "a", write_mode="none"), nvme_tier(tmp_path / "b"))
    with open_store(*first) as store:
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        check_quiet(store)
        assert there(store, KEYS) == [MISS, HIT]  # type: ignore[arg-type]
        assert save(store, KEYS) == [Outcome.PRESENT] * 8
        assert load(store, KEYS) == [Outcome.LOADED] * 8
    middle = (memory_tier(16), nvme_tier(tmp_path / "c", write_mode="none"), nvme_tier(tmp_path / "d"))
    with open_store(*middle) as store:
        save(store, KEYS)
        check_quiet(store)
        assert there(store, KEYS) == [HIT, MISS, HIT]  # type: ignore[arg-type]
    with open_store(nvme_tier(tmp_path / "d", write_mode="none")) as store:
        assert save(store, chain(2, 2)) == [Outcome.REJECTED] * 2
        assert load(store, KEYS) == [Outcome.LOADED] * 8


def test_a_load_is_joined_from_three_tiers(tmp_path: Path) -> None:
    for name, part in (("a", slice(0, 6)), ("b", slice(3, 8))):
        with open_store(nvme_tier(tmp_path / name)) as store:
            save(store, KEYS[part])
    tiers = (memory_tier(16, promote=False), nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b"))
    with open_store(*tiers) as store:
        store.tiers[1].table.discard(KEYS[:2])
        save(store, KEYS[:2])
        for key in (KEYS[0], KEYS[4]):
            for tier in store.tiers[1:]:
                tier.table.discard([key])
        assert store.lookup(KEYS).states == (*HIT[:4], Lookup.MISS, *HIT[:3])
        outcomes = load(store, KEYS)
        assert outcomes == [Outcome.LOADED] * 4 + [Outcome.ABSENT] + [Outcome.LOADED] * 3
        assert [count(store, "load", name, "loaded") for name in ("memory", "nvme", "nvme2")] == [2, 3, 2]
        assert store.telemetry.value("served_bytes_total", "nvme2") == 2 * 8192
        check_quiet(store)


def test_what_is_bad_in_two_tiers_comes_from_the_third(tmp_path: Path, io: FaultyIO) -> None:
    tiers = (memory_tier(16), nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, breaker_failures=100) as store:
        save(store, KEYS)
        check_quiet(store)
        memory = store.tiers[0]
        pins = memory.table.pin_all(KEYS[2:5])
        for placement in pins:
            memory.view(placement)[100] ^= 1  # type: ignore[attr-defined]
        memory.table.unpin(pins)
        io.fail(5, "read")
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        assert count(store, "load", "nvme2", "loaded") == 3
        assert store.telemetry.value("misses_total", "memory", "corrupt_checksum") == 3
        check_quiet(store)


def test_a_dead_first_tier_is_passed_over_both_ways(tmp_path: Path, io: FaultyIO) -> None:
    tiers = (nvme_tier(tmp_path / "a", breaker_failures=1), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, breaker_retry_seconds=0.1) as store:
        save(store, KEYS)
        check_quiet(store)
        io.fail(5)
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        save(store, chain(2, 8))
        eventually(
            lambda: save(store, chain(3, 2)) in ([Outcome.SAVED] * 2, [Outcome.PRESENT] * 2),
            "saves do not go past it",
        )
        io.heal()
        eventually(lambda: store.lookup(KEYS).blocks == 8 and store.status()[0].readable, "it stays out")
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)


def test_a_full_queue_of_one_lower_tier_is_its_own(tmp_path: Path, io: FaultyIO) -> None:
    tiers = (memory_tier(64), nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, queue_blocks=10, close_seconds=20) as store:
        io.hang("write")
        for number in range(1, 4):
            assert save(store, chain(number, 8)) == [Outcome.SAVED] * 8
            eventually(
                lambda number=number: count(store, "write_back", "nvme2", "saved") == 8 * number,  # type: ignore[misc]
                "the third tier waits for the second",
            )
        assert count(store, "write_back", "nvme", "rejected") == 14
        assert store.queued["moving_blocks"] == 10
        io.release()
        check_quiet(store)


def test_the_source_of_a_copy_turns_out_bad(tmp_path: Path, io: FaultyIO) -> None:
    tiers = (nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, breaker_failures=100) as store:
        io.fail(5, "read")
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        check_quiet(store)
        assert count(store, "write_back", "nvme2", "io_error") == 8
        assert there(store, KEYS) == [MISS, MISS]  # type: ignore[arg-type]
        io.heal()
        save(store, KEYS)
        check_quiet(store)
        assert there(store, KEYS) == [HIT, HIT]  # type: ignore[arg-type]


@pytest.mark.parametrize("modes", [("back", "back"), ("through", "back"), ("on_evict", "back")])
def test_closing_finishes_what_is_on_its_way(modes: tuple[str, str], tmp_path: Path) -> None:
    lower = [nvme_tier(tmp_path / name, write_mode=mode) for name, mode in zip("ab", modes, strict=True)]
    # With half of it spare, memory keeps all of the blocks until they are pinned for their way down.
    store = open_store(memory_tier(100), *lower, staging_bytes=8192)
    transfers = [store.save(chain(n, 8), contents(chain(n, 8))) for n in range(1, 6)]
    store.close()
    assert all(set(finished(transfer)) == {Outcome.SAVED} for transfer in transfers)
    with open_store(nvme_tier(tmp_path / "b")) as again:
        for number in range(1, 6):
            assert served(again, chain(number, 8)) == set(chain(number, 8))


def test_a_hang_keeps_neither_close_nor_flush(tmp_path: Path, io: FaultyIO) -> None:
    tiers = (nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b"))
    store = open_store(*tiers, file_io={"nvme2": io}, close_seconds=0.3, io_deadline_seconds=0.3)
    io.hang("write")
    save(store, KEYS)
    io.wait_hanging("write")
    assert not store.flush(0.1)
    store.close()
    io.release()
    eventually(lambda: not io.hanging["write"], "threads are left")
    with open_store(nvme_tier(tmp_path / "a")) as again:
        assert served(again, KEYS) == set(KEYS)


def test_a_tier_too_small_says_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        open_store(nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b", 4 * KIB))
