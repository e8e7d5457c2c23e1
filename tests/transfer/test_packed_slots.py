"""Slots in memory, and which ranges of an object are fetched together."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.tiers.nvme_format import SlotHeader
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, Buffers, round_up
from kvstrata.transfer.packed_slots import judge_slots, merged_ranges, pack_slots, request_bytes
from kvstrata.transfer.slot_header import (
    GOOD,
    HEADER_BYTES,
    WRONG_CHECKSUM,
    WRONG_HEADER,
    WRONG_KEY,
    WRONG_LENGTH,
    WRONG_PLACE,
)
from store_kit import NAMESPACE, chain, content

SPACE = np.frombuffer(NAMESPACE.digest, dtype=np.int64)
STRIDE = PAGE + 16 * PAGE
LENGTHS = [1, 255, 4096, 4097, 65_536, 40_000]


class Packed:
    """Six blocks of those lengths in a buffer that was full of rubbish."""

    def __init__(self) -> None:
        self.keys = chain(1, len(LENGTHS))
        self.blocks = [content(key, size) for key, size in zip(self.keys, LENGTHS, strict=True)]
        self.arena = Arena(len(LENGTHS) * STRIDE)
        self.arena.view[:] = b"\xee" * len(self.arena.view)
        self.base = int(np.frombuffer(self.arena.view, np.uint8).ctypes.data)
        self.sources = Buffers.of(self.blocks, writable=False)
        self.rows = self.describe(self.sources)
        pack_slots(self.rows, SPACE)

    def describe(self, buffers: Buffers) -> np.ndarray:
        rows = np.zeros((len(LENGTHS), k.COLUMNS), dtype=np.int64)
        rows[:, k.NUMBER] = np.arange(len(LENGTHS))
        rows[:, k.OFFSET] = self.base + rows[:, k.NUMBER] * STRIDE
        rows[:, k.SEGMENT] = 77
        rows[:, k.SEQUENCE] = 5
        rows[:, k.CREATED_MS], rows[:, k.EXPIRES_MS] = 123, 456
        rows[:, k.KEY : k.KEY + 4] = np.frombuffer(b"".join(self.keys), np.int64).reshape(-1, 4)
        rows[:, k.ADDRESS], rows[:, k.LENGTH] = buffers.addresses, buffers.lengths
        return rows

    def judged(self, *, end: int | None = None) -> tuple[list[int], list[bytearray]]:
        targets = [bytearray(size) for size in LENGTHS]
        rows = self.describe(Buffers.of(targets, writable=True))
        rows[:, k.CHECKSUM] = self.rows[:, k.CHECKSUM]
        judge_slots(rows, self.base + len(self.arena.view) if end is None else end)
        return rows[:, k.RESULT].tolist(), targets


def test_slots_are_those_of_a_file() -> None:
    packed = Packed()
    for number, (key, block) in enumerate(zip(packed.keys, packed.blocks, strict=True)):
        slot = bytes(packed.arena.view[number * STRIDE : (number + 1) * STRIDE])
        digest = xxhash.xxh3_64_intdigest(block)
        assert int(packed.rows[number, k.CHECKSUM]) & (2**64 - 1) == digest
        header = SlotHeader.unpack(memoryview(slot))
        assert header is not None
        assert (header.key, header.length, header.checksum) == (key, len(block), digest)
        assert (header.segment_id, header.number, header.sequence) == (77, number, 5)
        assert slot[HEADER_BYTES:PAGE] == bytes(PAGE - HEADER_BYTES)
        padded = round_up(len(block), PAGE)
        assert slot[PAGE : PAGE + padded] == block.ljust(padded, b"\0")
        assert set(slot[PAGE + padded :]) <= {0xEE}, "bytes behind the payload's pages were touched"


def test_what_was_packed_is_judged_good() -> None:
    packed = Packed()
    assert packed.judged() == ([GOOD] * len(LENGTHS), [bytearray(block) for block in packed.blocks])


def test_a_known_checksum_is_taken() -> None:
    packed = Packed()
    packed.rows[:, k.FLAGS] = k.KNOWN
    packed.rows[:, k.CHECKSUM] += 1
    pack_slots(packed.rows, SPACE)
    assert packed.judged()[0] == [WRONG_CHECKSUM] * len(LENGTHS)


def test_a_good_block_goes_to_two_places() -> None:
    packed = Packed()
    targets, copies = ([bytearray(size) for size in LENGTHS] for _ in range(2))
    rows = packed.describe(Buffers.of(targets, writable=True))
    rows[:, k.CHECKSUM] = packed.rows[:, k.CHECKSUM]
    rows[::2, k.COPY_TO] = Buffers.of(copies, writable=True).addresses[::2]
    judge_slots(rows, packed.base + len(packed.arena.view))
    assert not rows[:, k.RESULT].any()
    assert targets == packed.blocks
    assert copies[::2] == packed.blocks[::2]
    assert not any(map(any, copies[1::2]))


@pytest.mark.parametrize(
    ("column", "verdict"),
    [
        (k.SEGMENT, WRONG_PLACE),
        (k.NUMBER, WRONG_PLACE),
        (k.KEY, WRONG_KEY),
        (k.KEY_3, WRONG_KEY),
        (k.LENGTH, WRONG_LENGTH),
        (k.CHECKSUM, WRONG_CHECKSUM),
    ],
)
def test_another_block_is_refused(column: int, verdict: int) -> None:
    packed = Packed()
    target = bytearray(max(LENGTHS))
    rows = packed.describe(Buffers.of([target] * len(LENGTHS), writable=True))[1:2]
    rows[:, [k.LENGTH, k.CHECKSUM]] = packed.rows[1:2, [k.LENGTH, k.CHECKSUM]]
    rows[:, column] -= 1
    judge_slots(rows, packed.base + len(packed.arena.view))
    assert rows[0, k.RESULT] == verdict
    assert not any(target), "an unverified block was handed out"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(LENGTHS) * STRIDE - 1), st.integers(0, 7))
def test_a_flipped_bit_is_seen_or_does_not_matter(place: int, bit: int) -> None:
    packed = Packed()
    packed.arena.view[place] ^= 1 << bit
    results, targets = packed.judged()
    number, within = divmod(place, STRIDE)
    matters = within < HEADER_BYTES or PAGE <= within < PAGE + LENGTHS[number]
    for other, (result, target) in enumerate(zip(results, targets, strict=True)):
        if other == number and matters:
            assert result == (WRONG_HEADER if within < HEADER_BYTES else WRONG_CHECKSUM)
        else:
            assert result == GOOD and target == packed.blocks[other]


@pytest.mark.parametrize("number", range(len(LENGTHS)))
@pytest.mark.parametrize("missing", [1, 5000, 70_000])
def test_what_ends_early_is_never_read(number: int, missing: int) -> None:
    packed = Packed()
    end = packed.base + number * STRIDE + PAGE + LENGTHS[number]
    assert packed.judged(end=end)[0][number] == GOOD
    results, _ = packed.judged(end=end - missing)
    assert results[number:] == [WRONG_HEADER] * (len(LENGTHS) - number)


ranges = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=40)


@settings(max_examples=300, deadline=None)
@given(ranges, st.integers(0, 50), st.integers(1, 200))
def test_ranges_are_merged_within_bounds(pairs: list[tuple[int, int]], gap: int, limit: int) -> None:
    starts = np.array([start for start, _ in pairs], dtype=np.int64)
    ends = starts + np.array([size for _, size in pairs], dtype=np.int64)
    groups = merged_ranges(starts, ends, gap_bytes=gap, limit_bytes=limit)
    assert sorted(number for group in groups for number in group.tolist()) == list(range(len(pairs)))
    spans = [(int(starts[group].min()), int(ends[group].max())) for group in groups]
    for group, (first, last) in zip(groups, spans, strict=True):
        assert (
            last - first <= limit
            or len(group) == 1
            or last - first == int((ends[group] - starts[group]).max())
        ), "a request is longer than it may be"
        reach = first
        for number in group.tolist():
            assert int(starts[number]) - reach <= gap, "a gap is fetched that is too wide"
            reach = max(reach, int(ends[number]))
    for (_, last), (first, _), before, after in zip(spans, spans[1:], groups, groups[1:], strict=False):
        low, high = int(starts[before].min()), int(max(ends[before].max(), ends[after[0]]))
        assert first - last > gap or high - low > limit, "two requests where one would do"


def test_requests_keep_all_threads_busy() -> None:
    assert request_bytes(100, 8, 10, 50) == 13
    assert request_bytes(100, 8, 20, 50) == 20
    assert request_bytes(1000, 8, 20, 50) == 50
