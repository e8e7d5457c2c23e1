"""Ledger: which blocks of a shared folder are worth their room, and how much of each extent lives. No I/O.

Every block that lies in an extent is an id; a policy (`kvstrata.policies`) orders ids and is bound to the
live share of the room, in pages. What it evicts is dead: readers still find it until its extent goes, and a
touch before that brings it back. A block's id lasts while the block lies somewhere or the policy remembers
it. All is in columns, and what a call costs grows with what it is given, not with what is there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstrata.policies import Policy, make_policy
from kvstrata.policies.lists import Ids
from kvstrata.tiers.shared.batches import Touched
from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.key_table import KeyTable, key_words
from kvstrata.transfer.buffers import PAGE

NOWHERE = -1
LEAST_IDS = 4096
COLUMNS = ("_file_bytes", "_stride", "_blocks", "_live_blocks", "_there")
"""Of extents."""


@dataclass(frozen=True, slots=True)
class ExtentView:
    """Extents as columns, the longest known first. slot_bytes, live_bytes: of all slots, of live ones."""

    rows: NDArray[np.int64]
    file_bytes: NDArray[np.int64]
    slot_bytes: NDArray[np.int64]
    live_bytes: NDArray[np.int64]
    live_blocks: NDArray[np.int64]

    @property
    def dead_bytes(self) -> NDArray[np.int64]:
        dead: NDArray[np.int64] = np.maximum(self.file_bytes - self.live_bytes, 0)
        return dead


class Ledger:
    """capacity_bytes: what live blocks may take, with their headers. Not thread-safe.

    visited: blocks that calls looked at so far. duplicates, evicted, expired: what became of blocks.
    """

    def __init__(self, policy: str, options: Mapping[str, float], capacity_bytes: int) -> None:
        self.visited = 0
        self.duplicates = 0
        self.evicted = 0
        self.expired = 0
        self._policy_name = policy
        self._options = dict(options)
        self._request = 0
        self._keys = KeyTable()
        self._policy = self._make_policy(LEAST_IDS, capacity_bytes // PAGE)
        self._word = np.zeros(LEAST_IDS, np.int64)
        self._row = np.full(LEAST_IDS, NOWHERE, np.int64)
        self._live = np.zeros(LEAST_IDS, np.bool_)
        self._expired = np.zeros(LEAST_IDS, np.bool_)
        self._sizes = np.ones(LEAST_IDS, np.int64)
        self._pins = np.zeros(LEAST_IDS, np.int32)
        self._free = np.arange(LEAST_IDS - 1, -1, -1, dtype=np.int32)
        self._free_count = LEAST_IDS
        self._extents: dict[int, Extent] = {}
        self._ids: dict[int, Ids] = {}
        self._rows: dict[ExtentId, int] = {}
        self._next_row = 0
        self._file_bytes = np.zeros(64, np.int64)
        self._stride = np.zeros(64, np.int64)
        self._blocks = np.zeros(64, np.int64)
        self._live_blocks = np.zeros(64, np.int64)
        self._there = np.zeros(64, np.bool_)
        self._expiry: list[tuple[int, int]] = []

    def _make_policy(self, max_ids: int, pages: int) -> Policy:
        policy = make_policy(self._policy_name, max_ids, pages, **self._options)
        policy.warm()
        return policy

    # Extents come and go

    def add(self, extent: Extent, *, moved: bool = False) -> None:
        """An extent was published. moved: its blocks were copied from other extents, and live on here as
        they lived there; otherwise they were saved just now, and a copy of a live block is dead at once.
        """
        if extent.id in self._rows:
            return
        entries = extent.entries
        count = len(entries)
        self.visited += count
        row = self._new_row(extent)
        self._reserve_ids(count)
        words = key_words(entries)
        start = self._free_count - count
        ids, used = self._keys.put(words, np.ascontiguousarray(self._free[start : self._free_count][::-1]))
        self._free_count -= used
        self._word[ids] = words
        if len(self._policy.digest):
            self._policy.digest[ids] = words.view(np.uint64)
        first = np.zeros(count, np.bool_)
        first[np.unique(ids, return_index=True)[1]] = True
        if moved:
            mine = first
        else:
            mine = first & ~((self._row[ids] != NOWHERE) & self._live[ids])
            self.duplicates += int(np.count_nonzero(~mine))
        chosen = ids[mine]
        self._ids[row] = np.where(mine, ids, NOWHERE).astype(np.int32)
        lived = chosen[self._live[chosen]]
        np.subtract.at(self._live_blocks, self._row[lived], 1)
        self._live_blocks[row] += len(lived)
        self._row[chosen] = row
        expires = entries["expires_ms"]
        # An id keeps its size while the policy knows it.
        self._sizes[chosen[self._policy.where[chosen] == 0]] = extent.stride // PAGE
        if not moved:
            self._expired[chosen] = False
            order = np.argsort(entries["sequence"][mine], kind="stable")
            self._request += 1
            evicted, forgotten = self._policy.admit_each(
                np.ascontiguousarray(chosen[order]), self._sizes, self._pins, self._request
            )
            self._settle(chosen, evicted, forgotten)
        self._expect_expiry(row, expires)

    def remove(self, extent: Extent) -> int:
        """Its file is gone, or going; returns how many live blocks went with it."""
        row = self._rows.pop(extent.id, None)
        if row is None:
            return 0
        ids = self._ids.pop(row)
        del self._extents[row]
        self.visited += len(ids)
        self._there[row] = False
        ids = ids[ids != NOWHERE]
        ids = ids[self._row[ids] == row]
        lost = ids[self._live[ids]]
        self._policy.remove(lost, self._sizes)
        self._live[ids] = False
        self._row[ids] = NOWHERE
        self._live_blocks[row] = 0
        self._give_ids(ids)
        return len(lost)

    def _new_row(self, extent: Extent) -> int:
        row = self._next_row
        if row == len(self._file_bytes):
            self._compact_rows()
            row = self._next_row
        self._next_row += 1
        self._rows[extent.id] = row
        self._extents[row] = extent
        self._file_bytes[row] = extent.file_bytes
        self._stride[row] = extent.stride
        self._blocks[row] = len(extent.entries)
        self._live_blocks[row] = 0
        self._there[row] = True
        return row

    def _compact_rows(self) -> None:
        """Make room for rows: give up those of extents that went, or have twice as many."""
        old = np.flatnonzero(self._there[: self._next_row])
        if 2 * len(old) > self._next_row:
            for name in COLUMNS:
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
            return
        new_of = np.full(self._next_row, NOWHERE, np.int64)
        new_of[old] = np.arange(len(old))
        for name in COLUMNS:
            column = getattr(self, name)
            column[: len(old)] = column[old]
            column[len(old) :] = 0
        self.visited += len(self._row)
        lying = self._row != NOWHERE
        self._row[lying] = new_of[self._row[lying]]
        numbers = new_of.tolist()
        self._extents = {numbers[row]: extent for row, extent in self._extents.items()}
        self._ids = {numbers[row]: ids for row, ids in self._ids.items()}
        self._rows = {extent: numbers[row] for extent, row in self._rows.items()}
        self._expiry = [(when, numbers[row]) for when, row in self._expiry if numbers[row] != NOWHERE]
        heapq.heapify(self._expiry)
        self._next_row = len(old)

    # Blocks are used, and expire

    def touch(self, requests: Sequence[Touched]) -> int:
        """Requests in their order; blocks that do not lie here are passed over. Returns how many do."""
        if not requests:
            return 0
        words = np.concatenate([request.words for request in requests]).view(np.int64)
        self.visited += len(words)
        ids = self._keys.find(words)
        owner = np.repeat(np.arange(len(requests)), [len(request.words) for request in requests])
        known = ids != NOWHERE
        ids, owner = ids[known], owner[known]
        lying = (self._row[ids] != NOWHERE) & ~self._expired[ids]
        ids, owner = ids[lying], owner[lying]
        # A request touches a block once, where it first does.
        first = np.sort(np.unique(owner * len(self._row) + ids, return_index=True)[1])
        ids, owner = np.ascontiguousarray(ids[first]), owner[first]
        starts = np.searchsorted(owner, np.arange(len(requests) + 1)).astype(np.int64)
        self._request += len(requests)
        evicted, forgotten = self._policy.access_all(ids, starts, self._sizes, self._pins)
        self._settle(ids, evicted, forgotten)
        return len(ids)

    def recall(self, words: NDArray[np.int64]) -> None:
        """Blocks by the beginnings of their keys, the hottest last, each touched alone."""
        ids = self._keys.find(words)
        ids = ids[ids != NOWHERE]
        ids = np.ascontiguousarray(ids[(self._row[ids] != NOWHERE) & ~self._expired[ids]])
        self.visited += len(words)
        starts = np.arange(len(ids) + 1, dtype=np.int64)
        evicted, forgotten = self._policy.access_all(ids, starts, self._sizes, self._pins)
        self._settle(ids, evicted, forgotten)

    def hottest(self, most: int) -> NDArray[np.int64]:
        """The beginnings of keys of live blocks, the hottest last. Costs a pass over all."""
        order = self._policy.order()
        self.visited += len(order)
        return self._word[order[max(0, len(order) - most) :]]

    def expire(self, now_ms: int) -> int:
        """Blocks whose time is over are dead for good; returns how many lived till now."""
        ended = 0
        while self._expiry and self._expiry[0][0] <= now_ms:
            _, row = heapq.heappop(self._expiry)
            if not self._there[row]:
                continue
            expires = self._extents[row].entries["expires_ms"]
            ids = self._ids[row]
            self.visited += len(ids)
            over = (expires != 0) & (expires <= now_ms) & (ids != NOWHERE)
            over &= self._row[ids] == row
            gone = ids[over]
            lost = gone[self._live[gone]]
            self._policy.remove(lost, self._sizes)
            self._live[gone] = False
            self._expired[gone] = True
            self._live_blocks[row] -= len(lost)
            ended += len(lost)
            later = expires[expires > now_ms]
            if len(later):
                heapq.heappush(self._expiry, (int(later.min()), row))
        self.expired += ended
        return ended

    def _expect_expiry(self, row: int, expires: NDArray[np.int64]) -> None:
        bound = expires[expires != 0]
        if len(bound):
            heapq.heappush(self._expiry, (int(bound.min()), row))

    def resize(self, capacity_bytes: int) -> None:
        """Another bound for what lives."""
        pages = capacity_bytes // PAGE
        if pages != self._policy.capacity:
            evicted, forgotten = self._policy.resize(pages, self._sizes, self._pins)
            self._settle(np.zeros(0, np.int32), evicted, forgotten)

    def _settle(self, asked: Ids, evicted: Ids, forgotten: Ids) -> None:
        """After the policy was called: who lives now, and whose id is free."""
        forgotten = forgotten.copy()
        ids = np.unique(np.concatenate([asked, evicted]))
        self.visited += len(ids)
        lives = (self._policy.where[ids] > 0) & (self._row[ids] != NOWHERE)
        changed = ids[lives != self._live[ids]]
        rows = self._row[changed]
        up = ~self._live[changed]
        np.add.at(self._live_blocks, rows[up], 1)
        np.subtract.at(self._live_blocks, rows[~up], 1)
        self.evicted += int(np.count_nonzero(~up))
        self._live[changed] = up
        self._give_ids(forgotten[self._row[forgotten] == NOWHERE])

    # Ids

    def _give_ids(self, ids: Ids) -> None:
        """Ids of blocks that lie nowhere are free once the policy has forgotten them."""
        ids = ids[self._policy.where[ids] == 0]
        self._keys.drop(self._word[ids])
        self._expired[ids] = False
        end = self._free_count + len(ids)
        self._free[self._free_count : end] = ids
        self._free_count = end

    def _reserve_ids(self, count: int) -> None:
        """Have that many free ids. A policy cannot grow: a larger one takes over what lives, in order."""
        if self._free_count >= count:
            return
        old, policy = len(self._row), self._policy
        size = max(2 * old, old + 2 * count)
        self.visited += old
        order = policy.order().copy()
        self._policy = self._make_policy(size, policy.capacity)
        grown = size - old
        self._word = np.concatenate([self._word, np.zeros(grown, np.int64)])
        self._row = np.concatenate([self._row, np.full(grown, NOWHERE, np.int64)])
        self._live = np.concatenate([self._live, np.zeros(grown, np.bool_)])
        self._expired = np.concatenate([self._expired, np.zeros(grown, np.bool_)])
        self._sizes = np.concatenate([self._sizes, np.ones(grown, np.int64)])
        self._pins = np.zeros(size, np.int32)
        taken = np.ones(old, np.bool_)
        taken[self._free[: self._free_count]] = False
        free = self._free[: self._free_count].copy()
        self._free = np.empty(size, np.int32)
        self._free[:grown] = np.arange(size - 1, old - 1, -1)
        self._free[grown : grown + len(free)] = free
        self._free_count = grown + len(free)
        if len(self._policy.digest):
            self._policy.digest[:old] = self._word[:old].view(np.uint64)
        self._request += 1
        evicted, _ = self._policy.admit_each(order, self._sizes, self._pins, self._request)
        self._settle(order, evicted, np.zeros(0, np.int32))
        ghosts = np.flatnonzero(taken & (self._row[:old] == NOWHERE)).astype(np.int32)
        self._give_ids(ghosts)

    # What the collector asks

    def view(self) -> ExtentView:
        """All extents. Costs a pass over them, not over their blocks."""
        rows = np.flatnonzero(self._there[: self._next_row])
        blocks = self._live_blocks[rows]
        slot_bytes = self._blocks[rows] * self._stride[rows]
        return ExtentView(rows, self._file_bytes[rows], slot_bytes, blocks * self._stride[rows], blocks)

    def extent(self, row: int) -> Extent:
        """Valid until the next `add`."""
        return self._extents[row]

    def living(self, extent: Extent) -> NDArray[np.bool_]:
        """Per entry of an extent: is this the copy of a block that lives?"""
        row = self._rows.get(extent.id)
        if row is None:
            return np.zeros(len(extent.entries), np.bool_)
        ids = self._ids[row]
        self.visited += len(ids)
        held: NDArray[np.bool_] = (ids != NOWHERE) & (self._row[ids] == row) & self._live[ids]
        return held

    @property
    def live_blocks(self) -> int:
        return int(self._live_blocks.sum())

    @property
    def live_bytes(self) -> int:
        """Of slots of live blocks."""
        return int((self._live_blocks * self._stride).sum())

    @property
    def capacity_bytes(self) -> int:
        return self._policy.capacity * PAGE

    def check_integrity(self, extents: Iterable[Extent]) -> None:
        """Assert every invariant; extents: all that are there. For tests."""
        there = {extent.id for extent in extents}
        assert there == set(self._rows), "the ledger has other extents than there are"
        for row, ids in self._ids.items():
            real = ids[ids != NOWHERE]
            mine = real[self._row[real] == row]
            assert self._live_blocks[row] == np.count_nonzero(self._live[mine])
            assert len(set(mine.tolist())) == len(mine)
        lying = np.flatnonzero(self._row != NOWHERE)
        assert ((self._policy.where[lying] > 0) == self._live[lying]).all()
        assert not np.any(self._live[self._row == NOWHERE])
        assert not np.any(self._policy.where[self._row == NOWHERE] > 0)
        assert not np.any(self._live & self._expired)
        free = self._free[: self._free_count]
        assert len(set(free.tolist())) == len(free)
        assert len(self._keys) + len(free) == len(self._row)
        assert (self._keys.find(self._word[lying]) == lying).all()
