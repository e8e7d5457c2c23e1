"""A file layer that can be told to answer errors, to hang until released, or to be slow."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvstrata.transfer.file_io import FileIO

OPS = ("open", "allocate", "read", "write", "sync", "sync_folder", "remove", "write_file")


class FaultyIO(FileIO):
    """A fault is met before the real call, so a call that was held back does its work when released."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._errors: dict[str, tuple[int, int]] = {}
        self._delays: dict[str, float] = {}
        self._held: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.hanging: Counter[str] = Counter()

    def fail(self, code: int, *ops: str, times: int = -1) -> None:
        """Answer these operations (all of them if none is named) with an errno; times -1: until `heal`."""
        with self._changed:
            for op in ops or OPS:
                self._errors[op] = (code, times)

    def heal(self) -> None:
        """No more errors and delays. What hangs goes on hanging."""
        with self._changed:
            self._errors.clear()
            self._delays.clear()

    def hang(self, *ops: str) -> None:
        with self._changed:
            self._held |= set(ops)

    def release(self, *ops: str) -> None:
        """Let go what hangs in these operations (in all if none is named), and hold back no more."""
        with self._changed:
            self._held -= set(ops or OPS)
            self._changed.notify_all()

    def slow(self, seconds: float, *ops: str) -> None:
        with self._changed:
            for op in ops:
                self._delays[op] = seconds

    def wait_hanging(self, op: str, count: int = 1, seconds: float = 20.0) -> None:
        """Until `count` calls of an operation hang; fails the test if that does not happen."""
        with self._changed:
            met = self._changed.wait_for(lambda: self.hanging[op] >= count, seconds)
        assert met, f"only {self.hanging[op]} of {count} calls of {op} came"

    def _meet(self, op: str) -> None:
        with self._changed:
            self.calls[op] += 1
            delay = self._delays.get(op, 0.0)
            if op in self._held:
                self.hanging[op] += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: op not in self._held)
                self.hanging[op] -= 1
                self._changed.notify_all()
            code, times = self._errors.get(op, (0, 0))
            if times > 0:
                self._errors[op] = (code, times - 1)
        if delay:
            time.sleep(delay)
        if times != 0:
            raise OSError(code, os.strerror(code))

    def open(self, path: Path, *, create: bool, direct: bool) -> int:
        self._meet("open")
        return super().open(path, create=create, direct=direct)

    def open_to_read(self, path: Path, *, direct: bool) -> int:
        self._meet("open")
        return super().open_to_read(path, direct=direct)

    def allocate(self, fd: int, size: int) -> None:
        self._meet("allocate")
        super().allocate(fd, size)

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self._meet("read")
        return super().read(fd, views, offset)

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self._meet("write")
        return super().write(fd, views, offset)

    def sync(self, fd: int) -> None:
        self._meet("sync")
        super().sync(fd)

    def sync_folder(self, folder: Path) -> None:
        self._meet("sync_folder")
        super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        self._meet("remove")
        super().remove(path)

    def write_file(self, path: Path, data: bytes) -> None:
        self._meet("write_file")
        super().write_file(path, data)
