"""Records what a live store was asked for, as files of our own columns. Off unless it is configured.

A store hands over each request's chain as its policies see it; a thread joins the calls of a request into
one record and writes the records of the last seconds as one whole Parquet file, so that a file is either
complete or not there, also after kill -9. The oldest files in the folder make room for new ones.

Nothing here may harm serving: the caller's part is one copy of key bytes and a list append, no lock is
held during I/O, what finds no room in memory is dropped and counted, and the first error that a disk
answers ends the capture until the next start. `kvstrata.traces.capture_merge` makes one trace of the files.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import StoreConfig
from kvstrata.telemetry import Telemetry
from kvstrata.traces.trace import BATCH_ACCESSES, NONE
from kvstrata.types import KEY_BYTES, BlockKey, BlockLayout, Namespace

log = logging.getLogger(__name__)

FORMAT = "capture"
"""`source_format` of the files: block ids are 64 bits of the keys, times are Unix seconds."""

FILE_NAME = re.compile(r"capture-\d{13,}-[0-9a-f]{8}\.parquet(\.part)?")
"""Unix milliseconds when it was written, and a word of the process. `.part`: not complete."""

IDLE_SECONDS = 600.0
"""A request of which nobody said that it ended, and that was quiet for so long, has ended."""

POLL_SECONDS = 1.0
REQUEST_BYTES = 512
"""What a request in memory takes besides 8 bytes per block, generously."""

ROW_BYTES, FILE_BYTES = 64, 64 * 1024
"""No file is larger than FILE_BYTES and ROW_BYTES for each block."""

FILES_LEAST = 4
"""The bound on disk holds at least as many files of the largest size."""

REMEMBERED_REQUESTS = 65_536
"""Numbers of past requests, so that a late call is not taken for a new request."""

Blocks = NDArray[np.uint64]


@dataclass(slots=True)
class _Request:
    """A request, or one call of it. time_s: of the first call. last_s: of the last one."""

    number: int
    time_s: float
    last_s: float
    blocks: Blocks
    ended: bool
    input_tokens: int = NONE
    output_tokens: int = NONE

    @property
    def cost(self) -> int:
        return REQUEST_BYTES + self.blocks.nbytes

    def joined(self, call: _Request) -> _Request:
        """With a later call of the same request: its chain if that is the whole of it, else both."""
        if len(call.blocks) and np.isin(self.blocks, call.blocks).all():
            blocks = call.blocks
        else:
            blocks = np.concatenate([self.blocks, call.blocks[~np.isin(call.blocks, self.blocks)]])
        return replace(
            call,
            time_s=self.time_s,
            blocks=blocks,
            input_tokens=max(self.input_tokens, call.input_tokens),
            output_tokens=max(self.output_tokens, call.output_tokens),
        )


@dataclass(slots=True)
class _Numbers:
    """Request numbers, the latest REMEMBERED_REQUESTS of them."""

    known: dict[int, None] = field(default_factory=dict)

    def add(self, number: int) -> None:
        self.known[number] = None
        if len(self.known) > REMEMBERED_REQUESTS:
            del self.known[next(iter(self.known))]

    def __contains__(self, number: int) -> bool:
        return number in self.known


class Capture:
    """settings: `capture` (a folder), `capture_bytes`, `capture_queue_bytes`, `capture_seconds`.

    layout, namespace: of the store whose requests these are; the first 64 bits of the namespace's digest
    name the tenant. Raises ConfigError where pyarrow is missing; nothing else of it ever raises. Nothing
    is written before `start`.
    """

    def __init__(
        self, settings: StoreConfig, layout: BlockLayout, namespace: Namespace, telemetry: Telemetry
    ) -> None:
        from kvstrata.traces.parquet import ParquetWriter  # noqa: PLC0415 (an extra)

        self._new_writer = ParquetWriter
        self._folder = Path(settings.capture).expanduser()
        self._max_bytes = settings.capture_bytes
        self._queue_bytes = settings.capture_queue_bytes
        self._seconds = settings.capture_seconds
        self._layout = layout
        self._tenant = namespace.digest[:8].hex()
        self._telemetry = telemetry
        # No file may need more than its share of the bound, whatever is in it.
        share = (self._max_bytes // FILES_LEAST - FILE_BYTES) // ROW_BYTES
        self._file_blocks = max(1, min(BATCH_ACCESSES, share))
        # Ascending whatever is done to the clock, and unlike another process's.
        self._epoch_s = time.time() - time.monotonic()
        self._process = os.urandom(4).hex()
        self._last_file_ms = 0

        self._lock = threading.Lock()
        self._calls: list[_Request] = []
        self._calls_bytes = 0
        self._held_bytes = 0
        self._dropped = _Numbers()
        self._stopped = False
        self._closing = False

        # The thread's own.
        self._open: dict[int, _Request] = {}
        self._open_bytes = 0
        self._over = _Numbers()
        self._ready: list[_Request] = []
        self._ready_blocks = 0
        self._ready_bytes = 0
        self._ready_since_s = 0.0

        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstrata-capture", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    @property
    def held_bytes(self) -> int:
        """Memory that waits to be written, at most `capture_queue_bytes`."""
        return self._held_bytes

    @property
    def running(self) -> bool:
        """False after an error, and after `close`."""
        return not self._stopped

    # The caller's part

    def record(self, number: int, keys: Sequence[BlockKey], *, ended: bool) -> None:
        """A policy call of a request: its chain or a part of it, root first.

        ended: nothing more will come under this number. Returns at once; a request that finds no room is
        dropped as a whole and counted.
        """
        if self._stopped or not keys:
            return
        data = b"".join(keys)
        whole = len(data) == KEY_BYTES * len(keys)
        blocks = np.frombuffer(data, np.uint64)[:: KEY_BYTES // 8].copy() if whole else None
        self._put(number, blocks, ended)

    def end(self, number: int, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Nothing more will come under this number. The tokens where they are known."""
        if not self._stopped:
            known = (NONE if tokens is None else tokens for tokens in (input_tokens, output_tokens))
            self._put(number, np.zeros(0, np.uint64), True, *known)

    def _put(self, number: int, blocks: Blocks | None, ended: bool, *tokens: int) -> None:
        cost = REQUEST_BYTES + (0 if blocks is None else blocks.nbytes)
        with self._lock:
            if number in self._dropped or self._stopped:
                return
            room = blocks is not None and self._held_bytes + cost <= self._queue_bytes
            if blocks is not None and room:
                now = self._epoch_s + time.monotonic()
                self._calls.append(_Request(number, now, now, blocks, ended, *tokens))
                self._calls_bytes += cost
                self._held_bytes += cost
            else:
                self._dropped.add(number)
            many = self._calls_bytes * 4 > self._queue_bytes
        if not room:
            self._telemetry.count("capture_requests_total", "dropped")
        if many:
            self._wake.set()

    def close(self, seconds: float) -> bool:
        """Write what is there and stop. False if that took longer: the rest is then lost."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        self._stopped = True
        return not self._thread.is_alive()

    # The thread's part

    def _run(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._closing:
                self._wake.wait(min(POLL_SECONDS, self._seconds / 2))
                self._wake.clear()
                self._step(final=False)
            self._step(final=True)
        except OSError as error:
            self._stop(error)
        except Exception as error:  # the thread's top: the store goes on without a capture
            log.exception("kvstrata: the capture raised")
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        with self._lock:
            self._stopped = True
            lost = {call.number for call in self._calls}
            self._calls = []
            self._held_bytes = 0
        lost |= set(self._open) | {request.number for request in self._ready}
        self._open.clear()
        self._ready.clear()
        code = errno.errorcode.get(getattr(error, "errno", None) or 0, "unknown")
        self._telemetry.count("capture_errors_total", code)
        self._telemetry.count("capture_requests_total", "dropped", by=len(lost))
        self._telemetry.event("capture stopped", f"{error} ({self._folder})")
        log.warning("kvstrata: the capture in %s has stopped: %s", self._folder, error)

    def _step(self, *, final: bool) -> None:
        with self._lock:
            calls, self._calls, self._calls_bytes = self._calls, [], 0
        for call in calls:
            self._take(call)
        for number in [number for number in self._open if number in self._dropped]:
            self._finish(self._close_open(number))
        now = self._epoch_s + time.monotonic()
        while self._open:
            oldest = next(iter(self._open.values()))
            crowded = self._open_bytes * 2 > self._queue_bytes
            if not (final or crowded or oldest.last_s + IDLE_SECONDS < now):
                break
            self._finish(self._close_open(oldest.number))
        while self._ready and (
            final
            or self._ready_blocks >= self._file_blocks
            or self._ready_bytes * 4 > self._queue_bytes
            or now - self._ready_since_s >= self._seconds
        ):
            self._write(self._next_file())

    def _take(self, call: _Request) -> None:
        request, held = call, call.cost
        if call.number in self._open:
            known = self._close_open(call.number)
            request, held = known.joined(call), held + known.cost
        elif call.number in self._over:
            self._let_go(held)
            return
        self._let_go(held - request.cost)
        if request.ended:
            self._finish(request)
        else:
            self._open[request.number] = request  # at the end: in the order of their last call
            self._open_bytes += request.cost

    def _close_open(self, number: int) -> _Request:
        request = self._open.pop(number)
        self._open_bytes -= request.cost
        return request

    def _let_go(self, cost: int) -> None:
        with self._lock:
            self._held_bytes -= cost

    def _finish(self, request: _Request) -> None:
        """The chain is complete: keep it for the next file, each block once, as the policies count it."""
        self._over.add(request.number)
        held = request.cost
        unique, first = np.unique(request.blocks, return_index=True)
        if len(unique) < len(request.blocks):
            request.blocks = request.blocks[np.sort(first)]
        if request.number in self._dropped or not len(request.blocks):
            self._let_go(held)
            return
        self._let_go(held - request.cost)
        if not self._ready:
            self._ready_since_s = self._epoch_s + time.monotonic()
        self._ready.append(request)
        self._ready_blocks += len(request.blocks)
        self._ready_bytes += request.cost

    def _next_file(self) -> list[_Request]:
        """As many of the ready requests as one file takes, at least one."""
        count = blocks = 0
        for request in self._ready:
            blocks += len(request.blocks)
            if count and blocks > self._file_blocks:
                break
            count += 1
        return self._ready[:count]

    def _write(self, requests: list[_Request]) -> None:
        blocks = sum(len(request.blocks) for request in requests)
        most = FILE_BYTES + ROW_BYTES * blocks
        if most <= self._max_bytes:
            self._make_room(most)
            size = self._write_file(sorted(requests, key=lambda request: request.time_s))
            self._telemetry.count("capture_bytes_total", by=size)
            self._telemetry.count("capture_requests_total", "captured", by=len(requests))
        else:  # one request that is larger than all that may be kept
            self._telemetry.count("capture_requests_total", "dropped", by=len(requests))
        del self._ready[: len(requests)]
        self._ready_blocks -= blocks
        self._ready_since_s = self._epoch_s + time.monotonic()
        held = sum(request.cost for request in requests)
        self._ready_bytes -= held
        self._let_go(held)

    def _make_room(self, needed: int) -> None:
        """Remove the oldest files in the folder, of whatever process, until `needed` more is in bounds."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in capture_files(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                found.append((path, path.stat().st_size))
        total = sum(size for _, size in found)
        for path, size in found:
            if total + needed <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
            self._telemetry.count("capture_removed_total")

    def _write_file(self, requests: list[_Request]) -> int:
        """Requests in order of time, as one file; returns its size in bytes."""
        lengths = np.array([len(request.blocks) for request in requests], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        blocks = np.concatenate([request.blocks for request in requests])
        parents, depths = _in_trees(blocks, starts)
        self._last_file_ms = max(time.time_ns() // 1_000_000, self._last_file_ms + 1)
        path = self._folder / f"capture-{self._last_file_ms}-{self._process}.parquet"
        try:
            with self._new_writer(
                path,
                name=self._tenant,
                source_format=FORMAT,
                block_tokens=self._layout.block_tokens,
                block_bytes=self._layout.block_bytes,
            ) as writer:
                writer.append(
                    starts=starts,
                    blocks=blocks,
                    parents=parents,
                    depths=depths,
                    sizes=np.full(len(blocks), self._layout.block_bytes, np.int64),
                    time_s=np.array([request.time_s for request in requests]),
                    session=np.full(len(requests), NONE, np.int32),
                    tenant=np.zeros(len(requests), np.int32),
                    features={
                        "input_tokens": np.array([r.input_tokens for r in requests], np.int64),
                        "output_tokens": np.array([r.output_tokens for r in requests], np.int64),
                    },
                    labels={"tenant": (self._tenant,)},
                )
        except OSError:
            with contextlib.suppress(OSError):  # a full disk fails the writer's own removal too
                path.with_name(path.name + ".part").unlink()
            raise
        return path.stat().st_size


def capture_files(folder: Path) -> list[Path]:
    """The files that captures have left in a folder, oldest first, and those that are not complete."""
    return sorted(path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name))


def _in_trees(blocks: Blocks, starts: NDArray[np.int64]) -> tuple[Blocks, NDArray[np.int64]]:
    """Parent and depth of every access: those that its block had when it first came.

    A key stands for its whole prefix, but a store may have been told of a part of a chain only; what reads
    a trace relies on parents that came before.
    """
    _, first, inverse = np.unique(blocks, return_index=True, return_inverse=True)
    place = np.arange(len(blocks)) - np.repeat(starts[:-1], np.diff(starts))
    before = np.concatenate([[np.uint64(0)], blocks[:-1]])
    return before[first][inverse], place[first][inverse]
