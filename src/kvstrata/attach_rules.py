"""Which of the blocks that a lower tier serves are kept in the read cache above it. No bytes move here.

Rules are asked in this order, and each block that one of them turns away is counted for that rule alone:
namespace, size, first_read (not often enough yet), bandwidth and endurance (the budgets).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import MediumFields
from kvstrata.types import BlockKey

Column = NDArray[np.int64]
Mask = NDArray[np.bool_]

DAY_SECONDS = 86_400


class TokenBucket:
    """`rate` tokens a second, `burst` at most; full at the start. rate 0: no bound."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = burst
        self._at = clock()

    def take(self, sizes: Column) -> int:
        """Pay for as many as can be paid for, from the front; returns how many."""
        if not self._rate:
            return len(sizes)
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        totals = np.cumsum(sizes)
        count = int(np.searchsorted(totals, self._tokens, "right"))
        if count:
            self._tokens -= int(totals[count - 1])
        return count

    def give_back(self, size: int) -> None:
        self._tokens = min(self._burst, self._tokens + size)


class ReadGhosts:
    """How often blocks were read that are not in the cache: of the `limit` read most lately."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reads: OrderedDict[BlockKey, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._reads)

    def read(self, key: BlockKey) -> int:
        """Count one more read; returns how many there were."""
        count = self._reads.pop(key, 0) + 1
        self._reads[key] = count
        if len(self._reads) > self._limit:
            self._reads.popitem(last=False)
        return count

    def forget(self, key: BlockKey) -> None:
        self._reads.pop(key, None)


class AttachRules:
    """namespace: digest of all blocks here. clock: of the budgets, in seconds."""

    def __init__(
        self,
        config: MediumFields,
        namespace: bytes,
        block_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        wanted = config.attach_namespaces
        self._ours = not wanted or any(namespace.hex().startswith(prefix) for prefix in wanted)
        self._least = config.attach_min_bytes
        self._most = config.attach_max_bytes or np.iinfo(np.int64).max
        self._reads = config.attach_reads if config.attach == "second" else 1
        self._ghosts = ReadGhosts(config.attach_ghosts)
        second, day = config.attach_bytes_per_second, config.attach_bytes_per_day
        # One block can always be paid for, or a small budget would keep everything out for ever.
        self._bandwidth = TokenBucket(second, max(second, block_bytes), clock)
        self._endurance = TokenBucket(day / DAY_SECONDS, max(day, block_bytes), clock)
        self._lock = threading.Lock()

    def choose(
        self, keys: Sequence[BlockKey], lengths: Column, *, read: bool = True
    ) -> tuple[Mask, dict[str, Mask]]:
        """Which may enter, paid for, and who was turned away by which rule.

        read: somebody reads them now. Otherwise they come in the company of blocks that enter, so that
        the number of their own reads is not asked for.
        """
        left = np.ones(len(keys), np.bool_)
        refused: dict[str, Mask] = {}

        def refuse(reason: str, which: Mask) -> None:
            if which.any():
                refused[reason] = which
                left[which] = False

        with self._lock:
            refuse("namespace", left & (not self._ours))
            refuse("size", left & ((lengths < self._least) | (lengths > self._most)))
            if read and self._reads > 1:
                seldom = np.zeros(len(keys), np.bool_)
                for row in np.flatnonzero(left).tolist():
                    seldom[row] = self._ghosts.read(keys[row]) < self._reads
                refuse("first_read", seldom)
            refuse("bandwidth", self._unpaid(self._bandwidth, left, lengths))
            poor = self._unpaid(self._endurance, left, lengths)
            self._bandwidth.give_back(int(lengths[poor].sum()))
            refuse("endurance", poor)
        return left, refused

    @staticmethod
    def _unpaid(bucket: TokenBucket, left: Mask, lengths: Column) -> Mask:
        rows = np.flatnonzero(left)
        unpaid = np.zeros(len(left), np.bool_)
        unpaid[rows[bucket.take(lengths[rows]) :]] = True
        return unpaid

    def give_back(self, lengths: Column) -> None:
        """These were paid for and not written."""
        with self._lock:
            size = int(lengths.sum())
            self._bandwidth.give_back(size)
            self._endurance.give_back(size)

    def attached(self, keys: Sequence[BlockKey]) -> None:
        """They are in the cache: their reads need not be remembered."""
        with self._lock:
            for key in keys if len(self._ghosts) else ():
                self._ghosts.forget(key)

    @property
    def ghosts(self) -> int:
        """Keys whose reads are remembered."""
        return len(self._ghosts)
