"""The compiled slot header is the one that Python writes and reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers import nvme_format
from kvstrata.tiers.nvme_format import SlotHeader
from kvstrata.transfer import slot_header as s
from kvstrata.transfer.buffers import PAGE, Arena, address_of

word = st.integers(0, 2**64 - 1)
headers = st.builds(
    SlotHeader, st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32),
    word, word, word, word, word, word, word,
)  # fmt: skip


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def words(data: bytes) -> list[int]:
    return np.frombuffer(data, dtype=np.int64).tolist()


def make(header: SlotHeader) -> bytes:
    page = Arena(PAGE)
    page.view[:] = b"\xa5" * PAGE
    s.make_header(
        address_of(page.view),
        *words(header.key),
        np.frombuffer(header.namespace, dtype=np.int64),
        *(
            signed(value)
            for value in (
                header.segment_id, header.number, header.length, header.checksum, header.sequence,
                header.created_ms, header.expires_ms,
            )
        ),
    )  # fmt: skip
    assert bytes(page.view[s.HEADER_BYTES :]) == b"\xa5" * (PAGE - s.HEADER_BYTES)
    return bytes(page.view)


def judge(page: bytes, header: SlotHeader) -> int:
    """Is this page the header that was expected?"""
    memory = Arena(PAGE)
    memory.view[: len(page)] = page
    return int(
        s.judge_header(
            address_of(memory.view),
            *words(header.key),
            signed(header.segment_id),
            signed(header.number),
            signed(header.length),
            signed(header.checksum),
        )
    )


def packed(header: SlotHeader) -> bytes:
    page = bytearray(PAGE)
    header.pack_into(memoryview(page))
    return bytes(page)


def changed(header: SlotHeader, **fields: object) -> SlotHeader:
    values = {name: getattr(header, name) for name in SlotHeader.__slots__}
    return SlotHeader(**(values | fields))


SOME = SlotHeader(bytes(range(32)), bytes(range(32, 64)), 1 << 63, 7, 8192, 2**64 - 1, 3, 4, 5)


def test_the_constants_are_those_of_the_format() -> None:
    assert s.MAGIC == nvme_format.SLOT_MAGIC
    assert s.VERSION == nvme_format.VERSION
    assert s.REASONS[s.GOOD] == "" and len(s.REASONS) == 6


@given(headers)
def test_both_make_the_same_bytes(header: SlotHeader) -> None:
    made = make(header)
    assert made[: s.HEADER_BYTES] == packed(header)[: s.HEADER_BYTES]
    assert SlotHeader.unpack(memoryview(made)) == header


@given(headers)
def test_what_python_makes_is_good(header: SlotHeader) -> None:
    assert judge(packed(header), header) == s.GOOD


OTHER = {
    "segment_id": (1 << 63 | 1, s.WRONG_PLACE),
    "number": (8, s.WRONG_PLACE),
    "length": (8191, s.WRONG_LENGTH),
    "checksum": (0, s.WRONG_CHECKSUM),
    "namespace": (bytes(32), s.GOOD),
    "sequence": (9, s.GOOD),
    "created_ms": (9, s.GOOD),
    "expires_ms": (9, s.GOOD),
}


@pytest.mark.parametrize("field", OTHER)
def test_a_whole_header_of_something_else(field: str) -> None:
    value, verdict = OTHER[field]
    assert judge(packed(changed(SOME, **{field: value})), SOME) == verdict


@pytest.mark.parametrize("place", range(32))
def test_every_byte_of_the_key_counts(place: int) -> None:
    key = bytearray(SOME.key)
    key[place] ^= 1
    assert judge(packed(changed(SOME, key=bytes(key))), SOME) == s.WRONG_KEY


@given(st.integers(0, s.HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_seen(bit: int) -> None:
    page = bytearray(packed(SOME))
    page[bit // 8] ^= 1 << bit % 8
    assert judge(bytes(page), SOME) == s.WRONG_HEADER
    assert SlotHeader.unpack(memoryview(page)) is None


def test_another_version_and_an_empty_slot() -> None:
    assert judge(bytes(PAGE), SOME) == s.WRONG_HEADER
    page = bytearray(packed(SOME))
    page[8] = 2
    page[s.CHECKED_BYTES : s.HEADER_BYTES] = nvme_format.xxhash.xxh3_64_intdigest(
        page[: s.CHECKED_BYTES]
    ).to_bytes(8, "little")
    assert judge(bytes(page), SOME) == s.WRONG_HEADER
    assert SlotHeader.unpack(memoryview(page)) is None


def test_the_first_difference_decides() -> None:
    """Place before key before length before checksum: the word for what is wrong names the cause."""
    other = changed(SOME, segment_id=1, key=bytes(32), length=1, checksum=1)
    assert judge(packed(other), SOME) == s.WRONG_PLACE
    assert judge(packed(changed(other, segment_id=SOME.segment_id)), SOME) == s.WRONG_KEY
    other = changed(SOME, length=1, checksum=1)
    assert judge(packed(other), SOME) == s.WRONG_LENGTH
