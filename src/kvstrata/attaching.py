"""Attaching: fills a tier with what is read from the tiers below it, so that the next read is local.

A block that a load reads from below is also put into a place of a bounded arena, by the pass over its bytes
that verifies it, or into memory when it is promoted; from there it is written to the caching tier when the
load is over. What comes along unasked (the rest of the chunk, the blocks that follow in the chain) is read
in the background. No caller waits for any of it: what finds no place is refused and counted. Blocks are
named by what they contain, so a copy is never stale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from kvstrata.attach_rules import AttachRules
from kvstrata.config import MediumFields
from kvstrata.relay import Relay
from kvstrata.table import Column, Placements
from kvstrata.tier_stack import TierStack
from kvstrata.tiers.base import NEVER_NS, Tier
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.engine import Rows
from kvstrata.transfer.handle import Mask
from kvstrata.transfer.staging import Staging
from kvstrata.types import BlockKey, Lookup, Namespace

OFFERED, ATTACHED = "offered", "attached"


class Attaching:
    """number: of the tier that is filled. clock: of the budgets, in seconds."""

    def __init__(
        self,
        stack: TierStack,
        number: int,
        namespace: Namespace,
        block_bytes: int,
        deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = stack.configs[number]
        assert isinstance(config, MediumFields)
        self._stack = stack
        self.number = number
        self._tier = stack[number]
        self._whole_chunk = config.attach_chunk == "whole"
        self.read_ahead_blocks = config.read_ahead_blocks
        self.rules = AttachRules(config, namespace.digest, block_bytes, clock)
        self.staging = Staging(block_bytes, config.attach_staging_bytes)
        self._relay = Relay(stack, self.staging, deadline_seconds)

    # What a load reads

    def offer(self, keys: Sequence[BlockKey], lengths: Column) -> Mask:
        """Blocks that are about to be read from below: which are to be attached, when they were verified?

        Each of those is to be given to `keep`, or to `refuse`.
        """
        self._count(OFFERED, lengths)
        if not self._tier.writable:
            self._stack.probe_later(self._tier)
            self._count("unavailable", lengths)
            return np.zeros(len(keys), np.bool_)
        return self._choose(keys, lengths, read=True)

    def _choose(self, keys: Sequence[BlockKey], lengths: Column, *, read: bool) -> Mask:
        chosen, refused = self.rules.choose(keys, lengths, read=read)
        for reason, which in refused.items():
            self._count(reason, lengths[which])
        return chosen

    def refuse(self, reason: str, lengths: Column) -> None:
        """Chosen blocks do not come after all."""
        if len(lengths):
            self.rules.give_back(lengths)
            self._count(reason, lengths)

    def keep(
        self,
        keys: Sequence[BlockKey],
        buffers: Buffers,
        checksums: Column,
        let_go: Callable[[Column], None],
    ) -> None:
        """Verified bytes of chosen blocks: write them. let_go hears of rows that nobody needs any more."""
        most = self._tier.table.batch_blocks
        for start in range(0, len(keys), most):
            rows = np.arange(start, min(start + most, len(keys)))
            self._keep([keys[row] for row in rows.tolist()], rows, buffers, checksums, let_go)

    def _keep(
        self,
        keys: Sequence[BlockKey],
        rows: Column,
        buffers: Buffers,
        checksums: Column,
        let_go: Callable[[Column], None],
    ) -> None:
        recorded = self._stack.admit(self.number, keys, [True] * len(keys))
        lengths = buffers.lengths[rows]
        placed = recorded.placed
        hits, full = np.array(recorded.hits, np.int64), np.array(recorded.refused, np.int64)
        self.refuse("present", lengths[hits])
        self.refuse("full", lengths[full])
        idle = np.delete(rows, placed.positions)
        if len(idle):
            let_go(idle)
        if not len(placed):
            return
        going = rows[placed.positions]
        self._stack.move(len(going))
        self._tier.start_save(
            replace(placed, positions=np.arange(len(going))),
            buffers.take(going),
            NEVER_NS,
            partial(self._written, placed, buffers.lengths[going], going, let_go),
            checksums[going],
        )

    def _written(
        self,
        placed: Placements,
        lengths: Column,
        going: Column,
        let_go: Callable[[Column], None],
        ended: Rows,
    ) -> None:
        rows = ended[:, k.POSITION]
        try:
            mine, whole = placed.take(rows), np.ones(len(rows), np.bool_)
            committed = self._stack.stored(self._tier, mine, ended, whole)
            self._ended(mine.keys, lengths[rows], committed)
        finally:
            let_go(going[rows])
            self._stack.move(-len(rows))

    # What nobody asked for

    def fetch(self, keys: Sequence[BlockKey]) -> None:
        """Read these into the cache in the background, as far as there is room; they are hits then."""
        if not len(keys) or not self._tier.writable:
            return
        known = self._tier.table.lookup(keys)
        missing = [key for key, state in zip(keys, known, strict=True) if state is Lookup.MISS]
        for tier in self._stack.tiers[self.number + 1 :]:
            if missing and tier.readable:
                pinned = tier.table.pin_all(missing)
                missing = [
                    missing[n] for n in np.delete(np.arange(len(missing)), pinned.positions).tolist()
                ]
                self._fetch_from(tier, pinned)

    def _fetch_from(self, tier: Tier, pinned: Placements) -> None:
        self._count(OFFERED, pinned.lengths)
        room = min(self.staging.free, self._tier.table.batch_blocks)
        fitting = pinned.take(np.arange(min(len(pinned), room)))
        beyond = pinned.take(np.arange(len(fitting), len(pinned)))
        self._count("staging", beyond.lengths)
        chosen = self._choose(fitting.keys, fitting.lengths, read=False)
        tier.table.unpin(beyond)
        tier.table.unpin(fitting.take(np.flatnonzero(~chosen)))
        sources = fitting.take(np.flatnonzero(chosen))
        if not len(sources):
            return
        recorded = self._stack.admit(self.number, sources.keys, [True] * len(sources))
        placed = recorded.placed
        self.refuse("present", sources.lengths[np.array(recorded.hits, np.int64)])
        self.refuse("full", sources.lengths[np.array(recorded.refused, np.int64)])
        tier.table.unpin(sources.take(np.delete(np.arange(len(sources)), placed.positions)))
        going = sources.take(placed.positions)
        if len(going):
            self._relay.copy(tier, going, self._tier, placed, partial(self._fetched, tier, going))

    def _fetched(self, tier: Tier, sources: Placements, rows: Column, committed: Mask) -> None:
        mine = sources.take(rows)
        tier.table.unpin(mine)
        self._ended(mine.keys, mine.lengths, committed)

    def follow(self, number: int, keys: Sequence[BlockKey]) -> None:
        """These were asked for and are being read from that tier: their chunks come along, if so wanted."""
        if self._whole_chunk:
            asked = set(keys)
            self.fetch([key for key in self._stack[number].table.chunk(keys) if key not in asked])

    # What became of them

    def _ended(self, keys: Sequence[BlockKey], lengths: Column, committed: Mask) -> None:
        self._count(ATTACHED, lengths[committed])
        self.rules.attached([keys[row] for row in np.flatnonzero(committed).tolist()])
        self.refuse("io_error", lengths[~committed])

    def _count(self, result: str, lengths: Column) -> None:
        telemetry = self._stack.telemetry
        telemetry.count("attach_blocks_total", self._tier.name, result, by=len(lengths))
        telemetry.count("attach_bytes_total", self._tier.name, result, by=int(lengths.sum()))
