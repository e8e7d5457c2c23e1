"""`BlockTable` once more, on dicts of keys: no ids, no arrays, no batches that share work.

The model is told which slot the table chose, checks that it was free, and predicts everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.policies import POLICIES
from kvstrata.table import ENTRY_DTYPE, Placement, Recorded
from kvstrata.types import BlockKey, Lookup
from reference import REFERENCES
from reference.policy import Item


@dataclass(frozen=True)
class TableEntry:
    """A row of ENTRY_DTYPE, for people."""

    key: BlockKey
    slot: int
    length: int
    checksum: int
    sequence: int
    expires_ms: int


def rows_of(entries: Sequence[TableEntry]) -> NDArray[Any]:
    return np.array([astuple(entry) for entry in entries], ENTRY_DTYPE)


def entries_in(rows: NDArray[Any]) -> list[TableEntry]:
    return [TableEntry(*row) for row in rows.tolist()]


class Phase(Enum):
    RESERVED = "reserved"
    RESIDENT = "resident"
    DOOMED = "doomed"


@dataclass
class Block:
    """A block that has a slot. pins: the writer's and all readers'."""

    key: BlockKey
    slot: int
    sequence: int
    expires_ms: int
    phase: Phase = Phase.RESERVED
    pins: int = 1
    length: int = 0
    checksum: int = 0


class _Always:
    """A mapping with one answer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __getitem__(self, item: Item) -> int:
        return self.value


class _Pins:
    def __init__(self, blocks: dict[BlockKey, Block]) -> None:
        self.blocks = blocks

    def __getitem__(self, item: Item) -> int:
        block = self.blocks.get(item)  # type: ignore[call-overload]
        return block.pins if block else 0


class TableModel:
    def __init__(self, slots: int, slot_bytes: int, policy: str) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.policy = REFERENCES[policy](slots)
        self.blocks: dict[BlockKey, Block] = {}
        """By key: reserved and resident ones."""
        self.doomed: list[Block] = []
        self.free = set(range(slots))
        self.withdrawn: set[int] = set()
        self.now_ms = 1_000
        self.next_sequence = 1
        self.expired = 0
        self.sizes = _Always(1)
        self.counts_repeats = POLICIES[policy].COUNTS_REPEATS
        self.last_request: dict[Item, int] = {}

    # What is there

    def lookup(self, keys: Sequence[BlockKey]) -> list[Lookup]:
        self._expire()
        words = {Phase.RESIDENT: Lookup.HIT, Phase.RESERVED: Lookup.PENDING}
        return [words[self.blocks[key].phase] if key in self.blocks else Lookup.MISS for key in keys]

    def pin(self, keys: Sequence[BlockKey]) -> list[tuple[int, Block]]:
        """Position and block of every key that is resident."""
        self._expire()
        found = []
        for position, key in enumerate(keys):
            block = self.blocks.get(key)
            if block and block.phase is Phase.RESIDENT:
                block.pins += 1
                found.append((position, block))
        return found

    def unpin(self, block: Block) -> None:
        assert block.pins > 0
        block.pins -= 1
        if block.pins == 0 and block.phase is Phase.DOOMED:
            self.doomed.remove(block)
            self.free.add(block.slot)

    # What comes and goes

    def record(
        self,
        keys: Sequence[BlockKey],
        admit: Sequence[bool] | None,
        request: int,
        ttl_seconds: float,
        answer: Recorded,
    ) -> list[Block]:
        """Check the table's answer; returns the reserved blocks in its order."""
        self._expire()
        chain = list(dict.fromkeys(keys))
        first = {key: keys.index(key) for key in chain}
        may = {key: bool(admit and admit[first[key]]) for key in chain}
        hits = [key for key in chain if key in self.blocks]
        fresh = [key for key in chain if key not in self.blocks and may[key]]
        told = [key for key in chain if may[key] or key in self.blocks or self.policy.known(key)]
        if not self.counts_repeats:
            told = [
                key
                for key in told
                if self.last_request.get(key) != request or not self.policy.resident(key)
            ]
        self.last_request |= dict.fromkeys(told, request)
        result = self.policy.access(
            told, [may[key] for key in told], self.sizes, _Pins(self.blocks), request
        )
        # What left and came back within the call keeps its slot and its bytes.
        gone = dict.fromkeys(key for key in result.evicted if not self.policy.resident(key))
        left = [key for key in gone if key in self.blocks]
        for key in left:
            block = self.blocks.pop(key)  # type: ignore[call-overload]
            assert block.phase is Phase.RESIDENT and block.pins == 0
            self.free.add(block.slot)
        expires_ms = self.now_ms + int(ttl_seconds * 1000) if ttl_seconds else 0
        base, self.next_sequence = self.next_sequence, self.next_sequence + len(fresh)
        placements = {placement.key: placement for placement in answer.reserved}
        reserved: list[Block] = []
        refused: list[int] = []
        for rank, key in enumerate(fresh):
            if not self.policy.resident(key) or not self.free:
                refused.append(first[key])
                if self.policy.resident(key):
                    self.policy.remove([key])
                continue
            placement = placements[key]
            assert placement.slot in self.free, "a slot was given away twice"
            self.free.remove(placement.slot)
            sequence = base + len(fresh) - 1 - rank
            block = Block(key, placement.slot, sequence, expires_ms)
            self.blocks[key] = block
            reserved.append(block)
            assert_same(placement, first[key], block)
        assert answer.hits == [first[key] for key in hits]
        assert answer.refused == refused
        assert answer.evicted == len(left)
        assert [placement.key for placement in answer.reserved] == [block.key for block in reserved]
        return reserved

    def commit(self, block: Block, length: int, checksum: int) -> None:
        block.phase, block.length, block.checksum = Phase.RESIDENT, length, checksum
        self.unpin(block)

    def abort(self, block: Block) -> None:
        self._doom(block)
        self.unpin(block)

    def drop(self, block: Block) -> bool:
        if block.phase is not Phase.RESIDENT:
            return False
        self._doom(block)
        return True

    def discard(self, keys: Sequence[BlockKey]) -> int:
        found = {key for key in keys if key in self.blocks and self.blocks[key].phase is Phase.RESIDENT}
        for key in found:
            self._remove(self.blocks[key])
        return len(found)

    def _doom(self, block: Block) -> None:
        del self.blocks[block.key]
        self.policy.remove([block.key])
        block.phase = Phase.DOOMED
        self.doomed.append(block)

    def _remove(self, block: Block) -> None:
        block.pins += 1
        self._doom(block)
        self.unpin(block)

    def _expire(self) -> None:
        for block in list(self.blocks.values()):
            if block.phase is Phase.RESIDENT and 0 < block.expires_ms <= self.now_ms:
                self._remove(block)
                self.expired += 1

    # Capacity

    def withdraw(self, slots: Sequence[int]) -> int:
        self.withdrawn |= self.free & set(slots)
        self.free -= set(slots)
        return self._fit()

    def restore_withdrawn(self) -> int:
        count = len(self.withdrawn)
        self.free |= self.withdrawn
        self.withdrawn = set()
        self._fit()
        return count

    def _fit(self) -> int:
        result = self.policy.resize(self.slots - len(self.withdrawn), self.sizes, _Pins(self.blocks))
        for key in result.evicted:
            block = self.blocks.pop(key)  # type: ignore[call-overload]
            assert block.pins == 0
            self.free.add(block.slot)
        return len(result.evicted)

    # Opening and closing

    def entries(self) -> list[TableEntry]:
        self._expire()
        ordered = [self.blocks[key] for key in self.policy.order()]  # type: ignore[index]
        return [
            TableEntry(b.key, b.slot, b.length, b.checksum, b.sequence, b.expires_ms)
            for b in ordered
            if b.phase is Phase.RESIDENT
        ]

    # Sums

    @property
    def capacity_bytes(self) -> int:
        return (self.slots - len(self.withdrawn)) * self.slot_bytes

    @property
    def resident_blocks(self) -> int:
        return sum(block.phase is Phase.RESIDENT for block in self.blocks.values())

    @property
    def used_bytes(self) -> int:
        return (len(self.blocks) + len(self.doomed)) * self.slot_bytes

    @property
    def pinned_blocks(self) -> int:
        return sum(block.pins > 0 for block in [*self.blocks.values(), *self.doomed])


def assert_same(placement: Placement, position: int, block: Block) -> None:
    assert placement.position == position
    assert (placement.key, placement.slot) == (block.key, block.slot)
    assert (placement.length, placement.checksum) == (block.length, block.checksum)
    assert (placement.sequence, placement.expires_ms) == (block.sequence, block.expires_ms)
