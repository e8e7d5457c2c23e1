"""A shared folder that fails, hangs, goes away or holds strange things: misses and events, nothing else."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fs_kit import WRITES, FaultyMedium, events, open_shared, tier_of, wait_for_room

from faulty_io import FaultyIO
from kvstrata.config import StoreConfig
from kvstrata.errors import ConfigError
from kvstrata.store import BlockStore
from kvstrata.tiers.shared.format import EXTENTS, MEMBERS, SETTINGS_FILE, WRITING, ExtentId
from kvstrata.transfer.buffers import PAGE
from kvstrata.types import BlockKey, Lookup, Outcome
from store_kit import (
    WAIT_SECONDS,
    chain,
    check_quiet,
    descriptors,
    eventually,
    finished,
    load,
    overwrite,
    save,
    served,
)


def saved(store: BlockStore, keys: list[BlockKey]) -> None:
    """Save and publish."""
    while Outcome.REJECTED in save(store, keys):
        time.sleep(0.01)
    assert store.flush(WAIT_SECONDS)


def found(store: BlockStore, keys: list[BlockKey]) -> None:
    tier = tier_of(store)
    eventually(lambda: tier.table.lookup(keys) == [Lookup.HIT] * len(keys), "blocks are not found")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shared"


# The folder holds strange things


def test_foreign_and_half_things_in_the_folder(folder: Path) -> None:
    with open_shared(folder) as store:
        saved(store, chain(0, 10))
        for name in (
            "README",
            "extents/photo.jpg",
            "extents/" + "0" * 33,
            "members/note",
            "writing/x",
            "collector/y",
        ):
            (folder / name).write_text("not ours")
        (folder / EXTENTS / ExtentId(5, 5).word).write_bytes(b"half an extent" * 1000)
        strange = folder / MEMBERS / ("f" * 16)
        strange.mkdir()
        (strange / "beat").write_text("{")
        (strange / "journal-0").write_bytes(b"KVSTJRNL and then nothing of ours" * 10)
        (strange / "journal-x").write_bytes(b"")
        (folder / MEMBERS / ("e" * 16)).mkdir()
        with open_shared(folder, room=False) as other:
            found(other, chain(0, 10))
            saved(store, chain(1, 10))
            found(other, chain(1, 10))
            assert served(other, chain(0, 10)) == set(chain(0, 10))
        assert (folder / "README").exists() and (folder / "extents/photo.jpg").exists()


@pytest.mark.parametrize("cut", [0, 100, PAGE, PAGE + 5000, 5 * (PAGE + 8192)])
def test_an_extent_that_was_cut_off(folder: Path, cut: int) -> None:
    """What is still whole is served, the rest is a miss."""
    with open_shared(folder) as store:
        saved(store, chain(0, 10))
        [path] = (folder / EXTENTS).iterdir()
        os.truncate(path, cut)
        with open_shared(folder, room=False) as other:
            found(other, chain(0, 10))
            good = served(other, chain(0, 10))
            assert good == set(chain(0, 10)[: cut // (PAGE + 8192)])
            assert other.telemetry.value("misses_total", "shared_fs") == 10 - len(good)
            assert other.lookup(chain(0, 10)).states.count(Lookup.HIT) == len(good)
            saved(other, chain(0, 10))
            assert served(other, chain(0, 10)) == set(chain(0, 10))


def test_a_flipped_bit_and_bytes_of_another_place(folder: Path) -> None:
    with open_shared(folder) as store:
        saved(store, chain(0, 4))
        [path] = (folder / EXTENTS).iterdir()
        data, stride = path.read_bytes(), PAGE + 8192
        overwrite(path, 0, data[stride : 2 * stride])  # a whole slot, in the wrong place
        overwrite(path, 2 * stride + PAGE + 77, bytes([data[2 * stride + PAGE + 77] ^ 1]))
        with open_shared(folder, room=False) as other:
            found(other, chain(0, 4))
            assert served(other, chain(0, 4)) == {chain(0, 4)[1], chain(0, 4)[3]}
            assert other.telemetry.value("misses_total", "shared_fs", "corrupt_place") == 1
            assert other.telemetry.value("misses_total", "shared_fs", "corrupt_checksum") == 1
            assert tier_of(other).reads.closed


def test_settings_that_somebody_damaged_while_open(folder: Path) -> None:
    with open_shared(folder) as store:
        saved(store, chain(0, 4))
        (folder / SETTINGS_FILE).write_text("oops")
        saved(store, chain(1, 4))
        assert served(store, chain(0, 4)) == set(chain(0, 4))


# The medium answers errors


def test_no_room_on_the_disk(folder: Path) -> None:
    io = FaultyIO()
    with open_shared(folder, file_io=io) as store:
        saved(store, chain(0, 4))
        io.fail(errno.ENOSPC, "write")
        assert set(save(store, chain(1, 4))) == {Outcome.IO_ERROR}
        assert store.lookup(chain(1, 4)).blocks == 0
        eventually(
            lambda: set(save(store, chain(1, 4))) == {Outcome.UNAVAILABLE}, "a full disk is tried for ever"
        )
        assert store.telemetry.value("io_errors_total", "shared_fs", "write", "ENOSPC") >= 3
        assert not tier_of(store).writable and tier_of(store).readable
        assert served(store, chain(0, 4)) == set(chain(0, 4))
        io.heal()

        def back() -> bool:
            save(store, chain(2, 1))
            return tier_of(store).writable

        eventually(back, "writes do not come back")
        wait_for_room(store)
        saved(store, chain(1, 4))
        assert served(store, chain(1, 4)) == set(chain(1, 4))
        check_quiet(store)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_reads_that_fail(folder: Path, code: int) -> None:
    io = FaultyIO()
    with open_shared(folder) as writer:
        saved(writer, chain(0, 8))
        with open_shared(folder, file_io=io, room=False) as store:
            found(store, chain(0, 8))
            assert served(store, chain(0, 8)[:4]) == set(chain(0, 8)[:4])
            io.fail(code, "read")
            assert load(store, chain(0, 8)[:4]) == [Outcome.IO_ERROR] * 4
            assert tier_of(store).reads.closed == (code == errno.ESTALE)
            io.heal()

            def back() -> bool:
                store.lookup(chain(0, 8))
                return tier_of(store).readable

            eventually(back, "reads do not come back")
            assert served(store, chain(0, 8)[4:]) == set(chain(0, 8)[4:])
            check_quiet(store)


def test_a_journal_that_cannot_be_written_for_a_while(folder: Path) -> None:
    """The extent is there, its announcement waits."""
    medium = FaultyMedium(folder)
    with open_shared(folder, medium=medium) as store, open_shared(folder, room=False) as other:
        medium.fail(errno.EIO, "append")
        while Outcome.REJECTED in save(store, chain(0, 4)):
            time.sleep(0.01)
        eventually(lambda: "journal not written" in events(store), "the failure is not told")
        assert served(store, chain(0, 4)) == set(chain(0, 4)), "the writer reads what it wrote"
        assert other.lookup(chain(0, 4)).blocks == 0
        medium.heal()

        def told() -> bool:
            save(store, chain(1, 1))  # somebody has to ask whether writes work again
            return tier_of(other).table.lookup(chain(0, 4)) == [Lookup.HIT] * 4

        eventually(told, "the extent is never announced")
        assert served(other, chain(0, 4)) == set(chain(0, 4))


# The medium hangs


def test_a_folder_that_hangs_costs_one_deadline(folder: Path) -> None:
    medium = FaultyMedium(folder)
    with open_shared(folder) as other:
        saved(other, chain(0, 4))
        store = open_shared(folder, medium=medium, store={"io_deadline_seconds": 0.3, "close_seconds": 2.0})
        found(store, chain(0, 4))
        medium.hang()
        eventually(lambda: not tier_of(store).readable, "a hang is not noticed")
        assert store.lookup(chain(0, 4)).blocks == 0
        assert load(store, chain(0, 4)) == [Outcome.UNAVAILABLE] * 4
        # It cannot tell the others that it lives, so it soon writes nothing any more.
        numbers = itertools.count(100)
        eventually(
            lambda: set(save(store, chain(next(numbers), 2))) == {Outcome.REJECTED}, "it goes on writing"
        )
        assert served(other, chain(0, 4)) == set(chain(0, 4)), "the others go on"
        medium.heal()

        def back() -> bool:
            store.lookup(chain(0, 4))
            return tier_of(store).readable

        eventually(back, "the tier does not come back")
        found(store, chain(0, 4))
        assert served(store, chain(0, 4)) == set(chain(0, 4))
        store.close()


def test_closing_while_the_folder_hangs(folder: Path) -> None:
    medium = FaultyMedium(folder)
    store = open_shared(folder, medium=medium, store={"io_deadline_seconds": 60.0, "close_seconds": 1.0})
    saved(store, chain(0, 4))
    assert set(save(store, chain(1, 4))) == {Outcome.SAVED}
    medium.hang()
    eventually(lambda: medium.hung > 0, "nothing hangs")
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < WAIT_SECONDS / 2, "close waits for ever"
    medium.heal()
    with open_shared(folder, room=False) as late:
        assert served(late, chain(0, 4)) == set(chain(0, 4))


def test_a_file_that_hangs_when_it_is_opened(folder: Path) -> None:
    io = FaultyIO()
    with open_shared(folder) as other:
        saved(other, chain(0, 4))
        with open_shared(folder, file_io=io, room=False, store={"io_deadline_seconds": 0.3}) as store:
            found(store, chain(0, 4))
            io.hang("open")
            targets = [bytearray(8192) for _ in range(4)]
            transfer = store.load(store.lookup(chain(0, 4)), targets)
            assert finished(transfer) == [Outcome.LATE] * 4
            assert transfer.released, "nobody has touched the targets"
            eventually(lambda: not tier_of(store).readable, "a hang is not noticed")
            io.release("open")

            def back() -> bool:
                store.lookup(chain(0, 4))
                return tier_of(store).readable

            eventually(back, "the tier does not come back")
            assert served(store, chain(0, 4)) == set(chain(0, 4))
            check_quiet(store)


def test_opening_a_folder_that_hangs(folder: Path) -> None:
    with open_shared(folder) as other:
        saved(other, chain(0, 4))
        medium = FaultyMedium(folder)
        medium.hang()
        store = open_shared(folder, medium=medium, room=False, store={"io_deadline_seconds": 0.2})
        assert not tier_of(store).opened and store.lookup(chain(0, 4)).blocks == 0
        assert "cannot be opened" in store.status()[0].reason
        medium.heal()

        def back() -> bool:
            store.lookup(chain(0, 4))
            return tier_of(store).readable

        eventually(back, "the tier does not come back")
        found(store, chain(0, 4))
        assert served(store, chain(0, 4)) == set(chain(0, 4))
        store.close()


# Only for reading


def test_a_folder_that_may_only_be_read(folder: Path) -> None:
    with open_shared(folder) as other:
        saved(other, chain(0, 4))
        medium = FaultyMedium(folder)
        medium.fail(errno.EROFS, *WRITES)
        with open_shared(folder, medium=medium, room=False) as store:
            found(store, chain(0, 4))
            assert served(store, chain(0, 4)) == set(chain(0, 4))
            assert tier_of(store).readable and not tier_of(store).writable
            assert "cannot join" in store.status()[0].reason
            assert set(save(store, chain(1, 2))) == {Outcome.UNAVAILABLE}
            saved(other, chain(2, 4))
            found(store, chain(2, 4))
            medium.heal()

            def back() -> bool:
                save(store, chain(3, 1))
                return tier_of(store).writable

            eventually(back, "writes do not come")
            wait_for_room(store)
            saved(store, chain(1, 2))
            found(other, chain(1, 2))


@contextmanager
def bound(source: Path, target: Path, *options: str) -> Iterator[None]:
    """`source` mounted at `target` too; skips where that is not allowed."""
    target.mkdir(exist_ok=True)
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    done = subprocess.run(
        ["mount", "--bind", str(source), str(target)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    if options:
        subprocess.run(["mount", "-o", ",".join(["remount", "bind", *options]), str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], capture_output=True, check=False)


def test_a_real_mount_for_reading_only(folder: Path, tmp_path: Path) -> None:
    with open_shared(folder) as other:
        saved(other, chain(0, 4))
        with bound(folder, tmp_path / "ro", "ro"), open_shared(tmp_path / "ro", room=False) as store:
            found(store, chain(0, 4))
            assert served(store, chain(0, 4)) == set(chain(0, 4))
            assert not tier_of(store).writable and "Read-only file system" in store.status()[0].reason


def test_the_folder_is_unmounted_and_comes_back(folder: Path, tmp_path: Path) -> None:
    """An empty mount point must not be taken for a folder in which everything was collected."""
    target = tmp_path / "mounted"
    with open_shared(folder) as other:
        saved(other, chain(0, 4))
        with bound(folder, target):
            store = open_shared(target)
        # The mount is gone, the store is open.
        try:
            found_before = tier_of(store).table.resident_blocks
            eventually(lambda: not tier_of(store).readable, "the missing folder is not noticed")
            assert "is it mounted" in events(store)
            assert tier_of(store).table.resident_blocks == found_before == 4, "blocks were forgotten"
            assert list(target.iterdir()) == [], "something was written below the mount point"
            with bound(folder, target):

                def back() -> bool:
                    store.lookup(chain(0, 4))
                    save(store, chain(9, 1))
                    return tier_of(store).readable and tier_of(store).writable

                eventually(back, "the tier does not come back")
                assert served(store, chain(0, 4)) == set(chain(0, 4))
                wait_for_room(store)
                saved(store, chain(1, 4))
                found(other, chain(1, 4))
                store.close()
        finally:
            store.close()


# Bounds


def test_few_files_stay_open(folder: Path) -> None:
    with open_shared(folder) as writer:
        for number in range(12):
            saved(writer, chain(number, 2))
        with open_shared(folder, room=False, open_files=3, collect=False) as store:
            for _ in range(2):
                for number in range(12):
                    found(store, chain(number, 2))
                    assert served(store, chain(number, 2)) == set(chain(number, 2))
            eventually(lambda: len(tier_of(store)._files) <= 3, "more files stay open")
            mine = len(tier_of(store)._files) + len(tier_of(writer)._files)
            eventually(
                lambda: sum(n for name, n in descriptors().items() if str(folder) in name) <= mine,
                "files stay open that nobody knows",
            )
            check_quiet(store)
    left = [name for name in descriptors() if str(folder) in name]
    assert left == []


def test_without_a_collector_nothing_is_written(folder: Path) -> None:
    with open_shared(folder, room=False, collect=False) as store:
        assert set(save(store, chain(0, 3))) == {Outcome.REJECTED}
        assert store.telemetry.value("no_grant_blocks_total", "shared_fs") == 3
        with open_shared(folder):
            wait_for_room(store)
            saved(store, chain(0, 3))
            assert served(store, chain(0, 3)) == set(chain(0, 3))


def test_a_member_that_is_closed_leaves_no_part(folder: Path) -> None:
    with open_shared(folder) as store:
        while Outcome.REJECTED in save(store, chain(0, 3)):
            time.sleep(0.01)
    assert list((folder / WRITING).iterdir()) == []
    with open_shared(folder, room=False) as late:
        assert served(late, chain(0, 3)) == set(chain(0, 3))


def test_capacity_of_too_few_blocks(folder: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        open_shared(folder, capacity_bytes=2**20, store=None)
    assert StoreConfig().io_deadline_seconds > 0
