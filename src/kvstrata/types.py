"""The nouns that cross every boundary of kvstrata. Plain values: no I/O, no locks, no imports of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

BlockKey = NewType("BlockKey", bytes)
"""Chained prefix hash of a block, 32 bytes (see `kvstrata.hashing`)."""

KEY_BYTES = 32


class Lookup(Enum):
    """What a store knows of one key."""

    MISS = "miss"
    HIT = "hit"
    PENDING = "pending"
    """Being saved: not loadable yet."""
    ASKING = "asking"
    """A backend that others fill is being asked: look again, it will be known soon."""


class Outcome(Enum):
    """How one block of a transfer ended. Everything but LOADED is a miss to the engine."""

    LOADED = "loaded"
    SAVED = "saved"
    PRESENT = "present"
    """A save that had nothing to do: the block is already there, or is on its way."""
    REJECTED = "rejected"
    """A save that admission, the capacity bound or a full queue turned away."""
    ABSENT = "absent"
    """A load whose block had left between lookup and load."""
    CORRUPT = "corrupt"
    IO_ERROR = "io_error"
    LATE = "late"
    """Not done at the deadline. The target stays untouchable until `Transfer.released`."""
    UNAVAILABLE = "unavailable"
    """The tier is out of service."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shape of one block.

    block_bytes: bytes of KV in one full block, at least 1.
    block_tokens: tokens that one block covers, at least 1.
    """

    block_bytes: int
    block_tokens: int

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or self.block_tokens < 1:
            raise ValueError(f"block_bytes and block_tokens must be at least 1, got {self}")


@dataclass(frozen=True, slots=True)
class Namespace:
    """What makes KV bytes interchangeable: its digest, and the fields it was made from (for people)."""

    digest: bytes
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Answer of `BlockStore.lookup`: a hint, no promise (`load` checks again).

    keys: all keys asked for, root first.
    blocks: how many leading keys are resident in some tier.
    states: one `Lookup` per key, also behind the first miss.
    """

    keys: tuple[BlockKey, ...]
    blocks: int
    states: tuple[Lookup, ...]
