"""The kernels' digests against the C library's, and what the copying one writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.transfer.buffers import Arena, address_of
from kvstrata.transfer.xxh3 import copy_xxh3_64, xxh3_64

KIB, MIB = 1024, 1024 * 1024
SPACE = 3 * MIB
GUARD = 256
UNTOUCHED = 0xA5

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def source() -> Bytes:
    """Random bytes, aligned to a page."""
    space = np.frombuffer(Arena(SPACE).view, np.uint8)
    space[:] = np.random.default_rng(4).integers(0, 256, SPACE, np.uint8)
    return space


@pytest.fixture(scope="module")
def target() -> Bytes:
    return np.frombuffer(Arena(SPACE).view, np.uint8)


def start(array: Bytes) -> int:
    return address_of(memoryview(array)) if len(array) else array.ctypes.data


def check_digest(data: Bytes) -> None:
    digest = xxh3_64(start(data), len(data))
    assert -(1 << 63) <= digest < 1 << 63
    assert digest & 0xFFFFFFFFFFFFFFFF == xxhash.xxh3_64_intdigest(data), len(data)


def check_copy(data: Bytes, space: Bytes, at: int) -> None:
    """Copy to space[at:]; the bytes, the digest, and the bytes around it."""
    end = at + len(data)
    around = space[at - GUARD : end + GUARD]
    around[:] = UNTOUCHED
    digest = copy_xxh3_64(start(space) + at, start(data), len(data))
    assert digest & 0xFFFFFFFFFFFFFFFF == xxhash.xxh3_64_intdigest(data), len(data)
    assert np.array_equal(space[at:end], data), len(data)
    assert (around[:GUARD] == UNTOUCHED).all(), len(data)
    assert (space[end : end + GUARD] == UNTOUCHED).all(), len(data)


@pytest.mark.parametrize("shift", [0, 1, 8, 63])
def test_digest_of_every_short_length(source: Bytes, shift: int) -> None:
    for length in range(2101):
        check_digest(source[shift : shift + length])


@pytest.mark.parametrize(("shift", "at"), [(0, 4096), (5, 4096), (0, 4099), (33, 4127)])
def test_copy_of_every_short_length(source: Bytes, target: Bytes, shift: int, at: int) -> None:
    for length in range(2101):
        check_copy(source[shift : shift + length], target, at)


@pytest.mark.parametrize("length", [64 * KIB, 128 * KIB, 256 * KIB, MIB, 2 * MIB])
@pytest.mark.parametrize("more", [-1, 0, 1, 63, 64, 65, 1023, 1024, 1025])
def test_lengths_around_those_of_blocks(source: Bytes, target: Bytes, length: int, more: int) -> None:
    data = source[: length + more]
    check_digest(data)
    check_copy(data, target, 4096)


@given(length=st.integers(0, 2 * MIB), shift=st.integers(0, 4096), at=st.integers(GUARD, GUARD + 4096))
def test_any_length_and_alignment(source: Bytes, target: Bytes, length: int, shift: int, at: int) -> None:
    data = source[shift : shift + length]
    check_digest(data)
    check_copy(data, target, at)
    check_copy(data, target, 4096)


@given(data=st.binary(max_size=1200))
def test_any_bytes(data: bytes) -> None:
    check_digest(np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("value", [0, 0x7F, 0x80, 0xFF])
def test_bytes_that_are_all_equal(value: int) -> None:
    for length in (1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 1024, 1025, 10_000):
        check_digest(np.full(length, value, np.uint8))


def test_a_changed_byte_changes_the_digest(source: Bytes) -> None:
    data = source[: 300 * KIB].copy()
    before = xxh3_64(start(data), len(data))
    for position in (0, 63, 1024, 150 * KIB, len(data) - 65, len(data) - 1):
        data[position] ^= 1
        assert xxh3_64(start(data), len(data)) != before
        data[position] ^= 1
    assert xxh3_64(start(data), len(data)) == before


def test_copies_of_several_threads(source: Bytes, target: Bytes) -> None:
    """Each thread's streamed stores are there for the thread that waits for it."""
    size = 512 * KIB
    target[:] = 0

    def copy(number: int) -> int:
        return copy_xxh3_64(start(target) + number * size, start(source) + number * size, size)

    with ThreadPoolExecutor(3) as pool:
        digests = list(pool.map(copy, range(SPACE // size)))
    assert np.array_equal(target, source)
    assert digests == [xxh3_64(start(source) + number * size, size) for number in range(SPACE // size)]
