"""Estate: what dead members and collectors before us left in the folder is adopted or removed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstrata.tiers.shared.audit import Findings, sound_footer
from kvstrata.tiers.shared.batches import Added
from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.format import ExtentId, member_folder
from kvstrata.tiers.shared.means import GONE_AT_ONCE, Means
from kvstrata.tiers.shared.order import MOST_WORDS, Order, order_name
from kvstrata.tiers.shared.small_files import reserve_bytes
from kvstrata.tiers.shared.term import Term

ADOPT_ENTRIES = 65_536
"""Entries of one record of adopted extents."""


class Estate:
    """Every method may raise OSError and Fenced, and may be called again after that."""

    def __init__(self, means: Means) -> None:
        self._means = means

    def bury(self, term: Term) -> None:
        """Adopt what dead members published, and remove their folders."""
        for member in self._means.member.others():
            if member in term.buried or self._means.member.alive(member):
                continue
            self._adopt(term, self._means.catalog.of_member(member))
            self._repeat_gone(member)
            self.write_order(term)
            self._means.step()
            self._means.medium.remove_folder(member_folder(member))
            self._means.catalog.forget_member(member)
            term.buried.add(member)
            term.book.expel(member)
            term.distrusted.discard(member)
            term.audit_at = -math.inf
            self._means.event("shared member gone", f"{member:016x}")

    def _repeat_gone(self, dead: int) -> None:
        """What the dead member declared gone goes on standing in others' journals: its word must, too."""
        readers = {self._means.member.id, *self._means.member.others()} - {dead}
        lost = [
            extent
            for extent in self._means.catalog.still_named(readers)
            if not self._means.journal.has_said_gone(extent)
        ]
        for begin in range(0, len(lost), GONE_AT_ONCE):
            self._means.journal.gone(lost[begin : begin + GONE_AT_ONCE])

    def _adopt(self, term: Term, extents: Sequence[Extent]) -> None:
        mine = [extent for extent in extents if self._means.member.id not in extent.members]
        begin = entries = 0
        for end, extent in enumerate(mine, 1):
            entries += len(extent.entries)
            if entries >= ADOPT_ENTRIES or end == len(mine):
                self._means.journal.add([one.added(adopted=True) for one in mine[begin:end]])
                begin, entries = end, 0
        self._means.report.adopted_extents += len(mine)
        self._means.count("shared_adopted_extents_total", by=len(mine))
        self._means.follow(term)

    def settle(self, term: Term) -> Findings:
        """List the folder, and do what is to be done about each thing there that no journal explains."""
        owned = {*term.unspoken}
        found = term.auditor.look()
        for name in found.foreign:
            self._means.event("shared foreign file", name)
        self._means.count("shared_foreign_files_total", by=len(found.foreign))
        for name, extent in [
            *found.dead_parts,
            *((e.part, e) for e in term.failed if e.part in found.parts),
        ]:
            self._remove_orphan(name, "part")
            term.failed.discard(extent)
        for name in found.leftovers:
            self._remove_orphan(name, "temporary")
        lost = [extent for extent in found.missing if self._means.catalog.get(extent) is not None]
        if lost:
            self._means.count("shared_missing_extents_total", by=len(lost))
            self._means.journal.gone(lost)
        for extent, size in found.unknown.items():
            if extent in owned or extent in term.doomed:
                continue
            unwanted = extent in term.failed or self._means.catalog.is_gone(extent)
            if not unwanted and extent in found.ownerless:
                unwanted = not self._adopt_orphan(extent, size)
            if unwanted:
                self._remove_orphan(extent.name, "extent")
        term.failed -= {extent for extent in term.failed if extent.part not in found.parts}
        self._means.follow(term)
        term.overhead_bytes = found.overhead_bytes
        return found

    def _adopt_orphan(self, extent: ExtentId, size: int) -> bool:
        """Take over a whole extent that is in no journal; False if it is not whole."""
        footer = sound_footer(self._means.medium, extent)
        if footer is None:
            return False
        added = Added(extent, size, footer.stride, footer.namespace, footer.entries, adopted=True)
        self._means.journal.add([added])
        self._means.report.adopted_extents += 1
        self._means.count("shared_adopted_extents_total")
        return True

    def _remove_orphan(self, name: str, kind: str) -> None:
        self._means.step()
        self._means.medium.remove(name)
        self._means.count("shared_orphans_total", kind)

    def write_order(self, term: Term) -> None:
        """For whoever collects after us, before what it says is lost, and now and then."""
        most = min(MOST_WORDS, reserve_bytes(self._means.settings.capacity_bytes) // 128)
        sequences: dict[int, int] = {}
        for extent in self._means.catalog.extents():
            writer, sequence = extent.id
            sequences[writer] = max(sequence, sequences.get(writer, 0))
        order = Order(term.ledger.hottest(most), sequences, term.reader.known)
        self._means.step()
        self._means.medium.replace(order_name(term.epoch), order.encode())
