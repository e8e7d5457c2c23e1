"""FileIO on real files. Short reads and writes come from the real system calls, given less to do."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.transfer.buffers import PAGE, Arena
from kvstrata.transfer.file_io import FileIO, supports_direct

io = FileIO()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = io.open(tmp_path / "file", create=True, direct=False)
    yield opened
    io.close(opened)


class CutShort:
    """preadv or pwritev that moves at most so many bytes at a time."""

    def __init__(self, name: str, limits: Sequence[int]) -> None:
        self.call = getattr(os, name)
        self.limits = list(limits)
        self.calls = 0

    def __call__(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.calls += 1
        left = self.limits.pop(0) if self.limits else 1 << 30
        some = []
        for view in views:
            some.append(view[:left])
            left -= len(some[-1])
        moved: int = self.call(fd, some, offset)
        return moved


def views_of(lengths: Sequence[int], data: bytes = b"") -> list[memoryview]:
    views, at = [], 0
    for length in lengths:
        views.append(memoryview(bytearray(data[at : at + length].ljust(length, b"\0"))))
        at += length
    return views


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    write_limits=st.lists(st.integers(1, 200), max_size=6),
    read_limits=st.lists(st.integers(1, 200), max_size=6),
    offset=st.integers(0, 500),
    seed=st.integers(0, 9),
)
def test_short_calls_are_continued(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    write_limits: list[int],
    read_limits: list[int],
    offset: int,
    seed: int,
) -> None:
    data = np.random.default_rng(seed).bytes(sum(lengths))
    fd = io.open(tmp_path_factory.mktemp("io") / "file", create=True, direct=False)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwritev", CutShort("pwritev", write_limits))
            assert io.write(fd, views_of(lengths, data), offset) == len(data)
        assert os.pread(fd, len(data) + 1, offset) == data
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", CutShort("preadv", read_limits))
            targets = views_of(lengths)
            assert io.read(fd, targets, offset) == len(data)
        assert b"".join(targets) == data
    finally:
        io.close(fd)


def test_a_short_call_is_really_continued(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    short = CutShort("pwritev", [1, 5, 2])
    monkeypatch.setattr(os, "pwritev", short)
    assert io.write(fd, views_of([4, 4, 4], b"abcdefghijkl"), 0) == 12
    assert short.calls == 4
    assert os.pread(fd, 20, 0) == b"abcdefghijkl"


def test_a_read_stops_at_the_end_of_the_file(fd: int) -> None:
    io.write(fd, views_of([6], b"abcdef"), 0)
    targets = views_of([4, 4])
    assert io.read(fd, targets, 0) == 6
    assert b"".join(targets) == b"abcdef\0\0"
    assert io.read(fd, targets, 6) == 0
    assert io.read(fd, targets, 1_000) == 0


@pytest.mark.parametrize("limits", [[0], [3, 0]])
def test_a_write_that_stops_is_an_error(
    fd: int, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", CutShort("pwritev", limits))
    with pytest.raises(OSError, match=f"short write: {limits[0]} of 8 bytes") as caught:
        io.write(fd, views_of([8], b"abcdefgh"), 0)
    assert caught.value.errno == errno.EIO


def test_errors_of_the_system_come_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        io.open(tmp_path / "none", create=False, direct=False)
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError):
        io.open(tmp_path / "there", create=True, direct=False)
    fd = io.open(tmp_path / "there", create=False, direct=False)
    io.close(fd)
    with pytest.raises(OSError) as caught:
        io.read(fd, views_of([1]), 0)
    assert caught.value.errno == errno.EBADF


def test_allocate_reserves_blocks(fd: int) -> None:
    io.allocate(fd, 300_000)
    assert io.size(fd) == 300_000
    assert os.fstat(fd).st_blocks * 512 >= 300_000
    target = views_of([100])
    assert io.read(fd, target, 200_000) == 100
    assert not any(target[0])


def test_a_new_file_is_private(tmp_path: Path) -> None:
    io.close(io.open(tmp_path / "file", create=True, direct=False))
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_direct_io_needs_alignment_and_gets_it_from_an_arena(tmp_path: Path) -> None:
    if not supports_direct(io, tmp_path):
        pytest.skip("the file system of the temporary folder has no O_DIRECT")
    fd = io.open(tmp_path / "file", create=True, direct=True)
    try:
        source, target = Arena(3 * PAGE), Arena(3 * PAGE)
        source.view[:] = np.random.default_rng(1).bytes(3 * PAGE)
        assert io.write(fd, [source.view[:PAGE], source.view[PAGE:]], PAGE) == 3 * PAGE
        io.sync(fd)
        assert io.read(fd, [target.view], PAGE) == 3 * PAGE
        assert target.view == source.view
    finally:
        io.close(fd)


def test_the_probe_for_direct_io_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "direct.probe").write_bytes(b"left by a crash")
    supports_direct(io, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["open", "write", "read"])
def test_a_file_system_that_refuses_direct_io(tmp_path: Path, where: str) -> None:
    class Refusing(FileIO):
        def _refuse(self, name: str) -> None:
            if where == name:
                raise OSError(errno.EINVAL, "no O_DIRECT here")

        def open(self, path: Path, *, create: bool, direct: bool) -> int:
            self._refuse("open")
            return super().open(path, create=create, direct=False)

        def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            self._refuse("write")
            return super().write(fd, views, offset)

        def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
            self._refuse("read")
            return super().read(fd, views, offset)

    assert not supports_direct(Refusing(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_error_is_not_taken_for_missing_direct_io(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        supports_direct(io, tmp_path / "none")


# Small files


def test_write_file_replaces_whole_contents(tmp_path: Path) -> None:
    path = tmp_path / "small"
    for data in (b"first, and long", b"second", b""):
        io.write_file(path, data)
        assert path.read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_file_that_fails_leaves_the_old(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small"
    io.write_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="full"):
        io.write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    io.write_file(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small"
    contents = {b"a" * 100_000, b"b" * 50_000}
    io.write_file(path, b"a" * 100_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for data in contents:
                io.write_file(path, data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {path.read_bytes() for _ in range(300)} <= contents
    finally:
        stop.set()
        writer.join(60)
