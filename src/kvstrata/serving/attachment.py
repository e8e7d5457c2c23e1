"""What a client has on one connection: the memory that its server maps, and the arena for all other.

A region is registered in whole pages. Both end with the connection; the next one starts anew.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading

import numpy as np
from numpy.typing import NDArray

from kvstrata.serving.connection import AwayError, Connection
from kvstrata.serving.protocol import FRAME_BLOCKS, NO_REGION, Kind, pack_region, unpack_count
from kvstrata.serving.region import NamedRegion, SharedArena, locate
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.handle import Positions
from kvstrata.transfer.shared_memory import find_backing
from kvstrata.types import Outcome

ARENA_REGION = 0


class Attachment:
    """slot_bytes: of the largest block. arena_bytes: of the arena, made when it is first needed.

    Raises AwayError for a welcome that does not say what it should.
    """

    def __init__(self, connection: Connection, slot_bytes: int, arena_bytes: int) -> None:
        self.connection = connection
        welcome = connection.welcome
        try:
            self.io_deadline_seconds = float(welcome["io_deadline_seconds"])
            self.batch_blocks = min(int(welcome["batch_blocks"]), FRAME_BLOCKS)
        except (KeyError, TypeError, ValueError) as error:
            raise AwayError(f"a welcome of another form: {error!r}") from None
        self._slot_bytes, self._arena_bytes = slot_bytes, arena_bytes
        self._regions: list[NamedRegion] = []
        self._numbers = itertools.count(ARENA_REGION + 1)
        self._arena: SharedArena | None = None
        self._making = threading.Lock()

    def register(self, address: int, size: int) -> bool:
        """Whole pages; False where they are no shared mapping of a file, or the server does not want
        them.
        """
        backing = find_backing(address, size)
        if backing is None:
            return False
        try:
            size = min(size, os.fstat(backing.fd).st_size - backing.offset)
            number = next(self._numbers)
            if not self._announce(number, backing.fd, backing.offset, size):
                return False
        finally:
            os.close(backing.fd)
        self._regions.append(NamedRegion(number, address, size))
        return True

    def _announce(self, number: int, fd: int, offset: int, size: int) -> bool:
        answer = self.connection.call(Kind.REGION, pack_region(number, offset, size), fd=fd)
        return answer is not None and unpack_count(answer) == 1

    def place(self, buffers: Buffers) -> Placing:
        """Where the server finds every buffer; those in no region get a slot of the arena, if there is
        one.
        """
        regions, offsets = locate(self._regions, buffers)
        regions[buffers.addresses == 0] = NO_REGION
        strangers = np.flatnonzero((regions == NO_REGION) & (buffers.addresses != 0))
        arena = self._ready_arena() if len(strangers) else None
        slots = arena.take(len(strangers)) if arena else np.zeros(0, dtype=np.int64)
        staged, refused = strangers[: len(slots)], strangers[len(slots) :]
        regions[staged], offsets[staged] = ARENA_REGION, slots
        return Placing(buffers, regions, offsets, arena, staged, slots, refused)

    def _ready_arena(self) -> SharedArena | None:
        """None if the server does not take it."""
        with self._making:
            if self._arena is None and not self.connection.lost:
                arena = SharedArena(self._slot_bytes, self._arena_bytes)
                if self._announce(ARENA_REGION, arena.fd, 0, arena.size):
                    self._arena = arena
                arena.close()
            return self._arena


class Placing:
    """Buffers of one transfer, and where both sides find them.

    staged: positions that have a slot of the arena. refused: positions for which there was none.
    """

    def __init__(
        self,
        buffers: Buffers,
        regions: NDArray[np.int32],
        offsets: NDArray[np.int64],
        arena: SharedArena | None,
        staged: Positions,
        slots: NDArray[np.int64],
        refused: Positions,
    ) -> None:
        self.buffers = buffers
        self.regions = regions
        self.offsets = offsets
        self.staged = staged
        self.refused = refused
        self._arena = arena
        self._slots = slots

    @property
    def staged_bytes(self) -> int:
        return int(self.buffers.lengths[self.staged].sum())

    def put(self) -> None:
        """Copy what is staged to where the server reads it."""
        if self._arena is not None:
            theirs = self._arena.address + self._slots
            _copy(theirs, self.buffers.addresses[self.staged], self.buffers.lengths[self.staged])

    def fetch(self, positions: Positions, outcomes: list[Outcome]) -> None:
        """Copy what the server loaded to where the caller wants it."""
        if self._arena is not None:
            good = positions[np.array([outcome is Outcome.LOADED for outcome in outcomes], dtype=np.bool_)]
            mine = np.isin(self.staged, good)
            theirs = self._arena.address + self._slots[mine]
            here = self.staged[mine]
            _copy(self.buffers.addresses[here], theirs, self.buffers.lengths[here])

    def give_back(self) -> None:
        """Nobody uses the slots any more."""
        if self._arena is not None:
            self._arena.give_back(self._slots)


def _copy(targets: Positions, sources: Positions, lengths: Positions) -> None:
    for target, source, length in zip(targets.tolist(), sources.tolist(), lengths.tolist(), strict=True):
        ctypes.memmove(target, source, length)
