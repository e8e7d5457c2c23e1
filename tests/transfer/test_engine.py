"""The I/O engine on real files, in both of its ways, and against a slow plain model."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from engine_kit import (
    FILE_KINDS,
    SEGMENT,
    SPACE,
    WAIT_SECONDS,
    Heard,
    Memory,
    SlotFile,
    bytes_of,
    checksum_of,
    key_of,
    make_engine,
    needs,
    run,
    write_all,
)

from faulty_io import FaultyIO
from kvstrata.tiers.nvme_format import SlotHeader
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, Buffers
from kvstrata.transfer.engine import Batch, Engine, Kind, Rows
from kvstrata.transfer.file_io import FileIO
from kvstrata.transfer.slot_header import (
    GOOD,
    WRONG_CHECKSUM,
    WRONG_HEADER,
    WRONG_KEY,
    WRONG_LENGTH,
    WRONG_PLACE,
)
from store_kit import descriptors, eventually, overwrite

KIB = 1024


@pytest.fixture(params=FILE_KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return needs(request.param)


@pytest.fixture
def io() -> Iterator[FaultyIO]:
    """Whatever a test left hanging is let go, so that its threads can end."""
    faulty = FaultyIO()
    yield faulty
    faulty.heal()
    faulty.release()


@contextlib.contextmanager
def closing(engine: Engine) -> Iterator[Engine]:
    """Closed without a trace at the end of a with-block that went well."""
    yield engine
    assert engine.drain(WAIT_SECONDS)
    assert engine.queued == (0, 0)
    assert engine.close(WAIT_SECONDS)


def results(rows: Rows) -> list[int]:
    return rows[:, k.RESULT].tolist()


# Bytes


SIZES = [1, 4095, 4096, 4097, 8192, 65_536, 100_001]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_round_trips_of_every_size_and_alignment(kind: Kind, direct: bool, tmp_path: Path) -> None:
    for size in SIZES:
        file = SlotFile(tmp_path / f"{size}", 6, size, direct=direct)
        with closing(file.engine(kind)) as engine:
            for shift, back in ((0, 0), (3, 0), (0, 512), (4095, 1)):
                source, target = Memory(6, size, shift), Memory(6, size, back)
                sums = write_all(file, engine, source, shift)
                assert sums == [checksum_of(source.view(n)) for n in range(6)]
                rows = file.rows(k.READ, range(6), target.addresses(range(6)), checksums=sums)
                done = run(engine, rows, loads=True)
                assert results(done) == [GOOD] * 6
                assert (done[:, k.ENDED_NS] >= done[:, k.BEGAN_NS]).all()
                for number in range(6):
                    assert target.view(number) == source.view(number)
                    assert file.header(number) == SlotHeader(
                        key_of(number), SPACE, SEGMENT, number, size, sums[number] % 2**64,
                        number + 1000, 17, number,
                    )  # fmt: skip
        os.close(file.fd)


def test_nothing_beyond_a_target_is_touched(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 1, 5000)
    around = Arena(4 * PAGE)
    with closing(file.engine(kind)) as engine:
        sums = write_all(file, engine, Memory(1, 5000))
        for shift in (PAGE, PAGE + 7):
            around.view[:] = b"\xa5" * len(around.view)
            address = int(Buffers.of([around.view], writable=True).addresses[0]) + shift
            done = run(engine, file.rows(k.READ, [0], [address], checksums=sums), loads=True)
            assert results(done) == [GOOD]
            assert around.view[shift : shift + 5000] == bytes_of((0, 0), 5000)
            assert around.view[:shift] == b"\xa5" * shift
            assert set(around.view[shift + 5000 :]) == {0xA5}


def test_a_block_shorter_than_its_slot(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 4, 16 * KIB)
    with closing(file.engine(kind)) as engine:
        for length in (1, 4096, 5000, 12_288):
            source, target = Memory(4, length), Memory(4, length)
            for number in range(4):
                source.view(number)[:] = bytes_of((length, number), length)
            rows = file.rows(k.WRITE, range(4), source.addresses(range(4)), length)
            sums = run(engine, rows, loads=False)[:, k.CHECKSUM]
            rows = file.rows(k.READ, range(4), target.addresses(range(4)), length, checksums=sums)
            assert results(run(engine, rows, loads=True)) == [GOOD] * 4
            assert all(target.view(n) == source.view(n) for n in range(4))
            assert engine.counts.merged == 0, "there is a gap between them"


# Neighbours


@pytest.mark.parametrize("order", ["chain", "reversed", "random"])
def test_neighbours_move_together(kind: Kind, order: str, tmp_path: Path) -> None:
    slots, size = 24, 16 * KIB
    file = SlotFile(tmp_path / "file", slots, size)
    numbers = list(range(slots))
    if order == "reversed":
        numbers.reverse()
    elif order == "random":
        random.Random(3).shuffle(numbers)
    pairs = sum(b == a + 1 for a, b in itertools.pairwise(numbers))
    assert (order == "chain") == (pairs == slots - 1) and (order == "reversed") == (pairs == 0)
    source, target = Memory(slots, size), Memory(slots, size)
    for number in range(slots):
        source.view(number)[:] = bytes_of(number, size)
    with closing(file.engine(kind)) as engine:
        done = run(engine, file.rows(k.WRITE, numbers, source.addresses(numbers)), loads=False)
        assert results(done) == [GOOD] * slots
        assert engine.counts.merged == pairs
        assert engine.counts.stores == slots - pairs and engine.counts.loads == 0
        rows = file.rows(k.READ, numbers, target.addresses(numbers), checksums=done[:, k.CHECKSUM])
        assert results(run(engine, rows, loads=True)) == [GOOD] * slots
        assert engine.counts.merged == 2 * pairs
        assert engine.counts.loads == slots - pairs
    assert all(target.view(n) == source.view(n) for n in range(slots))
    assert all(file.payload(n) == source.view(n) for n in range(slots))


def test_a_unit_is_bounded(kind: Kind, tmp_path: Path) -> None:
    slots = 2 * k.UNIT_BLOCKS
    file = SlotFile(tmp_path / "file", slots, PAGE)
    memory = Memory(slots, PAGE)
    for merge_bytes, units in ((2 << 20, 2), (16 * PAGE, slots // 8), (2 * PAGE, slots), (0, slots)):
        with closing(file.engine(kind, merge_bytes=merge_bytes)) as engine:
            write_all(file, engine, memory, merge_bytes)
            assert engine.counts.stores == units
            assert engine.counts.merged == slots - units
        assert all(file.payload(n) == memory.view(n) for n in range(slots))


def test_what_is_no_neighbour_is_not_merged(kind: Kind, tmp_path: Path) -> None:
    files = [SlotFile(tmp_path / f"{n}", 4, PAGE) for n in range(2)]
    memory, odd = Memory(4, PAGE), Memory(4, PAGE, 1)
    with closing(files[0].engine(kind)) as engine:
        # Slots 0 and 1 of two files in turn; then a buffer in the middle that must be copied.
        rows = np.concatenate([files[n % 2].rows(k.WRITE, [n // 2], [memory.address(n)]) for n in range(4)])
        rows[:, k.POSITION] = range(4)
        assert results(run(engine, rows, loads=False)) == [GOOD] * 4
        addresses = memory.addresses(range(4))
        addresses[2] = odd.address(2)
        rows = files[0].rows(k.WRITE, range(4), addresses)
        assert results(run(engine, rows, loads=False)) == [GOOD] * 4
        assert engine.counts.merged == 1
    for file in files:
        os.close(file.fd)


@pytest.mark.parametrize("merge_bytes", [0, 1 << 20])
def test_parts_smaller_than_a_block(kind: Kind, merge_bytes: int, tmp_path: Path) -> None:
    slots, size = 6, 256 * KIB
    file = SlotFile(tmp_path / "file", slots, size)
    source, target = Memory(slots, size), Memory(slots, size)
    parts = {"part_bytes": 64 * KIB, "polite_bytes": 64 * KIB, "merge_bytes": merge_bytes}
    with closing(file.engine(kind, **parts)) as engine:
        sums = write_all(file, engine, source)
        rows = file.rows(k.READ, range(slots), target.addresses(range(slots)), checksums=sums)
        assert results(run(engine, rows, loads=True)) == [GOOD] * slots
        # Beside each other, so that stores pause between their parts.
        heard = Heard()
        engine.submit(file.rows(k.WRITE, [0, 1], source.addresses([0, 1])), loads=False, on_done=Heard())
        for _ in range(10):
            engine.submit(rows[2:], loads=True, on_done=heard)
        assert (heard.wait(40)[:, k.RESULT] == GOOD).all()
    assert all(target.view(n) == source.view(n) for n in range(slots))
    assert all(file.payload(n) == source.view(n) for n in range(slots))


# Verdicts


def damage(file: SlotFile, number: int, change: str) -> None:
    header = file.header(number)
    assert header is not None
    page = bytearray(PAGE)
    fields = {name: getattr(header, name) for name in SlotHeader.__slots__}
    match change:
        case "magic":
            overwrite(file.path, file.offset(number), b"XXXX")
            return
        case "header bit":
            overwrite(file.path, file.offset(number) + 100, b"\x01")
            return
        case "payload bit":
            flipped = file.payload(number)[-1] ^ 0x40
            overwrite(file.path, file.offset(number) + PAGE + file.block_bytes - 1, bytes([flipped]))
            return
        case "zeros":
            overwrite(file.path, file.offset(number), bytes(file.stride))
            return
        case "segment":
            fields["segment_id"] += 1
        case "number":
            fields["number"] += 1
        case "key":
            fields["key"] = key_of(99)
        case "length":
            fields["length"] -= 1
        case "older":
            fields["checksum"] ^= 1
    SlotHeader(**fields).pack_into(memoryview(page))
    overwrite(file.path, file.offset(number), bytes(page))


DAMAGE = {
    "magic": WRONG_HEADER,
    "header bit": WRONG_HEADER,
    "zeros": WRONG_HEADER,
    "segment": WRONG_PLACE,
    "number": WRONG_PLACE,
    "key": WRONG_KEY,
    "length": WRONG_LENGTH,
    "older": WRONG_CHECKSUM,
    "payload bit": WRONG_CHECKSUM,
}


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "alone"])
def test_only_the_damaged_block_is_bad(kind: Kind, merged: bool, tmp_path: Path) -> None:
    """Each kind of damage between two good blocks, all of them in one unit."""
    slots = 2 * len(DAMAGE) + 1
    file = SlotFile(tmp_path / "file", slots, 8192)
    target = Memory(slots, 8192)
    with closing(file.engine(kind, merge_bytes=(2 << 20) * merged)) as engine:
        sums = write_all(file, engine, Memory(slots, 8192))
        for place, change in enumerate(DAMAGE):
            damage(file, 2 * place + 1, change)
        before = engine.counts.merged
        rows = file.rows(k.READ, range(slots), target.addresses(range(slots)), checksums=sums)
        done = run(engine, rows, loads=True)
        assert engine.counts.merged - before == (slots - 1) * merged
    expected = [GOOD] * slots
    expected[1::2] = DAMAGE.values()
    assert results(done) == expected
    for number in range(0, slots, 2):
        assert target.view(number) == bytes_of((0, number), 8192)


def test_whole_slots_in_the_wrong_place(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 3, 8192)
    with closing(file.engine(kind)) as engine:
        sums = write_all(file, engine, Memory(3, 8192))
        slot = file.path.read_bytes()[file.offset(0) : file.offset(1)]
        overwrite(file.path, file.offset(1), slot)
        target = Memory(3, 8192)
        rows = file.rows(k.READ, range(3), target.addresses(range(3)), checksums=sums)
        assert results(run(engine, rows, loads=True)) == [GOOD, WRONG_PLACE, GOOD]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_file_that_ends_too_early(kind: Kind, direct: bool, tmp_path: Path) -> None:
    """Cut between slots, within a header's page, within a payload: nothing hangs, nothing passes."""
    slots, size = 6, 16 * KIB
    for cut in (0, PAGE, 2 * PAGE, 3 * PAGE + 100, 77):
        file = SlotFile(tmp_path / f"{cut}", slots, size, direct=direct)
        with closing(file.engine(kind)) as engine:
            sums = write_all(file, engine, Memory(slots, size), cut)
            os.truncate(file.path, file.offset(3) + cut)
            target = Memory(slots, size)
            rows = file.rows(k.READ, range(slots), target.addresses(range(slots)), checksums=sums)
            done = results(run(engine, rows, loads=True))
        assert done[:3] == [GOOD] * 3
        assert GOOD not in done[3:]
        assert done[4:] == [WRONG_HEADER] * 2
        os.close(file.fd)


# Errors


def test_descriptors_that_cannot_be_used(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    read_only = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
    with closing(file.engine(kind)) as engine:
        write_all(file, engine, memory)
        sums = [checksum_of(memory.view(n)) for n in range(4)]
        gone = os.dup(file.fd)
        os.close(gone)
        for fd, write, read in (
            (gone, [-errno.EBADF] * 4, [-errno.EBADF] * 4),
            (read_only, [-errno.EBADF] * 4, [GOOD] * 4),
        ):
            addresses = memory.addresses(range(4))
            assert (
                results(run(engine, file.rows(k.WRITE, range(4), addresses, fd=fd), loads=False)) == write
            )
            rows = file.rows(k.READ, range(4), addresses, checksums=sums, fd=fd)
            assert results(run(engine, rows, loads=True)) == read
    os.close(read_only)


def test_a_full_device(kind: Kind) -> None:
    """/dev/full answers every write with ENOSPC, and every read with zeros."""
    memory = Memory(8, PAGE)
    fd = os.open("/dev/full", os.O_RDWR)
    with closing(make_engine(kind, 2 * PAGE, PAGE)) as engine:
        rows = np.zeros((8, k.COLUMNS), dtype=np.int64)
        rows[:, k.FD] = fd
        rows[:, k.OFFSET] = PAGE + np.arange(8) * 2 * PAGE
        rows[:, k.ADDRESS] = memory.addresses(range(8))
        rows[:, k.LENGTH] = PAGE
        rows[:, k.DEADLINE_NS] = 1 << 62
        rows[:, k.POSITION] = range(8)
        rows[:, k.KIND] = k.WRITE
        assert results(run(engine, rows, loads=False)) == [-errno.ENOSPC] * 8
        assert engine.counts.merged == 7
        rows[:, k.KIND] = k.READ
        assert results(run(engine, rows, loads=True)) == [WRONG_HEADER] * 8
    os.close(fd)


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from engine_kit import *
file = SlotFile(Path({file!r}), 12, 16384)
engine = file.engine({kind!r})
memory = Memory(12, 16384)
write_all(file, engine, memory)
merged = engine.counts.merged
# Slots 0 to 6 lie below the limit, slot 7 across it.
resource.setrlimit(resource.RLIMIT_FSIZE, (file.offset(7) + PAGE, resource.RLIM_INFINITY))
for number in range(12):
    memory.view(number)[:] = bytes_of(("new", number), 16384)
done = run(engine, file.rows(k.WRITE, range(12), memory.addresses(range(12))), loads=False)
assert engine.counts.merged == merged + 11, engine.counts
print(done[:, k.RESULT].tolist())
rows = file.rows(k.READ, range(7), memory.addresses(range(7)), checksums=done[:7, k.CHECKSUM])
print(run(engine, rows, loads=True)[:, k.RESULT].tolist(), engine.close(60))
"""


def test_only_what_is_to_blame_for_the_failure_of_a_unit_fails(kind: Kind, tmp_path: Path) -> None:
    """A unit of neighbours that crosses the largest size a file of the process may have."""
    here = Path(__file__).resolve().parent
    script = LIMITED.format(path=[str(here), str(here.parent)], file=str(tmp_path / "file"), kind=kind)
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split("\n")[:2] == [
        str([GOOD] * 7 + [-errno.EFBIG] * 5),
        str([GOOD] * 7) + " True",
    ]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_errors_of_a_file_layer(code: int, tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    with closing(file.engine(file_io=io, workers=1, store_workers=1)) as engine:
        write_all(file, engine, memory)
        io.fail(code, "write", "read", times=2)
        addresses = memory.addresses(range(4))
        done = run(engine, file.rows(k.WRITE, range(4), addresses), loads=False)
        assert results(done) == [-code, -code, GOOD, GOOD]
        io.fail(code, "read", times=1)
        rows = file.rows(k.READ, range(4), addresses, checksums=done[:, k.CHECKSUM])
        rows[:, k.CHECKSUM] = [checksum_of(memory.view(n)) for n in range(4)]
        assert results(run(engine, rows, loads=True)) == [-code, GOOD, GOOD, GOOD]
        assert io.calls["write"] == 8 and io.calls["read"] == 4, "one call per block"


def test_a_file_layer_with_a_bug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FileIO):
        def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            raise ValueError("a bug")

    file = SlotFile(tmp_path / "file", 2, 8192)
    memory = Memory(2, 8192)
    with closing(file.engine(file_io=Broken())) as engine, caplog.at_level(logging.ERROR):
        sums = write_all(file, engine, memory)
        rows = file.rows(k.READ, [0, 1], memory.addresses([0, 1]), checksums=sums)
        assert results(run(engine, rows, loads=True)) == [-errno.EIO] * 2
    assert "a bug" in caplog.text


# Copies, memory, checksums that are known, sync


@pytest.mark.parametrize("shift", [0, 5])
def test_a_good_block_is_copied_where_it_is_to_lie_too(kind: Kind, shift: int, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    target, copies = Memory(4, 8192, shift), Memory(4, 8192, 3)
    with closing(file.engine(kind)) as engine:
        sums = write_all(file, engine, Memory(4, 8192))
        damage(file, 1, "payload bit")
        damage(file, 2, "key")
        rows = file.rows(k.READ, range(4), target.addresses(range(4)), checksums=sums)
        rows[:, k.COPY_TO] = [copies.address(0), copies.address(1), copies.address(2), 0]
        assert results(run(engine, rows, loads=True)) == [GOOD, WRONG_CHECKSUM, WRONG_KEY, GOOD]
    assert copies.view(0) == bytes_of((0, 0), 8192) == target.view(0)
    assert bytes(copies.view(2)) == bytes(8192), "the header was bad: nothing is copied"
    assert bytes(copies.view(3)) == bytes(8192)
    assert target.view(3) == bytes_of((0, 3), 8192)


def memory_rows(kind: int, slots: Memory, buffers: Memory, count: int, flags: int = 0) -> Rows:
    rows = np.zeros((count, k.COLUMNS), dtype=np.int64)
    rows[:, k.KIND] = kind
    rows[:, k.OFFSET] = slots.addresses(range(count))
    rows[:, k.ADDRESS] = buffers.addresses(range(count))
    rows[:, k.LENGTH] = buffers.size
    rows[:, k.FLAGS] = flags
    rows[:, k.DEADLINE_NS] = 1 << 62
    rows[:, k.POSITION] = range(count)
    return rows


@pytest.mark.parametrize("size", [1, 240, 241, 4096, 100_001])
def test_memory(size: int) -> None:
    slots, source, target = Memory(5, size), Memory(5, size, 1), Memory(5, size, 7)
    for number in range(5):
        source.view(number)[:] = bytes_of(number, size)
    with closing(make_engine("memory")) as engine:
        kept = run(engine, memory_rows(k.KEEP, slots, source, 5), loads=False)
        assert results(kept) == [GOOD] * 5
        assert kept[:, k.CHECKSUM].tolist() == [checksum_of(source.view(n)) for n in range(5)]
        assert all(slots.view(n) == source.view(n) for n in range(5))
        known = memory_rows(k.KEEP, slots, source, 5, k.KNOWN)
        known[:, k.CHECKSUM] = 42
        assert (run(engine, known, loads=False)[:, k.CHECKSUM] == 42).all()
        slots.view(2)[size // 2] ^= 1
        for flags, second in ((k.VERIFY, WRONG_CHECKSUM), (0, GOOD)):
            rows = memory_rows(k.FETCH, slots, target, 5, flags)
            rows[:, k.CHECKSUM] = kept[:, k.CHECKSUM]
            done = run(engine, rows, loads=True)
            assert results(done) == [GOOD, GOOD, second, GOOD, GOOD]
            assert all(target.view(n) == slots.view(n) for n in range(5))
        assert engine.counts.merged == 0


def test_a_known_checksum_is_taken_as_it_is(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    for shift in (0, 9):
        memory = Memory(4, 8192, shift)
        sums = [checksum_of(memory.view(n)) for n in range(4)]
        sums[2] ^= 1
        with closing(file.engine(kind)) as engine:
            rows = file.rows(k.WRITE, range(4), memory.addresses(range(4)), checksums=sums, flags=k.KNOWN)
            done = run(engine, rows, loads=False)
            assert done[:, k.CHECKSUM].tolist() == sums
            assert [file.header(n).checksum for n in range(4)] == [s % 2**64 for s in sums]
            rows = file.rows(k.READ, range(4), memory.addresses(range(4)), checksums=sums)
            assert results(run(engine, rows, loads=True)) == [GOOD, GOOD, WRONG_CHECKSUM, GOOD]


def test_a_write_with_sync(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory, target = Memory(4, 8192), Memory(4, 8192)
    with closing(file.engine(kind)) as engine:
        rows = file.rows(k.WRITE, range(4), memory.addresses(range(4)), flags=k.SYNC)
        done = run(engine, rows, loads=False)
        assert results(done) == [GOOD] * 4
        rows = file.rows(k.READ, range(4), target.addresses(range(4)), checksums=done[:, k.CHECKSUM])
        assert results(run(engine, rows, loads=True)) == [GOOD] * 4


def test_a_failing_sync_is_a_failed_write(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 3, 8192)
    memory = Memory(3, 8192)
    with closing(file.engine(file_io=io, workers=1, store_workers=1)) as engine:
        io.fail(errno.EIO, "sync", times=1)
        rows = file.rows(k.WRITE, range(3), memory.addresses(range(3)), flags=k.SYNC)
        assert results(run(engine, rows, loads=False)) == [-errno.EIO, GOOD, GOOD]
        assert io.calls["sync"] == 3
        run(engine, file.rows(k.WRITE, range(3), memory.addresses(range(3))), loads=False)
        assert io.calls["sync"] == 3


def flushes(*fds: int) -> Rows:
    rows = np.zeros((len(fds), k.COLUMNS), dtype=np.int64)
    rows[:, k.KIND] = k.FLUSH
    rows[:, k.FD] = fds
    rows[:, k.DEADLINE_NS] = 1 << 62
    rows[:, k.POSITION] = range(len(fds))
    return rows


def test_files_are_flushed(kind: Kind, tmp_path: Path) -> None:
    files = [SlotFile(tmp_path / f"{n}", 4, 8192) for n in range(3)]
    memory = Memory(4, 8192)
    read_only = os.open(files[0].path, os.O_RDONLY)
    with closing(files[0].engine(kind)) as engine:
        write_all(files[0], engine, memory)
        gone = os.dup(read_only)
        os.close(gone)
        fds = [files[0].fd, gone, files[1].fd, read_only]
        assert results(run(engine, flushes(*fds), loads=False)) == [GOOD, -errno.EBADF, GOOD, GOOD]
        # Between writes: neither is taken for the other's neighbour.
        rows = np.concatenate(
            [
                flushes(files[2].fd),
                files[2].rows(k.WRITE, [0, 1], memory.addresses([0, 1])),
                flushes(files[2].fd, files[2].fd),
                files[2].rows(k.WRITE, [2, 3], memory.addresses([2, 3])),
            ]
        )
        rows[:, k.POSITION] = range(7)
        assert results(run(engine, rows, loads=False)) == [GOOD] * 7
        assert all(files[2].payload(n) == memory.view(n) for n in range(4))
    for fd in (read_only, *(file.fd for file in files)):
        os.close(fd)


def test_a_flush_that_fails(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 1, 8192)
    with closing(file.engine(file_io=io, workers=1, store_workers=1)) as engine:
        io.fail(errno.EIO, "sync", times=1)
        assert results(run(engine, flushes(file.fd, file.fd), loads=False)) == [-errno.EIO, GOOD]
        assert io.calls["sync"] == 2


def test_waiting_for_a_batch(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    engine, _ = hanging(file, io, memory)
    with closing(engine):
        heard = Heard()
        rows = file.rows(k.WRITE, [1, 2, 3], memory.addresses([1, 2, 3]))
        batch = engine.submit(rows, loads=False, on_done=heard)
        batch.wait(time.monotonic())
        batch.wait(time.monotonic() + 0.02)
        assert heard.count == 0, "it waits no longer than it was told to"
        waiters = [
            threading.Thread(target=batch.wait, args=(time.monotonic() + WAIT_SECONDS,)) for _ in range(3)
        ]
        for thread in waiters:
            thread.start()
        io.release()
        for thread in waiters:
            thread.join(WAIT_SECONDS)
        assert heard.count == 3
        batch.wait(time.monotonic() + WAIT_SECONDS)


def test_a_waiter_hears_of_what_was_taken_back(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    engine, _ = hanging(file, io, memory)
    with closing(engine):
        rows = file.rows(k.WRITE, [1, 2], memory.addresses([1, 2]))
        batch = engine.submit(rows, loads=False, on_done=Heard())
        waiter = threading.Thread(target=batch.wait, args=(time.monotonic() + WAIT_SECONDS,))
        waiter.start()
        assert len(batch.cancel()) == 2
        waiter.join(WAIT_SECONDS / 10)
        assert not waiter.is_alive()
        io.release()


# The queue


def test_what_waited_too_long_is_not_begun(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 8, 8192)
    target = Memory(8, 8192)
    with closing(file.engine(kind)) as engine:
        sums = write_all(file, engine, Memory(8, 8192))
        rows = file.rows(k.READ, range(8), target.addresses(range(8)), checksums=sums)
        rows[1::2, k.DEADLINE_NS] = 1
        done = run(engine, rows, loads=True)
        assert results(done) == [GOOD, k.LATE] * 4
        rows = file.rows(k.WRITE, range(8), target.addresses(range(8)), deadline_ns=1)
        assert results(run(engine, rows, loads=False)) == [k.LATE] * 8
    for number in range(8):
        assert bytes(target.view(number)) == (bytes(8192) if number % 2 else bytes_of((0, number), 8192))
        assert file.payload(number) == bytes_of((0, number), 8192)


def hanging(file: SlotFile, io: FaultyIO, memory: Memory, **settings: int) -> tuple[Engine, Heard]:
    """An engine whose only worker hangs in a write of slot 0."""
    engine = file.engine(file_io=io, workers=1, store_workers=1, **settings)
    io.hang("write")
    heard = Heard()
    engine.submit(file.rows(k.WRITE, [0], [memory.address(0)]), loads=False, on_done=heard)
    io.wait_hanging("write")
    return engine, heard


def test_loads_come_before_stores(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 8, 8192)
    memory = Memory(8, 8192)
    engine, _ = hanging(file, io, memory)
    order: list[tuple[str, int]] = []

    def hear(what: str) -> Callable[[Rows], None]:
        return lambda rows: order.extend((what, int(row[k.BEGAN_NS])) for row in rows)

    with closing(engine):
        for number in (1, 2, 3):
            rows = file.rows(k.WRITE, [number], [memory.address(number)])
            engine.submit(rows, loads=False, on_done=hear("store"))
        for number in (4, 5, 6):
            engine.submit(
                file.rows(k.READ, [number], [memory.address(number)]), loads=True, on_done=hear("load")
            )
        assert engine.queued == (3, 3)
        io.release()
    began = [what for what, _ in sorted(order, key=lambda entry: entry[1])]
    assert began == ["load"] * 3 + ["store"] * 3


class Counting(FileIO):
    """How many writes run at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.0005)
        try:
            return super().write(fd, views, offset)
        finally:
            with self._lock:
                self.now -= 1


@pytest.mark.parametrize(("workers", "store_workers"), [(1, 1), (4, 1), (4, 2), (6, 6)])
def test_so_many_stores_at_a_time(workers: int, store_workers: int, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 32, PAGE)
    memory = Memory(32, PAGE)
    io = Counting()
    engine = file.engine(file_io=io, workers=workers, store_workers=store_workers)
    with closing(engine):
        for _ in range(4):
            write_all(file, engine, memory)
    assert 1 <= io.most <= store_workers


def test_stores_leave_threads_for_loads(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 8, 8192)
    memory = Memory(8, 8192)
    with closing(file.engine(file_io=io, workers=3, store_workers=2)) as engine:
        write_all(file, engine, memory)
        sums = [checksum_of(memory.view(n)) for n in range(8)]
        io.hang("write")
        heard = Heard()
        engine.submit(file.rows(k.WRITE, range(5), memory.addresses(range(5))), loads=False, on_done=heard)
        io.wait_hanging("write", 2)
        rows = file.rows(k.READ, [6, 7], memory.addresses([6, 7]), checksums=sums[6:])
        assert results(run(engine, rows, loads=True)) == [GOOD] * 2
        assert io.hanging["write"] == 2 and engine.queued == (0, 3)
        io.release()
        heard.wait(5)


def test_more_than_there_is_room_for_is_late(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 8, 8192)
    memory = Memory(8, 8192)
    engine, first = hanging(file, io, memory, capacity=4)
    with closing(engine):
        waiting, refused = Heard(), Heard()
        engine.submit(file.rows(k.WRITE, [1, 2], memory.addresses([1, 2])), loads=False, on_done=waiting)
        batch = engine.submit(
            file.rows(k.WRITE, [3, 4], memory.addresses([3, 4])), loads=False, on_done=refused
        )
        assert results(refused.wait(2, 0)) == [k.LATE] * 2
        assert len(batch.cancel()) == 0, "it was heard of already"
        io.release()
        assert results(waiting.wait(2)) == [GOOD] * 2 and results(first.wait(1)) == [GOOD]
        assert (
            results(run(engine, file.rows(k.WRITE, [3, 4], memory.addresses([3, 4])), loads=False))
            == [GOOD] * 2
        )
        rows = file.rows(k.WRITE, range(5), memory.addresses(range(5)))
        assert results(run(engine, rows, loads=False)) == [k.LATE] * 5, "more than ever fit"


def test_empty_batches_take_nothing() -> None:
    with closing(make_engine("memory", capacity=4)) as engine:
        none = np.zeros((0, k.COLUMNS), dtype=np.int64)
        for _ in range(20):
            batch = engine.submit(none, loads=True, on_done=lambda rows: pytest.fail("nothing was done"))
            assert len(batch.cancel()) == 0
        slots, buffers = Memory(4, 64), Memory(4, 64)
        assert results(run(engine, memory_rows(k.KEEP, slots, buffers, 4), loads=False)) == [GOOD] * 4


def test_more_batches_than_rows() -> None:
    """Rows are free again before their batch has been handed out."""
    slots, buffers = Memory(2, 64), Memory(2, 64)
    with closing(make_engine("memory", capacity=2)) as engine:
        heard, go = Heard(), threading.Event()
        entered = threading.Event()

        def slow(rows: Rows) -> None:
            entered.set()
            assert go.wait(WAIT_SECONDS)
            heard(rows)

        one = memory_rows(k.KEEP, slots, buffers, 1)
        engine.submit(one, loads=False, on_done=slow)
        assert entered.wait(WAIT_SECONDS)
        counts = []
        for _ in range(40):
            refused = Heard()
            engine.submit(one, loads=False, on_done=lambda rows, told=refused: (told(rows), heard(rows)))
            eventually(lambda: engine.queued == (0, 0), "nothing takes it")
            counts.append(refused.count)
        go.set()
        done = heard.wait(41)
        assert set(results(done)) == {GOOD, k.LATE}
        assert sum(counts) == results(done).count(k.LATE) > 0


# Taking back


def test_cancel_takes_back_what_nobody_has_begun(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 8, 8192)
    memory = Memory(8, 8192)
    engine, first = hanging(file, io, memory, capacity=8)
    with closing(engine):
        heard, kept = Heard(), Heard()
        rows = file.rows(k.WRITE, [1, 2, 3], memory.addresses([1, 2, 3]))
        rows[:, k.POSITION] = [10, 20, 30]
        batch = engine.submit(rows, loads=False, on_done=heard)
        engine.submit(file.rows(k.WRITE, [4, 5], memory.addresses([4, 5])), loads=False, on_done=kept)
        assert sorted(batch.cancel().tolist()) == [10, 20, 30]
        assert batch.cancel().tolist() == []
        assert engine.queued == (0, 2)
        # Their rows are free for others.
        more = Heard()
        rows = file.rows(k.WRITE, [1, 2, 3, 6, 7], memory.addresses([1, 2, 3, 6, 7]))
        engine.submit(rows, loads=False, on_done=more)
        assert batch.cancel().tolist() == [], "these belong to another batch now"
        assert engine.queued == (0, 7)
        io.release()
        assert results(more.wait(5)) == [GOOD] * 5
        assert results(kept.wait(2)) == [GOOD] * 2
        first.wait(1)
        assert engine.drain(WAIT_SECONDS)
        assert heard.count == 0
        assert batch.cancel().tolist() == []


def test_cancel_leaves_what_runs_and_what_is_done(tmp_path: Path, io: FaultyIO) -> None:
    """One block done, one in the medium, two waiting; without the two, the first is heard of at once."""
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    with closing(file.engine(file_io=io, workers=1, store_workers=1)) as engine:
        sums = write_all(file, engine, memory)
        io.hang("read")
        order = Heard()
        rows = file.rows(k.READ, range(4), memory.addresses(range(4)), checksums=sums)
        rows[0, k.DEADLINE_NS] = 1
        batch = engine.submit(rows, loads=True, on_done=order)
        io.wait_hanging("read")
        assert order.count == 0
        assert batch.cancel().tolist() == [2, 3]
        batch.help()
        assert order.wait(1)[:, k.RESULT].tolist() == [k.LATE]
        io.release()
        assert order.wait(2)[:, k.RESULT].tolist() == [k.LATE, GOOD]


@pytest.mark.parametrize("shift", [0, 5], ids=["direct", "bounced"])
def test_what_was_abandoned_is_read_and_copied_nowhere(shift: int, tmp_path: Path, io: FaultyIO) -> None:
    """Two hang, two wait, and one of those that hang is called off; what is done cannot be any more."""
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory, copies = Memory(4, 8192, shift), Memory(4, 8192)
    with closing(file.engine(file_io=io, workers=2, store_workers=1)) as engine:
        sums = write_all(file, engine, Memory(4, 8192))
        rows = file.rows(k.READ, range(4), memory.addresses(range(4)), checksums=sums)
        rows[:, k.COPY_TO] = copies.addresses(range(4))
        io.hang("read")
        heard = Heard()
        batch = engine.submit(rows, loads=True, on_done=heard)
        io.wait_hanging("read", 2)
        assert batch.abandon(np.array([1, 2, 3])).tolist() == [1], "2 and 3 have not begun"
        assert batch.abandon(np.array([1])).tolist() == [1]
        io.release()
        assert heard.wait(4)[:, k.RESULT].tolist() == [GOOD] * 4
        assert batch.abandon(np.arange(4)).tolist() == []
    for number in range(4):
        assert memory.view(number) == bytes_of((0, number), 8192)
        assert bytes(copies.view(number)) == (bytes(8192) if number == 1 else bytes_of((0, number), 8192))


def test_taking_the_last_ones_back_tells_of_the_others(tmp_path: Path, io: FaultyIO) -> None:
    """Nobody polls: what was done before the rest was taken back is heard of all the same."""
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    with closing(file.engine(file_io=io, workers=1, store_workers=1)) as engine:
        io.hang("write", "read")
        stores, load = Heard(), Heard()
        rows = file.rows(k.WRITE, range(3), memory.addresses(range(3)))
        batch = engine.submit(rows, loads=False, on_done=stores)
        io.wait_hanging("write")
        engine.submit(file.rows(k.READ, [3], [memory.address(3)]), loads=True, on_done=load)
        # The first store ends, and before the others comes the load.
        io.release("write")
        io.wait_hanging("read")
        assert stores.count == 0
        assert batch.cancel().tolist() == [1, 2]
        assert results(stores.wait(1)) == [GOOD]
        io.release()
        load.wait(1)


def test_two_engines_that_cancel_in_each_other(tmp_path: Path, io: FaultyIO) -> None:
    """Each hands out something and takes back what waits in the other, at the same moment."""
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    engines = [file.engine(file_io=io, workers=2, store_workers=1) for _ in range(2)]
    io.hang("write")
    waiting: list[Batch] = []
    for engine in engines:
        engine.submit(file.rows(k.WRITE, [0], [memory.address(0)]), loads=False, on_done=Heard())
        rows = file.rows(k.WRITE, [1], [memory.address(1)])
        waiting.append(engine.submit(rows, loads=False, on_done=Heard()))
    io.wait_hanging("write", 2)
    both, taken = threading.Barrier(2), []

    def hear(other: Batch) -> Callable[[Rows], None]:
        def on_done(rows: Rows) -> None:
            both.wait(WAIT_SECONDS)
            taken.extend(other.cancel().tolist())

        return on_done

    for engine, other in zip(engines, reversed(waiting), strict=True):
        late = file.rows(k.READ, [2], [memory.address(2)], deadline_ns=1)
        engine.submit(late, loads=True, on_done=hear(other))
    eventually(lambda: taken == [0, 0], "they wait for each other", 20.0)
    io.release()
    for engine in engines:
        assert engine.close(WAIT_SECONDS)


def test_nothing_is_queued_after_close(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 2, 8192)
    memory = Memory(2, 8192)
    engine = file.engine(kind)
    assert engine.close(WAIT_SECONDS)
    rows = file.rows(k.WRITE, [0, 1], memory.addresses([0, 1]))
    batch = engine.submit(rows, loads=False, on_done=lambda rows: pytest.fail("called after close"))
    assert engine.queued == (0, 0)
    batch.help()
    assert batch.cancel().tolist() == [0, 1], "nobody has begun them, nobody will"
    assert batch.cancel().tolist() == []
    assert engine.close(WAIT_SECONDS)


# The end


def test_close_finishes_what_is_queued_and_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    file = SlotFile(tmp_path / "file", 64, 8192)
    memory = Memory(64, 8192)
    before, threads = descriptors(), set(threading.enumerate())
    for _ in range(3):
        engine = file.engine(kind)
        heard = Heard()
        for number in range(64):
            rows = file.rows(k.WRITE, [number], [memory.address(number)])
            engine.submit(rows, loads=False, on_done=heard)
        assert engine.close(WAIT_SECONDS)
        assert heard.count == 64
        assert engine.close(WAIT_SECONDS)
        assert set(threading.enumerate()) == threads
        assert descriptors() == before
    del engine


def test_close_leaves_a_hanging_thread_behind(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    before, threads = descriptors(), set(threading.enumerate())
    engine, running = hanging(file, io, memory)
    waiting = Heard()
    rows = file.rows(k.WRITE, [1, 2], memory.addresses([1, 2]))
    batch = engine.submit(rows, loads=False, on_done=waiting)
    assert not engine.drain(0.01)
    assert not engine.close(0.05)
    assert engine.queued == (0, 0), "what would run after the close is dropped"
    assert batch.cancel().tolist() == [0, 1]
    io.release()
    # What was in the medium is heard of at last, and everything ends.
    assert results(running.wait(1)) == [GOOD]
    eventually(lambda: set(threading.enumerate()) == threads, "threads are left")
    assert descriptors() == before
    assert waiting.count == 0 and io.calls["write"] == 1


def test_at_the_end_of_the_process(kind: Kind, tmp_path: Path) -> None:
    """No thread of the engine runs Python any more; whoever asks still gets what is done."""
    file = SlotFile(tmp_path / "file", 64, 8192)
    memory = Memory(64, 8192)
    engine = file.engine(kind)
    for thread in engine.leave():
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
    heard = Heard()
    for number in range(64):
        engine.submit(
            file.rows(k.WRITE, [number], [memory.address(number)]), loads=False, on_done=heard
        ).help()
    assert engine.close(WAIT_SECONDS)
    assert heard.count == 64


def test_the_age_of_what_runs(tmp_path: Path, io: FaultyIO) -> None:
    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    engine, heard = hanging(file, io, memory)
    with closing(engine):
        assert engine.oldest_seconds(loads=True) == 0.0
        first = engine.oldest_seconds(loads=False)
        assert 0.0 < first < engine.oldest_seconds(loads=False)
        engine.forgive()
        assert engine.oldest_seconds(loads=False) == 0.0
        io.release()
        heard.wait(1)
        assert engine.oldest_seconds(loads=False) == 0.0


def test_an_on_done_that_raises_is_logged(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    slots, buffers = Memory(1, 64), Memory(1, 64)
    one = memory_rows(k.KEEP, slots, buffers, 1)

    def fail(rows: Rows) -> None:
        raise ValueError("a bug")

    with caplog.at_level(logging.ERROR), closing(make_engine("memory")) as engine:
        for _ in range(3):
            engine.submit(one, loads=False, on_done=fail)
        assert engine.drain(WAIT_SECONDS)
        assert results(run(engine, one, loads=False)) == [GOOD]
    assert [record.exc_info and str(record.exc_info[1]) for record in caplog.records] == ["a bug"] * 3


def test_nothing_of_a_batch_is_kept(kind: Kind, tmp_path: Path) -> None:
    class Owner:
        pass

    file = SlotFile(tmp_path / "file", 4, 8192)
    memory = Memory(4, 8192)
    with closing(file.engine(kind)) as engine:
        for cancelled in (False, True):
            owner, gone = Owner(), threading.Event()
            weakref.finalize(owner, gone.set)
            heard = Heard()
            batch = engine.submit(
                file.rows(k.WRITE, range(4), memory.addresses(range(4))),
                loads=False,
                on_done=lambda rows, told=heard, held=owner: told(rows),
            )
            del owner
            taken = len(batch.cancel()) if cancelled else 0
            heard.wait(4 - taken)
            assert engine.drain(WAIT_SECONDS)
            del batch
            assert gone.wait(WAIT_SECONDS / 10), "somebody holds the caller's buffers"


def test_stores_go_on_while_loads_never_end(kind: Kind, tmp_path: Path) -> None:
    """A store of many parts waits for loads between them, but not for ever."""
    size = 512 * KIB
    file = SlotFile(tmp_path / "file", 4, size)
    memory, target = Memory(4, size), Memory(4, size)
    settings = {"workers": 8, "part_bytes": 64 * KIB, "polite_bytes": 16 * KIB, "merge_bytes": 0}
    with closing(file.engine(kind, **settings)) as engine:
        sums = write_all(file, engine, memory)
        stop, loads = threading.Event(), Heard()
        rows = file.rows(k.READ, [1], [target.address(1)], checksums=sums[1])

        def again(done: Rows) -> None:
            loads(done)
            if not stop.is_set():
                engine.submit(rows, loads=True, on_done=again)

        for _ in range(16):
            engine.submit(rows, loads=True, on_done=again)
        try:
            done = run(engine, file.rows(k.WRITE, [0], [memory.address(0)]), loads=False)
        finally:
            stop.set()
        assert results(done) == [GOOD]
        assert engine.drain(WAIT_SECONDS)
        assert loads.count > 9


# Against a plain model


class Caller:
    """One thread's slots, and what must lie in them; everything it submits ends exactly once."""

    def __init__(self, engine: Engine, file: SlotFile, mine: range, seed: int) -> None:
        self.engine = engine
        self.file = file
        self.mine = mine
        self.rng = random.Random(seed)
        self.model: dict[int, bytes | None] = dict.fromkeys(mine)
        self.shifts = {shift: Memory(len(mine), file.block_bytes, shift) for shift in (0, 0, 512, 13)}
        self.batches = 0
        self.taken_back = 0

    def step(self) -> None:
        rng, file = self.rng, self.file
        memory = self.shifts[rng.choice([0, 0, 512, 13])]
        numbers = rng.sample(self.mine, rng.randint(1, len(self.mine)))
        if rng.random() < 0.6:
            numbers.sort()
        places = [number - self.mine.start for number in numbers]
        writing = rng.random() < 0.4
        size = file.block_bytes
        if writing:
            datas = [bytes_of((number, rng.random()), size) for number in numbers]
            for place, data in zip(places, datas, strict=True):
                memory.view(place)[:] = data
            rows = file.rows(k.WRITE, numbers, memory.addresses(places))
        else:
            datas = [self.model[number] or b"" for number in numbers]
            sums = [checksum_of(data) for data in datas]
            for place in places:
                memory.view(place)[:] = b"\xa5" * size
            rows = file.rows(k.READ, numbers, memory.addresses(places), checksums=sums)
        late = rng.random(), rng.random()
        if late[0] < 0.2:
            rows[:: rng.randint(1, 3), k.DEADLINE_NS] = 1
        heard = Heard()
        batch = self.engine.submit(rows, loads=not writing, on_done=heard)
        back = set(batch.cancel().tolist()) if late[1] < 0.2 else set()
        done = heard.wait(len(rows) - len(back))
        self.batches += 1
        self.taken_back += len(back)
        found = set(done[:, k.POSITION].tolist())
        assert found | back == set(range(len(rows))) and not found & back
        for row in done:
            position = int(row[k.POSITION])
            self.judge(writing, numbers[position], datas[position], memory.view(places[position]), row)
        for position in back:
            if not writing:
                assert memory.view(places[position]) == b"\xa5" * size, "touched after it was taken back"

    def judge(self, writing: bool, number: int, data: bytes, view: memoryview, row: Rows) -> None:
        result = int(row[k.RESULT])
        assert (result == k.LATE) == (row[k.DEADLINE_NS] == 1)
        if writing and result == GOOD:
            self.model[number] = data
            assert int(row[k.CHECKSUM]) == checksum_of(data)
        elif not writing and result != k.LATE:
            assert result == (GOOD if self.model[number] is not None else WRONG_HEADER), (number, result)
            if result == GOOD:
                assert view == self.model[number]
        elif not writing:
            assert view == b"\xa5" * len(view)
        else:
            assert result == k.LATE


@pytest.mark.parametrize("block_bytes", [8192, 5000])
def test_many_callers_against_a_dictionary(kind: Kind, block_bytes: int, tmp_path: Path) -> None:
    callers, each = 4, 12
    file = SlotFile(tmp_path / "file", callers * each, block_bytes)
    settings = {"merge_bytes": 6 * 8192, "part_bytes": 4 * PAGE, "polite_bytes": 2 * PAGE}
    failures: list[BaseException] = []
    with closing(file.engine(kind, capacity=callers * each, **settings)) as engine:
        made = [Caller(engine, file, range(n * each, (n + 1) * each), seed=100 * n) for n in range(callers)]

        def work(caller: Caller) -> None:
            try:
                for _ in range(60):
                    caller.step()
            except BaseException as error:  # noqa: BLE001 - raised in the main thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(caller,)) for caller in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert engine.counts.merged > 0 or block_bytes % PAGE
    assert sum(caller.batches for caller in made) == callers * 60
    for caller in made:
        for number, data in caller.model.items():
            if data is None:
                assert file.header(number) is None
            else:
                assert file.payload(number) == data
