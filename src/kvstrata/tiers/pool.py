"""The pool tier: blocks in the memory of many machines, through Mooncake Store. The pool evicts by itself.

A block is one value: a header of 256 bytes, then its bytes. The client gathers and scatters both, so that
blocks travel from and into the caller's own buffers; where a device has to know its memory beforehand they
go through a staging area of bounded size. Nothing here decides what the pool keeps.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import numpy as np

from kvstrata.config import PoolTierConfig, StoreConfig, format_size
from kvstrata.errors import ConfigError, StoreClosedError
from kvstrata.table import Placements, unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import OpenReport, Tier, Words, describe_rows, refuse_lengths
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.pool_books import PoolBooks
from kvstrata.tiers.pool_client import PoolClient, require_package
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Arena, Buffers, address_of, round_up
from kvstrata.transfer.engine import EngineCounts, OnDone, Rows
from kvstrata.transfer.handle import Cancellable
from kvstrata.transfer.headed_blocks import judge_blocks, make_headers, warm_kernels
from kvstrata.transfer.job_pool import JobPool, JobPoolSettings
from kvstrata.transfer.slot_header import (
    HEADER_BYTES,
    VERSION,
    WRONG_CHECKSUM,
    WRONG_HEADER,
    WRONG_KEY,
    WRONG_PLACE,
)
from kvstrata.types import BlockKey, BlockLayout, Namespace

UNIT_ROWS = 1024
"""Values of one call at most, so that the headers of a unit have a bound."""
PIECE_BYTES = 64
"""Payloads in a staging area begin at a multiple of this."""
QUESTIONS = 4096
"""Keys that are asked for in one call."""
MOST_REPLACED = 4
"""Clients that may be left behind, each with a thread inside it, before no new one is made."""
STOPPED_SECONDS = 0.5
"""The thread that asks looks so often whether it is to stop."""
TURN_SECONDS = 0.25
"""Longer than a call that is well takes."""
DAMAGE = (WRONG_HEADER, WRONG_PLACE, WRONG_KEY, WRONG_CHECKSUM)
"""Verdicts on bytes that nobody can use. A wrong length may be what the caller asked for."""
UNREACHABLE = (errno.ENOTCONN, errno.ECONNREFUSED)
"""Errors that a new client may not have. To set one up beside a master that is late takes as long again."""

log = logging.getLogger(__name__)


class PoolTier(Tier):
    """Keys are asked of the master by a thread of its own; values are moved by `io_threads` threads."""

    name: ClassVar[str] = "pool"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        config: PoolTierConfig,
        layout: BlockLayout,
        namespace: Namespace,
        store: StoreConfig,
        telemetry: Telemetry,
    ) -> None:
        """Raises ConfigError without Mooncake's client, or if no block fits into the staging area."""
        require_package()
        super().__init__(store, telemetry)
        self.ttl_seconds = config.ttl_seconds
        self._config = config
        self._layout = layout
        self._space = np.frombuffer(namespace.digest, dtype=np.int64)
        self._staged = config.staging == "always" or (config.staging == "auto" and config.protocol != "tcp")
        self._value_bytes = round_up(HEADER_BYTES + layout.block_bytes, PIECE_BYTES)
        self._unit_bytes = max(config.batch_bytes, self._value_bytes)
        if self._staged:
            self._unit_bytes = min(self._unit_bytes, config.staging_bytes // config.io_threads)
            if self._unit_bytes < self._value_bytes:
                raise ConfigError(
                    f"tier pool: staging_bytes {format_size(config.staging_bytes)} holds no block of "
                    f"{format_size(layout.block_bytes)} for {config.io_threads} io_threads each; raise it"
                )
        self._prefix = f"kvstrata/{VERSION}/"
        self._probe_name = f"{self._prefix}probe-{uuid.uuid4().hex}"
        self._questions = threading.Event()
        self._books = PoolBooks(
            config,
            layout.block_bytes,
            batch_blocks=store.batch_blocks,
            wake=self._questions.set,
            refused=lambda count: self.telemetry.count("misses_total", self.name, "not_asked", by=count),
        )
        self._client = PoolClient(config, store.io_deadline_seconds)
        self._replaced = 0
        self._failed_probes = 0
        self._desks: queue.SimpleQueue[Arena] = queue.SimpleQueue()
        self._areas: list[Arena] = []
        self._load_turns, self._save_turns = (threading.Semaphore(config.calls) for _ in range(2))
        self._jobs: JobPool | None = None
        self._asker: threading.Thread | None = None
        self._stopping = False

    @property
    def table(self) -> PoolBooks:
        return self._books

    # Moving blocks

    def start_load(
        self,
        placements: Placements,
        targets: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        copy_to: Words | None = None,
    ) -> Cancellable:
        rows = self._rows(placements, targets, deadline_ns)
        if copy_to is not None:
            rows[:, k.COPY_TO] = copy_to
        # Of a key that only the master told of, the length is not known.
        wrong = (placements.lengths != 0) & (placements.lengths != targets.lengths)
        right = rows[~wrong]
        finish = partial(self._loaded, on_done, targets.owner)
        batch = self._running.submit(right, self._load, finish, loads=True, units=self._units(right))
        refuse_lengths(rows[wrong], on_done)
        return batch

    def start_save(
        self,
        placements: Placements,
        sources: Buffers,
        deadline_ns: int,
        on_done: OnDone,
        checksums: Words | None = None,
    ) -> Cancellable:
        rows = self._rows(placements, sources, deadline_ns)
        rows[:, k.CREATED_MS] = unix_ms()
        rows[:, k.EXPIRES_MS] = placements.expires_ms
        if checksums is not None:
            rows[:, k.CHECKSUM] = checksums
            rows[:, k.FLAGS] = k.KNOWN
        finish = partial(self._saved, on_done, sources.owner)
        return self._running.submit(rows, self._save, finish, loads=False, units=self._units(rows))

    def _rows(self, placements: Placements, buffers: Buffers, deadline_ns: int) -> Rows:
        rows = np.zeros((len(placements), k.COLUMNS), dtype=np.int64)
        describe_rows(rows, placements, buffers, deadline_ns)
        rows[:, k.KEY : k.KEY + 4] = placements.key_words()
        return rows

    def _units(self, rows: Rows) -> list[Words]:
        """Neighbours go to one call, up to the size of a unit."""
        units: list[Words] = []
        start = size = 0
        for row, length in enumerate(rows[:, k.LENGTH].tolist()):
            value = round_up(HEADER_BYTES + length, PIECE_BYTES)
            if row > start and (size + value > self._unit_bytes or row - start == UNIT_ROWS):
                units.append(np.arange(start, row))
                start, size = row, 0
            size += value
        if len(rows):
            units.append(np.arange(start, len(rows)))
        return units

    @property
    def _running(self) -> JobPool:
        if self._jobs is None or self._stopped:
            raise StoreClosedError("this store was closed; open a new one")
        return self._jobs

    def _load(self, rows: Rows, fetched: None) -> None:
        """One call of the client, on a thread of the pool."""
        area = self._desks.get()
        try:
            addresses, sizes = self._lay_out(rows, area)
            with _turn(self._load_turns):
                rows[:, k.RESULT] = self._client.get(self._names(rows), addresses, sizes)
            judge_blocks(rows, self._space, unix_ms(), self._staged)
        finally:
            self._desks.put(area)

    def _save(self, rows: Rows, fetched: None) -> None:
        area = self._desks.get()
        try:
            addresses, sizes = self._lay_out(rows, area)
            make_headers(rows, self._space, self._staged)
            with _turn(self._save_turns):
                rows[:, k.RESULT] = self._client.put(self._names(rows), addresses, sizes)
        finally:
            self._desks.put(area)

    def _lay_out(self, rows: Rows, area: Arena) -> tuple[list[list[int]], list[list[int]]]:
        """Where each value lies in memory, as the client wants it; OFFSET becomes the header's address."""
        base, lengths = address_of(area.view), rows[:, k.LENGTH]
        if not self._staged:
            rows[:, k.OFFSET] = base + HEADER_BYTES * np.arange(len(rows))
            sizes = [[HEADER_BYTES, length] for length in lengths.tolist()]
            return rows[:, [k.OFFSET, k.ADDRESS]].tolist(), sizes
        steps = -(-(HEADER_BYTES + lengths) // PIECE_BYTES) * PIECE_BYTES
        rows[:, k.OFFSET] = base + np.cumsum(steps) - steps
        return rows[:, [k.OFFSET]].tolist(), [[HEADER_BYTES + length] for length in lengths.tolist()]

    def _names(self, rows: Rows) -> list[str]:
        digits = rows[:, k.KEY : k.KEY + 4].tobytes().hex()
        return [self._prefix + digits[at : at + 64] for at in range(0, len(digits), 64)]

    def _name(self, key: BlockKey) -> str:
        return self._prefix + key.hex()

    def _loaded(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        """owner: what keeps the buffers alive until here."""
        self._account("read", self.reads, rows)
        damaged = rows[np.isin(rows[:, k.RESULT], DAMAGE)]
        if len(damaged):
            self._remove_later(self._names(damaged))
        on_done(rows)

    def _saved(self, on_done: OnDone, owner: object, rows: Rows) -> None:
        self._account("write", self.writes, rows)
        on_done(rows)

    def _account(self, op: str, breaker: Breaker, rows: Rows) -> None:
        """A member of the pool that died fails some blocks; only a call that got none is the pool's fault.

        A pool that is full is well.
        """
        results = rows[:, k.RESULT]
        failed = results < 0
        super()._account(op, breaker, rows[~failed])
        numbers = (-results[failed]).tolist()
        if numbers and failed.all() and numbers[0] != errno.ENOSPC:
            breaker.saw(numbers[:1])
            del numbers[0]
        for number in set(numbers):
            word = errno.errorcode.get(number, "unknown")
            self.telemetry.count("io_errors_total", self.name, op, word, by=numbers.count(number))

    def _remove_later(self, names: Sequence[str]) -> None:
        """Nothing that is there can be written again, so what is damaged has to go first."""

        def remove() -> None:
            try:
                with self.writes.watch():
                    self._client.remove(names)
            except OSError as error:
                self.telemetry.event("damaged value stays in the pool", str(error))
            else:
                self.telemetry.event("damaged values removed from the pool", f"{len(names)} values")

        self.upkeep.submit(remove)

    # Asking what is there

    def _ask(self) -> None:
        """A thread of its own: the master may take its time, a look-up may not."""
        while not self._stopping:
            self._questions.wait(STOPPED_SECONDS)
            self._questions.clear()
            while not self._stopping and (keys := self._books.questions(QUESTIONS)):
                try:
                    with self.reads.watch():
                        there = self._client.exist([self._name(key) for key in keys])
                except OSError:
                    self._books.unanswered(keys)
                except Exception:
                    log.exception("kvstrata: asking the pool raised")
                    self._books.unanswered(keys)
                else:
                    self._books.answered(keys, there)

    # Looking after it

    @property
    def queued(self) -> tuple[int, int]:
        return self._jobs.queued if self._jobs else (0, 0)

    @property
    def counts(self) -> EngineCounts:
        return self._jobs.counts if self._jobs else EngineCounts()

    def drain(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        moved = self._jobs is None or self._jobs.drain(seconds)
        return moved and self.upkeep.drain(max(0.0, until - time.monotonic()))

    def stop(self, seconds: float) -> bool:
        if self._stopped:
            return True
        until = time.monotonic() + seconds
        ended = self.upkeep.close(seconds)
        self._stopping = True
        self._questions.set()
        if self._jobs is not None:
            ended = self._jobs.close(max(0.0, until - time.monotonic())) and ended
        if self._asker is not None:
            self._asker.join(max(0.1, until - time.monotonic()))
            ended = not self._asker.is_alive() and ended
        self._stopped = ended
        return ended

    def open(self) -> OpenReport:
        """Raises OSError if the master does not answer."""
        started = time.monotonic()
        warm_kernels()
        self._client.connect()
        threads = self._config.io_threads
        header_bytes = UNIT_ROWS * HEADER_BYTES
        for _ in range(threads - len(self._areas)):
            self._areas.append(Arena(self._unit_bytes if self._staged else header_bytes))
            self._desks.put(self._areas[-1])
        self._register()
        waiting = self._store.load_queue_blocks + 2 * self._store.queue_blocks + self._store.batch_blocks
        settings = JobPoolSettings(threads, max(1, threads - 1), waiting)
        self._jobs = jobs = JobPool(f"kvstrata-{self.name}", settings)
        self.reads.watch_engine(partial(jobs.oldest_seconds, loads=True), jobs.forgive)
        self.writes.watch_engine(partial(jobs.oldest_seconds, loads=False), jobs.forgive)
        self._asker = threading.Thread(target=self._ask, name=f"kvstrata-{self.name}-ask", daemon=True)
        self._asker.start()
        self._opened = True
        return OpenReport(0, seconds=time.monotonic() - started)

    def _register(self) -> None:
        for area in self._areas if self._staged else []:
            self._client.register(address_of(area.view), area.size)

    def write_failed(self, placements: Placements) -> None:
        """Every write is of a new value: there is nothing to keep away from."""

    def refresh(self) -> None:
        """Nothing to do."""

    def probe_read(self) -> None:
        """Ask the master. One that was not there for a time may have lost all that it knew."""
        self._probe(lambda: self._client.exist([self._probe_name]))
        self._books.clear()

    def probe_write(self) -> None:
        """Store and remove a header's worth of bytes; a full pool answers too."""
        self._probe(self._try_to_write)

    def _try_to_write(self) -> None:
        if not self._areas:
            raise OSError(errno.ENOTCONN, "no client is set up")
        address = address_of(self._areas[0].view)  # whatever is there: nobody reads it
        [result] = self._client.put([self._probe_name], [[address]], [[HEADER_BYTES]])
        if result not in (0, -errno.ENOSPC):
            raise OSError(-result, "a small value could not be stored")
        self._client.remove([self._probe_name])

    def _probe(self, ask: Callable[[], object]) -> None:
        """A client that cannot reach the master twice, though the master is well, is replaced."""
        try:
            ask()
        except OSError as error:
            self._failed_probes += 1
            if self._failed_probes < 2 or error.errno not in UNREACHABLE:
                raise
            self._replace_client()
            ask()
        self._failed_probes = 0

    def _replace_client(self) -> None:
        if self._replaced == MOST_REPLACED:
            raise OSError(errno.ECONNABORTED, "Mooncake's client does not recover; restart this process")
        fresh = PoolClient(self._config, self._store.io_deadline_seconds)
        fresh.connect()
        old, self._client = self._client, fresh
        self._register()
        self._replaced += old.busy
        old.close()
        self.telemetry.event("pool client set up again", self._config.master)

    def flush(self) -> None:
        """Memory of other machines is as durable as it gets."""

    def flush_by(self, until: float) -> bool:
        return True

    def close(self, *, clean: bool) -> None:
        if clean and self.stop(self._store.close_seconds):
            self._opened = False
            self._client.close()

    def used_bytes_on_medium(self) -> int:
        """What this process lends: the pool may fill it with anybody's blocks."""
        return self._config.segment_bytes if self._opened else 0


@contextmanager
def _turn(turns: threading.Semaphore) -> Iterator[None]:
    """Wait while others are inside the client, where who waits spins; but not for a call that hangs."""
    mine = turns.acquire(timeout=TURN_SECONDS)
    try:
        yield
    finally:
        if mine:
            turns.release()
