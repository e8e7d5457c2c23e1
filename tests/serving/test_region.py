"""Memory that two processes map: found by address, mapped within its file, cut into slots."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kvstrata.serving.region import NamedRegion, SharedArena, locate
from kvstrata.transfer.buffers import PAGE, Buffers
from kvstrata.transfer.shared_memory import Mapping, find_backing
from store_kit import descriptors


def address(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, np.uint8).__array_interface__["data"][0])


def same_bytes(fd: int, offset: int, mapped: mmap.mmap, at: int) -> None:
    """Written there, seen here."""
    os.pwrite(fd, b"seen", offset)
    assert mapped[at : at + 4] == b"seen"


@pytest.mark.parametrize("unlinked", [False, True])
def test_a_mapping_of_a_file_is_found_whether_or_not_it_still_has_a_name(
    tmp_path: Path, unlinked: bool
) -> None:
    path = tmp_path / "region"
    with path.open("w+b") as file:
        file.truncate(8 * PAGE)
        mapped = mmap.mmap(file.fileno(), 4 * PAGE, offset=2 * PAGE)
    if unlinked:
        path.unlink()
    backing = find_backing(address(mapped) + PAGE, 2 * PAGE)
    assert backing is not None and backing.offset == 3 * PAGE
    same_bytes(backing.fd, backing.offset, mapped, PAGE)
    os.close(backing.fd)


def test_what_is_no_shared_writable_mapping_of_one_file_is_not_found(tmp_path: Path) -> None:
    before = descriptors()
    private = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert find_backing(address(private), PAGE) is None
    path = tmp_path / "region"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("rb") as file:
        readonly = mmap.mmap(file.fileno(), 4 * PAGE, prot=mmap.PROT_READ)
    assert find_backing(address(readonly), PAGE) is None
    assert find_backing(8, 8) is None
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4 * PAGE)
    assert find_backing(address(mapped), 2**40) is None, "more than the mapping holds"
    mapped.close()
    readonly.close()
    assert descriptors() == before


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 5 * PAGE), (PAGE, 4 * PAGE), (17, PAGE), (0, 0), (2**62, PAGE), (5 * PAGE, 1)]
)
def test_a_mapping_stays_within_its_file(offset: int, size: int) -> None:
    fd = os.memfd_create("region")
    os.ftruncate(fd, 4 * PAGE)
    with pytest.raises((ValueError, OSError)):
        Mapping(fd, offset, size)
    os.close(fd)


def test_a_pipe_is_no_region() -> None:
    ends = os.pipe()
    with pytest.raises(ValueError, match="of a file"):
        Mapping(ends[0], 0, PAGE)
    for fd in ends:
        os.close(fd)


def test_an_arena_hands_out_each_slot_once_and_as_many_as_there_are() -> None:
    arena = SharedArena(5000, 10 * 8192)
    assert arena.slot_bytes == 8192 and arena.slots == 10
    first, second = arena.take(4).tolist(), arena.take(99).tolist()
    assert len(first) == 4 and len(second) == 6 and arena.free_slots == 0
    assert sorted(first + second) == [slot * 8192 for slot in range(10)]
    assert arena.take(1).tolist() == []
    arena.give_back(np.array(first))
    assert sorted(arena.take(99).tolist()) == sorted(first)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 4096)  # who maps it relies on its size
    arena.close()


def test_buffers_are_located_in_the_region_that_holds_them_whole() -> None:
    regions = [NamedRegion(1, 1000, 100), NamedRegion(2, 5000, 100)]
    addresses = np.array([1000, 1090, 1091, 999, 5050, 0, 7000])
    numbers, offsets = locate(regions, Buffers(addresses, np.full(7, 10), None))
    assert numbers.tolist() == [1, 1, -1, -1, 2, -1, -1]
    assert offsets[[0, 1, 4]].tolist() == [0, 90, 50]
