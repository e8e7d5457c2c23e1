"""May a block enter? Decided before any slot is reserved and before any byte moves."""

from __future__ import annotations

import threading
import time
from enum import Enum

from kvstrata.config import FullQueue


class Admission(Enum):
    """The verdict on one save."""

    ADMIT = "admit"
    REJECT = "reject"
    THROTTLE = "throttle"
    """Came in after waiting for room."""


class AdmissionGate:
    """Bounds what saves may hold at a time: blocks and bytes between save() and the end of their write.

    When full, a save is rejected at once ("drop") or waits at most throttle_seconds first ("throttle").
    """

    def __init__(
        self, max_blocks: int, max_bytes: int, full_queue: FullQueue, throttle_seconds: float
    ) -> None:
        self.max_blocks = max_blocks
        self.max_bytes = max_bytes
        self._throttle_seconds = throttle_seconds if full_queue == "throttle" else 0.0
        self._room = threading.Condition()
        self._blocks = 0
        self._bytes = 0

    def enter(self, blocks: int, size: int) -> Admission:
        """Take room for a batch, all or nothing. Every ADMIT or THROTTLE must be followed by `leave`."""
        with self._room:
            if self._fits(blocks, size):
                verdict = Admission.ADMIT
            elif self._wait(blocks, size):
                verdict = Admission.THROTTLE
            else:
                return Admission.REJECT
            self._blocks += blocks
            self._bytes += size
            return verdict

    def _fits(self, blocks: int, size: int) -> bool:
        return self._blocks + blocks <= self.max_blocks and self._bytes + size <= self.max_bytes

    def _wait(self, blocks: int, size: int) -> bool:
        if blocks > self.max_blocks or size > self.max_bytes:
            return False
        deadline = time.monotonic() + self._throttle_seconds
        while not self._fits(blocks, size):
            left = deadline - time.monotonic()
            if left <= 0 or not self._room.wait(left):
                return self._fits(blocks, size)
        return True

    def leave(self, blocks: int, size: int) -> None:
        with self._room:
            self._blocks -= blocks
            self._bytes -= size
            assert self._blocks >= 0 and self._bytes >= 0
            self._room.notify_all()

    @property
    def held(self) -> tuple[int, int]:
        """Blocks and bytes inside now."""
        with self._room:
            return self._blocks, self._bytes
