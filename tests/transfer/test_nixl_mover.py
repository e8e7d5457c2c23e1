"""The NIXL mover on real files: the same rows, headers, verdicts and errors as the I/O engine."""

from __future__ import annotations

import errno
import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstrata.errors import ConfigError
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, round_up
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.nixl_mover import NixlMover, NixlSettings
from kvstrata.transfer.slot_header import (
    WRONG_CHECKSUM,
    WRONG_HEADER,
    WRONG_KEY,
    WRONG_LENGTH,
    WRONG_PLACE,
)
from transfer.engine_kit import SPACE, WAIT_SECONDS, Memory, SlotFile, bytes_of, checksum_of

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl_cu12") is None, reason="needs NIXL: pip install --no-deps nixl-cu12"
)
BLOCK = 64 * 1024


def make(file: SlotFile, **fields: int) -> NixlMover:
    settings = NixlSettings(**({"threads": 2, "store_threads": 1} | fields))
    return NixlMover("nixl-test", settings, payload_bytes=round_up(file.block_bytes, PAGE), space=SPACE)


class Heard:
    """Rows that a mover handed out, by position."""

    def __init__(self, mover: NixlMover, rows: Rows, *, loads: bool) -> None:
        self.rows = np.zeros_like(rows)
        self.batches: list[int] = []
        self._left = len(rows)
        self._done = threading.Event()
        self.batch = mover.submit(rows, loads=loads, on_done=self._hear)

    def _hear(self, rows: Rows) -> None:
        self.batches.append(len(rows))
        self.rows[rows[:, k.POSITION]] = rows
        self._left -= len(rows)
        if not self._left:
            self._done.set()

    @property
    def results(self) -> list[int]:
        assert self._done.wait(WAIT_SECONDS), "a batch hangs"
        results: list[int] = self.rows[:, k.RESULT].tolist()
        return results


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlotFile]:
    made = SlotFile(tmp_path / "slots", 40, BLOCK, direct=request.param)
    yield made
    os.close(made.fd)


def filled(file: SlotFile, memory: Memory, count: int, size: int = BLOCK) -> list[bytes]:
    blocks = [bytes_of(number, size) for number in range(count)]
    for number, block in enumerate(blocks):
        memory.view(number)[:size] = block
    return blocks


@needs_nixl
@pytest.mark.parametrize("size", [1, 4096, 5000, BLOCK])
@pytest.mark.parametrize("shift", [0, 3])
def test_round_trip(file: SlotFile, size: int, shift: int) -> None:
    mover = make(file)
    out, back = Memory(20, BLOCK, shift), Memory(20, BLOCK, shift)
    blocks = filled(file, out, 20, size)
    numbers = list(range(20))
    saved = Heard(mover, file.rows(k.WRITE, numbers, out.addresses(numbers), size), loads=False)
    assert saved.results == [0] * 20
    sums = saved.rows[:, k.CHECKSUM]
    assert sums.tolist() == [checksum_of(block) for block in blocks]
    header = file.header(7)
    assert header is not None and header.length == size and header.sequence == 1007
    order = numbers[::-1]
    loaded = Heard(
        mover,
        file.rows(k.READ, order, back.addresses(order), size, checksums=sums[order]),
        loads=True,
    )
    assert loaded.results == [0] * 20
    assert [bytes(back.view(number)[:size]) for number in numbers] == blocks
    assert mover.failed == 0, "NIXL moved nothing"
    assert mover.close(WAIT_SECONDS)


@needs_nixl
def test_a_unit_has_a_bound(file: SlotFile) -> None:
    mover = make(file, unit_bytes=4 * (BLOCK + PAGE), unit_blocks=3)
    memory = Memory(20, BLOCK)
    filled(file, memory, 20)
    heard = Heard(mover, file.rows(k.WRITE, range(20), memory.addresses(range(20))), loads=False)
    assert heard.results == [0] * 20
    assert heard.batches == [3] * 6 + [2] and mover.counts.stores == 7
    mover.close(WAIT_SECONDS)


@needs_nixl
@pytest.mark.parametrize(
    ("column", "wrong", "verdict"),
    [(k.KEY_2, 5, WRONG_KEY), (k.SEGMENT, 5, WRONG_PLACE), (k.CHECKSUM, 5, WRONG_CHECKSUM),
     (k.LENGTH, BLOCK - PAGE, WRONG_LENGTH)],
)  # fmt: skip
def test_every_doubt_is_a_verdict(file: SlotFile, column: int, wrong: int, verdict: int) -> None:
    mover = make(file)
    memory = Memory(3, BLOCK)
    filled(file, memory, 3)
    saved = Heard(mover, file.rows(k.WRITE, range(3), memory.addresses(range(3))), loads=False)
    assert saved.results == [0] * 3
    rows = file.rows(k.READ, range(3), memory.addresses(range(3)), checksums=saved.rows[:, k.CHECKSUM])
    rows[1, column] = wrong
    assert Heard(mover, rows, loads=True).results == [0, verdict, 0]
    mover.close(WAIT_SECONDS)


@needs_nixl
@pytest.mark.parametrize("place", [3, PAGE, PAGE + BLOCK - 1])
def test_one_wrong_bit_is_found(file: SlotFile, place: int) -> None:
    mover = make(file)
    memory, copies = Memory(3, BLOCK), Memory(3, BLOCK)
    blocks = filled(file, memory, 3)
    saved = Heard(mover, file.rows(k.WRITE, range(3), memory.addresses(range(3))), loads=False)
    assert saved.results == [0] * 3
    with file.path.open("r+b") as raw:
        raw.seek(file.offset(1) + place)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 8]))
        raw.flush()
        os.fsync(raw.fileno())
    rows = file.rows(k.READ, range(3), memory.addresses(range(3)), checksums=saved.rows[:, k.CHECKSUM])
    rows[:, k.COPY_TO] = copies.addresses(range(3))
    expected = WRONG_HEADER if place < PAGE else WRONG_CHECKSUM
    assert Heard(mover, rows, loads=True).results == [0, expected, 0]
    assert [bytes(copies.view(n)) for n in (0, 2)] == [blocks[0], blocks[2]]
    mover.close(WAIT_SECONDS)


@needs_nixl
def test_one_row_that_fails_leaves_the_others_alone(file: SlotFile) -> None:
    """NIXL fails a transfer as a whole. What lies behind the end of a file is no error, only no block."""
    mover = make(file)
    memory = Memory(4, BLOCK)
    filled(file, memory, 4)
    saved = Heard(mover, file.rows(k.WRITE, range(4), memory.addresses(range(4))), loads=False)
    assert saved.results == [0] * 4
    rows = file.rows(k.READ, range(4), memory.addresses(range(4)), checksums=saved.rows[:, k.CHECKSUM])
    rows[1, k.OFFSET] = file.offset(1000)
    rows[2, k.FD] = 9999
    assert Heard(mover, rows, loads=True).results == [0, WRONG_HEADER, -errno.EBADF, 0]
    rows = file.rows(k.WRITE, range(4), memory.addresses(range(4)))
    rows[2, k.FD] = 9999
    assert Heard(mover, rows, loads=False).results == [0, 0, -errno.EBADF, 0]
    assert mover.failed == 2
    mover.close(WAIT_SECONDS)


@needs_nixl
def test_synced_and_flushed(file: SlotFile) -> None:
    mover = make(file)
    memory = Memory(3, BLOCK)
    filled(file, memory, 3)
    rows = file.rows(k.WRITE, range(3), memory.addresses(range(3)), flags=k.SYNC)
    assert Heard(mover, rows, loads=False).results == [0] * 3
    flush = file.rows(k.FLUSH, [0, 1], 0)
    flush[1, k.FD] = 9999
    assert Heard(mover, flush, loads=False).results == [0, -errno.EBADF]
    mover.close(WAIT_SECONDS)


@needs_nixl
def test_what_is_too_late_or_too_much_touches_nothing(file: SlotFile) -> None:
    mover = make(file, capacity=5)
    memory = Memory(6, BLOCK)
    addresses = memory.addresses(range(6))
    late = file.rows(k.READ, range(3), addresses[:3], deadline_ns=time.monotonic_ns() - 1)
    assert Heard(mover, late, loads=True).results == [k.LATE] * 3
    assert Heard(mover, file.rows(k.READ, range(6), addresses), loads=True).results == [k.LATE] * 6
    assert mover.drain(WAIT_SECONDS) and mover.queued == (0, 0)
    assert bytes(memory.view(0)) == bytes(BLOCK)
    assert mover.close(WAIT_SECONDS)


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps nixl-cu12"):
        NixlMover("nixl-test", NixlSettings(), payload_bytes=PAGE, space=SPACE)
