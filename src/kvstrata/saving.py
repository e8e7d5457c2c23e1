"""Saving: the blocks of one save that found room in one tier, on their way there; and through it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kvstrata.admission import AdmissionGate
from kvstrata.table import Placements, joined
from kvstrata.tier_stack import TierStack
from kvstrata.tiers import Tier
from kvstrata.tiers.base import Words
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Positions, Transfer
from kvstrata.types import Outcome

Ended = Callable[[Positions], None]
"""Hears which positions are over, however they ended."""


class SaveEnd:
    """Lets blocks of a save out of the gate as they end, and calls `then` after the last of `blocks`."""

    def __init__(
        self, gate: AdmissionGate, sources: Buffers, blocks: int, then: Callable[[], None]
    ) -> None:
        self._gate = gate
        self._lengths = sources.lengths
        self._left = blocks
        self._lock = threading.Lock()
        self._then = then

    def __call__(self, positions: Positions) -> None:
        self._gate.leave(len(positions), int(self._lengths[positions].sum()))
        with self._lock:
            self._left -= len(positions)
            last = self._left == 0 and len(positions) > 0
        if last:
            self._then()


class Saving:
    """tier: where the placements are reserved, at positions of the transfer, which holds them.

    sources: of all positions of the transfer. through: numbers of the tiers that the blocks go on to before
    the save ends, from top to bottom.
    """

    def __init__(
        self,
        stack: TierStack,
        transfer: Transfer,
        tier: Tier,
        placements: Placements,
        sources: Buffers,
        ended: Ended,
        through: Sequence[int] = (),
    ) -> None:
        self._stack = stack
        self._transfer = transfer
        self._tier = tier
        self._placements = placements
        self._sources = sources
        self._ended = ended
        self._through = through
        self._lock = threading.Lock()
        self._left = len(placements)
        self._going: list[tuple[Placements, Rows]] = []

    def start(self) -> None:
        sources = self._sources.take(self._placements.positions)
        batch = self._tier.start_save(self._placements, sources, self._transfer.deadline_ns, self._done)
        self._transfer.attach(batch, self._cancelled)

    def _done(self, rows: Rows) -> None:
        positions, results = rows[:, k.POSITION], rows[:, k.RESULT]
        mine = self._placements.take(self._placements.at(positions))
        if (results == k.LATE).any():
            self._transfer.poll()
        # What is late when it ends may have been written from a buffer that had changed.
        claimed = self._transfer.claim(positions)
        committed = self._stack.stored(self._tier, mine, rows, claimed)
        outcomes = [_outcome(result) for result in results.tolist()]
        rest = ~committed if self._through else np.ones(len(rows), dtype=np.bool_)
        self._finish(positions[rest], [outcomes[row] for row in np.flatnonzero(rest).tolist()])
        self._goes_on(len(rows), mine.take(np.flatnonzero(~rest)), rows[~rest])

    def _finish(self, positions: Positions, outcomes: list[Outcome]) -> None:
        if not len(positions):
            return
        stands = self._transfer.finish(positions, outcomes).tolist()
        kept = [outcome for outcome, stand in zip(outcomes, stands, strict=True) if stand]
        _count(self._stack, "save", self._tier.name, kept)
        self._ended(positions)

    def _cancelled(self, positions: Positions) -> None:
        """The deadline came before anybody had begun these."""
        self._tier.table.abort_all(self._placements.take(self._placements.at(positions)))
        self._ended(positions)
        self._goes_on(len(positions))

    def _goes_on(self, ended: int, mine: Placements | None = None, rows: Rows | None = None) -> None:
        """So many more are over here; those given go through, all of a save in one policy call a tier."""
        with self._lock:
            self._left -= ended
            if mine is not None and rows is not None and len(mine):
                self._going.append((mine, rows))
            ready = self._going if self._left == 0 else []
        if not ready:
            return
        blocks, words = joined([mine for mine, _ in ready]), np.concatenate([rows for _, rows in ready])
        root_first = np.argsort(words[:, k.POSITION])
        blocks, words = blocks.take(root_first), words[root_first]
        self._transfer.unclaim(words[:, k.POSITION])
        Passing(
            self._stack, self._transfer, replace(blocks, positions=words[:, k.POSITION]),
            words[:, k.CHECKSUM], self._sources, self._finish, self._ended,
        ).go_through(list(self._through))  # fmt: skip


class Passing:
    """Blocks that are in their first tier and go through the tiers below, one tier after the other.

    A tier that does not take a block keeps the next one from nothing; the outcome is the first failure.
    blocks: keys at positions of the transfer, ascending. checksums: signed words, of these blocks.
    """

    def __init__(
        self,
        stack: TierStack,
        transfer: Transfer,
        blocks: Placements,
        checksums: Words,
        sources: Buffers,
        finish: Callable[[Positions, list[Outcome]], None],
        ended: Ended,
    ) -> None:
        self._stack = stack
        self._transfer = transfer
        self._blocks = blocks
        self._checksums = checksums
        self._sources = sources
        self._finish = finish
        self._ended = ended
        self._lock = threading.Lock()
        self._outcomes = [Outcome.SAVED] * len(blocks)
        self._here = np.ones(len(blocks), dtype=np.bool_)
        self._numbers: list[int] = []
        self._tier = stack[0]
        self._placed = blocks.take(np.zeros(0, np.int64))
        self._left = 0

    def go_through(self, numbers: list[int]) -> None:
        """The deadline holds again, for the next tier may hang."""
        self._numbers = numbers
        while self._numbers:
            if not self._here.any() or self._enter(self._numbers.pop(0)):
                break
        else:
            rows = np.flatnonzero(self._here).tolist()
            self._finish(self._blocks.positions[rows], [self._outcomes[row] for row in rows])

    def _enter(self, number: int) -> bool:
        """Is anything on its way to this tier? Then it goes on when that is over."""
        tier = self._tier = self._stack[number]
        rows = np.flatnonzero(self._here)
        if not tier.writable:
            self._stack.probe_later(tier)
            self._note(rows.tolist(), Outcome.UNAVAILABLE)
            return False
        keys = [self._blocks.keys[row] for row in rows.tolist()]
        recorded = self._stack.admit(number, keys, [True] * len(keys))
        self._note(rows[recorded.refused].tolist(), Outcome.REJECTED)
        self._note(rows[recorded.hits].tolist(), Outcome.PRESENT)
        if not len(recorded.placed):
            return False
        going = rows[recorded.placed.positions]
        positions = self._blocks.positions[going]
        self._placed, self._left = replace(recorded.placed, positions=positions), len(going)
        batch = tier.start_save(
            self._placed,
            self._sources.take(positions),
            self._transfer.deadline_ns,
            self._done,
            self._checksums[going],
        )
        self._transfer.attach(batch, self._cancelled)
        return True

    def _note(self, rows: list[int], outcome: Outcome) -> None:
        for row in rows:
            if self._outcomes[row] in (Outcome.SAVED, Outcome.PRESENT):
                self._outcomes[row] = outcome

    def _done(self, ended: Rows) -> None:
        positions, results = ended[:, k.POSITION], ended[:, k.RESULT]
        if (results == k.LATE).any():
            self._transfer.poll()
        claimed = self._transfer.claim(positions)
        places = self._placed.take(self._placed.at(positions))
        self._stack.stored(self._tier, places, ended, claimed)
        outcomes = [_outcome(result) for result in results.tolist()]
        _count(self._stack, "write_through", self._tier.name, outcomes)
        rows = self._blocks.at(positions)
        for row, outcome in zip(rows.tolist(), outcomes, strict=True):
            self._note([row], outcome)
        late = rows[~claimed]
        if len(late):
            self._here[late] = False
            self._finish(self._blocks.positions[late], [Outcome.LATE] * len(late))
        if self._numbers:
            self._transfer.unclaim(positions[claimed])
        self._over(len(rows))

    def _cancelled(self, positions: Positions) -> None:
        """The deadline came before anybody had begun these: they are over, for the transfer too."""
        self._tier.table.abort_all(self._placed.take(self._placed.at(positions)))
        self._here[self._blocks.at(positions)] = False
        self._ended(positions)
        self._over(len(positions))

    def _over(self, count: int) -> None:
        with self._lock:
            self._left -= count
            last = self._left == 0 and count > 0
        if last:
            self.go_through(self._numbers)


def _count(stack: TierStack, op: str, tier: str, outcomes: list[Outcome]) -> None:
    for outcome in set(outcomes):
        stack.telemetry.count("blocks_total", op, tier, outcome.value, by=outcomes.count(outcome))


def _outcome(result: int) -> Outcome:
    if result == 0:
        return Outcome.SAVED
    return Outcome.LATE if result == k.LATE else Outcome.IO_ERROR
