"""Slots in memory: made in a buffer that becomes an object, judged in what came back of one.

The form is the one of slots in files (`slot_header`): a page of header, then the payload in whole pages.
Rows are the engine's; OFFSET is the address of a slot in memory. Which bytes are fetched together is
decided by `merged_ranges`. No I/O here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.engine_kernels import (
    ADDRESS,
    CHECKSUM,
    COLUMNS,
    COPY_TO,
    CREATED_MS,
    EXPIRES_MS,
    FLAGS,
    KEY,
    KEY_1,
    KEY_2,
    KEY_3,
    KNOWN,
    LENGTH,
    NUMBER,
    OFFSET,
    RESULT,
    SEGMENT,
    SEQUENCE,
)
from kvstrata.transfer.native import fill_bytes, memcpy
from kvstrata.transfer.slot_header import (
    GOOD,
    HEADER_BYTES,
    WRONG_CHECKSUM,
    WRONG_HEADER,
    judge_header,
    make_header,
)
from kvstrata.transfer.xxh3 import copy_xxh3_64

Words = NDArray[Any]
Column = NDArray[np.int64]


@kernel
def pack_slots(rows: Words, space: Words) -> Any:
    """Copy blocks from ADDRESS into slots at OFFSET, with headers. space: the namespace's digest, (4,).

    One pass over the bytes copies and sums them. CHECKSUM is filled but where it is KNOWN; RESULT is 0.
    """
    for row in range(len(rows)):
        op = rows[row]
        page, length = op[OFFSET], op[LENGTH]
        payload = page + PAGE
        digest = copy_xxh3_64(payload, op[ADDRESS], length)
        if not op[FLAGS] & KNOWN:
            op[CHECKSUM] = digest
        fill_bytes(payload + length, 0, -length % PAGE)
        fill_bytes(page + HEADER_BYTES, 0, PAGE - HEADER_BYTES)
        make_header(
            page, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], space, op[SEGMENT], op[NUMBER], length,
            op[CHECKSUM], op[SEQUENCE], op[CREATED_MS], op[EXPIRES_MS],
        )  # fmt: skip
        op[RESULT] = GOOD


@kernel
def judge_slots(rows: Words, end: int) -> Any:
    """Verify slots at OFFSET while their payload is copied to ADDRESS, and to COPY_TO where that is not 0.

    end: address behind the last byte that may be read; a slot that reaches behind it is not whole.
    """
    for row in range(len(rows)):
        op = rows[row]
        page, length = op[OFFSET], op[LENGTH]
        if page + PAGE + length > end:
            op[RESULT] = WRONG_HEADER
            continue
        verdict = judge_header(
            page, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], op[SEGMENT], op[NUMBER], length, op[CHECKSUM]
        )
        if verdict == GOOD:
            if copy_xxh3_64(op[ADDRESS], page + PAGE, length) != op[CHECKSUM]:
                verdict = WRONG_CHECKSUM
            elif op[COPY_TO]:
                memcpy(op[COPY_TO], page + PAGE, length)
        op[RESULT] = verdict


def warm_kernels() -> None:
    """Load or compile both now: a request's deadline does not wait for a compiler."""
    none = np.zeros((0, COLUMNS), dtype=np.int64)
    pack_slots(none, np.zeros(4, dtype=np.int64))
    judge_slots(none, 0)


def merged_ranges(starts: Column, ends: Column, *, gap_bytes: int, limit_bytes: int) -> list[Column]:
    """Numbers of the ranges that are fetched by one request each, every range in one of them.

    Ranges with at most `gap_bytes` between them go together, as long as what is fetched, gaps included, is
    no longer than `limit_bytes` (or one range is, by itself).
    """
    order = np.argsort(starts, kind="stable")
    groups: list[Column] = []
    begin, first, reach = 0, 0, 0
    for place, number in enumerate(order.tolist()):
        start, end = int(starts[number]), int(ends[number])
        if place and (start - reach > gap_bytes or max(end, reach) - first > limit_bytes):
            groups.append(order[begin:place])
            begin = place
        if place == begin:
            first, reach = start, end
        reach = max(reach, end)
    if len(order):
        groups.append(order[begin:])
    return groups


def request_bytes(total: int, requests: int, least: int, most: int) -> int:
    """How long a request may be, so that `total` bytes keep so many of them busy."""
    return min(most, max(least, -(-total // requests)))
