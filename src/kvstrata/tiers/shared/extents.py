"""ExtentWriter: the extents that this member writes now: slots, what is in flight, and when one is done.

It decides where new blocks go and which extents are to be published; bytes and files are others' work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE, Entries, Footer, extent_bytes, slots_within
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.types import BlockKey


class OpenExtent:
    """An extent that is being written. slots: places in all. place: the medium's own.

    room: where taken_bytes, what it may take on the medium, are taken from. in_flight: slots that are
    reserved and not yet committed or aborted. held: ids of the index that lie in it. full: nothing more is
    reserved in it. dropped: it will not be published.
    """

    def __init__(
        self, extent: ExtentId, slots: int, stride: int, namespace: bytes, began_at: float, room: Room
    ) -> None:
        self.id = extent
        self.room = room
        self.segment = extent.segment
        self.stride = stride
        self.slots = slots
        self.namespace = namespace
        self.began_at = began_at
        self.taken_bytes = extent_bytes(slots, stride)
        self.used = 0
        self.in_flight = 0
        self.held = 0
        self.noted_ms = 0
        self.full = False
        self.dropped = False
        self.gone = False
        self.publishing = False
        self.published = False
        self.place: Any = None
        self.ids: NDArray[np.int32] = np.full(slots, -1, np.int32)
        self._entries = np.zeros(slots, ENTRY_DTYPE)
        self._keys: list[BlockKey | None] = [None] * slots
        self._good = np.zeros(slots, np.bool_)

    def reserved(self, first: int, keys: Sequence[BlockKey], ids: NDArray[Any]) -> None:
        """Slots from `first` on are for these blocks. Under the index's lock, as all that follows."""
        end = first + len(keys)
        self.ids[first:end] = ids
        self._keys[first:end] = keys
        self.held += len(keys)

    def commit(
        self,
        slots: NDArray[Any],
        lengths: NDArray[Any],
        checksums: NDArray[Any],
        expires_ms: NDArray[Any],
        sequences: NDArray[Any],
    ) -> None:
        """The bytes of these slots are there."""
        at = slots.astype(np.int64)
        self._entries["number"][at] = at
        self._entries["length"][at] = lengths
        self._entries["checksum"][at] = checksums.view(np.uint64)
        self._entries["expires_ms"][at] = expires_ms
        self._entries["sequence"][at] = sequences
        self._good[at] = True

    def blocks(self) -> tuple[list[BlockKey], NDArray[Any], NDArray[Any]]:
        """Keys, ids and slots of what is committed."""
        slots = np.flatnonzero(self._good)
        keys = [key for slot in slots.tolist() if (key := self._keys[slot]) is not None]
        return keys, self.ids[slots], slots

    def entries(self) -> Entries:
        """What is committed, in the order of slots."""
        keys, _, slots = self.blocks()
        found: Entries = self._entries[slots]
        if keys:
            found["key"] = np.frombuffer(b"".join(keys), "V32")
        return found

    def footer(self) -> Footer:
        """Behind the last slot that is committed."""
        entries = self.entries()
        slots = int(entries["number"].max(initial=0)) + 1 if len(entries) else 0
        return Footer(self.id, self.stride, self.namespace, slots, entries)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots of one extent."""

    extent: OpenExtent
    first: int
    count: int


class Room(Protocol):
    """What this member may write: `kvstrata.tiers.shared.grants.Allowance`."""

    def take(self, size: int) -> bool: ...

    def ask(self, size: int) -> None: ...

    def refund(self, size: int) -> None: ...

    def publish(self, taken: int, size: int) -> None: ...

    @property
    def limit_bytes(self) -> int: ...

    @property
    def published_bytes(self) -> int: ...

    @property
    def taken_bytes(self) -> int: ...


class Berth(Protocol):
    """This process as a member of the folder, for as long as it may write under one id."""

    @property
    def room(self) -> Room: ...

    @property
    def may_write(self) -> bool: ...

    def next_extent(self) -> ExtentId | None:
        """None while it may not begin anything."""


class ExtentWriter:
    """slots: of a whole extent. berth: under whose id extents are begun now; None while there is none.

    begin: takes what the medium needs to write an extent, in memory only; False: there is none now.
    ask_seconds: after a refusal, so long nothing is asked of the room.
    """

    def __init__(
        self,
        *,
        slots: int,
        stride: int,
        namespace: bytes,
        berth: Callable[[], Berth | None],
        begin: Callable[[OpenExtent], bool] = lambda extent: True,
        ask_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self.stride = stride
        self._namespace = namespace
        self._berth = berth
        self._begin = begin
        self._ask_seconds = ask_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._open: list[OpenExtent] = []
        self._ask_at = 0.0

    @property
    def taken_bytes(self) -> int:
        """What extents that are not published yet may take."""
        with self._changed:
            return sum(extent.taken_bytes for extent in self._open)

    # Slots

    def reserve(self, count: int) -> list[Run]:
        """Room for so many blocks, or for the first of them; neighbours lie side by side."""
        runs: list[Run] = []
        berth = self._berth()
        if berth is None or not berth.may_write:
            return runs
        with self._changed:
            while count:
                extent = next((one for one in self._open if not one.full), None) or self._another(berth)
                if extent is None:
                    break
                taken = min(count, extent.slots - extent.used)
                runs.append(Run(extent, extent.used, taken))
                extent.used += taken
                extent.in_flight += taken
                count -= taken
                if extent.used == extent.slots:
                    extent.full = True
                    self._changed.notify_all()
        if count:
            berth.room.ask(count * self.stride)
        return runs

    def _another(self, berth: Berth) -> OpenExtent | None:
        """A new extent; a smaller one if there is room for no other."""
        now = self._clock()
        if now < self._ask_at:
            return None
        slots = self._take(berth.room)
        name = berth.next_extent() if slots else None
        if name is None:
            self._ask_at = now + self._ask_seconds
            if slots:
                berth.room.refund(extent_bytes(slots, self.stride))
            return None
        extent = OpenExtent(name, slots, self.stride, self._namespace, now, berth.room)
        if not self._begin(extent):
            berth.room.refund(extent.taken_bytes)
            return None
        self._open.append(extent)
        return extent

    def _take(self, room: Room) -> int:
        """Slots that there is room for."""
        if room.take(extent_bytes(self.slots, self.stride)):
            return self.slots
        left = room.limit_bytes - room.published_bytes - room.taken_bytes
        slots = min(slots_within(left, self.stride), self.slots - 1)
        return slots if slots > 0 and room.take(extent_bytes(slots, self.stride)) else 0

    def ask_again(self) -> None:
        """There may be more room than at the last refusal."""
        self._ask_at = 0.0

    def ended(self, slots: Sequence[tuple[OpenExtent, int]]) -> None:
        """So many reserved slots of each are committed or aborted."""
        with self._changed:
            for extent, count in slots:
                extent.in_flight -= count
                assert extent.in_flight >= 0, "a slot ended twice"
            self._changed.notify_all()

    # Publishing

    def close_old(self, seconds: float) -> None:
        """No more blocks for extents that were begun so long ago; 0: for any."""
        now = self._clock()
        with self._changed:
            for extent in self._open:
                if extent.used and now - extent.began_at >= seconds:
                    extent.full = True
            self._changed.notify_all()

    def drop_all(self) -> None:
        """Nothing of what is being written will be published."""
        with self._changed:
            for extent in self._open:
                extent.full = extent.dropped = True
            self._changed.notify_all()

    def next_done(self, wait_seconds: float) -> OpenExtent | None:
        """An extent that is full and has nothing in flight, for one publisher alone; None if none comes.

        It keeps its room until `close` hears what became of it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._find_done() is not None, wait_seconds)
            extent = self._find_done()
            if extent is not None:
                extent.publishing = True
            return extent

    def _find_done(self) -> OpenExtent | None:
        for extent in self._open:
            if extent.full and not extent.in_flight and not extent.publishing:
                return extent
        return None

    def close(self, extent: OpenExtent, file_bytes: int) -> None:
        """It is published and takes so many bytes, or (0) it is no more."""
        with self._changed:
            self._open.remove(extent)
            if file_bytes:
                extent.room.publish(extent.taken_bytes, file_bytes)
            else:
                extent.room.refund(extent.taken_bytes)
            self._ask_at = 0.0
            self._changed.notify_all()

    @property
    def unpublished(self) -> int:
        """Extents that hold blocks and are not published."""
        with self._changed:
            return len(self._open)

    def wait_published(self, until: float) -> bool:
        """Until all that holds blocks now is published or dropped, or a moment of time.monotonic."""
        with self._changed:
            now = [extent for extent in self._open if extent.used]
            return self._changed.wait_for(
                lambda: not any(extent in self._open for extent in now), max(0.0, until - time.monotonic())
            )
