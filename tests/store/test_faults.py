"""Disks that are full, read-only, forbidden, broken or hanging: the store goes on, and says so.

The first part makes the file layer fail; the second uses real file systems and needs root.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from faulty_io import FaultyIO
from kvstrata.store import BlockStore
from kvstrata.tiers.nvme_format import INDEX_FILE, SEGMENT_GLOB
from kvstrata.transfer.buffers import Arena
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import Lookup, Outcome
from store_kit import (
    LAYOUT,
    WAIT_SECONDS,
    bytes_on_medium,
    chain,
    check_bytes,
    check_quiet,
    content,
    contents,
    descriptors,
    eventually,
    finished,
    load,
    memory_tier,
    nvme_tier,
    open_store,
    save,
    served,
)

CODES = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES]
QUICK = {"breaker_retry_seconds": 0.1, "io_deadline_seconds": 30.0, "close_seconds": 10.0}
"""Errors are answered at once: the deadline must not speak first."""
HANGS = {"breaker_retry_seconds": 0.1, "io_deadline_seconds": 0.3, "close_seconds": 0.3}
KEYS = chain(1, 8)
MORE = chain(2, 8)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts file systems, changes user")


def code_name(code: int) -> str:
    return errno.errorcode[code]


def events(store: BlockStore) -> list[str]:
    return [event.kind for event in store.telemetry.events()]


def saved_again(store: BlockStore, number: int = 500) -> bool:
    """Try to save a block nobody has saved yet."""
    tries = store.telemetry.value("lookups_total")
    store.lookup(KEYS)
    return save(store, chain(number + tries, 1)) == [Outcome.SAVED]


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    """Whatever a test left hanging is let go, so that its threads can end."""
    faulty = FaultyIO()
    yield faulty
    faulty.heal()
    faulty.release()


# Errors


@pytest.mark.parametrize("code", CODES, ids=code_name)
def test_writes_fail_and_come_back(code: int, tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=io, **QUICK) as store:
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        io.fail(code)
        for number in range(100, 110):
            assert save(store, chain(number, 4))[0] in (Outcome.IO_ERROR, Outcome.UNAVAILABLE)
        [status] = store.status()
        assert not status.writable and status.reason
        assert store.telemetry.value("io_errors_total", "nvme", "write", code_name(code)) >= 3
        assert store.telemetry.value("breaker_opened_total", "nvme", "write") >= 1
        assert store.telemetry.value("blocks_total", "save", "any", "unavailable") > 0
        assert "nvme write unavailable" in events(store)
        # A block that was not written is not there.
        io.fail(code, "write", "sync")
        assert store.lookup(chain(100, 4)).blocks == 0
        store.check_integrity()
        for _ in range(5):
            assert not saved_again(store)
        assert not store.status()[0].writable
        assert store.telemetry.value("probes_total", "nvme", "write", "good") == 0
        io.heal()
        eventually(lambda: saved_again(store), "the tier does not come back")
        assert store.status()[0].writable
        assert store.telemetry.value("probes_total", "nvme", "write", "good") == 1
        assert "nvme write available again" in events(store)
        assert save(store, MORE) == [Outcome.SAVED] * 8
        eventually(lambda: store.lookup(KEYS).blocks == 8, "reads do not come back")
        assert served(store, KEYS + MORE) == set(KEYS + MORE)
        check_quiet(store)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES], ids=code_name)
def test_reads_fail_and_come_back(code: int, tmp_path: Path, io: FaultyIO) -> None:
    with open_store(
        nvme_tier(tmp_path), file_io=io, breaker_failures=2, io_threads=1, io_store_threads=1, **QUICK
    ) as store:
        assert set(save(store, KEYS) + save(store, MORE)) == {Outcome.SAVED}
        io.fail(code, "read")
        outcomes = load(store, KEYS)
        assert set(outcomes) <= {Outcome.IO_ERROR, Outcome.UNAVAILABLE}
        assert not store.status()[0].readable
        # A tier that is out of service counts as empty.
        assert store.lookup(MORE).states == (Lookup.MISS,) * 8
        assert load(store, MORE) == [Outcome.UNAVAILABLE] * 8
        assert store.telemetry.value("misses_total", "any", "unavailable") >= 8
        assert store.telemetry.value("io_errors_total", "nvme", "read", code_name(code)) >= 2
        assert "nvme read unavailable" in events(store)
        # A medium that cannot be read is still written to: the probe of each way is its own.
        assert save(store, chain(3, 2)) == [Outcome.SAVED] * 2
        io.heal()
        eventually(lambda: store.lookup(MORE).blocks == 8, "the tier does not come back")
        assert served(store, MORE) == set(MORE)
        assert store.telemetry.value("probes_total", "nvme", "read", "good") == 1
        store.check_integrity()


def test_failing_reads_of_nvme_do_not_touch_memory(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(memory_tier(16), nvme_tier(tmp_path), file_io=io, **QUICK) as store:
        save(store, KEYS)
        assert store.flush()
        io.fail(errno.EIO)
        assert load(store, KEYS) == [Outcome.LOADED] * 8
        for number in range(10, 30):
            assert save(store, chain(number, 4)) == [Outcome.SAVED] * 4
            assert load(store, chain(number, 4)) == [Outcome.LOADED] * 4
        memory, nvme = store.status()
        assert memory.readable and memory.writable and not nvme.writable
        assert store.telemetry.value("blocks_total", "write_back", "nvme", "unavailable") > 0
        io.heal()

        def written_back() -> bool:
            keys = chain(1000 + store.telemetry.value("lookups_total"), 4)
            store.lookup(keys)
            save(store, keys)
            store.flush()
            return store.tiers[1].table.lookup(keys) == [Lookup.HIT] * 4

        eventually(written_back, "the tier below does not come back")
        store.check_integrity()


def test_the_disk_is_full_before_the_first_segment(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=io, **QUICK) as store:
        io.fail(errno.ENOSPC, "allocate")
        assert Outcome.SAVED not in save(store, KEYS)
        assert not store.status()[0].writable
        assert list(tmp_path.glob(SEGMENT_GLOB)) == []
        assert store.telemetry.value("io_errors_total", "nvme", "grow", "ENOSPC") >= 1
        io.heal()
        eventually(lambda: saved_again(store), "the tier does not come back")
        eventually(lambda: set(save(store, KEYS)) <= {Outcome.SAVED, Outcome.PRESENT}, "no room")
        eventually(lambda: served(store, KEYS) == set(KEYS), "what was saved is not there")
        store.check_integrity()


def test_the_disk_is_full_after_some_segments(tmp_path: Path, io: FaultyIO) -> None:
    """What there is goes on working, with a smaller bound; later the rest is tried again."""
    with open_store(nvme_tier(tmp_path), file_io=io, **QUICK) as store:
        assert save(store, KEYS) == [Outcome.SAVED] * 8
        report = store.status()[0].open_report
        assert report is not None
        whole = store.status()[0].capacity_bytes
        io.fail(errno.ENOSPC, "allocate")
        for number in range(10, 10 + report.slots):
            save(store, chain(number, 3))
        status = store.status()[0]
        assert status.writable and status.readable
        assert status.capacity_bytes < whole
        assert store.telemetry.value("evictions_total", "nvme") > 0
        # The latest blocks are in the segment that there is.
        last = chain(9000, 3)
        eventually(lambda: set(save(store, last)) <= {Outcome.SAVED, Outcome.PRESENT}, "no slot is left")
        assert served(store, last) == set(last)
        store.check_integrity()
        io.heal()

        def grown() -> bool:
            saved_again(store)
            return store.status()[0].capacity_bytes == whole

        eventually(grown, "the withdrawn slots do not come back")
        for number in range(10_000, 10_000 + report.slots):
            save(store, chain(number, 1))
        assert len(served(store, [chain(n, 1)[0] for n in range(10_000, 10_000 + report.slots)])) > 0.9 * (
            report.slots
        )
        store.check_integrity()


class BadSector(FileIO):
    """One place of the disk cannot be written."""

    def __init__(self) -> None:
        self.offset = -1
        self.met = 0

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset > 0 and self.offset < 0:
            self.offset = offset
        if offset == self.offset:
            self.met += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(fd, views, offset)


def test_one_bad_sector_is_not_tried_over_and_over(tmp_path: Path) -> None:
    io = BadSector()
    config = nvme_tier(tmp_path, 400_000)
    with open_store(config, file_io=io, breaker_retry_seconds=3600.0) as store:
        outcomes = [save(store, chain(number, 1))[0] for number in range(100)]
        segments = len(list(tmp_path.glob(SEGMENT_GLOB)))
        # Each segment has this place once; each is met once, and then left alone.
        assert outcomes.count(Outcome.IO_ERROR) == io.met == segments
        assert outcomes.count(Outcome.SAVED) == 100 - segments
        assert outcomes[-20:] == [Outcome.SAVED] * 20
        store.check_integrity()
        assert bytes_on_medium(tmp_path) <= config.capacity_bytes


class TornWrite(FileIO):
    """A write that fails half way, as one does when the power of the disk goes."""

    def __init__(self) -> None:
        self.tear = False

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        if self.tear and len(views) == 2:
            super().write(fd, [views[0], views[1][:4096]], offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(fd, views, offset)


def test_a_torn_write_is_never_served(tmp_path: Path) -> None:
    io = TornWrite()
    config = nvme_tier(tmp_path, 400_000)
    with open_store(config, file_io=io, breaker_failures=100) as store:
        for number in range(50):
            save(store, chain(number, 1))
        io.tear = True
        torn = chain(100, 2)
        assert save(store, torn) == [Outcome.IO_ERROR] * 2
        assert store.lookup(torn).blocks == 0
        assert load(store, torn) == [Outcome.ABSENT] * 2
    (tmp_path / INDEX_FILE).unlink()
    with open_store(config, file_io=io) as store:
        # The header is whole, the payload is not: only reading can tell.
        assert set(load(store, torn)) <= {Outcome.CORRUPT, Outcome.ABSENT}
        served(store, [chain(number, 1)[0] for number in range(50)])


def test_a_foreign_segment_that_cannot_be_removed_still_counts(tmp_path: Path, io: FaultyIO) -> None:
    from kvstrata.types import BlockLayout

    config = nvme_tier(tmp_path, 1_000_000)
    with open_store(config, layout=BlockLayout(40_000, 1)) as store:
        for number in range(40):
            save(store, chain(number, 1))
    with open_store(config, file_io=io, **QUICK) as store:
        io.fail(errno.EIO, "remove")
        for number in range(200):
            save(store, chain(number, 1))
            assert bytes_on_medium(tmp_path) <= config.capacity_bytes
        io.heal()
        eventually(lambda: saved_again(store), "the tier does not come back")
        for number in range(200):
            save(store, chain(number, 1))
            assert bytes_on_medium(tmp_path) <= config.capacity_bytes
        store.check_integrity()


def test_an_own_leftover_that_cannot_be_removed_still_counts(tmp_path: Path, io: FaultyIO) -> None:
    """Making a segment fails half way, and so does taking it away again."""
    config = nvme_tier(tmp_path, 600_000)
    with open_store(config, file_io=io, **(QUICK | {"breaker_retry_seconds": 0.01})) as store:
        io.fail(errno.EIO, "sync", "remove")
        for _ in range(30):
            saved_again(store)
        io.fail(errno.EIO, "write", "remove")
        for _ in range(30):
            saved_again(store)
        assert len(list(tmp_path.glob(SEGMENT_GLOB))) >= 1
        assert bytes_on_medium(tmp_path) <= config.capacity_bytes
        io.heal()
        for number in range(100):
            save(store, chain(number, 2))
            assert bytes_on_medium(tmp_path) <= config.capacity_bytes


# Opening


def test_a_folder_that_cannot_be_opened_starts_out_of_service(tmp_path: Path) -> None:
    folder = tmp_path / "not-a-folder" / "cache"
    folder.parent.write_text("in the way")
    with open_store(nvme_tier(folder), **QUICK) as store:
        [status] = store.status()
        assert not (status.opened or status.readable or status.writable)
        assert "cannot be opened" in status.reason
        assert status.open_report is None
        assert store.lookup(KEYS).blocks == 0
        assert save(store, KEYS) == [Outcome.UNAVAILABLE] * 8
        assert load(store, KEYS) == [Outcome.UNAVAILABLE] * 8
        assert store.discard(KEYS) == 0
        store.touch(KEYS)
        assert store.flush()
        store.check_integrity()
        assert store.telemetry.value("io_errors_total", "nvme", "open") >= 1
        folder.parent.unlink()
        eventually(lambda: saved_again(store), "the tier does not come back")
        assert store.status()[0].open_report is not None

        def readable() -> bool:
            store.lookup(KEYS)
            return store.status()[0].readable

        eventually(readable, "reads do not come back")
        save(store, KEYS)
        assert served(store, KEYS) == set(KEYS)
    with open_store(nvme_tier(folder), **QUICK) as store:
        assert served(store, KEYS) == set(KEYS)


@pytest.mark.parametrize("op", ["write_file", "open", "read", "sync_folder"])
def test_an_error_at_opening_is_tried_again(op: str, tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path)) as store:
        save(store, KEYS)
    (tmp_path / INDEX_FILE).unlink()
    if op == "write_file":
        (tmp_path / "kvstrata.json").unlink()
    io.fail(errno.EIO, op)
    before = descriptors().total()
    with open_store(nvme_tier(tmp_path), file_io=io, **QUICK) as store:
        assert not store.status()[0].opened
        probes = store.telemetry.value("probes_total", "nvme")

        def probed() -> bool:
            store.lookup(KEYS)
            return store.telemetry.value("probes_total", "nvme") > probes + 4

        eventually(probed, "nobody asks the folder again")
        assert descriptors().total() <= before + 2, "failed openings leak descriptors"
        io.heal()
        eventually(lambda: store.lookup(KEYS).blocks == 8, "the tier does not come back")
        assert served(store, KEYS) == set(KEYS)


# Hanging


def targets(count: int) -> list[memoryview]:
    """Aligned targets, which a direct read fills without a bounce buffer."""
    arena = Arena(count * LAYOUT.block_bytes)
    return [arena.view[n * LAYOUT.block_bytes :][: LAYOUT.block_bytes] for n in range(count)]


def test_a_hanging_read_costs_its_deadline(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=io, **HANGS) as store:
        save(store, KEYS)
        io.hang("read")
        views = targets(8)
        transfer = store.load(store.lookup(KEYS), views)
        io.wait_hanging("read", 8)
        eventually(transfer.poll, "the deadline does not cut the load off")
        assert transfer.outcomes == [Outcome.LATE] * 8
        assert not transfer.released, "a hanging thread may still write to the targets"
        assert not transfer.wait_released(0.01)
        assert store.telemetry.value("misses_total", "any", "late") == 8
        # From here on nobody waits any more.
        assert not store.status()[0].readable
        assert "no answer" in store.status()[0].reason
        assert store.lookup(KEYS).blocks == 0
        assert load(store, KEYS) == [Outcome.UNAVAILABLE] * 8
        assert store.tiers[0].table.pinned_blocks() == 8
        assert not transfer.released
        io.release()
        assert transfer.wait_released(WAIT_SECONDS)
        assert transfer.outcomes == [Outcome.LATE] * 8, "a verdict does not change"
        eventually(lambda: store.lookup(KEYS).blocks == 8, "the tier does not come back")
        assert served(store, KEYS) == set(KEYS)
        check_quiet(store)


def test_a_hanging_nvme_leaves_memory_its_threads(tmp_path: Path, io: FaultyIO) -> None:
    """More reads and writes hang than there are threads; what memory has is still served and saved."""
    with open_store(
        memory_tier(12), nvme_tier(tmp_path), file_io=io, **(HANGS | {"io_deadline_seconds": 5.0})
    ) as store:
        old = [key for number in range(10, 22) for key in chain(number, 3)]
        for number in range(10, 22):
            save(store, chain(number, 3))
            assert store.flush()  # what is still being written back cannot leave memory
        io.hang("read", "write")
        below = [key for key in old if store.tiers[0].table.lookup([key]) == [Lookup.MISS]]
        hanging = [store.load(store.lookup([key]), [bytearray(8192)]) for key in below]
        assert len(hanging) > 16
        io.wait_hanging("read", 8)
        here = chain(21, 3)
        assert load(store, here) == [Outcome.LOADED] * 3
        fresh = chain(700, 3)
        assert save(store, fresh) == [Outcome.SAVED] * 3
        assert load(store, fresh) == [Outcome.LOADED] * 3
        io.release()
        for transfer in hanging:
            assert finished(transfer)[0] in (Outcome.LOADED, Outcome.LATE)
        check_quiet(store)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("op", ["write", "sync", "allocate"])
def test_a_hanging_write_never_stores_changed_bytes(
    op: str, direct: bool, tmp_path: Path, io: FaultyIO
) -> None:
    """After LATE the caller does with its buffer what it likes, and then the hang ends."""
    config = nvme_tier(tmp_path, direct_io=direct, sync="always")
    with open_store(config, file_io=io, **HANGS) as store:
        if op != "allocate":
            save(store, MORE[:1])
        io.hang(op)
        sources = targets(8)
        for source, data in zip(sources, contents(KEYS), strict=True):
            source[:] = data
        transfer = store.save(KEYS, sources)
        io.wait_hanging(op)
        eventually(transfer.poll, "the deadline does not cut the save off")
        assert transfer.outcomes == [Outcome.LATE] * 8
        assert store.lookup(KEYS).blocks == 0
        # The operation began after the transfer, and has the deadline's time from there.
        eventually(lambda: not store.status()[0].writable, "a hang takes the tier out of service")
        assert save(store, chain(3, 1)) == [Outcome.UNAVAILABLE]
        for source in sources:
            source[:] = b"\xee" * len(source)
        io.release()
        assert transfer.wait_released(WAIT_SECONDS)
        assert store.lookup(KEYS).blocks == 0
        assert Outcome.LOADED not in load(store, KEYS)
        eventually(lambda: saved_again(store), "the tier does not come back")
        check_quiet(store)
    (tmp_path / INDEX_FILE).unlink()
    with open_store(config) as store:
        # A scan may find the slots that were written late: the right bytes, or nothing.
        served(store, KEYS)
        save(store, KEYS)
        assert served(store, KEYS) == set(KEYS)


def test_a_hang_below_a_write_through_costs_the_deadline(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(
        memory_tier(16), nvme_tier(tmp_path, write_mode="through"), file_io=io, **HANGS
    ) as store:
        save(store, MORE)
        io.hang("write")
        sources = [bytearray(data) for data in contents(KEYS)]
        transfer = store.save(KEYS, sources)
        io.wait_hanging("write")
        eventually(transfer.poll, "the deadline does not cut the save off")
        assert set(transfer.outcomes) <= {Outcome.LATE, Outcome.UNAVAILABLE}
        assert load(store, MORE) == [Outcome.LOADED] * 8
        for source in sources:
            source[:] = b"\xee" * len(source)
        io.release()
        assert transfer.wait_released(WAIT_SECONDS)
        # Memory got its copy before the hang, with the right bytes; nvme must not have the others.
        served(store, KEYS)
        store.check_integrity()
    (tmp_path / INDEX_FILE).unlink()
    with open_store(nvme_tier(tmp_path)) as store:
        served(store, KEYS)


def test_save_does_not_wait_for_a_hanging_disk(tmp_path: Path, io: FaultyIO) -> None:
    """By the order of events: save() has returned before anything was let go."""
    with open_store(nvme_tier(tmp_path), file_io=io, **(HANGS | {"io_deadline_seconds": 30.0})) as store:
        io.hang("open", "allocate", "write", "sync")
        returned = threading.Event()
        transfers = []

        def caller() -> None:
            transfers.extend(
                store.save(chain(number, 4), contents(chain(number, 4))) for number in range(9)
            )
            returned.set()

        thread = threading.Thread(target=caller, daemon=True)
        thread.start()
        assert returned.wait(WAIT_SECONDS), "save() waited for the disk"
        assert sum(io.hanging.values()) > 0 or not any(transfer.poll() for transfer in transfers)
        io.release()
        thread.join(WAIT_SECONDS)
        for number, transfer in enumerate(transfers):
            assert finished(transfer) == [Outcome.SAVED] * 4
            assert served(store, chain(number, 4)) == set(chain(number, 4))


def ends(work: Callable[[], object]) -> bool:
    """Does a call return while the disk still hangs?"""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    return not thread.is_alive()


@pytest.mark.parametrize("op", ["read", "write", "sync", "allocate", "write_file"])
def test_close_does_not_wait_for_a_hanging_disk(op: str, tmp_path: Path, io: FaultyIO) -> None:
    store = open_store(nvme_tier(tmp_path), file_io=io, **HANGS)
    if op != "allocate":
        save(store, KEYS)
    io.hang(op)
    buffers = contents(MORE)
    if op == "read":
        store.load(store.lookup(KEYS), [bytearray(8192) for _ in KEYS])
    else:
        store.save(MORE, buffers)
    assert ends(store.close), "close() hangs"
    # The claim is given up: the folder can be opened, and its good blocks are served.
    with open_store(nvme_tier(tmp_path)) as again:
        if op != "allocate":
            assert served(again, KEYS) == set(KEYS)
        # The old threads end only now, with the folder in other hands.
        io.release()
        served(again, KEYS + MORE)
        save(again, KEYS + MORE)
        eventually(lambda: sum(io.hanging.values()) == 0, "the old threads do not end")
        served(again, KEYS + MORE)
        again.check_integrity()
    with open_store(nvme_tier(tmp_path)) as again:
        served(again, KEYS + MORE)
        save(again, KEYS + MORE)
        assert served(again, KEYS + MORE) == set(KEYS + MORE)


def test_flush_does_not_wait_for_a_hanging_disk(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=io, **HANGS) as store:
        save(store, KEYS)
        assert store.flush()
        save(store, MORE)
        io.hang("sync")
        before = threading.active_count()
        results: list[bool] = []
        for _ in range(5):
            assert ends(lambda: results.append(store.flush(0.1))), "flush() hangs"
        assert results == [False] * 5
        assert threading.active_count() <= before + 1
        io.release()
        eventually(store.flush, "flush does not recover")


def test_a_failed_sync_is_not_reported_as_flushed(tmp_path: Path, io: FaultyIO) -> None:
    with open_store(nvme_tier(tmp_path), file_io=io) as store:
        save(store, KEYS)
        io.fail(errno.EIO, "sync")
        assert not store.flush()
        assert not store.flush(), "the second flush forgot what the first could not do"
        assert "flush failed" in events(store)
        io.heal()
        assert store.flush()


def test_close_while_a_reopening_hangs(tmp_path: Path, io: FaultyIO) -> None:
    """The tier could not be opened, somebody tries again, that hangs, and then the engine stops."""
    io.fail(errno.EIO, "open")
    store = open_store(nvme_tier(tmp_path), file_io=io, **HANGS)
    io.heal()
    io.hang("open")

    def tried() -> bool:
        store.lookup(KEYS)
        return io.hanging["open"] > 0

    eventually(tried, "nobody tries to open the folder again")
    assert ends(store.close), "close() hangs"
    io.release()
    eventually(lambda: io.hanging["open"] == 0, "the opening thread does not end")

    def free() -> bool:
        from kvstrata.errors import FolderLockedError

        try:
            open_store(nvme_tier(tmp_path)).close()
        except FolderLockedError:
            return False
        return True

    eventually(free, "a closed store keeps the folder")


# Real file systems


@contextlib.contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    where.mkdir()
    done = subprocess.run(["mount", *arguments, str(where)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as where:
        yield where


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(24 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    with mounted(tmp_path / "ext4", "-o", "loop", str(image)) as where:
        yield where


def fill_up(folder: Path) -> Path:
    """Another program's file takes all the room there is."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (2**16, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return path


def endure(store: BlockStore, chains: range) -> None:
    """Save and load as an engine does; only the outcomes may be bad."""
    for number in chains:
        save(store, chain(number, 3))
        served(store, chain(number, 3))
    store.check_integrity()


@needs_root
def test_tmpfs_smaller_than_the_capacity(tmpfs: Path) -> None:
    with open_store(nvme_tier(tmpfs / "cache", 16 * 2**20), **QUICK) as store:
        endure(store, range(300))
        assert store.telemetry.value("io_errors_total", "nvme", "grow", "ENOSPC") >= 1
        last = chain(5000, 3)
        eventually(
            lambda: set(save(store, last)) <= {Outcome.SAVED, Outcome.PRESENT}, "nothing can be saved"
        )
        assert served(store, last) == set(last)
        assert store.flush()


@needs_root
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restart"])
def test_a_full_ext4_and_room_again(ext4: Path, restart: bool) -> None:
    config = nvme_tier(ext4 / "cache", 12 * 2**20)
    store = open_store(config, **QUICK)
    try:
        save(store, KEYS)
        assert store.flush()
        filler = fill_up(ext4)
        if restart:
            # The index finds no room, and the next run serves what is there all the same.
            store.close()
            store = open_store(config, **QUICK)
            assert store.status()[0].readable
        assert served(store, KEYS) == set(KEYS)
        endure(store, range(10, 300))
        assert store.status()[0].readable
        assert store.telemetry.value("io_errors_total", "nvme", "grow", "ENOSPC") >= 1
        assert bytes_on_medium(ext4 / "cache") <= config.capacity_bytes
        filler.unlink()
        whole = store.status()[0].open_report
        assert whole is not None

        def grown() -> bool:
            endure(store, range(1000, 1003))
            return store.status()[0].capacity_bytes == whole.slots * store.tiers[0].table.slot_bytes

        eventually(grown, "the tier does not grow again")
        endure(store, range(2000, 2000 + whole.slots // 3))
        assert store.status()[0].blocks > whole.slots * 0.8
        assert bytes_on_medium(ext4 / "cache") <= config.capacity_bytes
    finally:
        store.close()


def remount(where: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(where)], check=True)


@needs_root
def test_a_folder_that_is_read_only_at_the_start(ext4: Path) -> None:
    config = nvme_tier(ext4 / "cache")
    with open_store(config) as store:
        save(store, KEYS)
    remount(ext4, "ro")
    with open_store(memory_tier(16), config, **QUICK) as store:
        assert not store.status()[1].opened
        assert store.telemetry.value("io_errors_total", "nvme", "open", "EROFS") >= 1
        endure(store, range(10, 20))
        remount(ext4, "rw")

        def back() -> bool:
            return store.lookup(KEYS).blocks == 8

        eventually(back, "the tier does not come back")
        assert served(store, KEYS) == set(KEYS)


EXT4_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN of linux/fs/ext4/ext4.h, flag 2: no log flush
NO_LOG_FLUSH = 2


@needs_root
def test_a_file_system_that_dies(ext4: Path) -> None:
    """The kernel gives a real file system up while the store uses it: every call fails from then on."""
    with open_store(memory_tier(8), nvme_tier(ext4 / "cache"), **QUICK) as store:
        save(store, KEYS)
        assert store.flush()
        fd = os.open(ext4, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        except OSError as error:
            pytest.skip(f"this kernel does not shut an ext4 down: {error}")
        finally:
            os.close(fd)
        endure(store, range(10, 60))
        memory, nvme = store.status()
        assert memory.readable and memory.writable
        assert not nvme.writable
        assert store.telemetry.value("io_errors_total", "nvme") >= 1
        assert store.telemetry.value("breaker_opened_total", "nvme", "write") >= 1
        endure(store, range(60, 80))
    # Closing had nowhere to put the index, and did not mind.


FORBIDDEN = """
import os, sys
from pathlib import Path
from store_kit import chain, load, nvme_tier, open_store, save, served, eventually, memory_tier
folder = Path(sys.argv[1])
# Everything is imported and opened as root would: only then the rights go.
keys = chain(1, 8)
with open_store(memory_tier(8), nvme_tier(folder.parent / "warm")) as store:
    save(store, keys)
    assert load(store, keys)
os.setgid(65534)
os.setuid(65534)
with open_store(memory_tier(8), nvme_tier(folder), breaker_retry_seconds=0.1) as store:
    assert not store.status()[1].opened, store.status()
    assert store.telemetry.value("io_errors_total", "nvme", "open", "EACCES") >= 1
    for number in range(10, 20):
        save(store, chain(number, 4))
        assert served(store, chain(number, 4)) == set(chain(number, 4))
    print("forbidden", flush=True)
    sys.stdin.readline()
    eventually(lambda: store.lookup(keys).blocks == 8, "the tier does not come back")
    assert served(store, keys) == set(keys)
print("back", flush=True)
"""


@needs_root
def test_permission_denied_and_granted(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with open_store(nvme_tier(folder)) as store:
        save(store, KEYS)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and not path.stat().st_mode & 0o001 and len(path.parts) > 2:
            path.chmod(path.stat().st_mode | 0o011)
    here = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", FORBIDDEN, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here)},
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        folder.chmod(0o700)
        first = child.stdout.readline()
        if first:
            for path in (folder, *folder.iterdir()):
                os.chown(path, 65534, 65534)
            folder.chmod(0o755)
        out, err = child.communicate("go\n", timeout=WAIT_SECONDS)
        assert first == "forbidden\n", err
        assert out == "back\n", err
        assert child.returncode == 0


def test_the_check_of_this_file_can_fail(tmp_path: Path) -> None:
    """What all of these tests rest on: a wrong byte in a target is seen."""
    [key] = chain(0, 1)
    good = bytearray(content(key))
    check_bytes([key], [good], [Outcome.LOADED])
    good[17] ^= 1
    with pytest.raises(AssertionError, match="wrong bytes"):
        check_bytes([key], [good], [Outcome.LOADED])
