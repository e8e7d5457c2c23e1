"""PoolBooks: what one process believes of a pool that others fill and empty. The pool is the truth.

A key is believed there or missing for a bounded time after the pool said so; otherwise it is asked for, by
a thread of the tier, and ASKING meanwhile. No call here waits for anything but the lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvstrata.config import PoolTierConfig
from kvstrata.table import NEVER_MS, Column, Placement, Placements, Recorded, unix_ms
from kvstrata.types import BlockKey, Lookup

REFRESH_SHARE = 0.5
"""A belief that is older than this share of its time is asked for again while it still holds."""


class PoolBooks:
    """block_bytes: of a full block, for people. clock: monotonic seconds, for tests.

    wake: called when there is something to ask; refused: how many keys are too many to be asked for. Both
    without the lock.
    """

    def __init__(
        self,
        config: PoolTierConfig,
        block_bytes: int,
        *,
        batch_blocks: int,
        wake: Callable[[], None] = lambda: None,
        refused: Callable[[int], None] = lambda count: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batch_blocks = batch_blocks
        self._config = config
        self._block_bytes = block_bytes
        self._wake = wake
        self._refused = refused
        self._clock = clock
        self._lock = threading.Lock()
        self._there: dict[BlockKey, tuple[float, int]] = {}
        self._missing: dict[BlockKey, float] = {}
        self._asked: dict[BlockKey, float] = {}
        self._waiting: dict[BlockKey, None] = {}
        self._writing: dict[BlockKey, int] = {}
        self._pins: set[int] = set()
        self._next = 0

    # What is there

    def lookup(self, keys: Sequence[BlockKey]) -> list[Lookup]:
        """State of every key. ASKING for at most `lookup_seconds` after a key was first asked for."""
        states: list[Lookup] = []
        full = 0
        with self._lock:
            now = self._clock()
            before = len(self._waiting)
            for key in keys:
                state = self._state(key, now)
                if state is None:
                    full += 1
                states.append(state or Lookup.MISS)
            asks = len(self._waiting) > before
        if full:
            self._refused(full)
        if asks:
            self._wake()
        return states

    def _state(self, key: BlockKey, now: float) -> Lookup | None:
        """None if it would have to be asked for, but too many are."""
        known = self._there.get(key)
        if known is not None and known[0] > now:
            if known[0] - now < REFRESH_SHARE * self._config.there_seconds:
                self._ask(key, now)
            return Lookup.HIT
        if key in self._writing:
            return Lookup.PENDING
        if self._missing.get(key, now) > now:
            return Lookup.MISS
        if not self._ask(key, now):
            return None
        late = now - self._asked[key] > self._config.lookup_seconds
        return Lookup.MISS if late else Lookup.ASKING

    def _ask(self, key: BlockKey, now: float) -> bool:
        if key not in self._asked:
            if len(self._asked) >= self._config.asking_keys:
                return False
            self._asked[key] = now
            self._waiting[key] = None
        return True

    def questions(self, most: int) -> list[BlockKey]:
        """Keys to ask the pool for now. Each is to be `answered` or `unanswered`."""
        with self._lock:
            keys = [key for key, _ in zip(self._waiting, range(most), strict=False)]
            for key in keys:
                del self._waiting[key]
            return keys

    def answered(self, keys: Sequence[BlockKey], there: Sequence[bool]) -> None:
        """What the pool says of them. A key that was written or found gone meanwhile is known better."""
        with self._lock:
            now = self._clock()
            for key, found in zip(keys, there, strict=True):
                if self._asked.pop(key, None) is None:
                    continue
                if found:
                    _, length = self._there.get(key, (0.0, 0))
                    self._believe(key, length, now)
                else:
                    self._forget(key, now)

    def unanswered(self, keys: Sequence[BlockKey]) -> None:
        """The pool did not say: whoever asks next asks again."""
        with self._lock:
            for key in keys:
                self._asked.pop(key, None)

    def _believe(self, key: BlockKey, length: int, now: float) -> None:
        self._missing.pop(key, None)
        self._there.pop(key, None)  # so that the dictionary stays in the order of time
        self._there[key] = (now + self._config.there_seconds, length)
        while len(self._there) > self._config.remembered_keys:
            del self._there[next(iter(self._there))]

    def _forget(self, key: BlockKey, now: float) -> bool:
        known = self._there.pop(key, None)
        self._missing.pop(key, None)
        self._missing[key] = now + self._config.missing_seconds
        while len(self._missing) > self._config.remembered_keys:
            del self._missing[next(iter(self._missing))]
        return known is not None

    def _unask(self, key: BlockKey) -> None:
        """An answer that is on its way says what was, not what is."""
        self._asked.pop(key, None)
        self._waiting.pop(key, None)

    # Pins: they hold nothing in the pool, which has leases of its own, but are counted like any tier's

    def pin_all(self, keys: Sequence[BlockKey]) -> Placements:
        """Every key that was there when it was last heard of; a load may still find it gone."""
        with self._lock:
            found = [
                (position, known[1])
                for position, key in enumerate(keys)
                if (known := self._there.get(key)) is not None
            ]
            return self._placements([keys[position] for position, _ in found], found, NEVER_MS)

    def _placements(
        self, keys: list[BlockKey], found: Sequence[tuple[int, int]], expires_ms: int
    ) -> Placements:
        """found: position and length of each key."""
        count = len(keys)
        indices = np.arange(self._next, self._next + count, dtype=np.int64)
        self._next += count
        self._pins.update(range(self._next - count, self._next))
        pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
        nothing = np.zeros(count, dtype=np.int64)
        expiry = np.full(count, expires_ms, dtype=np.int64)
        return Placements(
            pairs[:, 0].copy(), indices, nothing, keys, pairs[:, 1].copy(), nothing, nothing, expiry
        )

    def unpin(self, placements: Placements) -> None:
        with self._lock:
            self._let_go(placements)

    def _let_go(self, placements: Placements) -> None:
        indices = placements.indices.tolist()
        assert self._pins.issuperset(indices), "a placement was unpinned twice"
        self._pins.difference_update(indices)

    # What comes and goes

    def record(
        self,
        keys: Sequence[BlockKey],
        admit: Sequence[bool] | None = None,
        *,
        request: int,
        ttl_seconds: float = 0.0,
    ) -> Recorded:
        """A place for every admitted key that is not believed there. A touch is nothing to a pool.

        A key that the pool turns out to have is written for nothing: it answers so before a byte moves.
        """
        assert len(keys) <= self.batch_blocks, "the batch is larger than batch_blocks"
        hits: list[int] = []
        refused: list[int] = []
        fresh: list[tuple[int, int]] = []
        seen: set[BlockKey] = set()
        expires_ms = unix_ms() + int(ttl_seconds * 1000) if ttl_seconds else NEVER_MS
        with self._lock:
            now = self._clock()
            for position, key in enumerate(keys):
                if key in seen:
                    continue
                seen.add(key)
                if key in self._writing or self._there.get(key, (now, 0))[0] > now:
                    hits.append(position)
                elif admit is not None and admit[position]:
                    if len(self._writing) + len(fresh) < self._config.remembered_keys:
                        fresh.append((position, 0))
                    else:
                        refused.append(position)
            placed = self._placements([keys[position] for position, _ in fresh], fresh, expires_ms)
            self._writing.update(zip(placed.keys, placed.indices.tolist(), strict=True))
        return Recorded(hits, placed, refused, 0)

    def commit_all(self, placements: Placements, lengths: Column, checksums: Column) -> None:
        with self._lock:
            now = self._clock()
            self._let_go(placements)
            for key, length in zip(placements.keys, lengths.tolist(), strict=True):
                del self._writing[key]
                self._unask(key)
                self._believe(key, length, now)

    def abort_all(self, placements: Placements) -> None:
        with self._lock:
            self._let_go(placements)
            for key in placements.keys:
                del self._writing[key]

    def drop(self, placement: Placement) -> bool:
        return self.discard([placement.key]) > 0

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """Believe them missing, for `missing_seconds`."""
        with self._lock:
            now = self._clock()
            for key in keys:
                self._unask(key)
            return sum(self._forget(key, now) for key in keys)

    def clear(self) -> None:
        """Believe nothing: the pool may have become another one."""
        with self._lock:
            self._there.clear()
            self._missing.clear()

    def chunk(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Blocks lie alone."""
        return []

    # For people

    @property
    def resident_blocks(self) -> int:
        """Keys that are believed there, in this process."""
        return len(self._there)

    @property
    def used_bytes(self) -> int:
        """Of those, as full blocks."""
        return len(self._there) * self._block_bytes

    @property
    def capacity_bytes(self) -> int:
        """What this process lends to the pool; how large the pool is, only the master knows."""
        return self._config.segment_bytes

    @property
    def asking(self) -> int:
        """Keys that the pool is being asked for."""
        return len(self._asked)

    def pinned_blocks(self) -> int:
        return len(self._pins)

    def check_integrity(self) -> None:
        with self._lock:
            assert set(self._waiting) <= set(self._asked), "a question was lost"
            assert set(self._writing.values()) <= self._pins, "a writer lost its pin"
            assert not self._there.keys() & self._missing.keys(), "a key is there and missing"
            for known in (self._there, self._missing):
                assert len(known) <= self._config.remembered_keys
            assert len(self._asked) <= self._config.asking_keys
