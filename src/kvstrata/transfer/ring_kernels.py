"""The I/O engine's worker on io_uring: one thread that keeps many units in flight."""

from __future__ import annotations

from typing import Any

from kvstrata.jit import kernel, part
from kvstrata.transfer.engine_kernels import (
    CLOSING,
    DESK_CLOCK,
    DESK_DIRECTION,
    DESK_DONE,
    DESK_ERROR,
    DESK_FLYING,
    DESK_PART,
    DESK_PART_BYTES,
    DESK_PUSHED_NS,
    DESK_TOTAL,
    DESK_USED,
    EAGAIN,
    FD,
    FLAGS,
    FLUSH,
    KIND,
    LIMIT,
    NO_DIRECTION,
    OFFSET,
    PART_BYTES,
    PAUSE_MICROSECONDS,
    PAUSES,
    PRIORITY,
    RING_WAITS,
    STORING,
    SYNC,
    UNIT_BLOCKS,
    UNIT_PARTS,
    Shared,
    end_unit,
    loads_about,
    loads_wait,
    lock,
    move_one_by_one,
    next_part,
    part_bytes,
    prepare,
    put_back,
    stores_wait,
    take,
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

_READV, _WRITEV, _FSYNC, _POLL = 1, 2, 3, 6
_DATASYNC = 1
_POLLIN = 1
_DSYNC = 2
_GETEVENTS = 1
_SUBMIT_BYTES = 512 * 1024
"""So much is handed to the kernel at once, not piece by piece."""
_WAKE = -1
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
def _must_pause(s: Shared, desk_number: int) -> Any:
    """Is this a store that should let loads pass before its next part? Not for long: they must not starve
    it.
    """
    desk = s.desks[desk_number]
    if not s.setup[PRIORITY] or desk[DESK_DIRECTION] != STORING:
        return False
    if monotonic_ns(desk[DESK_CLOCK]) - desk[DESK_PUSHED_NS] > PAUSES * PAUSE_MICROSECONDS * 1000:
        return False
    return loads_about(s)


@part
def _push_parts(s: Shared, r: RingWords, desk_number: int) -> Any:
    """Put the unit's parts in flight: all of them, or one of a store while loads have been seen lately.

    Returns how many were pushed.
    """
    desk = s.desks[desk_number]
    storing = desk[DESK_DIRECTION] == STORING
    op = s.operations[s.units[desk_number, 0]]
    flags = _DSYNC << 32 if storing and op[FLAGS] & SYNC else 0
    opcode = _WRITEV if storing else _READV
    if op[KIND] == FLUSH:
        _push(r, _FSYNC, op[FD], 0, 0, _DATASYNC << 32, desk_number)
        desk[DESK_FLYING] += 1
        return 1
    size = part_bytes(s, storing)
    polite = storing and size < s.setup[PART_BYTES]
    pushed = 0
    while desk[DESK_DONE] < desk[DESK_TOTAL] and desk[DESK_USED] + 2 * UNIT_BLOCKS <= UNIT_PARTS:
        at = desk[DESK_USED]
        count = next_part(s, desk_number, size, at)
        address = desk[DESK_PART] + 16 * at
        # The size asked for comes back with the answer: a shorter one has to be looked at.
        data = desk_number | desk[DESK_PART_BYTES] << 16
        _push(r, opcode, op[FD], op[OFFSET] + desk[DESK_DONE], address, count | flags, data)
        desk[DESK_DONE] += desk[DESK_PART_BYTES]
        desk[DESK_USED] += count
        desk[DESK_FLYING] += 1
        pushed += 1
        if polite:
            break
    desk[DESK_PUSHED_NS] = monotonic_ns(desk[DESK_CLOCK])
    return pushed


@kernel
def work_ring(s: Shared, r: RingWords, me: int, rings: int, free: Any, paused: Any) -> Any:
    """The life of worker `me` of `rings`. Every so many desks are its own.

    free, paused: (desks of its own,) int32, room for desks without work and for those with a pause.
    """
    clock = s.desks[me, DESK_CLOCK]
    desks = len(free)
    mine = 1 << me
    for place in range(desks):
        free[place] = me + place * rings
    free_count, paused_count, flying, pushed, waiting_bytes = desks, 0, 0, 0, 0
    polling = False
    lock(s)
    while True:
        # Begin what may begin.
        # Its share of what may be in flight: two workers verify more than one does.
        limit = (max(s.pace[0, LIMIT], s.pace[1, LIMIT]) + rings - 1) // rings
        while free_count and desks - free_count < limit:
            number = free[free_count - 1]
            heard = take(s, number, monotonic_ns(clock))
            began = s.desks[number, DESK_DIRECTION] != NO_DIRECTION
            if not began and not heard:
                break
            unlock(s)
            if heard:
                tell(s)
            if began:
                free_count -= 1
                prepare(s, number)
                paused[paused_count] = number
                paused_count += 1
                more = _push_parts(s, r, number)
                flying += more
                pushed += more
                if s.desks[number, DESK_DONE] == s.desks[number, DESK_TOTAL]:
                    paused_count -= 1
                waiting_bytes += s.desks[number, DESK_DONE]
                if waiting_bytes >= _SUBMIT_BYTES:
                    # Now: the device works while the next unit is prepared.
                    sent = system_call(ENTER, r.where[RING_FD], pushed, 0, 0, 0, 0)
                    pushed -= max(0, sent)
                    waiting_bytes = 0
            lock(s)
        # Go on with what has parts left; at once if nothing is in flight.
        left = 0
        for place in range(paused_count):
            number = paused[place]
            if s.desks[number, DESK_FLYING] or (flying and _must_pause(s, number)):
                paused[left] = number
                left += 1
                continue
            unlock(s)
            s.desks[number, DESK_USED] = 0
            more = _push_parts(s, r, number)
            flying += more
            pushed += more
            if s.desks[number, DESK_DONE] < s.desks[number, DESK_TOTAL]:
                paused[left] = number
                left += 1
            lock(s)
        paused_count = left
        control = s.control
        idle = not loads_wait(s) and not stores_wait(s)
        if control[CLOSING] and idle and not flying and not paused_count:
            unlock(s)
            return
        control[RING_WAITS] |= mine
        unlock(s)
        if not polling:
            _push(r, _POLL, r.where[WAKE_FD], 0, 0, _POLLIN << 32, _WAKE)
            pushed += 1
            polling = True
        # Submit, and wait for one answer at least: a completion, or somebody's knock.
        sent = system_call(ENTER, r.where[RING_FD], pushed, 1, _GETEVENTS, 0, 0)
        pushed -= max(0, sent)
        waiting_bytes = 0
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
            number = data & 0xFFFF
            desk = s.desks[number]
            flying -= 1
            desk[DESK_FLYING] -= 1
            if result != data >> 16:
                desk[DESK_ERROR] = -EAGAIN
            if desk[DESK_FLYING] or desk[DESK_DONE] < desk[DESK_TOTAL]:
                continue
            if desk[DESK_ERROR] or not end_unit(s, number):
                # An error, or less than was asked for: row by row, by calls that say what it is.
                move_one_by_one(s, number)
            now = monotonic_ns(clock)
            lock(s)
            heard = put_back(s, number, now)
            unlock(s)
            free[free_count] = number
            free_count += 1
            if heard:
                tell(s)
        lock(s)
        s.control[RING_WAITS] &= ~mine
