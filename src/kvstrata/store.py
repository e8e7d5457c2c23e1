"""BlockStore: look up, load, save, touch, close. The only place where tiers are orchestrated.

    lookup   says which leading blocks are there; no side effects, a hint
    load     pins what is still there and reads it into the caller's buffers; verified, or a miss
    save     admits, reserves slots and copies in the background; never blocks prefill
    touch    tells the policies that a request used its chain

A request makes one policy call per tier and save; hits and misses of the live store are those of the
simulator, because the policy kernels are the same. No byte moves on the caller's thread.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import xxhash

from kvstrata.admission import Admission, AdmissionGate
from kvstrata.config import Config, MemoryTierConfig, format_size
from kvstrata.errors import (
    BlockCorruptError,
    ConfigError,
    KVStrataError,
    LayoutMismatchError,
    StoreClosedError,
)
from kvstrata.table import Placement
from kvstrata.telemetry import Telemetry
from kvstrata.tiers import LocalTier, MemoryTier, make_tier
from kvstrata.tiers.base import OpenReport
from kvstrata.tiers.breaker import Breaker
from kvstrata.traces.capture import Capture
from kvstrata.transfer.executor import TransferExecutor
from kvstrata.transfer.file_io import FileIO
from kvstrata.transfer.handle import Start, Transfer
from kvstrata.transfer.plan import BlockMove, Direction, TransferPlan
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome, PrefixMatch
from kvstrata.write_back import WriteBack

log = logging.getLogger(__name__)

Buffer = memoryview | bytearray | bytes
T = TypeVar("T")

CLOSE_SECONDS_LEAST = 1.0
"""What a tier gets to keep its index, however long the queue took to empty."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier as an operator sees it."""

    name: str
    opened: bool
    readable: bool
    writable: bool
    reason: str
    blocks: int
    used_bytes: int
    capacity_bytes: int
    pinned_blocks: int
    open_report: OpenReport | None


class BlockStore:
    """config: its tiers, fastest first, and every bound. layout: the shape of a block.

    namespace: whose blocks these are; keys must have been made with its digest. file_io: the file layer,
    replaced by tests that make a disk fail. Raises ConfigError, FolderLockedError and FormatVersionError;
    a medium that answers errors is not one of them: its tier starts out of service and is tried again.
    """

    def __init__(
        self,
        config: Config,
        layout: BlockLayout,
        namespace: Namespace,
        *,
        file_io: FileIO | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        if not config.tiers:
            raise ConfigError("no tier is configured; add a [[tier]] table")
        if config.store.queue_bytes < layout.block_bytes:
            raise ConfigError(
                f"store.queue_bytes {format_size(config.store.queue_bytes)} is below one block of "
                f"{format_size(layout.block_bytes)}, so nothing could ever be saved; raise it"
            )
        self.config = config
        self.layout = layout
        self.namespace = namespace
        self.telemetry = telemetry or Telemetry(config.store.events)
        self._requests = itertools.count(1)
        self._closed = False
        self._close_lock = threading.Lock()
        self._reopen_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._reports: dict[str, OpenReport] = {}
        settings = config.store
        self._capture: Capture | None = None
        if settings.capture:
            self._capture = Capture(settings, layout, namespace, self.telemetry)
        io = file_io or FileIO()
        self._tiers = [
            make_tier(tier, layout, namespace, settings, self.telemetry, io) for tier in config.tiers
        ]
        with ExitStack() as undo:
            for tier in self._tiers:
                undo.callback(tier.close, clean=True)
                self._open_tier(tier)
            undo.pop_all()
        self._gate = AdmissionGate(
            settings.queue_blocks,
            settings.queue_bytes,
            settings.full_queue,
            settings.throttle_seconds,
        )
        # A lane per tier: threads that hang in one medium leave the other tiers theirs.
        self._lanes = [
            TransferExecutor(settings.io_threads, settings.io_store_threads, f"kvstrata-{tier.name}")
            for tier in self._tiers
        ]
        self._memory, self._promote, self._through = self._memory_role()
        self._write_back = self._make_write_back()
        if self._capture is not None:
            self._capture.start()

    def _memory_role(self) -> tuple[MemoryTier | None, bool, bool]:
        first, first_config = self._tiers[0], self.config.tiers[0]
        if isinstance(first, MemoryTier) and isinstance(first_config, MemoryTierConfig):
            through = first_config.write_mode == "through" and len(self._tiers) > 1
            return first, first_config.promote and len(self._tiers) > 1, through
        return None, False, False

    def _make_write_back(self) -> WriteBack | None:
        if self._memory is None or self._through or len(self._tiers) < 2:
            return None
        settings = self.config.store
        gate = AdmissionGate(settings.queue_blocks, settings.queue_bytes, "drop", 0.0)
        return WriteBack(
            self._memory, self._tiers[1], self._lanes[1], gate, self.telemetry, self._write_one
        )

    def _open_tier(self, tier: LocalTier) -> None:
        try:
            report = tier.open()
        except OSError as error:
            for breaker in (tier.reads, tier.writes):
                breaker.trip(f"cannot be opened: {error}")
            name = errno.errorcode.get(error.errno or 0, "unknown")
            self.telemetry.count("io_errors_total", tier.name, "open", name)
            log.warning("kvstrata: tier %s is out of service: %s", tier.name, error)
            return
        self._reports[tier.name] = report
        self.telemetry.event(
            f"{tier.name} opened",
            f"{report.restored} blocks in {report.slots} slots, {report.seconds:.3f} s, "
            f"{'index' if report.from_index else 'scan'}",
        )

    # Looking

    def lookup(self, keys: Sequence[BlockKey], *, again: bool = False) -> PrefixMatch:
        """Which blocks of a chain are there, root first. A hint: `load` checks again.

        again: the same request has asked before (engines that wait poll); it is not counted twice.
        A tier that is out of service counts as empty. Raises StoreClosedError, LayoutMismatchError.
        """
        self._check_open()
        states: list[Lookup] | None = None
        for tier in self._tiers:
            if not tier.readable:
                self._probe_later(tier)
                continue
            if states is None:
                states = tier.table.lookup(keys)
            elif any(state is not Lookup.HIT for state in states):
                below = tier.table.lookup(keys)
                states = [_better(a, b) for a, b in zip(states, below, strict=True)]
        if states is None:
            states = [Lookup.MISS] * len(keys)
        prefix = _prefix(states)
        hits = len(keys) if prefix == len(keys) else states.count(Lookup.HIT)
        if not again:
            self.telemetry.count("lookups_total")
            self.telemetry.count("lookup_blocks_total", "hit", by=hits)
            self.telemetry.count("lookup_blocks_total", "miss", by=len(keys) - hits)
        return PrefixMatch(tuple(keys), prefix, tuple(states))

    # Loading

    def load(self, match: PrefixMatch, targets: Sequence[Buffer]) -> Transfer:
        """Read the first len(targets) blocks of a match into writable buffers of the layout's size.

        Returns at once; the transfer's outcomes are LOADED or the reason for a miss, one per block.
        Do not touch a target before `released`. Blocks that were shorter when saved need targets of
        that length.
        """
        self._check_open()
        keys = match.keys[: len(targets)]
        if len(targets) > len(match.keys):
            raise LayoutMismatchError(f"{len(targets)} targets for {len(match.keys)} keys")
        views = [self._view(target, writable=True) for target in targets]
        full = self._queued()[0] + len(keys) > self.config.store.load_queue_blocks
        placed: dict[int, tuple[int, Placement]] = {}
        unavailable = False
        for number, tier in enumerate(self._tiers if not full else []):
            if not tier.readable:
                unavailable = True
                self._probe_later(tier)
                continue
            missing = [position for position in range(len(keys)) if position not in placed]
            for placement in tier.table.pin([keys[position] for position in missing]):
                placed[missing[placement.position]] = (number, placement)
        absent = Outcome.UNAVAILABLE if unavailable else Outcome.ABSENT
        if full:
            absent = Outcome.REJECTED
        transfer = Transfer(
            Direction.LOAD,
            len(keys),
            self.config.store.io_deadline_seconds,
            on_late=lambda late: self._count_loads(Outcome.LATE, "any", len(late)),
            on_done=lambda seconds: self.telemetry.observe("load_seconds", seconds),
        )
        moves = tuple(
            BlockMove(position, number, placement)
            for position, (number, placement) in sorted(placed.items())
        )
        for position in range(len(keys)):
            if position not in placed:
                self._count_loads(absent, "any", 1)
                transfer.settle(position, absent)
        self._run(
            TransferPlan(Direction.LOAD, moves),
            lambda move: self._load_block(transfer, move, views[move.buffer]),
        )
        return transfer

    def _load_block(self, transfer: Transfer, move: BlockMove, target: memoryview) -> None:
        try:
            if transfer.begin() is Start.CANCELLED:
                return
            tier, outcome = self._tiers[move.tier], Outcome.IO_ERROR  # what a bug of ours would leave
            try:
                tier, outcome = self._fetch(move, target)
            finally:
                if transfer.finish(move.buffer, outcome):
                    self._count_loads(outcome, tier.name, 1)
        finally:
            self._tiers[move.tier].table.unpin([move.placement])

    def _fetch(self, move: BlockMove, target: memoryview) -> tuple[LocalTier, Outcome]:
        """Read one block, from a lower tier if the copy in its own is bad; promote what came from below."""
        tier = self._tiers[move.tier]
        outcome = self._read_one(tier, move.placement, target)
        for lower in self._tiers[move.tier + 1 :]:
            if outcome is not Outcome.LOADED:
                tier, outcome = lower, self._read_lower(lower, move.placement.key, target, outcome)
        if outcome is Outcome.LOADED and self._promote and tier is not self._memory:
            self._promote_block(move.placement.key, target)
        return tier, outcome

    def _read_lower(
        self, tier: LocalTier, key: BlockKey, target: memoryview, otherwise: Outcome
    ) -> Outcome:
        """A faster tier's copy was bad: take this tier's, if it has one."""
        if not tier.readable or not (pinned := tier.table.pin([key])):
            return otherwise
        try:
            return self._read_one(tier, pinned[0], target)
        finally:
            tier.table.unpin(pinned)

    def _read_one(self, tier: LocalTier, placement: Placement, target: memoryview) -> Outcome:
        try:
            tier.read(placement, target)
        except BlockCorruptError as error:
            tier.table.drop(placement)
            self.telemetry.event("corrupt block dropped", str(error))
            self.telemetry.count("misses_total", tier.name, f"corrupt_{error.reason}")
            return Outcome.CORRUPT
        except OSError as error:
            tier.table.drop(placement)
            self.telemetry.event("read failed", f"{error} ({tier.name}, slot {placement.slot})")
            return Outcome.IO_ERROR
        return Outcome.LOADED

    def _promote_block(self, key: BlockKey, source: memoryview) -> None:
        """Put a verified block into memory too, where the next request finds it."""
        assert self._memory is not None
        recorded = self._memory.table.record([key], [True], request=0, ttl_seconds=self._memory.ttl_seconds)
        self.telemetry.count("evictions_total", self._memory.name, by=recorded.evicted)
        for place in recorded.reserved:
            checksum = xxhash.xxh3_64_intdigest(source)
            outcome = self._write_one(self._memory, place, source, checksum)
            self.telemetry.count("blocks_total", "promote", self._memory.name, outcome.value)

    def _count_loads(self, outcome: Outcome, tier: str, by: int) -> None:
        self.telemetry.count("blocks_total", "load", tier, outcome.value, by=by)
        if outcome not in (Outcome.LOADED, Outcome.CORRUPT):
            self.telemetry.count("misses_total", tier, outcome.value, by=by)

    @contextmanager
    def views(self, keys: Sequence[BlockKey]) -> Iterator[list[memoryview | None]]:
        """The blocks' bytes in memory without a copy, pinned for the length of the with-block.

        None for a block that is not in the memory tier. Read-only.
        """
        self._check_open()
        if self._memory is None or not self._memory.readable:
            yield [None] * len(keys)
            return
        memory, table = self._memory, self._memory.table
        placements = table.pin(keys)
        views: list[memoryview | None] = [None] * len(keys)
        try:
            for placement in placements:
                views[placement.position] = memory.view(placement).toreadonly()
            yield views
        finally:
            for view in views:
                if view is not None:
                    view.release()
            table.unpin(placements)

    # Saving

    def new_request(self) -> int:
        """A number for the calls of one request: repeated touches under it count once."""
        return next(self._requests)

    def save(
        self,
        keys: Sequence[BlockKey],
        sources: Sequence[Buffer | None],
        *,
        request: int | None = None,
    ) -> Transfer:
        """Store what is not there of a request's chain, root first, and touch what is.

        sources: one buffer per key, or None where the caller has no bytes (a block that it was served).
        They must stay as they are until the transfer is released. Returns at once; outcomes are SAVED,
        PRESENT, ABSENT for a block without a source that is not there, or the reason why not.
        """
        self._check_open()
        if len(sources) != len(keys):
            raise LayoutMismatchError(f"{len(sources)} sources for {len(keys)} keys")
        if len(keys) > self.config.store.batch_blocks:
            raise LayoutMismatchError(
                f"{len(keys)} blocks in one save; store.batch_blocks allows "
                f"{self.config.store.batch_blocks}"
            )
        alone = request is None
        request = self.new_request() if request is None else request
        views = [None if source is None else self._view(source) for source in sources]
        transfer = Transfer(
            Direction.STORE,
            len(keys),
            self.config.store.io_deadline_seconds,
            on_late=lambda late: self._count_saves(Outcome.LATE, "any", len(late)),
            on_done=lambda seconds: self.telemetry.observe("save_seconds", seconds),
        )
        offered = [position for position, view in enumerate(views) if view is not None]
        verdict, count = self._gate.enter([len(_there(views[position])) for position in offered])
        if verdict is Admission.THROTTLE:
            self.telemetry.count("throttle_waits_total")
        entered, shut_out = set(offered[:count]), set(offered[count:])
        wanted = [position in entered for position in range(len(keys))]
        if self._capture is not None:
            self._capture.record(request, keys, ended=alone)
        moves, present, refused, otherwise = self._place(keys, wanted, request)
        moving = {move.buffer for move in moves}
        idle = entered - moving
        self._gate.leave(len(idle), sum(len(_there(views[position])) for position in idle))
        shut_out -= present
        self._settle_saves(transfer, sorted(present), Outcome.PRESENT)
        self._settle_saves(transfer, sorted(shut_out), Outcome.REJECTED)
        self._settle_saves(transfer, sorted(refused), otherwise)
        settled = moving | present | shut_out | refused
        absent = [position for position in range(len(keys)) if position not in settled]
        self._settle_saves(transfer, absent, Outcome.ABSENT)
        finish = _Countdown(len(moves), lambda: self._after_save(keys, request))
        if not moves:
            self._after_save(keys, request)
        self._run(
            TransferPlan(Direction.STORE, tuple(moves)),
            lambda move: self._save_block(transfer, move, _there(views[move.buffer]), finish),
        )
        return transfer

    def _place(
        self, keys: Sequence[BlockKey], wanted: list[bool], request: int
    ) -> tuple[list[BlockMove], set[int], set[int], Outcome]:
        """Reserve a slot for every wanted block that is not there, in the first tier that has room.

        Returns the moves, the positions that were there already, those that found no room anywhere, and
        the outcome that these get.
        """
        moves: list[BlockMove] = []
        present: set[int] = set()
        refused = {position for position, want in enumerate(wanted) if want}
        otherwise = Outcome.UNAVAILABLE
        for number, tier in enumerate(self._tiers):
            if not tier.writable:
                self._probe_later(tier)
                continue
            tier.refresh()
            recorded = tier.table.record(
                keys,
                [position in refused for position in range(len(keys))],
                request=request,
                ttl_seconds=tier.ttl_seconds,
            )
            self.telemetry.count("evictions_total", tier.name, by=recorded.evicted)
            moves += [BlockMove(place.position, number, place) for place in recorded.reserved]
            present |= set(recorded.hits)
            refused = set(recorded.refused)
            otherwise = Outcome.REJECTED
            if not refused:
                break
        return moves, present - {move.buffer for move in moves}, refused - present, otherwise

    def _save_block(
        self, transfer: Transfer, move: BlockMove, source: memoryview, finish: _Countdown
    ) -> None:
        tier = self._tiers[move.tier]
        try:
            if transfer.begin() is Start.CANCELLED:
                tier.table.abort(move.placement)
                return
            outcome = Outcome.IO_ERROR  # what a bug of ours would leave
            try:
                outcome = self._put(transfer, move, source)
            finally:
                if transfer.finish(move.buffer, outcome):
                    self._count_saves(outcome, tier.name, 1)
        finally:
            self._gate.leave(1, len(source))
            finish.one_done()

    def _put(self, transfer: Transfer, move: BlockMove, source: memoryview) -> Outcome:
        """Checksum, then ask whether the block is late, then write, claim and commit."""
        tier = self._tiers[move.tier]
        checksum = xxhash.xxh3_64_intdigest(source)
        if transfer.late(move.buffer):
            # The caller may have put other bytes there: they must not get a checksum of their own.
            tier.table.abort(move.placement)
            return Outcome.LATE

        def claim() -> bool:
            return transfer.claim(move.buffer)

        outcome = self._write_one(tier, move.placement, source, checksum, claim)
        if outcome is Outcome.SAVED and self._through and tier is self._memory:
            transfer.unclaim(move.buffer)
            outcome = self._write_through(move.placement.key, source, checksum, claim)
        return outcome

    def _write_one(
        self,
        tier: LocalTier,
        placement: Placement,
        source: memoryview,
        checksum: int,
        claim: Callable[[], bool] = lambda: True,
    ) -> Outcome:
        """Write one reserved block and commit it; what fails leaves no trace but a counter.

        claim: asked after the write, False if the source may have changed meanwhile.
        """
        try:
            tier.write(placement, source, checksum)
        except OSError as error:
            tier.table.abort(placement)
            tier.write_failed(placement)
            self.telemetry.event("write failed", f"{error} ({tier.name}, slot {placement.slot})")
            return Outcome.IO_ERROR
        except BaseException:
            tier.table.abort(placement)
            raise
        if not claim():
            tier.table.abort(placement)
            return Outcome.LATE
        tier.table.commit(placement, length=len(source), checksum=checksum)
        return Outcome.SAVED

    def _write_through(
        self, key: BlockKey, source: memoryview, checksum: int, claim: Callable[[], bool]
    ) -> Outcome:
        lower = self._tiers[1]
        if not lower.writable:
            self._probe_later(lower)
            return Outcome.UNAVAILABLE
        recorded = lower.table.record([key], [True], request=0, ttl_seconds=lower.ttl_seconds)
        self.telemetry.count("evictions_total", lower.name, by=recorded.evicted)
        if recorded.refused:
            return Outcome.REJECTED
        outcome = Outcome.PRESENT
        for place in recorded.reserved:
            outcome = self._write_one(lower, place, source, checksum, claim)
            self.telemetry.count("blocks_total", "write_through", lower.name, outcome.value)
        return outcome

    def _after_save(self, keys: Sequence[BlockKey], request: int) -> None:
        """What a save leaves to do when its last block is in its first tier."""
        if self._write_back is not None:
            lower = self._tiers[1]
            if lower.writable:
                lower.refresh()
            else:
                self._probe_later(lower)
            self._write_back.push(keys, request)
        elif self._through and self._tiers[1].opened:
            self._tiers[1].table.record(keys, request=request)

    def _settle_saves(self, transfer: Transfer, positions: Sequence[int], outcome: Outcome) -> None:
        self._count_saves(outcome, "any", len(positions))
        for position in positions:
            transfer.settle(position, outcome)

    def _count_saves(self, outcome: Outcome, tier: str, by: int) -> None:
        self.telemetry.count("blocks_total", "save", tier, outcome.value, by=by)

    def touch(self, keys: Sequence[BlockKey], *, request: int | None = None) -> None:
        """A request used this chain, root first: tell every tier's policy. Moves no bytes."""
        self._check_open()
        alone = request is None
        request = self.new_request() if request is None else request
        if self._capture is not None:
            self._capture.record(request, keys, ended=alone)
        for tier in self._tiers:
            if tier.opened:
                for start in range(0, len(keys), self.config.store.batch_blocks):
                    part = keys[start : start + self.config.store.batch_blocks]
                    tier.table.record(part, request=request)

    def end_request(
        self, request: int, *, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> None:
        """Nothing more comes under this number. Only the capture asks; without it a request ends when it
        has been quiet for ten minutes. The tokens of its prompt and reply where they are known.
        """
        if self._capture is not None:
            self._capture.end(request, input_tokens, output_tokens)

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks on purpose; returns how many places they were in.

        Nothing is erased: after a crash they may be found on the medium again.
        """
        self._check_open()
        return sum(tier.table.discard(keys) for tier in self._tiers if tier.opened)

    # Running

    def _run(self, plan: TransferPlan, run: Callable[[BlockMove], None]) -> None:
        def job(move: BlockMove) -> Callable[[], None]:
            return lambda: run(move)

        through = self._through and plan.direction is Direction.STORE
        jobs: list[list[Callable[[], None]]] = [[] for _ in self._lanes]
        for move in plan.moves:
            # A save through all tiers waits for the slowest, so it waits in that one's lane.
            jobs[-1 if through else move.tier].append(job(move))
        for lane, of_lane in zip(self._lanes, jobs, strict=True):
            if of_lane:
                lane.submit(plan.direction, of_lane)

    def _probe_later(self, tier: LocalTier) -> None:
        """Ask a tier that is out of service whether it is back, at most once per retry time."""
        lane = self._lanes[self._tiers.index(tier)]
        if tier.reads.wants_probe():
            lane.submit(Direction.LOAD, [lambda: self._probe(tier, tier.reads, tier.probe_read)])
        if tier.writes.wants_probe():
            lane.submit(Direction.LOAD, [lambda: self._probe(tier, tier.writes, tier.probe_write)])

    def _probe(self, tier: LocalTier, breaker: Breaker, ask: Callable[[], None]) -> None:
        try:
            self._reopen(tier)
            if not tier.opened:
                breaker.probed(OSError("still cannot be opened"))
                return
            ask()
        except (OSError, KVStrataError) as error:
            breaker.probed(error)
        else:
            breaker.probed(None)

    def _reopen(self, tier: LocalTier) -> None:
        with self._reopen_lock:
            if tier.opened or self._closed:
                return
            self._open_tier(tier)
            if self._closed:
                tier.close(clean=True)  # close() did not wait for this: nobody else would let go of it

    # Looking after it

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything saved so far is written, and make it survive a power loss.

        False if that took longer than `seconds` (default: store.close_seconds) or a tier did not flush.
        """
        self._check_open()
        limit = self.config.store.close_seconds if seconds is None else seconds
        until = time.monotonic() + limit
        # Fastest first: what leaves a lane goes on to a slower one, never back.
        if not all(lane.drain(max(0.0, until - time.monotonic())) for lane in self._lanes):
            return False
        # One thread at a time waits for a medium that does not answer, however often this is called.
        if not self._flush_lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        flushed: list[bool] = []
        done = _within(max(0.0, until - time.monotonic()), lambda: flushed.append(self._flush_tiers()))
        return done and flushed == [True]

    def _flush_tiers(self) -> bool:
        try:
            for tier in self._tiers:
                if tier.opened:
                    tier.flush()
        except OSError as error:
            self.telemetry.event("flush failed", str(error))
            return False
        finally:
            self._flush_lock.release()
        return True

    def status(self) -> list[TierStatus]:
        """Every tier, fastest first."""
        return [
            TierStatus(
                name=tier.name,
                opened=tier.opened,
                readable=tier.readable,
                writable=tier.writable,
                reason=tier.reads.reason or tier.writes.reason,
                blocks=tier.table.resident_blocks if tier.opened else 0,
                used_bytes=tier.table.used_bytes if tier.opened else 0,
                capacity_bytes=tier.table.capacity_bytes if tier.opened else 0,
                pinned_blocks=tier.table.pinned_blocks() if tier.opened else 0,
                open_report=self._reports.get(tier.name),
            )
            for tier in self._tiers
        ]

    def _queued(self) -> tuple[int, int]:
        each = [lane.queued for lane in self._lanes]
        return sum(loads for loads, _ in each), sum(stores for _, stores in each)

    @property
    def queued(self) -> dict[str, int]:
        """What waits and what is held, against the bounds in the configuration."""
        loads, stores = self._queued()
        blocks, size = self._gate.held
        return {
            "queued_loads": loads,
            "queued_stores": stores,
            "held_blocks": blocks,
            "held_bytes": size,
        }

    @property
    def capture_held_bytes(self) -> int:
        """Memory of captured requests that are not written yet, at most store.capture_queue_bytes."""
        return 0 if self._capture is None else self._capture.held_bytes

    @property
    def tiers(self) -> list[LocalTier]:
        """The tiers, fastest first; for inspection and tests."""
        return list(self._tiers)

    def check_integrity(self) -> None:
        """Assert every invariant of every table."""
        for tier in self._tiers:
            if tier.opened:
                tier.table.check_integrity()

    def close(self) -> None:
        """Finish what was saved, keep the indexes, stop the threads. May be called again.

        Waits at most store.close_seconds for a medium that does not answer; its tier is then left as
        after a crash, which the next open repairs.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        until = time.monotonic() + self.config.store.close_seconds
        # Every lane is closed, also behind one that hangs.
        closed = [lane.close(max(0.0, until - time.monotonic())) for lane in self._lanes]
        clean = all(closed)
        for tier in self._tiers:
            if clean:
                left = max(CLOSE_SECONDS_LEAST, until - time.monotonic())
                clean = _within(left, partial(tier.close, clean=True))
            if not clean:
                tier.close(clean=False)
        if self._capture is not None:
            left = max(CLOSE_SECONDS_LEAST, until - time.monotonic())
            if not self._capture.close(left):
                log.warning("kvstrata: closed while the capture was being written; its last part is lost")
        if not clean:
            log.warning("kvstrata: closed while the medium did not answer; the next open will scan")

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("this store was closed; open a new one")

    def _view(self, buffer: Buffer, *, writable: bool = False) -> memoryview:
        view = memoryview(buffer).cast("B")
        if not 0 < len(view) <= self.layout.block_bytes:
            raise LayoutMismatchError(
                f"a buffer of {len(view)} bytes for blocks of {self.layout.block_bytes}"
            )
        if writable and view.readonly:
            raise LayoutMismatchError("a load target must be writable")
        return view


class _Countdown:
    """Calls `then` when `one_done` was called `count` times."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._then = then

    def one_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._then()


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Run work that may hang on a thread of its own. False if it takes longer: it is then left behind."""
    thread = threading.Thread(target=work, name="kvstrata-upkeep", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _better(first: Lookup, second: Lookup) -> Lookup:
    if first is Lookup.HIT or second is Lookup.MISS:
        return first
    return second


def _prefix(states: Sequence[Lookup]) -> int:
    for position, state in enumerate(states):
        if state is not Lookup.HIT:
            return position
    return len(states)


def _there(value: T | None) -> T:
    assert value is not None
    return value
