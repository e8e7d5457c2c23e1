"""What an error of the medium costs: no block at once; and words that must outlive who said them."""

from __future__ import annotations

import numpy as np

from kvstrata.tiers.shared.batches import Added, Batch, BatchKind
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.descriptors import Descriptors
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.strikes import REMEMBERED, Strikes
from kvstrata.types import BlockKey

A, B, C = 0xA, 0xB, 0xC
EXTENT = ExtentId(A, 1)


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "big"))


def test_a_block_is_lost_at_its_second_error_after_a_pause() -> None:
    now = 0.0
    strikes = Strikes(5.0, clock=lambda: now)
    assert not strikes.out(key(1))
    now = 4.0
    assert not strikes.out(key(1)), "it failed together with the first"
    now = 6.0
    assert not strikes.out(key(2))
    assert strikes.out(key(1))
    assert not strikes.out(key(1)), "it is forgotten, and may be stored again"


def test_few_blocks_are_remembered() -> None:
    now = 0.0
    strikes = Strikes(5.0, clock=lambda: now)
    for number in range(REMEMBERED + 1):
        strikes.out(key(number))
    now = 6.0
    assert not strikes.out(key(0)), "the oldest is forgotten"
    assert strikes.out(key(REMEMBERED))


def test_files_that_failed_are_closed_once_nobody_uses_them() -> None:
    closed: list[int] = []
    files = Descriptors(10, closed.append)
    others = ExtentId(A, 2)
    for extent, fd in ((EXTENT, 7), (others, 8)):
        files.add(extent, fd, direct=False)
    files.forget_segments({EXTENT.segment, 12345})
    assert closed == []
    files.release([EXTENT, others])
    assert closed == [7]
    assert files.acquire(EXTENT) is None
    files.forget_all()
    assert closed == [7, 8]


def added(member: int, *, adopted: bool = False) -> Batch:
    entries = np.zeros(1, ENTRY_DTYPE)
    return Batch(BatchKind.ADD, 0, 0, (Added(EXTENT, 4096, 4096, bytes(32), entries, adopted),))


def test_who_still_names_what_is_gone() -> None:
    """In whatever order the journals are read."""
    for order in ((0, 1, 2), (2, 0, 1), (0, 2, 1)):
        catalog = Catalog()
        words = [
            (A, added(A)),
            (B, added(B, adopted=True)),
            (C, Batch(BatchKind.GONE, 0, 0, gone=(EXTENT,))),
        ]
        for number in order:
            catalog.apply(*words[number])
        assert catalog.still_named({A}) == catalog.still_named({B, C}) == [EXTENT]
        assert catalog.still_named({C}) == []
        # Who begins a new journal names it no more.
        catalog.apply(B, Batch(BatchKind.SNAPSHOT, 1, 0))
        assert catalog.still_named({B, C}) == []
        assert catalog.still_named({A}) == [EXTENT]
        catalog.check_integrity()
