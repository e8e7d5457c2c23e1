"""BlockStore: look up, load, save, touch, close. The only place where tiers are orchestrated.

    lookup   says which leading blocks are there; no side effects, a hint
    load     pins what is still there and reads it into the caller's buffers; verified, or a miss
    save     admits, reserves slots and copies in the background; never blocks prefill
    touch    tells the policies that a request used its chain

A request makes one policy call per tier and save; hits and misses of the live store are those of the
simulator, because the policy kernels are the same. No byte moves on the caller's thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from kvstrata.admission import Admission, AdmissionGate
from kvstrata.attaching import Attaching
from kvstrata.config import Config, MediumFields, format_size, tier_names
from kvstrata.demotion import Demotion
from kvstrata.errors import ConfigError, LayoutMismatchError, StoreClosedError
from kvstrata.loading import Loading, LoadPath
from kvstrata.placing import Placing
from kvstrata.relay import Relay
from kvstrata.saving import SaveEnd, Saving
from kvstrata.table import Placements
from kvstrata.telemetry import Telemetry
from kvstrata.tier_stack import TierStack
from kvstrata.tiers import Tier, make_tier
from kvstrata.tiers.base import OpenReport
from kvstrata.traces.capture import Capture
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.file_io import FileIO
from kvstrata.transfer.handle import Mask, Transfer
from kvstrata.transfer.plan import Direction
from kvstrata.transfer.staging import Staging
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome, PrefixMatch
from kvstrata.write_back import WriteBack

log = logging.getLogger(__name__)

Buffer = memoryview | bytearray | bytes
Blocks = Sequence[Buffer | None] | Buffers
"""Memory of blocks: a buffer each, or many at once by address (see `kvstrata.transfer.buffers.Region`)."""

CLOSE_SECONDS_LEAST = 1.0
"""What a tier gets to keep its index, however long the queue took to empty."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier as an operator sees it."""

    name: str
    shared: bool
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

    namespace: whose blocks these are; keys must have been made with its digest. file_io: the file layer, of
    all tiers or by their names, replaced by tests that make a disk fail. clock: of budgets, in seconds.
    Raises ConfigError, FolderLockedError and FormatVersionError; a medium that answers errors is not one of
    them: its tier starts out of service and is tried again.
    """

    def __init__(
        self,
        config: Config,
        layout: BlockLayout,
        namespace: Namespace,
        *,
        file_io: FileIO | Mapping[str, FileIO] | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
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
        settings = config.store
        self._capture: Capture | None = None
        if settings.capture:
            self._capture = Capture(settings, layout, namespace, self.telemetry)
        plain = FileIO()
        names = tier_names(config.tiers)
        layers = file_io if isinstance(file_io, Mapping) else dict.fromkeys(names, file_io or plain)
        tiers = [
            make_tier(tier, layout, namespace, settings, self.telemetry, layers.get(name, plain), name)
            for tier, name in zip(config.tiers, names, strict=True)
        ]
        self._stack = TierStack(tiers, config.tiers, self.telemetry)
        staging = Staging(layout.block_bytes, settings.staging_bytes)
        relay = Relay(self._stack, staging, settings.io_deadline_seconds)
        self._stack.hear_left = {
            number - 1: Demotion(self._stack, number - 1, relay).push
            for number, mode in enumerate(self._stack.modes)
            if mode == "on_evict"
        }
        self._attaching = self._make_attaching(clock)
        self._path = LoadPath(
            self._stack, self._attaching, Staging(layout.block_bytes, settings.staging_bytes)
        )
        self._stages = [staging, self._path.places]
        with ExitStack() as undo:
            for tier in tiers:
                undo.callback(tier.close, clean=True)
                self._stack.open_tier(tier)
            undo.pop_all()
        self._gate = AdmissionGate(
            settings.queue_blocks,
            settings.queue_bytes,
            settings.full_queue,
            settings.throttle_seconds,
        )
        self._placing = Placing(self._stack, self._make_write_backs(relay))
        if self._capture is not None:
            self._capture.start()

    def _make_write_backs(self, relay: Relay) -> dict[int, WriteBack]:
        """By number of the tier. A shared one may have turned blocks away that it has room for now: what is
        above and not there goes there with the next save of its chain, whatever the write mode.
        """
        stack, settings = self._stack, self.config.store
        blocks, size = settings.queue_blocks, settings.queue_bytes
        return {
            number: WriteBack(stack, number, AdmissionGate(blocks, size, "drop", 0.0), relay)
            for number in stack.direct
            if number > stack.primary and (stack.modes[number] == "back" or stack[number].shared)
        }

    def _make_attaching(self, clock: Callable[[], float]) -> Attaching | None:
        for number, config in enumerate(self.config.tiers):
            if isinstance(config, MediumFields) and config.attach != "no":
                deadline = self.config.store.io_deadline_seconds
                block_bytes = self.layout.block_bytes
                return Attaching(self._stack, number, self.namespace, block_bytes, deadline, clock)
        return None

    # Looking

    def lookup(self, keys: Sequence[BlockKey], *, again: bool = False) -> PrefixMatch:
        """Which blocks of a chain are there, root first. A hint: `load` checks again.

        again: the same request has asked before (engines that wait poll); it is not counted twice.
        A tier that is out of service counts as empty. Raises StoreClosedError, LayoutMismatchError.
        """
        self._check_open()
        states: list[Lookup] | None = None
        for tier in self._stack:
            if not tier.readable:
                self._stack.probe_later(tier)
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

    def load(self, match: PrefixMatch, targets: Sequence[Buffer] | Buffers) -> Transfer:
        """Read the first len(targets) blocks of a match into writable buffers of the layout's size.

        Returns at once; the transfer's outcomes are LOADED or the reason for a miss, one per block.
        Do not touch a target before `released`. Blocks that were shorter when saved need targets of
        that length.
        """
        self._check_open()
        keys = match.keys[: len(targets)]
        if len(targets) > len(match.keys):
            raise LayoutMismatchError(f"{len(targets)} targets for {len(match.keys)} keys")
        buffers = block_buffers(targets, self.layout, writable=True)
        full = self._stack.queued[0] + len(keys) > self.config.store.load_queue_blocks
        missing = np.arange(len(keys))
        groups: list[tuple[int, Placements]] = []
        unavailable = False
        for number, tier in enumerate(self._stack if not full else ()):
            if not len(missing):
                break
            if not tier.readable:
                unavailable = True
                self._stack.probe_later(tier)
                continue
            pinned = tier.table.pin_all([keys[position] for position in missing.tolist()])
            if len(pinned):
                groups.append((number, replace(pinned, positions=missing[pinned.positions])))
                missing = np.delete(missing, pinned.positions)
        absent = Outcome.UNAVAILABLE if unavailable else Outcome.ABSENT
        if full:
            absent = Outcome.REJECTED
        transfer = Transfer(
            Direction.LOAD,
            len(keys),
            self.config.store.io_deadline_seconds,
            on_late=lambda late: self._stack.count_loads(Outcome.LATE, "any", len(late)),
            on_done=lambda seconds: self.telemetry.observe("load_seconds", seconds),
        )
        self._stack.count_loads(absent, "any", len(missing))
        transfer.settle(missing, absent)
        transfer.hold(len(keys) - len(missing))
        for number, placements in groups:
            Loading(self._path, transfer, number, placements, buffers).start()
        if self._attaching is not None:
            self._bring_along(self._attaching, match, groups, len(keys))
        return transfer

    @staticmethod
    def _bring_along(
        attaching: Attaching, match: PrefixMatch, groups: Sequence[tuple[int, Placements]], asked: int
    ) -> None:
        """What the cache fetches beside what was asked for: chunks, and what follows in the chain."""
        for number, placements in groups:
            if number > attaching.number:
                attaching.follow(number, placements.keys)
        attaching.fetch(match.keys[asked : asked + attaching.read_ahead_blocks])

    @contextmanager
    def views(self, keys: Sequence[BlockKey]) -> Iterator[list[memoryview | None]]:
        """The blocks' bytes in memory without a copy, pinned for the length of the with-block.

        None for a block that is not in the memory tier. Read-only.
        """
        self._check_open()
        memory = self._stack.memory
        if memory is None or not memory.readable:
            yield [None] * len(keys)
            return
        table = memory.table
        placements = table.pin_all(keys)
        views: list[memoryview | None] = [None] * len(keys)
        try:
            for position, there in zip(
                placements.positions.tolist(), memory.views(placements), strict=True
            ):
                views[position] = there
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
        sources: Blocks,
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
        buffers = block_buffers(sources, self.layout, writable=False)
        transfer = Transfer(
            Direction.STORE,
            len(keys),
            self.config.store.io_deadline_seconds,
            on_late=lambda late: self._stack.count_saves(Outcome.LATE, "any", len(late)),
            on_done=lambda seconds: self.telemetry.observe("save_seconds", seconds),
        )
        offered = np.flatnonzero(buffers.addresses)
        verdict, count = self._gate.enter(buffers.lengths[offered].tolist())
        if verdict is Admission.THROTTLE:
            self.telemetry.count("throttle_waits_total")
        wanted = np.zeros(len(keys), dtype=np.bool_)
        wanted[offered[:count]] = True
        if self._capture is not None:
            self._capture.record(request, keys, ended=alone)
        groups, present, refused, otherwise = self._placing.place(keys, wanted, request)
        moving = np.zeros(len(keys), dtype=np.bool_)
        for _, placements in groups:
            moving[placements.positions] = True
        idle = wanted & ~moving
        self._gate.leave(int(idle.sum()), int(buffers.lengths[idle].sum()))
        shut_out = np.zeros(len(keys), dtype=np.bool_)
        shut_out[offered[count:]] = True
        shut_out &= ~present
        self._settle_saves(transfer, present & ~moving, Outcome.PRESENT)
        self._settle_saves(transfer, shut_out, Outcome.REJECTED)
        self._settle_saves(transfer, refused, otherwise)
        self._settle_saves(transfer, ~(moving | present | shut_out | refused), Outcome.ABSENT)
        ended = SaveEnd(
            self._gate, buffers, int(moving.sum()), lambda: self._placing.after_save(keys, request)
        )
        transfer.hold(int(moving.sum()))
        for tier, placements in groups:
            through = [number for number in self._stack.through if number > tier]
            Saving(self._stack, transfer, self._stack[tier], placements, buffers, ended, through).start()
        if not groups:
            self._placing.after_save(keys, request)
        return transfer

    def _settle_saves(self, transfer: Transfer, which: Mask, outcome: Outcome) -> None:
        positions = np.flatnonzero(which)
        self._stack.count_saves(outcome, "any", len(positions))
        transfer.settle(positions, outcome)

    def touch(self, keys: Sequence[BlockKey], *, request: int | None = None) -> None:
        """A request used this chain, root first: tell every tier's policy. Moves no bytes."""
        self._check_open()
        alone = request is None
        request = self.new_request() if request is None else request
        if self._capture is not None:
            self._capture.record(request, keys, ended=alone)
        for tier in self._stack:
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
        return sum(tier.table.discard(keys) for tier in self._stack if tier.opened)

    # Looking after it

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything saved so far is written, and make it survive a power loss.

        False if that took longer than `seconds` (default: store.close_seconds) or a tier did not flush.
        """
        self._check_open()
        limit = self.config.store.close_seconds if seconds is None else seconds
        until = time.monotonic() + limit
        if not self._stack.drain(until):
            return False
        try:
            flushed = [tier.flush_by(until) for tier in self._stack if tier.opened]
        except OSError as error:
            self.telemetry.event("flush failed", str(error))
            return False
        return all(flushed)

    def status(self) -> list[TierStatus]:
        """Every tier, fastest first."""
        return [
            TierStatus(
                name=tier.name,
                shared=tier.shared,
                opened=tier.opened,
                readable=tier.readable,
                writable=tier.writable,
                reason=tier.reads.reason or tier.writes.reason,
                blocks=tier.table.resident_blocks if tier.opened else 0,
                used_bytes=tier.table.used_bytes if tier.opened else 0,
                capacity_bytes=tier.table.capacity_bytes if tier.opened else 0,
                pinned_blocks=tier.table.pinned_blocks() if tier.opened else 0,
                open_report=self._stack.reports.get(tier.name),
            )
            for tier in self._stack
        ]

    @property
    def queued(self) -> dict[str, int]:
        """What waits and what is held, against the bounds in the configuration."""
        loads, stores = self._stack.queued
        blocks, size = self._gate.held
        return {
            "queued_loads": loads,
            "queued_stores": stores,
            "held_blocks": blocks,
            "held_bytes": size,
            "moving_blocks": self._stack.moving,
            "staged_bytes": sum(staging.used_bytes for staging in self._stages),
            "attach_staged_bytes": 0 if self._attaching is None else self._attaching.staging.used_bytes,
        }

    @property
    def capture_held_bytes(self) -> int:
        """Memory of captured requests that are not written yet, at most store.capture_queue_bytes."""
        return 0 if self._capture is None else self._capture.held_bytes

    @property
    def tiers(self) -> list[Tier]:
        """The tiers, fastest first; for inspection and tests."""
        return list(self._stack)

    def check_integrity(self) -> None:
        """Assert every invariant of every table."""
        for tier in self._stack:
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
            self._closed = self._stack.closed = True
        until = time.monotonic() + self.config.store.close_seconds
        clean = self._stack.stop(until)
        for tier in self._stack:
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


def block_buffers(given: Blocks, layout: BlockLayout, *, writable: bool) -> Buffers:
    """What a caller gave for blocks. Raises LayoutMismatchError for what no block of this layout can be."""
    try:
        buffers = given if isinstance(given, Buffers) else Buffers.of(given, writable=writable)
    except ValueError as error:
        what = "a load target must be writable" if writable else "a source cannot be read"
        raise LayoutMismatchError(f"{what}: {error}") from None
    there = buffers.addresses != 0
    wrong = there & ((buffers.lengths < 1) | (buffers.lengths > layout.block_bytes))
    if wrong.any():
        size = int(buffers.lengths[wrong][0])
        raise LayoutMismatchError(f"a buffer of {size} bytes for blocks of {layout.block_bytes}")
    return buffers


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Run work that may hang on a thread of its own. False if it takes longer: it is then left behind."""
    thread = threading.Thread(target=work, name="kvstrata-upkeep", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


_BEST_LAST = (Lookup.MISS, Lookup.PENDING, Lookup.ASKING, Lookup.HIT)


def _better(first: Lookup, second: Lookup) -> Lookup:
    return max(first, second, key=_BEST_LAST.index)


def _prefix(states: Sequence[Lookup]) -> int:
    for position, state in enumerate(states):
        if state is not Lookup.HIT:
            return position
    return len(states)
