"""The I/O engine's worker on io_uring: one thread that keeps many units in flight."""

from __future__ import annotations

from typing import Any

from kvstrata.jit import kernel, part
from kvstrata.transfer.engine_kernels import (
    CLOSING,
    DESK_CLOCK,
    DESK_DIRECTION,
    DESK_DONE,
    DESK_PART,
    DESK_PAUSED,
    FD,
    FLAGS,
    LOAD_HEAD,
    LOAD_TAIL,
    LOADS_RUNNING,
    NO_DIRECTION,
    OFFSET,
    PAUSE_MICROSECONDS,
    PAUSES,
    PRIORITY,
    RING_WAITS,
    STORE_HEAD,
    STORE_TAIL,
    STORING,
    SYNC,
    Shared,
    end_unit,
    lock,
    move_one_by_one,
    next_part,
    part_bytes,
    prepare,
    put_back,
    take,
    take_in,
    tell,
    unlock,
)
from kvstrata.transfer.native import (
    atomic_load,
    atomic_store,
    monotonic_ns,
    read_bytes,
    system_call,
)
from kvstrata.transfer.ring import (
    CQ_HEAD,
    CQ_MASK,
    CQ_TAIL,
    ENTER,
    RING_FD,
    SQ_ARRAY,
    SQ_MASK,
    SQ_TAIL,
    WAKE_FD,
    RingWords,
)

_READV, _WRITEV, _POLL = 1, 2, 6
_POLLIN = 1
_DSYNC = 2
_GETEVENTS = 1
_WAKE = 1 << 32
"""User data of the poll; everything else is a desk's number."""


@part
def _push(r: RingWords, opcode: int, fd: int, offset: int, address: int, size: int, data: int) -> Any:
    """size: of the fourth word, with the flags of the operation in its upper half."""
    at = r.ring[r.where[SQ_TAIL]] & r.where[SQ_MASK]
    entry = r.entries[at]
    entry[0] = opcode | fd << 32
    entry[1] = offset
    entry[2] = address
    entry[3] = size
    entry[4] = data
    for word in range(5, 8):
        entry[word] = 0
    r.ring[r.where[SQ_ARRAY] + at] = at
    atomic_store(r.ring, r.where[SQ_TAIL], r.ring[r.where[SQ_TAIL]] + 1)


@part
def _push_part(s: Shared, r: RingWords, desk_number: int) -> Any:
    """The next part of the unit on a desk."""
    desk = s.desks[desk_number]
    storing = desk[DESK_DIRECTION] == STORING
    count = next_part(s, desk_number, part_bytes(s, storing))
    op = s.operations[s.units[desk_number, 0]]
    flags = _DSYNC << 32 if storing and op[FLAGS] & SYNC else 0
    opcode = _WRITEV if storing else _READV
    _push(r, opcode, op[FD], op[OFFSET] + desk[DESK_DONE], desk[DESK_PART], count | flags, desk_number)


@part
def _must_pause(s: Shared, desk_number: int, now: int) -> Any:
    """Is this a store that should let loads pass before its next part? Not for long: they must not starve
    it.
    """
    desk = s.desks[desk_number]
    if not s.setup[PRIORITY] or desk[DESK_DIRECTION] != STORING:
        return False
    if now - desk[DESK_PAUSED] > PAUSES * PAUSE_MICROSECONDS * 1000:
        return False
    control = s.control
    return control[LOADS_RUNNING] > 0 or control[LOAD_HEAD] != control[LOAD_TAIL]


@kernel
def work_ring(s: Shared, r: RingWords, free: Any, paused: Any) -> Any:
    """The worker's life. free, paused: (desks,) int32, room for desks without work and with a pause."""
    clock = s.desks[0, DESK_CLOCK]
    desks = len(s.desks)
    for number in range(desks):
        free[number] = number
    free_count, paused_count, flying, pushed = desks, 0, 0, 0
    polling = False
    lock(s)
    while True:
        # Begin what may begin.
        while free_count:
            number = free[free_count - 1]
            heard = take(s, number, monotonic_ns(clock))
            began = s.desks[number, DESK_DIRECTION] != NO_DIRECTION
            if began:
                free_count -= 1
            if began or heard:
                unlock(s)
                if heard:
                    tell(s)
                if began:
                    prepare(s, number)
                    _push_part(s, r, number)
                    pushed += 1
                    flying += 1
                lock(s)
            if not began and not heard:
                break
        # Go on with what paused; at once if nothing else is in flight.
        left = 0
        for place in range(paused_count):
            number = paused[place]
            if flying and _must_pause(s, number, monotonic_ns(clock)):
                paused[left] = number
                left += 1
                continue
            unlock(s)
            _push_part(s, r, number)
            pushed += 1
            flying += 1
            lock(s)
        paused_count = left
        control = s.control
        idle = control[LOAD_HEAD] == control[LOAD_TAIL] and control[STORE_HEAD] == control[STORE_TAIL]
        if control[CLOSING] and idle and not flying and not paused_count:
            unlock(s)
            return
        control[RING_WAITS] = 1
        unlock(s)
        if not polling:
            _push(r, _POLL, r.where[WAKE_FD], 0, 0, _POLLIN << 32, _WAKE)
            pushed += 1
            polling = True
        # Submit, and wait for one answer at least: a completion, or somebody's knock.
        sent = system_call(ENTER, r.where[RING_FD], pushed, 1, _GETEVENTS, 0, 0)
        if sent >= 0:
            pushed -= sent
        head = r.ring[r.where[CQ_HEAD]]
        while head != atomic_load(r.ring, r.where[CQ_TAIL]):
            entry = r.completions[head & r.where[CQ_MASK]]
            data, result = entry[0], entry[1]
            head += 1
            atomic_store(r.ring, r.where[CQ_HEAD], head)
            if data == _WAKE:
                read_bytes(r.where[WAKE_FD], clock, 8)
                polling = False
                continue
            result &= 0xFFFFFFFF
            if result >= 1 << 31:
                result -= 1 << 32
            desk = s.desks[data]
            storing = desk[DESK_DIRECTION] == STORING
            flying -= 1
            if take_in(desk, result, storing):
                desk[DESK_PAUSED] = monotonic_ns(clock)
                paused[paused_count] = data
                paused_count += 1
                continue
            if not end_unit(s, data):
                move_one_by_one(s, data)
            now = monotonic_ns(clock)
            lock(s)
            heard = put_back(s, data, now)
            unlock(s)
            free[free_count] = data
            free_count += 1
            if heard:
                tell(s)
        lock(s)
        s.control[RING_WAITS] = 0
