"""What blocks does a folder hold? Answered when the tier opens: by the index where it can be trusted, else
by reading slot headers. Reads only; nothing here decides what stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from kvstrata.table import TableEntry, unix_ms
from kvstrata.tiers.nvme_folder import SegmentFile
from kvstrata.tiers.nvme_format import IndexFile, SlotHeader, index_entries, slot_offset
from kvstrata.tiers.nvme_scan import SlotState, scan_segment
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockKey


@dataclass(frozen=True, slots=True)
class PlacedSegment:
    """A segment file, opened, and the first of the table's slots that it backs."""

    file: SegmentFile
    first_slot: int
    fd: int


class Restoration:
    """segments: all of one stride. payload_bytes: of a slot. threads: that read headers at a time.

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
        threads: int,
        dropped: Counter[str],
    ) -> None:
        self._io = io
        self._segments = segments
        self._index = index if index is not None and index.stride == stride else None
        self._stride = stride
        self._payload_bytes = payload_bytes
        self._threads = threads
        self._dropped = dropped
        self._now = unix_ms()

    def entries(self) -> tuple[list[TableEntry], bool]:
        """Entries coldest first, and whether nothing had to be scanned.

        What the index knew is in the policy's order; what had to be scanned is in the order of saving, and
        counts as colder.
        """
        trusted = self._trusted()
        indexed = index_entries(self._index.entries) if self._index is not None else []
        known = [
            replace(entry, slot=trusted[row].first_slot + slot)
            for row, slot, entry in indexed
            if row in trusted
        ]
        first_slots = {segment.first_slot for segment in trusted.values()}
        unknown = [segment for segment in self._segments if segment.first_slot not in first_slots]
        scanned: list[TableEntry] = []
        with ThreadPoolExecutor(self._threads, "kvstrata-scan") as pool:
            for segment in unknown:
                scanned += self._scan(segment, pool)
        if unknown:
            self._count_lost(indexed, trusted, scanned)
        scanned.sort(key=lambda entry: entry.sequence)
        alive = [entry for entry in known if not self._expired(entry.expires_ms)]
        return scanned + alive, bool(trusted) and not unknown

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

    def _count_lost(
        self,
        indexed: list[tuple[int, int, TableEntry]],
        trusted: dict[int, PlacedSegment],
        scanned: list[TableEntry],
    ) -> None:
        """Blocks that the index knew in a segment that was changed since, and that are not there now."""
        if self._index is None:
            return
        present = {segment.file.header.segment_id for segment in self._segments}
        rows = self._index.segments["id"].tolist()
        found = {entry.key for entry in scanned}
        for row, _, entry in indexed:
            changed = row not in trusted and rows[row] in present
            self._dropped["slot_lost"] += changed and entry.key not in found

    def _expired(self, expires_ms: int) -> bool:
        expired = bool(expires_ms) and expires_ms <= self._now
        self._dropped["expired"] += expired
        return expired

    def _scan(self, segment: PlacedSegment, pool: ThreadPoolExecutor) -> list[TableEntry]:
        entries = []
        for slot in scan_segment(self._io, segment.fd, segment.file, pool):
            header = slot.header
            if slot_offset(slot.number + 1, self._stride) > segment.file.size:
                self._dropped["slot_missing"] += 1  # the file was cut off here
            elif slot.state is not SlotState.USED or header is None:
                if slot.state is not SlotState.EMPTY:
                    self._dropped[f"slot_{slot.state.value}"] += 1
            elif header.length > self._payload_bytes:
                self._dropped["slot_damaged"] += 1
            elif not self._expired(header.expires_ms):
                entries.append(_entry(header, segment.first_slot + slot.number))
        return entries


def _entry(header: SlotHeader, slot: int) -> TableEntry:
    return TableEntry(
        BlockKey(header.key), slot, header.length, header.checksum, header.sequence, header.expires_ms
    )
