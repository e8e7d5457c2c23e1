"""Copies blocks that live from several extents into a new one, each checked on the way. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstrata.tiers.nvme_format import SlotHeader
from kvstrata.tiers.shared.batches import Added
from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.extent_file import Entries, Footer
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.medium import Medium
from kvstrata.transfer.buffers import PAGE

CHUNK_BYTES = 4 * 2**20
"""Read at once, at least one slot; the memory that rewriting takes is twice that."""
WORD_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Source:
    """An extent, and its entries that are to be kept."""

    extent: Extent
    entries: Entries


@dataclass(slots=True)
class Progress:
    """damaged: blocks left out, their bytes are not what was saved. reading: the extent being read."""

    damaged: int = 0
    reading: ExtentId | None = None


def rewrite(
    medium: Medium, sources: Sequence[Source], target: ExtentId, progress: Progress
) -> Added | None:
    """Publish `target` with the blocks of `sources`, all of one namespace and stride.

    None if no block was left: then nothing is published. Raises OSError; progress.reading tells then
    whether it was a source that could not be read.
    """
    first = sources[0].extent
    copy = _Copy(medium, target, first.stride, first.namespace, progress)
    pieces = copy.pieces(sources)
    # Nothing is written before the first whole block is found.
    head = b""
    while not copy.kept and (piece := next(pieces, None)) is not None:
        head = piece
    if not copy.kept:
        return None
    file_bytes = medium.write_extent(target.name, _with_footer(head, pieces, copy))
    return Added(target, file_bytes, first.stride, first.namespace, copy.entries(), adopted=True)


def _with_footer(head: bytes, pieces: Iterator[bytes], copy: _Copy) -> Iterator[bytes]:
    yield head
    yield from pieces
    yield copy.footer().encode()


class _Copy:
    """The copy while it grows. kept: blocks so far."""

    def __init__(
        self, medium: Medium, target: ExtentId, stride: int, namespace: bytes, progress: Progress
    ) -> None:
        self.kept = 0
        self._medium = medium
        self._target = target
        self._stride = stride
        self._namespace = namespace
        self._progress = progress
        self._entries: list[Entries] = []
        self._segment = target.segment & WORD_MASK

    def pieces(self, sources: Sequence[Source]) -> Iterator[bytes]:
        """Slots of the target, in order; an empty piece where nothing could be kept."""
        start = 0
        for source in sources:
            entries = source.entries[np.argsort(source.entries["number"], kind="stable")]
            # Sequences of several writers do not compare: the copy counts its own, in the sources' order.
            ranks = np.empty(len(entries), np.int64)
            ranks[np.argsort(entries["sequence"], kind="stable")] = np.arange(len(entries))
            start += len(entries)
            for begin, end in _runs(entries["number"], max(1, CHUNK_BYTES // self._stride)):
                yield self._move(source.extent, entries[begin:end], start - len(entries) + ranks[begin:end])

    def _move(self, extent: Extent, entries: Entries, sequences: NDArray[np.int64]) -> bytes:
        stride, first = self._stride, int(entries["number"][0])
        self._progress.reading = extent.id
        data = self._medium.read_extent(extent.id.name, first * stride, len(entries) * stride) or b""
        self._progress.reading = None
        buffer = bytearray(data)
        good: list[int] = []
        for row in range(len(entries)):
            slot = memoryview(buffer)[row * stride : (row + 1) * stride]
            header = self._checked(slot, extent, entries[row])
            if header is None:
                self._progress.damaged += 1
                continue
            moved = replace(
                header,
                segment_id=self._segment,
                number=self.kept + len(good),
                sequence=int(sequences[row]),
            )
            moved.pack_into(slot)
            good.append(row)
        kept = entries[good].copy()
        kept["number"] = np.arange(self.kept, self.kept + len(good))
        kept["sequence"] = sequences[good]
        self._entries.append(kept)
        self.kept += len(good)
        if len(good) == len(entries):
            return bytes(buffer)
        return b"".join(bytes(buffer[row * stride : (row + 1) * stride]) for row in good)

    def _checked(self, slot: memoryview, extent: Extent, entry: np.void) -> SlotHeader | None:
        """The header of a whole block that is the one of this entry."""
        header = SlotHeader.unpack(slot)
        length = int(entry["length"])
        if (
            header is None
            or len(slot) < PAGE + length
            or header.key != bytes(entry["key"])
            or header.namespace != extent.namespace
            or header.segment_id != extent.id.segment & WORD_MASK
            or header.number != entry["number"]
            or header.length != length
            or header.checksum != entry["checksum"]
            or header.checksum != xxhash.xxh3_64_intdigest(slot[PAGE : PAGE + length])
        ):
            return None
        return header

    def entries(self) -> Entries:
        return np.concatenate(self._entries)

    def footer(self) -> Footer:
        return Footer(self._target, self._stride, self._namespace, self.kept, self.entries())


def _runs(numbers: NDArray[np.uint32], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours, at most so many at once, of ascending numbers."""
    begin = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or end - begin == most or numbers[end] != numbers[end - 1] + 1:
            yield begin, end
            begin = end
