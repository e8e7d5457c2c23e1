"""Access logs: what is written is read, in order; a bounded piece of recency, never more."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from kvstrata.tiers.shared.batches import Touched
from kvstrata.tiers.shared.format import access_name, member_folder
from kvstrata.tiers.shared.medium import PosixMedium
from kvstrata.tiers.shared.order import Order, last_order, order_name
from kvstrata.tiers.shared.recency import TRIES, AccessLog, AccessReader

ME, OTHER = 7, 9


class Failing(PosixMedium):
    fails = 0

    def append(self, name: str, offset: int, data: bytes) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError(errno.EIO, "once")
        super().append(name, offset, data)


@pytest.fixture
def medium(tmp_path: Path) -> Failing:
    for member in (ME, OTHER):
        (tmp_path / member_folder(member)).mkdir(parents=True)
    return Failing(tmp_path)


def words(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(numbers, np.uint64)


def plain(touched: Iterable[Touched]) -> list[list[int]]:
    return [one.words.tolist() for one in touched]


def test_requests_come_back_in_order_and_whole(medium: Failing) -> None:
    log, reader = AccessLog(medium, ME, 4096), AccessReader()
    log.touch(1, words(10, 11))
    log.touch(1, words(12))
    log.touch(2, words(2**64 - 1, 10))
    log.touch(3, words())
    assert reader.read(medium, [ME]) == []
    log.flush()
    assert plain(reader.read(medium, [ME])) == [[10, 11, 12], [2**64 - 1, 10]]
    assert reader.read(medium, [ME]) == []
    log.flush()
    log.touch(4, words(5))
    log.flush()
    assert plain(reader.read(medium, [ME])) == [[5]]
    assert plain(AccessReader().read(medium, [ME])) == [[10, 11, 12], [2**64 - 1, 10], [5]]
    assert AccessReader().read(medium, [OTHER]) == []


def test_files_are_bounded_and_the_latest_stays(medium: Failing) -> None:
    log, reader = AccessLog(medium, ME, 1024), AccessReader()
    seen: list[list[int]] = []
    for request in range(300):
        log.touch(request, words(*range(request, request + 10)))
        log.flush()
        seen += plain(reader.read(medium, [ME]))
        sizes = [file.stat().st_size for file in (medium.root / member_folder(ME)).iterdir()]
        assert len(sizes) <= 2 and max(sizes) <= 1024
    assert seen == [list(range(request, request + 10)) for request in range(300)]
    late = plain(AccessReader().read(medium, [ME]))
    assert late == seen[-len(late) :] and len(late) >= 8
    assert len(reader.known) <= 2


def test_memory_is_bounded(medium: Failing) -> None:
    log = AccessLog(medium, ME, 1024)
    for request in range(100):
        log.touch(request, words(*range(20)))
    assert log.pending_bytes <= 1024 and log.dropped > 0
    log.flush()
    assert log.pending_bytes == 0
    touched = AccessReader().read(medium, [ME])
    assert 20 * len(touched) + log.dropped == 2000


def test_an_error_loses_nothing(medium: Failing) -> None:
    log = AccessLog(medium, ME, 4096)
    log.touch(1, words(1))
    medium.fails = 2
    for _ in range(2):
        with pytest.raises(OSError, match="once"):
            log.flush()
        log.touch(2, words(2))
    log.flush()
    assert plain(AccessReader().read(medium, [ME])) == [[1], [2, 2]]


def test_a_half_written_piece_is_waited_for_and_damage_is_passed_over(medium: Failing) -> None:
    log, reader = AccessLog(medium, ME, 4096), AccessReader()
    last = 2**64 - 1
    log.touch(1, words(1, 2, last))
    log.flush()
    file = medium.root / access_name(ME, 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert reader.read(medium, [ME]) == []
    file.write_bytes(whole[:-3] + b"\0\0\0")
    for _ in range(TRIES - 1):
        reader.read(medium, [ME])
    file.write_bytes(whole)
    assert plain(reader.read(medium, [ME])) == [[1, 2, last]] and reader.damaged == 0
    file.write_bytes(whole + b"KVSTnonsense" * 30)
    for _ in range(2 * TRIES):
        assert reader.read(medium, [ME]) == []
    assert reader.damaged == 1


def test_a_reader_goes_on_where_another_was(medium: Failing) -> None:
    log, first = AccessLog(medium, ME, 4096), AccessReader()
    log.touch(1, words(1))
    log.flush()
    first.read(medium, [ME])
    log.touch(2, words(2))
    log.flush()
    assert plain(AccessReader(first.known).read(medium, [ME])) == [[2]]
    assert plain(AccessReader({"nonsense": 5}).read(medium, [ME])) == [[1], [2]]


def test_the_order_comes_back_or_is_empty(tmp_path: Path) -> None:
    (tmp_path / "collector").mkdir()
    medium = PosixMedium(tmp_path)
    order = Order(np.array([5, -6, 7], np.int64), {ME: 3}, {access_name(ME, 0): 40})
    medium.replace(order_name(2), order.encode())
    found = last_order(medium, medium.names("collector"))
    assert found.words.tolist() == [5, -6, 7]
    assert found.sequences == order.sequences and found.known == order.known
    data = bytearray(order.encode())
    for place in (0, 9, 30, len(data) - 1):
        damaged = bytearray(data)
        damaged[place] ^= 1
        assert Order.decode(bytes(damaged)) is None
    assert Order.decode(bytes(data[:-1])) is None and Order.decode(b"") is None
    medium.replace(order_name(3), bytes(data[:-1]))
    assert not len(last_order(medium, medium.names("collector")).words)
    assert not len(last_order(medium, {}).words)
