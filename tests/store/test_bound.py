"""The bound on the disk is never passed: many writers, pins, hanging loads, eviction, tiny capacities."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from faulty_io import FaultyIO
from kvstrata.config import KIB, MIB
from kvstrata.errors import ConfigError
from kvstrata.store import BlockStore
from kvstrata.types import BlockLayout, Outcome
from store_kit import (
    WAIT_SECONDS,
    bytes_on_medium,
    chain,
    check_bytes,
    check_quiet,
    contents,
    finished,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    save,
)

WRITERS = 6
ROUNDS = 25


class Sampler:
    """Measures the folder over and over, from a thread of its own; remembers the most."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._stop = threading.Event()
        self.most = 0
        self.samples = 0

    def measure(self) -> None:
        self.most = max(self.most, bytes_on_medium(self._folder))
        self.samples += 1

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            self.measure()

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.measure()
        assert self.samples > 1
        assert self.most <= self._capacity_bytes, f"{self.most} bytes of {self._capacity_bytes}"


def write(store: BlockStore, seed: int, failures: list[BaseException]) -> None:
    """One writer: saves of any length, with loads and discards in between, and waits only now and then."""
    rng = random.Random(seed)
    size = store.layout.block_bytes
    try:
        for turn in range(ROUNDS):
            keys = chain(rng.randrange(10_000), rng.randint(1, 12))
            transfer = store.save(keys, contents(keys, size))
            kind = rng.random()
            if kind < 0.3:
                finished(transfer)
            elif kind < 0.6:
                targets = [bytearray(size) for _ in keys]
                check_bytes(keys, targets, finished(store.load(store.lookup(keys), targets)))
            elif kind < 0.7:
                store.discard(keys[1:])
            elif kind < 0.8:
                store.touch(keys)
            if turn % 10 == 0:
                store.check_integrity()
    except BaseException as error:  # noqa: BLE001 - raised in the main thread
        failures.append(error)


def write_together(store: BlockStore) -> None:
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=write, args=(store, seed, failures), daemon=True) for seed in range(WRITERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "a writer hangs"
    assert not failures, failures


@pytest.mark.parametrize("with_memory", [False, True], ids=["nvme", "memory+nvme"])
@pytest.mark.parametrize(
    ("capacity_bytes", "block_bytes"),
    [
        (176 * KIB, 1),
        (200 * KIB, 8192),
        (300 * KIB, 4096),
        (777_777, 8192),
        (MIB, 100_001),
        (2 * MIB, 5000),
        (5 * MIB, 65_536),
    ],
)
def test_many_writers(capacity_bytes: int, block_bytes: int, with_memory: bool, tmp_path: Path) -> None:
    layout = BlockLayout(block_bytes, 1)
    nvme = nvme_tier(tmp_path, capacity_bytes)
    tiers = (memory_tier(16, layout), nvme) if with_memory else (nvme,)
    for _ in range(2):
        sampling = Sampler(tmp_path, capacity_bytes).running()
        with sampling, open_store(*tiers, layout=layout) as store:
            write_together(store)
            check_quiet(store)
            status = store.status()[-1]
            assert status.blocks > 0
            assert status.used_bytes <= status.capacity_bytes <= capacity_bytes
            assert store.tiers[-1].used_bytes_on_medium() == bytes_on_medium(tmp_path)
            assert store.telemetry.value("evictions_total", "nvme") > 0 or block_bytes == 5000
            for tier in store.tiers:
                assert tier.table.used_bytes <= tier.table.capacity_bytes


def test_a_capacity_for_exactly_one_block(tmp_path: Path) -> None:
    """The smallest capacity that is accepted holds one block; a byte less is refused with the number."""
    layout = BlockLayout(8192, 1)
    low, high = 1, MIB
    while low < high:
        middle = (low + high) // 2
        try:
            open_store(nvme_tier(tmp_path / "cache", middle), layout=layout).close()
            high = middle
        except ConfigError as error:
            assert "raise it" in str(error)
            low = middle + 1
    with (
        Sampler(tmp_path / "cache", low).running(),
        open_store(nvme_tier(tmp_path / "cache", low), layout=layout) as store,
    ):
        assert store.tiers[0].table.slots == 1
        for number in range(10):
            assert save(store, chain(number, 1)) == [Outcome.SAVED]
            assert load(store, chain(number, 1)) == [Outcome.LOADED]
        assert save(store, chain(99, 3)).count(Outcome.SAVED) == 1
        check_quiet(store)


def test_views_hold_the_whole_of_memory(tmp_path: Path) -> None:
    """Memory is full of pins: saves go on to nvme, or are refused; nothing is overwritten or enlarged."""
    capacity = 700_000
    keys = chain(1, 16)
    with (
        Sampler(tmp_path, capacity).running(),
        open_store(memory_tier(16), nvme_tier(tmp_path, capacity)) as store,
    ):
        save(store, keys)
        store.flush()
        held = store.tiers[0].used_bytes_on_medium()
        with ExitStack() as stack:
            views = stack.enter_context(store.views(keys))
            again = stack.enter_context(store.views(keys[:3]))
            assert None not in views
            write_together(store)
            assert store.flush()
            assert [bytes(view or b"") for view in views] == contents(keys)
            assert [bytes(view or b"") for view in again] == contents(keys[:3])
            memory = store.status()[0]
            assert memory.blocks == memory.pinned_blocks == 16
            assert memory.used_bytes <= memory.capacity_bytes
        assert store.tiers[0].used_bytes_on_medium() == held
        check_quiet(store)
        write_together(store)
        check_quiet(store)


def test_hanging_loads_pin_their_slots(tmp_path: Path) -> None:
    """Half of the slots hang in loads; the other half serves the writers, and the bound holds."""
    capacity = 700_000
    io = FaultyIO()
    try:
        with (
            Sampler(tmp_path, capacity).running(),
            open_store(
                nvme_tier(tmp_path, capacity),
                file_io=io,
                io_deadline_seconds=0.2,
                breaker_retry_seconds=0.05,
            ) as store,
        ):
            slots = store.tiers[0].table.slots
            keys = chain(1, slots // 2)
            assert save(store, keys) == [Outcome.SAVED] * len(keys)
            io.hang("read")
            loading = store.load(store.lookup(keys), [bytearray(8192) for _ in keys])
            io.wait_hanging("read", 8)
            write_together(store)
            assert store.tiers[0].table.lookup(keys)[0].value == "hit", "a pinned block was evicted"
            store.check_integrity()
            io.release()
            finished(loading)
            assert set(loading.outcomes) == {Outcome.LATE}
            check_quiet(store)
            write_together(store)
            check_quiet(store)
    finally:
        io.release()


def test_a_tier_full_of_doomed_blocks(tmp_path: Path) -> None:
    """Blocks that were discarded while a load still holds them keep their slots until it lets go."""
    capacity = 400_000
    io = FaultyIO()
    try:
        with (
            Sampler(tmp_path, capacity).running(),
            open_store(nvme_tier(tmp_path, capacity), file_io=io) as store,
        ):
            slots = store.tiers[0].table.slots
            keys = chain(1, slots)
            save(store, keys)
            io.hang("read")
            targets = [bytearray(8192) for _ in keys]
            loading = store.load(store.lookup(keys), targets)
            io.wait_hanging("read", 8)
            assert store.discard(keys) == slots
            assert save(store, chain(2, 4)) == [Outcome.REJECTED] * 4
            assert store.lookup(keys).blocks == 0
            store.check_integrity()
            io.release()
            outcomes = finished(loading)
            assert outcomes == [Outcome.LOADED] * slots
            check_bytes(keys, targets, outcomes)
            check_quiet(store)
            assert save(store, chain(2, 4)) == [Outcome.SAVED] * 4
    finally:
        io.release()
