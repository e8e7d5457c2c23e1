"""Tiers in front of each other: hits as in the live store, bytes that add up, and the TTFT by hand."""

from __future__ import annotations

import heapq
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.config import MemoryTierConfig, NvmeTierConfig, WriteMode
from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES
from kvstrata.sim.capacity import resolve
from kvstrata.sim.replay import Workload, simulate
from kvstrata.sim.tiers import TIER_DEFAULTS, TierSpec, TiersResult, simulate_tiers
from kvstrata.sim.ttft import ComputeModel, Percentiles, compare, fcfs, first_token_times
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.open import open_trace
from kvstrata.traces.trace import Trace
from live_kit import SAMPLE, SLOT_BYTES, LiveReplay, open_store, read_chains

IN_MEMORY = 400


def make(chains: list[list[int]], times: list[float] | None = None, tokens: int | None = None) -> Workload:
    """A workload of 10-token blocks of 1,000 bytes, one request each second."""
    builder = TraceBuilder("made", "test", 10, 1_000)
    for number, chain in enumerate(chains):
        builder.add(times[number] if times else float(number), chain, input_tokens=tokens)
    return Workload(builder.build(0))


def tiers_of(*capacities: str, policy: str = "lru") -> list[TierSpec]:
    return [TierSpec(name, policy, {}, size) for name, size in zip(TIER_DEFAULTS, capacities, strict=False)]


@pytest.fixture(scope="module")
def sample() -> Workload:
    trace = open_trace(SAMPLE)
    assert isinstance(trace, Trace)
    return Workload(trace)


# Live and simulated

# Which policies, what a save brings, promotion, write mode.
LIVE = [
    ("lru", "lru", "whole", False, "back"),
    ("lru", "arc", "computed", False, "back"),
    ("arc", "lru", "computed", True, "back"),
    ("lru", "lru", "computed", True, "back"),
    ("lru_forward", "arc", "computed", True, "through"),
]


@pytest.mark.parametrize(("upper", "lower", "sources", "promote", "mode"), LIVE)
def test_every_tier_serves_what_it_serves_live(
    sample: Workload, upper: Any, lower: Any, sources: Literal["computed", "whole"], promote: bool,
    mode: WriteMode, tmp_path: Path,
) -> None:  # fmt: skip
    """300 real requests through a store of two tiers: the same first tier for every block of every request,
    and the same traffic."""
    chains = read_chains(SAMPLE)
    memory = MemoryTierConfig(capacity_bytes=IN_MEMORY * SLOT_BYTES, policy=upper, promote=promote)
    nvme = NvmeTierConfig(
        path=str(tmp_path / "nvme"), capacity_bytes=25 * 2**20, policy=lower, write_mode=mode
    )
    with open_store(memory, nvme) as store:
        on_nvme = store.tiers[1].table.slots
        replay = LiveReplay(store, sources=sources, in_turn=promote)
        replay.run(chains)
        store.check_integrity()
        value = store.telemetry.value
        evictions = [value("evictions_total", name) for name in ("memory", "nvme")]
        loaded = [value("blocks_total", "load", name, "loaded") for name in ("memory", "nvme")]
        promoted = value("blocks_total", "promote", "memory", "saved")
        passed_on = value("blocks_total", f"write_{mode}", "nvme", "saved")
    assert IN_MEMORY < on_nvme < sample.head.unique
    result = simulate_tiers(
        sample,
        [TierSpec("memory", upper, {}, f"{IN_MEMORY}b"), TierSpec("nvme", lower, {}, f"{on_nvme}b")],
        promote=promote,
        write_mode=mode,
        sources=sources,
    )
    found = [[firsts.count(tier) for tier in range(2)] for firsts in replay.first_tiers]
    assert result.served.found.tolist() == found
    prefix = [(*firsts, 2).index(2) for firsts in replay.first_tiers]
    assert result.served.prefix_blocks.tolist() == prefix
    served = [
        [firsts[:blocks].count(tier) for tier in range(2)]
        for firsts, blocks in zip(replay.first_tiers, prefix, strict=True)
    ]
    assert result.served.blocks.tolist() == served
    assert result.replayed == (sources == "whole")
    moved = {link.why: link.blocks for link in result.links if link.target != "engine"}
    assert moved.get("promote", 0) == promoted
    assert moved[f"write-{mode}"] == passed_on
    assert [tier.served_blocks for tier in result.tiers] == loaded
    assert [tier.evictions for tier in result.tiers] == evictions
    assert min(loaded) > 0 and (promoted > 0) == promote


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_one_tier_is_the_plain_simulation(sample: Workload, policy: str) -> None:
    """But for kernels that evict a request's own blocks before it reaches them: see `INDEPENDENT`."""
    tiers = simulate_tiers(sample, [TierSpec("memory", policy, {}, "10%")])
    plain = simulate(sample, policy, resolve("10%", sample.footprint))
    assert tiers.block_hit_ratio == pytest.approx(plain.block_hit_ratio, abs=0.001)
    assert tiers.tiers[0].block_hit_ratio == tiers.block_hit_ratio
    if policy == "lru":
        assert tiers.replayed
        assert (tiers.block_hit_ratio, tiers.usable_prefix_hit_ratio, tiers.request_hit_ratio) == (
            plain.block_hit_ratio, plain.usable_prefix_hit_ratio, plain.request_hit_ratio
        )  # fmt: skip
        assert tiers.tiers[0].evictions == plain.evictions
        assert tiers.tiers[0].written_bytes == plain.populated_bytes


def test_whole_batches_are_the_same_as_call_by_call(
    sample: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = tiers_of("300b", "800b", "2000b")
    at_once = simulate_tiers(sample, tiers, sources="whole", promote=False)
    monkeypatch.setattr("kvstrata.sim.tiers.replayable", lambda *_, **__: False)
    step_by_step = simulate_tiers(sample, tiers, sources="whole", promote=False)
    assert (at_once.replayed, step_by_step.replayed) == (True, False)
    assert_same(at_once, step_by_step)


def assert_same(one: TiersResult, other: TiersResult) -> None:
    ours, theirs = one.as_dict(), other.as_dict()
    for row in (ours, theirs):
        del row["seconds"], row["replayed"]
    assert ours == theirs
    assert np.array_equal(one.served.found, other.served.found)


def test_a_request_larger_than_a_tier_goes_call_by_call(sample: Workload) -> None:
    longest = max(map(len, read_chains(SAMPLE)))
    for blocks, at_once in ((longest, True), (longest - 1, False)):
        result = simulate_tiers(sample, tiers_of(f"{blocks}b", "3000b"), sources="whole", promote=False)
        assert result.replayed == at_once


# By hand


def test_what_has_no_room_above_goes_below_and_comes_back_by_promotion() -> None:
    chains = [[1, 2, 3], [4, 5, 6], [1, 2, 3, 7]]
    result = simulate_tiers(make(chains), tiers_of("4b", "100%"))
    memory, pool = result.tiers[0], result.tiers[1]
    # 4, 5, 6 and, leaf first, 1 are in memory when 1, 2, 3 are asked for again.
    assert result.served.found.tolist() == [[0, 0], [0, 0], [1, 2]]
    assert (memory.served_bytes, pool.served_bytes) == (1_000, 2_000)
    assert result.usable_prefix_hit_ratio == 3 / 10
    moved = {(link.source, link.target, link.why): link.blocks for link in result.links}
    assert moved == {
        ("memory", "engine", "load"): 1,
        ("nvme", "engine", "load"): 2,
        # Promoting 2 and 3 pushes out what is coldest; the save of 7 finds room the same way.
        ("nvme", "memory", "promote"): 2,
        ("engine", "memory", "save"): 7,
        ("memory", "nvme", "write-back"): 7,
    }
    assert memory.written_blocks - memory.evictions == memory.resident_blocks == 4


def test_without_promotion_a_block_from_below_stays_below() -> None:
    chains = [[1, 2], [3, 4], [1, 2], [1, 2]]
    result = simulate_tiers(make(chains), tiers_of("2b", "100%"), promote=False)
    assert result.served.found.tolist() == [[0, 0], [0, 0], [0, 2], [0, 2]]
    promoted = simulate_tiers(make(chains), tiers_of("2b", "100%"))
    assert promoted.served.found.tolist() == [[0, 0], [0, 0], [0, 2], [2, 0]]


def test_a_block_behind_a_gap_is_found_but_not_served() -> None:
    # lru_forward keeps the end of a chain: 2 and 3 without their root.
    result = simulate_tiers(make([[1, 2, 3], [1, 2, 3]]), tiers_of("2b", policy="lru_forward"))
    assert result.served.found.tolist() == [[0], [2]]
    assert result.served.blocks.tolist() == [[0], [0]]
    assert (result.block_hit_ratio, result.usable_prefix_hit_ratio) == (2 / 6, 0.0)


def test_ttft_of_a_request_by_hand() -> None:
    """The second request reads 2 blocks from nvme, 1 from memory, and computes 15 of its 45 tokens."""
    tiers = [
        TierSpec("memory", "lru", {}, "4b", 1e6, 1e6, 0.001),
        TierSpec("nvme", "lru", {}, "100%", 1e4, 1e4, 0.05),
    ]
    compute = ComputeModel(prefill_tokens_per_second=100)
    work = make([[1, 2, 3], [4, 5, 6], [1, 2, 3, 7]], tokens=45)
    result = simulate_tiers(work, tiers, compute)
    assert result.ttft is not None
    fetch = max(0.001 + 1_000 / 1e6, 0.05 + 2_000 / 1e4)
    assert result.ttft.cached.alone_seconds.tolist() == pytest.approx([0.45, 0.45, fetch + 0.15])
    assert result.ttft.recompute.alone_seconds.tolist() == pytest.approx([0.45] * 3)
    assert result.ttft.cached.utilisation == pytest.approx(
        {"memory": 0.002 / 2, "nvme": 0.25 / 2, "gpu": 1.05 / 2}
    )
    assert result.ttft.speedup_alone["p99"] == pytest.approx(1.0, rel=0.01)


def test_attention_makes_late_tokens_dearer() -> None:
    model = ComputeModel(1_000, attention_tokens=500)
    tokens, prefix = np.array([300]), np.array([200])
    each = sum((1 + (position + 0.5) / 500) / 1_000 for position in range(200, 500))
    assert model.seconds(prefix, tokens)[0] == pytest.approx(each)
    assert model.seconds(prefix, tokens) < model.seconds(np.array([700]), tokens)


def test_one_token_is_always_computed() -> None:
    result = simulate_tiers(make([[1, 2], [1, 2]]), tiers_of("100%"), ComputeModel(100))
    assert result.ttft is not None
    alone = result.ttft.cached.alone_seconds
    assert alone[1] == pytest.approx(1 / 100 + 10e-6 + 2_000 / 50e9)


# The queue

SECONDS = st.floats(0, 10, allow_nan=False)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=30))
def test_one_server_against_waiting_times(customers: list[tuple[float, float]]) -> None:
    arrival = np.array(sorted(a for a, _ in customers))
    service = np.array([s for _, s in customers])
    done = fcfs(arrival, service)
    # Lindley: the wait of the next is max(0, wait + service - time between).
    wait = 0.0
    for n in range(len(arrival)):
        assert done[n] == pytest.approx(arrival[n] + wait + service[n])
        if n + 1 < len(arrival):
            wait = max(0.0, wait + service[n] - (arrival[n + 1] - arrival[n]))


def event_loop(arrival: Any, fetch: Any, visits: Any, compute: Any) -> list[float]:
    """Servers with lists of who waits, and one event after the other."""
    tiers = len(fetch[0]) if len(fetch) else 0
    waiting: list[list[int]] = [[] for _ in range(tiers + 1)]
    busy = [False] * (tiers + 1)
    open_reads = [sum(row) for row in visits]
    # At one moment: who is done, then who comes, in the order of the trace.
    events = [(time, 1, request, -1) for request, time in enumerate(arrival)]
    heapq.heapify(events)
    finished = [0.0] * len(arrival)
    while events:
        now, _, request, server = heapq.heappop(events)
        ready = []
        if server < 0:
            for tier in range(tiers):
                if visits[request][tier]:
                    waiting[tier].append(request)
            ready = [request] if not open_reads[request] else []
        elif server < tiers:
            busy[server] = False
            open_reads[request] -= 1
            ready = [request] if not open_reads[request] else []
        else:
            busy[server] = False
            finished[request] = now
        waiting[tiers] += ready
        for each in range(tiers + 1):
            if waiting[each] and not busy[each]:
                busy[each] = True
                head = waiting[each].pop(0)
                service = compute[head] if each == tiers else fetch[head][each]
                heapq.heappush(events, (now + service, 0, head, each))
    return finished


@given(st.data())
def test_the_queue_against_an_event_loop(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 20))
    tiers = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # No two events at one moment, where the order would be anybody's.
    arrival = np.cumsum(rng.exponential(1.0, count))
    fetch, compute = rng.exponential(0.6, (count, tiers)), rng.exponential(0.8, count)
    visits = rng.random((count, tiers)) < 0.6
    expected = event_loop(arrival.tolist(), fetch.tolist(), visits.tolist(), compute.tolist())
    assert first_token_times(arrival, fetch, visits, compute).tolist() == pytest.approx(expected)


def test_a_request_that_needs_no_tier_overtakes() -> None:
    arrival, compute = np.array([0.0, 1.0]), np.array([1.0, 1.0])
    fetch, visits = np.array([[5.0], [0.0]]), np.array([[True], [False]])
    assert first_token_times(arrival, fetch, visits, compute).tolist() == [6.0, 2.0]


def test_an_overload_is_said_and_not_measured() -> None:
    chains = [[n, n + 1_000] for n in range(50)] * 2
    tiers = [TierSpec("memory", "lru", {}, "100%", 1e9, 1e9, 0.0)]
    result = simulate_tiers(make(chains), tiers, ComputeModel(18.0))
    assert result.ttft is not None
    cached, recompute = result.ttft.cached, result.ttft.recompute
    assert recompute.overloaded == ("gpu",) and recompute.utilisation["gpu"] == pytest.approx(
        100 * 20 / 18 / 99
    )
    assert recompute.queued is None and result.ttft.speedup_queued is None
    assert cached.overloaded == () and cached.queued is not None
    slow = [TierSpec("memory", "lru", {}, "100%", 1e3, 1e3, 0.5)]
    assert_overloaded = simulate_tiers(make(chains), slow, ComputeModel(1e6)).ttft
    assert assert_overloaded is not None and assert_overloaded.cached.overloaded == ("memory",)


def test_all_at_once_has_no_utilisation() -> None:
    result = simulate_tiers(make([[1], [1]], times=[3.0, 3.0]), tiers_of("100%"))
    assert result.ttft is not None
    assert result.ttft.recompute.utilisation == {"gpu": None}
    assert result.ttft.recompute.queued is None


def test_no_queue() -> None:
    result = simulate_tiers(make([[1], [1]]), tiers_of("100%"), queue=False)
    assert result.ttft is not None and result.ttft.cached.queued is None
    assert result.ttft.cached.overloaded == ()


def test_percentiles_lie_between_requests() -> None:
    figures = Percentiles.of(np.arange(101.0))
    assert (figures.p50_seconds, figures.p95_seconds, figures.p99_seconds) == (50, 95, 99)
    assert Percentiles.of(np.zeros(0)).mean_seconds == 0


def test_queued_is_never_faster_than_alone(sample: Workload) -> None:
    result = simulate_tiers(sample, tiers_of("300b", "100%"), ComputeModel(200_000))
    assert result.ttft is not None and result.ttft.cached.queued_seconds is not None
    assert np.all(result.ttft.cached.queued_seconds >= result.ttft.cached.alone_seconds - 1e-9)


def test_nothing_cached_is_recomputing() -> None:
    tokens = np.array([30, 50])
    nothing = np.zeros((2, 1))
    both = compare(
        ComputeModel(10), arrival=np.array([0.0, 100.0]), prompt_tokens=tokens,
        cached_tokens=np.zeros(2, np.int64), fetch=nothing, visits=nothing > 0, tiers=["memory"],
        queue=True,
    )  # fmt: skip
    assert both.cached.alone_seconds.tolist() == both.recompute.alone_seconds.tolist() == [3.0, 5.0]
    assert both.speedup_queued == {"mean": 1.0, "p50": 1.0, "p95": 1.0, "p99": 1.0}


# Laws


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("mode", ["back", "through"])
def test_what_moves_adds_up(sample: Workload, policy: str, promote: bool, mode: WriteMode) -> None:
    tiers = tiers_of("250b", "700b", "2000b", policy=policy)
    result = simulate_tiers(sample, tiers, promote=promote, write_mode=mode)
    size = sample.head.block_bytes
    served = result.served
    assert np.array_equal(served.blocks.sum(axis=1), served.prefix_blocks)
    assert np.all(served.blocks <= served.found)
    assert np.array_equal(served.bytes, served.blocks * size)
    assert result.block_hit_ratio == served.found.sum() / result.accesses
    hits = [tier.usable_prefix_hit_ratio for tier in result.tiers]
    assert hits == sorted(hits) and hits[-1] == result.usable_prefix_hit_ratio
    assert sum(tier.served_ratio for tier in result.tiers) == pytest.approx(hits[-1])
    for number, tier in enumerate(result.tiers):
        into = [link for link in result.links if link.target == tier.name]
        out = [link for link in result.links if link.source == tier.name and link.why == "load"]
        assert sum(link.blocks for link in into) == tier.written_blocks
        assert sum(link.bytes for link in into) == tier.written_bytes == tier.written_blocks * size
        assert sum(link.bytes for link in out) == tier.served_bytes == served.bytes[:, number].sum()
        assert tier.resident_blocks <= tier.capacity_blocks
        assert tier.evictions >= 0
    promoted = sum(link.blocks for link in result.links if link.why == "promote")
    from_below = sum(tier.served_blocks for tier in result.tiers[1:]) if promote else 0
    # A policy with an admission door may turn down what is promoted.
    assert promoted == from_below or (policy == "tinylfu_slru" and promoted < from_below)


@pytest.mark.parametrize("sources", ["computed", "whole"])
def test_an_endless_lowest_tier_serves_every_block_that_came_before(
    sample: Workload, sources: Literal["computed", "whole"]
) -> None:
    result = simulate_tiers(sample, tiers_of("250b", "100%"), sources=sources)
    assert (
        result.block_hit_ratio
        == result.usable_prefix_hit_ratio
        == pytest.approx(1 - sample.head.unique / sample.head.accesses)
    )
    assert result.tiers[1].evictions == 0
    assert result.tiers[1].written_blocks == sample.head.unique
    assert result.recompute_tokens_saved == (sample.head.accesses - sample.head.unique) * 512


CHAINS = st.lists(
    st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True), min_size=1, max_size=25
)


@given(CHAINS, st.integers(1, 12), st.integers(1, 30), st.booleans())
def test_small_traces_add_up(chains: list[list[int]], upper: int, lower: int, promote: bool) -> None:
    result = simulate_tiers(make(chains), tiers_of(f"{upper}b", f"{lower}b"), promote=promote)
    assert sum(tier.found_blocks for tier in result.tiers) <= result.accesses - result.unique_blocks
    assert all(tier.resident_blocks <= tier.capacity_blocks for tier in result.tiers)
    assert [a.usable_prefix_hit_ratio <= b.usable_prefix_hit_ratio for a, b in pairwise(result.tiers)] == [
        True
    ]


def test_sizes_that_differ_are_counted_in_bytes() -> None:
    builder = TraceBuilder("sizes", "test")
    for number in range(2):
        builder.add(float(number), [1, 2, 3], sizes=[100, 20, 3])
    result = simulate_tiers(Workload(builder.build(0)), tiers_of("110B", "1000B"))
    assert result.ttft is None and result.recompute_tokens_saved is None
    # Root first in memory, and no room beside it; promoting the others pushes it out.
    assert result.served.bytes.tolist() == [[0, 0], [100, 23]]
    assert [tier.written_bytes for tier in result.tiers] == [100 + 20 + 3, 123]
    assert [tier.evictions for tier in result.tiers] == [1, 0]


def test_the_oracle_bounds_lru(sample: Workload) -> None:
    both = [
        simulate_tiers(sample, tiers_of("300b", "1000b", policy=policy), promote=False, sources="whole")
        for policy in ("lru", "belady")
    ]
    assert both[0].block_hit_ratio < both[1].block_hit_ratio


# Results and errors


def test_a_result_is_json(sample: Workload) -> None:
    done: list[tuple[int, int]] = []
    result = simulate_tiers(sample, tiers_of("10%", "50%"), progress=lambda now, of: done.append((now, of)))
    again = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert again["tiers"][1]["name"] == "nvme" and again["ttft"]["cached"]["alone"]["p99_seconds"] > 0
    assert done[-1] == (sample.head.accesses, sample.head.accesses)


@pytest.mark.parametrize(
    ("tiers", "word"),
    [
        ([], "from 1 to"),
        ([TierSpec("memory"), TierSpec("memory")], "name of its own"),
        ([TierSpec("gpu")], "name of its own"),
        ([TierSpec("memory", "lur")], "lur"),
        ([TierSpec("memory", capacity="many")], "many"),
        (tiers_of("10%", "20%", policy="belady"), "belady needs"),
    ],
)
def test_what_cannot_be_simulated(sample: Workload, tiers: list[TierSpec], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        simulate_tiers(sample, tiers)


def test_figures_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="read_bytes_per_second"):
        TierSpec("memory", read_bytes_per_second=0)
    with pytest.raises(ConfigError, match="latency_seconds"):
        TierSpec("memory", latency_seconds=-1)
    with pytest.raises(ConfigError, match="prefill_tokens_per_second"):
        ComputeModel(0)
    with pytest.raises(ConfigError, match="attention_tokens"):
        ComputeModel(1, -1)
