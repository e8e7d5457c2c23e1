"""Catalog: every extent of a shared folder, as the members' journals tell it. No I/O, no blocks of its own.

An extent is live while a member stands for it: its writer, or a collector that adopted it. What somebody
declared gone does not come back, in whatever order the journals are read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from kvstrata.tiers.shared.batches import Added, Batch, BatchKind
from kvstrata.tiers.shared.extent_file import Entries
from kvstrata.tiers.shared.format import ExtentId

TOMBSTONES = 65_536
"""So many extents that are gone are remembered, the oldest are forgotten first."""


@dataclass(slots=True, eq=False)
class Extent:
    """A live extent. file_bytes: on the medium. members: who stands for it."""

    id: ExtentId
    file_bytes: int
    stride: int
    namespace: bytes
    entries: Entries
    members: set[int] = field(default_factory=set)

    def added(self, *, adopted: bool) -> Added:
        return Added(self.id, self.file_bytes, self.stride, self.namespace, self.entries, adopted)


@dataclass(frozen=True, slots=True)
class Change:
    """What came and went, in order: first the new ones, then those that are gone."""

    added: tuple[Extent, ...] = ()
    gone: tuple[Extent, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.gone)


class Feed:
    """All changes since it was made, for one reader; the first one is everything that was there."""

    def __init__(self, first: Change, close: Callable[[Feed], None]) -> None:
        self._changes: deque[Change] = deque([first])
        self._close = close

    def put(self, change: Change) -> None:
        self._changes.append(change)

    def take(self) -> list[Change]:
        """What came since the last call, in order."""
        return [self._changes.popleft() for _ in range(len(self._changes))]

    def close(self) -> None:
        self._close(self)


class Catalog:
    """Thread-safe. Every change is also told to `on_change`, under no lock but in order."""

    def __init__(self, on_change: Callable[[Change], None] = lambda change: None) -> None:
        self._on_change = on_change
        self._order = threading.RLock()
        """Held while a change is made and told, so that nobody hears of changes in another order."""
        self._lock = threading.Lock()
        self._extents: dict[ExtentId, Extent] = {}
        self._of_member: dict[int, dict[ExtentId, None]] = {}
        self._published: dict[int, int] = {}
        self._gone: dict[ExtentId, set[int]] = {}
        """And whose journals name it all the same."""
        self._feeds: list[Feed] = []
        self._live_bytes = 0

    # What is known

    def extents(self) -> list[Extent]:
        """All live extents, the longest known first."""
        with self._lock:
            return list(self._extents.values())

    def of_member(self, member: int) -> list[Extent]:
        """Those that a member stands for, in its order."""
        with self._lock:
            return [self._extents[extent] for extent in self._of_member.get(member, ())]

    def get(self, extent: ExtentId) -> Extent | None:
        with self._lock:
            return self._extents.get(extent)

    def is_gone(self, extent: ExtentId) -> bool:
        with self._lock:
            return extent in self._gone

    def still_named(self, members: Collection[int]) -> list[ExtentId]:
        """What is gone and stands in journals of these members: who only reads those must be told."""
        with self._lock:
            return [extent for extent, naming in self._gone.items() if not naming.isdisjoint(members)]

    def members(self) -> list[int]:
        """Who has said anything."""
        with self._lock:
            return list(self._published)

    def published_bytes(self, member: int) -> int:
        """What the member has ever published itself, by its last word; 0 for an unknown one."""
        with self._lock:
            return self._published.get(member, 0)

    @property
    def live_bytes(self) -> int:
        """On the medium, of all live extents."""
        return self._live_bytes

    def __len__(self) -> int:
        return len(self._extents)

    def follow(self) -> Feed:
        """Everything that is there, as the first change, and all that follows; close it after use."""
        with self._order, self._lock:
            feed = Feed(Change(tuple(self._extents.values())), self._unfollow)
            self._feeds.append(feed)
            return feed

    def _unfollow(self, feed: Feed) -> None:
        with self._order:
            if feed in self._feeds:
                self._feeds.remove(feed)

    # What changes it

    def apply(self, member: int, batch: Batch) -> Change:
        """A member's word. ACCESS batches change nothing."""
        return self.apply_all(member, [batch])

    def apply_all(self, member: int, batches: Iterable[Batch]) -> Change:
        """Several batches of one member, in their order, as one change."""
        with self._order:
            added: dict[ExtentId, Extent] = {}
            gone: dict[ExtentId, Extent] = {}
            with self._lock:
                for batch in batches:
                    self._take_in(member, batch, added, gone)
            return self._tell(added, gone)

    def forget_member(self, member: int) -> Change:
        """The member's folder is gone: what only it stood for is, too."""
        with self._order:
            gone: dict[ExtentId, Extent] = {}
            with self._lock:
                for extent in list(self._of_member.pop(member, ())):
                    self._let_go(extent, member, gone)
                self._published.pop(member, None)
            return self._tell({}, gone)

    def lose(self, extents: Iterable[ExtentId]) -> Change:
        """Their files are not there: whatever the journals say, nobody can read them."""
        with self._order:
            gone: dict[ExtentId, Extent] = {}
            with self._lock:
                for extent in extents:
                    self._bury(extent, gone)
            return self._tell({}, gone)

    def _take_in(
        self, member: int, batch: Batch, added: dict[ExtentId, Extent], gone: dict[ExtentId, Extent]
    ) -> None:
        self._published[member] = max(batch.published_bytes, self._published.get(member, 0))
        if batch.kind is BatchKind.SNAPSHOT:
            meant = {one.extent for one in batch.added}
            for extent, naming in self._gone.items():
                if extent not in meant:
                    naming.discard(member)
            for extent in [e for e in self._of_member.get(member, ()) if e not in meant]:
                self._of_member[member].pop(extent)
                self._let_go(extent, member, gone)
        for one in batch.added:
            self._stand_for(member, one, added)
        for extent in batch.gone:
            added.pop(extent, None) if self._came_now(extent, added, gone) else None

    def _came_now(
        self, extent: ExtentId, added: dict[ExtentId, Extent], gone: dict[ExtentId, Extent]
    ) -> bool:
        """Bury it; True if nobody has heard of it yet."""
        fresh = extent in added
        self._bury(extent, gone)
        if fresh:
            gone.pop(extent, None)
        return fresh

    def _stand_for(self, member: int, one: Added, added: dict[ExtentId, Extent]) -> None:
        if one.extent in self._gone:
            self._gone[one.extent].add(member)
            return
        extent = self._extents.get(one.extent)
        if extent is None:
            extent = Extent(one.extent, one.file_bytes, one.stride, one.namespace, one.entries)
            self._extents[one.extent] = added[one.extent] = extent
            self._live_bytes += one.file_bytes
        extent.members.add(member)
        self._of_member.setdefault(member, {})[one.extent] = None

    def _let_go(self, extent: ExtentId, member: int, gone: dict[ExtentId, Extent]) -> None:
        known = self._extents.get(extent)
        if known is None:
            return
        known.members.discard(member)
        if not known.members:
            del self._extents[extent]
            self._live_bytes -= known.file_bytes
            gone[extent] = known

    def _bury(self, extent: ExtentId, gone: dict[ExtentId, Extent]) -> None:
        naming = self._gone.setdefault(extent, set())
        while len(self._gone) > TOMBSTONES:
            self._gone.pop(next(iter(self._gone)))
        known = self._extents.pop(extent, None)
        if known is None:
            return
        self._live_bytes -= known.file_bytes
        for member in known.members:
            self._of_member.get(member, {}).pop(extent, None)
        naming |= known.members
        known.members.clear()
        gone[extent] = known

    def _tell(self, added: dict[ExtentId, Extent], gone: dict[ExtentId, Extent]) -> Change:
        """Under `_order`."""
        change = Change(tuple(added.values()), tuple(gone.values()))
        if change:
            for feed in self._feeds:
                feed.put(change)
            self._on_change(change)
        return change

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        with self._lock:
            assert self._live_bytes == sum(extent.file_bytes for extent in self._extents.values())
            assert not self._gone.keys() & self._extents.keys()
            for name, extent in self._extents.items():
                assert extent.id == name and extent.members
                assert all(name in self._of_member[member] for member in extent.members)
            for member, names in self._of_member.items():
                assert all(member in self._extents[name].members for name in names)
