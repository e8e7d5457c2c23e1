"""Batches: the messages that journals and access logs are made of. No I/O here.

A batch is a head (magic, version, kind, payload bytes, number, published bytes), the XXH3 of head and
payload, and the payload. A file of batches only grows, so what is whole stays whole.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum

import numpy as np
from numpy.typing import NDArray

from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE, Entries, plausible
from kvstrata.tiers.shared.format import VERSION, ExtentId, checksum

MOST_PAYLOAD_BYTES = 2**31

GONE_DTYPE = np.dtype([("member", "<u8"), ("sequence", "<u8")])

_BATCH = struct.Struct("<8sHHIQQ")
_ADD = struct.Struct("<QQQQQQ32s")
_ACCESS = struct.Struct("<II")
_CHECKSUM = struct.Struct("<Q")
BATCH_MAGIC = b"KVSTJRNL"
BATCH_BYTES = _BATCH.size + _CHECKSUM.size

_ADOPTED = 1


class BatchKind(IntEnum):
    ADD = 1
    GONE = 2
    SNAPSHOT = 3
    """All that this member stands for now: what it said before is void. First in a compacted journal."""
    ACCESS = 4


@dataclass(frozen=True, slots=True)
class Added:
    """An extent that a member published, or adopted.

    file_bytes: on the medium. entries: of ENTRY_DTYPE, in the order of their slots.
    """

    extent: ExtentId
    file_bytes: int
    stride: int
    namespace: bytes
    entries: Entries
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class Touched:
    """What one request touched: the first 8 bytes of keys as little-endian words, root first."""

    request: int
    words: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Batch:
    """A member's message. number: of this batch among all of the member's.

    published_bytes: all that the member has ever published, of what it wrote itself and did not adopt.
    """

    kind: BatchKind
    number: int
    published_bytes: int
    added: tuple[Added, ...] = ()
    gone: tuple[ExtentId, ...] = ()
    touched: tuple[Touched, ...] = ()


class Tail(Enum):
    """What follows the whole batches of some bytes."""

    NOTHING = "nothing"
    SHORT = "short"
    """Perhaps the beginning of a batch that is being written."""
    WRONG = "wrong"
    """No batch of this version, however much may follow."""


def encode_batch(batch: Batch) -> bytes:
    if batch.kind in (BatchKind.ADD, BatchKind.SNAPSHOT):
        payload = b"".join(_pack_added(added) for added in batch.added)
    elif batch.kind is BatchKind.GONE:
        payload = np.array(batch.gone, np.uint64).reshape(-1, 2).astype("<u8").tobytes()
    else:
        payload = b"".join(
            _ACCESS.pack(touched.request & 0xFFFFFFFF, len(touched.words))
            + touched.words.astype("<u8").tobytes()
            for touched in batch.touched
        )
    assert len(payload) <= MOST_PAYLOAD_BYTES, "a batch is too large"
    head = _BATCH.pack(BATCH_MAGIC, VERSION, batch.kind, len(payload), batch.number, batch.published_bytes)
    return head + _CHECKSUM.pack(checksum(head, payload)) + payload


def decode_batches(data: bytes | memoryview, start: int = 0) -> tuple[list[Batch], int, Tail]:
    """All whole batches from `start` on, where they end, and what follows."""
    view = memoryview(data)
    batches: list[Batch] = []
    while True:
        batch, end, tail = _decode_one(view, start)
        if batch is None:
            return batches, start, tail
        batches.append(batch)
        start = end


def find_batch(data: bytes | memoryview, start: int) -> int | None:
    """Where the next whole batch begins behind damage, at `start` or later."""
    whole = bytes(data)
    while (place := whole.find(BATCH_MAGIC, start)) >= 0:
        if _decode_one(memoryview(whole), place)[0] is not None:
            return place
        start = place + 1
    return None


def _decode_one(view: memoryview, start: int) -> tuple[Batch | None, int, Tail]:
    left = len(view) - start
    if not left:
        return None, start, Tail.NOTHING
    magic = bytes(view[start : start + len(BATCH_MAGIC)])
    if magic != BATCH_MAGIC[: len(magic)]:
        return None, start, Tail.WRONG
    if left < BATCH_BYTES:
        return None, start, Tail.SHORT
    _, version, kind, size, number, published = _BATCH.unpack_from(view, start)
    if version != VERSION or size > MOST_PAYLOAD_BYTES:
        return None, start, Tail.WRONG
    begin = start + BATCH_BYTES
    if left < BATCH_BYTES + size:
        return None, start, Tail.SHORT
    payload = view[begin : begin + size]
    (digest,) = _CHECKSUM.unpack_from(view, start + _BATCH.size)
    if digest != checksum(view[start : start + _BATCH.size], payload):
        return None, start, Tail.WRONG
    batch = _unpack_payload(kind, number, published, payload)
    return batch, begin + size, Tail.NOTHING if batch else Tail.WRONG


def _unpack_payload(kind: int, number: int, published: int, payload: memoryview) -> Batch | None:
    if kind in (BatchKind.ADD, BatchKind.SNAPSHOT):
        added = _unpack_added(payload)
        return None if added is None else Batch(BatchKind(kind), number, published, added=added)
    if kind == BatchKind.GONE:
        if len(payload) % GONE_DTYPE.itemsize:
            return None
        pairs = np.frombuffer(payload, GONE_DTYPE).tolist()
        return Batch(BatchKind.GONE, number, published, gone=tuple(ExtentId(*pair) for pair in pairs))
    if kind == BatchKind.ACCESS:
        touched = _unpack_touched(payload)
        return None if touched is None else Batch(BatchKind.ACCESS, number, published, touched=touched)
    return None


def _pack_added(added: Added) -> bytes:
    head = _ADD.pack(
        added.extent.member,
        added.extent.sequence,
        added.file_bytes,
        added.stride,
        _ADOPTED if added.adopted else 0,
        len(added.entries),
        added.namespace,
    )
    return head + added.entries.tobytes()


def _unpack_added(payload: memoryview) -> tuple[Added, ...] | None:
    found: list[Added] = []
    place = 0
    while place < len(payload):
        if len(payload) - place < _ADD.size:
            return None
        member, sequence, size, stride, flags, count, namespace = _ADD.unpack_from(payload, place)
        place += _ADD.size
        end = place + count * ENTRY_DTYPE.itemsize
        if end > len(payload):
            return None
        # A copy: what the file's bytes were read into may be much larger.
        entries = np.frombuffer(payload[place:end], ENTRY_DTYPE).copy()
        if not plausible(entries, stride):
            return None
        found.append(
            Added(ExtentId(member, sequence), size, stride, namespace, entries, bool(flags & _ADOPTED))
        )
        place = end
    return tuple(found)


def _unpack_touched(payload: memoryview) -> tuple[Touched, ...] | None:
    found: list[Touched] = []
    place = 0
    while place < len(payload):
        if len(payload) - place < _ACCESS.size:
            return None
        request, count = _ACCESS.unpack_from(payload, place)
        place += _ACCESS.size
        end = place + 8 * count
        if end > len(payload):
            return None
        found.append(Touched(request, np.frombuffer(payload[place:end], "<u8").astype(np.uint64)))
        place = end
    return tuple(found)
