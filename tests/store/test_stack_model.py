"""Three tiers, any write modes, under random calls and faults, against a plain model.

The model knows what was ever saved, and asks the books of each tier what is where. Whatever happens: no
wrong byte, what is resident in a tier that answers is found and served, and at rest nothing is pinned,
held, staged or moving.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from faulty_io import FaultyIO
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, Lookup, Outcome
from store_kit import (
    WAIT_SECONDS,
    chain,
    check_bytes,
    check_quiet,
    contents,
    eventually,
    finished,
    memory_tier,
    nvme_tier,
    open_store,
)

SEEDS = range(12)
ROUNDS = 60
CHAINS = 14
NAMES = ("nvme", "nvme2")


def random_stack(folder: Path, rng: random.Random) -> list[Any]:
    """Memory or a third disk on top; every write mode, with and without attaching and own deadlines."""
    modes = ["back", "through", "none", "on_evict"]
    tiers: list[Any] = [memory_tier(rng.choice([8, 24]), promote=rng.random() < 0.7)]
    if rng.random() < 0.4:
        tiers = [nvme_tier(folder / "top", rng.choice([400_000, 800_000]))]
    attach = rng.choice(["no", "always", "second"])
    for name in ("middle", "low"):
        own = {"deadline_seconds": 5.0} if rng.random() < 0.5 else {}
        tiers.append(
            nvme_tier(
                folder / name,
                rng.choice([500_000, 900_000]),
                write_mode=rng.choice(modes),
                demote_bytes=rng.choice([1, 6 * 12288]),
                attach=attach if name == "middle" else "no",
                read_ahead_blocks=rng.choice([0, 3]),
                attach_staging_bytes=rng.choice([8192, 2**20]),
                **own,
            )
        )
    return tiers


class Model:
    """What a caller may rely on."""

    def __init__(self, store: BlockStore, rng: random.Random) -> None:
        self.store = store
        self.rng = rng
        self.saved: set[BlockKey] = set()

    def keys(self) -> list[BlockKey]:
        return chain(self.rng.randrange(CHAINS), self.rng.randint(1, 9))

    def save(self, wait: bool = True) -> None:
        keys = self.keys()
        transfer = self.store.save(keys, contents(keys))
        self.saved |= set(keys)
        if wait:
            outcomes = finished(transfer)
            assert set(outcomes) <= {
                Outcome.SAVED, Outcome.PRESENT, Outcome.REJECTED, Outcome.IO_ERROR, Outcome.UNAVAILABLE
            }  # fmt: skip

    def load(self, sure: bool) -> None:
        """sure: nothing runs and nothing fails, so what a tier has must come."""
        keys = self.keys()
        held = self.held(keys) if sure else set()
        match = self.store.lookup(keys)
        found = {key for key, state in zip(keys, match.states, strict=True) if state is Lookup.HIT}
        assert not sure or found == held
        targets = [bytearray(b"\xa5" * 8192) for _ in keys]
        outcomes = finished(self.store.load(match, targets))
        check_bytes(keys, targets, outcomes)
        good = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Outcome.LOADED}
        assert good <= self.saved, "a block was served that nobody saved"
        assert not sure or good == held, "a block is there and was not served"

    def held(self, keys: list[BlockKey]) -> set[BlockKey]:
        return {
            key
            for tier in self.store.tiers
            for key, state in zip(keys, tier.table.lookup(keys), strict=True)
            if state is Lookup.HIT
        }

    def step(self, sure: bool) -> None:
        kind = self.rng.random()
        if kind < 0.45:
            self.save(wait=sure or self.rng.random() < 0.5)
        elif kind < 0.85:
            if sure:
                check_quiet(self.store)
            self.load(sure)
        elif kind < 0.93:
            self.store.touch(self.keys())
        else:
            self.store.discard(self.keys()[1:])


def in_service(store: BlockStore) -> bool:
    store.lookup(chain(0, 1))
    store.save([], [])
    for tier in store.tiers:
        store._stack.probe_later(tier)
    return all(status.readable and status.writable for status in store.status())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stack_is_what_the_model_says(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    io = FaultyIO()
    tiers = random_stack(tmp_path, rng)
    faulty = rng.choice(NAMES)
    settings: dict[str, Any] = {
        "breaker_retry_seconds": 0.02, "staging_bytes": rng.choice([8192, 2**20]), "close_seconds": 20.0,
        "io_deadline_seconds": 30.0, "queue_blocks": rng.choice([12, 1000]), "io_threads": 4,
        "io_store_threads": 2,
    }  # fmt: skip
    try:
        with open_store(*tiers, file_io={faulty: io}, **settings) as store:
            model = Model(store, rng)
            for _ in range(ROUNDS):
                model.step(sure=True)
            check_quiet(store)
            for _ in range(3):
                io.fail(5, *rng.sample(["read", "write", "allocate"], 2), times=rng.choice([-1, 3]))
                for _ in range(ROUNDS // 4):
                    model.step(sure=False)
                io.heal()
                eventually(lambda: in_service(store), "a tier stays out of service")
                check_quiet(store)
                for _ in range(ROUNDS // 6):
                    model.step(sure=True)
            check_quiet(store)
            saved = model.saved
        with open_store(*tiers, **settings) as store:
            model = Model(store, rng)
            model.saved = saved
            for _ in range(ROUNDS // 2):
                model.step(sure=True)
            check_quiet(store)
    finally:
        io.heal()
        io.release()


@pytest.mark.parametrize("seed", range(100, 106))
def test_threads_on_a_stack(seed: int, tmp_path: Path) -> None:
    """Four callers at once, with a disk that is slow or fails now and then: right bytes, and then quiet."""
    rng = random.Random(seed)
    io = FaultyIO()
    faulty = rng.choice(NAMES)
    failures: list[BaseException] = []
    with open_store(
        *random_stack(tmp_path, rng), file_io={faulty: io}, breaker_retry_seconds=0.02, close_seconds=20.0,
        io_deadline_seconds=30.0, staging_bytes=rng.choice([8192, 2**20]), io_threads=4, io_store_threads=2,
    ) as store:  # fmt: skip
        models = [Model(store, random.Random(seed * 10 + number)) for number in range(4)]
        everything = {key for number in range(CHAINS) for key in chain(number, 9)}

        def work(model: Model) -> None:
            model.saved = everything
            try:
                for _ in range(40):
                    model.step(sure=False)
            except BaseException as error:  # noqa: BLE001 - raised in the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(model,), daemon=True) for model in models]
        for thread in threads:
            thread.start()
        for _ in range(3):
            io.slow(0.002, "read", "write")
            io.fail(5, rng.choice(["read", "write"]), times=3)
            threads[0].join(0.05)
        io.heal()
        for thread in threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a caller hangs"
        assert not failures, failures
        eventually(lambda: in_service(store), "a tier stays out of service")
        check_quiet(store)
