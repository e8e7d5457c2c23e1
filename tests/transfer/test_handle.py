"""Transfer: verdicts, deadlines and the release of buffers. Deadlines are far away or already past."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from kvstrata.transfer.handle import Start, Transfer
from kvstrata.transfer.plan import Direction
from kvstrata.types import Outcome

NEVER_SECONDS = 3_600.0


@dataclass
class Calls:
    late: list[list[int]] = field(default_factory=list)
    done: list[float] = field(default_factory=list)

    def on_late(self, positions: Sequence[int]) -> None:
        self.late.append(list(positions))


def start(blocks: int, deadline_seconds: float = NEVER_SECONDS) -> tuple[Transfer, Calls]:
    calls = Calls()
    transfer = Transfer(
        Direction.LOAD, blocks, deadline_seconds, on_late=calls.on_late, on_done=calls.done.append
    )
    return transfer, calls


def pass_deadline(transfer: Transfer) -> None:
    """As if the time had come."""
    transfer._deadline = transfer.started_monotonic


def test_every_block_gets_its_outcome() -> None:
    transfer, calls = start(3)
    assert not transfer.done and not transfer.released
    transfer.settle(1, Outcome.ABSENT)
    for position, outcome in ((2, Outcome.LOADED), (0, Outcome.CORRUPT)):
        assert transfer.begin() is Start.GO
        assert transfer.finish(position, outcome)
    assert transfer.done and transfer.released
    assert transfer.wait() and transfer.wait_released(0)
    assert transfer.outcomes == [Outcome.CORRUPT, Outcome.ABSENT, Outcome.LOADED]
    assert calls.late == []
    assert len(calls.done) == 1 and calls.done[0] >= 0


def test_outcomes_are_not_there_before_the_end() -> None:
    transfer, _ = start(2)
    transfer.settle(0, Outcome.SAVED)
    assert not transfer.wait(0)
    with pytest.raises(AssertionError, match="before the transfer was done"):
        _ = transfer.outcomes


def test_no_blocks_are_done_at_once() -> None:
    transfer, calls = start(0)
    assert transfer.wait() and transfer.released
    assert transfer.outcomes == []
    assert len(calls.done) == 1


def test_what_was_not_begun_is_late_at_the_deadline() -> None:
    transfer, calls = start(3, deadline_seconds=0)
    assert transfer.poll() and transfer.poll() and transfer.done
    assert transfer.outcomes == [Outcome.LATE] * 3
    assert transfer.released
    assert calls.late == [[0, 1, 2]]
    assert len(calls.done) == 1
    assert transfer.begin() is Start.CANCELLED
    assert transfer.released


def test_beginning_after_the_deadline_is_cancelled_without_a_poll() -> None:
    transfer, calls = start(1, deadline_seconds=0)
    assert transfer.begin() is Start.CANCELLED
    assert calls.late == [[0]]


def test_finished_blocks_keep_their_outcome_at_the_deadline() -> None:
    transfer, calls = start(3)
    transfer.begin()
    transfer.finish(1, Outcome.LOADED)
    pass_deadline(transfer)
    assert transfer.poll()
    assert transfer.outcomes == [Outcome.LATE, Outcome.LOADED, Outcome.LATE]
    assert calls.late == [[0, 2]]


def test_a_late_block_is_released_only_when_its_worker_is_through() -> None:
    transfer, calls = start(2)
    assert transfer.begin() is Start.GO
    pass_deadline(transfer)
    assert transfer.poll()
    assert transfer.outcomes == [Outcome.LATE] * 2
    assert not transfer.released
    assert not transfer.wait_released(0)
    assert transfer.late(0)
    assert not transfer.finish(0, Outcome.LOADED)
    assert transfer.released and transfer.wait_released(0)
    assert transfer.outcomes == [Outcome.LATE] * 2
    assert (calls.late, len(calls.done)) == ([[0, 1]], 1)


def test_late_gives_the_verdict_itself() -> None:
    transfer, calls = start(1)
    transfer.begin()
    assert not transfer.late(0)
    pass_deadline(transfer)
    assert transfer.late(0)
    assert calls.late == [[0]]


def test_the_deadline_leaves_a_claimed_block_alone() -> None:
    transfer, calls = start(2)
    transfer.begin()
    assert transfer.claim(0)
    pass_deadline(transfer)
    assert not transfer.poll()
    assert not transfer.late(0) and transfer.late(1)
    assert not transfer.wait()  # the deadline has passed, so it does not wait for the claimed one
    assert transfer.finish(0, Outcome.SAVED)
    assert transfer.poll() and transfer.released
    assert transfer.outcomes == [Outcome.SAVED, Outcome.LATE]
    assert (calls.late, len(calls.done)) == ([[1]], 1)


def test_a_late_block_cannot_be_claimed() -> None:
    transfer, _ = start(1)
    transfer.begin()
    pass_deadline(transfer)
    transfer.poll()
    assert not transfer.claim(0)
    assert not transfer.finish(0, Outcome.SAVED)


def test_settling_again_changes_nothing() -> None:
    transfer, calls = start(1)
    transfer.settle(0, Outcome.PRESENT)
    transfer.settle(0, Outcome.REJECTED)
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


def test_a_waiter_wakes_with_the_last_block() -> None:
    transfer, _ = start(2)
    answers: list[bool] = []
    waiters = [
        threading.Thread(target=lambda: answers.append(transfer.wait(60))),
        threading.Thread(target=lambda: answers.append(transfer.wait() and transfer.wait_released(60))),
    ]
    for thread in waiters:
        thread.start()
    for position in range(2):
        transfer.begin()
        transfer.finish(position, Outcome.LOADED)
    for thread in waiters:
        thread.join(60)
    assert answers == [True, True]


def test_a_waiter_wakes_at_the_deadline() -> None:
    transfer, calls = start(1, deadline_seconds=0.02)
    transfer.begin()
    assert transfer.wait()
    assert transfer.outcomes == [Outcome.LATE]
    assert not transfer.released
    assert calls.late == [[0]]


@pytest.mark.parametrize("cut_off", [False, True])
def test_many_workers_and_pollers(cut_off: bool) -> None:
    blocks, workers = 400, 8
    transfer, calls = start(blocks)
    stood: list[int] = []
    lock = threading.Lock()

    def work(me: int) -> None:
        for position in range(me, blocks, workers):
            if cut_off and position > blocks // 2:
                pass_deadline(transfer)
            if transfer.begin() is Start.CANCELLED:
                continue
            if position % 3 == 0 and not transfer.claim(position):
                transfer.finish(position, Outcome.LATE)
                continue
            if transfer.finish(position, Outcome.LOADED):
                with lock:
                    stood.append(position)
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
    assert calls.late == ([late] if cut_off else [])
    assert len(calls.done) == 1
