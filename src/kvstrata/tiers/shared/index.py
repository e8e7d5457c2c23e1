"""SharedIndex: where each block of one namespace lies among the extents of a shared folder. No I/O.

It joins three things under one lock: a row per copy of a block (`IdColumns`), which copy of a block is
found (`KeyChains`), and the extents by number (`Places`). Every method takes whole batches.

What a request touched goes to `on_touch`, for this member's access log: who leaves is decided elsewhere, by
whoever collects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.table import (
    Column,
    Placement,
    Placements,
    Recorded,
    find_all,
    indices_of,
    shift_pins,
    unix_ms,
)
from kvstrata.tiers.shared.catalog import Change, Extent
from kvstrata.tiers.shared.extent_file import Entries
from kvstrata.tiers.shared.extents import ExtentWriter, OpenExtent
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.id_columns import DOOMED, FREE, RESERVED, RESIDENT, IdColumns
from kvstrata.tiers.shared.key_chains import KeyChains
from kvstrata.tiers.shared.places import Place, Places, counted
from kvstrata.types import BlockKey, Lookup

Words = NDArray[np.uint64]


class SharedIndex:
    """namespace, stride: of the extents that it knows. writer: where new blocks find room.

    on_touch: (request, first 8 bytes of keys) of blocks that were there. on_duplicates, on_expired: counts.
    used_bytes, capacity_bytes: of the whole folder, for people. All of them are called outside the lock,
    by whoever caused them.
    """

    def __init__(
        self,
        writer: ExtentWriter,
        *,
        namespace: bytes,
        stride: int,
        batch_blocks: int = 16_384,
        clock_ms: Callable[[], int] = unix_ms,
        on_touch: Callable[[int, Words], None] = lambda request, words: None,
        on_duplicates: Callable[[int], None] = lambda count: None,
        on_expired: Callable[[int], None] = lambda count: None,
        on_refused: Callable[[int], None] = lambda count: None,
        used_bytes: Callable[[], int] = lambda: 0,
        capacity_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.batch_blocks = batch_blocks
        self.stride = stride
        self._namespace = namespace
        self._writer = writer
        self._clock_ms = clock_ms
        self._on_touch = on_touch
        self._on_duplicates = on_duplicates
        self._on_expired = on_expired
        self._on_refused = on_refused
        self._used_bytes = used_bytes
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._reserved: dict[BlockKey, int] = {}
        self._ids = IdColumns()
        self._chains = KeyChains(self._ids)
        self._places = Places()
        self._next_sequence = 1

    # What is there

    def lookup(self, keys: Sequence[BlockKey]) -> list[Lookup]:
        with self._swept():
            resident = self._chains.found
            if all(key in resident for key in keys):
                return [Lookup.HIT] * len(keys)
            reserved = self._reserved
            return [
                Lookup.HIT if key in resident else Lookup.PENDING if key in reserved else Lookup.MISS
                for key in keys
            ]

    def pin(self, keys: Sequence[BlockKey]) -> list[Placement]:
        """`pin_all`, one by one."""
        return list(self.pin_all(keys))

    def pin_all(self, keys: Sequence[BlockKey]) -> Placements:
        with self._swept():
            positions, indices, kept = find_all(keys, self._chains.found)
            shift_pins(self._ids.pins, indices, 1)
            return self._ids.placements(positions, indices, kept)

    def unpin(self, placements: Placements | Sequence[Placement]) -> None:
        indices = indices_of(placements)
        with self._lock:
            self._unpin(indices)

    def _unpin(self, indices: Column) -> None:
        least = shift_pins(self._ids.pins, indices, -1)
        assert least >= 0, "a placement was unpinned twice"
        ended = indices[(self._ids.pins[indices] == 0) & (self._ids.state[indices] == DOOMED)]
        if len(ended):
            self._release(np.unique(ended))

    def extents_of(self, indices: Column) -> tuple[Column, dict[int, OpenExtent | Place]]:
        """For pinned ids: the number of each one's extent, and the extents by number."""
        with self._lock:
            numbers = self._ids.extent[indices].astype(np.int64)
            return numbers, {number: self._places[number] for number, _ in counted(numbers)}

    # What this member writes

    def record(
        self,
        keys: Sequence[BlockKey],
        admit: Sequence[bool] | None = None,
        *,
        request: int,
        ttl_seconds: float = 0.0,
    ) -> Recorded:
        assert len(keys) <= self.batch_blocks, "the batch is larger than batch_blocks"
        hits: list[int] = []
        fresh: list[int] = []
        refused: list[int] = []
        with self._swept():
            resident, reserved = self._chains.found, self._reserved
            if len(keys) and all(key in resident for key in keys):
                hits = list(range(len(keys)))
            else:
                seen: set[BlockKey] = set()
                for position, key in enumerate(keys):
                    if key in seen:
                        continue
                    seen.add(key)
                    if key in resident or key in reserved:
                        hits.append(position)
                    elif admit is not None and admit[position]:
                        fresh.append(position)
            placed, refused = self._reserve(keys, fresh, ttl_seconds)
        if refused:
            self._on_refused(len(refused))
        if hits:
            self._on_touch(request, np.frombuffer(b"".join([keys[n][:8] for n in hits]), np.uint64))
        return Recorded(hits, placed, refused, 0)

    def _reserve(
        self, keys: Sequence[BlockKey], fresh: list[int], ttl_seconds: float
    ) -> tuple[Placements, list[int]]:
        runs = self._writer.reserve(len(fresh)) if fresh else []
        count = sum(run.count for run in runs)
        taken, refused = fresh[:count], fresh[count:]
        ids = self._ids.take(count)
        kept = [keys[position] for position in taken]
        # The deepest block is the oldest: whoever rebuilds an order from these leaves leaf first.
        sequences = self._next_sequence + np.arange(count - 1, -1, -1)
        self._next_sequence += count
        at = 0
        for run in runs:
            part = ids[at : at + run.count]
            self._ids.extent[part] = self._places.number_of(run.extent)
            self._ids.slot[part] = np.arange(run.first, run.first + run.count)
            run.extent.reserved(run.first, kept[at : at + run.count], part)
            at += run.count
        expires_ms = self._clock_ms() + int(ttl_seconds * 1000) if ttl_seconds else 0
        self._ids.reserve(ids, sequences, expires_ms)
        self._reserved.update(zip(kept, ids.tolist(), strict=True))
        return self._ids.placements(np.array(taken, np.int64), ids, kept), refused

    def commit(self, placement: Placement, *, length: int, checksum: int) -> None:
        """`commit_all` of one."""
        word = np.array([checksum], dtype=np.uint64).view(np.int64)
        self._commit([placement.key], np.array([placement.index], np.int64), np.array([length]), word)

    def commit_all(self, placements: Placements, lengths: Column, checksums: Column) -> None:
        self._commit(placements.keys, placements.indices, lengths, checksums)

    def _commit(self, keys: list[BlockKey], ids: Column, lengths: Column, checksums: Column) -> None:
        with self._lock:
            duplicates = self._make_resident(keys, ids, lengths, checksums)
        if duplicates:
            self._on_duplicates(duplicates)

    def _make_resident(self, keys: list[BlockKey], ids: Column, lengths: Column, checksums: Column) -> int:
        columns = self._ids
        assert (columns.state[ids] == RESERVED).all(), "only a reserved block can be committed"
        columns.length[ids] = lengths
        columns.checksum[ids] = checksums
        extents = columns.extent[ids]
        for number, _ in counted(extents):
            place, part = self._places.opened(number), ids[extents == number]
            expires_ms = columns.expires_ms[part]
            place.commit(
                columns.slot[part], columns.length[part], columns.checksum[part], expires_ms,
                columns.sequence[part],
            )  # fmt: skip
            self._places.expect_expiry(place, expires_ms)
        for key in keys:
            del self._reserved[key]
        duplicates = self._chains.settle(keys, ids)
        self._writer.ended(self._open_places(ids))
        self._unpin(ids)
        return duplicates

    def _open_places(self, ids: Column) -> list[tuple[OpenExtent, int]]:
        """The extents that these reserved slots lie in, and how many in each."""
        return [(self._places.opened(number), count) for number, count in counted(self._ids.extent[ids])]

    def abort_all(self, placements: Placements) -> None:
        self._abort(placements.keys, placements.indices)

    def abort(self, placement: Placement) -> None:
        """`abort_all` of one."""
        self._abort([placement.key], np.array([placement.index], np.int64))

    def _abort(self, keys: list[BlockKey], ids: Column) -> None:
        with self._lock:
            for key in keys:
                del self._reserved[key]
            self._ids.state[ids] = DOOMED
            self._writer.ended(self._open_places(ids))
            self._unpin(ids)

    # What others publish, and what goes

    def take_in(self, change: Change) -> tuple[int, int]:
        """Extents that came and went; returns blocks added, and lost. Other namespaces are passed over.

        An extent that this member wrote is known already: it is published now.
        """
        duplicates = added = gone = 0
        for extent in change.added:
            if extent.namespace != self._namespace or extent.stride != self.stride:
                continue
            with self._lock:  # look-ups have a turn between two extents
                number = self._places.numbers.get(extent.id)
                if number is None:
                    duplicates += self._add(extent)
                    added += len(extent.entries)
                else:
                    self._places.publish(number, extent)
        for extent in change.gone:
            gone += self.forget(extent.id)
        if duplicates:
            self._on_duplicates(duplicates)
        return added, gone

    def forget(self, extent: ExtentId) -> int:
        """Nobody can read this extent: its blocks leave. Returns how many could be loaded before."""
        with self._lock:
            return self._remove(extent)

    def _add(self, extent: Extent) -> int:
        entries = extent.entries
        ids = self._ids.take(len(entries))
        self._ids.fill(ids, self._places.add(extent, ids), entries)
        return self._chains.settle(entries["key"].tolist(), ids)

    def _remove(self, extent: ExtentId) -> int:
        number = self._places.numbers.pop(extent, None)
        if number is None:
            return 0
        place = self._places[number]
        place.gone = True
        keys, ids, mine = self._loadable(number, place)
        rows = np.flatnonzero(mine).tolist()
        for row in rows:
            self._chains.detach(keys[row], int(ids[row]))
        leaving = ids[mine].astype(np.int64)
        self._ids.state[leaving] = DOOMED
        self._release(leaving[self._ids.pins[leaving] == 0])
        self._places.drop(number)
        return len(rows)

    def _loadable(
        self, number: int, place: OpenExtent | Place
    ) -> tuple[list[BlockKey], NDArray[Any], NDArray[np.bool_]]:
        """Keys and ids of an extent's blocks, and which of them are still there.

        An id whose block left may be in use for another block by now, in another slot or extent.
        """
        keys, ids, slots = place.blocks()
        there = (self._ids.extent[ids] == number) & (self._ids.slot[ids] == slots)
        return keys, ids, there & (self._ids.state[ids] == RESIDENT)

    def drop(self, placement: Placement) -> bool:
        with self._lock:
            index = placement.index
            if self._ids.state[index] != RESIDENT:
                return False
            self._chains.detach(placement.key, index)
            self._ids.state[index] = DOOMED
            return True

    def discard(self, keys: Sequence[BlockKey]) -> int:
        found = 0
        with self._lock:
            for key in keys:
                index = self._chains.found.get(key)
                if index is None:
                    continue
                found += 1
                while index is not None:
                    self._leave(key, index)
                    index = self._chains.found.get(key)
        return found

    def _leave(self, key: BlockKey, index: int) -> None:
        self._chains.detach(key, index)
        self._ids.state[index] = DOOMED
        if self._ids.pins[index] == 0:
            self._release(np.array([index], np.int64))

    def _release(self, ids: Column) -> None:
        """These ids end here. All of them lie in some extent, and nobody finds or pins them."""
        if len(ids):
            extents = self._ids.extent[ids]
            self._ids.free(ids)
            self._places.give_back(extents)

    # Time to live

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """The lock, with expired blocks out of the way; who asked to hear of them does so after it."""
        expired = 0
        with self._lock:
            first = self._places.first_expiry_ms
            if first and first <= (now := self._clock_ms()):
                expired = self._expire(now)
            yield
        if expired:
            self._on_expired(expired)

    def _expire(self, now: int) -> int:
        expired = 0
        for number in self._places.due(now):
            place = self._places[number]
            keys, ids, here = self._loadable(number, place)
            here &= self._ids.expires_ms[ids] > 0
            due = here & (self._ids.expires_ms[ids] <= now)
            self._places.expect_expiry(place, self._ids.expires_ms[ids[here & ~due]])
            for row in np.flatnonzero(due).tolist():
                self._leave(keys[row], int(ids[row]))
            expired += int(np.count_nonzero(due))
        return expired

    # What an operator sees

    def chunk(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        with self._lock:
            ids = [index for key in keys if (index := self._chains.found.get(key)) is not None]
            found: dict[BlockKey, None] = {}
            for number in np.unique(self._ids.extent[np.array(ids, np.int64)]).tolist():
                place = self._places[number]
                if isinstance(place, Place):
                    found.update(
                        (key, None) for key in place.entries["key"].tolist() if key in self._chains.found
                    )
            return list(found)

    @property
    def resident_blocks(self) -> int:
        return len(self._chains.found)

    @property
    def extents(self) -> int:
        """Extents that blocks of this index lie in."""
        return len(self._places.numbers)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes()

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes()

    def pinned_blocks(self) -> int:
        with self._lock:
            return int(np.count_nonzero(self._ids.pins))

    def entries(self) -> Entries:
        """Every block that look-ups find, as a row of ENTRY_DTYPE, in the order in which it came."""
        with self._swept():
            keys = list(self._chains.found)
            ids = np.fromiter(self._chains.found.values(), np.int64, len(keys))
            return self._ids.entries(keys, ids)

    def check_integrity(self) -> None:
        with self._lock:
            ids = self._ids
            ids.check_integrity()
            self._chains.check_integrity()
            self._places.check_integrity(ids.extent[: ids.top][ids.state[: ids.top] != FREE])
            assert set(self._reserved.values()) == ids.within(RESERVED)
