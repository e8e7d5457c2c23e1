"""BlockTable against a slow plain model, step by step and for every policy, and with many threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from numpy.typing import NDArray

from kvstrata.policies import POLICIES
from kvstrata.table import BlockTable, Placement, Placements, alone
from kvstrata.types import BlockKey, Lookup
from reference.table import Block, TableEntry, TableModel, assert_same, entries_in, rows_of

SLOTS = 6
SLOT_BYTES = 8192
BATCH = 9
KEYS = [BlockKey(bytes([n]) * 32) for n in range(14)]

Held = tuple[Placement, Block]

some_keys = st.lists(st.sampled_from(KEYS), max_size=BATCH)
chains = st.builds(
    lambda first, count: KEYS[first : first + count], st.integers(0, 12), st.integers(1, BATCH)
)


class TableMachine(RuleBasedStateMachine):
    """Subclasses name the policy."""

    policy = ""

    written = Bundle("written")
    pinned = Bundle("pinned")

    def __init__(self) -> None:
        super().__init__()
        self.model = TableModel(SLOTS, SLOT_BYTES, self.policy)
        self.expired = 0
        self.table = BlockTable(
            SLOTS,
            SLOT_BYTES,
            self.policy,
            batch_blocks=BATCH,
            clock_ms=lambda: self.model.now_ms,
            on_expired=self._count_expired,
        )
        self.request = 0
        self.commits = 0
        self.held: list[Held] = []

    def _count_expired(self, count: int) -> None:
        assert count > 0
        self.expired += count

    def _hold(self, held: list[Held]) -> object:
        self.held += held
        return multiple(*held)

    @rule(
        target=written,
        keys=st.one_of(chains, chains, some_keys),
        admit=st.one_of(
            st.just([True] * BATCH), st.none(), st.lists(st.booleans(), min_size=BATCH, max_size=BATCH)
        ),
        same_request=st.booleans(),
        ttl_seconds=st.sampled_from([0.0, 0.0, 0.5, 3.0]),
    )
    def record(
        self,
        keys: list[BlockKey],
        admit: list[bool] | None,
        same_request: bool,
        ttl_seconds: float,
    ) -> object:
        self.request += not same_request
        mask = admit and admit[: len(keys)]
        answer = self.table.record(keys, mask, request=self.request, ttl_seconds=ttl_seconds)
        blocks = self.model.record(keys, mask, self.request, ttl_seconds, answer)
        return self._hold(list(zip(answer.reserved, blocks, strict=True)))

    @rule(held=consumes(written), length=st.integers(1, SLOT_BYTES))
    def commit(self, held: Held, length: int) -> None:
        self._commit(held, length)

    @rule(length=st.integers(1, SLOT_BYTES))
    def commit_all(self, length: int) -> None:
        for held in list(self.held):
            if held[1].phase.value == "reserved":
                self._commit(held, length)

    def _commit(self, held: Held, length: int) -> None:
        if held not in self.held:
            return
        self.held.remove(held)
        placement, block = held
        self.commits += 1
        self.table.commit(placement, length=length, checksum=2**64 - self.commits)
        self.model.commit(block, length, 2**64 - self.commits)

    @rule(held=consumes(written))
    def abort(self, held: Held) -> None:
        if held not in self.held:
            return
        self.held.remove(held)
        self.table.abort(held[0])
        self.model.abort(held[1])

    @rule(target=pinned, keys=some_keys)
    def pin(self, keys: list[BlockKey]) -> object:
        placements = self.table.pin(keys)
        found = self.model.pin(keys)
        assert len(placements) == len(found)
        for placement, (position, block) in zip(placements, found, strict=True):
            assert_same(placement, position, block)
        return self._hold([(p, block) for p, (_, block) in zip(placements, found, strict=True)])

    @rule(held=consumes(pinned))
    def unpin(self, held: Held) -> None:
        self.held.remove(held)
        self.table.unpin([held[0]])
        self.model.unpin(held[1])

    @rule(held=pinned)
    def drop(self, held: Held) -> None:
        assert self.table.drop(held[0]) == self.model.drop(held[1])

    @rule(keys=some_keys)
    def discard(self, keys: list[BlockKey]) -> None:
        keys = list(dict.fromkeys(keys))
        assert self.table.discard(keys) == self.model.discard(keys)

    @rule(keys=some_keys)
    def lookup(self, keys: list[BlockKey]) -> None:
        assert self.table.lookup(keys) == self.model.lookup(keys)

    @rule(milliseconds=st.sampled_from([1, 499, 500, 2_500]))
    def wait(self, milliseconds: int) -> None:
        self.model.now_ms += milliseconds

    @rule(slots=st.lists(st.integers(0, SLOTS - 1), max_size=3))
    def withdraw(self, slots: list[int]) -> None:
        assert self.table.withdraw(slots) == self.model.withdraw(slots)

    @rule()
    def restore_withdrawn(self) -> None:
        assert self.table.restore_withdrawn() == self.model.restore_withdrawn()

    @rule()
    def entries_go_out_and_come_in(self) -> None:
        entries = entries_in(self.table.entries())
        assert entries == self.model.entries()
        again = BlockTable(
            SLOTS, SLOT_BYTES, self.policy, batch_blocks=BATCH, clock_ms=lambda: self.model.now_ms
        )
        assert again.restore(rows_of(entries)) == (len(entries), len(entries))
        restored = entries_in(again.entries())
        if self.policy in ("lru", "lru_forward"):
            assert restored == entries  # their order is all there is to know
        assert sorted(restored, key=lambda entry: entry.slot) == sorted(
            entries, key=lambda entry: entry.slot
        )
        again.check_integrity()

    @invariant()
    def integrity(self) -> None:
        self.table.check_integrity()

    @invariant()
    def capacity_is_never_passed(self) -> None:
        assert self.table.capacity_bytes == self.model.capacity_bytes
        assert self.table.resident_blocks * SLOT_BYTES <= self.table.capacity_bytes
        assert self.table.used_bytes <= self.table.capacity_bytes <= SLOTS * SLOT_BYTES

    @invariant()
    def sums_agree(self) -> None:
        assert self.table.resident_blocks == self.model.resident_blocks
        assert self.table.used_bytes == self.model.used_bytes
        assert self.table.pinned_blocks() == self.model.pinned_blocks
        assert self.expired == self.model.expired

    @invariant()
    def no_two_holders_share_a_slot(self) -> None:
        slots: dict[int, BlockKey] = {}
        for placement, block in self.held:
            assert slots.setdefault(placement.slot, block.key) == block.key

    def teardown(self) -> None:
        for placement, block in self.held:
            if block.phase.value == "reserved":
                self.table.abort(placement)
            else:
                self.table.unpin([placement])
        self.table.check_integrity()
        assert self.table.pinned_blocks() == 0
        self.table.discard(KEYS)
        assert self.table.used_bytes == 0
        self.table.check_integrity()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_table_is_the_model(policy: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type(f"{policy.title()}Machine", (TableMachine,), {"policy": policy})
    # The table is one for all policies: two of them try everything, the others what differs.
    examples = 150 if policy in ("lru", "arc") else 25
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=60))


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def fill(table: BlockTable, keys: Sequence[BlockKey], request: int = 1, ttl_seconds: float = 0.0) -> int:
    """Record, write and commit a chain; returns how many were reserved."""
    recorded = table.record(keys, [True] * len(keys), request=request, ttl_seconds=ttl_seconds)
    for place in recorded.reserved:
        table.commit(place, length=10, checksum=place.slot)
    return len(recorded.reserved)


def test_a_block_is_found_only_after_commit(policy: str) -> None:
    table = BlockTable(4, SLOT_BYTES, policy)
    (place,) = table.record(KEYS[:1], [True], request=1).reserved
    assert table.lookup(KEYS[:2]) == [Lookup.PENDING, Lookup.MISS]
    assert table.pin(KEYS[:1]) == []
    table.commit(place, length=5, checksum=7)
    assert table.lookup(KEYS[:2]) == [Lookup.HIT, Lookup.MISS]
    (pinned,) = table.pin(KEYS[:1])
    assert (pinned.length, pinned.checksum, pinned.slot) == (5, 7, place.slot)


def test_a_failed_write_leaves_nothing(policy: str) -> None:
    table = BlockTable(4, SLOT_BYTES, policy)
    (place,) = table.record(KEYS[:1], [True], request=1).reserved
    table.abort(place)
    assert table.lookup(KEYS[:1]) == [Lookup.MISS]
    assert table.used_bytes == 0
    table.check_integrity()


def test_a_full_table_of_pins_refuses(policy: str) -> None:
    table = BlockTable(3, SLOT_BYTES, policy)
    fill(table, KEYS[:3])
    pins = table.pin(KEYS[:3])
    answer = table.record(KEYS[3:5], [True] * 2, request=2)
    assert (answer.reserved, answer.refused, answer.evicted) == ([], [0, 1], 0)
    assert table.lookup(KEYS[:3]) == [Lookup.HIT] * 3
    table.unpin(pins)
    assert fill(table, KEYS[3:5], request=3) >= 1  # a policy may still prefer one that is there
    assert table.resident_blocks == 3
    table.check_integrity()


def test_a_dropped_block_keeps_its_slot_until_the_last_pin(policy: str) -> None:
    table = BlockTable(1, SLOT_BYTES, policy)
    fill(table, KEYS[:1])
    first, second = table.pin(KEYS[:1]) + table.pin(KEYS[:1])
    assert table.drop(first)
    assert not table.drop(second)
    assert table.lookup(KEYS[:1]) == [Lookup.MISS]
    assert fill(table, KEYS[1:2], request=2) == 0  # its slot is still being read
    table.unpin([first])
    assert table.used_bytes == SLOT_BYTES
    table.unpin([second])
    assert table.used_bytes == 0
    assert fill(table, KEYS[1:2], request=3) == 1


def test_a_dropped_block_can_be_saved_anew_while_it_is_read(policy: str) -> None:
    table = BlockTable(2, SLOT_BYTES, policy)
    fill(table, KEYS[:1])
    (old,) = table.pin(KEYS[:1])
    table.drop(old)
    (new,) = table.record(KEYS[:1], [True], request=2).reserved
    assert new.slot != old.slot
    table.commit(new, length=1, checksum=1)
    table.unpin([old])
    assert table.lookup(KEYS[:1]) == [Lookup.HIT]
    table.check_integrity()


@pytest.mark.parametrize("misuse", ["unpin twice", "commit twice", "batch too large"])
def test_misuse_is_an_assertion(policy: str, misuse: str) -> None:
    table = BlockTable(2, SLOT_BYTES, policy, batch_blocks=3)
    (place,) = table.record(KEYS[:1], [True], request=1).reserved
    table.commit(place, length=1, checksum=1)
    with pytest.raises(AssertionError):
        if misuse == "unpin twice":
            table.unpin([place])
        elif misuse == "commit twice":
            table.commit(place, length=1, checksum=1)
        else:
            table.record(KEYS[:4], request=2)


def test_a_block_expires_at_its_time(policy: str) -> None:
    now = [5_000]
    expired: list[int] = []
    table = BlockTable(4, SLOT_BYTES, policy, clock_ms=lambda: now[0], on_expired=expired.append)
    fill(table, KEYS[:2], ttl_seconds=1.5)
    fill(table, KEYS[2:3], request=2)
    now[0] += 1_499
    assert table.lookup(KEYS[:3]) == [Lookup.HIT] * 3
    now[0] += 1
    assert table.lookup(KEYS[:3]) == [Lookup.MISS, Lookup.MISS, Lookup.HIT]
    assert expired == [2]
    assert table.resident_blocks == 1


def test_memory_for_expiry_is_bounded(policy: str) -> None:
    """Blocks that leave long before their TTL must not leave something behind each."""
    table = BlockTable(4, SLOT_BYTES, policy, batch_blocks=8)
    for number in range(2_000):
        fill(table, [BlockKey(number.to_bytes(32, "big"))], request=number, ttl_seconds=86_400)
    assert len(table._expiry) <= 100
    table.check_integrity()


@pytest.mark.parametrize("count", range(70, 80))
def test_blocks_expire_also_after_many_others_left_early(policy: str, count: int) -> None:
    """Around the count at which the table forgets when those would have expired."""
    now = [0]
    table = BlockTable(4, SLOT_BYTES, policy, batch_blocks=8, clock_ms=lambda: now[0])
    for number in range(count):
        now[0] += 1
        fill(table, [BlockKey(number.to_bytes(32, "big"))], request=number, ttl_seconds=10)
    last = sorted(table.entries()["expires_ms"].tolist())
    assert len(last) == 4 and last[0] >= 10_001 and last[3] <= count + 10_000
    for moment, left in zip(last, (3, 2, 1, 0), strict=True):
        now[0] = moment
        table.lookup([])
        assert table.resident_blocks == left
    table.check_integrity()


def test_an_expired_block_stays_readable_for_who_pinned_it(policy: str) -> None:
    now = [0]
    table = BlockTable(1, SLOT_BYTES, policy, clock_ms=lambda: now[0])
    fill(table, KEYS[:1], ttl_seconds=1)
    pins = table.pin(KEYS[:1])
    now[0] += 1_000
    assert table.lookup(KEYS[:1]) == [Lookup.MISS]
    assert table.used_bytes == SLOT_BYTES
    table.unpin(pins)
    assert table.used_bytes == 0


def test_restore_takes_the_later_of_two_and_never_more_than_it_holds(policy: str) -> None:
    def rows(*found: tuple[int, int, int]) -> NDArray[Any]:
        """From key number, slot and sequence."""
        return rows_of([TableEntry(KEYS[key], slot, 10, number, number, 0) for key, slot, number in found])

    table = BlockTable(3, SLOT_BYTES, policy)
    assert table.restore(rows()) == (0, 0)
    assert table.restore(rows((0, 0, 5), (1, 1, 6), (0, 2, 7))) == (2, 2)
    assert {(e.key, e.slot) for e in entries_in(table.entries())} == {(KEYS[1], 1), (KEYS[0], 2)}
    (fresh,) = table.record(KEYS[5:6], [True], request=1).reserved
    assert (fresh.slot, fresh.sequence) == (0, 8)  # the slot of the loser; sequences go on
    table.check_integrity()

    table = BlockTable(3, SLOT_BYTES, policy)
    assert table.restore(rows(*((n, n % 3, n) for n in range(6)))) == (3, 6)
    assert set(table.entries()["key"].tolist()) == set(KEYS[3:6])
    table.check_integrity()

    table = BlockTable(3, SLOT_BYTES, policy)
    assert table.restore(rows((0, 1, 1), (1, 1, 2))) == (1, 2)  # one slot cannot hold both
    assert table.restore(rows((0, 0, 3), (2, 0, 4))) == (1, 2)  # nor can a key that is there come again
    table.check_integrity()


def test_withdrawn_slots_are_not_used(policy: str) -> None:
    table = BlockTable(4, SLOT_BYTES, policy)
    fill(table, KEYS[:1])
    [used] = table.entries()["slot"].tolist()
    assert table.withdraw(range(4)) == 0
    assert table.capacity_bytes == SLOT_BYTES  # the occupied slot is still there
    assert fill(table, KEYS[1:4], request=2) <= 1
    assert table.entries()["slot"].tolist() == [used]
    assert table.restore_withdrawn() == 3
    assert fill(table, KEYS[4:8], request=3) >= 3  # what there is room for
    assert table.resident_blocks == 4
    table.check_integrity()


def what(placements: Placements) -> list[tuple[int, BlockKey, int, int, int, int]]:
    """Everything but where: slots come back in another order where blocks leave one by one."""
    return [(p.position, p.key, p.length, p.checksum, p.sequence, p.expires_ms) for p in placements]


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_what_one_by_one_would_be(policy: str, seed: int) -> None:
    """Two tables, the same calls: on one in batches, on the other block by block in a shuffled order."""
    rng = np.random.default_rng(seed)
    clock = [1_000]
    tables = [BlockTable(12, SLOT_BYTES, policy, batch_blocks=8, clock_ms=lambda: clock[0]) for _ in "ab"]
    keys = [BlockKey(n.to_bytes(32, "big")) for n in range(30)]
    batched, single = tables
    pinned: list[tuple[Placements, Placements]] = []
    for request in range(120):
        clock[0] += 7
        first = int(rng.integers(0, 24))
        chain = keys[first : first + 6]
        ttl = float(rng.choice([0.0, 0.2]))
        answers = [
            table.record(chain, [True] * len(chain), request=request, ttl_seconds=ttl) for table in tables
        ]
        placed, other = answers[0].placed, answers[1].placed
        assert what(placed) == what(other) and list(placed) == answers[0].reserved
        good = rng.random(len(placed)) < 0.8
        kept, lost = placed.take(np.flatnonzero(good)), placed.take(np.flatnonzero(~good))
        lengths = rng.integers(1, SLOT_BYTES, len(kept))
        checksums = rng.integers(-(2**63), 2**63 - 1, len(kept))
        batched.commit_all(kept, lengths, checksums)
        batched.abort_all(lost)
        for row, placement in enumerate(other.take(np.flatnonzero(good))):
            checksum = int(checksums[row]) % 2**64
            single.commit(placement, length=int(lengths[row]), checksum=checksum)
        for placement in other.take(np.flatnonzero(~good)):
            single.abort(placement)
        # A key may be asked for twice in one batch: it is pinned twice.
        wanted = [keys[n] for n in rng.integers(0, 30, 5).tolist()]
        pair = batched.pin_all(wanted), single.pin_all(wanted)
        assert what(pair[0]) == what(pair[1])
        assert list(pair[0]) == [alone(placement)[0] for placement in pair[0]]
        pinned.append(pair)
        if len(pair[0]) and rng.random() < 0.3:
            assert batched.drop(pair[0][0]) == single.drop(pair[1][0])
        if rng.random() < 0.2:
            assert batched.discard(wanted[:2]) == single.discard(wanted[:2])
        if len(pinned) > 2:
            together, apart = pinned.pop(int(rng.integers(0, 3)))
            batched.unpin(together)
            for place in rng.permutation(len(apart)).tolist():
                single.unpin([apart[place]])
        for table in tables:
            table.check_integrity()
        assert batched.pinned_blocks() == single.pinned_blocks()
        assert batched.lookup(keys) == single.lookup(keys)
    for together, apart in pinned:
        batched.unpin(together)
        single.unpin(apart)
    for table in tables:
        table.check_integrity()
        assert table.pinned_blocks() == 0
    left = [table.entries()[["key", "length", "checksum", "sequence"]].tolist() for table in tables]
    assert left[0] == left[1]


def test_the_columns_of_placements() -> None:
    table = BlockTable(6, SLOT_BYTES, "lru")
    places = table.record(KEYS[:5], [True] * 5, request=1).placed
    table.commit_all(places, np.arange(5) + 1, np.array([-1, 2, -3, 4, -5]))
    pins = table.pin_all([KEYS[4], KEYS[9], KEYS[0], KEYS[2]])
    assert pins.positions.tolist() == [0, 2, 3] and pins.keys == [KEYS[4], KEYS[0], KEYS[2]]
    assert pins.checksums.tolist() == [-5, -1, -3] and pins.lengths.tolist() == [5, 1, 3]
    assert [one.checksum for one in pins] == [2**64 - 5, 2**64 - 1, 2**64 - 3]
    assert pins.at(np.array([3, 0, 2])).tolist() == [2, 0, 1]
    assert pins.key_words().tobytes() == KEYS[4] + KEYS[0] + KEYS[2]
    part = pins.take(np.array([2, 0]))
    assert list(part) == [pins[2], pins[0]]
    assert len(pins.take(np.zeros(0, dtype=np.int64))) == 0
    table.unpin(part)
    table.unpin([pins[1]])
    assert table.pinned_blocks() == 0
    none = table.pin_all([])
    assert len(none) == 0 and list(none) == []
    table.unpin(none)
    table.abort_all(none)
    table.commit_all(none, np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert len(table.pin_all(KEYS[6:9])) == 0
    table.check_integrity()


def test_a_doomed_block_that_was_pinned_twice_in_one_batch(policy: str) -> None:
    table = BlockTable(2, SLOT_BYTES, policy)
    fill(table, KEYS[:1])
    pins = table.pin_all([KEYS[0], KEYS[0]])
    assert table.drop(pins[0]) and not table.drop(pins[1])
    assert table.used_bytes == SLOT_BYTES
    table.unpin(pins)
    assert table.used_bytes == 0
    table.check_integrity()


def test_neighbours_in_a_chain_get_neighbouring_slots(policy: str) -> None:
    table = BlockTable(16, SLOT_BYTES, policy)
    for first in (0, 5):
        placed = table.record(KEYS[first : first + 5], [True] * 5, request=first).placed
        assert (np.diff(placed.slots) == 1).all()
        table.commit_all(placed, np.ones(5, np.int64), np.zeros(5, np.int64))
    table.discard(KEYS[3:7])
    ascending = table.record(KEYS[3:14], [True] * 11, request=9).placed.slots
    assert len(ascending) >= 4 and (np.diff(ascending) > 0).all()
    table.check_integrity()


@pytest.mark.parametrize("seed", range(2))
def test_many_writers_on_one_table(policy: str, seed: int) -> None:
    """A list stands for the medium: a slot belongs to its writer alone, a pinned block does not change."""
    slots, keys = 24, [BlockKey(n.to_bytes(32, "big")) for n in range(80)]
    table = BlockTable(slots, SLOT_BYTES, policy, batch_blocks=16)
    medium: list[tuple[BlockKey, int] | None] = [None] * slots
    writing: list[int | None] = [None] * slots
    rounds, threads = 400, 8
    faults: list[str] = []
    stop = threading.Event()
    loaded = [0] * threads

    def write(me: int, place: Placement, rng: np.random.Generator) -> None:
        if writing[place.slot] is not None:
            faults.append(f"slot {place.slot} has two writers")
        writing[place.slot] = me
        stamp = int(rng.integers(1, 2**62))
        medium[place.slot] = (place.key, stamp)
        if writing[place.slot] != me:
            faults.append(f"slot {place.slot} was taken over while it was written")
        writing[place.slot] = None
        if rng.random() < 0.1:
            table.abort(place)
        else:
            table.commit(place, length=1, checksum=stamp)

    def read(me: int, chain: Sequence[BlockKey], rng: np.random.Generator) -> None:
        pins = table.pin(chain)
        for place in pins:
            if medium[place.slot] != (place.key, place.checksum):
                faults.append(f"slot {place.slot} does not hold what the table says")
            loaded[me] += 1
        if pins and rng.random() < 0.05:
            table.drop(pins[0])
        table.unpin(pins)

    def work(me: int) -> None:
        rng = np.random.default_rng([seed, me])
        try:
            for step in range(rounds):
                first = int(rng.zipf(1.3)) % len(keys)
                chain = keys[first : first + int(rng.integers(1, 12))]
                recorded = table.record(chain, [True] * len(chain), request=step * threads + me)
                for place in recorded.reserved:
                    write(me, place, rng)
                read(me, chain, rng)
                if rng.random() < 0.02:
                    table.discard(chain)
                if rng.random() < 0.02:
                    table.withdraw(rng.integers(0, slots, 4).tolist())
                    table.restore_withdrawn()
        except BaseException as error:
            faults.append(repr(error))
            raise

    def watch() -> None:
        while not stop.is_set():
            table.check_integrity()
            if table.resident_blocks > slots or table.used_bytes > slots * SLOT_BYTES:
                faults.append("capacity was passed")
            stop.wait(0.002)

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
    for thread in [watcher, *workers]:
        thread.start()
    for thread in workers:
        thread.join(60)
    stop.set()
    watcher.join(60)
    assert not any(thread.is_alive() for thread in [watcher, *workers])
    assert not faults, faults[:3]
    assert min(loaded) > 0
    table.check_integrity()
    assert table.pinned_blocks() == 0
    table.discard(keys)
    assert table.used_bytes == 0
