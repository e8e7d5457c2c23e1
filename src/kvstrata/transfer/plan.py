"""A plan: which blocks go between which buffers and which slots. Pure data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstrata.table import Placement


class Direction(Enum):
    """Loads are waited for by a request; stores are not. The executor runs loads first."""

    LOAD = "load"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class BlockMove:
    """One block between buffer number `buffer` of the caller and a slot of tier number `tier`."""

    buffer: int
    tier: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """Everything that one load() or save() will move."""

    direction: Direction
    moves: tuple[BlockMove, ...]
