"""The lease: one collector per epoch, whatever members and their clocks do."""

from __future__ import annotations

import contextlib
import errno
import math
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from folder_kit import Clock, DictMedium, World
from kvstrata.tiers.shared.format import beat_name, epoch_name, grants_name
from kvstrata.tiers.shared.lease import EPOCHS_KEPT, Lease, boot_seconds
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import Member
from kvstrata.tiers.shared.small_files import Beat, FolderSettings

LEASE = 10.0
MEMBERS = 3


class Time:
    now = 1000.0


class Contender:
    """A member with a clock of its own, and what it needs to contend."""

    def __init__(self, medium: DictMedium, time: Time, offset: float, speed: float) -> None:
        clock = Clock(cast(World, time), offset, speed)
        small = cast(Medium, medium)
        self.medium = medium
        self.member = Member(small, FolderSettings("f", 1, 1, LEASE), Beat("", 0), clock)
        self.member.join()
        self.lease = Lease(
            small,
            self.member.id,
            LEASE,
            beat_age=lambda: self.member.silent_seconds,
            silent=lambda other: 0.0 if self.member.alive(other) else math.inf,
            clock=clock,
        )
        self.stopped = False

    def look(self, others: list[Contender]) -> None:
        beats = {other.member.id: self.medium.files.get(beat_name(other.member.id)) for other in others}
        self.member.see(beats, {member: data for member, data in beats.items() if data is not None})


WHO = st.integers(0, MEMBERS - 1)


class LeaseMachine(RuleBasedStateMachine):
    """Members contend, act, stop and go on, at any call of the medium, with clocks of their own."""

    @initialize(
        offsets=st.lists(st.floats(-1e6, 1e6), min_size=MEMBERS, max_size=MEMBERS),
        speeds=st.lists(st.sampled_from([0.4, 0.8, 1.0, 1.5, 3.0]), min_size=MEMBERS, max_size=MEMBERS),
    )
    def begin(self, offsets: list[float], speeds: list[float]) -> None:
        self.medium, self.time = DictMedium(), Time()
        self.all = [
            Contender(self.medium, self.time, offset, speed)
            for offset, speed in zip(offsets, speeds, strict=True)
        ]
        for one in self.all:
            one.look(self.all)
        self.holders: dict[int, int] = {}
        self.settled = 0
        self.acted = 0

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0, 3.0, 12.0]))
    def wait(self, seconds: float) -> None:
        self.time.now += seconds

    @rule(who=WHO)
    def beat(self, who: int) -> None:
        self.all[who].member.beat()

    @rule(seconds=st.sampled_from([1.0, 4.0]), who=WHO)
    def live(self, seconds: float, who: int) -> None:
        """Everybody but one, who may be stopped, does what members do."""
        self.time.now += seconds
        for place, one in enumerate(self.all):
            if place != who:
                one.member.beat()
                one.look(self.all)

    @rule(who=WHO)
    def look(self, who: int) -> None:
        self.all[who].look(self.all)

    @rule(who=WHO)
    def contend(self, who: int) -> None:
        one = self.all[who]
        if one.lease.contend():
            assert self.holders.setdefault(one.lease.epoch, who) == who, "two collectors of one epoch"
            assert one.lease.epoch > 0

    @rule(stopped=WHO, other=WHO, more=st.sampled_from([0, 1, 60]))
    def follow(self, stopped: int, other: int, more: int) -> None:
        """One is stopped until another has taken over, and perhaps for some time more."""
        if stopped == other:
            return
        for _ in range(80):
            self.time.now += 0.5
            for place, one in enumerate(self.all):
                if place != stopped:
                    one.member.beat()
                    one.look(self.all)
            self.contend(other)
            self.act(other)
            if self.all[other].lease.epoch:
                more -= 1
            if more < 0:
                return

    @rule(who=WHO)
    def wake(self, who: int) -> None:
        """Somebody who was stopped goes on, wherever it was."""
        self.all[who].member.beat()
        self.act(who)

    @rule(
        who=WHO,
        other=WHO,
        call=st.integers(1, 4),
        seconds=st.sampled_from([0.0, 1.0, 30.0]),
        terms=st.sampled_from([1, 1, 7]),
    )
    def contend_while_another_does(
        self, who: int, other: int, call: int, seconds: float, terms: int
    ) -> None:
        """The member is stopped before one of its calls; meanwhile time passes and another contends."""
        begun = self.medium.calls

        def between(calls: int) -> None:
            if calls == begun + call:
                self.medium.before = lambda calls: None
                self.time.now += seconds
                self.all[other].member.beat()
                for term in range(terms if other != who else 0):
                    if term:
                        self.time.now += 20.0  # out of any quarantine
                        self.all[other].member.beat()
                        self.release(other)
                    self.contend(other)
                    self.act(other)
                    self.clean(other)

        self.medium.before = between
        self.contend(who)
        self.medium.before = lambda calls: None
        self.all[who].member.beat()
        self.act(who)
        self.act(other)

    @rule(who=WHO, call=st.integers(1, 4), after=st.booleans())
    def contend_with_an_error(self, who: int, call: int, after: bool) -> None:
        """One of its calls fails; an error may come after the call has had its effect."""
        begun = self.medium.calls

        def fail(calls: int) -> None:
            if calls == begun + call + after:
                self.medium.before = lambda calls: None
                raise OSError(errno.EIO, "once")

        self.medium.before = fail
        with contextlib.suppress(OSError):
            self.contend(who)
        self.medium.before = lambda calls: None

    @rule(who=WHO)
    def act(self, who: int) -> None:
        """One step that cannot be undone, right after the check."""
        lease = self.all[who].lease
        if lease.check():
            self.acted += 1
            assert self.holders[lease.epoch] == who
            assert lease.epoch >= self.settled, "a collector acts after the next one has settled"
            if lease.settled:
                self.settled = max(self.settled, lease.epoch)

    @rule(who=WHO)
    def release(self, who: int) -> None:
        self.all[who].lease.release()
        assert not self.all[who].lease.check()

    @rule(who=WHO)
    def clean(self, who: int) -> None:
        if self.all[who].lease.check():
            self.all[who].lease.clean()

    @invariant()
    def at_most_one_is_settled_and_current(self) -> None:
        if hasattr(self, "all"):
            current = [one for one in self.all if one.lease.check()]
            assert len({one.lease.epoch for one in current}) == len(current)


LeaseMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50)
TestLease = LeaseMachine.TestCase


@pytest.fixture
def pair() -> tuple[DictMedium, Time, Contender, Contender]:
    medium, time = DictMedium(), Time()
    return medium, time, Contender(medium, time, 0.0, 1.0), Contender(medium, time, -7e5, 1.3)


def live(time: Time, seconds: float, *contenders: Contender) -> None:
    for _ in range(int(seconds)):
        time.now += 1.0
        for one in contenders:
            one.member.beat()
            one.look(list(contenders))


def test_the_first_one_collects_at_once(pair: tuple[DictMedium, Time, Contender, Contender]) -> None:
    _, _, first, second = pair
    assert first.lease.contend() and first.lease.epoch == 1
    assert first.lease.check() and first.lease.settled
    second.look([first, second])
    assert not second.lease.contend() and not second.lease.check()


def test_a_silent_holder_is_followed_after_a_lease_and_a_quarantine(
    pair: tuple[DictMedium, Time, Contender, Contender],
) -> None:
    medium, time, first, second = pair
    assert first.lease.contend()
    live(time, 5, first, second)
    stopped = time.now
    while not second.lease.contend():
        time.now += 0.5
        second.member.beat()
        second.look([first, second])
    assert LEASE / 1.3 <= time.now - stopped <= LEASE
    assert second.lease.check() and not second.lease.settled
    assert not first.lease.check(), "its beat is too old"
    first.member.beat()
    assert not first.lease.check(), "there is a higher epoch"
    assert not first.lease.contend() and first.lease.epoch == 0
    time.now += LEASE / 2 / 1.3
    assert second.lease.settled
    assert second.lease.epoch == 2 and epoch_name(2) in medium.files


def test_a_holder_whose_beats_come_too_late_does_not_act(
    pair: tuple[DictMedium, Time, Contender, Contender],
) -> None:
    _, time, first, _ = pair
    assert first.lease.contend()
    time.now += LEASE / 2
    assert not first.lease.check() and not first.lease.contend()
    first.member.beat()
    assert first.lease.check() and first.lease.contend() and first.lease.epoch == 1


def test_released_on_purpose_is_taken_at_once(
    pair: tuple[DictMedium, Time, Contender, Contender],
) -> None:
    _, _, first, second = pair
    assert first.lease.contend()
    first.lease.release()
    second.look([first, second])
    assert second.lease.contend() and second.lease.epoch == 2 and second.lease.settled


def test_released_in_quarantine_is_followed_by_a_quarantine(
    pair: tuple[DictMedium, Time, Contender, Contender],
) -> None:
    _, time, first, second = pair
    third = Contender(pair[0], time, 0.0, 1.0)
    assert first.lease.contend()
    for _ in range(12):
        time.now += 1.0
        second.member.beat()
        third.member.beat()
        second.look([first, second, third])
    assert second.lease.contend() and not second.lease.settled
    second.lease.release()
    second.member.beat(state="closed")
    third.look([first, second, third])
    assert third.lease.contend() and third.lease.epoch == 3 and not third.lease.settled


def test_an_epoch_without_a_name_is_followed_after_a_lease(
    pair: tuple[DictMedium, Time, Contender, Contender],
) -> None:
    medium, time, first, _ = pair
    medium.files[epoch_name(4)] = b""
    assert not first.lease.contend()
    live(time, 9, first)
    assert not first.lease.contend()
    live(time, 2, first)
    assert first.lease.contend() and first.lease.epoch == 5 and not first.lease.settled


def test_whoever_overslept_steps_back(pair: tuple[DictMedium, Time, Contender, Contender]) -> None:
    """It makes an epoch whose file was cleaned away since: there is a higher one."""
    medium, _, first, second = pair
    begun = medium.calls

    def between(calls: int) -> None:
        if calls == begun + 2:
            medium.files[epoch_name(9)] = f"{second.member.id:016x}".encode()

    medium.before = between
    assert not first.lease.contend()
    assert epoch_name(1) in medium.files and first.lease.epoch == 0 and not first.lease.check()


def test_old_epochs_are_cleaned_away(pair: tuple[DictMedium, Time, Contender, Contender]) -> None:
    medium, _, first, _ = pair
    for _ in range(EPOCHS_KEPT + 3):
        assert first.lease.contend()
        medium.files[grants_name(first.lease.epoch)] = b"{}"
        first.lease.release()
    assert first.lease.contend()
    assert first.lease.clean() == 12
    highest = EPOCHS_KEPT + 4
    kept = {epoch_name(n) for n in range(highest - EPOCHS_KEPT + 1, highest + 1)}
    assert {name for name in medium.files if name.startswith("collector/epoch")} == kept


def test_the_clock_goes_on() -> None:
    assert boot_seconds() <= boot_seconds()
