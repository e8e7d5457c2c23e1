"""What blocks does a folder hold? Answered when the tier opens: by the index where it can be trusted, else
by reading slot headers. Reads only; nothing here decides what stays.

Entries are rows of `kvstrata.table.ENTRY_DTYPE` throughout: a Python object per block would take longer
than reading its header does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.table import ENTRY_DTYPE, unix_ms
from kvstrata.tiers.nvme_folder import SegmentFile
from kvstrata.tiers.nvme_format import IndexFile, entries_of, slot_offset
from kvstrata.tiers.nvme_scan import STATES, ScannedSegment, SlotState, scan_segments
from kvstrata.transfer.file_io import FileIO

UNTRUSTED = -1


@dataclass(frozen=True, slots=True)
class PlacedSegment:
    """A segment file, opened, and the first of the table's slots that it backs."""

    file: SegmentFile
    first_slot: int
    fd: int


class Restoration:
    """segments: all of one stride. payload_bytes: of a slot.

    dropped counts, by reason, what was there and is not taken over.
    """

    def __init__(
        self,
        io: FileIO,
        segments: Sequence[PlacedSegment],
        index: IndexFile | None,
        *,
        stride: int,
        payload_bytes: int,
        dropped: Counter[str],
    ) -> None:
        self._io = io
        self._segments = segments
        self._index = index if index is not None and index.stride == stride else None
        self._stride = stride
        self._payload_bytes = payload_bytes
        self._dropped = dropped
        self._now = unix_ms()

    def entries(self) -> tuple[NDArray[Any], bool]:
        """Entries coldest first, and whether nothing had to be scanned.

        What the index knew is in the policy's order; what had to be scanned is in the order of saving, and
        counts as colder.
        """
        trusted = self._trusted()
        known = self._known(trusted)
        first_slots = {segment.first_slot for segment in trusted.values()}
        unknown = [segment for segment in self._segments if segment.first_slot not in first_slots]
        found = scan_segments(self._io, [(segment.fd, segment.file) for segment in unknown])
        parts = [self._used(*pair) for pair in zip(unknown, found, strict=True)]
        scanned = np.concatenate([np.zeros(0, ENTRY_DTYPE), *parts])
        scanned = scanned[np.argsort(scanned["sequence"], kind="stable")]
        if unknown:
            self._count_lost(trusted, scanned)
        return np.concatenate([scanned, self._unexpired(known)]), bool(trusted) and not unknown

    def _trusted(self) -> dict[int, PlacedSegment]:
        """Row of the index -> segment, for segments that nobody has written to since the index was made."""
        if self._index is None:
            return {}
        by_id = {segment.file.header.segment_id: segment for segment in self._segments}
        trusted = {}
        for row, (segment_id, _, size, mtime_ns) in enumerate(self._index.segments.tolist()):
            segment = by_id.get(segment_id)
            if segment is None:
                self._dropped["segment_missing"] += int(
                    np.count_nonzero(self._index.entries["segment"] == row)
                )
            elif (segment.file.size, segment.file.mtime_ns) == (size, mtime_ns):
                trusted[row] = segment
        return trusted

    def _known(self, trusted: dict[int, PlacedSegment]) -> NDArray[Any]:
        """What the index has of trusted segments, in its order."""
        if self._index is None:
            return np.zeros(0, ENTRY_DTYPE)
        first_slots = np.full(len(self._index.segments), UNTRUSTED, np.int64)
        for row, segment in trusted.items():
            first_slots[row] = segment.first_slot
        firsts = first_slots[self._index.entries["segment"]]
        rows = self._index.entries[firsts != UNTRUSTED]
        return entries_of(rows, firsts[firsts != UNTRUSTED] + rows["slot"])

    def _count_lost(self, trusted: dict[int, PlacedSegment], scanned: NDArray[Any]) -> None:
        """Blocks that the index knew in a segment that was changed since, and that are not there now."""
        if self._index is None:
            return
        present = {segment.file.header.segment_id for segment in self._segments}
        ids = self._index.segments["id"].tolist()
        changed = [row for row, one in enumerate(ids) if row not in trusted and one in present]
        indexed = self._index.entries[np.isin(self._index.entries["segment"], changed)]
        found = set(scanned["key"].tolist())
        self._dropped["slot_lost"] += sum(key not in found for key in indexed["key"].tolist())

    def _unexpired(self, entries: NDArray[Any]) -> NDArray[Any]:
        expired = (entries["expires_ms"] != 0) & (entries["expires_ms"] <= self._now)
        self._dropped["expired"] += int(np.count_nonzero(expired))
        left: NDArray[Any] = entries[~expired]
        return left

    def _used(self, segment: PlacedSegment, scanned: ScannedSegment) -> NDArray[Any]:
        """Entries of a segment's blocks, in the order of its slots."""
        whole = (segment.file.size - slot_offset(0, self._stride)) // self._stride
        whole = min(max(0, whole), len(scanned.states))
        self._dropped["slot_missing"] += len(scanned.states) - whole  # the file was cut off there
        states, headers = scanned.states[:whole], scanned.headers[:whole]
        for code, state in enumerate(STATES):
            if state not in (SlotState.USED, SlotState.EMPTY):
                self._dropped[f"slot_{state.value}"] += int(np.count_nonzero(states == code))
        fits = headers["length"] <= self._payload_bytes
        used = states == STATES.index(SlotState.USED)
        self._dropped["slot_damaged"] += int(np.count_nonzero(used & ~fits))
        numbers = np.flatnonzero(used & fits)
        return self._unexpired(entries_of(headers[numbers], segment.first_slot + numbers))
