"""Grants: fair shares, and the promise that a folder never takes more than its capacity."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from folder_kit import DictMedium
from kvstrata.tiers.shared.format import epoch_name, grants_name
from kvstrata.tiers.shared.grants import Allowance, GrantBook, Standing, fair_split, read_grants
from kvstrata.tiers.shared.small_files import Beat, Grant, Grants

CAPACITY, RESERVE, FLOOR = 1000, 100, 40


@given(wanted=st.dictionaries(st.integers(0, 9), st.integers(0, 100)), room=st.integers(-5, 300))
def test_shares_are_fair(wanted: dict[int, int], room: int) -> None:
    shares = fair_split(wanted, room)
    assert shares.keys() == wanted.keys()
    assert sum(shares.values()) <= max(0, room)
    assert all(0 <= shares[member] <= wanted[member] for member in wanted)
    short = [member for member in wanted if shares[member] < wanted[member]]
    if short:
        assert sum(shares.values()) == max(0, room)
        # Nobody has more than one who is short, but for what does not divide.
        assert max(shares.values()) <= min(shares[member] for member in short) + 1


def test_an_idle_member_gives_room_back_when_others_need_it() -> None:
    book = GrantBook(1, "c", CAPACITY, RESERVE)
    greedy, idle = Allowance(1), Allowance(2)

    def exchange() -> None:
        for allowance in (greedy, idle):
            epoch, counter, limit = allowance.acknowledgement()
            wanted = allowance.wanted_bytes()
            book.observe(
                allowance.member, allowance.published_bytes,
                Beat("", 0, "open", wanted, grant_epoch=epoch, grant_counter=counter, limit_bytes=limit),
            )  # fmt: skip
        grants = book.plan(greedy.published_bytes + idle.published_bytes)
        if grants is not None:
            greedy.apply(grants)
            idle.apply(grants)

    idle.take(700)
    exchange()
    assert idle.limit_bytes == 700 and greedy.limit_bytes == 0
    for _ in range(5):
        greedy.take(800)
        exchange()
    assert greedy.limit_bytes >= 800 and idle.limit_bytes <= 100
    assert book.outstanding_bytes <= CAPACITY - RESERVE


def test_a_lowered_limit_does_not_undo_what_is_taken() -> None:
    allowance = Allowance(7)
    allowance.apply(Grants(1, "c", 1, members={7: Grant(100)}))
    assert allowance.take(60) and not allowance.take(50)
    assert allowance.apply(Grants(1, "c", 2, members={7: Grant(10)})) is Standing.CHANGED
    assert allowance.acknowledgement() == (1, 2, 60)
    allowance.publish(60, 55)
    assert not allowance.take(1) and allowance.published_bytes == 55
    assert allowance.acknowledgement() == (1, 2, 55)


def test_old_grants_are_not_taken_for_news() -> None:
    allowance = Allowance(7)
    allowance.apply(Grants(2, "c", 5, members={7: Grant(100)}))
    assert allowance.apply(Grants(2, "c", 5, members={7: Grant(900)})) is Standing.SAME
    assert allowance.apply(Grants(1, "b", 9, members={})) is Standing.SAME
    assert not allowance.expelled and allowance.limit_bytes == 100


def test_whoever_was_listed_and_is_no_more_is_expelled() -> None:
    allowance = Allowance(7)
    assert allowance.apply(Grants(1, "c", 1, members={8: Grant(5)})) is Standing.SAME
    allowance.apply(Grants(1, "c", 2, members={7: Grant(100)}))
    assert allowance.apply(Grants(1, "c", 3, members={8: Grant(5)})) is Standing.EXPELLED
    assert allowance.expelled


def test_grants_of_an_epoch_that_ended_while_they_were_read_are_not_believed() -> None:
    medium, allowance = DictMedium(), Allowance(7)
    assert read_grants(medium, allowance) is Standing.SAME
    medium.create(epoch_name(1), b"")
    medium.replace(grants_name(1), Grants(1, "c", 1, members={7: Grant(100)}).encode())

    def end(calls: int) -> None:
        if calls == begun + 3:
            medium.files[epoch_name(2)] = b""

    begun, medium.before = medium.calls, end
    assert read_grants(medium, allowance) is Standing.SAME
    assert allowance.limit_bytes == 0
    medium.replace(grants_name(2), b"{}")
    assert read_grants(medium, allowance) is Standing.SAME
    medium.replace(grants_name(2), Grants(2, "d", 1, members={7: Grant(30)}).encode())
    assert read_grants(medium, allowance) is Standing.CHANGED
    assert allowance.limit_bytes == 30


def test_a_plan_that_says_nothing_new_is_not_written() -> None:
    book = GrantBook(1, "c", CAPACITY, RESERVE, FLOOR)
    book.observe(1, 0, None)
    assert book.plan(0) is not None
    assert book.plan(0) is None
    book.unwritten()
    assert book.plan(0) is not None


@dataclass
class Writer:
    """A member as it really is. sizes: of all that it ever published; gone: places of those removed."""

    allowance: Allowance
    sizes: list[int] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    parts: list[int] = field(default_factory=list)
    beat: Beat | None = None
    alive: bool = True

    def lying(self, seen: int | None = None) -> int:
        """Bytes of the first `seen` extents that are there."""
        return sum(size for place, size in enumerate(self.sizes[:seen]) if place not in self.gone)


@dataclass
class Holder:
    """A collector. seen: how many extents of each member its catalog has. late: grants not written yet."""

    book: GrantBook
    seen: dict[int, int] = field(default_factory=dict)
    buried: set[int] = field(default_factory=set)
    late: Grants | None = None


SLOT = st.integers(0, 3)


class GrantsMachine(RuleBasedStateMachine):
    """Members write, die and read late; collectors follow each other, and stopped ones write once more."""

    @initialize()
    def begin(self) -> None:
        self.medium = DictMedium()
        self.writers: dict[int, Writer] = {}
        self.slots: list[int] = []
        for _ in range(4):
            self.join()
        self.holders: list[Holder] = []
        self.follow()

    def join(self) -> int:
        member = len(self.writers)
        self.writers[member] = Writer(Allowance(member))
        self.slots.append(member)
        return member

    # Members

    @rule(slot=SLOT, size=st.integers(1, 200))
    def write(self, slot: int, size: int) -> None:
        writer = self.writers[self.slots[slot]]
        if writer.alive and writer.allowance.take(size):
            writer.parts.append(size)

    @rule(slot=SLOT, slack=st.integers(0, 5))
    def publish(self, slot: int, slack: int) -> None:
        writer = self.writers[self.slots[slot]]
        if writer.alive and writer.parts:
            taken = writer.parts.pop(0)
            size = max(1, taken - slack)
            writer.allowance.publish(taken, size)
            writer.sizes.append(size)

    @rule(slot=SLOT)
    def give_up(self, slot: int) -> None:
        writer = self.writers[self.slots[slot]]
        if writer.alive and writer.parts:
            writer.allowance.refund(writer.parts.pop())

    @rule(slot=SLOT)
    def beat(self, slot: int) -> None:
        writer = self.writers[self.slots[slot]]
        if writer.alive:
            epoch, counter, limit = writer.allowance.acknowledgement()
            wanted = writer.allowance.wanted_bytes()
            writer.beat = Beat(
                "", 0, "open", wanted, grant_epoch=epoch, grant_counter=counter, limit_bytes=limit
            )

    @rule(slot=SLOT, meanwhile=st.sampled_from(["nothing", "follow", "late"]))
    def read(self, slot: int, meanwhile: str) -> None:
        """Something may come between its two looks at the epochs."""
        writer, begun = self.writers[self.slots[slot]], self.medium.calls

        def between(calls: int) -> None:
            if calls == begun + 2:  # before the file is fetched
                self.medium.before = lambda calls: None
                if meanwhile != "nothing":
                    self.follow()
                if meanwhile == "late":
                    self.write_late(len(self.holders) - 2)

        self.medium.before = between
        if writer.alive:
            read_grants(self.medium, writer.allowance)
        self.medium.before = lambda calls: None

    @rule(greedy=SLOT, deaf=SLOT, mute=SLOT, size=st.sampled_from([100, 300, 800]), eager=st.booleans())
    def routine(self, greedy: int, deaf: int, mute: int, size: int, eager: bool) -> None:
        """What members do all the time, but that one does not read and one does not beat."""
        awake = range(4)
        self.write(greedy, size)
        for slot in awake:
            if slot != mute:
                self.beat(slot)
        self.collect(False, greedy)
        for slot in awake:
            if slot != deaf:
                self.read(slot, "nothing")
        for _ in range(size // 50 if eager else 0):
            self.write(greedy, 50)
            self.write(deaf, 50)

    @rule(slot=SLOT)
    def finish(self, slot: int) -> None:
        """All its parts are published."""
        while self.writers[self.slots[slot]].alive and self.writers[self.slots[slot]].parts:
            self.publish(slot, 0)

    @rule(slot=SLOT)
    def die(self, slot: int) -> None:
        self.writers[self.slots[slot]].alive = False

    # Collectors

    @rule()
    def follow(self) -> None:
        """The next collector: what the one before may have promised, it finds in the grants."""
        epoch = len(self.holders) + 1
        self.medium.create(epoch_name(epoch), b"")
        last = max((n for n in range(1, epoch) if grants_name(n) in self.medium.files), default=0)
        carried = Grants.decode(self.medium.files[grants_name(last)]) if last else None
        holder = Holder(GrantBook(epoch, "c", CAPACITY, RESERVE, FLOOR, carried))
        if self.holders:
            holder.seen, holder.buried = dict(self.holders[-1].seen), set(self.holders[-1].buried)
        self.holders.append(holder)

    @rule(late=st.booleans(), slot=SLOT)
    def collect(self, late: bool, slot: int) -> None:
        """Look at one member anew, then plan; the grants may be written much later, or never."""
        holder = self.holders[-1]
        if self.slots[slot] not in holder.buried:
            holder.seen[self.slots[slot]] = len(self.writers[self.slots[slot]].sizes)
        for member in self.slots:
            if member not in holder.buried:
                writer = self.writers[member]
                holder.book.observe(member, sum(writer.sizes[: holder.seen.get(member, 0)]), writer.beat)
        used = self.used(holder)
        grants = holder.book.plan(used)
        assert holder.book.free_bytes(used) >= 0
        if grants is not None:
            holder.late = grants
            if not late:
                self.write_late(len(self.holders) - 1)

    def used(self, holder: Holder) -> int:
        return sum(writer.lying(holder.seen.get(member, 0)) for member, writer in self.writers.items())

    @rule(back=st.integers(0, 3))
    def write_late(self, back: int) -> None:
        """A collector, perhaps one that was stopped, writes what it had planned."""
        holder = self.holders[max(0, len(self.holders) - 1 - back)]
        if holder.late is not None:
            self.medium.replace(grants_name(holder.late.epoch), holder.late.encode())
            holder.late = None

    @rule(most=st.sampled_from([1, 3, 100]))
    def drop(self, most: int) -> None:
        """Of each member the oldest extents that the collector knows go."""
        for member, writer in self.writers.items():
            seen = self.holders[-1].seen.get(member, 0)
            there = [place for place in range(seen) if place not in writer.gone]
            writer.gone.update(there[:most])

    @rule(slot=SLOT)
    def bury(self, slot: int) -> None:
        member = self.slots[slot]
        if not self.writers[member].alive and member not in self.holders[-1].buried:
            self.holders[-1].buried.add(member)
            self.holders[-1].book.expel(member)

    @precondition(lambda self: self.holders[-1].buried)
    @rule()
    def audit(self) -> None:
        """What the dead left is found; somebody else comes in their place."""
        holder = self.holders[-1]
        for member in holder.buried:
            self.writers[member].parts.clear()
            holder.seen[member] = len(self.writers[member].sizes)
            holder.book.expel(member)  # if an earlier collector buried it
            if member in self.slots:
                self.join()
                self.slots[self.slots.index(member)] = self.slots.pop()
        holder.book.forgive()

    @invariant()
    def the_promise_is_kept(self) -> None:
        writers = self.writers.values()
        lying = sum(writer.lying() + sum(writer.parts) for writer in writers)
        assert lying + RESERVE <= CAPACITY


GrantsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestGrants = GrantsMachine.TestCase


@pytest.mark.parametrize("debt", [0, 50])
def test_a_new_collector_carries_over_what_it_finds(debt: int) -> None:
    carried = Grants(3, "old", 9, debt_bytes=debt, members={1: Grant(300, 100, 400), 2: Grant(50, 50, 50)})
    book = GrantBook(4, "new", CAPACITY, RESERVE, 0, carried)
    assert book.outstanding_bytes == 300 and book.debt_bytes == debt
    # What it says of an older epoch does not lower what it may believe in.
    book.observe(1, 100, Beat("", 0, grant_epoch=3, grant_counter=9, limit_bytes=300))
    assert book.outstanding_bytes == 300
    book.expel(1)
    assert book.outstanding_bytes == 0 and book.debt_bytes == debt + 300
    book.forgive()
    assert book.free_bytes(150) == CAPACITY - RESERVE - 150
