"""NixlMover: slots between files and buffers by NIXL, with the verbs of the I/O engine.

NIXL is handed (file, offset, length) and (address, length) and moves them by a back-end: POSIX here, with
io_uring. It keeps no headers and no checksums; those are made and judged by compiled code before and after.
A transfer that fails does not say which part of it did, so its rows are then moved one by one with plain
calls, which do say. The only file that knows NIXL.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import itertools
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import PAGE, Arena, address_of
from kvstrata.transfer.engine import EngineCounts, OnDone, Rows
from kvstrata.transfer.job_pool import JobPool, JobPoolSettings, Jobs, Unit
from kvstrata.transfer.unit_kernels import judge_unit, lay_out, make_slots, warm_kernels

BACKEND = "POSIX"
EVERYWHERE = 1 << 47
"""The POSIX back-end keeps nothing of what is registered, so one region stands for all user memory."""
LONGEST_FILE = 1 << 62
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5e-5, 5e-4
"""Between two looks at a transfer: short at first, because it may be one block."""
MOST_FILES = 4096
"""Descriptors that an agent remembers before it starts anew."""

_names = itertools.count()
Pieces = NDArray[np.uint64]


def require_package() -> None:
    """Raises ConfigError where NIXL is not installed."""
    if importlib.util.find_spec("nixl_cu12") is None:
        raise ConfigError(
            "the NIXL mover needs NIXL, which is not installed: pip install --no-deps nixl-cu12"
        )


@dataclass(frozen=True, slots=True)
class NixlSettings:
    """threads: transfers in flight. store_threads: how many of them may store. capacity: blocks that may be
    queued or moving. unit_bytes, unit_blocks: of one transfer, at most (one block may be larger).
    """

    threads: int = 4
    store_threads: int = 3
    capacity: int = 65_536
    unit_bytes: int = 16 * 1024 * 1024
    unit_blocks: int = 64


class _Agent:
    """One thread's: NIXL's agents must not be shared by two."""

    def __init__(self, settings: NixlSettings, payload_bytes: int) -> None:
        self._api: Any = None
        self._files: set[int] = set()
        self._arena = Arena(settings.unit_blocks * PAGE + payload_bytes)
        self.pages = address_of(self._arena.view)
        self.bounce = self.pages + settings.unit_blocks * PAGE

    def move(self, operation: str, memory: Pieces, extents: Pieces) -> bool:
        """ "READ" or "WRITE", and wait. False if any part of it failed."""
        from nixl_cu12._api import nixlBind  # noqa: PLC0415

        api = self._started()
        for fd in set(extents[:, 2].tolist()) - self._files:
            api.register_memory([(0, LONGEST_FILE, fd, "")], "FILE", [BACKEND])
            self._files.add(fd)
        handle = None
        try:
            handle = api.initialize_xfer(
                operation,
                api.get_xfer_descs(memory, "DRAM"),
                api.get_xfer_descs(extents, "FILE"),
                api.name,
                b"",
                [BACKEND],
            )
            state = api.transfer(handle)
            pause = FIRST_PAUSE_SECONDS
            while state == "PROC":
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                state = api.check_xfer_state(handle)
        except nixlBind.nixlBackendError:
            return False
        finally:
            if handle is not None:
                api.release_xfer_handle(handle)
        return bool(state == "DONE")

    def _started(self) -> Any:
        if self._api is None or len(self._files) >= MOST_FILES:
            os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what fails is told by what is done instead
            from nixl_cu12._api import nixl_agent, nixl_agent_config  # noqa: PLC0415

            self._files.clear()
            self._api = nixl_agent(f"kvstrata-{next(_names)}", nixl_agent_config(backends=[]))
            self._api.create_backend(BACKEND, {"use_uring": "true"})
            self._api.register_memory([(0, EVERYWHERE, 0, "")], "DRAM", [BACKEND])
        return self._api


class NixlMover:
    """name: of its threads. payload_bytes: of the largest block in whole pages. space: a namespace's digest
    of 32 bytes. failed: transfers of NIXL that failed, and whose rows were moved one by one.

    Rows are READ, WRITE or FLUSH. Deadlines, priorities and cancelling are `JobPool`'s.
    """

    def __init__(self, name: str, settings: NixlSettings, *, payload_bytes: int, space: bytes) -> None:
        """Raises ConfigError without NIXL."""
        require_package()
        warm_kernels()
        self.settings = settings
        self._payload_bytes = payload_bytes
        self._space = np.frombuffer(space, dtype=np.int64)
        self._own = threading.local()
        self.failed = 0
        self._jobs = JobPool(
            name, JobPoolSettings(settings.threads, settings.store_threads, settings.capacity)
        )

    def submit(self, rows: Rows, *, loads: bool, on_done: OnDone) -> Jobs:
        """Queue a batch, as `Engine.submit`."""
        return self._jobs.submit(rows, self._work, on_done, loads=loads, units=self._units(rows))

    def _units(self, rows: Rows) -> list[Unit]:
        """Up to the size of a unit; what must bounce, or is to be synced or flushed, goes alone."""
        alone = ((rows[:, k.FLAGS] & (k.BOUNCE | k.SYNC)) != 0) | (rows[:, k.KIND] == k.FLUSH)
        units: list[Unit] = []
        start = size = 0
        for row, (single, length) in enumerate(
            zip(alone.tolist(), (rows[:, k.LENGTH] + PAGE).tolist(), strict=True)
        ):
            full = size + length > self.settings.unit_bytes or row - start == self.settings.unit_blocks
            if row > start and (full or single or alone[start]):
                units.append(np.arange(start, row))
                start, size = row, 0
            size += length
        if len(rows):
            units.append(np.arange(start, len(rows)))
        return units

    # On the threads

    def _work(self, rows: Rows, fetched: None) -> None:
        if rows[0, k.KIND] == k.FLUSH:
            for fd in rows[:, k.FD].tolist():
                os.fdatasync(fd)
            rows[:, k.RESULT] = 0
            return
        agent = getattr(self._own, "agent", None)
        if agent is None:
            agent = self._own.agent = _Agent(self.settings, self._payload_bytes)
        writing = bool(rows[0, k.KIND] == k.WRITE)
        pieces = np.zeros((2, 2 * len(rows), 3), dtype=np.int64)
        lay_out(rows, agent.pages, agent.bounce, pieces[0], pieces[1])
        if writing:
            make_slots(rows, agent.pages, agent.bounce, self._space)
        memory, extents = pieces.view(np.uint64)
        moved = agent.move("WRITE" if writing else "READ", memory, extents)
        results = np.zeros(len(rows), dtype=np.int64) if moved else _one_by_one(pieces, writing)
        self.failed += not moved
        if not writing:
            judge_unit(rows, agent.pages, agent.bounce)
        elif rows[0, k.FLAGS] & k.SYNC and not results[0]:
            os.fdatasync(int(rows[0, k.FD]))
        failed = results < 0
        rows[failed, k.RESULT] = results[failed]

    # Looking after it

    @property
    def queued(self) -> tuple[int, int]:
        return self._jobs.queued

    @property
    def counts(self) -> EngineCounts:
        return self._jobs.counts

    def oldest_seconds(self, *, loads: bool) -> float:
        return self._jobs.oldest_seconds(loads=loads)

    def forgive(self) -> None:
        self._jobs.forgive()

    def drain(self, seconds: float) -> bool:
        return self._jobs.drain(seconds)

    def close(self, seconds: float) -> bool:
        """As `Engine.close`: False if a thread hangs in the medium."""
        return self._jobs.close(seconds)


def _one_by_one(pieces: NDArray[np.int64], writing: bool) -> NDArray[np.int64]:
    """Move each row with plain calls; per row 0 or -errno. A read that ends early is for the judge."""
    memory, extents = pieces.reshape(2, -1, 2, 3)
    pairs = zip(memory, extents, strict=True)
    return np.array([_move_row(*pair, writing) for pair in pairs], dtype=np.int64)


def _move_row(memory: NDArray[np.int64], extents: NDArray[np.int64], writing: bool) -> int:
    views = [
        memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        for address, size, _ in memory.tolist()
    ]
    offset, _, fd = extents[0].tolist()
    wanted = sum(len(view) for view in views)
    try:
        moved = os.pwritev(fd, views, offset) if writing else os.preadv(fd, views, offset)
    except OSError as error:
        return -(error.errno or errno.EIO)
    return -errno.EIO if writing and moved < wanted else 0
