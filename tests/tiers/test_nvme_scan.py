"""Slot headers read off a segment: the compiled way and the way through a file layer say the same."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvstrata.tiers.nvme_folder import SegmentFile
from kvstrata.tiers.nvme_format import SegmentHeader, SlotHeader, segment_name, segment_size, slot_offset
from kvstrata.tiers.nvme_scan import STATES, SlotState, judge_slot, scan_segments
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.file_io import FileIO

STRIDE = 2 * PAGE
SLOTS = 300
IDS = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
"""The second has its highest bit set."""


class CountingIO(FileIO):
    def __init__(self) -> None:
        self.reads = 0

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.reads += 1
        return super().read(fd, views, offset)


def header_of(segment_id: int, number: int) -> SlotHeader:
    key, namespace = (bytes([number % 251, part]) * 16 for part in (1, 2))
    return SlotHeader(key, namespace, segment_id, number, 4_000, 2**64 - 1 - number, 7, 8, 9)


def fill(page: memoryview, kind: str, segment_id: int, number: int) -> SlotState:
    """Make a slot's first page; returns what a scan should say of it."""
    if kind == "full":
        header_of(segment_id, number).pack_into(page)
        return SlotState.USED
    if kind == "dirty rest":
        page[:] = b"x" * PAGE
        header_of(segment_id, number).pack_into(page)
        return SlotState.USED
    if kind == "flipped":
        header_of(segment_id, number).pack_into(page)
        page[number % 256] ^= 1 << number % 8
        return SlotState.DAMAGED
    if kind == "last byte":
        page[PAGE - 1] = 1
        return SlotState.DAMAGED
    if kind == "other slot":
        header_of(segment_id, number + 1).pack_into(page)
        return SlotState.MISPLACED
    if kind == "other segment":
        header_of(segment_id ^ 1, number).pack_into(page)
        return SlotState.MISPLACED
    return SlotState.EMPTY


KINDS = ("full", "dirty rest", "flipped", "last byte", "other slot", "other segment", "empty")


class Made:
    """A segment file with slots of all kinds, opened; expected: what a scan should say."""

    def __init__(self, folder: Path, segment_id: int, *, cut: int = 0) -> None:
        rng = np.random.default_rng(segment_id)
        data = bytearray(segment_size(SLOTS, STRIDE))
        self.pages: list[bytes] = []
        self.expected: list[SlotState] = []
        for number in range(SLOTS):
            offset = slot_offset(number, STRIDE)
            page = memoryview(data)[offset : offset + PAGE]
            state = fill(page, KINDS[int(rng.integers(len(KINDS)))], segment_id, number)
            here = offset + PAGE <= len(data) - cut
            self.expected.append(state if here else SlotState.MISSING)
            self.pages.append(bytes(page))
        path = folder / segment_name(segment_id)
        path.write_bytes(data[: len(data) - cut])
        self.file = SegmentFile(path, SegmentHeader(segment_id, STRIDE, SLOTS, 1), len(data) - cut, 0)
        self.fd = os.open(path, os.O_RDONLY)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[list[Made]]:
    found = [Made(tmp_path, IDS[0]), Made(tmp_path, IDS[1], cut=50 * STRIDE + 700)]
    yield found
    for segment in found:
        os.close(segment.fd)


@pytest.mark.parametrize("io", [FileIO(), CountingIO()], ids=["compiled", "through the file layer"])
def test_every_kind_of_slot_is_recognised(made: list[Made], io: FileIO) -> None:
    scanned = scan_segments(io, [(segment.fd, segment.file) for segment in made])
    assert len(scanned) == len(made)
    for segment, slots in zip(made, scanned, strict=True):
        assert [STATES[code] for code in slots.states.tolist()] == segment.expected
        assert slots.count() == {state: segment.expected.count(state) for state in set(segment.expected)}
        for number, (state, row) in enumerate(zip(segment.expected, slots.headers, strict=True)):
            judged = judge_slot(
                memoryview(bytearray(segment.pages[number])),
                0 if state is SlotState.MISSING else PAGE,
                segment.file.header.segment_id,
                number,
            )
            assert judged.state is state
            if state not in (SlotState.USED, SlotState.MISPLACED):
                assert judged.header is None and not any(row.tobytes())
                continue
            header = SlotHeader.unpack(memoryview(segment.pages[number]))
            assert header == judged.header and header is not None
            for name in ("key", "namespace", "segment_id", "number", "length", "checksum", "sequence"):
                assert row[name].item() == getattr(header, name), name
    if isinstance(io, CountingIO):
        assert io.reads == sum(state is not SlotState.MISSING for one in made for state in one.expected)


def test_a_file_that_shrinks_meanwhile_ends_in_missing_slots(made: list[Made]) -> None:
    [segment] = made[:1]
    os.truncate(segment.file.path, slot_offset(10, STRIDE) + 100)
    [slots] = scan_segments(FileIO(), [(segment.fd, segment.file)])
    assert [STATES[code] for code in slots.states[:10].tolist()] == segment.expected[:10]
    assert {STATES[code] for code in slots.states[10:].tolist()} == {SlotState.MISSING}


def test_nothing_to_scan_is_nothing() -> None:
    assert scan_segments(FileIO(), []) == []


def test_progress_never_passes_the_number_of_slots(made: list[Made]) -> None:
    class SlowIO(FileIO):
        def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            gate.wait(0.002)
            return super().read(fd, views, offset)

    gate = threading.Event()
    told: list[int] = []
    scan_segments(SlowIO(), [(made[0].fd, made[0].file)], told.append)
    assert told == sorted(told) and all(0 <= done <= SLOTS for done in told)


def test_an_error_of_the_disk_names_the_file(made: list[Made]) -> None:
    """A descriptor that cannot be read stands for a disk that answers errors."""
    fd = os.open(made[1].file.path, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=made[1].file.path.name) as caught:
            scan_segments(FileIO(), [(made[0].fd, made[0].file), (fd, made[1].file)])
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EBADF


def test_an_error_of_the_file_layer_is_passed_on(made: list[Made]) -> None:
    class BadSector(FileIO):
        def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            if offset == slot_offset(123, STRIDE):
                raise OSError(errno.EIO, "bad sector")
            return super().read(fd, views, offset)

    with pytest.raises(OSError, match="bad sector"):
        scan_segments(BadSector(), [(segment.fd, segment.file) for segment in made])
