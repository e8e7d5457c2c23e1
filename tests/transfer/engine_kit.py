"""What the tests of the I/O engine share: slots in real files, buffers of any alignment, and who hears."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from kvstrata.tiers.nvme_format import SlotHeader
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, address_of, round_up
from kvstrata.transfer.engine import Engine, EngineSettings, Kind, Rows
from kvstrata.transfer.file_io import FileIO, supports_direct
from kvstrata.transfer.ring import ring_refused

WAIT_SECONDS = 60.0
NEVER_NS = 1 << 62
SPACE = bytes(range(32))
SEGMENT = 0x0123456789ABCDEF
FILE_KINDS: tuple[Kind, ...] = ("threads", "ring")


def needs(kind: Kind) -> Kind:
    """Skips the test where this kind of engine cannot be had."""
    if kind == "ring" and (reason := ring_refused()):
        pytest.skip(f"no io_uring here: {reason}")
    return kind


def key_of(number: int) -> bytes:
    return blake3(b"key %d" % number).digest()


def bytes_of(seed: object, size: int) -> bytes:
    return blake3(repr(seed).encode()).digest(length=size)


def signed(checksum: int) -> int:
    return checksum - (1 << 64) if checksum >> 63 else checksum


def checksum_of(data: bytes | memoryview) -> int:
    """As a row has it."""
    return signed(xxhash.xxh3_64_intdigest(data))


class Memory:
    """Buffers of equal room in one arena, each `shift` bytes behind the start of a page."""

    def __init__(self, count: int, size: int, shift: int = 0) -> None:
        self.size = size
        self._room = round_up(size + shift, PAGE)
        self._shift = shift
        self._arena = Arena(count * self._room)
        self._base = address_of(self._arena.view)

    def view(self, number: int) -> memoryview:
        start = number * self._room + self._shift
        return self._arena.view[start : start + self.size]

    def address(self, number: int) -> int:
        return self._base + number * self._room + self._shift

    def addresses(self, numbers: Any) -> NDArray[np.int64]:
        return np.array([self.address(number) for number in numbers], dtype=np.int64)


class SlotFile:
    """Slots of blocks of one size in a real file; slot n holds key n unless something else is said."""

    def __init__(self, path: Path, slots: int, block_bytes: int, *, direct: bool = True) -> None:
        io = FileIO()
        if direct and not supports_direct(io, path.parent):
            pytest.skip("no O_DIRECT in the folder for temporary files")
        self.path = path
        self.slots = slots
        self.block_bytes = block_bytes
        self.stride = PAGE + round_up(block_bytes, PAGE)
        self.direct = direct
        self.fd = io.open(path, create=True, direct=direct)
        io.allocate(self.fd, self.offset(slots))

    def offset(self, number: int) -> int:
        return PAGE + number * self.stride

    def header(self, number: int) -> SlotHeader | None:
        with self.path.open("rb") as file:
            file.seek(self.offset(number))
            return SlotHeader.unpack(memoryview(file.read(PAGE)))

    def payload(self, number: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset(number) + PAGE)
            return file.read(self.block_bytes)

    def rows(
        self,
        kind: int,
        numbers: Any,
        addresses: Any,
        length: int = 0,
        *,
        checksums: Any = 0,
        flags: int = 0,
        deadline_ns: int = NEVER_NS,
        fd: int = -1,
    ) -> Rows:
        """One per number; POSITION counts up."""
        numbers = np.asarray(numbers, dtype=np.int64)
        rows = np.zeros((len(numbers), k.COLUMNS), dtype=np.int64)
        rows[:, k.KIND] = kind
        rows[:, k.FD] = self.fd if fd < 0 else fd
        rows[:, k.OFFSET] = PAGE + numbers * self.stride
        rows[:, k.ADDRESS] = addresses
        rows[:, k.LENGTH] = length or self.block_bytes
        rows[:, k.CHECKSUM] = checksums
        rows[:, k.NUMBER] = numbers
        rows[:, k.SEGMENT] = SEGMENT
        rows[:, k.SEQUENCE] = numbers + 1000
        rows[:, k.CREATED_MS] = 17
        rows[:, k.EXPIRES_MS] = numbers
        keys = b"".join(key_of(number) for number in numbers.tolist())
        rows[:, k.KEY : k.KEY + 4] = np.frombuffer(keys, dtype=np.int64).reshape(-1, 4)
        rows[:, k.FLAGS] = flags
        if self.direct:
            odd = (rows[:, k.ADDRESS] % PAGE != 0) | (rows[:, k.LENGTH] % PAGE != 0)
            rows[:, k.FLAGS] |= np.where(odd, k.DIRECT | k.BOUNCE, k.DIRECT)
        rows[:, k.DEADLINE_NS] = deadline_ns
        rows[:, k.POSITION] = np.arange(len(numbers))
        return rows

    def engine(self, kind: Kind = "threads", **fields: Any) -> Engine:
        return make_engine(kind, self.stride, round_up(self.block_bytes, PAGE), **fields)


def make_engine(kind: Kind, stride: int = 0, payload_bytes: int = 0, **fields: Any) -> Engine:
    """An engine of few workers; fields of its settings."""
    file_io = fields.pop("file_io", None)
    settings = {"workers": 4, "store_workers": 3, "capacity": 512} | fields
    return Engine(
        "engine-test",
        EngineSettings(kind=kind, **settings),
        stride=stride,
        payload_bytes=payload_bytes,
        space=SPACE,
        file_io=file_io,
    )


class Heard:
    """An on_done that keeps what it hears."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[Rows] = []
        self.count = 0

    def __call__(self, rows: Rows) -> None:
        with self._changed:
            self._parts.append(rows.copy())
            self.count += len(rows)
            self._changed.notify_all()

    def wait(self, count: int, seconds: float = WAIT_SECONDS) -> Rows:
        """Rows in the order of their positions, when there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, seconds), f"{self.count} of {count}"
            rows = np.concatenate([np.zeros((0, k.COLUMNS), np.int64), *self._parts])
        assert len(rows) == count, "more rows were heard of than there are"
        return rows[np.argsort(rows[:, k.POSITION], kind="stable")]

    @property
    def order(self) -> list[int]:
        """Positions as they came."""
        with self._changed:
            return [int(position) for part in self._parts for position in part[:, k.POSITION]]


def run(engine: Engine, rows: Rows, *, loads: bool) -> Rows:
    """Submit, wait, and the rows in the order of their positions."""
    heard = Heard()
    engine.submit(rows, loads=loads, on_done=heard)
    return heard.wait(len(rows))


def write_all(file: SlotFile, engine: Engine, memory: Memory, seed: object = 0) -> list[int]:
    """Fill every slot of a file; the checksums."""
    for number in range(file.slots):
        memory.view(number)[:] = bytes_of((seed, number), file.block_bytes)
    rows = file.rows(k.WRITE, range(file.slots), memory.addresses(range(file.slots)))
    done = run(engine, rows, loads=False)
    assert (done[:, k.RESULT] == 0).all(), done[:, k.RESULT]
    return done[:, k.CHECKSUM].tolist()
