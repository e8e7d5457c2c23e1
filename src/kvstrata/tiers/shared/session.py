"""Session: one life of this process in a shared folder, under one member id, with all that goes with it."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.grants import Allowance
from kvstrata.tiers.shared.journal import COMPACT_BYTES, JournalWriter
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import Member, uptime_seconds
from kvstrata.tiers.shared.recency import AccessLog
from kvstrata.tiers.shared.small_files import Beat, FolderSettings

COMPACT_GROWTH = 3
"""A journal is compacted when it has grown by so much."""
BURST_SHARE = 64
"""Of the capacity, one part in so many is kept ready for one member at most."""


class Session:
    """Joins the folder when it is made; raises OSError if that fails.

    beat: what this process says of itself. burst_bytes: room that it wants to have ready. What its journal
    says is in the catalog as soon as it is durable.
    """

    def __init__(
        self,
        medium: Medium,
        settings: FolderSettings,
        beat: Beat,
        catalog: Catalog,
        *,
        access_bytes: int,
        burst_bytes: int = 0,
        clock: Callable[[], float] = uptime_seconds,
    ) -> None:
        self._catalog = catalog
        self._compact_at_bytes = COMPACT_BYTES
        self.member = Member(medium, settings, beat, clock)
        self.journal = JournalWriter(
            medium, self.member.id, lambda batch: catalog.apply(self.member.id, batch)
        )
        self.access = AccessLog(medium, self.member.id, access_bytes)
        self.room = Allowance(self.member.id, min(burst_bytes, settings.capacity_bytes // BURST_SHARE))
        self.left = False
        self.member.join()

    @property
    def may_write(self) -> bool:
        """Can nobody have taken this member for dead?"""
        return not self.left and not self.room.expelled and self.member.fresh

    def next_extent(self) -> ExtentId | None:
        return ExtentId(self.member.id, self.member.next_sequence()) if self.may_write else None

    @property
    def beat_due(self) -> bool:
        """Is it time, or does this member need room that its last beat did not ask for?"""
        said = self.member.last_beat
        wanted = self.room.wanted_bytes()
        lacking = self.room.published_bytes + wanted > self.room.limit_bytes
        return self.member.beat_due() or (lacking and wanted > said.wanted_bytes)

    def beat(self, state: str = "open") -> None:
        """Raises OSError, ENOENT if this member's folder is gone."""
        epoch, counter, limit_bytes = self.room.acknowledgement()
        self.member.beat(
            state=state,
            wanted_bytes=self.room.wanted_bytes(),
            published_bytes=self.journal.published_bytes,
            grant_epoch=epoch,
            grant_counter=counter,
            limit_bytes=limit_bytes,
        )

    def compact(self) -> None:
        """Shorten the journal if that is worth it. Raises OSError."""
        if self.journal.bytes < self._compact_at_bytes:
            return
        me = self.member.id
        members = {me, *self.member.others()}
        # An extent that a dead member wrote may stand in the journal of a living one who adopted it.
        members.update(extent.member for extent in self._catalog.still_named(members - {me}))
        self.journal.compact(
            lambda: [
                extent.added(adopted=extent.id.member != me) for extent in self._catalog.of_member(me)
            ],
            members,
        )
        self._compact_at_bytes = max(COMPACT_BYTES, COMPACT_GROWTH * self.journal.bytes)
