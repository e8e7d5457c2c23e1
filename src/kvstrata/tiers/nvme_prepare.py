"""Segments made ahead of use and written through once with zeros.

A file system notes for each extent whether it was ever written. The first write to a preallocated extent
changes that note and costs about as much again as the write; overwriting does not. So the zeros go in
before there are blocks, by one thread that gives way to the tier's own reads and writes.

A file is prepared under a temporary name, which the next open removes. When it is whole it gets its
segment's name, and is a segment without blocks like any other: it is kept by a close, and by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvstrata.config import format_size
from kvstrata.table import unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.nvme_format import SegmentHeader, segment_name, segment_size
from kvstrata.transfer.buffers import PAGE, Arena
from kvstrata.transfer.file_io import FileIO

PART_BYTES = 4 * 2**20
"""Of one write: a few milliseconds, after which the thread looks who else wants the disk."""
PAUSE_SECONDS = 0.25
"""Longest wait before a part while the tier is busy: at worst 16 MiB a second are prepared."""
POLL_SECONDS = 0.005
HURRY_SECONDS = 0.25
"""How long a growing tier waits for a file that is nearly there, rather than make another one."""
STOP_SECONDS = 0.5
"""How long closing waits for the thread; a hanging one removes its file when the disk answers."""


@dataclass(frozen=True, slots=True)
class PreparedSegment:
    """A segment without blocks: header on disk, file open, under its final name."""

    header: SegmentHeader
    path: Path
    fd: int


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """segments: of the whole tier. prepared: now, with `written_bytes`. left_out: no room beside others."""

    segments: int
    prepared: int
    written_bytes: int
    left_out: int
    seconds: float


class _StoppedError(Exception):
    """The tier is being closed."""


class SegmentPreparer:
    """One file at a time, by one thread that lives while there is something to prepare.

    grow_lock: of the tier; held for `plan` and `adopt`, never during I/O. plan: the slots of the next
    segment to prepare, or None; raises OSError. adopt: takes what `pop_ready` gives. busy: does somebody
    else want the disk now?
    """

    def __init__(
        self,
        io: FileIO,
        folder: Path,
        stride: int,
        telemetry: Telemetry,
        *,
        tier: str,
        direct: bool,
        retry_seconds: float,
        grow_lock: threading.Lock,
        plan: Callable[[], int | None],
        adopt: Callable[[], None],
        busy: Callable[[], bool],
    ) -> None:
        self._io = io
        self._folder = folder
        self._stride = stride
        self._telemetry = telemetry
        self._tier = tier
        self._direct = direct
        self._retry_seconds = retry_seconds
        self._grow_lock = grow_lock
        self._plan = plan
        self._adopt = adopt
        self._busy = busy
        self._changed = threading.Condition()
        self._ready: list[PreparedSegment] = []
        self._making = 0
        self._unseen = False
        self._hurried = False
        self._stopped = False
        self._retry_at = 0.0
        self._thread: threading.Thread | None = None

    # What the tier asks; `held`, `unseen_bytes` and `hurry` under grow_lock

    def start(self) -> None:
        """Begin, unless the thread is at work, or has just found nothing that it could do."""
        with self._changed:
            if self._stopped or self._thread is not None or time.monotonic() < self._retry_at:
                return
            self._thread = threading.Thread(
                target=self._run, name=f"kvstrata-{self._tier}-prepare", daemon=True
            )
            self._thread.start()

    @property
    def held(self) -> list[int]:
        """Slots of every file that is being made, or waits to be adopted."""
        with self._changed:
            making = [self._making] if self._making else []
            return making + [ready.header.slots for ready in self._ready]

    @property
    def unseen_bytes(self) -> int:
        """Of a file that a look at the folder may miss: not allocated yet, or changing its name."""
        with self._changed:
            return segment_size(self._making, self._stride) if self._making and self._unseen else 0

    def hurry(self, slots: int) -> None:
        """Wait a moment for a file of so many slots that is being made; it is then not written through."""
        with self._changed:
            if self._making != slots:
                return
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._making != slots, HURRY_SECONDS)

    def pop_ready(self) -> list[PreparedSegment]:
        with self._changed:
            ready, self._ready = self._ready, []
        return ready

    def stop(self, seconds: float) -> bool:
        """No new file from here on; False if the disk does not let the thread end in time."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
            return not thread.is_alive()
        return True

    # Working

    def _run(self) -> None:
        done: list[int] = []
        started = time.monotonic()
        try:
            while size := self._one():
                done.append(size)
        except _StoppedError:
            pass
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "unknown")
            self._telemetry.count("io_errors_total", self._tier, "prepare", name)
            self._telemetry.event(f"{self._tier} cannot prepare", str(error))
        finally:
            with self._changed:
                self._thread = None
                self._retry_at = time.monotonic() + (0.0 if done else self._retry_seconds)
        if done:
            self._telemetry.event(
                f"{self._tier} prepared",
                f"{len(done)} segments with {format_size(sum(done))} in {time.monotonic() - started:.2f} s",
            )

    def _one(self) -> int:
        """Prepare the next file and hand it over: its size, or 0 if there is nothing to do."""
        with self._grow_lock:
            if not self._claim(self._plan):
                return 0
        whole = self._make_claimed(lambda written: None, polite=True)
        with self._grow_lock:
            if not self._stopped:
                self._adopt()
        return whole

    def run_all(self, plan: Callable[[], int | None], progress: Callable[[int], None]) -> int:
        """Prepare everything that `plan` names, in this thread and without pauses; how many there were.

        progress: told how many bytes were written since it was last told. Raises OSError.
        """
        count = 0
        while True:
            with self._grow_lock:
                if not self._claim(plan):
                    return count
            self._make_claimed(progress, polite=False)
            with self._grow_lock:
                self._adopt()
            count += 1

    def _claim(self, plan: Callable[[], int | None]) -> bool:
        slots = plan()
        with self._changed:
            self._making, self._unseen, self._hurried = slots or 0, True, False
        return slots is not None

    def _make_claimed(self, progress: Callable[[int], None], *, polite: bool) -> int:
        made: PreparedSegment | None = None
        try:
            made = self._make(self._making, progress, polite=polite)
        finally:
            with self._changed:
                keep = made is not None and not self._stopped
                hurried = self._hurried
                if made is not None and keep:
                    self._ready.append(made)
                self._making = 0
                self._changed.notify_all()
            if made is not None and not keep:
                self._io.close(made.fd)  # closed meanwhile: the file stays, a segment without blocks
        size = segment_size(made.header.slots, self._stride)
        if not hurried:
            self._telemetry.count("prepared_segments_total", self._tier)
        return size

    def _make(self, slots: int, progress: Callable[[int], None], *, polite: bool) -> PreparedSegment:
        header = SegmentHeader(secrets.randbits(63), self._stride, slots, unix_ms())
        path = self._folder / f"prepare-{header.segment_id:016x}.tmp"
        self._check()
        fd = self._io.open(path, create=True, direct=self._direct)
        try:
            self._check()
            size = segment_size(slots, self._stride)
            self._io.allocate(fd, size)
            self._unseen = False
            zeros = Arena(min(PART_BYTES, size))
            zeros.view[:PAGE] = header.pack()
            self._io.write(fd, [zeros.view[:PAGE]], 0)
            zeros.view[:PAGE] = bytes(PAGE)
            self._write_through(fd, size, zeros.view, progress, polite=polite)
            self._io.sync(fd)
            self._check()
            self._unseen = True
            final = self._folder / segment_name(header.segment_id)
            self._io.rename(path, final)
            path = final
            self._io.sync_folder(self._folder)
        except BaseException:
            self._io.close(fd)
            with contextlib.suppress(OSError):
                self._io.remove(path)
            raise
        return PreparedSegment(header, path, fd)

    def _write_through(
        self, fd: int, size: int, zeros: memoryview, progress: Callable[[int], None], *, polite: bool
    ) -> None:
        """Everything behind the header page, or as much of it as there is time for."""
        at = PAGE
        while at < size and not self._hurried:
            self._check()
            if polite:
                self._give_way()
            part = zeros[: min(len(zeros), size - at)]
            self._io.write(fd, [part], at)
            at += len(part)
            self._telemetry.count("prepared_bytes_total", self._tier, by=len(part))
            progress(len(part))

    def _give_way(self) -> None:
        until = time.monotonic() + PAUSE_SECONDS
        while self._busy() and time.monotonic() < until:
            with self._changed:
                if self._stopped or self._hurried:
                    return
                self._changed.wait(POLL_SECONDS)

    def _check(self) -> None:
        if self._stopped:
            raise _StoppedError
