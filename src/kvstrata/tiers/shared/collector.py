"""Collector: makes room in a shared folder, and gives it to the members. One member at a time is it.

All that cannot be undone is done by a member whose epoch is the highest, asked before each step (`Lease`).
Nothing here depends on a step having ended: whoever collects next finds in the journals and in the folder
what is to be done. It has no thread; `cycle` is called by the tier's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstrata.table import unix_ms
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.shared.audit import sound_footer
from kvstrata.tiers.shared.catalog import Catalog, Extent
from kvstrata.tiers.shared.format import (
    Added,
    ExtentId,
    FolderSettings,
    footer_bytes,
    grants_name,
    member_folder,
    reserve_bytes,
    slots_within,
)
from kvstrata.tiers.shared.journal import JournalWriter
from kvstrata.tiers.shared.lease import Lease, boot_seconds
from kvstrata.tiers.shared.ledger import ExtentView
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import Member
from kvstrata.tiers.shared.order import MOST_WORDS, Order, order_name
from kvstrata.tiers.shared.rewrite import Progress, Source, rewrite
from kvstrata.tiers.shared.room import (
    Candidate,
    by_kind,
    chain,
    emptiest_rows,
    empty_rows,
    small_rows,
    worthy_rows,
)
from kvstrata.tiers.shared.term import CollectorConfig, Term, begin_term

FREE_SHARE = 0.05
"""Of the room: kept free, where that costs no live block, so that members need not wait."""
MERGE_EXTENTS = 8
"""So many small extents of one kind become one."""
PATIENT_CYCLES = 2
"""So long may members wait for rewriting to make room; then live blocks go, the emptiest extents first."""
GONE_AT_ONCE = 256
"""Extents of one GONE record."""
ADOPT_ENTRIES = 65_536
"""Entries of one record of adopted extents."""
AUDIT_PAUSE = 20
"""An audit is made no sooner after the last than so many times what that took: on a slow medium the folder
is not listed all the time."""


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


class _Fenced(Exception):  # noqa: N818 - it is no error
    """Another member may be the collector by now."""


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
        self._medium = medium
        self._member = member
        self._catalog = catalog
        self._journal = journal
        self._settings = settings
        self._config = config
        self._telemetry = telemetry
        self._tier = tier_name
        self._clock = clock
        self._clock_ms = clock_ms
        self._lease = Lease(
            medium,
            member.id,
            settings.lease_seconds,
            beat_age=lambda: member.silent_seconds if member.joined else math.inf,
            silent=self._silent,
            clock=clock,
        )
        self._absent: dict[int, float] = {}
        self._term: Term | None = None
        self._report = CycleReport()
        # Rewriting takes room before it gives any: one extent is kept free for it at all times.
        self._reserve_bytes = reserve_bytes(settings.capacity_bytes) + settings.extent_bytes
        self._room_bytes = max(0, settings.capacity_bytes - self._reserve_bytes)

    # One cycle

    def cycle(self) -> CycleReport:
        """Become the collector if nobody is; do its work if it is this member. Raises OSError.

        It may be called again after an error, and does what was left.
        """
        self._report = CycleReport()
        try:
            if self._lease.contend():
                self._collect()
            else:
                self._stand_down()
        except _Fenced:
            self._count("shared_fenced_total")
            self._stand_down()
        self._report.holder = self.holder = self._term is not None
        return self._report

    def close(self) -> None:
        """Give the epoch up, so that the next member need not wait. Raises OSError."""
        self._stand_down()
        self._lease.release()

    def _collect(self) -> None:
        term = self._begin_term()
        self._report.epoch = term.epoch
        self._learn(term)
        self._bury(term)
        if self._clock() >= term.audit_at:
            self._audit(term)
        self._finish_doomed(term)
        self._make_room(term)
        self._grant(term)
        self._summarize(term)

    def _begin_term(self) -> Term:
        term = self._term
        if term is not None and term.epoch == self._lease.epoch:
            return term
        self._stand_down()
        self._term = begin_term(
            self._medium,
            self._member,
            self._catalog,
            self._settings,
            self._config,
            self._lease.epoch,
            self._reserve_bytes,
            self._clock,
        )
        self._count("shared_takeovers_total")
        said = f"{self._tier}: epoch {self._term.epoch}, {self._member.word}"
        self._telemetry.event("shared collector", said)
        if self._term.distrusted:
            self._telemetry.event("shared grants damaged", f"{self._tier}: all members join anew")
        return self._term

    def _write_order(self, term: Term) -> None:
        """For whoever collects after us, before what it says is lost, and now and then."""
        most = min(MOST_WORDS, reserve_bytes(self._settings.capacity_bytes) // 128)
        sequences: dict[int, int] = {}
        for extent in self._catalog.extents():
            writer, sequence = extent.id
            sequences[writer] = max(sequence, sequences.get(writer, 0))
        order = Order(term.ledger.hottest(most), sequences, term.reader.known)
        self._step()
        self._medium.replace(order_name(term.epoch), order.encode())

    def _stand_down(self) -> None:
        if self._term is not None:
            self._term.feed.close()
            self._term = None

    def _step(self) -> None:
        """Before whatever cannot be undone. Raises _Fenced."""
        if not self._lease.check():
            raise _Fenced

    def _silent(self, member: int) -> float:
        """For how long a member has been, as far as this one has seen."""
        if member in self._member.others():
            self._absent.pop(member, None)
            return 0.0 if self._member.alive(member) else math.inf
        # It has no folder, or we have not looked yet.
        self._absent = {member: self._absent.get(member, self._clock())}
        return self._clock() - self._absent[member]

    # What is there

    def _learn(self, term: Term) -> None:
        self._follow(term)
        ledger = term.ledger
        members = [self._member.id, *self._member.others()]
        ledger.touch(term.reader.read(self._medium, members))
        ledger.expire(self._clock_ms())
        for member in members:
            if member in term.distrusted:
                continue
            beat = self._member.last_beat if member == self._member.id else self._member.seen_beat(member)
            term.book.observe(member, self._catalog.published_bytes(member), beat)

    def _follow(self, term: Term) -> None:
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
        self._report.lost_blocks += blocks
        self._count("shared_lost_blocks_total", blocks)

    def _used(self, term: Term) -> int:
        """Asked after the members' published bytes: what comes in between counts twice, and never not."""
        doomed = sum(size for extent, size in term.doomed.items() if self._catalog.get(extent) is None)
        return self._catalog.live_bytes + doomed + sum(term.unspoken.values()) + term.overhead_bytes

    # The dead

    def _bury(self, term: Term) -> None:
        """Adopt what dead members published, and remove their folders."""
        for member in self._member.others():
            if member in term.buried or self._member.alive(member):
                continue
            self._adopt(term, self._catalog.of_member(member))
            self._repeat_gone(member)
            self._write_order(term)
            self._step()
            self._medium.remove_folder(member_folder(member))
            self._catalog.forget_member(member)
            term.buried.add(member)
            term.book.expel(member)
            term.distrusted.discard(member)
            term.audit_at = -math.inf
            self._telemetry.event("shared member gone", f"{self._tier}: {member:016x}")

    def _repeat_gone(self, dead: int) -> None:
        """What the dead member declared gone goes on standing in others' journals: its word must, too."""
        readers = {self._member.id, *self._member.others()} - {dead}
        lost = [
            extent
            for extent in self._catalog.still_named(readers)
            if not self._journal.has_said_gone(extent)
        ]
        for begin in range(0, len(lost), GONE_AT_ONCE):
            self._journal.gone(lost[begin : begin + GONE_AT_ONCE])

    def _adopt(self, term: Term, extents: Sequence[Extent]) -> None:
        mine = [extent for extent in extents if self._member.id not in extent.members]
        begin = entries = 0
        for end, extent in enumerate(mine, 1):
            entries += len(extent.entries)
            if entries >= ADOPT_ENTRIES or end == len(mine):
                self._journal.add([one.added(adopted=True) for one in mine[begin:end]])
                begin, entries = end, 0
        self._report.adopted_extents += len(mine)
        self._count("shared_adopted_extents_total", len(mine))
        self._follow(term)

    # What the folder holds

    def _audit(self, term: Term) -> None:
        began = self._clock()
        owned = {*term.unspoken}
        found = term.auditor.look()
        for name in found.foreign:
            self._telemetry.event("shared foreign file", f"{self._tier}: {name}")
        self._count("shared_foreign_files_total", len(found.foreign))
        for name, extent in [
            *found.dead_parts,
            *((e.part, e) for e in term.failed if e.part in found.parts),
        ]:
            self._remove_orphan(name, "part")
            term.failed.discard(extent)
        for name in found.leftovers:
            self._remove_orphan(name, "temporary")
        lost = [extent for extent in found.missing if self._catalog.get(extent) is not None]
        if lost:
            self._count("shared_missing_extents_total", len(lost))
            self._journal.gone(lost)
        for extent, size in found.unknown.items():
            if extent in owned or extent in term.doomed:
                continue
            unwanted = extent in term.failed or self._catalog.is_gone(extent)
            if not unwanted and extent in found.ownerless:
                unwanted = not self._adopt_orphan(extent, size)
            if unwanted:
                self._remove_orphan(extent.name, "extent")
        term.failed -= {extent for extent in term.failed if extent.part not in found.parts}
        self._follow(term)
        term.overhead_bytes = found.overhead_bytes
        self._fit_ledger(term)
        for member in term.book.members:
            if member not in found.members:
                term.book.expel(member)
        if self._lease.settled and not term.distrusted:
            term.book.forgive()
        seconds = self._clock() - began
        term.audit_at = began + max(self._settings.lease_seconds / 2, AUDIT_PAUSE * seconds)
        self._report.audited = True
        self._write_order(term)
        self._merge(term)

    def _fit_ledger(self, term: Term) -> None:
        """Bound what lives by what there is room for, footers and files of others left out."""
        view = term.ledger.view()
        files = int(view.file_bytes.sum())
        share = int(view.slot_bytes.sum()) / files if files else 1.0
        room = max(0, self._room_bytes - term.overhead_bytes)
        live_bytes = int(room * self._config.live_share * min(1.0, share))
        if abs(live_bytes - term.ledger.capacity_bytes) > self._room_bytes // 128:
            term.ledger.resize(live_bytes)

    def _adopt_orphan(self, extent: ExtentId, size: int) -> bool:
        """Take over a whole extent that is in no journal; False if it is not whole."""
        footer = sound_footer(self._medium, extent)
        if footer is None:
            return False
        added = Added(extent, size, footer.stride, footer.namespace, footer.entries, adopted=True)
        self._journal.add([added])
        self._report.adopted_extents += 1
        self._count("shared_adopted_extents_total")
        return True

    def _remove_orphan(self, name: str, kind: str) -> None:
        self._step()
        self._medium.remove(name)
        self._telemetry.count("shared_orphans_total", self._tier, kind)

    # Room

    def _finish_doomed(self, term: Term) -> None:
        """Unlink what is gone by our word; a word that was never heard dooms nobody."""
        if self._journal.pending:
            self._journal.flush()
            self._follow(term)
        for extent in list(term.doomed):
            if self._catalog.get(extent) is None:
                self._step()
                self._medium.remove(extent.name)
                self._report.collected_extents += 1
                self._report.collected_bytes += term.doomed[extent]
                self._count("shared_collected_extents_total")
                self._count("shared_collected_bytes_total", term.doomed[extent])
            del term.doomed[extent]

    def _drop(self, term: Term, extents: Sequence[Extent]) -> None:
        """Tell that extents are gone, then unlink them."""
        for begin in range(0, len(extents), GONE_AT_ONCE):
            some = extents[begin : begin + GONE_AT_ONCE]
            self._step()
            term.doomed.update({extent.id: extent.file_bytes for extent in some})
            self._journal.gone([extent.id for extent in some])
            self._follow(term)
            self._finish_doomed(term)

    def _needed(self, term: Term) -> tuple[int, int]:
        """Bytes to free for what members want, and beyond that to have some ready.

        What members may write and what is free together are at most what is not for live blocks.
        """
        used = self._used(term)
        free = term.book.free_bytes(used)
        promised = term.book.outstanding_bytes + term.book.debt_bytes
        spare = int(self._room_bytes * (1 - self._config.live_share)) - promised
        wanted = min(term.book.missing_bytes(), spare)
        ready = min(wanted + int(self._room_bytes * FREE_SHARE), spare)
        over = max(0, used - self._room_bytes)
        urgent = wanted - free if wanted > 0 else 0
        soon = ready - free if ready > 0 else 0
        return max(urgent, over), max(soon, over)

    def _make_room(self, term: Term) -> None:
        now = self._clock()
        rate = self._config.rewrite_bytes_per_second
        burst = max(self._settings.extent_bytes, rate * self._settings.lease_seconds / 2)
        term.budget_bytes = min(burst, term.budget_bytes + rate * (now - term.cycle_at))
        term.cycle_at = now
        _, wanted = self._needed(term)
        # In quarantine nobody can be given anything.
        if not wanted or not self._lease.settled:
            return
        self._drop(term, self._extents(term, empty_rows(term.ledger.view(), wanted)))
        _, wanted = self._needed(term)
        if wanted:
            view = term.ledger.view()
            for kind in by_kind(self._candidates(term, view, worthy_rows(view))):
                self._rewrite_chain(term, kind, wanted)
                _, wanted = self._needed(term)
                if not wanted:
                    break
        urgent, _ = self._needed(term)
        term.starved = term.starved + 1 if urgent else 0
        if term.starved > PATIENT_CYCLES or self._used(term) > self._room_bytes:
            rows = emptiest_rows(term.ledger.view(), max(urgent, 1))
            self._drop(term, self._extents(term, rows))
            term.starved = 0

    @staticmethod
    def _extents(term: Term, rows: NDArray[np.int64]) -> list[Extent]:
        return [term.ledger.extent(row) for row in rows.tolist()]

    @staticmethod
    def _candidates(term: Term, view: ExtentView, places: NDArray[np.int64]) -> list[Candidate]:
        found = zip(view.rows[places].tolist(), view.live_blocks[places].tolist(), strict=True)
        some = [Candidate(term.ledger.extent(row), live) for row, live in found]
        return [one for one in some if one.extent.id not in term.unreadable]

    def _merge(self, term: Term) -> None:
        """Make one of many small extents, so that the number of files stays small."""
        view = term.ledger.view()
        small = self._candidates(term, view, small_rows(view, self._settings.extent_bytes))
        for kind in by_kind(small):
            if len(kind) >= MERGE_EXTENTS:
                self._rewrite_chain(term, kind, self._settings.capacity_bytes)

    def _rewrite_chain(self, term: Term, candidates: list[Candidate], wanted: int) -> None:
        """Copy what lives in extents of one kind into new ones, one by one, and drop those it left."""
        sources = chain(
            candidates,
            extent_bytes=self._settings.extent_bytes,
            budget_bytes=term.budget_bytes,
            wanted=wanted,
        )
        while sources and not term.failed:
            left = self._rewrite(term, sources)
            if left is None:
                break
            sources = left

    def _rewrite(self, term: Term, extents: Sequence[Extent]) -> list[Extent] | None:
        """One new extent from the first of these, as much as it holds. Returns those that it leaves; None
        if it could not be written.
        """
        stride = extents[0].stride
        slots = slots_within(self._settings.extent_bytes, stride)
        sources: list[Source] = []
        left: list[Extent] = []
        for extent in extents:
            living = extent.entries[term.ledger.living(extent)]
            taken = living[:slots]
            slots -= len(taken)
            if len(taken):
                sources.append(Source(extent, taken))
            if len(taken) < len(living):
                left.append(extent)
        spent = [extent for extent in extents if extent not in left]
        blocks = sum(len(source.entries) for source in sources)
        if blocks:
            size = blocks * stride + footer_bytes(blocks)
            if term.book.free_bytes(self._used(term)) + self._settings.extent_bytes < size:
                return None
            if not self._write_copy(term, sources, blocks * stride):
                return None
        self._drop(term, [extent for extent in spent if self._catalog.get(extent.id) is extent])
        return left

    def _write_copy(self, term: Term, sources: Sequence[Source], size: int) -> bool:
        self._step()
        target = ExtentId(self._member.id, self._member.next_sequence())
        progress = Progress()
        term.budget_bytes -= size
        term.failed.add(target)
        try:
            added = rewrite(self._medium, sources, target, progress)
        except OSError as error:
            term.audit_at = -math.inf  # it finds out what became of the target
            if progress.reading is None:
                raise
            # The source cannot be read; nothing else is known to be wrong.
            term.unreadable.add(progress.reading)
            self._telemetry.event(
                "shared extent unreadable", f"{self._tier}: {progress.reading.name}: {error}"
            )
            return False
        finally:
            self._count("shared_damaged_blocks_total", progress.damaged)
        term.failed.discard(target)
        if added is not None:
            term.unspoken[target] = added.file_bytes
            term.moved.add(target)
            self._report.rewritten_bytes += added.file_bytes
            self._count("shared_rewritten_bytes_total", added.file_bytes)
            self._journal.add([added])
            self._follow(term)
        return True

    # Grants

    def _grant(self, term: Term) -> None:
        if not self._lease.settled:
            return
        grants = term.book.plan(self._used(term))
        if grants is None:
            return
        try:
            self._step()
            self._medium.replace(grants_name(term.epoch), grants.encode())
        except BaseException:
            term.book.unwritten()
            raise
        self._report.granted = True
        if not term.granted:
            self._lease.clean()
            term.granted = True

    def _summarize(self, term: Term) -> None:
        report, ledger = self._report, term.ledger
        counts = {
            "shared_duplicates_total": ledger.duplicates,
            "evictions_total": ledger.evicted,
            "expired_total": ledger.expired,
            "shared_access_damaged_total": term.reader.damaged,
        }
        for name, count in counts.items():
            self._count(name, count - term.counted.get(name, 0))
        term.counted = counts
        report.used_bytes = self._used(term)
        report.outstanding_bytes = term.book.outstanding_bytes
        report.free_bytes = term.book.free_bytes(report.used_bytes)
        report.live_bytes = term.ledger.live_bytes

    def _count(self, name: str, by: int = 1) -> None:
        self._telemetry.count(name, self._tier, by=by)
