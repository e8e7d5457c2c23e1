"""Hits of LRU at every capacity, in one pass over a trace.

Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 1970:
LRU of any capacity holds the top of one stack, so an access hits exactly where the capacity is at least
its distance, which is its block's place in the stack before the access.

`lru_forward` is that stack, one access after the other. `lru`, leaf first, is one too, a request at a
time: what hits is decided by the stack before the request, and afterwards its chain stands on top, root
first. That holds for requests longer than the capacity as well: then the kernel holds the hits, evicts
deepest first and leaves out what would need a held block's place, which keeps the first blocks of the
chain, as the stack says.

Only for blocks of one size. Nothing here draws or writes files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.jit import inlined, kernel
from kvstrata.policies.base import Ints
from kvstrata.policies.lists import Ids
from kvstrata.sim.replay import BATCH_ACCESSES, Workload

CURVES = ("lru", "lru_forward")
AXIS_PER_BLOCK = 16
"""Length of the time axis per unique block: stamps are renumbered when it is used up."""

Words = NDArray[np.uint64]
Tree = NDArray[np.int64]

NOW, LIVE = 0, 1
BLOCKS, LEADING, WHOLE = 0, 1, 2
BITS = 64
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
NEVER = 0


@dataclass(frozen=True, slots=True)
class LruCurve:
    """Hits at every capacity in blocks: index c of the arrays is a cache of c blocks, the last index one
    of all unique blocks.

    block_hits: accesses that hit. prefix_hits: accesses in the unbroken run of hits from a request's root.
    whole_requests: requests whose every block hit.
    """

    trace: str
    policy: str
    accesses: int
    requests: int
    unique_blocks: int
    block_bytes: int
    block_hits: Ints
    prefix_hits: Ints
    whole_requests: Ints

    def block_hit_ratio(self, blocks: int) -> float:
        return self._at(self.block_hits, blocks, self.accesses)

    def usable_prefix_hit_ratio(self, blocks: int) -> float:
        return self._at(self.prefix_hits, blocks, self.accesses)

    def request_hit_ratio(self, blocks: int) -> float:
        return self._at(self.whole_requests, blocks, self.requests)

    def _at(self, hits: Ints, blocks: int, of: int) -> float:
        return int(hits[min(max(blocks, 0), self.unique_blocks)]) / of if of else 0.0

    def steps(self) -> Ints:
        """The capacities, ascending from 0, at which one of the arrays has another value than before."""
        change = np.zeros(self.unique_blocks + 1, np.bool_)
        change[0] = True
        for hits in (self.block_hits, self.prefix_hits, self.whole_requests):
            change[1:] |= np.diff(hits) > 0
        return np.flatnonzero(change)


def lru_curve(
    workload: Workload, policy: str = "lru", progress: Callable[[int, int], None] | None = None
) -> LruCurve:
    """Replay once and know the hits at every capacity, equal to those of `simulate`.

    progress: called with (accesses done, accesses). Raises ConfigError for another policy than lru and
    lru_forward and for blocks whose sizes differ, TraceFormatError for a chain that has a block twice.
    Memory: about 40 bytes per unique block.
    """
    if policy not in CURVES:
        raise ConfigError(f"no curve of {policy!r}: one pass is enough for {' and '.join(CURVES)} only")
    head = workload.head
    if not head.block_bytes:
        raise ConfigError(
            f"{workload.name}: blocks have different sizes, and the curve is for one size; "
            "give one with --block-bytes, or run `kvstrata sim run --policy lru` at some capacities"
        )
    stack = _Stack(head.unique)
    hits = np.zeros((3, head.unique + 2), np.int64)
    run = _leaf_first if policy == "lru" else _forward
    done = 0
    for batch in workload.source.batches(BATCH_ACCESSES):
        stack.make_room(int(np.diff(batch.starts).max(initial=0)))
        twice = run(batch.ids, batch.starts, stack.stamp, stack.words, stack.tree, stack.state, hits)
        if twice >= 0:
            number = batch.first_request + twice
            raise TraceFormatError(f"{workload.name}: request {number} (from 0) has a block twice")
        done += len(batch.ids)
        if progress is not None:
            progress(done, head.accesses)
    if policy == "lru":
        # Kept as differences: a run of neighbours has ascending distances.
        np.cumsum(hits[:WHOLE], axis=1, out=hits[:WHOLE])
    np.cumsum(hits, axis=1, out=hits)
    blocks, leading, whole = (hits[kind, : head.unique + 1] for kind in (BLOCKS, LEADING, WHOLE))
    return LruCurve(
        workload.name,
        policy,
        head.accesses,
        head.requests,
        head.unique,
        head.block_bytes,
        blocks,
        leading,
        whole,
    )


class _Stack:
    """The stack as stamps on a time axis: stamp[id] is when the id was touched last, from 1, or NEVER.

    Bit s of words is set where s is somebody's stamp; tree counts the bits of words 0..n (Fenwick, "A new
    data structure for cumulative frequency tables", Software: Practice and Experience 1994). state: the
    last stamp given, and how many are live.
    """

    def __init__(self, unique: int) -> None:
        self.stamp = np.zeros(unique, np.int64)
        self.state = np.zeros(2, np.int64)
        self.words = np.zeros(0, np.uint64)
        self.tree = np.zeros(0, np.int64)
        self.make_room(1)

    def make_room(self, longest: int) -> None:
        """An axis that has room for the longest request to come after renumbering."""
        words = AXIS_PER_BLOCK * (len(self.stamp) + longest) // BITS + 2
        if words > len(self.words):
            grown = np.zeros(words, np.uint64)
            grown[: len(self.words)] = self.words
            self.words = grown
            self.tree = np.zeros(words + 1, np.int64)
            _count_words(self.words, self.tree)


@inlined
def _bits(word: np.uint64) -> np.int64:
    """How many bits are set (Warren, "Hacker's Delight", 2nd edition, section 5-1)."""
    x = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def _count_words(words: Words, tree: Tree) -> None:
    """Make the tree of these words."""
    tree[:] = 0
    for place in range(1, len(tree)):
        tree[place] += _bits(words[place - 1])
        above = place + (place & -place)
        if above < len(tree):
            tree[above] += tree[place]


@inlined
def _up_to(stamp: int, words: Words, tree: Tree) -> np.int64:
    """How many live stamps are at most this one."""
    place = stamp >> 6
    count = _bits(words[place] & (ALL >> np.uint64(63 - (stamp & 63))))
    while place > 0:
        count += tree[place]
        place -= place & -place
    return count


@kernel
def _write_run(first: int, last: int, live: bool, words: Words, tree: Tree) -> None:
    """Set, or clear, the bits first..last."""
    for word in range(first >> 6, (last >> 6) + 1):
        mask = ALL
        if word == first >> 6:
            mask &= ALL << np.uint64(first & 63)
        if word == last >> 6:
            mask &= ALL >> np.uint64(63 - (last & 63))
        before = words[word]
        after = before | mask if live else before & ~mask
        words[word] = after
        change = _bits(after) - _bits(before)
        place = word + 1
        while place < len(tree):
            tree[place] += change
            place += place & -place


@kernel
def _renumber(stamp: Ints, words: Words, tree: Tree, state: Ints) -> None:
    """Give the live stamps the numbers 1, 2, ... in their order."""
    tree[0] = 0
    for word in range(len(words)):
        tree[word + 1] = tree[word] + _bits(words[word])
    for index in range(len(stamp)):
        old = stamp[index]
        if old != NEVER:
            stamp[index] = tree[old >> 6] + _bits(words[old >> 6] & (ALL >> np.uint64(63 - (old & 63))))
    words[:] = 0
    for number in range(1, state[LIVE] + 1):
        words[number >> 6] |= np.uint64(1) << np.uint64(number & 63)
    _count_words(words, tree)
    state[NOW] = state[LIVE]


@kernel
def _leaf_first(
    ids: Ids, starts: Ints, stamp: Ints, words: Words, tree: Tree, state: Ints, hits: NDArray[np.int64]
) -> int:
    """hits: per kind, second differences over the capacity; of whole requests first ones.

    Returns the request that has a block twice, or -1.
    """
    for request in range(len(starts) - 1):
        first = starts[request]
        end = starts[request + 1]
        if state[NOW] + (end - first) >= len(words) * BITS:
            _renumber(stamp, words, tree, state)
        # All distances are against the stack as it is now; a run of neighbours is asked for once.
        furthest = 0
        unbroken = True
        position = first
        while position < end:
            head = stamp[ids[position]]
            if head == NEVER:
                unbroken = False
                position += 1
                continue
            run = 1
            while position + run < end and stamp[ids[position + run]] == head - run and head > run:
                run += 1
            position += run
            nearest = state[LIVE] - _up_to(head, words, tree) + 1
            beyond = nearest + run
            hits[BLOCKS, nearest] += 1
            hits[BLOCKS, beyond] -= 1
            if unbroken:
                within = min(run, max(0, furthest - nearest + 1))
                if within:
                    # A miss above them in the chain hides these at smaller capacities.
                    hits[LEADING, furthest] += within
                    hits[LEADING, furthest + 1] -= within
                if within < run:
                    hits[LEADING, nearest + within] += 1
                    hits[LEADING, beyond] -= 1
                furthest = max(furthest, beyond - 1)
        if unbroken:
            hits[WHOLE, furthest] += 1
        # Afterwards the chain stands on top, root first.
        position = first
        while position < end:
            head = stamp[ids[position]]
            run = 1
            if head != NEVER:
                while position + run < end and stamp[ids[position + run]] == head - run and head > run:
                    run += 1
                _write_run(head - run + 1, head, False, words, tree)
                state[LIVE] -= run
                for step in range(run):
                    stamp[ids[position + step]] = NEVER
            position += run
        now = state[NOW]
        for position in range(first, end):
            if stamp[ids[position]] != NEVER:
                return request
            stamp[ids[position]] = now + (end - position)
        if end > first:
            _write_run(now + 1, now + (end - first), True, words, tree)
        state[NOW] = now + (end - first)
        state[LIVE] += end - first
    return -1


@kernel
def _forward(
    ids: Ids, starts: Ints, stamp: Ints, words: Words, tree: Tree, state: Ints, hits: NDArray[np.int64]
) -> int:
    """hits: per kind, differences over the capacity."""
    for request in range(len(starts) - 1):
        first = starts[request]
        end = starts[request + 1]
        if state[NOW] + (end - first) >= len(words) * BITS:
            _renumber(stamp, words, tree, state)
        furthest = 0
        unbroken = True
        position = first
        while position < end:
            old = stamp[ids[position]]
            now = state[NOW]
            run = 1
            if old == NEVER:
                unbroken = False
                stamp[ids[position]] = now + 1
                while position + run < end and stamp[ids[position + run]] == NEVER:
                    run += 1
                    stamp[ids[position + run - 1]] = now + run
            else:
                # Neighbours touched in the order of the stack, oldest first, are all as far away.
                while position + run < end and stamp[ids[position + run]] == old + run:
                    run += 1
                distance = state[LIVE] - _up_to(old, words, tree) + 1
                hits[BLOCKS, distance] += run
                if unbroken:
                    furthest = max(furthest, distance)
                    hits[LEADING, furthest] += run
                _write_run(old, old + run - 1, False, words, tree)
                state[LIVE] -= run
                for step in range(run):
                    stamp[ids[position + step]] = now + 1 + step
            _write_run(now + 1, now + run, True, words, tree)
            state[NOW] = now + run
            state[LIVE] += run
            position += run
        if unbroken:
            hits[WHOLE, furthest] += 1
    return -1
