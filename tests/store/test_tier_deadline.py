"""A tier that hangs or is slow costs its own deadline once: the tiers below serve, within the load's."""

from __future__ import annotations

from collections.abc import Iterator
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
    eventually,
    finished,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    served,
)

KEYS = chain(1, 8)
FAR = {"io_deadline_seconds": 60.0, "close_seconds": 2.0}
OWN = {"deadline_seconds": 0.2, "breaker_retry_seconds": 0.1}


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    faulty = FaultyIO()
    yield faulty
    faulty.heal()
    faulty.release()


def fill(*folders: Path) -> None:
    for folder in folders:
        with open_store(nvme_tier(folder)) as store:
            for number in (1, 2, 3):
                save(store, chain(number, 8))


def load_while_hanging(store: BlockStore, keys: list[BlockKey], wait: bool) -> list[bytearray]:
    """Load what a lower tier must give; the targets, which nobody may write to any more."""
    targets = [bytearray(b"\xa5" * 8192) for _ in keys]
    transfer = store.load(store.lookup(keys), targets)
    if wait:
        assert transfer.wait(WAIT_SECONDS)
    else:
        eventually(transfer.poll, "the tier's deadline does not cut its blocks off")
    assert transfer.outcomes == [Outcome.LOADED] * len(keys)
    assert transfer.released
    check_bytes(keys, targets, transfer.outcomes)
    return targets


STACKS: dict[str, Any] = {
    "nvme": lambda a, b: (nvme_tier(a, **OWN), nvme_tier(b)),
    "memory, promoting": lambda a, b: (memory_tier(64), nvme_tier(a, **OWN), nvme_tier(b)),
    "memory": lambda a, b: (memory_tier(64, promote=False), nvme_tier(a, **OWN), nvme_tier(b)),
    "the middle of three": lambda a, b: (
        nvme_tier(a.parent / "top", write_mode="none", attach="always"),
        nvme_tier(a, **OWN),
        nvme_tier(b),
    ),
}


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "polling"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_hang_is_served_from_below(stack: str, wait: bool, tmp_path: Path, io: FaultyIO) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    fill(a, b)
    tiers = STACKS[stack](a, b)
    name = "nvme2" if stack.startswith("the middle") else "nvme"
    number = [status.name for status in _status(tiers)].index(name)
    with open_store(*tiers, file_io={name: io}, **FAR) as store:
        io.hang("read")
        targets = load_while_hanging(store, KEYS, wait)
        io.wait_hanging("read")
        status = store.status()[number]
        assert not status.readable and status.reason
        # It is passed over from here on: nothing more of it is asked, and nothing waits.
        asked = io.calls["read"]
        load_while_hanging(store, chain(2, 8), wait)
        probes = store.telemetry.value("probes_total", name) + store.status()[number].readable
        assert io.calls["read"] <= asked + 1 + probes
        # What comes back late must not touch the caller's memory any more.
        for target in targets:
            target[:] = b"\xee" * 8192
        io.release()
        eventually(lambda: not io.hanging["read"], "reads still hang")
        store.flush()
        assert all(target == b"\xee" * 8192 for target in targets)

        def back() -> bool:
            store.lookup(chain(3, 8))
            return store.status()[number].readable

        eventually(back, "the tier does not come back")
        assert served(store, chain(3, 8)) == set(chain(3, 8))
        check_quiet(store)


def _status(tiers: Any) -> Any:
    with open_store(*tiers) as store:
        return store.status()


def test_what_hangs_and_is_nowhere_else_waits_for_it(tmp_path: Path, io: FaultyIO) -> None:
    """Half of the chain is below; the other half comes when the tier answers again."""
    fill(tmp_path / "a")
    with open_store(nvme_tier(tmp_path / "b")) as store:
        save(store, KEYS[:4])
    tiers = (nvme_tier(tmp_path / "a", **OWN), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, **FAR) as store:
        io.hang("read")
        targets = [bytearray(8192) for _ in KEYS]
        transfer = store.load(store.lookup(KEYS), targets)
        eventually(
            lambda: transfer.poll() or store.telemetry.value("served_bytes_total", "nvme2") == 4 * 8192,
            "nothing comes from below",
        )
        io.release()
        outcomes = finished(transfer)
        assert outcomes[:4] == [Outcome.LOADED] * 4
        assert set(outcomes[4:]) <= {Outcome.LOADED, Outcome.LATE}
        check_bytes(KEYS, targets, outcomes)
        check_quiet(store)


def test_without_rooms_of_our_own_nobody_is_given_a_buffer_that_hangs(tmp_path: Path, io: FaultyIO) -> None:
    """Two places for eight blocks: the other six have to wait for the tier that has their targets."""
    fill(tmp_path / "a", tmp_path / "b")
    tiers = (nvme_tier(tmp_path / "a", **OWN), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, staging_bytes=2 * 8192, **FAR) as store:
        io.hang("read")
        targets = [bytearray(8192) for _ in KEYS]
        transfer = store.load(store.lookup(KEYS), targets)
        io.wait_hanging("read", 8)
        eventually(
            lambda: transfer.poll() or store.telemetry.value("served_bytes_total", "nvme2") > 0,
            "nothing comes from below",
        )
        assert store.flush(0.5) is False
        assert store.telemetry.value("served_bytes_total", "nvme2") == 2 * 8192
        io.release()
        assert finished(transfer) == [Outcome.LOADED] * 8
        check_bytes(KEYS, targets, transfer.outcomes)
        check_quiet(store)


def test_a_slow_tier_is_left_after_its_deadline(tmp_path: Path, io: FaultyIO) -> None:
    """Every read answers, but a long queue of them takes longer than the tier may."""
    fill(tmp_path / "a", tmp_path / "b")
    own = {"deadline_seconds": 0.2, "breaker_retry_seconds": 60.0}
    tiers = (nvme_tier(tmp_path / "a", **own), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io={"nvme": io}, io_threads=1, io_store_threads=1, **FAR) as store:
        io.slow(0.15, "read")
        load_while_hanging(store, KEYS, wait=True)
        assert not store.status()[0].readable
        assert store.telemetry.value("served_bytes_total", "nvme2") > 0
        asked = io.calls["read"]
        load_while_hanging(store, chain(2, 8), wait=True)
        assert io.calls["read"] == asked
        io.heal()
        check_quiet(store)


@pytest.mark.parametrize("position", [0, 1])
def test_a_hang_without_a_deadline_of_its_own_costs_the_stores(
    position: int, tmp_path: Path, io: FaultyIO
) -> None:
    fill(tmp_path / "a", tmp_path / "b")
    tiers = (nvme_tier(tmp_path / "a"), nvme_tier(tmp_path / "b"))
    names = ["nvme", "nvme2"]
    with open_store(
        *tiers, file_io={names[position]: io}, io_deadline_seconds=0.3, breaker_retry_seconds=0.1
    ) as store:
        store.tiers[1 - position].table.discard(KEYS)
        io.hang("read")
        transfer = store.load(store.lookup(KEYS), [bytearray(8192) for _ in KEYS])
        eventually(transfer.poll, "the deadline does not cut it off")
        assert transfer.outcomes == [Outcome.LATE] * 8
        eventually(lambda: not store.status()[position].readable, "it stays in service")
        assert store.lookup(KEYS).states == (Lookup.MISS,) * 8
        io.release()
        eventually(lambda: transfer.released, "it never lets go")

        def back() -> bool:
            store.lookup(KEYS)
            return store.status()[position].readable

        eventually(back, "the tier does not come back")
        check_quiet(store)


def test_a_tiers_own_breaker(tmp_path: Path, io: FaultyIO) -> None:
    tiers = (nvme_tier(tmp_path / "a", breaker_failures=1), nvme_tier(tmp_path / "b"))
    with open_store(*tiers, file_io=io, breaker_failures=100, breaker_retry_seconds=60.0) as store:
        save(store, KEYS)
        check_quiet(store)
        io.fail(5, "read")
        assert set(finished(store.load(store.lookup(KEYS), [bytearray(8192) for _ in KEYS]))) == {
            Outcome.IO_ERROR
        }
        first, second = store.status()
        assert not first.readable and second.readable
