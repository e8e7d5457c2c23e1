"""An extent as a file: slots of one stride, then a footer that lists what is in them. No I/O here.

A slot is a page of header (`kvstrata.transfer.slot_header`) and a payload in whole pages. The footer is
whole pages too, and its trailer ends where the file ends: a reader finds it with one read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.tiers.shared.format import VERSION, ExtentId, checksum
from kvstrata.transfer.buffers import PAGE, round_up

LENGTH_LIMIT = 2**32
"""A block is smaller: its length is a 32-bit word."""

ENTRY_DTYPE = np.dtype(
    [("key", "V32"), ("number", "<u4"), ("length", "<u4"), ("checksum", "<u8"), ("expires_ms", "<i8"),
     ("sequence", "<i8")]
)  # fmt: skip
"""A block of an extent: its slot there, and what its slot's header says of it."""

Entries = NDArray[Any]

_TRAILER = struct.Struct("<8sHHIQ32sQQQ")
_CHECKSUM = struct.Struct("<Q")
FOOTER_MAGIC = b"KVSTFOOT"
TRAILER_BYTES = _TRAILER.size + _CHECKSUM.size


def plausible(entries: Entries, stride: int) -> bool:
    """Can these be slots of an extent?"""
    if stride <= PAGE or stride % PAGE or stride >= 2 * LENGTH_LIMIT:
        return False
    lengths = entries["length"]
    return not len(entries) or bool(lengths.min() >= 1 and int(lengths.max()) <= stride - PAGE)


def slot_stride(block_bytes: int) -> int:
    """Bytes from one slot to the next: a page of header, and the payload in whole pages."""
    return PAGE + round_up(block_bytes, PAGE)


def footer_bytes(entries: int) -> int:
    return round_up(entries * ENTRY_DTYPE.itemsize + TRAILER_BYTES, PAGE)


def extent_bytes(slots: int, stride: int) -> int:
    """Of a sealed extent with so many slots, all of them used."""
    return slots * stride + footer_bytes(slots)


def slots_within(size: int, stride: int) -> int:
    """How many slots fit into an extent of at most `size` bytes, footer included; may be 0."""
    slots = max(0, size // stride)
    while slots and extent_bytes(slots, stride) > size:
        slots -= 1
    return slots


@dataclass(frozen=True, slots=True)
class Footer:
    """The end of an extent: which blocks lie in it. slots: places before the footer, used or not."""

    extent: ExtentId
    stride: int
    namespace: bytes
    slots: int
    entries: Entries

    @property
    def start(self) -> int:
        """Where in the file it begins."""
        return self.slots * self.stride

    def encode(self) -> bytes:
        """Whole pages; the trailer is their end."""
        body = self.entries.tobytes()
        trailer = _TRAILER.pack(
            FOOTER_MAGIC, VERSION, 0, len(self.entries), self.stride, self.namespace,
            self.extent.member, self.extent.sequence, self.slots,
        )  # fmt: skip
        padding = bytes(footer_bytes(len(self.entries)) - len(body) - TRAILER_BYTES)
        return body + padding + trailer + _CHECKSUM.pack(checksum(body, trailer))

    @staticmethod
    def size_in(tail: bytes | memoryview) -> int | None:
        """How long the footer at the end of these bytes is, by its trailer; None if there is none."""
        if len(tail) < TRAILER_BYTES:
            return None
        magic, version, _, count, *_ = _TRAILER.unpack_from(tail, len(tail) - TRAILER_BYTES)
        return footer_bytes(count) if magic == FOOTER_MAGIC and version == VERSION else None

    @staticmethod
    def decode(tail: bytes | memoryview, extent: ExtentId) -> Footer | None:
        """From bytes that end where the file ends; None unless they hold that extent's whole footer."""
        size = Footer.size_in(tail)
        if size is None or len(tail) < size:
            return None
        view = memoryview(tail)
        at = len(view) - TRAILER_BYTES
        _, _, _, count, stride, namespace, member, sequence, slots = _TRAILER.unpack_from(view, at)
        begin = len(view) - size
        body = view[begin : begin + count * ENTRY_DTYPE.itemsize]
        (digest,) = _CHECKSUM.unpack_from(view, at + _TRAILER.size)
        if digest != checksum(body, view[at : at + _TRAILER.size]) or extent != ExtentId(member, sequence):
            return None
        entries = np.frombuffer(body, ENTRY_DTYPE).copy()
        if not plausible(entries, stride) or (count and int(entries["number"].max()) >= slots):
            return None
        return Footer(extent, stride, namespace, slots, entries)
