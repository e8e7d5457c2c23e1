"""What a trace is like, in one pass: how much repeats, how long requests are, how soon blocks return.

No hit ratios: those depend on a cache, and are the simulator's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.traces.trace import BlockIds, Counts, Seconds, TraceHead, TraceSource

_GAP_BINS_PER_DECADE = 1000
_SHORTEST_GAP_S = 1e-6
_GAP_BINS = 16 * _GAP_BINS_PER_DECADE


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """sessions, tenants: 0 where the trace names none. accessed_bytes: of all accesses; unique_bytes: of
    each block once. request_blocks_p50, _p99: blocks of a request. reuse_gap_s_p50: median of the seconds
    from one access of a block to the next, to 0.2 %; None if no block is accessed twice."""

    head: TraceHead
    sessions: int
    tenants: int
    duration_s: float
    accessed_bytes: int
    unique_bytes: int
    request_blocks_p50: int
    request_blocks_p99: int
    reuse_gap_s_p50: float | None

    @property
    def reuse(self) -> float:
        """Share of the accesses whose block came before: the hit ratio of an infinite cache."""
        return 1 - self.head.unique / self.head.accesses if self.head.accesses else 0.0


def summarize(source: TraceSource, progress: Callable[[int, int], None] | None = None) -> TraceSummary:
    """Reads the trace once, in memory for one batch and 8 bytes per unique block.

    progress: called with (accesses read, accesses).
    """
    head = source.head
    last_s = np.full(head.unique, -1.0)
    gaps, lengths = np.zeros(_GAP_BINS, np.int64), np.zeros(1, np.int64)
    sessions = tenants = accessed_bytes = unique_bytes = accesses = 0
    duration_s = 0.0
    for batch in source.batches():
        time_s = np.repeat(batch.time_s, np.diff(batch.starts))
        before_s = _previous(batch.ids, time_s, last_s)
        again = before_s >= 0
        gaps += _histogram(time_s[again] - before_s[again])
        lengths = _add(lengths, np.bincount(np.diff(batch.starts)))
        sessions = max(sessions, int(batch.session.max(initial=-1)) + 1)
        tenants = max(tenants, int(batch.tenant.max(initial=-1)) + 1)
        accessed_bytes += int(batch.sizes.sum())
        unique_bytes += int(batch.sizes[~again].sum())
        duration_s = float(batch.time_s[-1])
        accesses += len(batch.ids)
        if progress is not None:
            progress(accesses, head.accesses)
    gap = _quantile(gaps, 0.5)
    return TraceSummary(
        head,
        sessions,
        tenants,
        duration_s,
        accessed_bytes,
        unique_bytes,
        _quantile(lengths, 0.5) or 0,
        _quantile(lengths, 0.99) or 0,
        None if gap is None else _gap_s(gap),
    )


def _previous(ids: BlockIds, time_s: Seconds, last_s: Seconds) -> Seconds:
    """When each access's block was accessed before, -1 if never. Brings last_s, by id, up to date."""
    order = np.argsort(ids, kind="stable")
    by_id, by_id_s = ids[order], time_s[order]
    first = np.ones(len(ids), np.bool_)
    first[1:] = by_id[1:] != by_id[:-1]
    before_s = np.empty(len(ids))
    before_s[order[first]] = last_s[by_id[first]]
    later = np.flatnonzero(~first)
    before_s[order[later]] = by_id_s[later - 1]
    last = np.append(first[1:], True)[: len(ids)]
    last_s[by_id[last]] = by_id_s[last]
    return before_s


def _histogram(gap_s: Seconds) -> Counts:
    decades = np.log10(np.maximum(gap_s, _SHORTEST_GAP_S) / _SHORTEST_GAP_S)
    bins = np.minimum(decades * _GAP_BINS_PER_DECADE, _GAP_BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=_GAP_BINS)


def _gap_s(place: int) -> float:
    """The middle of a bin; the first holds what is too short to tell from 0."""
    if place == 0:
        return 0.0
    return float(_SHORTEST_GAP_S * 10 ** ((place + 0.5) / _GAP_BINS_PER_DECADE))


def _quantile(counts: NDArray[Any], share: float) -> int | None:
    """The smallest value such that at least that share of all is not larger; None if there is none."""
    total = int(counts.sum())
    if not total:
        return None
    return int(np.searchsorted(np.cumsum(counts), share * total))


def _add(one: Counts, other: Counts) -> Counts:
    if len(one) < len(other):
        one, other = other, one
    result = one.copy()
    result[: len(other)] += other
    return result
