"""Descriptors: the extents' files that are open now. Decides which are kept; opens and closes nothing.

Closing a file of a network file system may take as long as it likes, so it is left to `on_close`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvstrata.tiers.shared.format import ExtentId


@dataclass(slots=True)
class _Open:
    """users: who may use the descriptor now. direct: opened with O_DIRECT. wanted: to be kept."""

    fd: int
    direct: bool
    users: int = 0
    wanted: bool = True


class Descriptors:
    """At most `limit` files that nobody uses stay open, the last used ones. Thread-safe, memory only."""

    def __init__(self, limit: int, on_close: Callable[[int], None]) -> None:
        self._limit = limit
        self._on_close = on_close
        self._lock = threading.Lock()
        self._open: OrderedDict[ExtentId, _Open] = OrderedDict()
        self._unwanted = 0

    def __len__(self) -> int:
        return len(self._open)

    def acquire(self, extent: ExtentId) -> tuple[int, bool] | None:
        """Descriptor and O_DIRECT of an open file, to be released once; None if it is not open."""
        with self._lock:
            file = self._open.get(extent)
            if file is None:
                return None
            file.users += 1
            self._open.move_to_end(extent)
            return file.fd, file.direct

    def add(self, extent: ExtentId, fd: int, *, direct: bool) -> tuple[int, bool]:
        """`acquire` of a file that was opened just now; another's, if somebody was faster."""
        with self._lock:
            file = self._open.get(extent)
            spare = -1
            if file is None:
                file = self._open[extent] = _Open(fd, direct)
            else:
                spare = fd
            file.users += 1
            self._open.move_to_end(extent)
            closing = self._surplus()
        for each in [*closing, *([spare] if spare >= 0 else [])]:
            self._on_close(each)
        return file.fd, file.direct

    def release(self, extents: Iterable[ExtentId]) -> None:
        with self._lock:
            for extent in extents:
                file = self._open.get(extent)
                if file is None:
                    continue  # everything was closed
                file.users -= 1
                assert file.users >= 0, "a file was released twice"
            closing = self._surplus()
        for fd in closing:
            self._on_close(fd)

    def forget(self, extents: Iterable[ExtentId]) -> None:
        """Nobody will ask for these: close them as soon as nobody uses them."""
        with self._lock:
            for extent in extents:
                file = self._open.get(extent)
                if file is not None and file.wanted:
                    file.wanted = False
                    self._unwanted += 1
            closing = self._surplus()
        for fd in closing:
            self._on_close(fd)

    def forget_segments(self, segments: Collection[int]) -> None:
        """`forget`, by the word that the slots of an extent carry."""
        with self._lock:
            extents = [extent for extent in self._open if extent.segment in segments]
        self.forget(extents)

    def forget_all(self) -> None:
        """`forget` every file."""
        with self._lock:
            extents = list(self._open)
        self.forget(extents)

    def _surplus(self) -> list[int]:
        """Take out what need not stay open."""
        if not self._unwanted and len(self._open) <= self._limit:
            return []
        idle = [extent for extent, file in self._open.items() if not file.users]
        left = len(idle) - self._limit
        closing = [
            extent for place, extent in enumerate(idle) if place < left or not self._open[extent].wanted
        ]
        files = [self._open.pop(extent) for extent in closing]
        self._unwanted -= sum(not file.wanted for file in files)
        return [file.fd for file in files]

    def take_all(self) -> list[int]:
        """Every descriptor, for who closes them now; used ones too."""
        with self._lock:
            fds = [file.fd for file in self._open.values()]
            self._open.clear()
            self._unwanted = 0
            return fds
