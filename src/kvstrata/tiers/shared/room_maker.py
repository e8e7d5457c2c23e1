"""RoomMaker: drops extents, rewrites them and merges them, so that there is room for what members want.

Which extents these are is `room`'s arithmetic, and how they are copied is `rewrite`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.extent_file import footer_bytes, slots_within
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.ledger import ExtentView
from kvstrata.tiers.shared.means import GONE_AT_ONCE, Means
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
from kvstrata.tiers.shared.term import Term

FREE_SHARE = 0.05
"""Of the room: kept free, where that costs no live block, so that members need not wait."""
MERGE_EXTENTS = 8
"""So many small extents of one kind become one."""
PATIENT_CYCLES = 2
"""So long may members wait for rewriting to make room; then live blocks go, the emptiest extents first."""


class RoomMaker:
    """Every method may raise OSError and Fenced, and may be called again after that."""

    def __init__(self, means: Means) -> None:
        self._means = means

    def finish_doomed(self, term: Term) -> None:
        """Unlink what is gone by our word; a word that was never heard dooms nobody."""
        if self._means.journal.pending:
            self._means.journal.flush()
            self._means.follow(term)
        for extent in list(term.doomed):
            if self._means.catalog.get(extent) is None:
                self._means.step()
                self._means.medium.remove(extent.name)
                self._means.report.collected_extents += 1
                self._means.report.collected_bytes += term.doomed[extent]
                self._means.count("shared_collected_extents_total")
                self._means.count("shared_collected_bytes_total", by=term.doomed[extent])
            del term.doomed[extent]

    def _drop(self, term: Term, extents: Sequence[Extent]) -> None:
        """Tell that extents are gone, then unlink them."""
        for begin in range(0, len(extents), GONE_AT_ONCE):
            some = extents[begin : begin + GONE_AT_ONCE]
            self._means.step()
            term.doomed.update({extent.id: extent.file_bytes for extent in some})
            self._means.journal.gone([extent.id for extent in some])
            self._means.follow(term)
            self.finish_doomed(term)

    def _needed(self, term: Term) -> tuple[int, int]:
        """Bytes to free for what members want, and beyond that to have some ready.

        What members may write and what is free together are at most what is not for live blocks.
        """
        used = self._means.used(term)
        free = term.book.free_bytes(used)
        promised = term.book.outstanding_bytes + term.book.debt_bytes
        spare = int(self._means.room_bytes * (1 - self._means.config.live_share)) - promised
        wanted = min(term.book.missing_bytes(), spare)
        ready = min(wanted + int(self._means.room_bytes * FREE_SHARE), spare)
        over = max(0, used - self._means.room_bytes)
        urgent = wanted - free if wanted > 0 else 0
        soon = ready - free if ready > 0 else 0
        return max(urgent, over), max(soon, over)

    def make(self, term: Term) -> None:
        """As much as members want now, and some beyond that."""
        now = self._means.clock()
        rate = self._means.config.rewrite_bytes_per_second
        burst = max(self._means.settings.extent_bytes, rate * self._means.settings.lease_seconds / 2)
        term.budget_bytes = min(burst, term.budget_bytes + rate * (now - term.cycle_at))
        term.cycle_at = now
        _, wanted = self._needed(term)
        # In quarantine nobody can be given anything.
        if not wanted or not self._means.lease.settled:
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
        if term.starved > PATIENT_CYCLES or self._means.used(term) > self._means.room_bytes:
            rows = emptiest_rows(term.ledger.view(), max(urgent, 1))
            self._drop(term, self._extents(term, rows))
            term.starved = 0

    def fit_ledger(self, term: Term) -> None:
        """Bound what lives by what there is room for, footers and files of others left out."""
        view = term.ledger.view()
        files = int(view.file_bytes.sum())
        share = int(view.slot_bytes.sum()) / files if files else 1.0
        room = max(0, self._means.room_bytes - term.overhead_bytes)
        live_bytes = int(room * self._means.config.live_share * min(1.0, share))
        if abs(live_bytes - term.ledger.capacity_bytes) > self._means.room_bytes // 128:
            term.ledger.resize(live_bytes)

    @staticmethod
    def _extents(term: Term, rows: NDArray[np.int64]) -> list[Extent]:
        return [term.ledger.extent(row) for row in rows.tolist()]

    @staticmethod
    def _candidates(term: Term, view: ExtentView, places: NDArray[np.int64]) -> list[Candidate]:
        found = zip(view.rows[places].tolist(), view.live_blocks[places].tolist(), strict=True)
        some = [Candidate(term.ledger.extent(row), live) for row, live in found]
        return [one for one in some if one.extent.id not in term.unreadable]

    def merge(self, term: Term) -> None:
        """Make one of many small extents, so that the number of files stays small."""
        view = term.ledger.view()
        small = self._candidates(term, view, small_rows(view, self._means.settings.extent_bytes))
        for kind in by_kind(small):
            if len(kind) >= MERGE_EXTENTS:
                self._rewrite_chain(term, kind, self._means.settings.capacity_bytes)

    def _rewrite_chain(self, term: Term, candidates: list[Candidate], wanted: int) -> None:
        """Copy what lives in extents of one kind into new ones, one by one, and drop those it left."""
        sources = chain(
            candidates,
            extent_bytes=self._means.settings.extent_bytes,
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
        slots = slots_within(self._means.settings.extent_bytes, stride)
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
            if term.book.free_bytes(self._means.used(term)) + self._means.settings.extent_bytes < size:
                return None
            if not self._write_copy(term, sources, blocks * stride):
                return None
        self._drop(term, [extent for extent in spent if self._means.catalog.get(extent.id) is extent])
        return left

    def _write_copy(self, term: Term, sources: Sequence[Source], size: int) -> bool:
        self._means.step()
        target = ExtentId(self._means.member.id, self._means.member.next_sequence())
        progress = Progress()
        term.budget_bytes -= size
        term.failed.add(target)
        try:
            added = rewrite(self._means.medium, sources, target, progress)
        except OSError as error:
            term.audit_at = -math.inf  # it finds out what became of the target
            if progress.reading is None:
                raise
            # The source cannot be read; nothing else is known to be wrong.
            term.unreadable.add(progress.reading)
            self._means.event("shared extent unreadable", f"{progress.reading.name}: {error}")
            return False
        finally:
            self._means.count("shared_damaged_blocks_total", by=progress.damaged)
        term.failed.discard(target)
        if added is not None:
            term.unspoken[target] = added.file_bytes
            term.moved.add(target)
            self._means.report.rewritten_bytes += added.file_bytes
            self._means.count("shared_rewritten_bytes_total", by=added.file_bytes)
            self._means.journal.add([added])
            self._means.follow(term)
        return True
