"""Segments that are written through ahead of use: when, how many, and never in the way."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from faulty_io import FaultyIO
from kvstrata.config import MIB
from kvstrata.store import BlockStore
from kvstrata.tiers import NvmeTier, nvme
from kvstrata.tiers.nvme_format import SegmentHeader, segment_size
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockLayout, Outcome
from store_kit import (
    LAYOUT,
    bytes_on_medium,
    chain,
    check_quiet,
    eventually,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    segments_of,
)

CAPACITY = 2 * MIB
"""Nine segments: eight of 19 slots of 12 KiB, and the rest."""


@pytest.fixture(autouse=True)
def small_segments_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "PREPARE_LEAST_BYTES", 0)


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    io = FaultyIO()
    yield io
    io.release()


def tier_of(store: BlockStore) -> NvmeTier:
    [tier] = [tier for tier in store.tiers if isinstance(tier, NvmeTier)]
    return tier


def slots_of_first(folder: Path) -> int:
    header = SegmentHeader.unpack(segments_of(folder)[0].read_bytes()[:PAGE])
    assert header is not None
    return header.slots


def fill(store: BlockStore, blocks: int, first: int = 0) -> None:
    for number in range(first, first + blocks):
        assert save(store, chain(number, 1)) == [Outcome.SAVED]


def prepared(store: BlockStore) -> int:
    return store.telemetry.value("prepared_segments_total", "nvme")


def kinds(store: BlockStore) -> list[str]:
    return [event.kind for event in store.telemetry.events()]


class Held(FileIO):
    """Holds one call back until released: `write` of zeros behind a header page, or `rename`."""

    def __init__(self, op: str) -> None:
        self._op = op
        self._go = threading.Event()
        self.met = threading.Event()

    def _hold(self, op: str) -> None:
        if op == self._op:
            self.met.set()
            assert self._go.wait(60)

    def release(self) -> None:
        self._op = ""
        self._go.set()

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        if len(views) == 1 and offset == PAGE:
            self._hold("write")
        return super().write(fd, views, offset)

    def rename(self, path: Path, to: Path) -> None:
        self._hold("rename")
        super().rename(path, to)


def test_the_next_segment_is_ready_when_one_is_half_full(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path, CAPACITY)) as store:
        fill(store, 1)
        slots = slots_of_first(tmp_path)
        fill(store, slots // 2 - 1, first=1)
        time.sleep(0.05)
        assert len(segments_of(tmp_path)) == 1, "nothing was foreseeable yet"
        fill(store, 3, first=100)
        eventually(lambda: prepared(store) == 1, "the next segment is not prepared")
        assert len(segments_of(tmp_path)) == 2
        assert store.telemetry.value("prepared_bytes_total", "nvme") == slots * (PAGE + 8192)
        eventually(lambda: "nvme prepared" in kinds(store), "no event says so")
        fill(store, 1, first=200)
        assert prepared(store) == 1, "one was to be kept ready"
        fill(store, slots * 8, first=300)
        check_quiet(store)
        assert bytes_on_medium(tmp_path) <= CAPACITY
        # Every planned slot is in use: what was prepared took nobody's room.
        assert store.status()[0].used_bytes == store.status()[0].capacity_bytes


def test_more_than_one_can_be_kept_ready(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path, CAPACITY, prepare_segments=3)) as store:
        fill(store, 2)
        eventually(lambda: prepared(store) == 2, "not prepared")
        fill(store, slots_of_first(tmp_path) - 3, first=10)
        eventually(lambda: prepared(store) == 3, "not prepared")
        assert len(segments_of(tmp_path)) == 4


@pytest.mark.parametrize("fields", [{"prepare": "no"}, {"direct_io": False}])
def test_nothing_is_prepared(fields: dict[str, object], tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path, CAPACITY, **fields)) as store:
        fill(store, 60)
        assert not [name for name in map(str, threading.enumerate()) if "prepare" in name]
        assert prepared(store) == 0


def test_small_segments_are_not_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "PREPARE_LEAST_BYTES", 4 * MIB)
    with open_store(nvme_tier(tmp_path, CAPACITY, prepare="all")) as store:
        assert segments_of(tmp_path) == []
        assert prepared(store) == 0


def test_all_are_prepared_and_stay_over_close(tmp_path: Path, io: FaultyIO) -> None:
    tier = nvme_tier(tmp_path, CAPACITY, prepare="all")
    with open_store(tier, file_io=io) as store:
        segments = len(tier_of(store)._segments)
        eventually(lambda: len(segments_of(tmp_path)) == segments, "not all are there")
        eventually(lambda: "nvme prepared" in kinds(store), "no event says so")
        assert prepared(store) == segments
        allocated = io.calls["allocate"]
        fill(store, 200)
        assert io.calls["allocate"] == allocated
        blocks = store.status()[0].blocks
        assert bytes_on_medium(tmp_path) <= CAPACITY
    assert bytes_on_medium(tmp_path) <= CAPACITY
    with open_store(tier) as store:
        report = store.status()[0].open_report
        assert report is not None and report.from_index and report.restored == blocks
        assert prepared(store) == 0
        assert load(store, chain(199, 1)) == [Outcome.LOADED]


def test_what_is_prepared_stays_after_a_crash(tmp_path: Path) -> None:
    store = open_store(nvme_tier(tmp_path, CAPACITY))
    fill(store, 15)
    eventually(lambda: prepared(store) == 1, "not prepared")
    store.flush()
    names = [path.name for path in segments_of(tmp_path)]
    store.close()
    (tmp_path / "index.kv").unlink()
    (tmp_path / "prepare-00000000000000aa.tmp").write_bytes(bytes(100_000))
    with open_store(nvme_tier(tmp_path, CAPACITY)) as store:
        report = store.status()[0].open_report
        assert report is not None and report.restored == 15 and report.dropped == {}
        assert [path.name for path in segments_of(tmp_path)] == names
        assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("op", ["open", "allocate", "write", "sync", "sync_folder"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_is_counted_and_harms_nobody(op: str, code: int, tmp_path: Path, io: FaultyIO) -> None:
    open_store(nvme_tier(tmp_path, CAPACITY)).close()
    with open_store(nvme_tier(tmp_path, CAPACITY, prepare="no"), file_io=io) as store:
        # As at open with prepare = "all", but with a disk that fails from then on only.
        tier = tier_of(store)
        fill(store, 3)
        io.fail(code, op)
        with pytest.raises(OSError) as caught:
            tier.prepare_all(lambda done, of: None)
        assert caught.value.errno == code
        io.heal()
        assert list(tmp_path.glob("*.tmp")) == [] and len(segments_of(tmp_path)) == 1
        fill(store, 30, first=10)
        assert len(segments_of(tmp_path)) == 2
        check_quiet(store)


def test_a_failing_disk_in_the_background(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path, CAPACITY), file_io=io, breaker_retry_seconds=0.01) as store:
        fill(store, 1)
        slots = slots_of_first(tmp_path)
        io.fail(errno.ENOSPC, "allocate")
        fill(store, slots - 1, first=1)
        errors = ("io_errors_total", "nvme", "prepare", "ENOSPC")
        eventually(lambda: store.telemetry.value(*errors) >= 1, "the error was not counted")
        eventually(lambda: "nvme cannot prepare" in kinds(store), "no event says so")
        assert store.status()[0].writable
        assert list(tmp_path.glob("*.tmp")) == []
        io.heal()
        eventually(lambda: save(store, chain(999, 1)) == [Outcome.SAVED], "it does not grow")
        check_quiet(store)


@pytest.mark.parametrize("op", ["write", "rename"])
def test_a_growing_tier_does_not_wait_for_what_hangs(op: str, tmp_path: Path) -> None:
    held = Held(op)
    try:
        with open_store(nvme_tier(tmp_path, CAPACITY), file_io=held) as store:
            fill(store, 1)
            slots = slots_of_first(tmp_path)
            fill(store, slots - 1, first=1)
            assert held.met.wait(60)
            fill(store, 3, first=100)
            assert bytes_on_medium(tmp_path) <= CAPACITY
            held.release()
            eventually(lambda: len(segments_of(tmp_path)) == 3, "the file that hung is lost")
            fill(store, 3 * slots, first=200)
            check_quiet(store)
            assert bytes_on_medium(tmp_path) <= CAPACITY
    finally:
        held.release()


def test_a_growing_tier_takes_a_file_that_is_being_written(tmp_path: Path) -> None:
    class Slow(FaultyIO):
        def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            if len(views) == 1 and offset >= PAGE:
                time.sleep(0.02)
            return super().write(fd, views, offset)

    io = Slow()
    layout = BlockLayout(60_000, 1)
    tier = nvme_tier(tmp_path, 80 * MIB, segment_bytes=10 * MIB)
    with open_store(tier, layout=layout, file_io=io) as store:
        fill_one = [save(store, chain(number, 1)) for number in range(160)]
        assert fill_one == [[Outcome.SAVED]] * 160
        eventually(lambda: not threads(), "the thread does not end")
        segments = len(segments_of(tmp_path))
        assert io.calls["allocate"] == segments
        assert list(tmp_path.glob("*.tmp")) == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "prepare" in thread.name]


@pytest.mark.parametrize("op", ["write", "rename"])
def test_closing_in_the_middle(op: str, tmp_path: Path) -> None:
    """The thread hangs: closing does not wait for it, and the folder is sound when the disk answers."""
    held = Held(op)
    try:
        with open_store(nvme_tier(tmp_path, CAPACITY), file_io=held) as store:
            fill(store, 15)
            assert held.met.wait(60)
        with open_store(nvme_tier(tmp_path, CAPACITY, prepare="no")) as store:
            assert list(tmp_path.glob("*.tmp")) == []
            held.release()
            eventually(lambda: not threads(), "the thread does not end")
            assert list(tmp_path.glob("*.tmp")) == []
            assert load(store, chain(3, 1)) == [Outcome.LOADED]
            fill(store, 300, first=100)
            assert bytes_on_medium(tmp_path) <= CAPACITY
            check_quiet(store)
    finally:
        held.release()


def test_the_last_segment_is_not_made_twice(tmp_path: Path) -> None:
    """It hangs half prepared, and there is no room for another one: its blocks wait, the bound holds."""
    tier = nvme_tier(tmp_path, CAPACITY, prepare="no")
    with open_store(tier) as store:
        segments = [segment.slots for segment in tier_of(store)._segments]
        fill(store, sum(segments[:-2]))
    held = Held("write")
    try:
        with open_store(nvme_tier(tmp_path, CAPACITY, prepare="all"), file_io=held) as store:
            assert held.met.wait(60)
            outcomes = [save(store, chain(number, 1))[0] for number in range(1000, 1000 + segments[-2])]
            assert bytes_on_medium(tmp_path) <= CAPACITY
            held.release()
            eventually(lambda: len(segments_of(tmp_path)) == len(segments), "the last ones are missing")
            assert bytes_on_medium(tmp_path) <= CAPACITY
            assert set(outcomes) <= {Outcome.SAVED, Outcome.IO_ERROR, Outcome.REJECTED}
            check_quiet(store)
    finally:
        held.release()


def test_segments_of_other_sizes_stay(tmp_path: Path) -> None:
    other = BlockLayout(20_000, 1)
    with open_store(nvme_tier(tmp_path, CAPACITY, prepare="no"), layout=other) as store:
        while len(segments_of(tmp_path)) < 5:
            fill(store, 1, first=len(segments_of(tmp_path)) * 1000 + store.status()[0].blocks)
    before = set(segments_of(tmp_path))
    with open_store(nvme_tier(tmp_path, CAPACITY, prepare="all")) as store:
        eventually(lambda: "nvme prepared" in kinds(store), "nothing was prepared")
        assert before < set(segments_of(tmp_path)), "a segment of another size had to go"
        assert bytes_on_medium(tmp_path) <= CAPACITY
        fill(store, 200)
        assert not before & set(segments_of(tmp_path)), "they were in the way"
        assert bytes_on_medium(tmp_path) <= CAPACITY


def test_prepare_all_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with open_store(memory_tier(4), nvme_tier(tmp_path, CAPACITY, prepare="no")) as store:
        tier = tier_of(store)
        report = tier.prepare_all(lambda done, of: told.append((done, of)))
        assert report.prepared == report.segments == len(segments_of(tmp_path)) == len(told)
        assert told[-1][0] == told[-1][1] == report.written_bytes
        size = sum(segment_size(segment.slots, 3 * PAGE) - PAGE for segment in tier._segments)
        assert report.written_bytes == size
        assert tier.prepare_all(lambda done, of: None).prepared == 0
        assert all(LAYOUT.block_bytes == 8192 and segment.fd >= 0 for segment in tier._segments)


def test_stopping_in_the_middle_keeps_what_is_done(tmp_path: Path) -> None:
    with open_store(nvme_tier(tmp_path, CAPACITY, prepare="no")) as store:

        def third(done: int, of: int) -> None:
            if len(segments_of(tmp_path)) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tier_of(store).prepare_all(third)
        assert list(tmp_path.glob("*.tmp")) == [] and len(segments_of(tmp_path)) == 2
        fill(store, 40)
        check_quiet(store)
    with open_store(nvme_tier(tmp_path, CAPACITY)) as store:
        report = store.status()[0].open_report
        assert report is not None and report.from_index and report.restored == 40
