"""WriteBack: carries saved blocks to a tier below, off the caller's thread, after the save has ended.

Each block is pinned above until its copy is written, so nothing in the queue can vanish: in memory where it
is there, from where it is written as it lies, else in the next tier that has it, from where it is read into
a bounded arena first. The queue is bounded by an `AdmissionGate`, one for each lower tier; when that is
full the block stays above only, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvstrata.admission import AdmissionGate
from kvstrata.relay import Relay
from kvstrata.table import Column, Placements
from kvstrata.tier_stack import TierStack
from kvstrata.tiers.base import Tier
from kvstrata.transfer.handle import Mask
from kvstrata.types import BlockKey, Lookup, Outcome


class WriteBack:
    """number: of the lower tier; what it lacks comes from any of those above it."""

    def __init__(self, stack: TierStack, number: int, gate: AdmissionGate, relay: Relay) -> None:
        self._stack = stack
        self._number = number
        self._lower = stack[number]
        self._gate = gate
        self._relay = relay

    def push(self, keys: Sequence[BlockKey], request: int) -> None:
        """Queue a request's chain, root first: what the lower tier lacks is copied, the rest touched."""
        if not self._lower.writable:
            self._stack.probe_later(self._lower)
            self._count(Outcome.UNAVAILABLE, len(keys))
            return
        known, held = np.zeros((2, len(keys)), dtype=np.bool_)
        groups: list[tuple[Tier, Placements]] = []
        for tier, pinned in self._pin(keys):
            known[pinned.positions] = True
            groups.append((tier, self._let_in(tier, pinned)))
            held[groups[-1][1].positions] = True
        recorded = self._stack.admit(self._number, keys, held.tolist(), request=request)
        known[recorded.hits] = True
        self._count(Outcome.ABSENT, int((~known).sum()))
        self._count(Outcome.PRESENT, len(recorded.hits))
        self._count(Outcome.REJECTED, len(recorded.refused))
        placed = recorded.placed
        for tier, pinned in groups:
            mine = np.isin(pinned.positions, placed.positions)
            self._leave(tier, pinned.take(np.flatnonzero(~mine)))
            sources = pinned.take(np.flatnonzero(mine))
            if len(sources):
                self._copy(tier, sources, placed.take(placed.at(sources.positions)))

    def _pin(self, keys: Sequence[BlockKey]) -> list[tuple[Tier, Placements]]:
        """Who can give each block, memory first; tiers that must read it only for what is lacking below."""
        groups: list[tuple[Tier, Placements]] = []
        missing = np.arange(len(keys))
        asked = False
        for tier in self._stack.tiers[: self._number]:
            if not len(missing) or not tier.readable:
                continue
            if tier is not self._stack.memory and not asked:
                below = self._lower.table.lookup([keys[position] for position in missing.tolist()])
                missing = missing[[state is Lookup.MISS for state in below]]
                asked = True
            pinned = tier.table.pin_all([keys[position] for position in missing.tolist()])
            if len(pinned):
                groups.append((tier, replace(pinned, positions=missing[pinned.positions])))
                missing = np.delete(missing, pinned.positions)
        return groups

    def _let_in(self, tier: Tier, pinned: Placements) -> Placements:
        _, entered = self._gate.enter(pinned.lengths.tolist())
        tier.table.unpin(pinned.take(np.arange(entered, len(pinned))))
        self._count(Outcome.REJECTED, len(pinned) - entered)
        return pinned.take(np.arange(entered))

    def _copy(self, tier: Tier, sources: Placements, places: Placements) -> None:
        def done(rows: Column, committed: Mask) -> None:
            self._count(Outcome.SAVED, int(committed.sum()))
            self._count(Outcome.IO_ERROR, int((~committed).sum()))
            self._leave(tier, sources.take(rows))

        self._relay.copy(tier, sources, self._lower, places, done)

    def _leave(self, tier: Tier, sources: Placements) -> None:
        tier.table.unpin(sources)
        self._gate.leave(len(sources), int(sources.lengths.sum()))

    def _count(self, outcome: Outcome, by: int) -> None:
        self._stack.telemetry.count("blocks_total", "write_back", self._lower.name, outcome.value, by=by)
