"""One trace through several tiers: what each serves, what moves between them, and the TTFT it makes.

What happens to a request is what `BlockStore` does, call by call, with the same policy kernels:

    lookup   a block is there if any tier has it; the leading run of such blocks is the usable prefix
    load     every block of the prefix is read from the first tier that has it; with `promote`, what came
             from below is put into the first tier, one policy call per block
    save     one policy call per tier with the whole chain. The first tier takes the blocks that the engine
             has bytes for; what it has no room for is offered to the next one
    below    write_mode "back": one call per lower tier, which takes what it lacks of what is above it.
             "through": one call for the blocks that the first tier took, then a touch of the chain

Reads and writes take no time here, so nothing is pinned when a policy is asked, and all blocks from the
first tier have been read when the first from below is promoted. The live store has memory and nvme; tiers
further down get from the ones above what nvme gets from memory. Time is in `kvstrata.sim.ttft`.

Tiers are independent of each other, and are replayed in whole batches, where each sees every request's
whole chain in one call whatever the others do. See `replayable`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvstrata.config import WriteMode
from kvstrata.errors import ConfigError
from kvstrata.jit import kernel
from kvstrata.policies.base import ADMITTED, HIT, Flags, Ints, Policy
from kvstrata.policies.belady import Belady
from kvstrata.policies.lists import Ids
from kvstrata.sim.capacity import Capacity, resolve
from kvstrata.sim.replay import BATCH_ACCESSES, Workload, make_simulated
from kvstrata.sim.ttft import GPU, ComputeModel, TtftComparison, compare, offered_load
from kvstrata.traces.trace import Batch

Sources = Literal["computed", "whole"]
"""What a save has bytes for: the blocks that the engine had to compute, or its whole chain."""

Progress = Callable[[int, int], None]

ENGINE = "engine"
"""The name of the place where blocks come from and go to."""

WHY = ("load", "promote", "save", "write-back", "write-through")
"""Why blocks move."""

INDEPENDENT = ("lru", "belady")
"""Policies that answer as a lookup before the request would: a request never evicts its own hits."""

MAX_TIERS = 16


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier. Raises ConfigError for what cannot be.

    capacity: as in `kvstrata.sim.capacity.resolve`. params: of the policy, where they differ from the
    defaults. read_, write_bytes_per_second: of the tier's link, each direction its own. latency_seconds:
    from asking to the first byte, once per request.
    """

    name: str
    policy: str = "lru"
    params: Mapping[str, float] = field(default_factory=dict)
    capacity: str = "64GiB"
    read_bytes_per_second: float = 50e9
    write_bytes_per_second: float = 50e9
    latency_seconds: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("read_bytes_per_second", "write_bytes_per_second"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"tier {self.name}: {name} is {getattr(self, name):g}; take more than 0")
        if not 0 <= self.latency_seconds < float("inf"):
            raise ConfigError(
                f"tier {self.name}: latency_seconds is {self.latency_seconds:g}; take a number from 0"
            )


TIER_DEFAULTS: dict[str, TierSpec] = {
    spec.name: spec
    for spec in (
        TierSpec("memory", "lru", {}, "64GiB", 50e9, 50e9, 10e-6),
        TierSpec("nvme", "lru", {}, "1TiB", 7e9, 5e9, 100e-6),
        TierSpec("pool", "lru", {}, "1TiB", 20e9, 20e9, 50e-6),
        TierSpec("shared_fs", "lru", {}, "16TiB", 10e9, 5e9, 1e-3),
        TierSpec("object_store", "lru", {}, "64TiB", 2.5e9, 2.5e9, 20e-3),
    )
}
"""What a kind of tier is taken for when nothing is said: line rates less a fifth, no measurements.

memory: one GPU's PCIe 5.0 x16 (63 GB/s). nvme: one PCIe 4.0 x4 drive (7.9 GB/s on the line), as data sheets
have them. pool: one 200 Gb/s port (25 GB/s). shared_fs: one 100 Gb/s port (12.5 GB/s), metadata in the
latency. object_store: one 25 Gb/s port (3.1 GB/s), an HTTP request in the latency.
"""


@dataclass(frozen=True, slots=True)
class TierResult:
    """One tier, in blocks, bytes, and ratios from 0 to 1 of all block accesses.

    found_blocks: accesses of blocks that were here and in no faster tier. served_blocks: of them, those in
    the usable prefix, which is what is read. served_ratio: served_blocks / accesses. block_hit_ratio and
    usable_prefix_hit_ratio: cumulative, of this tier and the faster ones together. written_*: what came in.
    evictions: what came in and left before the end. *_utilisation: seconds its link was busy / seconds of
    the trace; None where all requests arrive at once.
    """

    name: str
    policy: str
    params: dict[str, float]
    capacity_fraction: float
    capacity_blocks: int
    capacity_bytes: int
    found_blocks: int
    served_blocks: int
    served_bytes: int
    served_ratio: float
    block_hit_ratio: float
    usable_prefix_hit_ratio: float
    written_blocks: int
    written_bytes: int
    evictions: int
    resident_blocks: int
    read_utilisation: float | None
    write_utilisation: float | None


@dataclass(frozen=True, slots=True)
class LinkResult:
    """What moved from one place to another. A promoted block is read once: for the engine."""

    source: str
    target: str
    why: str
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Served:
    """Per request. found, blocks, bytes: requests x tiers. found: blocks whose first tier it is; the others
    are of the usable prefix alone, which is what is read."""

    arrival_seconds: NDArray[np.float64]
    blocks_asked: Ints
    prompt_tokens: Ints
    prefix_blocks: Ints
    found: Ints
    blocks: Ints
    bytes: Ints


@dataclass(frozen=True, slots=True)
class TiersResult:
    """A trace through tiers, fastest first.

    replayed: the tiers were independent and replayed in batches. ttft: None where blocks are no tokens.
    seconds: of the replay. served: per request; not part of `as_dict`.
    """

    trace: str
    requests: int
    accesses: int
    unique_blocks: int
    promote: bool
    write_mode: str
    sources: str
    replayed: bool
    block_hit_ratio: float
    usable_prefix_hit_ratio: float
    request_hit_ratio: float
    recompute_tokens_saved: int | None
    tiers: tuple[TierResult, ...]
    links: tuple[LinkResult, ...]
    compute: ComputeModel
    ttft: TtftComparison | None
    seconds: float
    served: Served

    def as_dict(self) -> dict[str, Any]:
        """For JSON: figures, no arrays."""
        shallow = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        del shallow["served"]
        shallow["tiers"] = [dataclasses.asdict(tier) for tier in self.tiers]
        shallow["links"] = [dataclasses.asdict(link) for link in self.links]
        shallow["compute"] = dataclasses.asdict(self.compute)
        shallow["ttft"] = self.ttft.as_dict() if self.ttft is not None else None
        return shallow


@kernel
def _tally(
    first: NDArray[np.int8],
    starts: Ints,
    tiers: int,
    found: Ints,
    served: Ints,
    prefix: Ints,
    reached: Ints,
) -> None:
    """first: per access, the first tier that has the block, `tiers` for none. found, served: requests x
    tiers. prefix: per request. reached[k]: accesses in a leading run that tiers 0 to k serve and 0 to k-1
    alone do not."""
    for request in range(len(starts) - 1):
        deepest = 0
        for position in range(starts[request], starts[request + 1]):
            tier = first[position]
            if tier < tiers:
                found[request, tier] += 1
            deepest = max(deepest, tier)
            if deepest < tiers:
                reached[deepest] += 1
                served[request, tier] += 1
                prefix[request] += 1


class _Flow:
    """Adds up what moves: blocks per (source, target, why), bytes too."""

    def __init__(self, weights: Ints, unit_bytes: int) -> None:
        """weights: per id, in units of unit_bytes."""
        self._weights = weights
        self._unit_bytes = unit_bytes
        self._moved: dict[tuple[str, str, str], list[int]] = {}

    def add(self, source: str, target: str, why: str, ids: Ids) -> None:
        if len(ids):
            total = self._moved.setdefault((source, target, why), [0, 0])
            total[0] += len(ids)
            total[1] += int(self._weights[ids].sum())

    def links(self, places: Sequence[str]) -> tuple[LinkResult, ...]:
        """In the order of WHY, then of places."""

        def order(link: tuple[str, str, str]) -> tuple[int, int, int]:
            source, target, why = link
            return WHY.index(why), places.index(source), places.index(target)

        return tuple(
            LinkResult(*link, blocks=self._moved[link][0], bytes=self._moved[link][1] * self._unit_bytes)
            for link in sorted(self._moved, key=order)
        )


def replayable(
    workload: Workload, tiers: Sequence[TierSpec], capacities: Sequence[Capacity], *, promote: bool,
    write_mode: WriteMode, sources: Sources,
) -> bool:  # fmt: skip
    """May every tier be replayed alone, in whole batches, and answer as the live store would?

    With one tier, or where a save brings the whole chain and lower tiers get it by write-back, each tier
    sees each request's chain in one call. (Promotion and write-through are calls for single blocks.) The
    policy must answer per access what a lookup before the request would have said, and every request must
    fit into every tier, so that none hands blocks on or gives up its own.
    """
    if len(tiers) > 1 and (promote or write_mode != "back" or sources != "whole"):
        return False
    if any(tier.policy not in INDEPENDENT for tier in tiers):
        return False
    return _largest_request(workload) <= min(capacity.units for capacity in capacities)


def _largest_request(workload: Workload) -> int:
    """In the unit of `Capacity.units`."""
    largest = 0
    sizes = workload.sizes()
    for batch in workload.source.batches(BATCH_ACCESSES):
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes[batch.ids])])[batch.starts]
        largest = max(largest, int(np.diff(ends).max(initial=0)))
    return largest


def simulate_tiers(
    workload: Workload, tiers: Sequence[TierSpec], compute: ComputeModel | None = None, *,
    promote: bool = True, write_mode: WriteMode = "back", sources: Sources = "computed", queue: bool = True,
    progress: Progress | None = None,
) -> TiersResult:  # fmt: skip
    """Replay the whole trace through tiers, fastest first.

    promote, write_mode: as in the first tier's configuration. sources: what a save has bytes for. queue:
    TTFT with waiting too. progress: called with (accesses done, accesses). Raises ConfigError.
    """
    if not 0 < len(tiers) <= MAX_TIERS:
        raise ConfigError(f"{len(tiers)} tiers; give from 1 to {MAX_TIERS}")
    names = [tier.name for tier in tiers]
    if len(set(names)) < len(names) or {ENGINE, GPU} & set(names):
        raise ConfigError(f"tiers {', '.join(names)}: every tier needs a name of its own")
    capacities = [resolve(tier.capacity, workload.footprint) for tier in tiers]
    alone = replayable(workload, tiers, capacities, promote=promote, write_mode=write_mode, sources=sources)
    if not alone and any(tier.policy == Belady.name for tier in tiers):
        raise ConfigError(
            "policy belady needs tiers that do not depend on each other: no promotion, write_mode back, "
            "sources whole, lru or belady in every tier, and no request larger than a tier"
        )
    policies = [
        make_simulated(workload, tier.policy, capacity, **tier.params)
        for tier, capacity in zip(tiers, capacities, strict=True)
    ]
    run = _Run(workload, names, policies, promote, write_mode, sources)
    step = run.replay if alone else run.step
    seconds, done = 0.0, 0
    for batch in workload.source.batches(BATCH_ACCESSES):
        started = time.perf_counter()
        run.count(batch, step(batch))
        seconds += time.perf_counter() - started
        done += len(batch.ids)
        if progress is not None:
            progress(done, workload.head.accesses)
    return run.result(tiers, capacities, compute or ComputeModel(), queue, alone, seconds)


class _Run:
    """The state of one simulation."""

    def __init__(
        self, workload: Workload, names: list[str], policies: Sequence[Policy | Belady], promote: bool,
        write_mode: WriteMode, sources: Sources,
    ) -> None:  # fmt: skip
        self._workload = workload
        self._names = names
        self._policies = policies
        self._promote = promote and len(names) > 1
        self._through = write_mode == "through" and len(names) > 1
        self._write_mode = write_mode
        self._sources = sources
        self._sizes = workload.sizes()
        self._no_pins = np.zeros(workload.head.unique, dtype=np.int32)
        self._flow = _Flow(self._sizes, workload.head.block_bytes or 1)
        self._written = np.zeros((len(names), 2), dtype=np.int64)
        self._reached = np.zeros(len(names), dtype=np.int64)
        self._parts: list[Served] = []

    # The policies, all requests of a batch at once

    def replay(self, batch: Batch) -> NDArray[np.int8]:
        """Per access the first tier that has it; the tiers do not depend on each other."""
        count = len(self._names)
        first = np.full(len(batch.ids), count, dtype=np.int8)
        for tier in range(count - 1, -1, -1):
            outcome = self._policies[tier].replay(batch.ids, batch.starts, self._sizes)
            first[outcome == HIT] = tier
            self._write(
                ENGINE if tier == 0 else self._names[0],
                tier,
                "save" if tier == 0 else "write-back",
                batch.ids[outcome == ADMITTED],
            )
        return first

    # The policies, call by call as in the store

    def step(self, batch: Batch) -> NDArray[np.int8]:
        """Per access the first tier that has it."""
        policies = [policy for policy in self._policies if isinstance(policy, Policy)]
        first = np.full(len(batch.ids), len(policies), dtype=np.int8)
        starts = batch.starts.tolist()
        for row in range(batch.requests):
            chain = batch.ids[starts[row] : starts[row + 1]]
            if len(chain):
                there = first[starts[row] : starts[row + 1]]
                self._request(policies, chain, there, batch.first_request + row + 1)
        return first

    def _request(self, policies: list[Policy], chain: Ids, there: NDArray[np.int8], number: int) -> None:
        """Lookup, load and save of one request; there: to be filled with the first tier of each block."""
        for tier in range(len(policies) - 1, -1, -1):
            there[policies[tier].where[chain] > 0] = tier
        missing = np.flatnonzero(there == len(policies))
        prefix = int(missing[0]) if len(missing) else len(chain)
        if self._promote:
            self._load(policies[0], chain[:prefix], there[:prefix])
        wanted = np.ones(len(chain), dtype=np.bool_)
        if self._sources == "computed":
            wanted[:prefix] = False
        taken = self._place(policies, chain, wanted, number)
        if self._through:
            self._write_through(policies, chain, taken, number)
        else:
            self._write_back(policies, chain, number)

    def _load(self, first: Policy, prefix: Ids, there: NDArray[np.int8]) -> None:
        below = np.flatnonzero(there)
        came = self._one_by_one(first, prefix[below])
        for tier in range(1, len(self._names)):
            self._write(self._names[tier], 0, "promote", prefix[below[came & (there[below] == tier)]])

    def _one_by_one(self, policy: Policy, blocks: Ids) -> Flags:
        """As many policy calls as blocks, in one: who came in, if only to leave again."""
        if not len(blocks):
            return np.zeros(0, dtype=np.bool_)
        starts = np.arange(len(blocks) + 1, dtype=np.int64)
        came: Flags = policy.replay(blocks, starts, self._sizes) == ADMITTED
        return came

    def _place(self, policies: list[Policy], chain: Ids, wanted: Flags, number: int) -> Flags:
        """Every wanted block into the first tier that has room; returns what the first one took."""
        taken = np.zeros(len(chain), dtype=np.bool_)
        for tier, policy in enumerate(policies):
            before = policy.where[chain] > 0
            came = self._touch(policy, chain, wanted, number)
            self._write(ENGINE, tier, "save", chain[came])
            if tier == 0:
                taken = came
            wanted = wanted & ~before & ~came
            if not wanted.any():
                break
        return taken

    def _write_back(self, policies: list[Policy], chain: Ids, number: int) -> None:
        for tier in range(1, len(policies)):
            source = np.full(len(chain), tier, dtype=np.int8)
            for upper in range(tier - 1, -1, -1):
                source[policies[upper].where[chain] > 0] = upper
            came = self._touch(policies[tier], chain, source < tier, number)
            for upper in range(tier):
                self._write(self._names[upper], tier, "write-back", chain[came & (source == upper)])

    def _write_through(self, policies: list[Policy], chain: Ids, taken: Flags, number: int) -> None:
        for tier in range(1, len(policies)):
            blocks = chain[taken]
            came = self._touch(policies[tier], blocks, np.ones(len(blocks), dtype=np.bool_), 0)
            self._write(ENGINE, tier, "write-through", blocks[came])
            self._touch(policies[tier], chain, np.zeros(len(chain), dtype=np.bool_), number)

    def _touch(self, policy: Policy, chain: Ids, admit: Flags, number: int) -> Flags:
        """One policy call; returns who is resident now and was not before."""
        before = policy.where[chain] > 0
        policy.access(chain, admit, self._sizes, self._no_pins, number)
        return (policy.where[chain] > 0) & ~before

    # Counting

    def _write(self, source: str, tier: int, why: str, ids: Ids) -> None:
        if len(ids):
            self._flow.add(source, self._names[tier], why, ids)
            self._written[tier] += len(ids), int(self._sizes[ids].sum())

    def count(self, batch: Batch, first: NDArray[np.int8]) -> None:
        """Add one batch; first: per access, the first tier that has the block."""
        count, requests = len(self._names), batch.requests
        found = np.zeros((requests, count), dtype=np.int64)
        served = np.zeros((requests, count), dtype=np.int64)
        prefix = np.zeros(requests, dtype=np.int64)
        _tally(first, batch.starts, count, found, served, prefix, self._reached)
        asked = np.diff(batch.starts)
        leading = np.arange(len(first)) < np.repeat(batch.starts[:-1] + prefix, asked)
        size = np.zeros((requests, count), dtype=np.int64)
        owner = np.repeat(np.arange(requests), asked)
        for tier, name in enumerate(self._names):
            mine = leading & (first == tier)
            self._flow.add(name, ENGINE, "load", batch.ids[mine])
            np.add.at(size[:, tier], owner[mine], batch.sizes[mine])
        tokens = asked * self._workload.head.block_tokens
        told = batch.features["input_tokens"]
        tokens = np.where(told >= 0, told, tokens)
        self._parts.append(Served(batch.time_s, asked, tokens, prefix, found, served, size))

    def result(
        self, tiers: Sequence[TierSpec], capacities: Sequence[Capacity], compute: ComputeModel, queue: bool,
        replayed: bool, seconds: float,
    ) -> TiersResult:  # fmt: skip
        head = self._workload.head
        served = self._served()
        whole = int(np.count_nonzero(served.prefix_blocks == served.blocks_asked))
        prefix_blocks = int(served.prefix_blocks.sum())
        return TiersResult(
            trace=self._workload.name,
            requests=head.requests,
            accesses=head.accesses,
            unique_blocks=head.unique,
            promote=self._promote,
            write_mode=self._write_mode,
            sources=self._sources,
            replayed=replayed,
            block_hit_ratio=_share(int(served.found.sum()), head.accesses),
            usable_prefix_hit_ratio=_share(prefix_blocks, head.accesses),
            request_hit_ratio=_share(whole, head.requests),
            recompute_tokens_saved=prefix_blocks * head.block_tokens if head.block_tokens else None,
            tiers=self._tier_results(tiers, capacities, served),
            links=self._flow.links([ENGINE, *self._names]),
            compute=compute,
            ttft=_compare(compute, tiers, served, head.block_tokens, queue),
            seconds=seconds,
            served=served,
        )

    def _served(self) -> Served:
        count = len(self._names)
        none = np.zeros(0, dtype=np.int64)
        grid = np.zeros((0, count), dtype=np.int64)
        parts = self._parts or [Served(none.astype(np.float64), none, none, none, grid, grid, grid)]
        return Served(
            *(
                np.concatenate([getattr(part, each.name) for part in parts])
                for each in dataclasses.fields(Served)
            )
        )

    def _tier_results(
        self, tiers: Sequence[TierSpec], capacities: Sequence[Capacity], served: Served
    ) -> tuple[TierResult, ...]:
        accesses = self._workload.head.accesses
        unit = self._workload.head.block_bytes or 1
        found = served.found.sum(axis=0)
        blocks, sizes = served.blocks.sum(axis=0), served.bytes.sum(axis=0)
        asked = np.count_nonzero(served.blocks, axis=0)
        results = []
        for tier, (spec, capacity) in enumerate(zip(tiers, capacities, strict=True)):
            policy = self._policies[tier]
            params, resident = dict(policy.knobs), policy.resident_blocks
            written = int(self._written[tier, 1]) * unit
            reading = (
                spec.latency_seconds * int(asked[tier]) + int(sizes[tier]) / spec.read_bytes_per_second
            )
            writing = written / spec.write_bytes_per_second
            results.append(
                TierResult(
                    name=spec.name,
                    policy=spec.policy,
                    params=params,
                    capacity_fraction=capacity.fraction,
                    capacity_blocks=capacity.blocks,
                    capacity_bytes=capacity.bytes,
                    found_blocks=int(found[tier]),
                    served_blocks=int(blocks[tier]),
                    served_bytes=int(sizes[tier]),
                    served_ratio=_share(int(blocks[tier]), accesses),
                    block_hit_ratio=_share(int(found[: tier + 1].sum()), accesses),
                    usable_prefix_hit_ratio=_share(int(self._reached[: tier + 1].sum()), accesses),
                    written_blocks=int(self._written[tier, 0]),
                    written_bytes=written,
                    evictions=int(self._written[tier, 0]) - resident,
                    resident_blocks=resident,
                    read_utilisation=offered_load(reading, served.arrival_seconds),
                    write_utilisation=offered_load(writing, served.arrival_seconds),
                )
            )
        return tuple(results)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _compare(
    compute: ComputeModel, tiers: Sequence[TierSpec], served: Served, block_tokens: int, queue: bool
) -> TtftComparison | None:
    if not block_tokens:
        return None
    latency = np.array([tier.latency_seconds for tier in tiers])
    speed = np.array([tier.read_bytes_per_second for tier in tiers])
    return compare(
        compute,
        arrival=served.arrival_seconds,
        prompt_tokens=served.prompt_tokens,
        cached_tokens=served.prefix_blocks * block_tokens,
        fetch=latency + served.bytes / speed,
        visits=served.blocks > 0,
        tiers=[tier.name for tier in tiers],
        queue=queue,
    )
