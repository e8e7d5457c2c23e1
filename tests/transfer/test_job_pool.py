"""JobPool: bounded threads for blocking calls, with the verbs of the I/O engine."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.job_pool import JobPool, JobPoolSettings
from store_kit import eventually

WAIT = 60.0


def rows_of(count: int, *, deadline_ns: int = k.NEVER_NS, first: int = 0) -> Rows:
    rows = np.zeros((count, k.COLUMNS), dtype=np.int64)
    rows[:, k.DEADLINE_NS] = deadline_ns
    rows[:, k.POSITION] = np.arange(first, first + count)
    rows[:, k.RESULT] = -1
    return rows


def good(rows: Rows, fetched: Any = None) -> None:
    rows[:, k.RESULT] = 0


class Heard:
    """What on_done was told: position -> result."""

    def __init__(self) -> None:
        self.results: dict[int, int] = {}
        self.calls = 0

    def __call__(self, rows: Rows) -> None:
        self.calls += 1
        for position, result in rows[:, [k.POSITION, k.RESULT]].tolist():
            assert position not in self.results, "a row was handed out twice"
            self.results[position] = result


class Gate:
    """Work that waits until it is let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside = threading.Semaphore(0)

    def __call__(self, rows: Rows, fetched: Any = None) -> None:
        self.inside.release()
        assert self.open.wait(WAIT)
        good(rows)


@pytest.fixture
def make() -> Iterator[Callable[..., JobPool]]:
    pools: list[JobPool] = []

    def pool(**settings: int) -> JobPool:
        pools.append(JobPool("test", JobPoolSettings(**settings)))
        return pools[-1]

    yield pool
    for one in pools:
        assert one.close(WAIT)


def test_every_row_is_done_once(make: Callable[..., JobPool]) -> None:
    pool, heard = make(threads=4, store_threads=2), Heard()

    def work(rows: Rows, fetched: Any) -> None:
        rows[:, k.RESULT] = 0
        rows[:, k.CHECKSUM] = rows[:, k.POSITION] * 3

    sums: dict[int, int] = {}

    def on_done(rows: Rows) -> None:
        heard(rows)
        sums.update(zip(rows[:, k.POSITION].tolist(), rows[:, k.CHECKSUM].tolist(), strict=True))
        assert (rows[:, k.BEGAN_NS] > 0).all()
        assert (rows[:, k.BEGAN_NS] <= rows[:, k.ENDED_NS]).all()

    units = [np.array([2, 0]), np.array([1]), np.array([4, 3, 5])]
    jobs = pool.submit(rows_of(6), work, on_done, loads=True, units=units)
    jobs.wait(time.monotonic() + WAIT)
    assert heard.results == dict.fromkeys(range(6), 0) and heard.calls == 3
    assert sums == {position: 3 * position for position in range(6)}
    assert pool.queued == (0, 0) and pool.counts.loads == 3 and pool.counts.stores == 0
    assert pool.counts.merged == 3


def test_an_empty_batch(make: Callable[..., JobPool]) -> None:
    jobs = make(threads=1).submit(rows_of(0), good, Heard(), loads=True)
    jobs.wait(time.monotonic() + WAIT)
    assert not len(jobs.cancel())


def test_errors_become_results(make: Callable[..., JobPool]) -> None:
    pool = make(threads=1, store_threads=1)

    def refused(rows: Rows, fetched: Any) -> None:
        raise PermissionError(errno.EACCES, "no")

    def nameless(rows: Rows, fetched: Any) -> None:
        raise OSError("no number")

    def broken(rows: Rows, fetched: Any) -> None:
        raise KeyError("a bug")

    for work, expected in ((refused, -errno.EACCES), (nameless, -errno.EIO), (broken, -errno.EIO)):
        heard = Heard()
        pool.submit(rows_of(2), work, heard, loads=False).wait(time.monotonic() + WAIT)
        assert heard.results == {0: expected, 1: expected}


def test_on_done_that_raises_does_not_end_the_thread(make: Callable[..., JobPool]) -> None:
    pool, heard = make(threads=1), Heard()

    def raises(rows: Rows) -> None:
        raise ValueError("a bug")

    pool.submit(rows_of(1), good, raises, loads=True)
    pool.submit(rows_of(1), good, heard, loads=True)
    assert pool.drain(WAIT)
    assert heard.results == {0: 0}


def test_loads_come_before_stores(make: Callable[..., JobPool]) -> None:
    pool, gate, order = make(threads=1, store_threads=1), Gate(), []
    pool.submit(rows_of(1), gate, Heard(), loads=False)
    assert gate.inside.acquire(timeout=WAIT)

    def note(rows: Rows, fetched: Any) -> None:
        order.append(int(rows[0, k.POSITION]))
        good(rows)

    pool.submit(rows_of(2), note, Heard(), loads=False, units=[np.array([0]), np.array([1])])
    pool.submit(rows_of(2, first=10), note, Heard(), loads=True, units=[np.array([0]), np.array([1])])
    assert pool.queued == (2, 2)
    gate.open.set()
    assert pool.drain(WAIT)
    assert order == [10, 11, 0, 1]


def test_stores_leave_threads_for_loads(make: Callable[..., JobPool]) -> None:
    pool, gate, heard = make(threads=3, store_threads=2), Gate(), Heard()
    units = [np.array([n]) for n in range(5)]
    stores = pool.submit(rows_of(5), gate, Heard(), loads=False, units=units)
    for _ in range(2):
        assert gate.inside.acquire(timeout=WAIT)
    pool.submit(rows_of(4), good, heard, loads=True, units=units[:4]).wait(time.monotonic() + WAIT)
    assert len(heard.results) == 4
    assert not gate.inside.acquire(timeout=0.05), "more stores than store_threads"
    assert stores.left == 5 and pool.queued == (0, 3)
    gate.open.set()


def test_what_nobody_began_can_be_cancelled(make: Callable[..., JobPool]) -> None:
    pool, gate, heard = make(threads=1), Gate(), Heard()
    units = [np.array([0, 1]), np.array([3]), np.array([2])]
    jobs = pool.submit(rows_of(4, first=5), gate, heard, loads=True, units=units)
    assert gate.inside.acquire(timeout=WAIT)
    assert sorted(jobs.cancel().tolist()) == [7, 8]
    assert not len(jobs.cancel())
    assert pool.queued == (0, 0)
    gate.open.set()
    jobs.wait(time.monotonic() + WAIT)
    assert pool.drain(WAIT) and heard.results == {5: 0, 6: 0}


def test_late_rows_are_not_begun(make: Callable[..., JobPool]) -> None:
    pool, gate, heard, touched = make(threads=1), Gate(), Heard(), []
    pool.submit(rows_of(1), gate, Heard(), loads=True)
    assert gate.inside.acquire(timeout=WAIT)
    rows = rows_of(3, deadline_ns=time.monotonic_ns())
    rows[1, k.DEADLINE_NS] = k.NEVER_NS

    def work(rows: Rows, fetched: Any) -> None:
        touched.extend(rows[:, k.POSITION].tolist())
        good(rows)

    pool.submit(rows, work, heard, loads=True)
    pool.submit(rows_of(2, deadline_ns=time.monotonic_ns(), first=7), work, heard, loads=True)
    gate.open.set()
    assert pool.drain(WAIT)
    assert touched == [1]
    assert heard.results == {0: k.LATE, 1: 0, 2: k.LATE, 7: k.LATE, 8: k.LATE}


def test_a_full_queue_refuses_at_once(make: Callable[..., JobPool]) -> None:
    pool, gate, heard = make(threads=1, capacity=4), Gate(), Heard()
    pool.submit(rows_of(3), gate, Heard(), loads=True)
    jobs = pool.submit(rows_of(2), good, heard, loads=True)
    assert heard.results == {0: k.LATE, 1: k.LATE} and not len(jobs.cancel())
    gate.open.set()
    assert pool.drain(WAIT)
    pool.submit(rows_of(4, first=9), good, heard, loads=True).wait(time.monotonic() + WAIT)
    assert [heard.results[position] for position in range(9, 13)] == [0] * 4


def test_the_oldest_call_and_forgiving_it(make: Callable[..., JobPool]) -> None:
    pool, gate = make(threads=2, store_threads=1), Gate()
    assert pool.oldest_seconds(loads=True) == 0.0
    pool.submit(rows_of(1), gate, Heard(), loads=True)
    assert gate.inside.acquire(timeout=WAIT)
    eventually(lambda: pool.oldest_seconds(loads=True) > 0.01, "time stands still")
    assert pool.oldest_seconds(loads=False) == 0.0
    pool.forgive()
    assert pool.oldest_seconds(loads=True) == 0.0
    pool.submit(rows_of(1), gate, Heard(), loads=False)
    assert gate.inside.acquire(timeout=WAIT)
    eventually(lambda: pool.oldest_seconds(loads=False) > 0.0, "a store is not watched")
    gate.open.set()
    assert pool.drain(WAIT)
    assert pool.oldest_seconds(loads=True) == pool.oldest_seconds(loads=False) == 0.0


def test_closing_behind_a_hang_and_after_it() -> None:
    pool, gate, heard = JobPool("test", JobPoolSettings(threads=1)), Gate(), Heard()
    pool.submit(rows_of(1), gate, Heard(), loads=True)
    assert gate.inside.acquire(timeout=WAIT)
    queued = pool.submit(rows_of(2, first=3), good, heard, loads=True)
    assert not pool.drain(0.01)
    assert not pool.close(0.01)
    assert pool.queued == (0, 0)
    assert queued.cancel().tolist() == [3, 4]
    after = pool.submit(rows_of(2), good, heard, loads=False)
    assert after.cancel().tolist() == [0, 1]
    gate.open.set()
    eventually(lambda: not any(t.is_alive() for t in pool.leave()), "a thread does not end")
    assert not heard.results


def test_what_was_fetched_goes_to_the_work(make: Callable[..., JobPool]) -> None:
    pool, heard, seen = make(threads=2), Heard(), []

    def fetch(rows: Rows) -> list[int]:
        return rows[:, k.POSITION].tolist()

    def work(rows: Rows, fetched: Any) -> None:
        seen.append((rows[:, k.POSITION].tolist(), fetched))
        good(rows)

    units = [np.array([0, 2]), np.array([1])]
    jobs = pool.submit(rows_of(3), work, heard, loads=True, units=units, fetch=fetch)
    jobs.wait(time.monotonic() + WAIT)
    assert sorted(seen) == [([0, 2], [0, 2]), ([1], [1])]
    assert heard.results == dict.fromkeys(range(3), 0)

    def fails(rows: Rows) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "no answer")

    heard = Heard()
    pool.submit(rows_of(1), work, heard, loads=True, fetch=fails).wait(time.monotonic() + WAIT)
    assert heard.results == {0: -errno.ETIMEDOUT} and len(seen) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_rows_that_are_being_fetched_are_taken_back(fails: bool) -> None:
    pool, gate, heard, touched = JobPool("test", JobPoolSettings(threads=1)), Gate(), Heard(), []

    def fetch(rows: Rows) -> None:
        gate(rows)
        if fails:
            raise ConnectionResetError(errno.ECONNRESET, "gone")

    def work(rows: Rows, fetched: Any) -> None:
        touched.append(rows)

    units = [np.array([0, 1]), np.array([2])]
    jobs = pool.submit(rows_of(3, first=4), work, heard, loads=True, units=units, fetch=fetch)
    assert gate.inside.acquire(timeout=WAIT)
    assert sorted(jobs.cancel().tolist()) == [4, 5, 6]
    assert not len(jobs.cancel()) and not jobs.left
    assert pool.drain(0.0), "nobody waits for what was taken back"
    eventually(lambda: pool.oldest_seconds(loads=True) > 0.0, "a fetch that hangs is not watched")
    gate.open.set()
    assert pool.close(WAIT)
    assert not touched and not heard.results


def test_a_second_target_is_given_up_while_rows_are_fetched(make: Callable[..., JobPool]) -> None:
    pool, gate, heard, targets = make(threads=1), Gate(), Heard(), {}

    def work(rows: Rows, fetched: Any) -> None:
        targets.update(zip(rows[:, k.POSITION].tolist(), rows[:, k.COPY_TO].tolist(), strict=True))
        good(rows)

    rows = rows_of(4)
    rows[:, k.COPY_TO] = [11, 12, 0, 14]
    units = [np.arange(3), np.array([3])]
    jobs = pool.submit(rows, work, heard, loads=True, units=units, fetch=gate)
    assert gate.inside.acquire(timeout=WAIT)
    assert jobs.abandon(np.array([1, 2, 3])).tolist() == [1]
    gate.open.set()
    assert pool.drain(WAIT)
    assert targets == {0: 11, 1: 0, 2: 0, 3: 14} and len(heard.results) == 4
    assert not len(jobs.abandon(np.arange(4)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.booleans()), max_size=25), st.integers(1, 4))
def test_every_row_ends_in_one_way(batches: list[tuple[bool, int, bool]], threads: int) -> None:
    pool = JobPool("test", JobPoolSettings(threads=threads, store_threads=1, capacity=40))
    heard = [Heard() for _ in batches]
    back: list[list[int]] = []
    for (loads, count, cancel), one in zip(batches, heard, strict=True):
        units = np.array_split(np.arange(count), 3)
        jobs = pool.submit(rows_of(count), good, one, loads=loads, units=[u for u in units if len(u)])
        back.append(jobs.cancel().tolist() if cancel else [])
    assert pool.drain(WAIT)
    assert pool.close(WAIT)
    for (_, count, _), one, cancelled in zip(batches, heard, back, strict=True):
        assert sorted([*one.results, *cancelled]) == list(range(count))
    assert pool.queued == (0, 0)


def test_a_process_ends_while_jobs_call_kernels() -> None:
    code = """
        import numpy as np
        from kvstrata.transfer import engine_kernels as k
        from kvstrata.transfer.job_pool import JobPool, JobPoolSettings
        from kvstrata.transfer.xxh3 import xxh3_64

        data = np.zeros(1 << 20, dtype=np.uint8)

        def work(rows, fetched):
            rows[:, k.RESULT] = 0
            for _ in range(20):
                xxh3_64(data.ctypes.data, len(data))

        pool = JobPool("test", JobPoolSettings(threads=4))
        rows = np.zeros((1, k.COLUMNS), dtype=np.int64)
        rows[:, k.DEADLINE_NS] = k.NEVER_NS
        for _ in range(2000):
            pool.submit(rows, work, lambda rows: None, loads=True)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
