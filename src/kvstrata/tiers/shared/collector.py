"""Collector: makes room in a shared folder, and gives it to the members. One member at a time is it.

All that cannot be undone is done by a member whose epoch is the highest, asked before each step (`Lease`).
Nothing here depends on a step having ended: whoever collects next finds in the journals and in the folder
what is to be done. It has no thread; `cycle` is called by the tier's.

The work itself is done by `Estate` (what the dead left), `RoomMaker` and the grants' book of a `Term`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kvstrata.table import unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.estate import Estate
from kvstrata.tiers.shared.format import grants_name
from kvstrata.tiers.shared.journal import JournalWriter
from kvstrata.tiers.shared.lease import Lease, boot_seconds
from kvstrata.tiers.shared.means import CycleReport, Fenced, Means
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import Member
from kvstrata.tiers.shared.room_maker import RoomMaker
from kvstrata.tiers.shared.small_files import FolderSettings
from kvstrata.tiers.shared.term import CollectorConfig, Term, begin_term

AUDIT_PAUSE = 20
"""An audit is made no sooner after the last than so many times what that took: on a slow medium the folder
is not listed all the time."""


class Collector:
    """holder: was this member the collector in its last cycle. Not thread-safe: one thread's.

    Members, their beats and the catalog are kept up to date by somebody else; the collector reads access
    logs itself. journal: this member's. Its batches are in the catalog when they are durable.
    """

    def __init__(
        self,
        medium: Medium,
        member: Member,
        catalog: Catalog,
        journal: JournalWriter,
        settings: FolderSettings,
        config: CollectorConfig,
        telemetry: Telemetry,
        tier_name: str,
        *,
        clock: Callable[[], float] = boot_seconds,
        clock_ms: Callable[[], int] = unix_ms,
    ) -> None:
        self.holder = False
        lease = Lease(
            medium,
            member.id,
            settings.lease_seconds,
            beat_age=lambda: member.silent_seconds if member.joined else math.inf,
            silent=self._silent,
            clock=clock,
        )
        self._means = Means(
            medium, member, catalog, journal, settings, config, telemetry, tier_name, lease, clock, clock_ms
        )
        self._estate = Estate(self._means)
        self._room = RoomMaker(self._means)
        self._absent: dict[int, float] = {}
        self._term: Term | None = None

    # One cycle

    def cycle(self) -> CycleReport:
        """Become the collector if nobody is; do its work if it is this member. Raises OSError.

        It may be called again after an error, and does what was left.
        """
        self._means.report = CycleReport()
        try:
            if self._means.lease.contend():
                self._collect()
            else:
                self._stand_down()
        except Fenced:
            self._means.count("shared_fenced_total")
            self._stand_down()
        self._means.report.holder = self.holder = self._term is not None
        return self._means.report

    def close(self) -> None:
        """Give the epoch up, so that the next member need not wait. Raises OSError."""
        self._stand_down()
        self._means.lease.release()

    def _collect(self) -> None:
        term = self._begin_term()
        self._means.report.epoch = term.epoch
        self._learn(term)
        self._estate.bury(term)
        if self._means.clock() >= term.audit_at:
            self._audit(term)
        self._room.finish_doomed(term)
        self._room.make(term)
        self._grant(term)
        self._summarize(term)

    def _begin_term(self) -> Term:
        term = self._term
        if term is not None and term.epoch == self._means.lease.epoch:
            return term
        self._stand_down()
        self._term = begin_term(
            self._means.medium,
            self._means.member,
            self._means.catalog,
            self._means.settings,
            self._means.config,
            self._means.lease.epoch,
            self._means.reserve_bytes,
            self._means.clock,
        )
        self._means.count("shared_takeovers_total")
        self._means.event("shared collector", f"epoch {self._term.epoch}, {self._means.member.word}")
        if self._term.distrusted:
            self._means.event("shared grants damaged", "all members join anew")
        return self._term

    def _stand_down(self) -> None:
        if self._term is not None:
            self._term.feed.close()
            self._term = None

    def _silent(self, member: int) -> float:
        """For how long a member has been, as far as this one has seen."""
        if member in self._means.member.others():
            self._absent.pop(member, None)
            return 0.0 if self._means.member.alive(member) else math.inf
        # It has no folder, or we have not looked yet.
        self._absent = {member: self._absent.get(member, self._means.clock())}
        return self._means.clock() - self._absent[member]

    def _learn(self, term: Term) -> None:
        """Who used what, what has expired, and what each member has and wants."""
        means, own = self._means, self._means.member
        means.follow(term)
        members = [own.id, *own.others()]
        term.ledger.touch(term.reader.read(means.medium, members))
        term.ledger.expire(means.clock_ms())
        for member in members:
            if member in term.distrusted:
                continue
            beat = own.last_beat if member == own.id else own.seen_beat(member)
            term.book.observe(member, means.catalog.published_bytes(member), beat)

    def _audit(self, term: Term) -> None:
        """What the folder holds, and what is to be done about it that is not done at each cycle."""
        means = self._means
        began = means.clock()
        found = self._estate.settle(term)
        self._room.fit_ledger(term)
        for member in term.book.members:
            if member not in found.members:
                term.book.expel(member)
        if means.lease.settled and not term.distrusted:
            term.book.forgive()
        seconds = means.clock() - began
        term.audit_at = began + max(means.settings.lease_seconds / 2, AUDIT_PAUSE * seconds)
        means.report.audited = True
        self._estate.write_order(term)
        self._room.merge(term)

    def _grant(self, term: Term) -> None:
        if not self._means.lease.settled:
            return
        grants = term.book.plan(self._means.used(term))
        if grants is None:
            return
        try:
            self._means.step()
            self._means.medium.replace(grants_name(term.epoch), grants.encode())
        except BaseException:
            term.book.unwritten()
            raise
        self._means.report.granted = True
        if not term.granted:
            self._means.lease.clean()
            term.granted = True

    def _summarize(self, term: Term) -> None:
        report, ledger = self._means.report, term.ledger
        counts = {
            "shared_duplicates_total": ledger.duplicates,
            "evictions_total": ledger.evicted,
            "shared_expired_total": ledger.expired,
            "shared_access_damaged_total": term.reader.damaged,
        }
        for name, count in counts.items():
            self._means.count(name, by=count - term.counted.get(name, 0))
        term.counted = counts
        report.used_bytes = self._means.used(term)
        report.outstanding_bytes = term.book.outstanding_bytes
        report.free_bytes = term.book.free_bytes(report.used_bytes)
        report.live_bytes = term.ledger.live_bytes
