"""The oracle: evict what will be used last of all, deepest first among what is never used again.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966
(MIN). Needs the whole future, so it runs in the simulator only. MIN makes every newcomer enter; here one
that would be used later than everything resident stays out where it could only push out a block of its
own request, else a chain would lose its root to its tail. `forced` = 1 is MIN without that exception.
With sizes that differ it evicts in the same order, which is no longer the optimum.

Every access has a key: the position of the next access of its block. A block that is never used again
has a key beyond all positions, larger for deeper blocks. Keys are unique, a resident block's key is where
it will be used next, and a parent's is below its children's; so no child outlives its parent. Resident
keys are bits of a tree of 64-bit words (van Emde Boas' idea with fan-out 64): a hit at a position is a
bit that is set, the victim is the highest bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.policies.base import ADMITTED, HIT, MISS, Ints, Outcomes
from kvstrata.policies.lists import Ids

USED, CAPACITY, RESIDENT, FORCED = 0, 1, 2, 3
ONE = np.uint64(1)
LOW_SIX = np.uint64(63)
SIX = np.uint64(6)

Words = NDArray[np.uint64]


@kernel
def _link(ids: Ids, latest: Ints, keys: Ints) -> None:
    """keys[p] = position of the next access of ids[p]; latest[id] = position of the last one."""
    for position in range(len(ids)):
        before = latest[ids[position]]
        if before >= 0:
            keys[before] = position
        latest[ids[position]] = position


@kernel
def _highest_bit(word: np.uint64) -> np.uint64:
    bit = np.uint64(0)
    for step in (32, 16, 8, 4, 2, 1):
        shift = np.uint64(step)
        if word >> shift:
            word >>= shift
            bit += shift
    return bit


@kernel
def _set(words: Words, offsets: Ints, key: int) -> None:
    node = np.uint64(key)
    for level in range(len(offsets)):
        place = offsets[level] + np.int64(node >> SIX)
        before = words[place]
        words[place] = before | (ONE << (node & LOW_SIX))
        if before:
            break
        node >>= SIX


@kernel
def _clear(words: Words, offsets: Ints, key: int | np.int64) -> None:
    node = np.uint64(key)
    for level in range(len(offsets)):
        place = offsets[level] + np.int64(node >> SIX)
        after = words[place] & ~(ONE << (node & LOW_SIX))
        words[place] = after
        if after:
            break
        node >>= SIX


@kernel
def _highest(words: Words, offsets: Ints) -> np.int64:
    """The largest key. There must be one."""
    node = np.uint64(0)
    for level in range(len(offsets) - 1, -1, -1):
        word = words[offsets[level] + np.int64(node)]
        node = (node << SIX) | _highest_bit(word)
    return np.int64(node)


@kernel
def _access(
    begin: int, starts: Ints, ids: Ids, depth: Ids, sizes: Ints, keys: Ints, never: Ids, words: Words,
    offsets: Ints, state: Ints, outcome: Outcomes,
) -> None:  # fmt: skip
    accesses = len(ids)
    request = 0
    for position in range(begin, begin + starts[-1]):
        while position - begin >= starts[request + 1]:
            request += 1
        key = keys[position]
        if words[position >> 6] >> np.uint64(position & 63) & ONE:
            _clear(words, offsets, position)
            _set(words, offsets, key)
            outcome[position - begin] = HIT
            continue
        outcome[position - begin] = MISS
        size = sizes[ids[position]]
        if size > state[CAPACITY]:
            continue
        while state[USED] + size > state[CAPACITY]:
            highest = _highest(words, offsets)
            victim = ids[highest] if highest < accesses else never[highest - accesses]
            if highest < key and not state[FORCED]:
                same = begin + starts[request] + depth[victim]
                if same < position and ids[same] == victim:
                    break
            _clear(words, offsets, highest)
            state[USED] -= sizes[victim]
            state[RESIDENT] -= 1
        if state[USED] + size <= state[CAPACITY]:
            state[USED] += size
            state[RESIDENT] += 1
            _set(words, offsets, key)
            outcome[position - begin] = ADMITTED


class Future:
    """When every access' block is used next; made once per trace, used at every capacity.

    ids: all accesses, dense from 0. depth: of every id.
    """

    def __init__(self, ids: Ids, depth: NDArray[np.int32]) -> None:
        accesses, unique = len(ids), len(depth)
        latest = np.full(unique, -1, dtype=np.int64)
        self.ids = ids
        self.depth = depth
        self.keys = np.zeros(accesses, dtype=np.int64)
        _link(ids, latest, self.keys)
        self.never = np.argsort(depth, kind="stable").astype(np.int32)
        touched = latest[self.never] >= 0
        self.keys[latest[self.never[touched]]] = accesses + np.flatnonzero(touched)
        levels = [(accesses + unique + 63) // 64]
        while levels[-1] > 1:
            levels.append((levels[-1] + 63) // 64)
        self.offsets = np.cumsum([0, *levels[:-1]], dtype=np.int64)
        self.words = sum(levels)


class Belady:
    """Replays the requests of a `Future` in order, some at a time. forced: see the head of this file."""

    name: ClassVar[str] = "belady"
    KNOBS: ClassVar[Mapping[str, float]] = {"forced": 0}

    def __init__(self, future: Future, capacity: int, *, forced: float = 0) -> None:
        self._future = future
        self._words = np.zeros(future.words, dtype=np.uint64)
        self._state = np.array([0, capacity, 0, forced != 0], dtype=np.int64)
        self._position = 0
        self.knobs: dict[str, float] = {"forced": float(forced)}

    @property
    def used(self) -> int:
        """Sum of the sizes of all resident ids."""
        return int(self._state[USED])

    @property
    def resident_blocks(self) -> int:
        return int(self._state[RESIDENT])

    def replay(self, ids: Ids, starts: Ints, sizes: Ints) -> Outcomes:
        """As `Policy.replay`; ids must be the next whole requests of the future."""
        outcome = np.zeros(len(ids), dtype=np.int8)
        future = self._future
        _access(
            self._position, starts, future.ids, future.depth, sizes, future.keys, future.never,
            self._words, future.offsets, self._state, outcome,
        )  # fmt: skip
        self._position += len(ids)
        return outcome
