"""Placing: which tier each block of a save goes to first, and what the other tiers hear of the save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvstrata.table import Placements
from kvstrata.tier_stack import TierStack
from kvstrata.transfer.handle import Mask
from kvstrata.types import BlockKey, Outcome
from kvstrata.write_back import WriteBack


class Placing:
    """write_backs: by number of the tier that they write to."""

    def __init__(self, stack: TierStack, write_backs: Mapping[int, WriteBack]) -> None:
        self._stack = stack
        self._write_backs = write_backs

    def place(
        self, keys: Sequence[BlockKey], wanted: Mask, request: int
    ) -> tuple[list[tuple[int, Placements]], Mask, Mask, Outcome]:
        """Reserve a slot for every wanted block that is not there, in the first tier that has room.

        Only tiers that saves may write to are asked. Returns placements by number of the tier, the
        positions that were there already, those that found no room anywhere, and the outcome that these
        get.
        """
        groups: list[tuple[int, Placements]] = []
        present = np.zeros(len(keys), dtype=np.bool_)
        refused = wanted.copy()
        otherwise = Outcome.UNAVAILABLE if self._stack.direct else Outcome.REJECTED
        for number in self._stack.direct:
            tier = self._stack[number]
            if not tier.writable:
                self._stack.probe_later(tier)
                continue
            recorded = self._stack.admit(number, keys, refused.tolist(), request=request)
            if len(recorded.placed):
                groups.append((number, recorded.placed))
            present[recorded.hits] = True
            refused[:] = False
            refused[recorded.refused] = True
            otherwise = Outcome.REJECTED
            if not recorded.refused:
                break
        return groups, present, refused & ~present, otherwise

    def after_save(self, keys: Sequence[BlockKey], request: int) -> None:
        """What a save leaves to do when its last block is in its first tier."""
        for number, tier in enumerate(self._stack):
            write_back = self._write_backs.get(number)
            if write_back is not None:
                write_back.push(keys, request)
            elif number != self._stack.primary and tier.opened:
                tier.table.record(keys, request=request)
