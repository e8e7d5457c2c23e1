"""What a replay counts, and the figures made of the counts. Knows no policy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.policies.base import ADMITTED, HIT, Ints, Outcomes
from kvstrata.policies.lists import Ids
from kvstrata.sim.capacity import Capacity

(
    REQUESTS, ACCESSES, HITS, PREFIX_HITS, WHOLE_REQUESTS, ADMITS, REUSED, ASKED_BYTES, HIT_BYTES,
    ADMITTED_BYTES, PREFIX_BYTES, TOTALS,
) = range(12)  # fmt: skip


NOT_ADMITTED = -1
EIGHT_HITS = np.uint64(0x0101010101010101)

Numbers = NDArray[np.int32]


@kernel
def number_uses(ids: Ids, seen: Numbers, number: Numbers) -> None:
    """number[p]: how often ids[p] was used before p; seen[id]: how often in all. Both go on over calls."""
    for position in range(len(ids)):
        index = ids[position]
        number[position] = seen[index]
        seen[index] += 1


@kernel
def _leading_hits(outcome: Outcomes, words: NDArray[np.uint64], first: int, end: int) -> int:
    """How many accesses from `first` on hit without a gap. words: outcome, eight at a time."""
    position = first
    while position < end and outcome[position] == HIT:
        position += 1
        if position & 7 == 0:
            while position + 8 <= end and words[position >> 3] == EIGHT_HITS:
                position += 8
    return position - first


@kernel
def _count(
    outcome: Outcomes, words: NDArray[np.uint64], starts: Ints, ids: Ids, sizes: Ints, one_size: bool,
    number: Numbers, admitted: Numbers, totals: Ints, prefix_share: NDArray[np.float64],
) -> None:  # fmt: skip
    """admitted[id]: number of the use that admitted the block, or NOT_ADMITTED.

    Only what does not hit is looked at one by one: between two such uses of a block all others hit.
    """
    reused = 0
    admits = 0
    all_hits = 0
    for request in range(len(starts) - 1):
        first = starts[request]
        end = starts[request + 1]
        prefix = _leading_hits(outcome, words, first, end)
        hits = prefix
        for position in range(first + prefix, end):
            what = outcome[position]
            if what == HIT:
                hits += 1
                continue
            index = ids[position]
            if admitted[index] != NOT_ADMITTED:
                reused += number[position] - admitted[index] > 1
            admitted[index] = NOT_ADMITTED
            if what == ADMITTED:
                admitted[index] = number[position]
                admits += 1
        all_hits += hits
        totals[PREFIX_HITS] += prefix
        totals[WHOLE_REQUESTS] += prefix == end - first
        if end > first:
            prefix_share[0] += prefix / (end - first)
        if not one_size:
            for position in range(first, end):
                size = sizes[ids[position]]
                totals[ASKED_BYTES] += size
                if outcome[position] == HIT:
                    totals[HIT_BYTES] += size
                elif outcome[position] == ADMITTED:
                    totals[ADMITTED_BYTES] += size
                if position < first + prefix:
                    totals[PREFIX_BYTES] += size
    totals[REQUESTS] += len(starts) - 1
    totals[ACCESSES] += len(ids)
    totals[HITS] += all_hits
    totals[ADMITS] += admits
    totals[REUSED] += reused


class Counts:
    """Adds up the outcomes of a replay. block_bytes: size of every block, 0 where they differ."""

    def __init__(self, unique: int, block_bytes: int) -> None:
        self._admitted = np.full(unique, NOT_ADMITTED, dtype=np.int32)
        self._block_bytes = block_bytes
        self._totals = np.zeros(TOTALS, dtype=np.int64)
        self._prefix_share = np.zeros(1, dtype=np.float64)
        # One empty batch loads or compiles the kernel before anybody measures.
        none = np.zeros(0, dtype=np.int32)
        self.add(none.astype(np.int8), np.zeros(1, np.int64), none, none.astype(np.int64), none)

    def add(self, outcome: Outcomes, starts: Ints, ids: Ids, sizes: Ints, number: Numbers) -> None:
        """One batch of whole requests; starts begin at 0, sizes are indexed by id, number as in
        `number_uses`."""
        words = outcome[: len(outcome) // 8 * 8].view(np.uint64)
        one_size = self._block_bytes > 0
        _count(
            outcome, words, starts, ids, sizes, one_size, number, self._admitted, self._totals,
            self._prefix_share,
        )  # fmt: skip

    def finish(self, uses: Numbers) -> None:
        """After the last batch. uses: how often each id was used in all."""
        last = self._admitted != NOT_ADMITTED
        self._totals[REUSED] += np.count_nonzero(uses[last] - self._admitted[last] > 1)

    def totals(self) -> NDArray[np.int64]:
        """Indexed by the constants of this module; the bytes filled in where all blocks have one size."""
        totals = self._totals.copy()
        if self._block_bytes:
            counted = [
                (ASKED_BYTES, ACCESSES),
                (HIT_BYTES, HITS),
                (ADMITTED_BYTES, ADMITS),
                (PREFIX_BYTES, PREFIX_HITS),
            ]
            for kind, count in counted:
                totals[kind] = totals[count] * self._block_bytes
        return totals

    @property
    def mean_prefix_share(self) -> float:
        """Mean over the requests of leading hits / blocks."""
        return _ratio(float(self._prefix_share[0]), int(self._totals[REQUESTS]))


@dataclass(frozen=True, slots=True)
class RunResult:
    """One policy at one capacity on one trace. Ratios are from 0 to 1; None where nothing was divided by.

    block_hit_ratio: accesses that hit. usable_prefix_hit_ratio: accesses in the unbroken run of hits from
    the root, what an engine can use; mean_usable_prefix_hit_ratio is its mean over requests.
    request_hit_ratio: requests whose every block hit. amplification: bytes populated / bytes hit.
    wasted_ratio: admits never reused / admits. evictions: admits that left before the end.
    recompute_tokens_saved: tokens of usable prefix hits, None where blocks are no tokens. seconds: of the
    replay, without reading the trace and compiling.
    """

    trace: str
    policy: str
    params: dict[str, float]
    capacity_fraction: float
    capacity_blocks: int
    capacity_bytes: int
    accesses: int
    requests: int
    unique_blocks: int
    block_hit_ratio: float
    usable_prefix_hit_ratio: float
    mean_usable_prefix_hit_ratio: float
    request_hit_ratio: float
    byte_hit_ratio: float
    amplification: float | None
    wasted_ratio: float | None
    admits: int
    evictions: int
    hit_bytes: int
    populated_bytes: int
    recompute_tokens_saved: int | None
    seconds: float
    gap_to_belady: float | None = field(default=None)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _ratio(over: float, under: float) -> float:
    return over / under if under else 0.0


def result_of(
    counts: Counts, *, trace: str, policy: str, params: dict[str, float], capacity: Capacity,
    unique_blocks: int, block_tokens: int, resident: int, seconds: float,
) -> RunResult:  # fmt: skip
    """The figures of a finished replay. resident: blocks that were there at its end."""
    totals = [int(value) for value in counts.totals()]
    accesses, admits = totals[ACCESSES], totals[ADMITS]
    return RunResult(
        trace=trace,
        policy=policy,
        params=params,
        capacity_fraction=capacity.fraction,
        capacity_blocks=capacity.blocks,
        capacity_bytes=capacity.bytes,
        accesses=accesses,
        requests=totals[REQUESTS],
        unique_blocks=unique_blocks,
        block_hit_ratio=_ratio(totals[HITS], accesses),
        usable_prefix_hit_ratio=_ratio(totals[PREFIX_HITS], accesses),
        mean_usable_prefix_hit_ratio=counts.mean_prefix_share,
        request_hit_ratio=_ratio(totals[WHOLE_REQUESTS], totals[REQUESTS]),
        byte_hit_ratio=_ratio(totals[HIT_BYTES], totals[ASKED_BYTES]),
        amplification=totals[ADMITTED_BYTES] / totals[HIT_BYTES] if totals[HIT_BYTES] else None,
        wasted_ratio=(admits - totals[REUSED]) / admits if admits else None,
        admits=admits,
        evictions=admits - resident,
        hit_bytes=totals[HIT_BYTES],
        populated_bytes=totals[ADMITTED_BYTES],
        recompute_tokens_saved=totals[PREFIX_HITS] * block_tokens if block_tokens else None,
        seconds=seconds,
    )
