"""Reading slot headers off segments: how an index is rebuilt, and what inspect and verify look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

from kvstrata.tiers.nvme_folder import SegmentFile
from kvstrata.tiers.nvme_format import SlotHeader, slot_offset
from kvstrata.transfer.buffers import PAGE, Arena
from kvstrata.transfer.file_io import FileIO

SLOTS_PER_TASK = 256


class SlotState(Enum):
    """What the header of one slot says."""

    EMPTY = "empty"
    """All zero: never written, or dropped on purpose."""
    USED = "used"
    DAMAGED = "damaged"
    MISPLACED = "misplaced"
    """An intact header of another place."""
    MISSING = "missing"
    """Beyond the end of a truncated file."""


@dataclass(frozen=True, slots=True)
class ScannedSlot:
    number: int
    state: SlotState
    header: SlotHeader | None = None


def judge_slot(page: memoryview, read: int, segment_id: int, number: int) -> ScannedSlot:
    """page: the slot's first page as read, `read` bytes of it."""
    if read < PAGE:
        return ScannedSlot(number, SlotState.MISSING)
    header = SlotHeader.unpack(page)
    if header is None:
        empty = not any(page)
        return ScannedSlot(number, SlotState.EMPTY if empty else SlotState.DAMAGED)
    if header.segment_id != segment_id or header.number != number:
        return ScannedSlot(number, SlotState.MISPLACED, header)
    return ScannedSlot(number, SlotState.USED, header)


def scan_segment(
    io: FileIO, fd: int, segment: SegmentFile, pool: ThreadPoolExecutor
) -> Iterator[ScannedSlot]:
    """State of every slot of a segment, in order, read by the pool's threads."""
    header = segment.header

    def scan(first: int) -> list[ScannedSlot]:
        page = Arena(PAGE)
        found = []
        for number in range(first, min(first + SLOTS_PER_TASK, header.slots)):
            offset = slot_offset(number, header.stride)
            # O_DIRECT answers an error, not a short read, where a file ends at an odd place.
            read = io.read(fd, [page.view], offset) if offset + PAGE <= segment.size else 0
            found.append(judge_slot(page.view, read, header.segment_id, number))
        page.close()
        return found

    for found in pool.map(scan, range(0, header.slots, SLOTS_PER_TASK)):
        yield from found


ProgressHook = Callable[[int, int], None]
"""Told now and then how many slots are done, and how many there are."""
