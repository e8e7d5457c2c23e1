"""Saving: the blocks of one save that found room in one tier, on their way there; and through it."""

from __future__ import annotations

import threading
from collections.abc import Callable
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

    sources: of all positions of the transfer. deadline_ns: of time.monotonic_ns. checksums: of these
    blocks, signed words, where they are known. counted_as: the tier whose counters hear of the end.
    """

    def __init__(
        self,
        stack: TierStack,
        transfer: Transfer,
        tier: Tier,
        placements: Placements,
        sources: Buffers,
        ended: Ended,
        *,
        checksums: Words | None = None,
        counted_as: str = "",
    ) -> None:
        self._stack = stack
        self._transfer = transfer
        self._tier = tier
        self._placements = placements
        self._sources = sources
        self._ended = ended
        self._checksums = checksums
        self._counted_as = counted_as or tier.name
        self._first = checksums is None
        self._lock = threading.Lock()
        self._left = len(placements)
        self._in_memory: list[tuple[Placements, Rows]] = []

    def start(self) -> None:
        sources = self._sources.take(self._placements.positions)
        batch = self._tier.start_save(
            self._placements, sources, self._transfer.deadline_ns, self._done, self._checksums
        )
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
        if not self._first:
            self._count("write_through", self._tier.name, outcomes)
        rest = np.ones(len(rows), dtype=np.bool_)
        if self._first and self._stack.through and self._tier is self._stack.memory:
            rest = ~committed
        self._finish(positions[rest], [outcomes[row] for row in np.flatnonzero(rest).tolist()])
        self._goes_on(len(rows), mine.take(np.flatnonzero(~rest)), rows[~rest])

    def _finish(self, positions: Positions, outcomes: list[Outcome]) -> None:
        if not len(positions):
            return
        stands = self._transfer.finish(positions, outcomes).tolist()
        kept = [outcome for outcome, stand in zip(outcomes, stands, strict=True) if stand]
        self._count("save", self._counted_as, kept)
        self._ended(positions)

    def _count(self, op: str, tier: str, outcomes: list[Outcome]) -> None:
        for outcome in set(outcomes):
            by = outcomes.count(outcome)
            self._stack.telemetry.count("blocks_total", op, tier, outcome.value, by=by)

    def _cancelled(self, positions: Positions) -> None:
        """The deadline came before anybody had begun these."""
        self._tier.table.abort_all(self._placements.take(self._placements.at(positions)))
        self._ended(positions)
        self._goes_on(len(positions))

    def _goes_on(self, ended: int, mine: Placements | None = None, rows: Rows | None = None) -> None:
        """So many more are over here; those given go through, all of a save in one policy call."""
        with self._lock:
            self._left -= ended
            if mine is not None and rows is not None and len(mine):
                self._in_memory.append((mine, rows))
            ready = self._in_memory if self._left == 0 else []
        if ready:
            self._go_through(
                joined([mine for mine, _ in ready]), np.concatenate([rows for _, rows in ready])
            )

    def _go_through(self, mine: Placements, rows: Rows) -> None:
        """What is in memory goes on to the next tier; the deadline holds again, for that may hang."""
        root_first = np.argsort(rows[:, k.POSITION])
        mine, rows = mine.take(root_first), rows[root_first]
        positions = rows[:, k.POSITION]
        self._transfer.unclaim(positions)
        lower = self._stack[1]
        if not lower.writable:
            self._stack.probe_later(lower)
            self._finish(positions, [Outcome.UNAVAILABLE] * len(positions))
            return
        admit = [True] * len(mine)
        recorded = lower.table.record(mine.keys, admit, request=0, ttl_seconds=lower.ttl_seconds)
        self._stack.telemetry.count("evictions_total", lower.name, by=recorded.evicted)
        self._finish(positions[recorded.refused], [Outcome.REJECTED] * len(recorded.refused))
        self._finish(positions[recorded.hits], [Outcome.PRESENT] * len(recorded.hits))
        if not len(recorded.placed):
            return
        going = recorded.placed.positions
        Saving(
            self._stack,
            self._transfer,
            lower,
            replace(recorded.placed, positions=positions[going]),
            self._sources,
            self._ended,
            checksums=rows[going, k.CHECKSUM],
            counted_as=self._counted_as,
        ).start()


def _outcome(result: int) -> Outcome:
    if result == 0:
        return Outcome.SAVED
    return Outcome.LATE if result == k.LATE else Outcome.IO_ERROR
