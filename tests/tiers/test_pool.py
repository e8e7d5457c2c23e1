"""The pool tier on a real mooncake_master, with members that lend, die and come back."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from backends.mooncake import MooncakeMaster
from backends.netns import command_in, entered
from kvstrata.errors import ConfigError
from kvstrata.hashing import namespace_digest
from kvstrata.store import BlockStore
from kvstrata.transfer.buffers import Arena
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome
from store_kit import (
    LAYOUT,
    NAMESPACE,
    WAIT_SECONDS,
    chain,
    check_quiet,
    content,
    contents,
    eventually,
    finished,
    memory_tier,
    save,
)
from tiers.pool_kit import LENT_BYTES, Pool, found, load, name_of, settle

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mooncake") is None, reason="needs Mooncake: pip install 'kvstrata[pool]'"
)
LOADED, SAVED, PRESENT, ABSENT = Outcome.LOADED, Outcome.SAVED, Outcome.PRESENT, Outcome.ABSENT
CORRUPT, IO_ERROR = Outcome.CORRUPT, Outcome.IO_ERROR
BLOCK, LARGE = LAYOUT.block_bytes, 1 << 20


@pytest.fixture(scope="module")
def pool(mooncake: MooncakeMaster) -> Iterator[Pool]:
    """Within its namespace: Mooncake's threads stay where they were started."""
    member = mooncake.join("pool")
    with entered(member.namespace):
        yield Pool(mooncake, member)


@pytest.fixture(scope="module")
def lent(pool: Pool) -> Iterator[Pool]:
    """Some member lends memory."""
    lender = pool.lend()
    yield pool
    lender.kill()


@pytest.fixture(scope="module")
def raw(pool: Pool) -> Iterator[Any]:
    client = pool.raw()
    yield client
    client.close()


def numbers() -> Iterator[int]:
    yield from range(10_000, 20_000)


_number = numbers()


def fresh(length: int) -> list[BlockKey]:
    """Keys that no other test has saved."""
    return chain(next(_number), length)


@pytest.fixture(scope="module", params=["never", "always"])
def store(request: pytest.FixtureRequest, lent: Pool) -> Iterator[BlockStore]:
    """One for many tests, because a client takes a second to close. Blocks may be shorter than it says."""
    with lent.store(
        layout=BlockLayout(LARGE, 1), staging=request.param, staging_bytes=8 << 20, missing_seconds=0.2
    ) as store:
        yield store


@pytest.mark.parametrize("size", [1, 100, 4096, 5000, 65_537, LARGE])
def test_round_trip_of_every_size(store: BlockStore, size: int) -> None:
    keys = fresh(5)
    assert save(store, keys, size) == [SAVED] * 5
    assert save(store, keys, size) == [PRESENT] * 5
    assert load(store, keys, size) == [LOADED] * 5
    for shift in (1, 3):
        targets = [memoryview(bytearray(size + shift))[shift:] for _ in keys]
        assert finished(store.load(store.lookup(keys), targets)) == [LOADED] * 5
        assert [bytes(target) for target in targets] == contents(keys, size)
    check_quiet(store)


def test_many_blocks_go_in_units_of_a_bounded_size(lent: Pool) -> None:
    keys = fresh(100)
    with lent.store(batch_bytes=1 << 20, io_threads=2) as store:
        assert save(store, keys) == [SAVED] * 100
        assert load(store, keys) == [LOADED] * 100
        counts = store.tiers[0].counts
        per_unit = (1 << 20) // (BLOCK + 256)
        assert counts.stores == counts.loads == -(-100 // per_unit)
        assert store.telemetry.value("read_bytes_total", "pool") == 100 * BLOCK
        check_quiet(store)


def test_another_process_finds_what_was_saved_here(lent: Pool) -> None:
    """And the first look-up there says that the pool is being asked, not that there is nothing."""
    keys = fresh(8)
    with lent.store() as store:
        assert save(store, keys) == [SAVED] * 8
    program = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}
from tiers.pool_kit import *
from store_kit import chain
class Member: master = {lent.member.master!r}
with Pool(None, Member).store() as store:
    keys = [BlockKey(bytes.fromhex(word)) for word in {[key.hex() for key in keys]!r}]
    print({{state.value for state in store.lookup(keys).states}}, found(store, keys).blocks)
    print({{outcome.value for outcome in load(store, keys)}})
    more = chain(77, 3)
    print({{outcome.value for outcome in save(store, more)}})
"""
    answer = subprocess.run(
        command_in(lent.member.namespace, [sys.executable, "-c", program]),
        capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
    )  # fmt: skip
    assert answer.stdout.splitlines() == ["{'asking'} 8", "{'loaded'}", "{'saved'}"], answer.stderr
    with lent.store() as store:
        assert load(store, chain(77, 3)) == [LOADED] * 3


def test_a_restarted_store_finds_its_blocks(lent: Pool) -> None:
    keys = fresh(6)
    for run in range(3):
        with lent.store() as store:
            assert found(store, keys).blocks == (6 if run else 0)
            assert load(store, keys) == [LOADED if run else ABSENT] * 6
            save(store, keys)


def test_memory_above_a_pool(lent: Pool) -> None:
    """Written through and back, and promoted by the same pass that verifies."""
    keys = fresh(6)
    for mode, some in (("through", keys[:3]), ("back", keys[3:])):
        with lent.store(memory_tier(16), write_mode=mode) as store:
            assert save(store, some) == [SAVED] * 3
            check_quiet(store)
    with lent.store(memory_tier(16)) as store:
        assert load(store, keys) == [LOADED] * 6
        assert load(store, keys) == [LOADED] * 6
        assert store.telemetry.value("blocks_total", "load", "memory", "loaded") == 6
        assert store.telemetry.value("blocks_total", "load", "pool", "loaded") == 6
        check_quiet(store)


def test_what_left_the_pool_is_a_miss_and_can_be_saved_again(store: BlockStore, raw: Any) -> None:
    keys = fresh(4)
    before = store.telemetry.value("misses_total", "pool", "collected")
    assert save(store, keys, BLOCK) == [SAVED] * 4
    assert raw.remove(name_of(keys[1]), True) == 0
    assert store.lookup(keys).blocks == 4
    assert load(store, keys, BLOCK) == [LOADED, ABSENT, LOADED, LOADED]
    assert store.telemetry.value("misses_total", "pool", "collected") == before + 1
    assert store.tiers[0].readable and store.telemetry.value("io_errors_total") == 0
    assert save(store, keys, BLOCK) == [PRESENT, SAVED, PRESENT, PRESENT]
    assert load(store, keys, BLOCK) == [LOADED] * 4


def value_of(raw: Any, key: BlockKey) -> bytearray:
    """A block's value as it lies in the pool."""
    value = bytearray(raw.get(name_of(key)))
    assert len(value) == 256 + BLOCK
    return value


def replace_value(raw: Any, key: BlockKey, value: bytes) -> None:
    assert raw.remove(name_of(key), True) == 0
    assert raw.put(name_of(key), value) == 0


@pytest.mark.parametrize(
    ("place", "reason"),
    [(256, "checksum"), (256 + BLOCK - 1, "checksum"), (0, "header"), (8, "header"), (16, "header"),
     (48, "header"), (96, "header"), (255, "header")],
)  # fmt: skip
def test_one_wrong_bit_is_a_miss_and_goes(store: BlockStore, raw: Any, place: int, reason: str) -> None:
    keys = fresh(3)
    before = store.telemetry.value("misses_total", "pool", f"corrupt_{reason}")
    assert save(store, keys, BLOCK) == [SAVED] * 3
    value = value_of(raw, keys[1])
    value[place] ^= 4
    replace_value(raw, keys[1], bytes(value))
    assert load(store, keys, BLOCK) == [LOADED, CORRUPT, LOADED]
    assert store.telemetry.value("misses_total", "pool", f"corrupt_{reason}") == before + 1
    eventually(lambda: raw.is_exist(name_of(keys[1])) == 0, "a damaged value stays in the pool")
    assert save(store, keys, BLOCK) == [PRESENT, SAVED, PRESENT]
    assert load(store, keys, BLOCK) == [LOADED] * 3


def test_a_whole_value_of_another_block_is_no_answer(store: BlockStore, raw: Any) -> None:
    keys = fresh(2)
    assert save(store, keys, BLOCK) == [SAVED] * 2
    replace_value(raw, keys[0], bytes(value_of(raw, keys[1])))
    assert load(store, keys, BLOCK) == [CORRUPT, LOADED]
    assert store.telemetry.value("misses_total", "pool", "corrupt_key") >= 1


def test_a_value_of_another_namespace_is_no_answer(lent: Pool) -> None:
    """Its key would have to be stolen: keys hold the namespace."""
    keys = fresh(2)
    other = Namespace(namespace_digest({"model": "other"}), {})
    with lent.store(namespace=other) as store:
        assert save(store, keys) == [SAVED] * 2
    with lent.store() as store:
        assert load(store, keys) == [CORRUPT] * 2
        assert store.telemetry.value("misses_total", "pool", "corrupt_key") == 2


def test_a_value_of_another_format_version_is_not_seen(store: BlockStore, raw: Any) -> None:
    """Versions have names of their own."""
    first, second = keys = fresh(2)
    assert save(store, [first], BLOCK) == [SAVED]
    assert raw.put(name_of(second).replace("/1/", "/2/"), bytes(value_of(raw, first))) == 0
    assert found(store, keys).states == (Lookup.HIT, Lookup.MISS)


def test_a_header_of_another_format_version_is_a_miss(store: BlockStore, raw: Any) -> None:
    """Whole, with a good checksum of its own."""
    [key] = fresh(1)
    assert save(store, [key], BLOCK) == [SAVED]
    value = value_of(raw, key)
    value[8] += 1
    value[248:256] = xxhash.xxh3_64_intdigest(value[:248]).to_bytes(8, "little")
    replace_value(raw, key, bytes(value))
    assert load(store, [key], BLOCK) == [CORRUPT]


@pytest.mark.parametrize("size", [1, 255, 256, 4096, 256 + BLOCK - 1, 256 + BLOCK + 1, 3 * BLOCK])
def test_a_value_of_another_length_is_a_miss(store: BlockStore, raw: Any, size: int) -> None:
    keys = fresh(3)
    before = store.telemetry.value("misses_total", "pool", "corrupt_length")
    assert raw.put(name_of(keys[1]), b"?" * size) == 0
    arena = Arena(4 * BLOCK)
    assert save(store, [keys[0], keys[2]], BLOCK) == [SAVED] * 2
    targets = [arena.view[n * BLOCK : (n + 1) * BLOCK] for n in range(3)]
    assert finished(store.load(found(store, keys), targets)) == [LOADED, CORRUPT, LOADED]
    assert bytes(targets[2]) == content(keys[2], BLOCK)
    assert arena.view[3 * BLOCK :] == bytes(BLOCK), "a read wrote beyond its target"
    assert store.telemetry.value("misses_total", "pool", "corrupt_length") == before + 1
    assert store.tiers[0].readable


def test_a_wrong_target_is_refused_and_the_block_stays(store: BlockStore, raw: Any) -> None:
    """Whether the length is known here, or only in the pool."""
    keys = fresh(2)
    assert save(store, keys, 5000) == [SAVED] * 2
    assert load(store, keys, 4999) == [CORRUPT] * 2
    assert load(store, keys, 5000) == [ABSENT] * 2, "what could not be read counts as missing for a time"
    eventually(lambda: found(store, keys).blocks == 2, "the blocks have left the pool")
    assert load(store, keys, 5001) == [CORRUPT] * 2
    eventually(lambda: found(store, keys).blocks == 2, "the blocks have left the pool")
    assert load(store, keys, 5000) == [LOADED] * 2


def test_time_to_live(lent: Pool) -> None:
    keys = fresh(2)
    with lent.store(ttl_seconds=0.2) as store:
        assert save(store, keys) == [SAVED] * 2
        eventually(lambda: load(store, keys) == [ABSENT] * 2, "blocks do not expire")
        assert store.telemetry.value("io_errors_total") == 0


def test_discarded_blocks_are_not_served_at_once(lent: Pool) -> None:
    keys = fresh(2)
    with lent.store(missing_seconds=60.0) as store:
        assert save(store, keys) == [SAVED] * 2
        assert store.discard(keys) == 2
        assert store.lookup(keys).states == (Lookup.MISS,) * 2


def test_a_full_pool_takes_what_fits_and_stays_in_service(pool: Pool) -> None:
    """What is read and written just now is under a lease, so that there is no room for a while."""
    with pool.store(segment_bytes=16 << 20, layout=BlockLayout(1 << 20, 1)) as store:
        outcomes: list[Outcome] = []
        for _ in range(12):
            outcomes += save(store, fresh(8))
        assert SAVED in outcomes
        assert set(outcomes) <= {SAVED, IO_ERROR}
        assert store.tiers[0].writable and store.tiers[0].readable
        settle(store, fresh(2))
        check_quiet(store)


def test_a_process_that_lends_serves_itself(pool: Pool) -> None:
    keys = fresh(4)
    with pool.store(segment_bytes=LENT_BYTES) as store:
        assert store.status()[0].capacity_bytes == LENT_BYTES
        settle(store, keys)
        assert load(store, keys) == [LOADED] * 4
        check_quiet(store)


def test_a_lender_that_dies_costs_its_blocks_only(pool: Pool) -> None:
    """Nothing hangs and nothing wrong is served; what is left of the pool is used as before."""
    keys = fresh(16)
    with pool.store(settings={"io_deadline_seconds": 5.0}) as store:
        lender = pool.lend()
        settle(store, keys)
        lender.kill()
        lender.wait()
        outcomes = load(store, keys)
        # The client may find out at once, or when its lease or our deadline is over.
        misses = {IO_ERROR, Outcome.ABSENT, Outcome.LATE}
        assert misses & set(outcomes) and set(outcomes) <= misses | {LOADED}
        another = pool.lend()
        settle(store, fresh(4))
        check_quiet(store)
        another.kill()


def test_a_master_that_dies_is_found_again(pool: Pool) -> None:
    keys = fresh(4)
    lender = pool.lend()
    with pool.store() as store:
        settle(store, keys)
        assert load(store, keys) == [LOADED] * 4
        pool.master.kill()

        def out_of_service() -> bool:
            store.lookup(fresh(1))
            return not store.tiers[0].readable

        eventually(out_of_service, "a dead master is asked for ever")
        assert set(store.lookup(fresh(3)).states) == {Lookup.MISS}
        assert load(store, keys) == [Outcome.UNAVAILABLE] * 4
        pool.master.start()
        settle(store, keys)
        assert store.telemetry.value("breaker_opened_total", "pool", "read") >= 1
        assert store.telemetry.value("probes_total", "pool", "read", "good") >= 1
        check_quiet(store)
    lender.kill()


def test_a_master_that_hangs_holds_nobody(pool: Pool) -> None:
    keys, unknown = fresh(4), fresh(3)
    lender = pool.lend()
    with pool.store(lookup_seconds=0.1) as store:
        settle(store, keys)
        pool.master.freeze()
        try:
            assert store.lookup(unknown).states == (Lookup.ASKING,) * 3
            eventually(lambda: set(store.lookup(unknown).states) == {Lookup.MISS}, "a look-up hangs")
            assert LOADED not in finished(store.load(store.lookup(keys), [bytearray(BLOCK) for _ in keys]))
        finally:
            pool.master.thaw()
        settle(store, keys)
    lender.kill()


@pytest.mark.parametrize("how", ["dead", "frozen"])
def test_a_store_that_opens_before_its_master(pool: Pool, how: str) -> None:
    """It starts with the tier out of service, and nothing waits for the master but one thread."""
    keys = fresh(2)
    lender = pool.lend()
    pool.master.kill() if how == "dead" else pool.master.freeze()
    try:
        store = pool.store()
    finally:
        pool.master.start() if how == "dead" else pool.master.thaw()
    assert not store.tiers[0].opened and "cannot be opened" in store.status()[0].reason
    settle(store, keys)
    assert load(store, keys) == [LOADED] * 2
    store.close()
    lender.kill()


def test_a_client_that_does_not_recover_is_replaced(lent: Pool) -> None:
    """Closed behind the tier's back: probes fail, and another one is set up."""
    keys = fresh(3)
    with lent.store() as store:
        settle(store, keys)
        tier: Any = store.tiers[0]
        tier._client.close()
        settle(store, fresh(2))
        assert load(store, keys) == [LOADED] * 3
        assert "pool client set up again" in [event.kind for event in store.telemetry.events()]
        check_quiet(store)


def test_a_staging_area_too_small_for_a_block_is_refused(pool: Pool) -> None:
    with pytest.raises(ConfigError, match="staging_bytes"):
        pool.store(layout=BlockLayout(1 << 20, 1), staging="always", staging_bytes=2 << 20, io_threads=2)


def test_a_missing_client_names_the_command(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstrata\[pool\]'"):
        pool.store()


def test_names_are_those_that_are_documented(store: BlockStore, raw: Any) -> None:
    keys = fresh(1)
    assert save(store, keys, BLOCK) == [SAVED]
    value = value_of(raw, keys[0])
    assert value[256:] == content(keys[0], BLOCK) and value[:8] == b"KVSTSLOT"
    assert value[16:48] == keys[0] and value[48:80] == NAMESPACE.digest
    words = np.frombuffer(bytes(value[:256]), dtype=np.uint64)
    assert words[10] == 0 and words[11] == 0, "a value has no place"
