"""One trace through one policy: the kernels of the live store, fed in batches of whole requests.

Everything may enter and nothing is pinned, as in a store whose writes and reads take no time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import numpy as np

from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES, make_policy
from kvstrata.policies.base import Ints, Policy, check_knobs
from kvstrata.policies.belady import Belady, Future
from kvstrata.policies.lists import Ids
from kvstrata.sim.capacity import Capacity, Footprint
from kvstrata.sim.metrics import Counts, Numbers, RunResult, number_uses, result_of
from kvstrata.traces.trace import Batch, Trace, TraceSource

BATCH_ACCESSES = 1 << 18
"""Accesses per kernel call: their outcomes stay in the processor's cache until they are counted."""

SIMULATED = (*sorted(POLICIES), "belady")
"""Every policy that can be simulated."""


class Workload:
    """A trace made ready for many replays: its footprint, sizes and, for the oracle, its future."""

    def __init__(self, source: TraceSource, name: str | None = None) -> None:
        self.source = source
        self.head = source.head
        self.name = name or source.head.name
        self._future: Future | None = None
        self._sizes: Ints | None = None
        self._numbers: tuple[Numbers, Numbers] | None = None
        uniform = self.head.block_bytes
        if uniform:
            total = self.head.unique * uniform
        else:
            self._sizes = _sizes(source)
            total = int(self._sizes.sum())
        self.footprint = Footprint(self.head.unique, total, uniform)

    def sizes(self) -> Ints:
        """Per id, in the unit of `Capacity.units`."""
        if self._sizes is None:
            self._sizes = np.ones(self.head.unique, dtype=np.int64)
        return self._sizes

    def batches(self) -> Iterator[tuple[Batch, Numbers, Numbers]]:
        """Batches, the number of every use in them, and how often each id has been used so far (in all,
        for a trace in memory, whose numbers are made once)."""
        in_memory = isinstance(self.source, Trace)
        if self._numbers is not None:
            number, seen = self._numbers
        else:
            number = np.zeros(self.head.accesses if in_memory else 0, dtype=np.int32)
            seen = np.zeros(self.head.unique, dtype=np.int32)
            if isinstance(self.source, Trace):
                number_uses(self.source.ids, seen, number)
                self._numbers = number, seen
        end = 0
        for batch in self.source.batches(BATCH_ACCESSES):
            if in_memory:
                part = number[end : end + len(batch.ids)]
                end += len(batch.ids)
            else:
                part = np.zeros(len(batch.ids), dtype=np.int32)
                number_uses(batch.ids, seen, part)
            yield batch, part, seen

    def future(self) -> Future:
        """What the oracle knows. Needs all accesses in memory: 12 bytes for each."""
        if self._future is None:
            self._future = Future(*_whole(self.source))
        return self._future


def _sizes(source: TraceSource) -> Ints:
    if isinstance(source, Trace):
        return source.size
    sizes = np.zeros(source.head.unique, dtype=np.int64)
    for batch in source.batches():
        sizes[batch.ids] = batch.sizes
    return sizes


def _whole(source: TraceSource) -> tuple[Ids, Ids]:
    """All ids in order, and the depth of every id."""
    if isinstance(source, Trace):
        return source.ids, source.depth
    ids = np.zeros(source.head.accesses, dtype=np.int32)
    depth = np.zeros(source.head.unique, dtype=np.int32)
    end = 0
    for batch in source.batches():
        ids[end : end + len(batch.ids)] = batch.ids
        depth[batch.ids] = batch.depths
        end += len(batch.ids)
    return ids, depth


def make_simulated(workload: Workload, policy: str, capacity: Capacity, **params: float) -> Policy | Belady:
    """A policy, or the oracle, for the ids of a workload. Raises ConfigError."""
    if policy == Belady.name:
        check_knobs(policy, Belady.KNOBS, params)
        made: Policy | Belady = Belady(workload.future(), capacity.units, **params)
    elif policy in POLICIES:
        made = make_policy(policy, workload.head.unique, capacity.units, **params)
    else:
        raise ConfigError(f"policy {policy!r} is not known; known: {', '.join(SIMULATED)}")
    # One empty call loads or compiles the kernel before anybody measures.
    none = np.zeros(0, dtype=np.int64)
    made.replay(none.astype(np.int32), np.zeros(1, dtype=np.int64), none)
    return made


def simulate(
    workload: Workload, policy: str, capacity: Capacity, params: Mapping[str, float] | None = None
) -> RunResult:
    """Replay the whole trace. params: the policy's parameters that differ from their defaults."""
    simulated = make_simulated(workload, policy, capacity, **(params or {}))
    sizes = workload.sizes()
    counts = Counts(workload.head.unique, workload.head.block_bytes)
    seconds = 0.0
    seen = np.zeros(workload.head.unique, dtype=np.int32)
    for batch, number, seen in workload.batches():  # noqa: B007 (the last `seen` counts)
        started = time.perf_counter()
        outcome = simulated.replay(batch.ids, batch.starts, sizes)
        counts.add(outcome, batch.starts, batch.ids, sizes, number)
        seconds += time.perf_counter() - started
    counts.finish(seen)
    return result_of(
        counts,
        trace=workload.name,
        policy=policy,
        params=simulated.knobs,
        capacity=capacity,
        unique_blocks=workload.head.unique,
        block_tokens=workload.head.block_tokens,
        resident=simulated.resident_blocks,
        seconds=seconds,
    )
