"""Write mode "on_evict": a tier gets what the one above gives up, with the right bytes, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faulty_io import FaultyIO
from kvstrata.policies import POLICIES
from kvstrata.store import BlockStore
from kvstrata.table import BlockTable
from kvstrata.types import BlockKey, Lookup, Outcome
from store_kit import (
    bytes_on_medium,
    chain,
    check_quiet,
    contents,
    eventually,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    served,
)

HIT = [Lookup.HIT]


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    faulty = FaultyIO()
    yield faulty
    faulty.heal()
    faulty.release()


def stack(folder: Path, *, memory: bool = True, blocks: int = 16, spare: int = 8, **fields: Any) -> Any:
    """An upper tier of so many blocks beside the spare ones, and one that gets what leaves it."""
    upper = memory_tier(blocks + spare) if memory else nvme_tier(folder / "upper", 600_000)
    lower = nvme_tier(folder / "lower", write_mode="on_evict", demote_bytes=spare * 8192, **fields)
    return upper, lower


def demoted(store: BlockStore, outcome: str) -> int:
    return store.telemetry.value("blocks_total", "demote", store.tiers[1].name, outcome)


@pytest.mark.parametrize("memory", [True, False])
def test_what_leaves_goes_below_and_nothing_else(memory: bool, tmp_path: Path) -> None:
    with open_store(*stack(tmp_path, memory=memory, spare=12)) as store:
        room = store.tiers[0].table.capacity_bytes // store.tiers[0].table.slot_bytes  # type: ignore[attr-defined]
        chains = [chain(number, 4) for number in range(room // 4 + 5)]
        for keys in chains:
            assert save(store, keys) == [Outcome.SAVED] * 4
            check_quiet(store)
        upper, lower = (tier.table for tier in store.tiers)
        for keys in chains:
            for key in keys:
                places = [Lookup.HIT in table.lookup([key]) for table in (upper, lower)]
                assert places.count(True) == 1, "a block is in both, or lost"
        for keys in chains:
            assert served(store, keys) == set(keys)
            check_quiet(store)
        assert demoted(store, "saved") >= 4 * len(chains) - room


def test_it_survives_where_the_upper_tier_does_not(tmp_path: Path) -> None:
    with open_store(*stack(tmp_path)) as store:
        for number in range(10):
            save(store, chain(number, 4))
            check_quiet(store)
        assert served(store, chain(0, 4)) == set(chain(0, 4))
    with open_store(*stack(tmp_path)) as store:
        for number in range(5):
            assert served(store, chain(number, 4)) == set(chain(number, 4))


def test_promotion_demotes_too(tmp_path: Path) -> None:
    """Reading what is below pushes other blocks out of memory: they go below in their turn."""
    with open_store(*stack(tmp_path, blocks=16, spare=16)) as store:
        for number in range(10):
            save(store, chain(number, 4))
            check_quiet(store)
        for _ in range(2):
            for number in range(10):
                assert served(store, chain(number, 4)) == set(chain(number, 4))
                check_quiet(store)
        assert store.telemetry.value("blocks_total", "promote", "memory", "saved") > 0


def test_nobody_waits_for_a_tier_that_hangs(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(*stack(tmp_path), file_io={"nvme": io}, close_seconds=20) as store:
        io.hang("write", "allocate")
        for number in range(20):
            assert save(store, chain(number, 4)) == [Outcome.SAVED] * 4
        lost = demoted(store, "rejected")
        assert lost == 80 - 16 - 8, "spare slots bound what waits"
        assert store.tiers[0].table.used_bytes <= 24 * 8192
        io.release()
        check_quiet(store)
        assert demoted(store, "saved") == 8


def test_a_tier_out_of_service_keeps_nobody(tmp_path: Path, io: FaultyIO) -> None:
    layers = {"file_io": {"nvme": io}, "breaker_failures": 1, "breaker_retry_seconds": 0.1}
    with open_store(*stack(tmp_path), **layers) as store:  # type: ignore[arg-type]
        io.fail(28)
        for number in range(20):
            assert save(store, chain(number, 4)) == [Outcome.SAVED] * 4
            check_quiet(store)
        assert demoted(store, "unavailable") > 0 and demoted(store, "saved") == 0
        io.heal()

        def again() -> bool:
            number = 1000 + store.telemetry.value("lookups_total")
            store.lookup(chain(0, 1))
            save(store, chain(number, 4))
            return demoted(store, "saved") > 0

        eventually(again, "the lower tier does not come back")
        check_quiet(store)


def test_a_chain_of_evictions(tmp_path: Path) -> None:
    """What memory gives up goes to nvme, and what that gives up goes to the third."""
    upper, middle = stack(tmp_path, spare=8)
    middle = nvme_tier(tmp_path / "lower", 500_000, write_mode="on_evict", demote_bytes=8 * 8192)
    third = nvme_tier(tmp_path / "third", write_mode="on_evict", demote_bytes=8 * 12288)
    with open_store(upper, middle, third) as store:
        for number in range(25):
            assert save(store, chain(number, 4)) == [Outcome.SAVED] * 4
            check_quiet(store)
        for number in range(25):
            assert served(store, chain(number, 4)) == set(chain(number, 4))
            check_quiet(store)
        assert bytes_on_medium(tmp_path / "lower") <= 500_000
        assert store.telemetry.value("blocks_total", "demote", "nvme2", "saved") > 0
        check_quiet(store)


# The table alone


@settings(max_examples=80)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    spare=st.integers(1, 6),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["save", "free", "pin", "unpin", "drop"]), st.integers(0, 12), st.integers(1, 6)
        ),
        max_size=40,
    ),
)
def test_a_slot_that_is_leaving_is_nobody_elses(
    policy: str, spare: int, steps: list[tuple[str, int, int]]
) -> None:
    """A list stands for the memory: the bytes of what left stay in their slot until it is let go."""
    keys = [BlockKey(bytes([n]) * 32) for n in range(20)]
    table = BlockTable(8, 4096, policy, batch_blocks=8)
    table.set_spare(spare)
    memory: list[BlockKey | None] = [None] * 8
    leaving: list[Any] = []
    pins: list[Any] = []
    for turn, (what, first, count) in enumerate(steps):
        part = keys[first : first + count]
        if what == "save":
            had = {key for key in keys if table.lookup([key]) == HIT}
            recorded = table.record(part, [True] * len(part), request=turn)
            assert recorded.left is not None
            gone = had - {key for key in keys if table.lookup([key]) == HIT}
            assert recorded.evicted == len(gone) and set(recorded.left.keys) <= gone
            assert recorded.left.positions.tolist() == list(range(len(recorded.left)))
            assert [memory[slot] for slot in recorded.left.slots.tolist()] == recorded.left.keys
            # No more is given up than newcomers need.
            assert len(recorded.left) == len(gone) or not table._free_slots
            if len(recorded.left):
                leaving.append(recorded.left)
            busy = {slot for left in leaving for slot in left.slots.tolist()}
            assert busy.isdisjoint(recorded.placed.slots.tolist()), "a slot was given away too early"
            for slot, key in zip(recorded.placed.slots.tolist(), recorded.placed.keys, strict=True):
                memory[slot] = key
            ones = np.ones(len(recorded.placed), np.int64)
            table.commit_all(recorded.placed, ones, ones)
        elif what == "free" and leaving:
            left = leaving.pop(first % len(leaving))
            assert [memory[slot] for slot in left.slots.tolist()] == left.keys
            table.let_go(left)
        elif what == "pin":
            pins.append(table.pin_all(part))
        elif what == "unpin" and pins:
            table.unpin(pins.pop(first % len(pins)))
        elif what == "drop":
            table.discard(part)
        table.check_integrity()
        assert table.resident_blocks <= 8
    for left in leaving:
        table.let_go(left)
    for pinned in pins:
        table.unpin(pinned)
    table.check_integrity()
    assert table.pinned_blocks() == 0


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_saves_in_parallel_are_demoted_right(policy: str, tmp_path: Path) -> None:
    upper = memory_tier(24, policy=policy)
    lower = nvme_tier(tmp_path, write_mode="on_evict", demote_bytes=8 * 8192)
    with open_store(upper, lower) as store:
        for number in range(0, 60, 6):
            chains = [chain(n, 4) for n in range(number, number + 6)]
            transfers = [store.save(keys, contents(keys)) for keys in chains]
            loads = [load(store, chain(n, 4)) for n in range(number)]
            for transfer in transfers:
                transfer.wait()
            assert len(loads) == number
        check_quiet(store)
        for number in range(60):
            served(store, chain(number, 4))
        check_quiet(store)
        assert demoted(store, "saved") > 0
