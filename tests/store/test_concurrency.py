"""Eight threads of everything at once, with eviction under load: no deadlock, no leak, no wrong byte."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.store import BlockStore
from kvstrata.types import BlockLayout, Outcome
from store_kit import (
    NAMESPACE,
    bytes_on_medium,
    chain,
    check_bytes,
    check_quiet,
    content,
    contents,
    descriptors,
    eventually,
    finished,
    make_config,
    memory_tier,
    nvme_tier,
)

SOAK_SECONDS = float(os.environ.get("KVSTRATA_SOAK_SECONDS", "30"))
THREADS = 8
CAPACITY_BYTES = 4_000_000
CHAINS = 150
LAYOUT = BlockLayout(8192, 1)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """A deadlock ends the run with the stacks of all threads."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Soak:
    """Threads that use one store until the time is over; whatever one raises ends all."""

    def __init__(self, store: BlockStore, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.done: Counter[str] = Counter()
        self.most_bytes = 0
        self.most_memory = 0
        self._count = threading.Lock()

    def note(self, what: str) -> None:
        with self._count:
            self.done[what] += 1

    def guard(self, work: object, *arguments: object) -> None:
        try:
            while not self.stop.is_set():
                work(*arguments)  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            self.failures.append(error)
            self.stop.set()

    def step(self, rng: random.Random) -> None:
        """One call of an engine, with any timing against the others."""
        # Chains differ in length from call to call: prefixes are shared, tails come and go.
        keys = chain(int(CHAINS * rng.random() ** 2), rng.randint(1, 12))
        kind = rng.random()
        if kind < 0.35:
            sources = [None if rng.random() < 0.1 else data for data in contents(keys)]
            transfer = self.store.save(keys, sources)
            if rng.random() < 0.7:
                finished(transfer)
            self.note("save")
        elif kind < 0.75:
            size = 8192
            targets = [bytearray(size) for _ in keys]
            match = self.store.lookup(keys)
            assert 0 <= match.blocks <= len(keys)
            take = match.blocks if rng.random() < 0.5 else len(keys)
            transfer = self.store.load(match, targets[:take])
            outcomes = finished(transfer)
            check_bytes(keys[:take], targets[:take], outcomes)
            for outcome in outcomes:
                self.note(outcome.value)
                assert outcome in (Outcome.LOADED, Outcome.ABSENT), outcome
        elif kind < 0.85:
            self.store.touch(keys, request=self.store.new_request())
            self.note("touch")
        elif kind < 0.92:
            with self.store.views(keys) as views:
                for key, view in zip(keys, views, strict=True):
                    assert view is None or view == content(key)
            self.note("view")
        elif kind < 0.97:
            self.store.discard(keys[rng.randrange(len(keys)) :])
            self.note("discard")
        else:
            assert self.store.flush(60.0) in (True, False)
            self.note("flush")

    def sample(self) -> None:
        self.most_bytes = max(self.most_bytes, bytes_on_medium(self.folder))
        nvme = self.store.tiers[1].used_bytes_on_medium()
        self.most_bytes = max(self.most_bytes, nvme)
        memory = self.store.tiers[0]
        self.most_memory = max(self.most_memory, memory.table.used_bytes)
        assert self.most_bytes <= CAPACITY_BYTES, "the bound was passed"
        assert self.most_memory <= memory.table.capacity_bytes
        self.note("sample")
        time.sleep(0.002)

    def inspect(self) -> None:
        self.store.check_integrity()
        self.store.status()
        assert self.store.queued["held_bytes"] >= 0
        self.note("integrity")
        time.sleep(0.05)

    def run(self, seconds: float) -> None:
        threads = [
            threading.Thread(target=self.guard, args=(self.step, random.Random(seed)), daemon=True)
            for seed in range(THREADS)
        ]
        threads += [
            threading.Thread(target=self.guard, args=(work,), daemon=True)
            for work in (self.sample, self.inspect)
        ]
        for thread in threads:
            thread.start()
        self.stop.wait(seconds)
        self.stop.set()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


def shared_files() -> set[Path]:
    """In shared memory, that this process has mapped: other tests have some of their own."""
    places = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return {Path(place) for place in places if place.startswith("/dev/shm/")}


@pytest.mark.slow
@pytest.mark.timeout(SOAK_SECONDS + 240)
def test_eight_threads_of_everything(tmp_path: Path) -> None:
    threads_before = set(threading.enumerate())
    files_before = descriptors()
    shared_before = shared_files()
    config = make_config(memory_tier(96), nvme_tier(tmp_path, CAPACITY_BYTES), io_deadline_seconds=120.0)
    with watchdog(SOAK_SECONDS + 200):
        store = BlockStore(config, LAYOUT, NAMESPACE)
        soak = Soak(store, tmp_path)
        soak.run(SOAK_SECONDS)
        check_quiet(store)
        counters = store.telemetry
        for tier in ("memory", "nvme"):
            assert counters.value("evictions_total", tier) > 0, f"nothing left {tier}: this was no load"
        assert counters.value("misses_total", "memory") == counters.value("misses_total", "nvme") == 0
        assert counters.value("io_errors_total") == 0
        assert counters.value("breaker_opened_total") == 0
        for what in (
            "save",
            "loaded",
            "absent",
            "touch",
            "view",
            "discard",
            "flush",
            "sample",
            "integrity",
        ):
            assert soak.done[what] > 0, what
        transfers = soak.done
        store.close()
    assert bytes_on_medium(tmp_path) <= CAPACITY_BYTES
    eventually(lambda: set(threading.enumerate()) <= threads_before, "threads are left")
    assert descriptors() == files_before, "descriptors are left"
    assert shared_files() <= shared_before, "files in shared memory are left"
    print(f"{SOAK_SECONDS:g} s: {dict(transfers)}, at most {soak.most_bytes} of {CAPACITY_BYTES} bytes")
    with BlockStore(config, LAYOUT, NAMESPACE) as store:
        for number in range(CHAINS):
            keys = chain(number, 12)
            targets = [bytearray(8192) for _ in keys]
            check_bytes(keys, targets, finished(store.load(store.lookup(keys), targets)))
        assert store.telemetry.value("misses_total", "nvme") == 0
        check_quiet(store)
