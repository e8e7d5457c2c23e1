"""Loading: the blocks of one load that one tier holds, on their way to the caller's buffers.

A block that turns out bad is asked of the tiers below, and so is one that a tier with a deadline of its own
has not delivered by then. What a lower tier serves is put into memory, and into a tier that attaches, by
the same pass over its bytes that verifies it: the room for that is taken before the read.

A read that hangs in the medium may write to its buffer whenever it comes back. So blocks of a tier with a
deadline of its own are read into a place that is ours (the room in memory, the place for attaching, or one
kept for this) and copied to the caller when they are verified; when the deadline comes first, the engine
is told never to make that copy, and the caller's buffer is free for the tier below.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import numpy as np

from kvstrata.attaching import Attaching
from kvstrata.table import Column, Placements
from kvstrata.tier_stack import TierStack
from kvstrata.tiers import Tier
from kvstrata.tiers.base import Words
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Abandonable, Cancellable, Mask, Positions, Transfer
from kvstrata.transfer.staging import Staging
from kvstrata.types import Lookup, Outcome

NOWHERE = -1


@dataclass(frozen=True, slots=True)
class LoadPath:
    """What every load goes by. attaching: what fills a cache, if there is one. places: for blocks of tiers
    that have deadlines of their own.
    """

    stack: TierStack
    attaching: Attaching | None
    places: Staging


class Loading:
    """number: of the tier. placements: pinned in it, at positions of the transfer, which holds them.

    targets: of all positions of the transfer.
    """

    def __init__(
        self,
        path: LoadPath,
        transfer: Transfer,
        number: int,
        placements: Placements,
        targets: Buffers,
    ) -> None:
        self._path = path
        self._stack = path.stack
        self._transfer = transfer
        self._number = number
        self._tier: Tier = path.stack[number]
        self._placements = placements
        self._targets = targets
        self._promoted: Placements | None = None
        self._batch: Cancellable | None = None
        self._deadline_ns = transfer.deadline_ns
        self._lock = threading.Lock()
        # Per row; None where no row has one.
        self._attached: Column | None = None
        self._attach_promoted: Mask | None = None
        self._own: Column | None = None
        self._open: Mask | None = None
        self._given_up: Mask | None = None

    def start(self) -> None:
        targets = self._targets.take(self._placements.positions)
        deadline_ns = self._transfer.deadline_ns
        owners = [targets.owner]
        rooms = np.zeros(len(targets), dtype=np.int64)
        self._take_rooms(rooms, owners)
        seconds = self._stack.deadline_seconds(self._number)
        if seconds and self._number + 1 < len(self._stack):
            deadline_ns = self._deadline_ns = min(deadline_ns, int((time.monotonic() + seconds) * 1e9))
            targets, rooms = self._read_apart(targets, rooms, owners)
        copy_to = rooms if rooms.any() else None
        targets = Buffers(targets.addresses, targets.lengths, tuple(owners))
        batch = self._tier.start_load(self._placements, targets, deadline_ns, self._done, copy_to=copy_to)
        with self._lock:
            self._batch = batch
        self._transfer.attach(batch, self._cancelled)
        if self._open is not None:
            self._transfer.after(seconds, self._overdue)

    # Where blocks go beside the caller

    def _take_rooms(self, rooms: Words, owners: list[object]) -> None:
        """Fill in addresses where verified blocks are to lie too."""
        memory, attaching = self._stack.memory, self._path.attaching
        if self._stack.promote and memory is not None and self._tier is not memory:
            placed = self._stack.reserve_promotion(self._placements.keys)
            room = memory.buffers(placed)
            rooms[placed.positions] = room.addresses
            owners.append(room.owner)
            self._promoted = replace(placed, positions=self._placements.positions[placed.positions])
        if attaching is not None and self._number > attaching.number:
            self._offer(attaching, rooms, owners)

    def _offer(self, attaching: Attaching, rooms: Words, owners: list[object]) -> None:
        chosen = attaching.offer(self._placements.keys, self._placements.lengths)
        if not chosen.any():
            return
        promoted = chosen & (rooms != 0)
        if promoted.any():
            self._attach_promoted = promoted
        alone = np.flatnonzero(chosen & ~promoted)
        places = attaching.staging.take(len(alone))
        attaching.refuse("staging", self._placements.lengths[alone[len(places) :]])
        if len(places):
            alone = alone[: len(places)]
            self._attached = np.full(len(rooms), NOWHERE, np.int64)
            self._attached[alone] = places
            room = attaching.staging.buffers(places, self._placements.lengths[alone])
            rooms[alone] = room.addresses
            owners.append(room.owner)

    def _read_apart(self, targets: Buffers, rooms: Words, owners: list[object]) -> tuple[Buffers, Words]:
        """Read into a room that is ours where there is one, and copy to the caller from there."""
        lacking = np.flatnonzero(rooms == 0)
        places = self._path.places.take(len(lacking))
        if len(places):
            lacking = lacking[: len(places)]
            self._own = np.full(len(rooms), NOWHERE, np.int64)
            self._own[lacking] = places
            room = self._path.places.buffers(places, targets.lengths[lacking])
            rooms[lacking] = room.addresses
            owners.append(room.owner)
        self._open = np.ones(len(rooms), np.bool_)
        self._given_up = np.zeros(len(rooms), np.bool_)
        apart = rooms != 0
        addresses = np.where(apart, rooms, targets.addresses)
        return Buffers(addresses, targets.lengths, targets.owner), np.where(apart, targets.addresses, 0)

    # What became of them

    def _done(self, rows: Rows) -> None:
        rows = rows[np.argsort(rows[:, k.POSITION])]
        numbers = self._placements.at(rows[:, k.POSITION])
        if self._open is not None and self._given_up is not None:
            with self._lock:
                self._open[numbers] = False
                served_below = self._given_up[numbers]
            if served_below.any():
                self._end(rows[served_below], numbers[served_below])
                rows, numbers = rows[~served_below], numbers[~served_below]
        if len(rows):
            self._conclude(rows, numbers)

    def _conclude(self, rows: Rows, numbers: Column) -> None:
        positions, results = rows[:, k.POSITION], rows[:, k.RESULT]
        mine = self._placements.take(numbers)
        outcomes = [_outcome(result) for result in results.tolist()]
        self._end(rows, numbers)
        late = results == k.LATE
        elsewhere = np.flatnonzero((results != 0) & ~(late & self._is_late()))
        if len(elsewhere):
            asked = self._ask_below(mine.take(elsewhere))
            rest = np.flatnonzero(~np.isin(positions, asked))
            positions, outcomes = positions[rest], [outcomes[row] for row in rest.tolist()]
        if late.any():
            if not self._is_late():
                self._trip()
            self._transfer.poll()
        self._finish(positions, outcomes)

    def _is_late(self) -> bool:
        """Is it the transfer's deadline that has passed, and not only the tier's?"""
        return self._open is None or time.monotonic_ns() >= self._transfer.deadline_ns

    def _finish(self, positions: Positions, outcomes: list[Outcome]) -> None:
        stands = self._transfer.finish(positions, outcomes)
        ended = [outcome for outcome, stand in zip(outcomes, stands.tolist(), strict=True) if stand]
        for outcome in set(ended):
            self._stack.count_loads(outcome, self._tier.name, ended.count(outcome))
        if Outcome.LOADED in ended:
            good = stands & np.array([outcome is Outcome.LOADED for outcome in outcomes])
            lengths = self._placements.lengths[self._placements.at(positions[good])]
            self._stack.telemetry.count("served_bytes_total", self._tier.name, by=int(lengths.sum()))

    def _ask_below(self, bad: Placements) -> Positions:
        """Start loading them from lower tiers; returns the positions for which that was possible."""
        found: list[Positions] = []
        for number in range(self._number + 1, len(self._stack)):
            tier = self._stack[number]
            if not len(bad):
                break
            if not tier.readable:
                self._stack.probe_later(tier)
                continue
            pinned = tier.table.pin_all(bad.keys)
            if not len(pinned):
                continue
            here = replace(pinned, positions=bad.positions[pinned.positions])
            found.append(here.positions)
            bad = bad.take(np.delete(np.arange(len(bad)), pinned.positions))
            Loading(self._path, self._transfer, number, here, self._targets).start()
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    # What they held

    def _end(self, rows: Rows, numbers: Column) -> None:
        """The engine is through with these: rooms are filled or free, bad blocks leave, pins go."""
        results = rows[:, k.RESULT]
        self._end_promotion(rows, numbers)
        self._end_attaching(rows, numbers)
        self._give_own(numbers)
        mine = self._placements.take(numbers)
        for row in np.flatnonzero((results != 0) & (results != k.LATE)).tolist():
            self._stack.drop_bad(self._tier, mine[row], int(results[row]))
        self._tier.table.unpin(mine)

    def _end_promotion(self, rows: Rows, numbers: Column) -> None:
        if self._promoted is not None:
            mine = np.isin(rows[:, k.POSITION], self._promoted.positions)
            if mine.any():
                places = self._promoted.take(self._promoted.at(rows[mine, k.POSITION]))
                self._stack.end_promotion(places, rows[mine])
        attaching = self._path.attaching
        if self._attach_promoted is not None and attaching is not None:
            wanted = self._attach_promoted[numbers]
            good = wanted & (rows[:, k.RESULT] == 0)
            lengths = self._placements.lengths[numbers]
            attaching.refuse("not_read", lengths[wanted & ~good])
            self._attach_from_memory(attaching, self._placements.take(numbers[good]))

    def _attach_from_memory(self, attaching: Attaching, blocks: Placements) -> None:
        memory = self._stack.memory
        if memory is None or not len(blocks):
            return
        pinned = memory.table.pin_all(blocks.keys)
        gone = np.delete(np.arange(len(blocks)), pinned.positions)
        attaching.refuse("not_read", blocks.lengths[gone])
        if len(pinned):
            attaching.keep(
                pinned.keys,
                memory.buffers(pinned),
                pinned.checksums,
                lambda rows: memory.table.unpin(pinned.take(rows)),
            )

    def _end_attaching(self, rows: Rows, numbers: Column) -> None:
        attaching = self._path.attaching
        if self._attached is None or attaching is None:
            return
        places = self._attached[numbers]
        good = (places != NOWHERE) & (rows[:, k.RESULT] == 0)
        bad = (places != NOWHERE) & ~good
        attaching.staging.give(places[bad])
        attaching.refuse("not_read", self._placements.lengths[numbers[bad]])
        if good.any():
            kept = places[good]
            blocks = self._placements.take(numbers[good])
            staging = attaching.staging
            attaching.keep(
                blocks.keys,
                staging.buffers(kept, blocks.lengths),
                blocks.checksums,
                lambda done: staging.give(kept[done]),
            )

    def _give_own(self, numbers: Column) -> None:
        if self._own is not None:
            places = self._own[numbers]
            self._path.places.give(places[places != NOWHERE])

    def _cancelled(self, positions: Positions) -> None:
        """Nobody had begun these, and nobody will."""
        numbers = self._placements.at(positions)
        if self._open is not None:
            with self._lock:
                self._open[numbers] = False
        rows = np.zeros((len(positions), k.COLUMNS), np.int64)
        rows[:, k.POSITION] = positions
        rows[:, k.RESULT] = k.LATE
        self._end(rows, numbers)

    # The tier's own deadline

    def _overdue(self) -> None:
        """What this tier has not delivered by its deadline comes from below; the tier is out of service."""
        batch = self._batch
        assert batch is not None and self._open is not None
        waiting = np.sort(batch.cancel())
        if not len(waiting) and not self._open.any():
            return
        self._trip()
        if len(waiting):
            mine = self._placements.take(self._placements.at(waiting))
            self._cancelled(waiting)
            asked = self._ask_below(mine)
            rest = waiting[~np.isin(waiting, asked)]
            self._finish(rest, [Outcome.LATE] * len(rest))
        self._give_up(batch)

    def _trip(self) -> None:
        seconds = self._stack.deadline_seconds(self._number)
        if time.monotonic_ns() >= self._deadline_ns:  # a full engine turns blocks away, too
            self._tier.reads.trip(f"a load took longer than {seconds:g} s")

    def _give_up(self, batch: Cancellable) -> None:
        """Of what hangs in the medium, what has a room of its own and is there below too."""
        apart = np.zeros(len(self._placements), np.bool_)
        for rooms in (self._own, self._attached):
            if rooms is not None:
                apart |= rooms != NOWHERE
        if self._promoted is not None:
            apart[self._placements.at(self._promoted.positions)] = True
        if not isinstance(batch, Abandonable):
            return
        with self._lock:
            assert self._open is not None and self._given_up is not None
            hanging = np.flatnonzero(self._open & apart)
            hanging = hanging[self._are_below(self._placements.take(hanging))]
            called_off = np.sort(batch.abandon(self._placements.positions[hanging]))
            self._given_up[self._placements.at(called_off)] = True
        mine = self._placements.take(self._placements.at(called_off))
        asked = self._ask_below(mine)
        rest = called_off[~np.isin(called_off, asked)]
        self._finish(rest, [Outcome.LATE] * len(rest))

    def _are_below(self, blocks: Placements) -> Mask:
        found = np.zeros(len(blocks), np.bool_)
        for tier in self._stack.tiers[self._number + 1 :]:
            if tier.readable:
                states = tier.table.lookup(blocks.keys)
                found |= np.array([state is Lookup.HIT for state in states], np.bool_)
        return found


def _outcome(result: int) -> Outcome:
    if result == 0:
        return Outcome.LOADED
    if result == k.LATE:
        return Outcome.LATE
    if result == k.GONE:
        return Outcome.ABSENT
    return Outcome.CORRUPT if result > 0 else Outcome.IO_ERROR
