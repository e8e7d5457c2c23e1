"""Loading: the blocks of one load that one tier holds, on their way to the caller's buffers.

A block that turns out bad is asked of the tiers below. What a lower tier serves is put into memory by the
same pass over its bytes that verifies it: the room there is reserved before the read.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from kvstrata.table import Placements
from kvstrata.tier_stack import TierStack
from kvstrata.tiers import Tier
from kvstrata.tiers.base import Words
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Positions, Transfer
from kvstrata.types import Outcome


class Loading:
    """number: of the tier. placements: pinned in it, at positions of the transfer, which holds them.

    targets: of all positions of the transfer.
    """

    def __init__(
        self,
        stack: TierStack,
        transfer: Transfer,
        number: int,
        placements: Placements,
        targets: Buffers,
    ) -> None:
        self._stack = stack
        self._transfer = transfer
        self._number = number
        self._tier: Tier = stack[number]
        self._placements = placements
        self._targets = targets
        self._promoted: Placements | None = None

    def start(self) -> None:
        targets = self._targets.take(self._placements.positions)
        copy_to: Words | None = None
        memory = self._stack.memory
        if self._stack.promote and memory is not None and self._tier is not memory:
            copy_to, targets = self._reserve(targets)
        batch = self._tier.start_load(
            self._placements, targets, self._transfer.deadline_ns, self._done, copy_to=copy_to
        )
        self._transfer.attach(batch, self._cancelled)

    def _reserve(self, targets: Buffers) -> tuple[Words, Buffers]:
        """Where in memory each block is to lie too, and targets that keep that memory alive."""
        memory = self._stack.memory
        assert memory is not None
        placed = self._stack.reserve_promotion(self._placements.keys)
        room = memory.buffers(placed)
        copy_to = np.zeros(len(targets), dtype=np.int64)
        copy_to[placed.positions] = room.addresses
        self._promoted = replace(placed, positions=self._placements.positions[placed.positions])
        return copy_to, Buffers(targets.addresses, targets.lengths, (targets.owner, room.owner))

    def _done(self, rows: Rows) -> None:
        rows = rows[np.argsort(rows[:, k.POSITION])]
        positions, results = rows[:, k.POSITION], rows[:, k.RESULT]
        mine = self._placements.take(self._placements.at(positions))
        self._end_promotion(rows)
        outcomes = [_outcome(result) for result in results.tolist()]
        bad = np.flatnonzero((results != 0) & (results != k.LATE))
        for row in bad.tolist():
            self._drop(mine, row, int(results[row]))
        self._tier.table.unpin(mine)
        if len(bad):
            elsewhere = self._ask_below(mine.take(bad))
            rest = np.flatnonzero(~np.isin(positions, elsewhere))
            positions, outcomes = positions[rest], [outcomes[row] for row in rest.tolist()]
        if (results == k.LATE).any():
            self._transfer.poll()
        self._finish(positions, outcomes)

    def _finish(self, positions: Positions, outcomes: list[Outcome]) -> None:
        stands = self._transfer.finish(positions, outcomes)
        ended = [outcome for outcome, stand in zip(outcomes, stands.tolist(), strict=True) if stand]
        for outcome in set(ended):
            self._stack.count_loads(outcome, self._tier.name, ended.count(outcome))

    def _drop(self, mine: Placements, row: int, result: int) -> None:
        """A block that could not be read, or is not what was saved, is in this tier no more."""
        placement = mine[row]
        self._tier.table.drop(placement)
        telemetry = self._stack.telemetry
        if result == k.GONE:
            telemetry.count("misses_total", self._tier.name, "collected")
        elif result > 0:
            error = self._tier.corrupt(result, placement)
            telemetry.event("corrupt block dropped", str(error))
            telemetry.count("misses_total", self._tier.name, f"corrupt_{error.reason}")
        else:
            where = f"({self._tier.name}, slot {placement.slot})"
            telemetry.event("read failed", f"{os.strerror(-result)} {where}")

    def _ask_below(self, bad: Placements) -> Positions:
        """Start loading them from lower tiers; returns the positions for which that was possible."""
        found: list[Positions] = []
        for number in range(self._number + 1, len(self._stack)):
            tier = self._stack[number]
            if not tier.readable or not len(bad):
                continue
            pinned = tier.table.pin_all(bad.keys)
            if not len(pinned):
                continue
            here = replace(pinned, positions=bad.positions[pinned.positions])
            found.append(here.positions)
            bad = bad.take(np.delete(np.arange(len(bad)), pinned.positions))
            Loading(self._stack, self._transfer, number, here, self._targets).start()
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _end_promotion(self, rows: Rows) -> None:
        if self._promoted is None:
            return
        rows = rows[np.isin(rows[:, k.POSITION], self._promoted.positions)]
        if len(rows):
            places = self._promoted.take(self._promoted.at(rows[:, k.POSITION]))
            self._stack.end_promotion(places, rows)

    def _cancelled(self, positions: Positions) -> None:
        """The deadline came before anybody had begun these."""
        self._tier.table.unpin(self._placements.take(self._placements.at(positions)))
        if self._promoted is not None:
            waiting = positions[np.isin(positions, self._promoted.positions)]
            self._stack.end_promotion(self._promoted.take(self._promoted.at(waiting)))


def _outcome(result: int) -> Outcome:
    if result == 0:
        return Outcome.LOADED
    if result == k.LATE:
        return Outcome.LATE
    if result == k.GONE:
        return Outcome.ABSENT
    return Outcome.CORRUPT if result > 0 else Outcome.IO_ERROR
