"""Upkeep: one thread, jobs in order, and an end that never hangs."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator

import pytest

from kvstrata.transfer.upkeep import Upkeep
from store_kit import eventually

LONG_SECONDS = 60.0


class Gate:
    """A job that says when it runs and stays until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(LONG_SECONDS)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_jobs_run_one_after_another() -> None:
    upkeep = Upkeep("order")
    done: list[int] = []
    for number in range(50):
        upkeep.submit(lambda n=number: done.append(n))
    assert upkeep.close(LONG_SECONDS)
    assert done == list(range(50))
    assert not threads("order")
    assert upkeep.close(LONG_SECONDS)


def test_drain_waits_for_what_jobs_submit() -> None:
    upkeep = Upkeep("drain")
    seen: list[int] = []

    def chain(left: int) -> None:
        seen.append(left)
        if left:
            upkeep.submit(lambda: chain(left - 1))

    upkeep.submit(lambda: chain(20))
    assert upkeep.drain(LONG_SECONDS)
    assert seen == list(range(20, -1, -1))
    assert upkeep.close(LONG_SECONDS)


def test_drain_gives_up(gate: Gate) -> None:
    upkeep = Upkeep("give-up")
    upkeep.submit(gate)
    assert gate.entered.wait(LONG_SECONDS)
    assert not upkeep.drain(0.01)
    gate.opened.set()
    assert upkeep.drain(LONG_SECONDS)
    assert upkeep.drain(0)
    assert upkeep.close(LONG_SECONDS)


def test_close_leaves_a_hanging_job_behind(gate: Gate) -> None:
    upkeep = Upkeep("hanging")
    ran: list[str] = []
    upkeep.submit(gate)
    upkeep.submit(lambda: ran.append("behind"))
    assert gate.entered.wait(LONG_SECONDS)
    assert not upkeep.close(0.02)
    gate.opened.set()
    eventually(lambda: not threads("hanging"), "the thread does not end")
    assert ran == []


def test_nothing_is_taken_after_close() -> None:
    upkeep = Upkeep("after")
    assert upkeep.close(LONG_SECONDS)
    upkeep.submit(lambda: pytest.fail("ran after close"))
    assert upkeep.drain(0)


def test_a_job_may_close_it() -> None:
    upkeep = Upkeep("own")
    answers: list[bool] = []
    upkeep.submit(lambda: answers.append(upkeep.close(LONG_SECONDS)))
    eventually(lambda: not threads("own"), "the thread does not end")
    assert answers == [True]
    assert upkeep.close(LONG_SECONDS)


def test_a_job_that_raises_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    upkeep = Upkeep("bug")
    done: list[bool] = []

    def fail() -> None:
        raise ValueError("a bug")

    with caplog.at_level(logging.ERROR):
        for job in (fail, fail, lambda: done.append(True)):
            upkeep.submit(job)
        assert upkeep.close(LONG_SECONDS)
    assert done == [True]
    assert [record.exc_info and str(record.exc_info[1]) for record in caplog.records] == ["a bug"] * 2


def test_an_idle_thread_holds_no_job() -> None:
    """A job holds the caller's buffers."""

    class Buffer(bytearray):
        pass

    upkeep = Upkeep("holds")
    buffer, gone = Buffer(10), threading.Event()
    weakref.finalize(buffer, gone.set)
    upkeep.submit(lambda held=buffer: held.clear())
    del buffer
    assert gone.wait(LONG_SECONDS / 10)
    assert upkeep.close(LONG_SECONDS)
