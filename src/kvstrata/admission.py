"""May a block enter? Decided before any slot is reserved and before any byte moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from enum import Enum
from itertools import accumulate

from kvstrata.config import FullQueue


class Admission(Enum):
    """The verdict on one save."""

    ADMIT = "admit"
    REJECT = "reject"
    THROTTLE = "throttle"
    """Came in after waiting for room."""


class AdmissionGate:
    """Bounds what saves may hold at a time: blocks and bytes between save() and the end of their write.

    When full, what does not fit is rejected at once ("drop"), or waits at most throttle_seconds first
    ("throttle").
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

    def enter(self, sizes: Sequence[int]) -> tuple[Admission, int]:
        """Take room for as many blocks of a batch as fit, from the front: the root is worth most.

        sizes: bytes of each block. Returns the verdict and how many blocks came in, each of which must
        `leave`; REJECT means none did. THROTTLE: it was waited for, whether or not all came in then.
        """
        with self._room:
            verdict = Admission.ADMIT
            if self._fitting(sizes) < len(sizes) and self._throttle_seconds > 0:
                self._wait(sizes)
                verdict = Admission.THROTTLE
            count = self._fitting(sizes)
            if sizes and not count:
                return Admission.REJECT, 0
            self._blocks += count
            self._bytes += sum(sizes[:count])
            return verdict, count

    def _fitting(self, sizes: Sequence[int]) -> int:
        room = self.max_bytes - self._bytes
        within = sum(total <= room for total in accumulate(sizes))
        return min(within, self.max_blocks - self._blocks)

    def _wait(self, sizes: Sequence[int]) -> None:
        """Until the batch fits, or as much of it as ever can, or the time is up."""
        possible = min(sum(total <= self.max_bytes for total in accumulate(sizes)), self.max_blocks)
        deadline = time.monotonic() + self._throttle_seconds
        while possible and self._fitting(sizes) < possible:
            left = deadline - time.monotonic()
            if left <= 0 or not self._room.wait(left):
                return

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
