"""Many blocks of one load turn out bad at once: each is asked of the tier below, none is mixed up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstrata.store import BlockStore
from kvstrata.types import Outcome
from store_kit import (
    chain,
    check_quiet,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    overwrite,
    read_at,
    save,
    slots_of,
)

BLOCKS = 96


def damage_memory(store: BlockStore, seed: int) -> int:
    """Flip a bit in half of what is in memory; how many blocks."""
    memory = store.tiers[0]
    pins = memory.table.pin(chain(1, BLOCKS))
    chosen = random.Random(seed).sample(pins, len(pins) // 2)
    for placement in chosen:
        memory.view(placement)[placement.length // 2] ^= 8  # type: ignore[attr-defined]
    memory.table.unpin(pins)
    return len(chosen)


@pytest.mark.parametrize("promote", [True, False])
def test_what_is_bad_in_memory_comes_from_below(promote: bool, tmp_path: Path) -> None:
    keys = chain(1, BLOCKS)
    tiers = memory_tier(4 * BLOCKS, promote=promote), nvme_tier(tmp_path)
    with open_store(*tiers, io_threads=4, io_store_threads=2) as store:
        assert save(store, keys) == [Outcome.SAVED] * BLOCKS
        check_quiet(store)
        for seed in range(6):
            bad = damage_memory(store, seed)
            before = store.telemetry.value("misses_total", "memory", "corrupt_checksum")
            assert load(store, keys) == [Outcome.LOADED] * BLOCKS
            assert store.telemetry.value("misses_total", "memory", "corrupt_checksum") - before == bad
            check_quiet(store)
            save(store, keys)
            check_quiet(store)


def test_what_is_bad_everywhere_is_a_miss(tmp_path: Path) -> None:
    keys = chain(1, BLOCKS)
    with open_store(
        memory_tier(4 * BLOCKS), nvme_tier(tmp_path), io_threads=4, io_store_threads=2
    ) as store:
        assert save(store, keys) == [Outcome.SAVED] * BLOCKS
        check_quiet(store)
        damage_memory(store, 0)
        lost = {slot.key for slot in slots_of(tmp_path)[::3]}
        for slot in slots_of(tmp_path)[::3]:
            at = slot.offset + 4096 + 77
            overwrite(slot.path, at, bytes([read_at(slot.path, at, 1)[0] ^ 1]))
        outcomes = load(store, keys)
        corrupt = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Outcome.CORRUPT}
        assert corrupt <= lost and 5 < len(corrupt) < len(lost)
        assert set(outcomes) == {Outcome.LOADED, Outcome.CORRUPT}
        assert load(store, keys) == [Outcome.ABSENT if key in corrupt else Outcome.LOADED for key in keys]


def test_more_blocks_than_a_batch_are_loaded_into_a_large_memory(tmp_path: Path) -> None:
    """A load is bounded by its queue, not by the batch of a save; what is promoted of it is."""
    keys = chain(1, 60)
    with open_store(memory_tier(500), nvme_tier(tmp_path), batch_blocks=16) as store:
        for start in range(0, 60, 16):
            part = keys[start : start + 16]
            assert save(store, part) == [Outcome.SAVED] * len(part)
        check_quiet(store)
        store.tiers[0].table.discard(keys)
        assert load(store, keys) == [Outcome.LOADED] * 60
        assert store.tiers[0].table.resident_blocks == 16
        check_quiet(store)
