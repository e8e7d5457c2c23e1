"""Means: what the parts of a collector work with, and what each of them has to do as the others do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.journal import JournalWriter
from kvstrata.tiers.shared.lease import Lease
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import Member
from kvstrata.tiers.shared.small_files import FolderSettings, reserve_bytes
from kvstrata.tiers.shared.term import CollectorConfig, Term

GONE_AT_ONCE = 256
"""Extents of one GONE record."""


@dataclass(slots=True)
class CycleReport:
    """What one cycle found and did. holder: was this member the collector; the rest is 0 if it was not."""

    holder: bool = False
    epoch: int = 0
    used_bytes: int = 0
    outstanding_bytes: int = 0
    free_bytes: int = 0
    live_bytes: int = 0
    collected_extents: int = 0
    collected_bytes: int = 0
    lost_blocks: int = 0
    rewritten_bytes: int = 0
    adopted_extents: int = 0
    audited: bool = False
    granted: bool = False


class Fenced(Exception):  # noqa: N818 - it is no error
    """Another member may be the collector by now."""


@dataclass(slots=True)
class Means:
    """member, journal: this member's. telemetry: hears all with the tier's name. report: of this cycle."""

    medium: Medium
    member: Member
    catalog: Catalog
    journal: JournalWriter
    settings: FolderSettings
    config: CollectorConfig
    telemetry: Telemetry
    tier: str
    lease: Lease
    clock: Callable[[], float]
    clock_ms: Callable[[], int]
    report: CycleReport = field(default_factory=CycleReport)

    @property
    def reserve_bytes(self) -> int:
        """Rewriting takes room before it gives any: one extent is kept free for it at all times."""
        return reserve_bytes(self.settings.capacity_bytes) + self.settings.extent_bytes

    @property
    def room_bytes(self) -> int:
        return max(0, self.settings.capacity_bytes - self.reserve_bytes)

    def step(self) -> None:
        """Before whatever cannot be undone. Raises Fenced."""
        if not self.lease.check():
            raise Fenced

    def follow(self, term: Term) -> None:
        """Bring the ledger up to the catalog."""
        for change in term.feed.take():
            for extent in change.added:
                term.ledger.add(extent, moved=extent.id in term.moved)
                term.moved.discard(extent.id)
                term.unspoken.pop(extent.id, None)
            for extent in change.gone:
                self._lose(term.ledger.remove(extent))
                term.unreadable.discard(extent.id)

    def _lose(self, blocks: int) -> None:
        self.report.lost_blocks += blocks
        self.count("shared_lost_blocks_total", by=blocks)

    def used(self, term: Term) -> int:
        """Asked after the members' published bytes: what comes in between counts twice, and never not."""
        doomed = sum(size for extent, size in term.doomed.items() if self.catalog.get(extent) is None)
        return self.catalog.live_bytes + doomed + sum(term.unspoken.values()) + term.overhead_bytes

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        self.telemetry.count(name, self.tier, *labels, by=by)

    def event(self, name: str, detail: str) -> None:
        self.telemetry.event(name, f"{self.tier}: {detail}")
