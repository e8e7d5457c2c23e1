"""TransferExecutor: order, limits, and an end that never hangs."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator

import pytest

from kvstrata.transfer.executor import TransferExecutor
from kvstrata.transfer.plan import Direction

LONG_SECONDS = 60.0
LOAD, STORE = Direction.LOAD, Direction.STORE


class Gate:
    """A job that says when it runs and stays until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.release()
        assert self.opened.wait(LONG_SECONDS)

    def wait_entered(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=LONG_SECONDS)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def test_loads_run_before_stores(gate: Gate) -> None:
    executor = TransferExecutor(1, 1)
    order: list[str] = []
    executor.submit(STORE, [gate])
    gate.wait_entered()
    executor.submit(STORE, [lambda n=n: order.append(f"store {n}") for n in range(3)])
    executor.submit(LOAD, [lambda n=n: order.append(f"load {n}") for n in range(3)])
    assert executor.queued == (3, 3)
    gate.opened.set()
    assert executor.close(LONG_SECONDS)
    assert order == ["load 0", "load 1", "load 2", "store 0", "store 1", "store 2"]


def test_stores_leave_threads_for_loads(gate: Gate) -> None:
    executor = TransferExecutor(3, 2)
    executor.submit(STORE, [gate] * 5)
    gate.wait_entered(2)
    loaded = threading.Event()
    executor.submit(LOAD, [loaded.set])
    assert loaded.wait(LONG_SECONDS)
    assert not gate.entered.acquire(blocking=False), "a third store ran"
    assert executor.queued == (0, 3)
    gate.opened.set()
    gate.wait_entered(3)
    assert executor.close(LONG_SECONDS)


def test_loads_may_use_every_thread(gate: Gate) -> None:
    executor = TransferExecutor(3, 1)
    executor.submit(LOAD, [gate] * 3)
    gate.wait_entered(3)
    gate.opened.set()
    assert executor.close(LONG_SECONDS)


@pytest.mark.parametrize(("threads", "store_threads"), [(1, 1), (4, 1), (4, 2), (8, 8)])
def test_the_limit_of_stores_holds_under_load(threads: int, store_threads: int) -> None:
    executor = TransferExecutor(threads, store_threads)
    lock = threading.Lock()
    now = most = done = 0

    def store() -> None:
        nonlocal now, most, done
        with lock:
            now += 1
            most = max(most, now)
        with lock:
            now -= 1
            done += 1

    def load() -> None:
        nonlocal done
        with lock:
            done += 1

    for _ in range(100):
        executor.submit(STORE, [store] * 5)
        executor.submit(LOAD, [load] * 3)
    assert executor.drain(LONG_SECONDS)
    assert done == 800
    assert 1 <= most <= store_threads
    assert executor.queued == (0, 0)
    assert executor.close(LONG_SECONDS)


def test_drain_waits_for_what_jobs_submit() -> None:
    executor = TransferExecutor(2, 1)
    seen: list[int] = []

    def chain(left: int) -> None:
        seen.append(left)
        if left:
            executor.submit(STORE, [lambda: chain(left - 1)])

    executor.submit(LOAD, [lambda: chain(20)])
    assert executor.drain(LONG_SECONDS)
    assert seen == list(range(20, -1, -1))
    assert executor.close(LONG_SECONDS)


def test_drain_gives_up(gate: Gate) -> None:
    executor = TransferExecutor(1, 1)
    executor.submit(LOAD, [gate])
    gate.wait_entered()
    assert not executor.drain(0.01)
    gate.opened.set()
    assert executor.drain(LONG_SECONDS)
    assert executor.drain(0)
    assert executor.close(LONG_SECONDS)


def test_close_finishes_what_is_queued_and_ends_the_threads() -> None:
    executor = TransferExecutor(2, 1, name="closing")
    done: list[int] = []
    executor.submit(STORE, [lambda n=n: done.append(n) for n in range(50)])
    assert executor.close(LONG_SECONDS)
    assert done == list(range(50))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("closing")]
    assert executor.close(LONG_SECONDS)


def test_close_leaves_a_hanging_job_behind(gate: Gate) -> None:
    executor = TransferExecutor(2, 1, name="hanging")
    ran: list[str] = []
    executor.submit(STORE, [gate, lambda: ran.append("behind")])
    gate.wait_entered()
    assert not executor.close(0.02)
    assert executor.queued == (0, 0), "what would run after the close is dropped"
    gate.opened.set()
    for thread in threading.enumerate():
        if thread.name.startswith("hanging"):
            thread.join(LONG_SECONDS)
            assert not thread.is_alive()
    assert ran == []


def test_nothing_is_taken_after_close() -> None:
    executor = TransferExecutor(1, 1)
    executor.close(LONG_SECONDS)
    executor.submit(LOAD, [lambda: pytest.fail("ran after close")])
    assert executor.queued == (0, 0)


def test_a_job_that_raises_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    executor = TransferExecutor(1, 1)
    done: list[bool] = []

    def fail() -> None:
        raise ValueError("a bug")

    with caplog.at_level(logging.ERROR):
        executor.submit(STORE, [fail, fail, lambda: done.append(True)])
        assert executor.close(LONG_SECONDS)
    assert done == [True]
    assert [record.exc_info and str(record.exc_info[1]) for record in caplog.records] == ["a bug"] * 2


def test_an_idle_thread_holds_no_job() -> None:
    """A job holds the caller's buffers."""

    class Buffer(bytearray):
        pass

    executor = TransferExecutor(1, 1)
    buffer = Buffer(10)
    gone = threading.Event()
    weakref.finalize(buffer, gone.set)
    executor.submit(LOAD, [lambda held=buffer: held.clear()])
    del buffer
    assert gone.wait(LONG_SECONDS / 10)
    assert executor.close(LONG_SECONDS)
