"""Transfer: verdicts, deadlines and the release of buffers. Deadlines are far away or already past."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kvstrata.transfer.handle import Positions, Transfer
from kvstrata.transfer.plan import Direction
from kvstrata.types import Outcome

NEVER_SECONDS = 3_600.0


def at(*positions: int) -> Positions:
    return np.array(positions, dtype=np.int64)


@dataclass
class Calls:
    late: list[list[int]] = field(default_factory=list)
    done: list[float] = field(default_factory=list)

    def on_late(self, positions: Sequence[int]) -> None:
        self.late.append(list(positions))


class Waiting:
    """A batch in an engine's queue, of which `begun` are running."""

    def __init__(self, *positions: int, help_does: Callable[[], None] = lambda: None) -> None:
        self.positions = list(positions)
        self.helped = 0
        self._help = help_does

    def cancel(self) -> Positions:
        taken, self.positions = self.positions, []
        return at(*taken)

    def help(self) -> None:
        self.helped += 1
        self._help()


def start(blocks: int, deadline_seconds: float = NEVER_SECONDS) -> tuple[Transfer, Calls]:
    calls = Calls()
    transfer = Transfer(
        Direction.LOAD, blocks, deadline_seconds, on_late=calls.on_late, on_done=calls.done.append
    )
    return transfer, calls


def pass_deadline(transfer: Transfer) -> None:
    """As if the time had come."""
    transfer._deadline = transfer._started


def test_every_block_gets_its_outcome() -> None:
    transfer, calls = start(4)
    assert not transfer.done and not transfer.released
    transfer.settle([1], Outcome.ABSENT)
    transfer.settle([], Outcome.REJECTED)
    transfer.hold(3)
    assert transfer.finish(at(3, 0), [Outcome.LOADED, Outcome.CORRUPT]).tolist() == [True, True]
    assert not transfer.done
    assert transfer.finish(at(2), [Outcome.LOADED]).tolist() == [True]
    assert transfer.done and transfer.released
    assert transfer.wait() and transfer.wait_released(0)
    assert transfer.outcomes == [Outcome.CORRUPT, Outcome.ABSENT, Outcome.LOADED, Outcome.LOADED]
    assert calls.late == []
    assert len(calls.done) == 1 and calls.done[0] >= 0


@pytest.mark.parametrize("outcome", list(Outcome))
def test_an_outcome_comes_back_as_it_was_given(outcome: Outcome) -> None:
    transfer, _ = start(2)
    transfer.hold(1)
    transfer.finish(at(1), [outcome])
    transfer.settle(at(0), outcome)
    assert transfer.outcomes == [outcome, outcome]


def test_outcomes_are_not_there_before_the_end() -> None:
    transfer, _ = start(2)
    transfer.settle([0], Outcome.SAVED)
    assert not transfer.wait(0)
    with pytest.raises(AssertionError, match="before the transfer was done"):
        _ = transfer.outcomes


def test_no_blocks_are_done_at_once() -> None:
    transfer, calls = start(0)
    assert transfer.wait() and transfer.released
    assert transfer.outcomes == []
    assert len(calls.done) == 1


def test_the_deadline_is_of_the_monotonic_clock() -> None:
    transfer, _ = start(1, deadline_seconds=10.0)
    assert transfer.deadline_ns == int((transfer._started + 10.0) * 1e9)


def test_what_was_not_begun_is_late_and_taken_back_at_the_deadline() -> None:
    transfer, calls = start(3, deadline_seconds=0)
    batch, taken = Waiting(0, 1, 2), []
    transfer.hold(3)
    transfer.attach(batch, lambda positions: taken.extend(positions.tolist()))
    assert transfer.poll() and transfer.poll() and transfer.done
    assert transfer.outcomes == [Outcome.LATE] * 3
    assert transfer.released
    assert (taken, calls.late) == ([0, 1, 2], [[0, 1, 2]])
    assert len(calls.done) == 1


def test_every_batch_is_taken_back_once() -> None:
    transfer, _ = start(4)
    taken: list[int] = []
    transfer.hold(4)
    for positions in ((0, 1), (), (3,)):
        transfer.attach(Waiting(*positions), lambda back: taken.extend(back.tolist()))
    pass_deadline(transfer)
    assert transfer.poll()
    assert taken == [0, 1, 3]
    assert not transfer.released, "one is in the medium"
    assert transfer.finish(at(2), [Outcome.LOADED]).tolist() == [False]
    assert transfer.released


def test_a_batch_that_comes_after_the_deadline_is_taken_back_too() -> None:
    transfer, calls = start(2)
    transfer.hold(2)
    pass_deadline(transfer)
    assert transfer.poll() and not transfer.released
    taken: list[int] = []
    transfer.attach(Waiting(0, 1), lambda back: taken.extend(back.tolist()))
    assert taken == [0, 1] and transfer.released
    assert calls.late == [[0, 1]]


def test_finished_blocks_keep_their_outcome_at_the_deadline() -> None:
    transfer, calls = start(3)
    transfer.hold(1)
    transfer.finish(at(1), [Outcome.LOADED])
    pass_deadline(transfer)
    assert transfer.poll()
    assert transfer.outcomes == [Outcome.LATE, Outcome.LOADED, Outcome.LATE]
    assert calls.late == [[0, 2]]


def test_a_late_block_is_released_only_when_the_engine_is_through() -> None:
    transfer, calls = start(2)
    transfer.hold(2)
    pass_deadline(transfer)
    assert transfer.poll()
    assert transfer.outcomes == [Outcome.LATE] * 2
    assert not transfer.released
    assert not transfer.wait_released(0)
    transfer.let_go(1)
    assert not transfer.released
    assert transfer.finish(at(0), [Outcome.LOADED]).tolist() == [False]
    assert transfer.released and transfer.wait_released(0)
    assert transfer.outcomes == [Outcome.LATE] * 2
    assert (calls.late, len(calls.done)) == ([[0, 1]], 1)


def test_poll_helps_while_something_is_open() -> None:
    transfer, _ = start(1)
    transfer.hold(1)
    batch = Waiting(0, help_does=lambda: transfer.finish(at(0), [Outcome.LOADED]))
    transfer.attach(batch, lambda positions: pytest.fail("nothing is late"))
    assert transfer.poll()
    assert batch.helped == 1
    assert transfer.poll() and batch.helped == 1
    assert transfer.outcomes == [Outcome.LOADED]


def test_help_comes_before_the_verdict() -> None:
    """What is done in time but not taken in yet is not late."""
    transfer, calls = start(1, deadline_seconds=0)
    transfer.hold(1)
    batch = Waiting(help_does=lambda: transfer.finish(at(0), [Outcome.LOADED]))
    transfer.attach(batch, lambda positions: pytest.fail("nothing is late"))
    assert transfer.poll()
    assert transfer.outcomes == [Outcome.LOADED]
    assert calls.late == []


def test_the_deadline_leaves_claimed_blocks_alone() -> None:
    transfer, calls = start(3)
    transfer.hold(2)
    assert transfer.claim(at(0, 2)).tolist() == [True, True]
    pass_deadline(transfer)
    assert not transfer.poll()
    assert calls.late == [[1]]
    assert not transfer.wait()  # the deadline has passed, so it does not wait for the claimed ones
    assert transfer.finish(at(0), [Outcome.SAVED]).tolist() == [True]
    transfer.unclaim(at(2))
    assert transfer.poll() and not transfer.released
    assert transfer.finish(at(2), [Outcome.SAVED]).tolist() == [False]
    assert transfer.released
    assert transfer.outcomes == [Outcome.SAVED, Outcome.LATE, Outcome.LATE]
    assert (calls.late, len(calls.done)) == ([[1], [2]], 1)


def test_late_blocks_cannot_be_claimed() -> None:
    transfer, _ = start(3)
    transfer.hold(3)
    assert transfer.claim(at(1)).tolist() == [True]
    pass_deadline(transfer)
    transfer.poll()
    assert transfer.claim(at(0, 1, 2)).tolist() == [False, True, False]
    stands = transfer.finish(at(2, 1, 0), [Outcome.SAVED] * 3)
    assert stands.tolist() == [False, True, False]


def test_settling_again_changes_nothing() -> None:
    transfer, calls = start(1)
    transfer.settle([0], Outcome.PRESENT)
    transfer.settle([0], Outcome.REJECTED)
    assert transfer.outcomes == [Outcome.PRESENT]
    assert len(calls.done) == 1


def test_callbacks_may_call_the_transfer() -> None:
    """They run outside its lock."""
    seen: list[object] = []
    transfer = Transfer(
        Direction.STORE,
        1,
        0.0,
        on_late=lambda positions: seen.append(transfer.released),
        on_done=lambda seconds: seen.append(transfer.outcomes),
    )
    assert transfer.poll()
    assert seen == [True, [Outcome.LATE]]


class Buffer:
    pass


@pytest.mark.parametrize("attached", ["before the end", "after the end"])
def test_a_transfer_that_is_over_holds_no_batch(attached: str) -> None:
    """A batch holds the caller's buffers, and the engine may be done before it is attached."""
    gc.disable()
    try:
        transfer, _ = start(2)
        transfer.hold(2)
        batch = Waiting()
        batch.buffer = Buffer()  # type: ignore[attr-defined]
        gone = weakref.ref(batch.buffer)  # type: ignore[attr-defined]
        if attached == "before the end":
            transfer.attach(batch, lambda positions: None)
        transfer.finish(at(0), [Outcome.LOADED])
        transfer.finish(at(1), [Outcome.LOADED])
        if attached == "after the end":
            transfer.attach(batch, lambda positions: None)
        del batch
        assert gone() is None
    finally:
        gc.enable()


def test_a_late_transfer_holds_its_batches_until_it_is_released() -> None:
    transfer, _ = start(1)
    transfer.hold(1)
    batch = Waiting()
    gone = weakref.ref(batch)
    transfer.attach(batch, lambda positions: None)
    del batch
    pass_deadline(transfer)
    assert transfer.poll() and gone() is not None
    transfer.let_go(1)
    assert gone() is None


def test_a_waiter_wakes_with_the_last_block() -> None:
    transfer, _ = start(2)
    answers: list[bool] = []
    waiters = [
        threading.Thread(target=lambda: answers.append(transfer.wait(60))),
        threading.Thread(target=lambda: answers.append(transfer.wait() and transfer.wait_released(60))),
    ]
    for thread in waiters:
        thread.start()
    transfer.hold(2)
    for position in range(2):
        transfer.finish(at(position), [Outcome.LOADED])
    for thread in waiters:
        thread.join(60)
    assert answers == [True, True]


def test_a_waiter_wakes_at_the_deadline() -> None:
    transfer, calls = start(1, deadline_seconds=0.02)
    transfer.hold(1)
    assert transfer.wait()
    assert transfer.outcomes == [Outcome.LATE]
    assert not transfer.released
    assert calls.late == [[0]]


@pytest.mark.parametrize("cut_off", [False, True])
def test_many_workers_and_pollers(cut_off: bool) -> None:
    blocks, workers, each = 400, 8, 5
    transfer, calls = start(blocks)
    stood: list[int] = []
    lock = threading.Lock()
    transfer.hold(blocks)

    def work(me: int) -> None:
        for first in range(me * each, blocks, workers * each):
            positions = np.arange(first, first + each)
            if cut_off and first > blocks // 2:
                pass_deadline(transfer)
            if first % 3 == 0:
                mine = transfer.claim(positions)
                transfer.let_go(int((~mine).sum()))
                positions = positions[mine]
            if first % 2 == 0:
                transfer.poll()
            stands = transfer.finish(positions, [Outcome.LOADED] * len(positions))
            with lock:
                stood.extend(positions[stands].tolist())
            transfer.poll()

    threads = [threading.Thread(target=work, args=(me,)) for me in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert transfer.poll() and transfer.released
    loaded = [n for n, outcome in enumerate(transfer.outcomes) if outcome is Outcome.LOADED]
    late = [n for n, outcome in enumerate(transfer.outcomes) if outcome is Outcome.LATE]
    assert loaded == sorted(stood)
    assert sorted(loaded + late) == list(range(blocks))
    assert bool(late) == cut_off
    assert sorted(position for part in calls.late for position in part) == late
    assert len(calls.done) == 1


# Alarms


def test_an_alarm_rings_once_for_who_polls_or_waits() -> None:
    for ask in (lambda t: t.poll(), lambda t: t.wait(0.2)):
        transfer = Transfer(Direction.LOAD, 2, 60.0)
        transfer.hold(2)
        rang: list[int] = []
        transfer.after(0.01, lambda rang=rang: rang.append(1))  # type: ignore[misc]
        transfer.after(100.0, lambda rang=rang: rang.append(2))  # type: ignore[misc]
        until = time.monotonic() + 30
        while not rang and time.monotonic() < until:
            ask(transfer)
        ask(transfer)
        assert rang == [1]


def test_no_alarm_when_all_is_known_or_behind_the_deadline() -> None:
    transfer = Transfer(Direction.LOAD, 1, 60.0)
    transfer.hold(1)
    transfer.after(0.0, lambda: pytest.fail("nobody needed it"))
    transfer.finish(np.array([0]), [Outcome.LOADED])
    assert transfer.poll() and transfer.wait()
    late = Transfer(Direction.LOAD, 1, 0.01)
    late.after(0.02, lambda: pytest.fail("the deadline came first"))
    while not late.poll():
        time.sleep(0.001)
    time.sleep(0.02)
    assert late.poll() and late.outcomes == [Outcome.LATE]


def test_waiting_does_not_hang_in_a_batch_that_an_alarm_has_left() -> None:
    """What hangs was given up when the alarm rang; what comes from elsewhere ends the wait."""

    class Hanging:
        def cancel(self) -> Any:
            return np.zeros(0, np.int64)

        def help(self) -> None:
            pass

        def wait(self, until: float) -> None:
            time.sleep(max(0.0, until - time.monotonic()))

    transfer = Transfer(Direction.LOAD, 1, 600.0)
    transfer.hold(1)
    transfer.attach(Hanging(), lambda positions: None)

    def elsewhere() -> None:
        threading.Timer(0.05, lambda: transfer.finish(np.array([0]), [Outcome.LOADED])).start()

    transfer.after(0.05, elsewhere)
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(transfer.wait()), daemon=True)
    thread.start()
    thread.join(30)
    assert done == [True] and transfer.released
