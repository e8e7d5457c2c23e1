"""Blocks whose header travels beside them: made for a save, judged after a load. No I/O here.

The header is the first 256 bytes of a slot's (`slot_header`), but a place has no meaning: segment and
number are 0, and the checksum is the header's word, not a table's. Rows are the engine's; OFFSET is the
address of the header.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.transfer.engine_kernels import (
    ADDRESS,
    CHECKSUM,
    COLUMNS,
    COPY_TO,
    CREATED_MS,
    EXPIRES_MS,
    FLAGS,
    GONE,
    KEY,
    KEY_1,
    KEY_2,
    KEY_3,
    KNOWN,
    LENGTH,
    OFFSET,
    RESULT,
)
from kvstrata.transfer.native import load_i64, memcpy
from kvstrata.transfer.slot_header import (
    CHECKSUM_BYTE,
    EXPIRES_BYTE,
    GOOD,
    HEADER_BYTES,
    NAMESPACE_BYTE,
    WRONG_CHECKSUM,
    WRONG_KEY,
    judge_header,
    make_header,
)
from kvstrata.transfer.xxh3 import copy_xxh3_64, xxh3_64

Words = NDArray[Any]


@kernel
def make_headers(rows: Words, space: Words, joined: bool) -> Any:
    """Write the headers at OFFSET of the payloads at ADDRESS. space: the namespace's digest, (4,).

    CHECKSUM is filled but where it is KNOWN. joined: payloads are copied right behind their headers.
    """
    for row in range(len(rows)):
        op = rows[row]
        length = op[LENGTH]
        if joined:
            digest = copy_xxh3_64(op[OFFSET] + HEADER_BYTES, op[ADDRESS], length)
        elif op[FLAGS] & KNOWN:
            digest = op[CHECKSUM]
        else:
            digest = xxh3_64(op[ADDRESS], length)
        if not op[FLAGS] & KNOWN:
            op[CHECKSUM] = digest
        make_header(
            op[OFFSET], op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], space, 0, 0, length, op[CHECKSUM], 0,
            op[CREATED_MS], op[EXPIRES_MS],
        )  # fmt: skip


@kernel
def judge_blocks(rows: Words, space: Words, now_ms: int, joined: bool) -> Any:
    """Verify rows whose RESULT is 0, and copy them to COPY_TO where that is not 0.

    The payload lies at ADDRESS; joined: behind its header, and is copied to ADDRESS. RESULT becomes a
    verdict of `slot_header`, or GONE for a block that has expired. CHECKSUM is that of the header.
    """
    for row in range(len(rows)):
        op = rows[row]
        if op[RESULT] != GOOD:
            continue
        page, length = op[OFFSET], op[LENGTH]
        op[CHECKSUM] = load_i64(page + CHECKSUM_BYTE)
        verdict = judge_header(page, op[KEY], op[KEY_1], op[KEY_2], op[KEY_3], 0, 0, length, op[CHECKSUM])
        if verdict == GOOD:
            for word in range(4):
                if load_i64(page + NAMESPACE_BYTE + 8 * word) != space[word]:
                    verdict = WRONG_KEY
        if verdict == GOOD:
            expires = load_i64(page + EXPIRES_BYTE)
            if expires != 0 and expires <= now_ms:
                op[RESULT] = GONE
                continue
            if joined:
                digest = copy_xxh3_64(op[ADDRESS], page + HEADER_BYTES, length)
            elif op[COPY_TO] != 0:
                digest = copy_xxh3_64(op[COPY_TO], op[ADDRESS], length)
            else:
                digest = xxh3_64(op[ADDRESS], length)
            if digest != op[CHECKSUM]:
                verdict = WRONG_CHECKSUM
            elif joined and op[COPY_TO] != 0:
                memcpy(op[COPY_TO], op[ADDRESS], length)
        op[RESULT] = verdict


def warm_kernels() -> None:
    """Load or compile both now: a request's deadline does not wait for a compiler."""
    none = np.zeros((0, COLUMNS), dtype=np.int64)
    space = np.zeros(4, dtype=np.int64)
    make_headers(none, space, False)
    judge_blocks(none, space, 0, False)
