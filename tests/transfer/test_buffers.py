"""Aligned memory: where it starts, how long it is, and how much of it there may be."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.transfer.buffers import HUGE_PAGE, PAGE, Arena, BufferPool, address_of, round_up


@given(value=st.integers(0, 2**50), step=st.integers(1, 2**21))
def test_round_up(value: int, step: int) -> None:
    rounded = round_up(value, step)
    assert rounded % step == 0
    assert 0 <= rounded - value < step


@given(size=st.integers(1, 3 * HUGE_PAGE))
def test_an_arena_is_aligned_zeroed_and_writable(size: int) -> None:
    arena = Arena(size)
    view = arena.view
    assert arena.size == size
    assert len(view) == round_up(size, PAGE)
    assert address_of(view) % (HUGE_PAGE if size >= HUGE_PAGE else PAGE) == 0
    assert not np.frombuffer(view, np.uint8).any()
    view[-1] = 7
    view[0] = 9
    assert (view[0], view[-1]) == (9, 7)


def test_an_arena_in_use_is_not_given_back() -> None:
    arena = Arena(PAGE)
    user = arena.view[:10]
    with pytest.raises(BufferError):
        arena.close()
    user[:] = b"still here"
    user.release()
    arena.close()


def test_addresses() -> None:
    arena = Arena(2 * PAGE)
    assert address_of(arena.view[100:]) == address_of(arena.view) + 100
    assert address_of(memoryview(b"")) == 0


def test_a_pool_makes_no_more_than_its_limit() -> None:
    pool = BufferPool(5_000, 2)
    taken = threading.Event()
    third: list[int] = []

    def take_third() -> None:
        with pool.take() as view:
            third.append(address_of(view))
            taken.set()

    with pool.take() as one, pool.take() as two:
        assert len(one) == len(two) == round_up(5_000, PAGE)
        addresses = {address_of(one), address_of(two)}
        assert len(addresses) == 2
        assert all(address % PAGE == 0 for address in addresses)
        thread = threading.Thread(target=take_third)
        thread.start()
        assert not taken.wait(0.05)
    assert taken.wait(60)
    thread.join(60)
    assert third[0] in addresses


def test_a_buffer_comes_back_after_an_error() -> None:
    pool = BufferPool(PAGE, 1)
    for _ in range(3):
        with pytest.raises(OSError), pool.take():
            raise OSError
    with pool.take() as view:
        assert len(view) == PAGE


def test_threads_never_share_a_buffer() -> None:
    pool = BufferPool(PAGE, 3)
    seen: set[int] = set()
    faults: list[int] = []

    def work(me: int) -> None:
        for _ in range(200):
            with pool.take() as view:
                view[:4] = bytes([me]) * 4
                seen.add(address_of(view))
                if bytes(view[:4]) != bytes([me]) * 4:
                    faults.append(me)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert len(seen) <= 3
