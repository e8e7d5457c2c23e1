"""Many buffers named at once: their addresses, what keeps them alive, and what is refused."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.transfer.buffers import Buffers, Region, address_of


def _at(buffers: Buffers, position: int) -> bytes:
    address, length = int(buffers.addresses[position]), int(buffers.lengths[position])
    return ctypes.string_at(address, length) if length else b""


def test_every_kind_of_buffer_has_its_address() -> None:
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    whole = bytearray(b"0123456789")
    views = [b"abc", None, whole, memoryview(whole)[3:5], array, bytearray()]
    named = Buffers.of(views, writable=False)
    assert len(named) == 6
    assert [_at(named, i) for i in range(6)] == [b"abc", b"", b"0123456789", b"34", array.tobytes(), b""]
    assert (named.addresses[1], named.lengths[1]) == (0, 0)
    assert named.addresses[3] == address_of(memoryview(whole)) + 3
    assert named.addresses.dtype == named.lengths.dtype == np.int64
    assert named.addresses.shape == named.lengths.shape == (6,)


def test_no_buffers_at_all() -> None:
    assert len(Buffers.of([], writable=True)) == 0
    assert len(Buffers.of([], writable=False).take([])) == 0


@given(st.lists(st.one_of(st.none(), st.binary(max_size=40)), max_size=40))
def test_bytes_are_where_the_addresses_say(blocks: list[bytes | None]) -> None:
    named = Buffers.of([None if block is None else bytearray(block) for block in blocks], writable=True)
    assert [_at(named, i) for i in range(len(named))] == [block or b"" for block in blocks]


def test_take_keeps_order_and_owner() -> None:
    named = Buffers.of([b"a", b"bb", b"ccc", None], writable=False)
    owner = named.owner
    some = named.take(np.array([2, 0, 3]))
    del named
    gc.collect()
    assert some.owner is owner
    assert [_at(some, i) for i in range(3)] == [b"ccc", b"a", b""]


@pytest.mark.parametrize(
    ("view", "writable", "message"),
    [
        (b"fixed", True, "buffer 1: read-only"),
        (memoryview(bytearray(8)).toreadonly(), True, "buffer 1: read-only"),
        (memoryview(bytearray(8))[::2], False, "buffer 1: not contiguous"),
        (np.zeros((4, 4), np.uint8)[:, 1], True, "buffer 1: not contiguous"),
    ],
)
def test_what_is_refused_and_nothing_stays_borrowed(
    view: memoryview | bytes, writable: bool, message: str
) -> None:
    good = bytearray(4)
    with pytest.raises(ValueError, match=message):
        Buffers.of([good, view], writable=writable)
    good.append(1)  # BufferError if it were still borrowed


def test_no_buffer_and_a_released_one() -> None:
    with pytest.raises(TypeError):
        Buffers.of(["text"], writable=False)  # type: ignore[list-item]
    released = memoryview(bytearray(4))
    released.release()
    with pytest.raises(ValueError, match="released"):
        Buffers.of([released], writable=False)


def test_memory_stays_while_it_is_borrowed_and_not_longer() -> None:
    array = bytearray(64)
    view = memoryview(bytearray(8))
    pages = mmap.mmap(-1, 4096)
    named = Buffers.of([array, view, pages], writable=True)
    some = named.take([0])
    del named
    with pytest.raises(BufferError):
        array.append(1)
    with pytest.raises(BufferError):
        view.release()
    with pytest.raises(BufferError):
        pages.close()
    del some
    array.append(1)
    view.release()
    pages.close()


def test_the_last_reference_frees_an_object() -> None:
    block = bytearray(4096)
    before = sys.getrefcount(block)
    named = Buffers.of([block] * 50, writable=True)
    assert sys.getrefcount(block) == before + 50
    del named
    assert sys.getrefcount(block) == before


def test_rows_of_a_region() -> None:
    memory = bytearray(range(100))
    region = Region(memory, 8)
    assert (len(region), region.row_bytes, region.writable) == (12, 8, True)
    named = region.rows([3, 0, 11])
    assert [_at(named, i) for i in range(3)] == [
        bytes(memory[24:32]),
        bytes(memory[:8]),
        bytes(memory[88:96]),
    ]
    short = region.rows(np.array([1], np.uint32), 3)
    assert _at(short, 0) == bytes(memory[8:11])
    assert len(region.rows([])) == 0
    del region
    with pytest.raises(BufferError):
        memory.append(1)
    del named, short
    memory.append(1)


def test_a_region_of_fixed_memory_is_known_as_such() -> None:
    assert not Region(bytes(16), 4).writable
    assert not Region(memoryview(bytearray(16)).toreadonly(), 4).writable
    assert Region(np.zeros((4, 4), np.float32), 16).writable


def test_rows_that_are_not_there() -> None:
    region = Region(bytearray(40), 10)
    for ids in ([4], [-1], [0, 2**40], np.array([2**63], np.uint64)):
        with pytest.raises(IndexError, match="no row"):
            region.rows(ids)
    for wrong in ([0.5], [[1, 2]]):
        with pytest.raises(ValueError, match="row numbers"):
            region.rows(wrong)  # type: ignore[arg-type]
    for length in (0, 11, -1):
        with pytest.raises(ValueError, match="rows of 10"):
            region.rows([0], length)


@pytest.mark.parametrize("row_bytes", [0, -4, 41])
def test_a_region_holds_a_row(row_bytes: int) -> None:
    with pytest.raises(ValueError, match="rows of"):
        Region(bytearray(40), row_bytes)


def test_a_region_is_contiguous() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        Region(memoryview(bytearray(40))[::2], 4)
