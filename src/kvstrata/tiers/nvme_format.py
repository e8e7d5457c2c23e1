"""What lies in a folder of the nvme tier, byte by byte. Little endian, version 1. No I/O here.

    kvstrata.json        marker: format name and version
    LOCK                 who owns the folder now (flock)
    namespaces.json      digest -> fields, for people
    seg-<id>.kv          a segment: one page of segment header, then slots of equal size
    index.kv             the table after a clean close; absent while a process owns the folder

A slot is one page of slot header and the payload in whole pages, so that one vectored O_DIRECT call
moves both, and a reader needs nothing but the slot to know whose bytes these are and whether they are
whole. Header and payload carry XXH3-64 checksums. Segment id and slot number are in the header too:
bytes that turn up in another place are damage.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstrata.table import ENTRY_DTYPE
from kvstrata.transfer import slot_header
from kvstrata.transfer.buffers import PAGE, round_up
from kvstrata.transfer.slot_header import CHECKED_BYTES, HEADER_BYTES

FORMAT = "kvstrata-nvme"
VERSION = slot_header.VERSION

MARKER_FILE = "kvstrata.json"
LOCK_FILE = "LOCK"
NAMESPACES_FILE = "namespaces.json"
INDEX_FILE = "index.kv"
PROBE_FILE = "write.probe"
SEGMENT_GLOB = "seg-*.kv"

SEGMENT_MAGIC = b"KVSTSEGM"
SLOT_MAGIC = slot_header.MAGIC
INDEX_MAGIC = b"KVSTINDX"

_SEGMENT = struct.Struct("<8sHHIQQQQ")
_SLOT = struct.Struct("<8sHHI32s32sQQQQQQQ")
_CHECKSUM = struct.Struct("<Q")
_INDEX = struct.Struct("<8sHHIQQ")

ENTRY_FIELDS = ("key", "length", "checksum", "sequence", "expires_ms")
"""What the table, the index and a slot header all know of a block."""

INDEX_SEGMENT_DTYPE = np.dtype([("id", "<u8"), ("slots", "<u8"), ("size", "<u8"), ("mtime_ns", "<u8")])
INDEX_ENTRY_DTYPE = np.dtype(
    [("key", "V32"), ("segment", "<u4"), ("slot", "<u4"), ("length", "<u8"), ("checksum", "<u8"),
     ("sequence", "<u8"), ("expires_ms", "<u8")]
)  # fmt: skip
SLOT_HEADER_DTYPE = np.dtype(
    [("magic", "V8"), ("version", "<u2"), ("flags", "<u2"), ("header_bytes", "<u4"), ("key", "V32"),
     ("namespace", "V32"), ("segment_id", "<u8"), ("number", "<u8"), ("length", "<u8"),
     ("checksum", "<u8"), ("sequence", "<u8"), ("created_ms", "<u8"), ("expires_ms", "<u8")]
)  # fmt: skip
"""The bytes of `SlotHeader` that are not zero, its own checksum left out."""


def slot_stride(block_bytes: int) -> int:
    """Bytes from one slot to the next."""
    return PAGE + round_up(block_bytes, PAGE)


def segment_size(slots: int, stride: int) -> int:
    return PAGE + slots * stride


def slot_offset(number: int, stride: int) -> int:
    return PAGE + number * stride


def segment_name(segment_id: int) -> str:
    return f"seg-{segment_id:016x}.kv"


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """First page of a segment."""

    segment_id: int
    stride: int
    slots: int
    created_ms: int

    def pack(self) -> bytes:
        body = _SEGMENT.pack(
            SEGMENT_MAGIC,
            VERSION,
            0,
            PAGE,
            self.segment_id,
            self.stride,
            self.slots,
            self.created_ms,
        )
        return (body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(PAGE, b"\0")

    @staticmethod
    def unpack(page: bytes | memoryview) -> SegmentHeader | None:
        """None for anything that is not an intact header of this version."""
        if len(page) < _SEGMENT.size + 8:
            return None
        magic, version, _, _, segment_id, stride, slots, created = _SEGMENT.unpack_from(page)
        (checksum,) = _CHECKSUM.unpack_from(page, _SEGMENT.size)
        if magic != SEGMENT_MAGIC or version != VERSION or stride % PAGE or stride <= PAGE or slots < 1:
            return None
        if checksum != xxhash.xxh3_64_intdigest(bytes(page[: _SEGMENT.size])):
            return None
        return SegmentHeader(segment_id, stride, slots, created)


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """First page of a slot. checksum: XXH3-64 of the `length` payload bytes."""

    key: bytes
    namespace: bytes
    segment_id: int
    number: int
    length: int
    checksum: int
    sequence: int
    created_ms: int
    expires_ms: int

    def pack_into(self, page: memoryview) -> None:
        """Write the header to the first 256 bytes of a page; the rest of the page is left as it is."""
        _SLOT.pack_into(
            page, 0, SLOT_MAGIC, VERSION, 0, HEADER_BYTES, self.key, self.namespace,
            self.segment_id, self.number, self.length, self.checksum, self.sequence, self.created_ms,
            self.expires_ms,
        )  # fmt: skip
        page[_SLOT.size : CHECKED_BYTES] = bytes(CHECKED_BYTES - _SLOT.size)
        digest = xxhash.xxh3_64_intdigest(page[:CHECKED_BYTES])
        _CHECKSUM.pack_into(page, CHECKED_BYTES, digest)

    @staticmethod
    def unpack(page: memoryview) -> SlotHeader | None:
        """None for anything that is not an intact header of this version."""
        if len(page) < HEADER_BYTES or page[:8] != SLOT_MAGIC:
            return None
        (checksum,) = _CHECKSUM.unpack_from(page, CHECKED_BYTES)
        if checksum != xxhash.xxh3_64_intdigest(page[:CHECKED_BYTES]):
            return None
        _, version, _, _, *fields = _SLOT.unpack_from(page)
        return SlotHeader(*fields) if version == VERSION else None


@dataclass(frozen=True, slots=True)
class IndexFile:
    """The table as it was at a clean close. entries are numpy rows of INDEX_ENTRY_DTYPE, coldest first."""

    stride: int
    segments: NDArray[Any]
    entries: NDArray[Any]

    def pack(self) -> bytes:
        head = _INDEX.pack(INDEX_MAGIC, VERSION, 0, len(self.segments), self.stride, len(self.entries))
        body = head + self.segments.tobytes() + self.entries.tobytes()
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))

    @staticmethod
    def unpack(data: bytes) -> IndexFile | None:
        """None for anything that is not an intact index of this version."""
        if len(data) < _INDEX.size + 8:
            return None
        magic, version, _, segments, stride, entries = _INDEX.unpack_from(data)
        if magic != INDEX_MAGIC or version != VERSION:
            return None
        split = _INDEX.size + segments * INDEX_SEGMENT_DTYPE.itemsize
        end = split + entries * INDEX_ENTRY_DTYPE.itemsize
        if len(data) != end + 8:
            return None
        if _CHECKSUM.unpack_from(data, end)[0] != xxhash.xxh3_64_intdigest(data[:end]):
            return None
        return IndexFile(
            stride,
            np.frombuffer(data, INDEX_SEGMENT_DTYPE, segments, _INDEX.size),
            np.frombuffer(data, INDEX_ENTRY_DTYPE, entries, split),
        )


def index_rows(entries: NDArray[Any], segments: NDArray[Any], numbers: NDArray[Any]) -> NDArray[Any]:
    """Rows for IndexFile of entries of `kvstrata.table.ENTRY_DTYPE`.

    segments: per entry, its segment's position in the index. numbers: its slot in that segment.
    """
    rows = np.zeros(len(entries), INDEX_ENTRY_DTYPE)
    rows["segment"], rows["slot"] = segments, numbers
    for name in ENTRY_FIELDS:
        rows[name] = entries[name]
    return rows


def entries_of(rows: NDArray[Any], slots: NDArray[Any]) -> NDArray[Any]:
    """Entries of `kvstrata.table.ENTRY_DTYPE` from rows of an index or slot headers.

    slots: of the table, per row.
    """
    entries = np.zeros(len(rows), ENTRY_DTYPE)
    entries["slot"] = slots
    for name in ENTRY_FIELDS:
        entries[name] = rows[name]
    return entries
