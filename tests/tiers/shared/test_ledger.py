"""Ledger and key table: against plain Python, and against a BlockTable that is fed the same accesses."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.policies import POLICIES
from kvstrata.table import BlockTable
from kvstrata.tiers.shared.batches import Touched
from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.key_table import FREE, KeyTable
from kvstrata.tiers.shared.ledger import Ledger
from kvstrata.types import BlockKey

STRIDE = 8192
PAGES = STRIDE // 4096


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + bytes(24)


def extent(sequence: int, numbers: list[int], *, expires: int = 0, stride: int = STRIDE) -> Extent:
    """The last block is the oldest."""
    entries = np.zeros(len(numbers), ENTRY_DTYPE)
    entries["key"] = np.array([np.void(key(number)) for number in numbers], "V32")
    entries["number"] = np.arange(len(numbers))
    entries["length"] = 100
    entries["expires_ms"] = expires
    entries["sequence"] = np.arange(len(numbers))[::-1]
    size = len(numbers) * stride + 4096
    return Extent(ExtentId(1, sequence), size, stride, bytes(32), entries, {1})


def touched(*numbers: int) -> Touched:
    return Touched(0, np.array(numbers, np.uint64))


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "drop", "find"]), st.lists(st.integers(0, 40), max_size=12)),
        max_size=40,
    ),
    spread=st.sampled_from([1, 16, 2**58]),
)
def test_key_table_is_a_dictionary(steps: list[tuple[str, list[int]]], spread: int) -> None:
    table, model, fresh = KeyTable(4), dict[int, int](), 0
    for verb, numbers in steps:
        words = np.array([number * spread % 2**63 for number in numbers], np.int64)
        if verb == "put":
            found, used = table.put(words, np.arange(fresh, fresh + len(words), dtype=np.int32))
            for word in words.tolist():
                if word not in model:
                    model[word] = fresh
                    fresh += 1
            assert used >= 0 and len(found) == len(words)
            assert found.tolist() == [model[word] for word in words.tolist()]
        elif verb == "drop":
            table.drop(words)
            for word in words.tolist():
                model.pop(word, None)
        else:
            assert table.find(words).tolist() == [model.get(word, FREE) for word in words.tolist()]
    assert len(table) == len(model)
    everything = np.array(list(model), np.int64)
    assert table.find(everything).tolist() == list(model.values())


def living(ledger: Ledger, extents: list[Extent]) -> list[int]:
    found: list[int] = []
    for one in extents:
        keys = one.entries["key"][ledger.living(one)].tolist()
        found += [int.from_bytes(word[:8], "little") for word in keys]
    assert len(set(found)) == len(found), "a block lives twice"
    return sorted(found)


def table_access(table: BlockTable, numbers: list[int], request: int) -> None:
    keys = [BlockKey(key(number)) for number in numbers]
    recorded = table.record(keys, [True] * len(keys), request=request)
    count = len(recorded.placed)
    table.commit_all(recorded.placed, np.full(count, 100), np.zeros(count, np.int64))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_lives_is_what_a_block_table_keeps(policy: str) -> None:
    """Extents of new blocks, touches, and extents that go: the same ids, policy and order in both."""
    rng = random.Random(policy)
    slots = 60
    ledger = Ledger(policy, {}, slots * STRIDE)
    table = BlockTable(slots, STRIDE, policy)
    extents: list[Extent] = []
    fresh = 0
    for step in range(1, 400):
        choice = rng.random()
        if choice < 0.3:
            numbers = list(range(fresh, fresh + rng.randint(1, 9)))
            fresh += len(numbers)
            extents.append(extent(step, numbers))
            ledger.add(extents[-1])
            for number in reversed(numbers):
                table_access(table, [number], step)
        elif choice < 0.85 and extents:
            here = [number for one in extents[-12:] for number in numbers_of(one)]
            chain = rng.sample(here, min(len(here), rng.randint(1, 8)))
            ledger.touch([touched(*chain, 10**9)])
            table_access(table, chain, step)
        elif extents:
            # What still lives goes from both; what is dead is forgotten nowhere but in the folder.
            gone = extents.pop(rng.randrange(len(extents)))
            lost = living(ledger, [gone])
            assert ledger.remove(gone) == len(lost)
            table.discard([BlockKey(key(number)) for number in lost])
        ledger.check_integrity(extents)
        known = {number for one in extents for number in numbers_of(one)}
        kept = sorted(number for number in known if table.lookup([BlockKey(key(number))])[0].value == "hit")
        assert living(ledger, extents) == kept
        assert ledger.live_blocks == len(kept)
    assert ledger.evicted > 20


def numbers_of(one: Extent) -> list[int]:
    return [int.from_bytes(word[:8], "little") for word in one.entries["key"].tolist()]


def test_a_second_copy_is_dead_until_the_first_one_is() -> None:
    ledger = Ledger("lru", {}, 4 * STRIDE)
    first, second = extent(1, [1, 2]), extent(2, [1, 3])
    ledger.add(first)
    ledger.add(second)
    assert ledger.duplicates == 1
    assert ledger.living(second).tolist() == [False, True]
    # 1 and 2 die: they are the oldest of five.
    ledger.add(extent(3, [4, 5, 6]))
    assert ledger.living(first).tolist() == [False, False]
    third = extent(4, [1])
    ledger.add(third)
    assert ledger.living(third).tolist() == [True]
    assert ledger.duplicates == 1


def test_a_dead_block_that_is_touched_before_its_extent_goes_lives_again() -> None:
    ledger = Ledger("lru", {}, 2 * STRIDE)
    old, new = extent(1, [1, 2]), extent(2, [3, 4])
    ledger.add(old)
    ledger.add(new)
    assert not ledger.living(old).any()
    assert ledger.touch([touched(1)]) == 1
    assert ledger.living(old).tolist() == [True, False]
    assert ledger.live_blocks == 2
    ledger.check_integrity([old, new])


def test_moved_blocks_keep_their_place_in_the_order() -> None:
    ledger = Ledger("lru", {}, 4 * STRIDE)
    old, other = extent(1, [1, 2]), extent(2, [3, 4])
    ledger.add(old)
    ledger.add(other)
    copy = extent(3, [1, 2])
    ledger.add(copy, moved=True)
    assert not ledger.living(old).any() and ledger.living(copy).all()
    assert ledger.remove(old) == 0
    ledger.check_integrity([other, copy])
    ledger.add(extent(4, [5]))
    assert ledger.living(copy).tolist() == [True, False], "2 is the coldest, wherever it lies"
    assert ledger.living(other).all()


def test_expired_blocks_die_and_are_not_brought_back_but_by_a_new_copy() -> None:
    ledger = Ledger("lru", {}, 100 * STRIDE)
    mortal, copy = extent(1, [1, 2, 3], expires=1000), extent(2, [4], expires=3000)
    ledger.add(mortal)
    ledger.add(copy)
    assert ledger.expire(999) == 0
    assert ledger.expire(1000) == 3
    ledger.touch([touched(1, 2, 3)])
    assert not ledger.living(mortal).any()
    again = extent(3, [2])
    ledger.add(again)
    assert ledger.living(again).all()
    assert ledger.expire(5000) == 1
    assert ledger.live_blocks == 1
    ledger.check_integrity([mortal, copy, again])


def test_ids_and_rows_grow_and_are_used_again() -> None:
    ledger = Ledger("lru", {}, 3000 * STRIDE)
    extents: list[Extent] = []
    for step in range(400):
        extents.append(extent(step, list(range(step * 100, step * 100 + 100))))
        ledger.add(extents[-1])
        if len(extents) > 50:
            ledger.remove(extents.pop(0))
    ledger.check_integrity(extents)
    assert ledger.live_blocks == 3000
    assert living(ledger, extents) == list(range(40_000 - 3000, 40_000))


def test_what_a_call_costs_depends_on_what_it_is_given() -> None:
    """Counted in blocks looked at: a hundred thousand are there, some hundred change."""
    ledger = Ledger("lru", {}, 90_000 * STRIDE)
    everything = [extent(step, list(range(step * 1000, step * 1000 + 1000))) for step in range(100)]
    for one in everything:
        ledger.add(one)
    before = ledger.visited
    ledger.add(extent(1000, list(range(10**6, 10**6 + 100))))
    ledger.touch([touched(*range(50_000, 50_100))])
    ledger.expire(10**12)
    ledger.view()
    assert ledger.visited - before < 1000
