"""SharedIndex: where each block of one namespace lies among the extents of a shared folder. No I/O.

A block is an id: an index into columns of extent, slot, length, checksum and pins. The first id that is
known for a key is what look-ups find; ids of the same key in other extents wait as its alternates, and take
its place when it leaves. The states of an id:

    free -> RESERVED (a slot of an extent that this member writes) -> RESIDENT -> free
                                   \\-> DOOMED (left, but still pinned) -> free

One lock guards all of it, and every method takes whole batches. What a request touched goes to `on_touch`,
for this member's access log: who leaves is decided elsewhere, by whoever collects.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstrata.table import Column, Placement, Placements, Recorded, shift_pins, unix_ms
from kvstrata.tiers.shared.catalog import Change, Extent
from kvstrata.tiers.shared.extents import ExtentWriter, OpenExtent
from kvstrata.tiers.shared.format import ENTRY_DTYPE, Entries, ExtentId
from kvstrata.types import BlockKey, Lookup

FREE, RESERVED, RESIDENT, DOOMED = range(4)
NONE = -1
FIRST_IDS = 1024

Words = NDArray[np.uint64]


class Located(Protocol):
    """An extent as whoever moves its bytes sees it: an `OpenExtent`, or a `Place` of the index."""

    id: ExtentId
    segment: int
    stride: int
    published: bool
    place: Any


@dataclass(slots=True, eq=False)
class Place:
    """A published extent of this index. ids: of its entries, in their order. place: the medium's own.

    held: ids that are not free; with none, and gone, its number is free again. noted_ms: when the first
    of its blocks will expire, as far as that is noted.
    """

    id: ExtentId
    segment: int
    stride: int
    entries: Entries
    ids: NDArray[np.int32]
    held: int
    gone: bool = False
    noted_ms: int = 0
    published: bool = True
    place: Any = None

    def blocks(self) -> tuple[list[BlockKey], NDArray[Any], NDArray[Any]]:
        """Keys, ids and slots of what was there when it was published."""
        return self.entries["key"].tolist(), self.ids, self.entries["number"]


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
        self._resident: dict[BlockKey, int] = {}
        self._reserved: dict[BlockKey, int] = {}
        self._top = 0
        self._free: list[int] = []
        self._state = np.zeros(FIRST_IDS, np.int8)
        self._extent = np.full(FIRST_IDS, NONE, np.int32)
        self._slot = np.zeros(FIRST_IDS, np.uint32)
        self._length = np.zeros(FIRST_IDS, np.uint32)
        self._checksum = np.zeros(FIRST_IDS, np.int64)
        self._sequence = np.zeros(FIRST_IDS, np.int64)
        self._expires_ms = np.zeros(FIRST_IDS, np.int64)
        self._pins = np.zeros(FIRST_IDS, np.int32)
        self._next = np.full(FIRST_IDS, NONE, np.int32)
        self._places: list[OpenExtent | Place | None] = []
        self._free_places: list[int] = []
        self._numbers: dict[ExtentId, int] = {}
        self._expiry: list[tuple[int, ExtentId]] = []
        self._next_sequence = 1

    # What is there

    def lookup(self, keys: Sequence[BlockKey]) -> list[Lookup]:
        with self._swept():
            resident = self._resident
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
            resident = self._resident
            found = [index for key in keys if (index := resident.get(key)) is not None]
            if len(found) == len(keys):
                positions, kept = np.arange(len(keys)), list(keys)
            else:
                positions = np.array([n for n, key in enumerate(keys) if key in resident], dtype=np.int64)
                kept = [keys[n] for n in positions.tolist()]
            indices = np.array(found, dtype=np.int64)
            shift_pins(self._pins, indices, 1)
            return self._placements(positions, indices, kept)

    def _placements(self, positions: Column, indices: Column, keys: list[BlockKey]) -> Placements:
        return Placements(
            positions, indices, self._slot[indices].astype(np.int64), keys,
            self._length[indices].astype(np.int64), self._checksum[indices], self._sequence[indices],
            self._expires_ms[indices],
        )  # fmt: skip

    def unpin(self, placements: Placements | Sequence[Placement]) -> None:
        if not isinstance(placements, Placements):
            indices = np.array([placement.index for placement in placements], dtype=np.int64)
        else:
            indices = placements.indices
        with self._lock:
            self._unpin(indices)

    def _unpin(self, indices: Column) -> None:
        least = shift_pins(self._pins, indices, -1)
        assert least >= 0, "a placement was unpinned twice"
        ended = indices[(self._pins[indices] == 0) & (self._state[indices] == DOOMED)]
        if len(ended):
            self._release(np.unique(ended))

    def extents_of(self, indices: Column) -> tuple[Column, dict[int, OpenExtent | Place]]:
        """For pinned ids: the number of each one's extent, and the extents by number."""
        with self._lock:
            numbers = self._extent[indices].astype(np.int64)
            places: dict[int, OpenExtent | Place] = {}
            for number in np.unique(numbers).tolist():
                place = self._places[number]
                assert place is not None, "a pinned block lies in no extent"
                places[number] = place
            return numbers, places

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
            resident, reserved = self._resident, self._reserved
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
        ids = self._take_ids(count)
        kept = [keys[position] for position in taken]
        # The deepest block is the oldest: whoever rebuilds an order from these leaves leaf first.
        sequences = self._next_sequence + np.arange(count - 1, -1, -1)
        self._next_sequence += count
        at = 0
        for run in runs:
            part = ids[at : at + run.count]
            self._extent[part] = self._number_of(run.extent)
            self._slot[part] = np.arange(run.first, run.first + run.count)
            run.extent.reserved(run.first, kept[at : at + run.count], part)
            at += run.count
        self._state[ids] = RESERVED
        self._pins[ids] = 1
        self._next[ids] = NONE
        self._length[ids] = 0
        self._checksum[ids] = 0
        self._sequence[ids] = sequences
        self._expires_ms[ids] = self._clock_ms() + int(ttl_seconds * 1000) if ttl_seconds else 0
        self._reserved.update(zip(kept, ids.tolist(), strict=True))
        return self._placements(np.array(taken, np.int64), ids, kept), refused

    def _number_of(self, extent: OpenExtent) -> int:
        """Of an extent that this member writes; a new one for a new extent."""
        number = self._numbers.get(extent.id)
        if number is None:
            number = self._take_number(extent)
        return number

    def _take_number(self, place: OpenExtent | Place) -> int:
        if self._free_places:
            number = self._free_places.pop()
            self._places[number] = place
        else:
            number = len(self._places)
            self._places.append(place)
        self._numbers[place.id] = number
        return number

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
        assert (self._state[ids] == RESERVED).all(), "only a reserved block can be committed"
        self._length[ids] = lengths
        self._checksum[ids] = checksums
        for number, rows in _groups(self._extent[ids]):
            place, part = self._places[number], ids[rows]
            assert isinstance(place, OpenExtent)
            place.commit(
                self._slot[part], self._length[part], self._checksum[part], self._expires_ms[part],
                self._sequence[part],
            )  # fmt: skip
            self._expect_expiry(place, self._expires_ms[part])
        for key in keys:
            del self._reserved[key]
        duplicates = self._settle(keys, ids)
        self._writer.ended(self._open_places(ids))
        self._unpin(ids)
        return duplicates

    def _open_places(self, ids: Column) -> list[tuple[OpenExtent, int]]:
        """The extents that these reserved slots lie in, and how many in each."""
        numbers, counts = np.unique(self._extent[ids], return_counts=True)
        found = []
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            place = self._places[number]
            assert isinstance(place, OpenExtent)
            found.append((place, count))
        return found

    def abort_all(self, placements: Placements) -> None:
        self._abort(placements.keys, placements.indices)

    def abort(self, placement: Placement) -> None:
        """`abort_all` of one."""
        self._abort([placement.key], np.array([placement.index], np.int64))

    def _abort(self, keys: list[BlockKey], ids: Column) -> None:
        with self._lock:
            for key in keys:
                del self._reserved[key]
            self._state[ids] = DOOMED
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
                number = self._numbers.get(extent.id)
                if number is None:
                    duplicates += self._add(extent)
                    added += len(extent.entries)
                elif isinstance(place := self._places[number], OpenExtent):
                    self._places[number] = self._published(place, extent)
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
        ids = self._take_ids(len(entries))
        place = Place(
            extent.id, extent.id.segment, extent.stride, entries, ids.astype(np.int32), len(entries)
        )
        number = self._take_number(place)
        self._extent[ids] = number
        self._slot[ids] = entries["number"]
        self._length[ids] = entries["length"]
        self._checksum[ids] = entries["checksum"].view(np.int64)
        self._sequence[ids] = entries["sequence"]
        self._expires_ms[ids] = entries["expires_ms"]
        self._pins[ids] = 0
        self._next[ids] = NONE
        self._expect_expiry(place, entries["expires_ms"])
        return self._settle(entries["key"].tolist(), ids)

    def _settle(self, keys: list[BlockKey], ids: Column) -> int:
        """These ids are loadable now; returns how many only as alternates."""
        self._state[ids] = RESIDENT
        resident = self._resident
        before = len(resident)
        if resident.keys().isdisjoint(keys):
            resident.update(zip(keys, ids.tolist(), strict=True))
            if len(resident) - before == len(keys):
                return 0
            for key in keys:  # an extent holds one key twice: start over, one by one
                resident.pop(key, None)
        for key, index in zip(keys, ids.tolist(), strict=True):
            first = resident.setdefault(key, index)
            if first != index:
                self._next[index] = self._next[first]
                self._next[first] = index
        return len(keys) - (len(resident) - before)

    def _published(self, place: OpenExtent, extent: Extent) -> Place:
        """The same extent, now that everybody can read it."""
        ids = place.ids[extent.entries["number"].astype(np.int64)]
        return Place(
            place.id, place.segment, place.stride, extent.entries, ids, place.held,
            noted_ms=place.noted_ms, place=place.place,
        )  # fmt: skip

    def _remove(self, extent: ExtentId) -> int:
        number = self._numbers.pop(extent, None)
        if number is None:
            return 0
        place = self._places[number]
        assert place is not None
        place.gone = True
        keys, ids, mine = self._loadable(number, place)
        rows = np.flatnonzero(mine).tolist()
        for row in rows:
            self._detach(keys[row], int(ids[row]))
        leaving = ids[mine].astype(np.int64)
        self._state[leaving] = DOOMED
        self._release(leaving[self._pins[leaving] == 0])
        self._drop_place(number)
        return len(rows)

    def _loadable(
        self, number: int, place: OpenExtent | Place
    ) -> tuple[list[BlockKey], NDArray[Any], NDArray[np.bool_]]:
        """Keys and ids of an extent's blocks, and which of them are still there.

        An id whose block left may be in use for another block by now, in another slot or extent.
        """
        keys, ids, slots = place.blocks()
        there = (self._extent[ids] == number) & (self._slot[ids] == slots)
        return keys, ids, there & (self._state[ids] == RESIDENT)

    def _detach(self, key: BlockKey, index: int) -> None:
        """Take a resident id from its key; an alternate takes its place."""
        first = self._resident[key]
        after = int(self._next[index])
        if first == index:
            if after == NONE:
                del self._resident[key]
            else:
                self._resident[key] = after
        else:
            before = first
            while int(self._next[before]) != index:
                before = int(self._next[before])
            self._next[before] = after
        self._next[index] = NONE

    def drop(self, placement: Placement) -> bool:
        with self._lock:
            index = placement.index
            if self._state[index] != RESIDENT:
                return False
            self._detach(placement.key, index)
            self._state[index] = DOOMED
            return True

    def discard(self, keys: Sequence[BlockKey]) -> int:
        found = 0
        with self._lock:
            for key in keys:
                index = self._resident.get(key)
                if index is None:
                    continue
                found += 1
                while index is not None:
                    self._leave(key, index)
                    index = self._resident.get(key)
        return found

    def _leave(self, key: BlockKey, index: int) -> None:
        self._detach(key, index)
        self._state[index] = DOOMED
        if self._pins[index] == 0:
            self._release(np.array([index], np.int64))

    # Ids and extents

    def _take_ids(self, count: int) -> Column:
        reused = min(count, len(self._free))
        ids = np.empty(count, np.int64)
        if reused:
            ids[:reused] = self._free[len(self._free) - reused :]
            del self._free[len(self._free) - reused :]
        fresh = count - reused
        while self._top + fresh > len(self._state):
            self._grow()
        ids[reused:] = np.arange(self._top, self._top + fresh)
        self._top += fresh
        return ids

    def _grow(self) -> None:
        size = 2 * len(self._state)
        for name, fill in (
            ("_state", FREE), ("_extent", NONE), ("_slot", 0), ("_length", 0), ("_checksum", 0),
            ("_sequence", 0), ("_expires_ms", 0), ("_pins", 0), ("_next", NONE),
        ):  # fmt: skip
            old = getattr(self, name)
            new = np.full(size, fill, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def _release(self, ids: Column) -> None:
        """These ids end here. All of them lie in some extent, and nobody finds or pins them."""
        if not len(ids):
            return
        numbers, counts = np.unique(self._extent[ids], return_counts=True)
        self._state[ids] = FREE
        self._extent[ids] = NONE
        self._free.extend(ids.tolist())
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            place = self._places[number]
            assert place is not None
            place.held -= count
            if place.gone:
                self._drop_place(number)

    def _drop_place(self, number: int) -> None:
        place = self._places[number]
        if place is not None and place.gone and not place.held:
            self._places[number] = None
            self._free_places.append(number)

    # Time to live

    def _expect_expiry(self, place: OpenExtent | Place, expires_ms: Column) -> None:
        """Note when the first of an extent's blocks will expire, unless that is noted already."""
        times = expires_ms[expires_ms > 0]
        if not len(times):
            return
        first = int(times.min())
        if not place.noted_ms or first < place.noted_ms:
            place.noted_ms = first
            heapq.heappush(self._expiry, (first, place.id))

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """The lock, with expired blocks out of the way; who asked to hear of them does so after it."""
        expired = 0
        with self._lock:
            if self._expiry and self._expiry[0][0] <= (now := self._clock_ms()):
                expired = self._expire(now)
            yield
        if expired:
            self._on_expired(expired)

    def _expire(self, now: int) -> int:
        expired = 0
        while self._expiry and self._expiry[0][0] <= now:
            _, extent = heapq.heappop(self._expiry)
            number = self._numbers.get(extent, NONE)
            place = self._places[number] if number != NONE else None
            if place is None:
                continue
            keys, ids, here = self._loadable(number, place)
            here &= self._expires_ms[ids] > 0
            due = here & (self._expires_ms[ids] <= now)
            place.noted_ms = 0
            self._expect_expiry(place, self._expires_ms[ids[here & ~due]])
            for row in np.flatnonzero(due).tolist():
                self._leave(keys[row], int(ids[row]))
            expired += int(np.count_nonzero(due))
        return expired

    # What an operator sees

    def chunk(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        with self._lock:
            ids = [index for key in keys if (index := self._resident.get(key)) is not None]
            found: dict[BlockKey, None] = {}
            for number in np.unique(self._extent[np.array(ids, np.int64)]).tolist():
                place = self._places[number]
                if isinstance(place, Place):
                    found.update(
                        (key, None) for key in place.entries["key"].tolist() if key in self._resident
                    )
            return list(found)

    @property
    def resident_blocks(self) -> int:
        return len(self._resident)

    @property
    def extents(self) -> int:
        """Extents that blocks of this index lie in."""
        return len(self._numbers)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes()

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes()

    def pinned_blocks(self) -> int:
        with self._lock:
            return int(np.count_nonzero(self._pins))

    def entries(self) -> Entries:
        """Every block that look-ups find, as a row of ENTRY_DTYPE, in the order in which it came."""
        with self._swept():
            keys = list(self._resident)
            ids = np.fromiter(self._resident.values(), np.int64, len(keys))
            found = np.zeros(len(keys), ENTRY_DTYPE)
            if keys:
                found["key"] = np.frombuffer(b"".join(keys), "V32")
            found["number"] = self._slot[ids]
            found["length"] = self._length[ids]
            found["checksum"] = self._checksum[ids].view(np.uint64)
            found["expires_ms"] = self._expires_ms[ids]
            found["sequence"] = self._sequence[ids]
            return found

    def check_integrity(self) -> None:
        with self._lock:
            states = self._state[: self._top]
            free = set(self._free)
            assert len(free) == len(self._free), "an id is free twice"
            assert free == set(np.flatnonzero(states == FREE).tolist()), "a free id was lost"
            assert not np.any(self._state[self._top :]) and np.all(self._pins >= 0)
            held = np.bincount(self._extent[: self._top][states != FREE], minlength=len(self._places))
            for number, place in enumerate(self._places):
                if place is None:
                    assert not held[number] and number in self._free_places
                else:
                    assert place.held == held[number], "an extent's ids are miscounted"
                    assert place.gone or self._numbers[place.id] == number
            chained: set[int] = set()
            for first in self._resident.values():
                index = first
                while index != NONE:
                    assert index not in chained, "an id is found under two keys"
                    chained.add(index)
                    index = int(self._next[index])
            assert chained == set(np.flatnonzero(states == RESIDENT).tolist())
            reserved = set(np.flatnonzero(states == RESERVED).tolist())
            assert set(self._reserved.values()) == reserved
            assert not np.any(self._pins[: self._top][states == FREE])
            assert np.all(self._pins[: self._top][np.isin(states, (RESERVED, DOOMED))] > 0)


def _groups(numbers: NDArray[Any]) -> Iterator[tuple[int, Column]]:
    """Each different number, and where it stands."""
    for number in np.unique(numbers).tolist():
        yield number, np.flatnonzero(numbers == number)
