"""TinyLFU admission before a segmented LRU, in the unit of sizes; no window, no doorkeeper.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions on
Storage 2017, section 3. A Count-Min sketch (Cormode and Muthukrishnan, Journal of Algorithms 2005) of four
rows of counters up to 15 estimates how often a block was asked for lately; when as many accesses were
counted as make a sample, this number and all counters are halved. Into a full cache a newcomer comes only
if its estimate is greater than the victim's. The cache is the segmented LRU of Karedla, Love and Wherry,
"Caching strategies to improve disk system performance", Computer 1994: newcomers come into the probation
segment; a hit moves a block into the protected one, whose least recent blocks go back when it is over its
share; the victim is the least recent of probation.

Choices: a block is counted in every row, and before it is compared; while there is room everybody comes
in; where sizes differ, the newcomer must win against all that would have to leave, and nobody leaves if it
does not; where nobody in probation may leave, the least recent protected block is the victim; a sample is
a multiple of the blocks that fit, at the mean size of those that are resident; blocks of a request are
touched root first. Positions in the rows come from the two halves of a block's digest by double hashing
(Kirsch and Mitzenmacher, "Less hashing, same performance", ESA 2006).

In a sketch that is narrow for a sample all counters fill up, estimates tell nothing, and hardly anybody
comes in. With 28,064 blocks that fit, on a multi-tenant stream of agentic conversations in blocks of 256
tokens, cms_width 16,384 gives a block hit ratio of .80, 65,536 gives .92 and 262,144 .95; LRU has .96.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError
from kvstrata.jit import inlined, kernel
from kvstrata.policies.base import (
    ADMITTED,
    CAPACITY,
    HIT,
    MISS,
    OUT,
    OWN,
    USED,
    Digests,
    Flags,
    Ints,
    Outcomes,
    Pins,
    Places,
    Policy,
    mixed,
)
from kvstrata.policies.knobs import share, whole
from kvstrata.policies.lists import (
    PREV,
    Ids,
    Links,
    make_rings,
    push_recent,
    push_run,
    rings_in_order,
    unlink,
    unlink_run,
)

PROBATION, PROTECTED = 1, 2
ROWS = 4
MAX_COUNT = 15
MAX_WIDTH = 2**28
HALF = np.uint64(32)
LOW_HALF = np.uint64(2**32 - 1)
NEVER = 2**62

BOUND, PROTECTED_USED, COUNT, FACTOR, SAMPLE, COUNTED = range(OWN, OWN + 6)
"""BOUND: of the protected segment. COUNT: residents. SAMPLE: of counted accesses, which halves the sketch.
OUT: evicted in this call."""

Sketch = NDArray[np.uint8]


@inlined
def _start(word: np.uint64) -> int:
    return np.int64(word & LOW_HALF)  # type: ignore[return-value]


@inlined
def _stride(word: np.uint64) -> int:
    return np.int64(word >> HALF) | 1  # type: ignore[return-value]


@kernel
def _count(ids: Ids, first: int, end: int, digest: Digests, sketch: Sketch, state: Ints) -> None:
    """Count the accesses ids[first:end] in the sketch."""
    width = len(sketch) // ROWS
    counted = state[COUNTED]
    sample = state[SAMPLE]
    for position in range(first, end):
        word = digest[ids[position]]
        at = _start(word)
        stride = _stride(word)
        for row in range(ROWS):
            cell = row * width + (at & (width - 1))
            # No branch: whether a counter is full cannot be foretold.
            sketch[cell] += sketch[cell] < MAX_COUNT
            at += stride
        counted += 1
        if counted >= sample:
            counted //= 2
            for cell in range(len(sketch)):
                sketch[cell] >>= 1
    state[COUNTED] = counted


@kernel
def _estimate(index: int, digest: Digests, sketch: Sketch) -> int:
    width = len(sketch) // ROWS
    at = _start(digest[index])
    stride = _stride(digest[index])
    least = MAX_COUNT
    for row in range(ROWS):
        least = min(least, sketch[row * width + (at & (width - 1))])
        at += stride
    return least


@kernel
def _set_sample(state: Ints) -> None:
    if state[COUNT] == 0:
        state[SAMPLE] = NEVER
    else:
        mean = max(1, state[USED] // state[COUNT])
        state[SAMPLE] = state[FACTOR] * max(1, state[CAPACITY] // mean)


@kernel
def _demote(links: Links, where: Places, state: Ints, sizes: Ints) -> None:
    """Send the least recent of the protected segment back while it weighs more than its bound."""
    protected = len(where) + 1
    old = links[protected, PREV]
    recent = protected
    while state[PROTECTED_USED] > state[BOUND]:
        recent = old if recent == protected else links[recent, PREV]
        where[recent] = PROBATION
        state[PROTECTED_USED] -= sizes[recent]
    if recent != protected:
        unlink_run(links, recent, old)
        push_run(links, protected - 1, recent, old)


@kernel
def _leave(index: int, links: Links, where: Places, state: Ints, sizes: Ints) -> None:
    unlink(links, index)
    if where[index] == PROTECTED:
        state[PROTECTED_USED] -= sizes[index]
    where[index] = 0
    state[USED] -= sizes[index]
    state[COUNT] -= 1


@kernel
def _make_room(
    needed: int, rank: int, links: Links, where: Places, digest: Digests, sketch: Sketch, state: Ints,
    sizes: Ints, pins: Pins, evicted: Ids,
) -> bool:  # fmt: skip
    """Evict until `needed` more fits, if all who must leave are estimated below the rank; else nobody."""
    protected = len(where) + 1
    out = state[OUT]
    room = state[CAPACITY] - state[USED]
    node = links[protected - 1, PREV]
    while room < needed:
        if node == protected - 1:
            node = links[protected, PREV]
        if node == protected:
            return False
        if pins[node] == 0:
            if _estimate(node, digest, sketch) >= rank:
                return False
            evicted[out] = node
            out += 1
            room += sizes[node]
        node = links[node, PREV]
    for entry in range(state[OUT], out):
        _leave(evicted[entry], links, where, state, sizes)
    state[OUT] = out
    return True


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, links: Links, where: Places, digest: Digests,
    sketch: Sketch, state: Ints, outcome: Outcomes, evicted: Ids,
) -> None:  # fmt: skip
    probation = len(where)
    end = len(ids)
    position = 0
    state[OUT] = 0
    while position < end:
        index = ids[position]
        place = where[index]
        first = position
        if place:
            # Neighbours that are touched in the order of their segment move as one run.
            recent = index
            outcome[position] = HIT
            position += 1
            while position < end and links[recent, PREV] == ids[position]:
                recent = ids[position]
                outcome[position] = HIT
                position += 1
            unlink_run(links, recent, index)
            push_run(links, probation + 1, recent, index)
            if place == PROBATION:
                for moved in range(first, position):
                    where[ids[moved]] = PROTECTED
                    state[PROTECTED_USED] += sizes[ids[moved]]
                _demote(links, where, state, sizes)
            _count(ids, first, position, digest, sketch, state)
            continue
        outcome[position] = MISS
        position += 1
        size = sizes[index]
        if not admit[first] or size > state[CAPACITY]:
            continue
        _count(ids, first, position, digest, sketch, state)
        if state[USED] + size > state[CAPACITY]:
            rank = _estimate(index, digest, sketch)
            if not _make_room(size, rank, links, where, digest, sketch, state, sizes, pins, evicted):
                continue
        push_recent(links, probation, index)
        where[index] = PROBATION
        state[USED] += size
        state[COUNT] += 1
        _set_sample(state)
        outcome[first] = ADMITTED


@kernel
def _shrink(sizes: Ints, pins: Pins, links: Links, where: Places, state: Ints, evicted: Ids) -> None:
    """Whatever their frequency: the least recent of probation, then of the protected segment."""
    state[OUT] = 0
    _demote(links, where, state, sizes)
    for sentinel in range(len(where), len(where) + 2):
        node = links[sentinel, PREV]
        while node != sentinel and state[USED] > state[CAPACITY]:
            newer = links[node, PREV]
            if pins[node] == 0:
                _leave(node, links, where, state, sizes)
                evicted[state[OUT]] = node
                state[OUT] += 1
            node = newer
    _set_sample(state)


@kernel
def _remove(ids: Ids, sizes: Ints, links: Links, where: Places, state: Ints) -> None:
    for index in ids:
        if where[index]:
            _leave(index, links, where, state, sizes)
    _set_sample(state)


class TinyLfuSlru(Policy):
    """TinyLFU with a segmented LRU.

    prob_frac: share of the capacity that is not for the protected segment. cms_width: counters per row of
    the sketch, a power of two. sample: counted accesses that halve the sketch, over the blocks that fit.
    """

    name: ClassVar[str] = "tinylfu_slru"
    KNOBS: ClassVar[Mapping[str, float]] = {"prob_frac": 0.2, "cms_width": 16_384, "sample": 10}

    def _make(self) -> None:
        width = whole(self.name, self.knobs, "cms_width", 1, MAX_WIDTH)
        if width & (width - 1):
            raise ConfigError(f"policy {self.name}: cms_width is {width}; it is a power of two")
        self._sketch = np.zeros(ROWS * width, dtype=np.uint8)
        self._links = make_rings(self.max_ids, 2)  # probation, protected
        self.digest = mixed(np.arange(self.max_ids))
        self._state[FACTOR] = whole(self.name, self.knobs, "sample", 1, 2**20)
        self._state[SAMPLE] = NEVER

    def _set_capacity(self, capacity: int) -> None:
        super()._set_capacity(capacity)
        self._state[BOUND] = capacity - int(share(self.name, self.knobs, "prob_frac") * capacity)

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(
            ids, admit, sizes, pins, self._links, self.where, self.digest, self._sketch, self._state,
            outcome, evicted,
        )  # fmt: skip

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._links, self.where, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(sizes, pins, self._links, self.where, self._state, evicted)

    def order(self) -> Ids:
        """Probation, then the protected segment, least recent first."""
        return rings_in_order(self._links, self.max_ids, 0, 1)
