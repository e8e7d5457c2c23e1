"""Low inter-reference recency set (LIRS), in the unit of sizes.

Jiang and Zhang, "LIRS: an efficient low inter-reference recency set replacement policy to improve buffer
cache performance", SIGMETRICS 2002, section 3. What is seen again while it lies in the stack S, above the
lowest LIR block, has a short reuse distance and becomes LIR itself; the rest, HIR, has a small part of
the capacity and leaves it in the order of the queue Q. An evicted HIR block stays in S as a ghost.

Where the paper leaves a choice: the paper's S has no bound; here the ghosts in S weigh at most one
capacity, and the first to be evicted is the first to be forgotten (the lowest in S, unless pins changed
the order). A newcomer is LIR as long as it comes in without an eviction and the LIR part has room for it.
S ends with a LIR block or is empty; after a removal that is so again from the next call on. Where all of
Q is pinned or Q is empty, the lowest unpinned LIR block leaves, as if it had been moved to Q first:
without a ghost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from kvstrata.jit import inlined, kernel
from kvstrata.policies.base import (
    ADMITTED,
    CAPACITY,
    GONE,
    HIT,
    MISS,
    OUT,
    OWN,
    USED,
    Flags,
    Ints,
    Outcomes,
    Pins,
    Places,
    Policy,
)
from kvstrata.policies.knobs import share
from kvstrata.policies.lists import (
    PREV,
    Ids,
    Links,
    coldest_unpinned,
    make_rings,
    push_recent,
    push_run,
    ring_order,
    unlink,
    unlink_run,
)

LIR, STACKED, QUEUED, GHOST = 1, 2, 3, -1
"""LIR in S; HIR in S and Q; HIR in Q alone; not resident, in S and in the ring of ghosts."""
LIR_CAPACITY, LIR_USED, GHOSTS = range(OWN, OWN + 3)


@kernel
def _prune(stack: Links, queues: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Take what is not LIR off the bottom of the stack."""
    sentinel = len(where)
    bottom = stack[sentinel, PREV]
    while bottom != sentinel and where[bottom] != LIR:
        unlink(stack, bottom)
        if where[bottom] == STACKED:
            where[bottom] = QUEUED
        else:
            unlink(queues, bottom)
            where[bottom] = 0
            state[GHOSTS] -= sizes[bottom]
            forgotten[state[GONE]] = bottom
            state[GONE] += 1
        bottom = stack[sentinel, PREV]


@kernel
def _demote(stack: Links, queues: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Move the lowest LIR blocks to the queue until the others weigh what they may."""
    sentinel = len(where)
    while state[LIR_USED] > state[LIR_CAPACITY]:
        bottom = stack[sentinel, PREV]
        unlink(stack, bottom)
        state[LIR_USED] -= sizes[bottom]
        where[bottom] = QUEUED
        push_recent(queues, sentinel, bottom)
        _prune(stack, queues, where, state, sizes, forgotten)


@inlined
def _make_room(
    needed: int, stack: Links, queues: Links, where: Places, state: Ints, sizes: Ints, pins: Pins,
    evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    sentinel = len(where)
    while state[USED] + needed > state[CAPACITY]:
        victim = coldest_unpinned(queues, pins, sentinel)
        if victim >= 0:
            unlink(queues, victim)
            if where[victim] == STACKED:
                where[victim] = GHOST
                push_recent(queues, sentinel + 1, victim)
                state[GHOSTS] += sizes[victim]
            else:
                where[victim] = 0
        else:
            victim = stack[sentinel, PREV]
            while victim != sentinel and (where[victim] != LIR or pins[victim] > 0):
                victim = stack[victim, PREV]
            if victim == sentinel:
                return
            unlink(stack, victim)
            where[victim] = 0
            state[LIR_USED] -= sizes[victim]
            _prune(stack, queues, where, state, sizes, forgotten)
        state[USED] -= sizes[victim]
        evicted[state[OUT]] = victim
        state[OUT] += 1


@inlined
def _trim(stack: Links, queues: Links, where: Places, state: Ints, sizes: Ints, forgotten: Ids) -> None:
    """Forget the oldest ghosts beyond one capacity."""
    while state[GHOSTS] > state[CAPACITY]:
        oldest = queues[len(where) + 1, PREV]
        unlink(queues, oldest)
        unlink(stack, oldest)
        where[oldest] = 0
        state[GHOSTS] -= sizes[oldest]
        forgotten[state[GONE]] = oldest
        state[GONE] += 1


@inlined
def _enter(
    index: int, stack: Links, queues: Links, where: Places, state: Ints, sizes: Ints, pins: Pins,
    evicted: Ids, forgotten: Ids,
) -> int:  # fmt: skip
    """The paper's access to a block that is not resident; return what became of it."""
    sentinel = len(where)
    size = sizes[index]
    room_was_there = state[USED] + size <= state[CAPACITY]
    if not room_was_there:
        _make_room(size, stack, queues, where, state, sizes, pins, evicted, forgotten)
        if state[USED] + size > state[CAPACITY]:
            _trim(stack, queues, where, state, sizes, forgotten)
            return MISS
    state[USED] += size
    if where[index] == GHOST:
        unlink(queues, index)
        state[GHOSTS] -= size
        unlink(stack, index)
        where[index] = LIR
        state[LIR_USED] += size
    elif room_was_there and state[LIR_USED] + size <= state[LIR_CAPACITY]:
        where[index] = LIR
        state[LIR_USED] += size
    else:
        where[index] = STACKED
        push_recent(queues, sentinel, index)
    push_recent(stack, sentinel, index)
    if state[LIR_USED] > state[LIR_CAPACITY]:
        _demote(stack, queues, where, state, sizes, forgotten)
    _trim(stack, queues, where, state, sizes, forgotten)
    if state[LIR_USED] == 0:
        _prune(stack, queues, where, state, sizes, forgotten)
    return ADMITTED


@kernel
def _access(
    ids: Ids, admit: Flags, sizes: Ints, pins: Pins, stack: Links, queues: Links, where: Places,
    state: Ints, outcome: Outcomes, evicted: Ids, forgotten: Ids,
) -> None:  # fmt: skip
    sentinel = len(where)
    end = len(ids)
    position = 0
    state[OUT] = 0
    state[GONE] = 0
    _prune(stack, queues, where, state, sizes, forgotten)
    while position < end:
        index = ids[position]
        place = where[index]
        if place == LIR:
            # Neighbours that are touched in the order of the stack keep it: they move as one run.
            recent = index
            outcome[position] = HIT
            position += 1
            while position < end and stack[recent, PREV] == ids[position] and where[ids[position]] == LIR:
                recent = ids[position]
                outcome[position] = HIT
                position += 1
            unlink_run(stack, recent, index)
            push_run(stack, sentinel, recent, index)
            if where[stack[sentinel, PREV]] != LIR:
                _prune(stack, queues, where, state, sizes, forgotten)
            continue
        if place > 0:
            unlink(queues, index)
            if place == STACKED:
                unlink(stack, index)
                where[index] = LIR
                state[LIR_USED] += sizes[index]
            else:
                where[index] = STACKED
                push_recent(queues, sentinel, index)
            push_recent(stack, sentinel, index)
            if state[LIR_USED] > state[LIR_CAPACITY]:
                _demote(stack, queues, where, state, sizes, forgotten)
            if state[LIR_USED] == 0:
                _prune(stack, queues, where, state, sizes, forgotten)
            outcome[position] = HIT
        elif admit[position] and sizes[index] <= state[CAPACITY]:
            outcome[position] = _enter(index, stack, queues, where, state, sizes, pins, evicted, forgotten)
        else:
            outcome[position] = MISS
        position += 1


@kernel
def _remove(ids: Ids, sizes: Ints, stack: Links, queues: Links, where: Places, state: Ints) -> None:
    for index in ids:
        place = where[index]
        if place == 0:
            continue
        where[index] = 0
        if place != QUEUED:
            unlink(stack, index)
        if place != LIR:
            unlink(queues, index)
        if place == GHOST:
            state[GHOSTS] -= sizes[index]
            continue
        state[USED] -= sizes[index]
        if place == LIR:
            state[LIR_USED] -= sizes[index]


@kernel
def _shrink(
    sizes: Ints, pins: Pins, stack: Links, queues: Links, where: Places, state: Ints, evicted: Ids,
    forgotten: Ids,
) -> None:  # fmt: skip
    state[OUT] = 0
    state[GONE] = 0
    _prune(stack, queues, where, state, sizes, forgotten)
    _demote(stack, queues, where, state, sizes, forgotten)
    _make_room(0, stack, queues, where, state, sizes, pins, evicted, forgotten)
    _trim(stack, queues, where, state, sizes, forgotten)


@kernel
def _order(stack: Links, queues: Links, where: Places, out: Ids) -> int:
    """The queue, its front first, then the LIR blocks of the stack, lowest first; return how many."""
    sentinel = len(where)
    count = ring_order(queues, sentinel, out)
    node = stack[sentinel, PREV]
    while node != sentinel:
        if where[node] == LIR:
            out[count] = node
            count += 1
        node = stack[node, PREV]
    return count


class Lirs(Policy):
    """LIRS; hir: share of the capacity that HIR blocks have, at least 1 in the unit of sizes."""

    name: ClassVar[str] = "lirs"
    KNOBS: ClassVar[Mapping[str, float]] = {"hir": 0.01}

    def _make(self) -> None:
        self._hir = share(self.name, self.knobs, "hir")
        self._stack = make_rings(self.max_ids, 1)
        self._queues = make_rings(self.max_ids, 2)  # Q, then the ghosts; the recent end is the queue's end

    def _set_capacity(self, capacity: int) -> None:
        super()._set_capacity(capacity)
        self._state[LIR_CAPACITY] = max(0, capacity - max(1, int(self._hir * capacity)))

    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        _access(
            ids, admit, sizes, pins, self._stack, self._queues, self.where, self._state, outcome,
            evicted, forgotten,
        )  # fmt: skip

    def remove(self, ids: Ids, sizes: Ints) -> None:
        _remove(ids, sizes, self._stack, self._queues, self.where, self._state)

    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        _shrink(sizes, pins, self._stack, self._queues, self.where, self._state, evicted, forgotten)

    def order(self) -> Ids:
        out = np.zeros(self.max_ids, dtype=np.int32)
        return out[: _order(self._stack, self._queues, self.where, out)]
