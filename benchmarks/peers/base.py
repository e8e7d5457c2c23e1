"""The interface of a peer: numbered blocks between rows of memory and a folder."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvstrata.transfer.buffers import Arena, address_of


class PeerError(Exception):
    """A peer did not do what it was asked; its cell is left out, with this as the reason."""


@dataclass(frozen=True)
class Shape:
    """folder: where the peer keeps its files. blocks: rows of the arena, and blocks of one full run.

    depth: how many operations a peer that asks for a number may have in flight. options: of one variant.
    """

    folder: Path
    block_bytes: int
    blocks: int
    depth: int
    options: dict[str, Any] = field(default_factory=dict)


class Peer(ABC):
    """Opened by its constructor, which also writes what has to be written once.

    A block has a number; block n lies in row n % blocks of the arena when it is saved, and is loaded into
    that row again. A plan (made outside the timing) is whatever the peer wants for a list of blocks: keys,
    views, descriptors. `start_save` and `start_load` may return before anything has moved.
    """

    PACKAGES: tuple[str, ...] = ()
    """Distributions whose versions go into the results."""
    FILLS = 1
    """Runs that are saved before anything is timed."""

    def __init__(self, shape: Shape, arena: Arena) -> None:
        self.shape = shape
        self.arena = arena
        self.base = address_of(arena.view)
        size = shape.block_bytes
        self.rows = [arena.view[n * size : (n + 1) * size] for n in range(shape.blocks)]

    @abstractmethod
    def plan(self, blocks: Sequence[int]) -> Any:
        """What `start_save` and `start_load` take for these blocks."""

    @abstractmethod
    def start_save(self, plan: Any) -> Any:
        """Begin to save new blocks; returns a ticket."""

    @abstractmethod
    def start_load(self, plan: Any) -> Any:
        """Begin to load blocks that are there; returns a ticket."""

    @abstractmethod
    def wait(self, tickets: Sequence[Any]) -> None:
        """Until all of it has moved. Raises PeerError for a block that was not saved or loaded."""

    def sync(self) -> None:
        """Make what was saved durable. By default one syncfs, the cheapest for many files."""
        sync_folder(self.shape.folder)

    def keep(self, plan: Any) -> None:  # noqa: B027 (most peers have nothing to do)
        """These blocks are still wanted: do not evict them. For peers that evict on their own."""

    def forget(self, plan: Any) -> None:  # noqa: B027
        """These blocks are not wanted any more. For peers that do not evict on their own."""

    def drop_cache(self, plan: Any) -> None:  # noqa: B027
        """Take these blocks out of the page cache. For peers that go through it."""

    def close(self) -> None:  # noqa: B027
        """Stop threads and close files; the folder is removed by the caller."""


def sync_folder(folder: Path) -> None:
    """Write back all of the file system that a folder lies on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(fd)


def evict_file(path: Path) -> None:
    """Drop a file's clean pages from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def open_direct(path: Path) -> int:
    """A file for reading and writing past the page cache, where the file system has O_DIRECT."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, flags, 0o600)


@contextmanager
def written_file(path: Path, size: int, arena: Arena) -> Iterator[int]:
    """A file of `size` bytes (multiples of 4096) whose extents were all written once."""
    fd = open_direct(path)
    try:
        step = min(arena.size, 16 << 20)
        for offset in range(0, size, step):
            part = min(step, size - offset)
            if os.pwrite(fd, arena.view[:part], offset) != part:
                raise PeerError(f"{path.name}: the file system is full")
        os.fsync(fd)
        yield fd
    finally:
        os.close(fd)


def parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """At most `count` runs of nearly equal length, none of them empty."""
    count = min(count, len(items))
    edges = [len(items) * n // count for n in range(count + 1)] if count else [0]
    return [items[a:b] for a, b in pairwise(edges)]
