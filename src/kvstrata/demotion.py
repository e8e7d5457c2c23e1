"""Demotion: what a tier's policy puts out goes to the tier below, whose write mode is "on_evict".

The block that left has no id in the upper tier any more, but keeps its slot, one of the tier's spare ones,
until its bytes are below; so nobody waits for it. Where there is no spare slot left, or the lower tier does
not take it, the block is lost, and counted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvstrata.relay import Relay
from kvstrata.table import BlockTable, Column, Placements
from kvstrata.tier_stack import TierStack
from kvstrata.transfer.handle import Mask
from kvstrata.types import Outcome


class Demotion:
    """upper: number of the tier whose table says what leaves; it goes to the next one."""

    def __init__(self, stack: TierStack, upper: int, relay: Relay) -> None:
        self._stack = stack
        self._upper = stack[upper]
        self._number = upper + 1
        self._lower = stack[self._number]
        self._relay = relay

    def push(self, left: Placements, lost: int) -> None:
        """left: with their slots. lost: how many more left, whose slots were needed at once."""
        self._count(Outcome.REJECTED, lost)
        if not len(left):
            return
        if not self._lower.writable:
            self._stack.probe_later(self._lower)
            self._count(Outcome.UNAVAILABLE, len(left))
            self._table.let_go(left)
            return
        most = self._lower.table.batch_blocks
        for start in range(0, len(left), most):
            part = left.take(np.arange(start, min(start + most, len(left))))
            self._push(replace(part, positions=np.arange(len(part))))

    def _push(self, left: Placements) -> None:
        recorded = self._stack.admit(self._number, left.keys, [True] * len(left))
        self._count(Outcome.PRESENT, len(recorded.hits))
        self._count(Outcome.REJECTED, len(recorded.refused))
        going = recorded.placed.positions
        idle = np.delete(np.arange(len(left)), going)
        if len(idle):
            self._table.let_go(left.take(idle))
        if len(going):
            sources = left.take(going)
            self._relay.copy(
                self._upper,
                sources,
                self._lower,
                recorded.placed,
                lambda rows, committed: self._done(sources, rows, committed),
                pinned=False,
            )

    @property
    def _table(self) -> BlockTable:
        table = self._upper.table
        assert isinstance(table, BlockTable)
        return table

    def _done(self, sources: Placements, rows: Column, committed: Mask) -> None:
        self._count(Outcome.SAVED, int(committed.sum()))
        self._count(Outcome.IO_ERROR, int((~committed).sum()))
        self._table.let_go(replace(sources.take(rows), positions=np.arange(len(rows))))

    def _count(self, outcome: Outcome, by: int) -> None:
        self._stack.telemetry.count("blocks_total", "demote", self._lower.name, outcome.value, by=by)
