"""The read cache: a local tier that fills itself with what is read from the tier below it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faulty_io import FaultyIO
from kvstrata.hashing import chain_keys
from kvstrata.store import BlockStore
from kvstrata.table import BlockTable
from kvstrata.types import BlockKey, Lookup, Namespace, Outcome, PrefixMatch
from store_kit import (
    LAYOUT,
    NAMESPACE,
    WAIT_SECONDS,
    bytes_on_medium,
    chain,
    check_bytes,
    check_quiet,
    contents,
    eventually,
    finished,
    load,
    make_config,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    served,
)

KEYS = chain(1, 8)
HIT, MISS = [Lookup.HIT] * 8, [Lookup.MISS] * 8
CAPACITY_BYTES = 2 * 2**20


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    faulty = FaultyIO()
    yield faulty
    faulty.heal()
    faulty.release()


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """A folder with eight chains of eight blocks."""
    with open_store(nvme_tier(tmp_path / "below")) as store:
        for number in range(1, 9):
            save(store, chain(number, 8))
    return tmp_path / "below"


def open_cache(tmp_path: Path, *, memory: Any = None, store: Any = None, **fields: Any) -> BlockStore:
    """A cache that saves do not write to, in front of the folder `below`."""
    settings = {"attach": "always", "write_mode": "none"} | fields
    cache = nvme_tier(tmp_path / "cache", CAPACITY_BYTES, **settings)
    tiers = [cache, nvme_tier(tmp_path / "below")]
    return open_store(*([memory] if memory else []), *tiers, **(store or {}))


def attached(store: BlockStore, result: str = "attached") -> int:
    blocks = store.telemetry.value("attach_blocks_total", "nvme", result)
    assert store.telemetry.value("attach_bytes_total", "nvme", result) == blocks * 8192
    return blocks


def in_cache(store: BlockStore, keys: list[BlockKey]) -> list[Lookup]:
    return next(tier for tier in store.tiers if tier.name == "nvme").table.lookup(keys)


def accounted(store: BlockStore) -> None:
    """What was offered was attached, or turned away for a reason that is counted."""
    counters = store.telemetry.counters().get("attach_blocks_total", {})
    rest = {labels[1]: value for labels, value in counters.items()}
    assert rest.pop("offered", 0) == sum(rest.values()), rest


@pytest.mark.parametrize("memory", [None, memory_tier(64), memory_tier(64, promote=False), memory_tier(2)])
@pytest.mark.parametrize("own_deadline", [0.0, 30.0])
def test_the_second_read_is_local(memory: Any, own_deadline: float, below: Path, tmp_path: Path) -> None:
    with open_cache(tmp_path, memory=memory, deadline_seconds=own_deadline) as store:
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)
        assert attached(store) == attached(store, "offered") == 8
        assert in_cache(store, KEYS) == HIT
        if memory is not None:
            store.tiers[0].table.discard(KEYS)
        before = store.telemetry.value("read_bytes_total", "nvme2")
        assert served(store, KEYS) == set(KEYS)
        assert store.telemetry.value("read_bytes_total", "nvme2") == before == 8 * 8192
        assert store.telemetry.value("served_bytes_total", "nvme") == 8 * 8192
        check_quiet(store)
    with open_cache(tmp_path) as store:
        # It survives a restart.
        assert in_cache(store, KEYS) == HIT
        assert served(store, KEYS) == set(KEYS)
        assert store.telemetry.value("read_bytes_total", "nvme2") == 0


def test_without_the_rule_nothing_is_attached(below: Path, tmp_path: Path) -> None:
    with open_cache(tmp_path, attach="no") as store:
        served(store, KEYS)
        check_quiet(store)
        assert in_cache(store, KEYS) == MISS
        assert store.telemetry.value("attach_blocks_total") == 0


def test_saves_go_past_the_cache(below: Path, tmp_path: Path) -> None:
    with open_cache(tmp_path) as store:
        new = chain(20, 8)
        assert save(store, new) == [Outcome.SAVED] * 8
        check_quiet(store)
        assert in_cache(store, new) == MISS
        assert served(store, new) == set(new)
        check_quiet(store)
        assert in_cache(store, new) == HIT


def test_the_second_read_attaches(below: Path, tmp_path: Path) -> None:
    with open_cache(tmp_path, attach="second") as store:
        served(store, KEYS)
        check_quiet(store)
        assert attached(store) == 0 and attached(store, "first_read") == 8
        served(store, KEYS)
        check_quiet(store)
        assert in_cache(store, KEYS) == HIT
        accounted(store)


def test_namespace_and_size(below: Path, tmp_path: Path) -> None:
    mine = NAMESPACE.digest.hex()
    with open_cache(tmp_path, attach_namespaces=("0" if mine[0] != "0" else "1",)) as store:
        served(store, KEYS)
        check_quiet(store)
        assert attached(store, "namespace") == 8
    with open_cache(tmp_path, attach_namespaces=(mine[:6],), attach_min_bytes=8193) as store:
        served(store, KEYS)
        check_quiet(store)
        assert attached(store, "size") == 8
        accounted(store)
    with open_cache(tmp_path, attach_max_bytes=8192) as store:
        served(store, KEYS)
        check_quiet(store)
        assert attached(store) == 8


def test_budgets(below: Path, tmp_path: Path) -> None:
    now = [0.0]
    cache = nvme_tier(
        tmp_path / "cache", attach="always", write_mode="none",
        attach_bytes_per_second=4 * 8192, attach_bytes_per_day=6 * 8192,
    )  # fmt: skip
    config = make_config(cache, nvme_tier(below))
    with BlockStore(config, LAYOUT, NAMESPACE, clock=lambda: now[0]) as store:
        served(store, KEYS)
        check_quiet(store)
        assert (attached(store), attached(store, "bandwidth")) == (4, 4)
        now[0] += 1.0
        served(store, KEYS)
        check_quiet(store)
        assert (attached(store), attached(store, "endurance")) == (6, 2)
        now[0] += 86_400
        served(store, KEYS)
        check_quiet(store)
        assert attached(store) == 8
        accounted(store)


def test_a_full_arena_is_counted_and_nobody_waits(below: Path, tmp_path: Path, io: FaultyIO) -> None:
    layers = {"file_io": {"nvme": io}}
    with open_cache(tmp_path, attach_staging_bytes=5 * 8192, store=layers) as store:
        io.hang("write", "allocate")
        assert served(store, KEYS) == set(KEYS)
        assert served(store, chain(2, 8)) == set(chain(2, 8))
        assert attached(store, "staging") == 3 + 8
        assert store.queued["attach_staged_bytes"] == 5 * 8192
        io.release()
        check_quiet(store)
        assert attached(store) == 5
        accounted(store)


def test_a_cache_that_fails_is_no_reason_not_to_serve(below: Path, tmp_path: Path, io: FaultyIO) -> None:
    layers = {"file_io": {"nvme": io}, "breaker_failures": 1, "breaker_retry_seconds": 60.0}
    with open_cache(tmp_path, store=layers) as store:
        io.fail(28, "write", "allocate")
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)
        assert attached(store, "io_error") == 8
        assert served(store, chain(2, 8)) == set(chain(2, 8))
        assert attached(store, "unavailable") == 8
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)
        accounted(store)


def test_a_block_that_is_bad_below_is_not_attached(below: Path, tmp_path: Path, io: FaultyIO) -> None:
    layers = {"file_io": {"nvme2": io}, "breaker_failures": 100}
    with open_cache(tmp_path, store=layers) as store:
        io.fail(5, "read")
        assert load(store, KEYS) == [Outcome.IO_ERROR] * 8
        check_quiet(store)
        assert in_cache(store, KEYS) == MISS
        assert attached(store, "not_read") == 8
        accounted(store)


def test_the_bound_is_kept_and_what_is_read_stays(below: Path, tmp_path: Path) -> None:
    cache = nvme_tier(tmp_path / "cache", 300_000, attach="always", write_mode="none")
    with open_store(cache, nvme_tier(below)) as store:
        slots = store.tiers[0].table.capacity_bytes // 12288
        assert slots < 64
        for _ in range(3):
            for number in range(1, 9):
                assert served(store, chain(number, 8)) == set(chain(number, 8))
                store.touch(chain(number, 8))
        for _ in range(2):
            assert served(store, chain(8, 8)) == set(chain(8, 8))
            store.touch(chain(8, 8))
            check_quiet(store)
        assert bytes_on_medium(tmp_path / "cache") <= 300_000
        assert store.telemetry.value("evictions_total", "nvme") > 0
        assert Lookup.HIT in in_cache(store, chain(8, 8))
        accounted(store)


def test_read_ahead(below: Path, tmp_path: Path) -> None:
    """Two blocks are asked for; those that follow in the chain come in the background."""
    with open_cache(tmp_path, read_ahead_blocks=4) as store:
        match = store.lookup(KEYS)
        targets = [bytearray(8192) for _ in range(2)]
        outcomes = finished(store.load(match, targets))
        check_bytes(KEYS[:2], targets, outcomes)
        check_quiet(store)
        assert in_cache(store, KEYS) == HIT[:6] + MISS[:2]
        assert attached(store) == 6
        accounted(store)
        tail = PrefixMatch(tuple(KEYS[2:]), 6, tuple(HIT[:6]))
        finished(store.load(tail, [bytearray(8192) for _ in range(4)]))
        check_quiet(store)
        assert store.telemetry.value("served_bytes_total", "nvme") == 4 * 8192
        assert in_cache(store, KEYS) == HIT
        assert served(store, KEYS) == set(KEYS)


def test_read_ahead_takes_what_there_is_room_for(below: Path, tmp_path: Path, io: FaultyIO) -> None:
    layers = {"file_io": {"nvme2": io}}
    with open_cache(tmp_path, read_ahead_blocks=8, attach_staging_bytes=3 * 8192, store=layers) as store:
        io.hang("read")
        match = store.lookup(KEYS)
        targets = [bytearray(8192)]
        transfer = store.load(match, targets)
        assert attached(store, "staging") == 7 - 2
        io.release()
        check_bytes(KEYS[:1], targets, finished(transfer))
        check_quiet(store)
        assert attached(store) == 3
        accounted(store)


@pytest.mark.parametrize(("wanted", "expected"), [("asked", 2), ("whole", 8)])
def test_the_whole_chunk_comes_along(
    wanted: str, expected: int, below: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if each chain were one object below, which is what a tier of packed extents says."""
    chains = [chain(number, 8) for number in range(1, 9)]

    def chunk(table: BlockTable, keys: list[BlockKey]) -> list[BlockKey]:
        return [key for keys_of in chains if set(keys) & set(keys_of) for key in keys_of]

    monkeypatch.setattr(BlockTable, "chunk", chunk)
    with open_cache(tmp_path, attach_chunk=wanted) as store:
        targets = [bytearray(8192) for _ in range(2)]
        check_bytes(KEYS[:2], targets, finished(store.load(store.lookup(KEYS), targets)))
        check_quiet(store)
        assert in_cache(store, KEYS).count(Lookup.HIT) == expected
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)
        accounted(store)


def test_other_namespaces_do_not_meet(below: Path, tmp_path: Path) -> None:
    with open_cache(tmp_path) as store:
        served(store, KEYS)
        check_quiet(store)
    other = Namespace(bytes([7]) * 32)
    keys = chain_keys(other.digest, [1] * 8, 1)
    tiers = (nvme_tier(tmp_path / "cache", CAPACITY_BYTES, attach="always"), nvme_tier(below))
    with open_store(*tiers, namespace=other) as store:
        assert store.lookup(keys).blocks == 0


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from store_kit import *
cache = nvme_tier(Path({cache!r}), 2 * 2**20, attach="always", write_mode="none")
store = open_store(cache, nvme_tier(Path({below!r})), io_threads=4, io_store_threads=3)
print("open", flush=True)
while True:
    for number in range(1, 9):
        for keys in (chain(number, 8), chain(number, 3)):
            load(store, keys)
            store.tiers[0].table.discard(keys)
"""


def test_killed_while_attaching(below: Path, tmp_path: Path) -> None:
    """kill -9 at any moment: what the cache holds then are right bytes, and it goes on filling itself."""
    here = Path(__file__).resolve().parent
    script = WRITER.format(
        path=[str(here), str(here.parent)], cache=str(tmp_path / "cache"), below=str(below)
    )
    found = 0
    for pause in (0.02, 0.15, 0.4):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout and child.stdout.readline() == "open\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(pause)
            child.send_signal(signal.SIGKILL)
            assert child.wait(WAIT_SECONDS) == -signal.SIGKILL
        assert bytes_on_medium(tmp_path / "cache") <= CAPACITY_BYTES
        with open_store(nvme_tier(tmp_path / "cache", CAPACITY_BYTES)) as alone:
            for number in range(1, 9):
                found += len(served(alone, chain(number, 8)))
    assert found > 0, "it was killed before anything was attached"
    with open_cache(tmp_path) as store:
        for number in range(1, 9):
            assert served(store, chain(number, 8)) == set(chain(number, 8))
        eventually(lambda: store.flush(WAIT_SECONDS), "attaching does not end")
        for number in range(1, 9):
            assert in_cache(store, chain(number, 8)) == HIT


def test_short_blocks(below: Path, tmp_path: Path) -> None:
    keys, lengths = chain(30, 4), [1, 4095, 4097, 8191]
    sources = [data[:size] for data, size in zip(contents(keys), lengths, strict=True)]
    with open_cache(tmp_path) as store:
        finished(store.save(keys, sources))
        for _ in range(2):
            targets = [bytearray(size) for size in lengths]
            assert finished(store.load(store.lookup(keys), targets)) == [Outcome.LOADED] * 4
            assert [bytes(target) for target in targets] == sources
            check_quiet(store)
        assert store.telemetry.value("served_bytes_total", "nvme") == sum(lengths)
        assert np.array(lengths).sum() == store.telemetry.value("attach_bytes_total", "nvme", "attached")
