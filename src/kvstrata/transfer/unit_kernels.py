"""Slots of one unit on their way between files and memory, for a mover that is not the I/O engine.

Headers are made in pages apart from the payloads, and judged there, exactly as the engine does it. Rows are
the engine's. No I/O here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.engine_kernels import (
    ADDRESS,
    BOUNCE,
    CHECKSUM,
    COLUMNS,
    COPY_TO,
    CREATED_MS,
    DIRECT,
    EXPIRES_MS,
    FD,
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
from kvstrata.transfer.native import fill_bytes, memcpy, store_i64
from kvstrata.transfer.slot_header import GOOD, WRONG_CHECKSUM, judge_header, make_header
from kvstrata.transfer.xxh3 import copy_xxh3_64, xxh3_64

Words = NDArray[Any]


@kernel
def lay_out(rows: Words, pages: int, bounce: int, memory: Words, extents: Words) -> Any:
    """Two pieces per row, header and payload: memory (address, bytes, 0) and extents (offset, bytes, fd).

    pages: address of a page a row. bounce: where the payload of the only row goes that cannot go straight.
    """
    for row in range(len(rows)):
        op = rows[row]
        page, payload, moved = pages + row * PAGE, op[ADDRESS], op[LENGTH]
        if op[FLAGS] & DIRECT:
            moved = (moved + PAGE - 1) // PAGE * PAGE
        if op[FLAGS] & BOUNCE:
            payload = bounce
        store_i64(page, 0)  # a read that ends early must not leave another block's header to be judged
        first, second = 2 * row, 2 * row + 1
        memory[first, 0], memory[first, 1], memory[first, 2] = page, PAGE, 0
        memory[second, 0], memory[second, 1], memory[second, 2] = payload, moved, 0
        extents[first, 0], extents[first, 1], extents[first, 2] = op[OFFSET], PAGE, op[FD]
        extents[second, 0], extents[second, 1], extents[second, 2] = op[OFFSET] + PAGE, moved, op[FD]


@kernel
def make_slots(rows: Words, pages: int, bounce: int, space: Words) -> Any:
    """Checksums and headers of a unit that is to be written. space: the namespace's digest, (4,)."""
    for row in range(len(rows)):
        op = rows[row]
        page, length = pages + row * PAGE, op[LENGTH]
        if op[FLAGS] & BOUNCE:
            digest = copy_xxh3_64(bounce, op[ADDRESS], length)
            fill_bytes(bounce + length, 0, -length % PAGE)
        elif not op[FLAGS] & KNOWN:
            digest = xxh3_64(op[ADDRESS], length)
        else:
            digest = op[CHECKSUM]
        if not op[FLAGS] & KNOWN:
            op[CHECKSUM] = digest
        make_header(
            page, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], space, op[SEGMENT], op[NUMBER], length,
            op[CHECKSUM], op[SEQUENCE], op[CREATED_MS], op[EXPIRES_MS],
        )  # fmt: skip
        op[RESULT] = GOOD


@kernel
def judge_unit(rows: Words, pages: int, bounce: int) -> Any:
    """Verify a unit that was read, and copy blocks to COPY_TO where that is not 0."""
    for row in range(len(rows)):
        op = rows[row]
        length = op[LENGTH]
        verdict = judge_header(
            pages + row * PAGE, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], op[SEGMENT], op[NUMBER], length,
            op[CHECKSUM],
        )  # fmt: skip
        if verdict == GOOD:
            if op[FLAGS] & BOUNCE:
                digest = copy_xxh3_64(op[ADDRESS], bounce, length)
                if op[COPY_TO] != 0:
                    memcpy(op[COPY_TO], bounce, length)
            elif op[COPY_TO] != 0:
                digest = copy_xxh3_64(op[COPY_TO], op[ADDRESS], length)
            else:
                digest = xxh3_64(op[ADDRESS], length)
            if digest != op[CHECKSUM]:
                verdict = WRONG_CHECKSUM
        op[RESULT] = verdict


def warm_kernels() -> None:
    """Load or compile all now: a request's deadline does not wait for a compiler."""
    none = np.zeros((0, COLUMNS), dtype=np.int64)
    pieces = np.zeros((0, 3), dtype=np.int64)
    lay_out(none, 0, 0, pieces, pieces)
    make_slots(none, 0, 0, np.zeros(4, dtype=np.int64))
    judge_unit(none, 0, 0)
