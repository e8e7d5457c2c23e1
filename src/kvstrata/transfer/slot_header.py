"""The header page of a slot, made and judged by compiled code (`SlotHeader` is the same in Python).

64-bit little-endian words: magic, version and header size, key (4), namespace (4), segment id, number,
payload length, payload XXH3-64, sequence, created (Unix ms), expires (Unix ms), zeros, and in the last word
of the first 256 bytes the XXH3-64 of what stands before it.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.transfer.native import load_i64, store_i64
from kvstrata.transfer.xxh3 import xxh3_64

MAGIC = b"KVSTSLOT"
VERSION = 1
HEADER_BYTES = 256
CHECKED_BYTES = HEADER_BYTES - 8

Words = NDArray[Any]

_MAGIC_WORD = int.from_bytes(MAGIC, "little")
_VERSION_WORD = VERSION | HEADER_BYTES << 32
_VERSION_MASK = 0xFFFF
_KEY, _NAMESPACE = 16, 48
_SEGMENT, _NUMBER, _LENGTH, _CHECKSUM, _SEQUENCE, _CREATED, _EXPIRES = range(80, 136, 8)
_ZEROS = 136
NAMESPACE_BYTE, CHECKSUM_BYTE, EXPIRES_BYTE = _NAMESPACE, _CHECKSUM, _EXPIRES
"""Where these words stand, for who reads them from a header that is intact."""

GOOD, WRONG_HEADER, WRONG_PLACE, WRONG_KEY, WRONG_LENGTH, WRONG_CHECKSUM = range(6)
REASONS = ("", "header", "place", "key", "length", "checksum")
"""The word for each verdict."""


@kernel
def make_header(
    page: int,
    key0: int,
    key1: int,
    key2: int,
    key3: int,
    space: Words,
    segment: int,
    number: int,
    length: int,
    checksum: int,
    sequence: int,
    created: int,
    expires: int,
) -> Any:
    """Write the first 256 bytes of the page at an address. space: the namespace's digest, (4,) int64."""
    store_i64(page, _MAGIC_WORD)
    store_i64(page + 8, _VERSION_WORD)
    store_i64(page + _KEY, key0)
    store_i64(page + _KEY + 8, key1)
    store_i64(page + _KEY + 16, key2)
    store_i64(page + _KEY + 24, key3)
    for word in range(4):
        store_i64(page + _NAMESPACE + 8 * word, space[word])
    store_i64(page + _SEGMENT, segment)
    store_i64(page + _NUMBER, number)
    store_i64(page + _LENGTH, length)
    store_i64(page + _CHECKSUM, checksum)
    store_i64(page + _SEQUENCE, sequence)
    store_i64(page + _CREATED, created)
    store_i64(page + _EXPIRES, expires)
    for place in range(_ZEROS, CHECKED_BYTES, 8):
        store_i64(page + place, 0)
    store_i64(page + CHECKED_BYTES, xxh3_64(page, CHECKED_BYTES))


@kernel
def intact(page: int) -> Any:
    """Does the page at an address begin with a header that is whole, of this version?"""
    return (
        load_i64(page) == _MAGIC_WORD
        and load_i64(page + CHECKED_BYTES) == xxh3_64(page, CHECKED_BYTES)
        and load_i64(page + 8) & _VERSION_MASK == VERSION
    )


@kernel
def judge_header(
    page: int,
    key0: int,
    key1: int,
    key2: int,
    key3: int,
    segment: int,
    number: int,
    length: int,
    checksum: int,
) -> Any:
    """Is this the header of that block in that place? checksum: the payload's, as the table knows it."""
    if not intact(page):
        return WRONG_HEADER
    if load_i64(page + _SEGMENT) != segment or load_i64(page + _NUMBER) != number:
        return WRONG_PLACE
    if (
        load_i64(page + _KEY) != key0
        or load_i64(page + _KEY + 8) != key1
        or load_i64(page + _KEY + 16) != key2
        or load_i64(page + _KEY + 24) != key3
    ):
        return WRONG_KEY
    if load_i64(page + _LENGTH) != length:
        return WRONG_LENGTH
    # An older copy of the slot is whole in itself, but is not what was saved.
    return GOOD if load_i64(page + _CHECKSUM) == checksum else WRONG_CHECKSUM
