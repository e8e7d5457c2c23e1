"""The I/O engine's compiled half: what its threads do, without the GIL.

A block to move is a row of the operations array. Rows wait in two queues, loads and stores. A worker takes
a unit (one row, or rows that are neighbours in a file), moves its bytes in one or more calls, makes or
verifies headers and checksums, and puts the rows on the list of what is done. Queues and counters are
guarded by one mutex that nobody holds for longer than a microsecond or so; bytes move outside it.

Loads come first: no unit of stores is begun while a load waits, big stores pause between their parts while
loads run, and for a while after a load stores keep to one part in flight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from kvstrata.jit import holding_gil, kernel, part
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.native import (
    CLOCK_MONOTONIC,
    call_hook,
    condition_broadcast,
    condition_signal,
    condition_wait,
    condition_wait_until,
    fdatasync,
    fill_bytes,
    last_error,
    memcpy,
    monotonic_ns,
    mutex_lock,
    mutex_unlock,
    preadv,
    pwritev,
    sleep_microseconds,
    store_i64,
    write_bytes,
)
from kvstrata.transfer.slot_header import GOOD, WRONG_CHECKSUM, judge_header, make_header
from kvstrata.transfer.xxh3 import copy_xxh3_64, xxh3_64

EINTR, EIO, EAGAIN = 4, 5, 11

# Columns of an operation
(
    KIND, FD, OFFSET, ADDRESS, LENGTH, COPY_TO, CHECKSUM, NUMBER, SEGMENT, SEQUENCE, CREATED_MS, EXPIRES_MS,
    KEY, KEY_1, KEY_2, KEY_3, FLAGS, DEADLINE_NS, GROUP, STATE, RESULT, BEGAN_NS, ENDED_NS, POSITION,
    COLUMNS,
) = range(25)  # fmt: skip

READ, WRITE, FLUSH, FETCH, KEEP = range(5)
"""Slot of a file to buffer, buffer to slot, file to medium; memory (OFFSET: address) to buffer, and back.
"""

BOUNCE, KNOWN, VERIFY, SYNC, DIRECT = 1, 2, 4, 8, 16
"""Through an aligned buffer; CHECKSUM is given; verify a FETCH; sync after the write; whole pages."""

FREE, QUEUED, RUNNING, DONE, JUDGED = range(5)
"""JUDGED: read, and being verified and copied; from here on nobody can call it off."""
NEVER_NS = 1 << 62
"""A moment that does not come."""
LATE = 100
"""RESULT of a row whose deadline passed in the queue: nothing touched its buffer."""
GONE = 101
"""RESULT of a row whose object had left the medium, as others decided: nobody's fault, and a miss."""

# Words of `control`
(
    LOAD_HEAD, LOAD_TAIL, STORE_HEAD, STORE_TAIL, LOADS_RUNNING, STORES_RUNNING, CLOSING, DONE_COUNT,
    UNREAPED_BYTES, SIGNALLED, LAST_LOAD_NS, NEWS_COUNT, SLEEPING, RING_WAITS, LOAD_UNITS, STORE_UNITS,
    MERGED, CONTROL_WORDS,
) = range(18)  # fmt: skip

# Words of a direction's row of `pace`; behind them, bytes per second seen at each depth of 1, 2, 4, ...
LIMIT, MOST, LEVEL, TRIED, EPOCH_NS, EPOCH_BYTES, EPOCH_UNITS, RATES = range(8)
LEVELS = 10
LOWEST_LEVEL = 2
"""Four in flight at least: the device works while some of them are verified."""
EPOCH_LEAST_NS = 20_000_000
EPOCH_LEAST_UNITS = 8
"""How long, and how many, units are counted before their speed is taken for that of a depth."""
TRIAL_EVERY = 12
"""One epoch of so many is spent on a neighbouring depth."""
GOOD_PERCENT = 98
"""A smaller depth is chosen if it has so much of the speed: what is in flight is what a load waits
behind. A greater one has to be faster by as much."""

# Words of `setup`
(
    MUTEX, WORK, NEWS, STRIDE, MERGE_BYTES, PART_BYTES, POLITE_BYTES, POLITE_NS, PRIORITY, ADAPTIVE, HOOK,
    DONE_FD, WAKE_FD, WAKE_FD_1, SIGNAL_BYTES, ONE, ONE_ADDRESS, SPACE, SPACE_1, SPACE_2, SPACE_3,
    SETUP_WORDS,
) = range(22)  # fmt: skip

# Words of a worker's `desk`
(
    DESK_BEGAN, DESK_DIRECTION, DESK_COUNT, DESK_TOTAL, DESK_DONE, DESK_ERROR, DESK_PAGES, DESK_BOUNCE,
    DESK_PART, DESK_CLOCK, DESK_VECTOR_COUNT, DESK_PART_BYTES, DESK_FLYING, DESK_USED, DESK_PUSHED_NS,
    DESK_WORDS,
) = range(16)  # fmt: skip

NO_DIRECTION, LOADING, STORING = range(3)
MOST_RINGS = 2
"""Two threads on rings: one verifies while the other keeps the device busy."""
UNIT_BLOCKS = 64
"""Blocks of a unit at most; each takes two of the vectors of a call."""
UNIT_PARTS = 4 * UNIT_BLOCKS
"""Vectors of all the parts of a unit that are in flight: each part may split one vector more."""
HOOK_READ, HOOK_WRITE, HOOK_SYNC = range(3)
PAUSE_MICROSECONDS = 100
PAUSES = 50
"""A store waits so often between two parts for loads to end, then goes on: loads must not starve it."""

Words = NDArray[Any]


class Shared(NamedTuple):
    """Everything that workers share. A row of desks, units, vectors and parts belongs to one worker."""

    operations: Words  # (capacity, COLUMNS) int64
    pace: Words  # (2, RATES + LEVELS) int64: loads, stores
    loads: Words  # (capacity,) int32, a ring of waiting rows
    stores: Words
    done: Words  # (capacity,) int32
    groups: Words  # (2 * capacity,) int64: rows of each group that are not done
    control: Words
    setup: Words
    desks: Words  # (workers, DESK_WORDS) int64
    units: Words  # (workers, UNIT_BLOCKS) int32
    vectors: Words  # (workers, 2 * UNIT_BLOCKS, 2) int64
    parts: Words


@part
def lock(s: Shared) -> Any:
    mutex_lock(s.setup[MUTEX])


@part
def unlock(s: Shared) -> Any:
    mutex_unlock(s.setup[MUTEX])


# Under the mutex


@part
def loads_wait(s: Shared) -> Any:
    return s.control[LOAD_HEAD] != s.control[LOAD_TAIL]


@part
def stores_wait(s: Shared) -> Any:
    return s.control[STORE_HEAD] != s.control[STORE_TAIL]


@part
def loads_about(s: Shared) -> Any:
    """Does a load wait or run?"""
    return s.control[LOADS_RUNNING] > 0 or loads_wait(s)


@part
def _wake_one(s: Shared) -> Any:
    if s.control[SLEEPING] > 0:
        condition_signal(s.setup[WORK])


@part
def _knock(s: Shared, units: int) -> Any:
    """Wake workers that wait in a ring, as many as there may be units. RING_WAITS has a bit for each."""
    for ring in range(MOST_RINGS):
        if units > 0 and s.control[RING_WAITS] & 1 << ring:
            s.control[RING_WAITS] &= ~(1 << ring)
            write_bytes(s.setup[WAKE_FD + ring], s.setup[ONE_ADDRESS], 8)
            units -= 1


@part
def _finish_row(s: Shared, row: int) -> Any:
    """Put a row on the list of what is done. True if somebody should be told."""
    control = s.control
    op = s.operations[row]
    op[STATE] = DONE
    s.done[control[DONE_COUNT]] = row
    control[DONE_COUNT] += 1
    control[UNREAPED_BYTES] += op[LENGTH]
    s.groups[op[GROUP]] -= 1
    wanted = s.groups[op[GROUP]] == 0 or control[UNREAPED_BYTES] >= s.setup[SIGNAL_BYTES]
    if wanted and control[SIGNALLED] == 0:
        control[SIGNALLED] = 1
        condition_broadcast(s.setup[NEWS])
        return True
    return False


@part
def tell(s: Shared) -> Any:
    """Wake the thread that reaps. Not under the mutex."""
    write_bytes(s.setup[DONE_FD], s.setup[ONE_ADDRESS], 8)


@part
def _take_from(
    s: Shared, desk_number: int, head: int, tail: int, queue: Words, now: int, limit_bytes: int
) -> Any:
    """Take a unit from one queue: its rows go to the desk. Returns whether the reaper should be told."""
    control, operations, unit = s.control, s.operations, s.units[desk_number]
    desk = s.desks[desk_number]
    capacity = len(queue)
    count = 0
    taken = 0
    heard = False
    while control[head] != control[tail]:
        row = queue[control[head] % capacity]
        op = operations[row]
        if now > op[DEADLINE_NS]:
            control[head] += 1
            op[RESULT] = LATE
            op[BEGAN_NS] = now
            op[ENDED_NS] = now
            heard |= _finish_row(s, row)
            continue
        if count:
            last = operations[unit[count - 1]]
            if (
                op[KIND] > WRITE
                or last[KIND] > WRITE
                or op[FD] != last[FD]
                or op[OFFSET] != last[OFFSET] + s.setup[STRIDE]
                or op[LENGTH] + PAGE != s.setup[STRIDE]
                or last[LENGTH] + PAGE != s.setup[STRIDE]
                or (op[FLAGS] | last[FLAGS]) & BOUNCE
                or taken + s.setup[STRIDE] > limit_bytes
                or count == UNIT_BLOCKS
            ):
                break
            control[MERGED] += 1
        control[head] += 1
        op[STATE] = RUNNING
        op[BEGAN_NS] = now
        unit[count] = row
        count += 1
        taken += PAGE + op[LENGTH]
        if taken >= limit_bytes:
            break
    desk[DESK_COUNT] = count
    # A flush may take as long as the medium likes: it is no sign that reads and writes hang.
    desk[DESK_BEGAN] = now if count and operations[unit[0], KIND] != FLUSH else NEVER_NS
    return heard


@part
def take(s: Shared, desk_number: int, now: int) -> Any:
    """The next unit for this desk, loads first. DESK_DIRECTION says what it is, if anything."""
    control, setup, desk = s.control, s.setup, s.desks[desk_number]
    desk[DESK_DIRECTION] = NO_DIRECTION
    desk[DESK_COUNT] = 0
    heard = False
    if loads_wait(s) and control[LOADS_RUNNING] < s.pace[0, LIMIT]:
        heard |= _take_from(s, desk_number, LOAD_HEAD, LOAD_TAIL, s.loads, now, setup[MERGE_BYTES])
        if desk[DESK_COUNT]:
            desk[DESK_DIRECTION] = LOADING
            control[LOADS_RUNNING] += 1
            control[LAST_LOAD_NS] = now
            return heard
    if not stores_wait(s):
        return heard
    limit = s.pace[1, LIMIT]
    if setup[PRIORITY] and (control[LOADS_RUNNING] or now - control[LAST_LOAD_NS] < setup[POLITE_NS]):
        limit = 1
    if control[STORES_RUNNING] < limit:
        heard |= _take_from(s, desk_number, STORE_HEAD, STORE_TAIL, s.stores, now, setup[MERGE_BYTES])
        if desk[DESK_COUNT]:
            desk[DESK_DIRECTION] = STORING
            control[STORES_RUNNING] += 1
    return heard


@part
def _set_level(pace: Words, level: int) -> Any:
    level = max(level, LOWEST_LEVEL)
    while level and 1 << (level - 1) >= pace[MOST]:
        level -= 1
    pace[LEVEL] = level
    pace[LIMIT] = min(1 << level, pace[MOST])


@part
def _keep_pace(pace: Words, now: int, size: int, saturated: bool) -> Any:
    """Learn how fast this depth is, and choose the next one. Only while more waits than may be moved."""
    if not saturated or pace[EPOCH_NS] == 0:
        pace[EPOCH_NS] = now if saturated else 0
        pace[EPOCH_BYTES] = 0
        pace[EPOCH_UNITS] = 0
        return
    pace[EPOCH_BYTES] += size
    pace[EPOCH_UNITS] += 1
    passed = now - pace[EPOCH_NS]
    if passed < EPOCH_LEAST_NS or pace[EPOCH_UNITS] < EPOCH_LEAST_UNITS:
        return
    level = pace[LEVEL]
    rate = pace[EPOCH_BYTES] * 1_000_000_000 // passed
    known = pace[RATES + level]
    pace[RATES + level] = rate if known == 0 else (7 * known + rate) // 8
    pace[EPOCH_NS] = now
    pace[EPOCH_BYTES] = 0
    pace[EPOCH_UNITS] = 0
    pace[TRIED] += 1
    if pace[TRIED] % TRIAL_EVERY == 0:
        # In turn the depth below and the one above.
        step = -1 if pace[TRIED] // TRIAL_EVERY % 2 else 1
        _set_level(pace, level + step)
        return
    below, here, above = level - 1, pace[RATES + level], level + 1
    if below >= LOWEST_LEVEL and pace[RATES + below] * 100 >= here * GOOD_PERCENT:
        _set_level(pace, below)
    elif here * 100 < pace[RATES + above] * GOOD_PERCENT:
        _set_level(pace, above)


@part
def put_back(s: Shared, desk_number: int, now: int) -> Any:
    """A unit is over: its rows are done. Returns whether the reaper should be told."""
    control, operations, desk = s.control, s.operations, s.desks[desk_number]
    heard = False
    size = 0
    for place in range(desk[DESK_COUNT]):
        row = s.units[desk_number, place]
        operations[row, ENDED_NS] = now
        size += operations[row, LENGTH]
        heard |= _finish_row(s, row)
    if desk[DESK_DIRECTION] == LOADING:
        control[LOADS_RUNNING] -= 1
        control[LOAD_UNITS] += 1
        control[LAST_LOAD_NS] = now
        if s.setup[ADAPTIVE]:
            _keep_pace(s.pace[0], now, size, loads_wait(s))
    else:
        control[STORES_RUNNING] -= 1
        control[STORE_UNITS] += 1
        alone = not s.setup[PRIORITY] or now - control[LAST_LOAD_NS] >= s.setup[POLITE_NS]
        if s.setup[ADAPTIVE]:
            _keep_pace(s.pace[1], now, size, alone and stores_wait(s))
    desk[DESK_DIRECTION] = NO_DIRECTION
    desk[DESK_COUNT] = 0
    # Somebody may have waited for the place in flight that this unit had.
    if loads_wait(s) or stores_wait(s):
        _wake_one(s)
    return heard


# Outside the mutex


@part
def prepare(s: Shared, desk_number: int) -> Any:
    """Checksums, headers and vectors of the unit on a desk of a file's worker."""
    desk, setup = s.desks[desk_number], s.setup
    vectors = s.vectors[desk_number]
    count = desk[DESK_COUNT]
    if s.operations[s.units[desk_number, 0], KIND] == FLUSH:
        count = 0
    total = 0
    for place in range(count):
        op = s.operations[s.units[desk_number, place]]
        page = desk[DESK_PAGES] + place * PAGE
        payload, length = op[ADDRESS], op[LENGTH]
        moved = length
        if op[FLAGS] & DIRECT:
            moved = (length + PAGE - 1) // PAGE * PAGE
        if op[FLAGS] & BOUNCE:
            payload = desk[DESK_BOUNCE]
        if op[KIND] == WRITE:
            if op[FLAGS] & BOUNCE:
                digest = copy_xxh3_64(payload, op[ADDRESS], length)
                fill_bytes(payload + length, 0, moved - length)
            elif not op[FLAGS] & KNOWN:
                digest = xxh3_64(payload, length)
            else:
                digest = op[CHECKSUM]
            if not op[FLAGS] & KNOWN:
                op[CHECKSUM] = digest
            make_header(
                page, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], setup[SPACE : SPACE + 4], op[SEGMENT],
                op[NUMBER], length, op[CHECKSUM], op[SEQUENCE], op[CREATED_MS], op[EXPIRES_MS],
            )  # fmt: skip
        else:
            # A read that ends early must not leave another block's header to be judged.
            store_i64(page, 0)
        vectors[2 * place, 0] = page
        vectors[2 * place, 1] = PAGE
        vectors[2 * place + 1, 0] = payload
        vectors[2 * place + 1, 1] = moved
        total += PAGE + moved
    desk[DESK_VECTOR_COUNT] = 2 * count
    desk[DESK_TOTAL] = total
    desk[DESK_DONE] = 0
    desk[DESK_ERROR] = 0
    desk[DESK_FLYING] = 0
    desk[DESK_USED] = 0


@part
def next_part(s: Shared, desk_number: int, limit_bytes: int, at: int) -> Any:
    """Vectors of what is left of the unit, `limit_bytes` or a little more, from place `at` of its parts.

    Returns how many there are; DESK_PART_BYTES is their size. A rest that is not worth a call of its own
    goes along.
    """
    desk, vectors, parts = s.desks[desk_number], s.vectors[desk_number], s.parts[desk_number]
    skip = desk[DESK_DONE]
    left = limit_bytes
    if desk[DESK_TOTAL] - skip <= limit_bytes + limit_bytes // 2:
        left = desk[DESK_TOTAL] - skip
    size = left
    count = 0
    for place in range(desk[DESK_VECTOR_COUNT]):
        length = vectors[place, 1]
        if skip >= length:
            skip -= length
            continue
        if left == 0:
            break
        piece = min(length - skip, left)
        parts[at + count, 0] = vectors[place, 0] + skip
        parts[at + count, 1] = piece
        skip = 0
        left -= piece
        count += 1
    desk[DESK_PART_BYTES] = size
    return count


@part
def take_in(desk: Words, moved: int, writing: bool) -> Any:
    """What a call answered, bytes or -errno. Returns whether something is left to do."""
    if moved == -EINTR or moved == -EAGAIN:
        return True
    if moved < 0:
        desk[DESK_ERROR] = moved
        return False
    desk[DESK_DONE] += moved
    if moved == 0:
        # The end of the file: a write must not stop there, a read shows it in header or checksum.
        if writing:
            desk[DESK_ERROR] = -EIO
        return False
    return desk[DESK_DONE] < desk[DESK_TOTAL]


@part
def _judge(s: Shared, desk_number: int) -> Any:
    """Verify what a unit has read, and copy where it is to go."""
    desk = s.desks[desk_number]
    lock(s)
    for place in range(desk[DESK_COUNT]):
        s.operations[s.units[desk_number, place], STATE] = JUDGED
    unlock(s)
    for place in range(desk[DESK_COUNT]):
        op = s.operations[s.units[desk_number, place]]
        length = op[LENGTH]
        verdict = judge_header(
            desk[DESK_PAGES] + place * PAGE, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], op[SEGMENT],
            op[NUMBER], length, op[CHECKSUM],
        )  # fmt: skip
        if verdict == GOOD:
            if op[FLAGS] & BOUNCE:
                digest = copy_xxh3_64(op[ADDRESS], desk[DESK_BOUNCE], length)
                if op[COPY_TO]:
                    memcpy(op[COPY_TO], desk[DESK_BOUNCE], length)
            elif op[COPY_TO]:
                digest = copy_xxh3_64(op[COPY_TO], op[ADDRESS], length)
            else:
                digest = xxh3_64(op[ADDRESS], length)
            if digest != op[CHECKSUM]:
                verdict = WRONG_CHECKSUM
        op[RESULT] = verdict


@part
def end_unit(s: Shared, desk_number: int) -> Any:
    """Results of a unit whose bytes have moved. False if it failed as a whole and must go row by row."""
    desk = s.desks[desk_number]
    if desk[DESK_ERROR]:
        if desk[DESK_COUNT] > 1:
            return False
        s.operations[s.units[desk_number, 0], RESULT] = desk[DESK_ERROR]
        return True
    if desk[DESK_DIRECTION] == LOADING:
        _judge(s, desk_number)
    else:
        for place in range(desk[DESK_COUNT]):
            s.operations[s.units[desk_number, place], RESULT] = GOOD
    return True


@part
def _call(s: Shared, desk_number: int, count: int) -> Any:
    """Move one part: bytes moved, or -errno."""
    desk = s.desks[desk_number]
    op = s.operations[s.units[desk_number, 0]]
    offset = op[OFFSET] + desk[DESK_DONE]
    writing = desk[DESK_DIRECTION] == STORING
    if s.setup[HOOK]:
        which = HOOK_WRITE if writing else HOOK_READ
        return call_hook(s.setup[HOOK], which, op[FD], desk[DESK_PART], count, offset)
    if writing:
        moved = pwritev(op[FD], desk[DESK_PART], count, offset)
    else:
        moved = preadv(op[FD], desk[DESK_PART], count, offset)
    return moved if moved >= 0 else -last_error()


@part
def _sync(s: Shared, op: Words) -> Any:
    """0, or -errno."""
    if s.setup[HOOK]:
        return call_hook(s.setup[HOOK], HOOK_SYNC, op[FD], 0, 0, 0)
    return -last_error() if fdatasync(op[FD]) else 0


@part
def _let_loads_pass(s: Shared) -> Any:
    """Between two parts of a store: wait a little while loads wait or run."""
    for _ in range(PAUSES):
        lock(s)
        busy = loads_about(s)
        unlock(s)
        if not busy:
            return
        sleep_microseconds(PAUSE_MICROSECONDS)


@part
def part_bytes(s: Shared, storing: bool) -> Any:
    """How much to move in one call: less while stores have to be polite."""
    if not storing or not s.setup[PRIORITY]:
        return s.setup[PART_BYTES]
    clock = s.desks[0, DESK_CLOCK] + 16
    lock(s)
    recent = monotonic_ns(clock) - s.control[LAST_LOAD_NS] < s.setup[POLITE_NS]
    unlock(s)
    return s.setup[POLITE_BYTES] if recent else s.setup[PART_BYTES]


@part
def _move_file_unit(s: Shared, desk_number: int) -> Any:
    """The unit on the desk, by calls that wait."""
    desk = s.desks[desk_number]
    storing = desk[DESK_DIRECTION] == STORING
    prepare(s, desk_number)
    going = desk[DESK_TOTAL] > 0
    while going:
        count = next_part(s, desk_number, part_bytes(s, storing), 0)
        going = take_in(desk, _call(s, desk_number, count), storing)
        if going and storing and s.setup[PRIORITY]:
            _let_loads_pass(s)
    op = s.operations[s.units[desk_number, 0]]
    if (op[KIND] == FLUSH or (storing and op[FLAGS] & SYNC)) and not desk[DESK_ERROR]:
        desk[DESK_ERROR] = _sync(s, op)


@part
def move_one_by_one(s: Shared, desk_number: int) -> Any:
    """A merged unit failed: find out which of its rows is to blame."""
    desk, unit = s.desks[desk_number], s.units[desk_number]
    count = desk[DESK_COUNT]
    desk[DESK_COUNT] = 1
    for place in range(count):
        unit[0], unit[place] = unit[place], unit[0]
        _move_file_unit(s, desk_number)
        end_unit(s, desk_number)
    desk[DESK_COUNT] = count


@part
def _move_memory_unit(s: Shared, desk_number: int) -> Any:
    op = s.operations[s.units[desk_number, 0]]
    op[RESULT] = GOOD
    if op[KIND] == KEEP:
        digest = copy_xxh3_64(op[OFFSET], op[ADDRESS], op[LENGTH])
        if not op[FLAGS] & KNOWN:
            op[CHECKSUM] = digest
    elif op[FLAGS] & VERIFY:
        if copy_xxh3_64(op[ADDRESS], op[OFFSET], op[LENGTH]) != op[CHECKSUM]:
            op[RESULT] = WRONG_CHECKSUM
    else:
        memcpy(op[ADDRESS], op[OFFSET], op[LENGTH])


@part
def _next_unit(s: Shared, desk_number: int) -> Any:
    """Wait for a unit. False when the engine closes and nothing is queued."""
    desk, control, setup = s.desks[desk_number], s.control, s.setup
    lock(s)
    while True:
        heard = take(s, desk_number, monotonic_ns(desk[DESK_CLOCK]))
        if desk[DESK_DIRECTION] != NO_DIRECTION or heard:
            unlock(s)
            if heard:
                tell(s)
            if desk[DESK_DIRECTION] != NO_DIRECTION:
                return True
            lock(s)
            continue
        if control[CLOSING] and not stores_wait(s):
            condition_broadcast(setup[WORK])
            unlock(s)
            return False
        control[SLEEPING] += 1
        condition_wait(setup[WORK], setup[MUTEX])
        control[SLEEPING] -= 1


@part
def _over(s: Shared, desk_number: int) -> Any:
    """The unit on the desk has its results."""
    now = monotonic_ns(s.desks[desk_number, DESK_CLOCK])
    lock(s)
    heard = put_back(s, desk_number, now)
    unlock(s)
    if heard:
        tell(s)


@kernel
def work(s: Shared, desk_number: int) -> Any:
    """The life of a worker that moves blocks of files."""
    while _next_unit(s, desk_number):
        _move_file_unit(s, desk_number)
        if not end_unit(s, desk_number):
            move_one_by_one(s, desk_number)
        _over(s, desk_number)


@kernel
def work_in_memory(s: Shared, desk_number: int) -> Any:
    """The life of a worker that moves blocks of memory."""
    while _next_unit(s, desk_number):
        _move_memory_unit(s, desk_number)
        _over(s, desk_number)


# Called by Python, with the GIL


@holding_gil
def enqueue(s: Shared, rows: Words, fields: Words, loads: bool, group: int) -> Any:
    """Fields go to rows, and the rows to a queue, in order.

    By this loop: numpy gives the GIL up to copy so much, and has to wait for it afterwards.
    """
    control = s.control
    for place in range(len(rows)):
        for column in range(COLUMNS):
            s.operations[rows[place], column] = fields[place, column]
        s.operations[rows[place], STATE] = QUEUED
        s.operations[rows[place], GROUP] = group
    lock(s)
    queue = s.loads if loads else s.stores
    tail = LOAD_TAIL if loads else STORE_TAIL
    capacity = len(queue)
    s.groups[group] += len(rows)
    for row in rows:
        queue[control[tail] % capacity] = row
        control[tail] += 1
    for _ in range(min(len(rows), control[SLEEPING])):
        condition_signal(s.setup[WORK])
    _knock(s, len(rows))
    unlock(s)


@holding_gil
def reap(s: Shared, rows: Words, fields: Words) -> Any:
    """Take the numbers and the fields of some rows that are done; returns how many there are."""
    control = s.control
    lock(s)
    count = min(control[DONE_COUNT], len(rows))
    first = control[DONE_COUNT] - count
    for place in range(count):
        rows[place] = s.done[first + place]
    control[DONE_COUNT] = first
    if first == 0:
        control[UNREAPED_BYTES] = 0
        control[SIGNALLED] = 0
    unlock(s)
    for place in range(count):
        for column in range(COLUMNS):
            fields[place, column] = s.operations[rows[place], column]
    return count


@holding_gil
def announce(s: Shared) -> Any:
    """Whoever waits for news should look again."""
    lock(s)
    s.control[NEWS_COUNT] += 1
    condition_broadcast(s.setup[NEWS])
    unlock(s)


@kernel
def await_news(s: Shared, seen: int, until: Words) -> Any:
    """Wait while nothing is done and nothing was announced since `seen`.

    until: seconds and nanoseconds of time.monotonic, (2,) int64.
    """
    lock(s)
    while s.control[NEWS_COUNT] == seen and s.control[SIGNALLED] == 0:
        if condition_wait_until(s.setup[NEWS], s.setup[MUTEX], CLOCK_MONOTONIC, until.ctypes.data):
            break
    unlock(s)


@holding_gil
def cancel(s: Shared, rows: Words, taken: Words) -> Any:
    """Take waiting rows out of the queues; taken[i]: rows[i] was still waiting, and is free now."""
    operations = s.operations
    found = 0
    lock(s)
    for place, row in enumerate(rows):
        taken[place] = operations[row, STATE] == QUEUED
        if taken[place]:
            operations[row, STATE] = FREE
            s.groups[operations[row, GROUP]] -= 1
            found += 1
    if found:
        _close_gaps(s, LOAD_HEAD, LOAD_TAIL, s.loads)
        _close_gaps(s, STORE_HEAD, STORE_TAIL, s.stores)
    unlock(s)
    return found


@holding_gil
def abandon(s: Shared, rows: Words, taken: Words) -> Any:
    """What was not copied to COPY_TO yet never will be; taken[i]: so it is with rows[i], still running."""
    lock(s)
    for place, row in enumerate(rows):
        taken[place] = s.operations[row, STATE] == RUNNING
        if taken[place]:
            s.operations[row, COPY_TO] = 0
    unlock(s)


@part
def _close_gaps(s: Shared, head: int, tail: int, queue: Words) -> Any:
    control = s.control
    capacity = len(queue)
    to = control[head]
    for place in range(control[head], control[tail]):
        row = queue[place % capacity]
        if s.operations[row, STATE] == QUEUED:
            queue[to % capacity] = row
            to += 1
    control[tail] = to


@holding_gil
def shut(s: Shared, drop: bool) -> Any:
    """No more work will come. drop: what waits is forgotten too."""
    control = s.control
    lock(s)
    control[CLOSING] = 1
    if drop:
        control[LOAD_HEAD] = control[LOAD_TAIL]
        control[STORE_HEAD] = control[STORE_TAIL]
    condition_broadcast(s.setup[WORK])
    _knock(s, MOST_RINGS)
    unlock(s)
