"""The bytes of an nvme folder, version 1: round trips, damage, and a layout that cannot change silently."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.table import ENTRY_DTYPE
from kvstrata.tiers.nvme_format import (
    FORMAT,
    INDEX_ENTRY_DTYPE,
    INDEX_SEGMENT_DTYPE,
    SLOT_HEADER_DTYPE,
    VERSION,
    IndexFile,
    SegmentHeader,
    SlotHeader,
    entries_of,
    index_rows,
    segment_name,
    segment_size,
    slot_offset,
    slot_stride,
)
from kvstrata.transfer.buffers import PAGE

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
digests = st.binary(min_size=32, max_size=32)

segment_headers = st.builds(
    SegmentHeader,
    segment_id=u64,
    stride=st.integers(2, 2**30).map(lambda pages: pages * PAGE),
    slots=st.integers(1, 2**64 - 1),
    created_ms=u64,
)
slot_headers = st.builds(
    SlotHeader,
    key=digests,
    namespace=digests,
    segment_id=u64,
    number=u64,
    length=u64,
    checksum=u64,
    sequence=u64,
    created_ms=u64,
    expires_ms=u64,
)
u63 = st.integers(0, 2**63 - 1)
placed_entries = st.lists(st.tuples(u32, u32, st.tuples(digests, u32, u63, u64, u63, u63)), max_size=5)
"""Position of the segment in the index, slot in it, and the fields of an entry."""
segment_rows = st.lists(st.tuples(u64, u64, u64, u64), max_size=3).map(
    lambda rows: np.array(rows, dtype=INDEX_SEGMENT_DTYPE)
)

SEGMENT = SegmentHeader(
    segment_id=0x0123456789ABCDEF, stride=3 * PAGE, slots=77, created_ms=1_800_000_000_000
)
SLOT = SlotHeader(
    key=bytes(range(32)),
    namespace=bytes(range(32, 64)),
    segment_id=0x0123456789ABCDEF,
    number=5,
    length=8_000,
    checksum=0xFEDCBA9876543210,
    sequence=42,
    created_ms=1_800_000_000_001,
    expires_ms=1_800_000_009_000,
)
ENTRY = (bytes(range(32)), 5, 8_000, 0xFEDCBA9876543210, 42, 1_800_000_009_000)


def pack(header: SlotHeader, background: int = 0) -> bytearray:
    page = bytearray([background]) * PAGE
    header.pack_into(memoryview(page))
    return page


def index_file() -> IndexFile:
    segments = np.array([(7, 77, 950_272, 1_800_000_000_000_000_000)], dtype=INDEX_SEGMENT_DTYPE)
    return IndexFile(3 * PAGE, segments, rows_of([(0, 5, ENTRY)]))


def rows_of(placed: list[tuple[int, int, tuple[object, ...]]]) -> np.ndarray:
    entries = np.array([entry for _, _, entry in placed], ENTRY_DTYPE)
    segments, numbers = ([row[column] for row in placed] for column in (0, 1))
    return index_rows(entries, np.array(segments, np.int64), np.array(numbers, np.int64))


def same_index(one: IndexFile, other: IndexFile) -> bool:
    return (
        one.stride == other.stride
        and one.segments.tobytes() == other.segments.tobytes()
        and one.entries.tobytes() == other.entries.tobytes()
    )


# There and back


@given(header=segment_headers)
def test_segment_headers_come_back(header: SegmentHeader) -> None:
    page = header.pack()
    assert len(page) == PAGE
    assert SegmentHeader.unpack(page) == SegmentHeader.unpack(memoryview(page)) == header


@given(header=slot_headers, background=st.integers(0, 255))
def test_slot_headers_come_back(header: SlotHeader, background: int) -> None:
    page = pack(header, background)
    assert SlotHeader.unpack(memoryview(page)) == header
    assert page[256:] == bytes([background]) * (PAGE - 256), "the rest of the page is not ours"
    assert pack(header, 0)[:256] == page[:256]


@given(
    stride=st.integers(2, 2**30).map(lambda pages: pages * PAGE),
    segments=segment_rows,
    placed=placed_entries,
)
def test_indexes_come_back(
    stride: int, segments: np.ndarray, placed: list[tuple[int, int, tuple[object, ...]]]
) -> None:
    index = IndexFile(stride, segments, rows_of(placed))
    again = IndexFile.unpack(index.pack())
    assert again is not None and same_index(index, again)
    assert again.entries["segment"].tolist() == [segment for segment, _, _ in placed]
    assert again.entries["slot"].tolist() == [number for _, number, _ in placed]
    slots = np.array([entry[1] for _, _, entry in placed], np.int64)
    assert entries_of(again.entries, slots).tolist() == [entry for _, _, entry in placed]


def test_keys_may_end_with_zeros() -> None:
    entry = (b"\1" + bytes(31), 2, 1, 1, 1, 0)
    assert entries_of(rows_of([(3, 2, entry)]), np.array([2])).tolist() == [entry]


@given(header=slot_headers)
def test_slot_headers_in_an_array_say_the_same(header: SlotHeader) -> None:
    [row] = np.frombuffer(pack(header), SLOT_HEADER_DTYPE, 1)
    for field in fields(SlotHeader):
        assert row[field.name].item() == getattr(header, field.name), field.name


# Damage

packed: dict[str, tuple[bytes, int, Callable[[bytes], object]]] = {
    # Bytes, how many of them are protected, and what reads them.
    "segment": (SEGMENT.pack(), 56, SegmentHeader.unpack),
    "slot": (bytes(pack(SLOT)), 256, lambda page: SlotHeader.unpack(memoryview(page))),
    "index": (index_file().pack(), len(index_file().pack()), IndexFile.unpack),
}


@pytest.mark.parametrize("kind", sorted(packed))
def test_any_flipped_bit_is_noticed(kind: str) -> None:
    good, protected, unpack = packed[kind]
    assert unpack(good) is not None
    for bit in range(8 * protected):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert unpack(bytes(bad)) is None, f"bit {bit}"


@pytest.mark.parametrize("kind", sorted(packed))
def test_any_cut_is_noticed(kind: str) -> None:
    good, protected, unpack = packed[kind]
    for length in range(protected):
        assert unpack(good[:length]) is None
        assert unpack(good[:length].ljust(len(good), b"\0")) is None or not any(good[length:])


@pytest.mark.parametrize("kind", sorted(packed))
@given(data=st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(kind: str, data: bytes) -> None:
    good, _, unpack = packed[kind]
    assert unpack(data) is None
    assert unpack(good[:8] + data) is None or good[:8] + data == good


def test_an_index_with_more_behind_it_is_refused() -> None:
    assert IndexFile.unpack(index_file().pack() + b"\0") is None


def test_payload_padding_of_a_header_page_does_not_matter() -> None:
    page = SEGMENT.pack()
    assert SegmentHeader.unpack(page[:100] + b"\1" * (PAGE - 100)) == SEGMENT


@pytest.mark.parametrize("kind", sorted(packed))
def test_another_version_is_refused_even_with_a_good_checksum(kind: str) -> None:
    good, protected, unpack = packed[kind]
    body = bytearray(good[: protected - 8])
    struct.pack_into("<H", body, 8, VERSION + 1)
    sealed = bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))
    assert unpack(sealed + good[protected:]) is None
    struct.pack_into("<H", body, 8, VERSION)
    sealed = bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))
    assert unpack(sealed + good[protected:]) is not None


@pytest.mark.parametrize(
    ("stride", "slots"), [(0, 1), (PAGE, 1), (2 * PAGE + 1, 1), (2 * PAGE, 0)], ids=str
)
def test_a_segment_that_cannot_be_is_refused(stride: int, slots: int) -> None:
    assert SegmentHeader.unpack(SegmentHeader(1, stride, slots, 1).pack()) is None


# Layout: if one of these fails, the format has changed, and VERSION must change with it.


def test_the_version_is_one() -> None:
    assert (FORMAT, VERSION) == ("kvstrata-nvme", 1)


def test_golden_segment_header() -> None:
    body = (
        b"KVSTSEGM" + bytes.fromhex("0100 0000 00100000")
        + bytes.fromhex("efcdab8967452301 0030000000000000 4d00000000000000 00505c18a3010000")
    )  # fmt: skip
    assert SEGMENT.pack() == (body + bytes.fromhex(GOLDEN["segment"])).ljust(PAGE, b"\0")


def test_golden_slot_header() -> None:
    body = (
        b"KVSTSLOT" + bytes.fromhex("0100 0000 00010000") + bytes(range(64))
        + bytes.fromhex("efcdab8967452301 0500000000000000 401f000000000000 1032547698badcfe")
        + bytes.fromhex("2a00000000000000 01505c18a3010000 28735c18a3010000")
    ).ljust(248, b"\0")  # fmt: skip
    assert pack(SLOT) == (body + bytes.fromhex(GOLDEN["slot"])).ljust(PAGE, b"\0")


def test_golden_index() -> None:
    body = (
        b"KVSTINDX" + bytes.fromhex("0100 0000 01000000 0030000000000000 0100000000000000")
        + bytes.fromhex("0700000000000000 4d00000000000000 00800e0000000000 0000b49376e2fa18")
        + bytes(range(32)) + bytes.fromhex("00000000 05000000")
        + bytes.fromhex("401f000000000000 1032547698badcfe 2a00000000000000 28735c18a3010000")
    )  # fmt: skip
    assert index_file().pack() == body + bytes.fromhex(GOLDEN["index"])
    assert (INDEX_SEGMENT_DTYPE.itemsize, INDEX_ENTRY_DTYPE.itemsize) == (32, 72)


GOLDEN = {"segment": "6b9783750313ceb0", "slot": "b055a614e16f949f", "index": "3e1bb6682b265123"}
"""The XXH3-64 checksums behind the bytes above."""


@pytest.mark.parametrize(
    ("block_bytes", "stride"),
    [(1, 2 * PAGE), (PAGE, 2 * PAGE), (PAGE + 1, 3 * PAGE), (2**20, 2**20 + PAGE)],
)
def test_golden_offsets(block_bytes: int, stride: int) -> None:
    assert slot_stride(block_bytes) == stride
    assert [slot_offset(n, stride) for n in range(3)] == [PAGE, PAGE + stride, PAGE + 2 * stride]
    assert segment_size(3, stride) == slot_offset(3, stride)


def test_golden_names() -> None:
    assert segment_name(0xAB) == "seg-00000000000000ab.kv"
