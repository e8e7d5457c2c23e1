"""BlockTable: what one tier holds, where, and what may leave. No bytes move here.

Every block of a tier is an id: an index into arrays of slot, length, checksum, pins and expiry. Keys
map to ids; a policy orders ids. One lock guards all of it, and every method takes whole batches, so
that a batch is atomic. The states of an id:

    free -> RESERVED (has a slot, being written) -> RESIDENT (loadable) -> GHOST or free
                    \\-> free (write failed)              \\-> DOOMED (left, but still pinned) -> free

A reserved id is pinned by its writer. A doomed id is out of the index, so nobody finds it any more,
and its slot comes back with its last pin.

A table with spare slots hands what the policy evicts to whoever called `record`, with the slot, so that
its bytes can be copied to a tier below; the slot comes back with `let_go`. Such a block has no id here.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import holding_gil
from kvstrata.policies import make_policy
from kvstrata.policies.lists import Ids
from kvstrata.types import BlockKey, Lookup

FREE, RESERVED, RESIDENT, GHOST, DOOMED = range(5)
NEVER_MS = 0
CHECKSUM_MASK = (1 << 64) - 1

Column = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placement:
    """One block's place in a tier, pinned for whoever holds this object.

    position: index of the block in the batch that was asked for. length: payload bytes, 0 while
    reserved. checksum: XXH3-64 of the payload, 0 while reserved. expires_ms: Unix milliseconds, 0 never.
    """

    position: int
    index: int
    slot: int
    key: BlockKey
    length: int
    checksum: int
    sequence: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Placements:
    """Many of them as columns: int64 arrays of equal length, and the keys. Checksums are signed words."""

    positions: Column
    indices: Column
    slots: Column
    keys: list[BlockKey]
    lengths: Column
    checksums: Column
    sequences: Column
    expires_ms: Column

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Placement:
        return Placement(
            int(self.positions[row]), int(self.indices[row]), int(self.slots[row]), self.keys[row],
            int(self.lengths[row]), int(self.checksums[row]) & CHECKSUM_MASK, int(self.sequences[row]),
            int(self.expires_ms[row]),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Placement]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: Column) -> Placements:
        """Those rows, by number."""
        keys = [self.keys[row] for row in rows.tolist()]
        return Placements(
            self.positions[rows], self.indices[rows], self.slots[rows], keys, self.lengths[rows],
            self.checksums[rows], self.sequences[rows], self.expires_ms[rows],
        )  # fmt: skip

    def at(self, positions: Column) -> Column:
        """Row numbers of positions; `self.positions` ascends, as in everything the table returns."""
        return np.searchsorted(self.positions, positions)

    def key_words(self) -> Column:
        """Keys as (n, 4) int64."""
        return np.frombuffer(b"".join(self.keys), dtype=np.int64).reshape(-1, 4)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Answer of `BlockTable.record`.

    hits: positions that were resident or being written before. placed: placements to be written, then
    committed or aborted. refused: positions that found no room. evicted: blocks that left. left: those of
    them that still have their slots, for the caller to copy and then to `let_go`; positions count from 0.
    """

    hits: list[int]
    placed: Placements
    refused: list[int]
    evicted: int
    left: Placements | None = None

    @property
    def reserved(self) -> list[Placement]:
        """`placed` one by one."""
        return list(self.placed)


ENTRY_DTYPE = np.dtype(
    [("key", "V32"), ("slot", "<i8"), ("length", "<i8"), ("checksum", "<u8"), ("sequence", "<i8"),
     ("expires_ms", "<i8")]
)  # fmt: skip
"""A resident block as it goes into or comes out of an index file; arrays of them are coldest first."""


@holding_gil
def shift_pins(pins: NDArray[np.int32], indices: Column, by: int) -> int:
    """pins[indices] += by, for every time that an index is there; returns the least that came of it."""
    least = 0
    for index in indices:
        pins[index] += by
        least = min(least, pins[index])
    return least


def unix_ms() -> int:
    return time.time_ns() // 1_000_000


class BlockTable:
    """slots: places that exist. slot_bytes: what each takes, whatever the length of its block.

    policy, policy_options: a name in `kvstrata.policies.POLICIES`, and its parameters that differ from
    their defaults. batch_blocks: largest batch of `record`. clock_ms: Unix milliseconds, for tests.
    on_expired: told how many blocks met their TTL, by the caller who found out, outside the lock.
    """

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        policy: str,
        policy_options: Mapping[str, float] | None = None,
        *,
        batch_blocks: int = 16_384,
        clock_ms: Callable[[], int] = unix_ms,
        on_expired: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.batch_blocks = batch_blocks
        self._clock_ms = clock_ms
        self._on_expired = on_expired
        # Residents and ghosts together are at most two capacities; doomed ids keep their slot.
        max_ids = 3 * slots + batch_blocks
        # One slot is the unit of the policy: every block takes one, whatever its length.
        self._policy = make_policy(policy, max_ids, slots, **(policy_options or {}))
        self._policy.warm()
        self._lock = threading.Lock()
        self._ids: dict[BlockKey, int] = {}
        self._resident: dict[BlockKey, int] = {}
        self._keys: list[BlockKey | None] = [None] * max_ids
        self._state = np.zeros(max_ids, dtype=np.int8)
        self._slot = np.full(max_ids, -1, dtype=np.int64)
        self._length = np.zeros(max_ids, dtype=np.int64)
        self._checksum = np.zeros(max_ids, dtype=np.uint64)
        self._sequence = np.zeros(max_ids, dtype=np.int64)
        self._expires_ms = np.zeros(max_ids, dtype=np.int64)
        self._pins = np.zeros(max_ids, dtype=np.int32)
        self._sizes = np.ones(max_ids, dtype=np.int64)
        self._free_ids = list(range(max_ids - 1, -1, -1))
        self._free_slots = list(range(slots - 1, -1, -1))
        self._withdrawn: list[int] = []
        self._spare = 0
        self._leaving: set[int] = set()
        self._expiry: list[tuple[int, int, int]] = []
        self._next_sequence = 1

    # What is there

    def lookup(self, keys: Sequence[BlockKey]) -> list[Lookup]:
        """State of every key. No side effects but the removal of expired blocks."""
        with self._swept():
            resident = self._resident
            if all(key in resident for key in keys):
                return [Lookup.HIT] * len(keys)
            return [Lookup.HIT if key in resident else self._absent(key) for key in keys]

    def _absent(self, key: BlockKey) -> Lookup:
        index = self._ids.get(key)
        pending = index is not None and self._state[index] == RESERVED
        return Lookup.PENDING if pending else Lookup.MISS

    def pin(self, keys: Sequence[BlockKey]) -> list[Placement]:
        """Pin every key that is resident; the others are left out. Unpin each placement once."""
        return list(self.pin_all(keys))

    def pin_all(self, keys: Sequence[BlockKey]) -> Placements:
        """`pin`, as columns."""
        with self._swept():
            positions, indices, kept = find_all(keys, self._resident)
            shift_pins(self._pins, indices, 1)
            return self._placements(positions, indices, kept)

    def _placements(self, positions: Column, indices: Column, keys: list[BlockKey]) -> Placements:
        return Placements(
            positions, indices, self._slot[indices], keys, self._length[indices],
            self._checksum[indices].view(np.int64), self._sequence[indices], self._expires_ms[indices],
        )  # fmt: skip

    def unpin(self, placements: Placements | Iterable[Placement]) -> None:
        indices = indices_of(placements)
        with self._lock:
            self._unpin(indices)

    def _unpin(self, indices: Column) -> None:
        least = shift_pins(self._pins, indices, -1)
        assert least >= 0, "a placement was unpinned twice"
        ended = indices[(self._pins[indices] == 0) & (self._state[indices] == DOOMED)]
        for index in ended.tolist():
            if self._state[index] == DOOMED:
                self._release(index)

    # What comes and goes

    def record(
        self,
        keys: Sequence[BlockKey],
        admit: Sequence[bool] | None = None,
        *,
        request: int,
        ttl_seconds: float = 0.0,
    ) -> Recorded:
        """One request's chain, root first: touch what is there, make room for what is not.

        admit: per key, may it be stored now (default: none may: a touch). A key that is not there and
        may not be stored is passed over. request: equal for calls of one request. ttl_seconds: 0 never.
        """
        assert len(keys) <= self.batch_blocks, "the batch is larger than batch_blocks"
        with self._swept():
            positions: list[int] = []
            indices: list[int] = []
            admitted: list[bool] = []
            fresh: list[tuple[int, int]] = []
            hits: list[int] = []
            seen: set[BlockKey] = set()
            for position, key in enumerate(keys):
                may = admit is not None and admit[position]
                if key in seen:
                    continue
                seen.add(key)
                index = self._ids.get(key)
                if index is None:
                    if not may:
                        continue
                    index = self._take_id(key)
                if self._state[index] in (RESERVED, RESIDENT):
                    hits.append(position)
                elif may:
                    fresh.append((position, index))
                positions.append(position)
                indices.append(index)
                admitted.append(may)
            _, evicted, forgotten = self._policy.access(
                np.array(indices, dtype=np.int32),
                np.array(admitted, dtype=np.bool_),
                self._sizes,
                self._pins,
                request,
            )
            gone = self._evicted(evicted) if self._spare else None
            left = self._leave(evicted, forgotten, keep=gone is not None)
            if gone is not None:
                wanted = sum(self._policy.resident(index) for _, index in fresh)
                gone = self._keep_slots(gone, wanted)
            taken: list[int] = []
            refused: list[int] = []
            expires_ms = self._clock_ms() + int(ttl_seconds * 1000) if ttl_seconds else NEVER_MS
            self._next_sequence += len(fresh)
            room = len(self._free_slots)
            for rank, (position, index) in enumerate(fresh):
                if self._policy.resident(index) and len(taken) < room:
                    taken.append(rank)
                    continue
                refused.append(position)
                if self._policy.resident(index):
                    self._forget(index)
                if self._policy.where[index]:
                    self._state[index] = GHOST
                elif self._keys[index] is not None:
                    self._release(index)
            placed = np.array([fresh[rank] for rank in taken], dtype=np.int64).reshape(-1, 2)
            reserved, chosen = placed[:, 1], len(self._free_slots) - len(taken)
            self._state[reserved] = RESERVED
            self._pins[reserved] = 1
            # Neighbours in a chain become neighbours on the medium, where that is possible.
            self._slot[reserved] = sorted(self._free_slots[chosen:])
            del self._free_slots[chosen:]
            self._length[reserved] = 0
            self._checksum[reserved] = 0
            # The deepest block is the oldest, so that a rebuilt order is leaf first too.
            self._sequence[reserved] = self._next_sequence - 1 - np.array(taken, dtype=np.int64)
            self._expires_ms[reserved] = expires_ms
            places = placed[:, 0]
            kept = [keys[position] for position in places.tolist()]
            return Recorded(hits, self._placements(places, reserved, kept), refused, left, gone)

    def _evicted(self, evicted: Ids) -> Placements:
        """What leaves, while everything about it is known."""
        indices = evicted[self._state[evicted] == RESIDENT].astype(np.int64)
        keys = [key for index in indices.tolist() if (key := self._keys[index]) is not None]
        return self._placements(np.arange(len(indices)), indices, keys)

    def _keep_slots(self, gone: Placements, wanted: int) -> Placements:
        """Of the slots of blocks that left, free what newcomers need: that of the coldest blocks."""
        given = min(len(gone), max(0, wanted - len(self._free_slots)))
        self._free_slots += gone.slots[:given].tolist()
        kept = gone.take(np.arange(given, len(gone)))
        self._leaving.update(kept.slots.tolist())
        return replace(kept, positions=np.arange(len(kept)))

    def let_go(self, left: Placements) -> None:
        """Slots of blocks that left are free: their bytes were copied, or nobody wants them."""
        with self._lock:
            slots = left.slots.tolist()
            assert self._leaving.issuperset(slots), "a slot was let go twice"
            self._leaving.difference_update(slots)
            self._free_slots += slots

    def _take_id(self, key: BlockKey) -> int:
        index = self._free_ids.pop()
        self._ids[key] = index
        self._keys[index] = key
        if len(self._policy.digest):
            self._policy.digest[index] = int.from_bytes(key[:8], "little")
        return index

    def _leave(self, evicted: Ids, forgotten: Ids, *, keep: bool = False) -> int:
        """Take out what the policy evicted and forgot; return how many had a slot.

        keep: their slots are somebody's else to free.
        """
        left = 0
        for index in evicted.tolist():
            if self._state[index] != RESIDENT:
                continue  # came and left within one batch: it never had a slot
            left += 1
            key = self._keys[index]
            assert key is not None
            assert self._pins[index] == 0, "a pinned block was evicted"
            del self._resident[key]
            if keep:
                self._slot[index] = -1
            else:
                self._give_slot(index)
            self._state[index] = GHOST
        for index in forgotten.tolist():
            if self._state[index] == GHOST and not self._policy.where[index]:
                self._release(index)
        return left

    def _give_slot(self, index: int) -> None:
        self._free_slots.append(int(self._slot[index]))
        self._slot[index] = -1

    def _forget(self, index: int) -> None:
        self._policy.remove(np.array([index], dtype=np.int32), self._sizes)

    def _release(self, index: int) -> None:
        """The id ends here: free its slot and its key, and let the id be used again."""
        key = self._keys[index]
        if key is not None and self._ids.get(key) == index:
            del self._ids[key]
        self._keys[index] = None
        if self._slot[index] >= 0:
            self._give_slot(index)
        self._state[index] = FREE
        self._free_ids.append(index)

    def commit(self, placement: Placement, *, length: int, checksum: int) -> None:
        """The bytes are in the slot: the block becomes loadable and loses its writer's pin."""
        word = np.array([checksum], dtype=np.uint64).view(np.int64)
        self.commit_all(alone(placement), np.array([length]), word)

    def commit_all(self, placements: Placements, lengths: Column, checksums: Column) -> None:
        """`commit` for many. checksums: signed words."""
        indices = placements.indices
        with self._lock:
            assert (self._state[indices] == RESERVED).all(), "only a reserved block can be committed"
            self._state[indices] = RESIDENT
            self._length[indices] = lengths
            self._checksum[indices] = checksums.view(np.uint64)
            self._resident.update(zip(placements.keys, indices.tolist(), strict=True))
            for index in indices[placements.expires_ms > 0].tolist():
                self._expect_expiry(index)
            self._unpin(indices)

    def abort(self, placement: Placement) -> None:
        """The write failed: the block was never there. Drops the writer's pin."""
        self.abort_all(alone(placement))

    def abort_all(self, placements: Placements) -> None:
        """`abort` for many."""
        with self._lock:
            for index in placements.indices.tolist():
                self._doom(index)
            self._unpin(placements.indices)

    def drop(self, placement: Placement) -> bool:
        """Bad bytes were found in a pinned block: nobody finds it any more. Keeps the caller's pin.

        False if it had already left.
        """
        with self._lock:
            if self._state[placement.index] != RESIDENT:
                return False
            self._doom(placement.index)
            return True

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """Remove resident blocks by key; return how many were there."""
        with self._lock:
            found = [index for key in keys if (index := self._resident.get(key)) is not None]
            for index in found:
                self._pins[index] += 1
                self._doom(index)
                self._unpin(np.array([index]))
            return len(found)

    def chunk(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """None: here every block lies alone."""
        return []

    def _doom(self, index: int) -> None:
        key = self._keys[index]
        assert key is not None
        self._resident.pop(key, None)
        if self._ids.get(key) == index:
            del self._ids[key]
        self._forget(index)
        self._state[index] = DOOMED

    def _expect_expiry(self, index: int) -> None:
        """Note when a resident block will expire; bounded by what is resident, not by what ever was."""
        entry = (int(self._expires_ms[index]), int(self._sequence[index]), index)
        heapq.heappush(self._expiry, entry)
        if len(self._expiry) > 2 * self.slots + 64:
            live = np.flatnonzero((self._state == RESIDENT) & (self._expires_ms > 0))
            times, sequences = self._expires_ms[live].tolist(), self._sequence[live].tolist()
            self._expiry = sorted(zip(times, sequences, live.tolist(), strict=True))

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """The lock, with expired blocks out of the way; who asked to hear of them does so after it."""
        with self._lock:
            expired = self._expire()
            yield
        if expired:
            self._on_expired(expired)

    def _expire(self) -> int:
        if not self._expiry or self._expiry[0][0] > self._clock_ms():
            return 0
        now = self._clock_ms()
        expired = 0
        while self._expiry and self._expiry[0][0] <= now:
            _, sequence, index = heapq.heappop(self._expiry)
            if self._sequence[index] == sequence and self._state[index] == RESIDENT:
                self._pins[index] += 1
                self._doom(index)
                self._unpin(np.array([index]))
                expired += 1
        return expired

    # Capacity

    def withdraw(self, slots: Iterable[int]) -> int:
        """These free slots cannot be used for now: shrink the bound by them. Returns blocks evicted."""
        with self._lock:
            wanted = set(slots)
            kept = [slot for slot in self._free_slots if slot not in wanted]
            self._withdrawn += [slot for slot in self._free_slots if slot in wanted]
            self._free_slots = kept
            return self._fit()

    def restore_withdrawn(self) -> int:
        """Try withdrawn slots again; returns how many."""
        with self._lock:
            count = len(self._withdrawn)
            # Behind all others, so that they are used last.
            self._free_slots[:0] = self._withdrawn
            self._withdrawn = []
            self._fit()
            return count

    def set_spare(self, slots: int) -> int:
        """Keep so many slots for blocks on their way out, at most half. Returns blocks evicted.

        From here on `record` says what left.
        """
        with self._lock:
            self._spare = min(slots, self.slots // 2)
            return self._fit()

    def _fit(self) -> int:
        usable = self.slots - len(self._withdrawn)
        usable -= min(self._spare, usable // 2)
        evicted, forgotten = self._policy.resize(usable, self._sizes, self._pins)
        return self._leave(evicted, forgotten)

    # Opening and closing

    def restore(self, entries: NDArray[Any], request: int = 0) -> tuple[int, int]:
        """Take over blocks found on the medium: rows of ENTRY_DTYPE, coldest first.

        Returns how many found room, and how many different keys there were. Of two entries with one key
        the later one wins. Slots must be free and within bounds. The policy sees one request per block.
        """
        with self._lock:
            keys: list[BlockKey] = entries["key"].tolist()
            last = {key: row for row, key in enumerate(keys)}
            rows = np.sort(np.fromiter(last.values(), np.int64, len(last)))
            rows = rows[max(0, len(rows) - self.slots) :]
            if self._ids:
                rows = rows[[keys[row] not in self._ids for row in rows.tolist()]]
            _, first_of_slot = np.unique(entries["slot"][rows], return_index=True)
            rows = rows[np.sort(first_of_slot)]
            if not len(rows):
                return 0, len(last)
            taken = self._admit_each([keys[row] for row in rows.tolist()], request)
            rows, indices = rows[taken >= 0], taken[taken >= 0]
            self._state[indices] = RESIDENT
            self._slot[indices] = entries["slot"][rows]
            self._length[indices] = entries["length"][rows]
            self._checksum[indices] = entries["checksum"][rows]
            self._sequence[indices] = entries["sequence"][rows]
            self._expires_ms[indices] = entries["expires_ms"][rows]
            self._resident.update(zip([keys[row] for row in rows.tolist()], indices.tolist(), strict=True))
            for index in indices[self._expires_ms[indices] != NEVER_MS].tolist():
                self._expect_expiry(index)
            self._next_sequence = max(
                self._next_sequence, int(entries["sequence"][rows].max(initial=0)) + 1
            )
            free = np.array(self._free_slots, np.int64)
            self._free_slots = free[~np.isin(free, entries["slot"][rows])].tolist()
            return len(rows), len(last)

    def _admit_each(self, keys: list[BlockKey], request: int) -> NDArray[np.int64]:
        """Ids for keys that have none, each a request of its own to the policy; -1 where it refused."""
        indices = self._free_ids[: -len(keys) - 1 : -1]
        del self._free_ids[-len(keys) :]
        self._ids.update(zip(keys, indices, strict=True))
        for key, index in zip(keys, indices, strict=True):
            self._keys[index] = key
        ids = np.array(indices, np.int32)
        if len(self._policy.digest):
            self._policy.digest[ids] = np.array([key[:8] for key in keys], "S8").view("<u8")
        evicted, forgotten = self._policy.admit_each(ids, self._sizes, self._pins, request)
        self._leave(evicted, forgotten)
        places = self._policy.where[ids]
        for index in ids[places < 0].tolist():
            self._state[index] = GHOST
        for index in ids[places == 0].tolist():
            self._release(index)
        return np.where(places > 0, ids, -1).astype(np.int64)

    def entries(self) -> NDArray[Any]:
        """Every resident block as a row of ENTRY_DTYPE, the one that would leave first at the front."""
        with self._swept():
            ordered = self._policy.order()
            ordered = ordered[self._state[ordered] == RESIDENT]
            result = np.zeros(len(ordered), ENTRY_DTYPE)
            keys = [self._keys[index] for index in ordered.tolist()]
            result["key"] = np.array(keys, "S32").view("V32")
            result["slot"] = self._slot[ordered]
            result["length"] = self._length[ordered]
            result["checksum"] = self._checksum[ordered]
            result["sequence"] = self._sequence[ordered]
            result["expires_ms"] = self._expires_ms[ordered]
            return result

    # What an operator sees

    @property
    def resident_blocks(self) -> int:
        return len(self._resident)

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots that hold or will hold a block."""
        return (self.slots - len(self._free_slots) - len(self._withdrawn)) * self.slot_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._policy.capacity * self.slot_bytes

    def pinned_blocks(self) -> int:
        with self._lock:
            return int(np.count_nonzero(self._pins))

    def check_integrity(self) -> None:
        """Assert every invariant. Costs one pass over all ids; for tests and `verify`."""
        with self._lock:
            states = self._state
            holding = np.flatnonzero(np.isin(states, (RESERVED, RESIDENT, DOOMED)))
            slots = self._slot[holding].tolist()
            assert len(set(slots)) == len(slots), "two blocks share a slot"
            every = slots + self._free_slots + self._withdrawn + list(self._leaving)
            assert sorted(every) == list(range(self.slots)), "a slot was lost or doubled"
            assert np.all(self._slot[np.isin(states, (FREE, GHOST))] == -1)
            for key, index in self._resident.items():
                assert states[index] == RESIDENT and self._keys[index] == key
                assert self._ids[key] == index
                assert self._policy.resident(index)
            assert len(self._resident) == int(np.count_nonzero(states == RESIDENT))
            for key, index in self._ids.items():
                assert self._keys[index] == key and states[index] in (RESERVED, RESIDENT, GHOST)
                assert self._policy.where[index] != 0
            for index in np.flatnonzero(states == RESERVED).tolist():
                assert self._pins[index] >= 1 and self._policy.resident(index)
            assert np.all(self._pins >= 0)
            assert not np.any(self._pins[np.isin(states, (FREE, GHOST))])
            listed = int(np.count_nonzero(np.isin(states, (RESERVED, RESIDENT))))
            assert self._policy.used == listed
            assert len(self._policy.order()) == listed
            assert len(set(self._free_ids)) == len(self._free_ids)
            assert len(self._free_ids) == int(np.count_nonzero(states == FREE))


def find_all(
    keys: Sequence[BlockKey], ids: Mapping[BlockKey, int]
) -> tuple[Column, Column, list[BlockKey]]:
    """Positions, ids and keys of those that are among `ids`, in their order."""
    found = [index for key in keys if (index := ids.get(key)) is not None]
    if len(found) == len(keys):
        positions, kept = np.arange(len(keys)), list(keys)
    else:
        positions = np.array([n for n, key in enumerate(keys) if key in ids], dtype=np.int64)
        kept = [keys[n] for n in positions.tolist()]
    return positions, np.array(found, dtype=np.int64), kept


def indices_of(placements: Placements | Iterable[Placement]) -> Column:
    """Their ids, whichever way they are held."""
    if isinstance(placements, Placements):
        return placements.indices
    return np.array([placement.index for placement in placements], dtype=np.int64)


def joined(parts: Sequence[Placements]) -> Placements:
    """One after the other; at least one."""

    def column(name: str) -> Column:
        return np.concatenate([getattr(part, name) for part in parts])

    keys = [key for part in parts for key in part.keys]
    return Placements(
        column("positions"), column("indices"), column("slots"), keys, column("lengths"),
        column("checksums"), column("sequences"), column("expires_ms"),
    )  # fmt: skip


def alone(placement: Placement) -> Placements:
    """One placement as columns."""

    def word(value: int) -> Column:
        return np.array([value], dtype=np.int64)

    return Placements(
        word(placement.position), word(placement.index), word(placement.slot), [placement.key],
        word(placement.length), np.array([placement.checksum], dtype=np.uint64).view(np.int64),
        word(placement.sequence), word(placement.expires_ms),
    )  # fmt: skip
