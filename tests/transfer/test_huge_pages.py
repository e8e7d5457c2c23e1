"""Huge pages for shared memory: of what is there, of no more, with every byte in its place."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstrata.telemetry import Telemetry
from kvstrata.transfer import huge_pages
from kvstrata.transfer.buffers import HUGE_PAGE, PAGE
from kvstrata.transfer.huge_pages import STEP, HugePageCare, HugePages, care_for
from kvstrata.transfer.shared_memory import Mapping
from store_kit import descriptors, eventually

COUNTER = "huge_page_bytes_total"
SIZE = (STEP + 4) * HUGE_PAGE
FOLDER = Path("/dev/shm")


def possible() -> bool:
    fd = os.memfd_create("probe")
    os.ftruncate(fd, HUGE_PAGE)
    os.pwrite(fd, bytes(HUGE_PAGE), 0)
    pages = HugePages(Mapping(fd, 0, HUGE_PAGE))
    os.close(fd)
    return sum(pages.turn()) == HUGE_PAGE


needs_huge_pages = pytest.mark.skipif(
    not possible(), reason="this system makes no huge pages of shared memory (Linux 6.1, a free huge page)"
)


@pytest.fixture
def shared() -> Iterator[mmap.mmap]:
    """A file in /dev/shm without memory and without a name, mapped as vLLM maps its own."""
    path = FOLDER / f"kvstrata-test-{uuid.uuid4().hex}"
    try:
        with path.open("x+b") as file:
            file.truncate(SIZE)
            mapped = mmap.mmap(file.fileno(), SIZE)
            path.unlink()
            yield mapped
            gc.collect()
            mapped.close()
    except FileNotFoundError:
        pytest.skip("no /dev/shm here")


def huge_bytes() -> int:
    """Of shared memory that this process maps by huge pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemPmdMapped"))


def mappings() -> int:
    """Of the files of this test, by this process."""
    return Path("/proc/self/maps").read_text().count(str(FOLDER / "kvstrata-test-"))


@needs_huge_pages
@pytest.mark.parametrize("offset", [0, PAGE])
def test_memory_that_is_there_becomes_huge_pages_with_its_bytes_in_place(offset: int) -> None:
    size = (STEP + 2) * HUGE_PAGE
    fd = os.memfd_create("region")
    os.ftruncate(fd, size)
    data = np.random.default_rng(1).bytes(size)
    os.pwrite(fd, data, 0)
    mapping = Mapping(fd, offset, size - offset)
    pages = HugePages(mapping)
    before, expected = huge_bytes(), size - (HUGE_PAGE if offset else 0)
    assert pages.left == expected
    assert sum(pages.turn()) == expected and pages.left == 0 and not pages.passed_over
    assert huge_bytes() - before == expected
    assert ctypes.string_at(mapping.address, size - offset) == data[offset:]
    ctypes.memmove(mapping.address, b"new", 3)
    assert os.pread(fd, 3, offset) == b"new"
    os.close(fd)


@needs_huge_pages
def test_only_what_is_in_memory_whole_is_turned_and_the_rest_when_it_comes() -> None:
    fd = os.memfd_create("region")
    os.ftruncate(fd, SIZE)
    pages = HugePages(Mapping(fd, 0, SIZE))
    assert sum(pages.turn()) == 0 and os.fstat(fd).st_blocks == 0, "it would take memory"
    os.pwrite(fd, bytes(HUGE_PAGE), HUGE_PAGE)  # whole
    os.pwrite(fd, bytes(HUGE_PAGE - PAGE), 5 * HUGE_PAGE)  # but for one small page
    taken = os.fstat(fd).st_blocks
    assert sum(pages.turn()) == HUGE_PAGE and not pages.passed_over
    assert os.fstat(fd).st_blocks == taken
    os.pwrite(fd, bytes(PAGE), 6 * HUGE_PAGE - PAGE)
    assert sum(pages.turn()) == HUGE_PAGE
    assert pages.left == SIZE - 2 * HUGE_PAGE
    os.close(fd)


def test_a_system_that_refuses_is_asked_once(tmp_path: Path) -> None:
    """A disk's file that is open for writing gets the answer that an old kernel gives for all."""
    with (tmp_path / "region").open("x+b") as file:
        file.write(bytes(2 * HUGE_PAGE))
        file.flush()
        pages = HugePages(Mapping(file.fileno(), 0, 2 * HUGE_PAGE))
        if sum(pages.turn()):
            pytest.skip("this file system can")
        assert pages.refused and pages.left == HUGE_PAGE
        telemetry = Telemetry(10)
        care = HugePageCare(Mapping(file.fileno(), 0, 2 * HUGE_PAGE), telemetry, COUNTER)
        care.join()
        assert [event.kind for event in telemetry.events()] == ["no huge pages"]


@needs_huge_pages
def test_a_buffer_is_cared_for_while_it_fills(shared: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(huge_pages, "LONGEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(huge_pages, "ROUNDS", 10_000)
    before, telemetry = descriptors(), Telemetry(10)
    data = np.random.default_rng(2).bytes(SIZE)
    half = SIZE // 2 // HUGE_PAGE * HUGE_PAGE
    shared[:half] = data[:half]
    care = care_for(memoryview(shared), telemetry, COUNTER)
    assert care is not None

    eventually(lambda: telemetry.value(COUNTER) == half, "the first half is not turned")
    assert care.working
    shared[half:] = data[half:]
    eventually(lambda: not care.working, "the thread does not end")
    assert telemetry.value(COUNTER) == SIZE and shared[:] == data
    assert [event.kind for event in telemetry.events()] == ["huge pages"]
    assert descriptors() == before
    shared.close()  # nobody holds it


@needs_huge_pages
def test_who_stops_it_need_not_wait_and_nothing_stays(shared: mmap.mmap) -> None:
    care = care_for(shared, Telemetry(10), COUNTER)
    assert (
        care is not None and care.working and mappings() == 2
    )  # no memory is there yet: it would look again for minutes
    care.stop()
    shared.close()  # its owner does not ask first
    care.join()
    assert mappings() == 0


def test_private_memory_is_left_alone() -> None:
    telemetry = Telemetry(10)
    assert care_for(np.zeros(HUGE_PAGE, np.uint8), telemetry, COUNTER) is None
    assert care_for(b"read only", telemetry, COUNTER) is None
    assert [event.kind for event in telemetry.events()] == ["no huge pages"] * 2
