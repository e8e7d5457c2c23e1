"""The replay's figures: by hand, against DESIGN.md, and what leaf first and the oracle promise."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_kit import GIB, MIB, open_real, random_tree_chains, trace_of, tree_chains

from kvstrata.errors import ConfigError
from kvstrata.policies.belady import Belady, Future
from kvstrata.sim.capacity import Footprint, resolve
from kvstrata.sim.replay import SIMULATED, Workload, simulate
from kvstrata.traces.parquet import ParquetTrace, write_parquet
from open_traces import AGENTIC, CONVERSATION


@pytest.fixture(scope="module")
def conversation() -> Workload:
    return Workload(open_real(CONVERSATION, block_bytes=64 * MIB))


@pytest.fixture(scope="module")
def agentic() -> Workload:
    return Workload(open_real(AGENTIC, seed=1, block_tokens=256))


def test_the_figures_by_hand() -> None:
    """Leaf-first LRU with three places. Chains of one tree: 0-1-2, 0-3, and 9 alone.

    0 1 2: three admits. 0 1 2: three hits. 0 3: 0 hits, 3 takes the place of 2. 9: takes 1's. 0 1: 0 hits,
    1 takes 3's place. So 6 admits, 4 of 11 never used again (3, 9, 1, and 2 was used), 3 evictions.
    """
    chains = [[0, 1, 2], [0, 1, 2], [0, 3], [9], [0, 1]]
    workload = Workload(trace_of(chains, block_bytes=10))
    result = simulate(workload, "lru", resolve("3b", workload.footprint))
    assert (result.accesses, result.requests, result.unique_blocks) == (11, 5, 5)
    assert result.block_hit_ratio == 5 / 11
    assert result.usable_prefix_hit_ratio == 5 / 11
    assert result.mean_usable_prefix_hit_ratio == pytest.approx((0 + 1 + 1 / 2 + 0 + 1 / 2) / 5)
    assert result.request_hit_ratio == 1 / 5
    assert result.byte_hit_ratio == 5 / 11
    assert (result.admits, result.evictions) == (6, 3)
    assert (result.populated_bytes, result.hit_bytes) == (60, 50)
    assert result.amplification == 60 / 50
    assert result.wasted_ratio == 3 / 6  # 3, 9 and the second 1
    assert result.recompute_tokens_saved == 5 * 512


def test_sizes_count_in_bytes_where_they_differ() -> None:
    """Two blocks of 6 and 4 bytes in 10; the third, of 8, pushes both out."""
    builder = trace_of([[0], [1], [0], [1], [2], [0]])
    size = np.array([6, 4, 8], dtype=np.int64)
    head = dataclasses.replace(builder.head, block_bytes=0)
    workload = Workload(dataclasses.replace(builder, head=head, size=size))
    assert workload.footprint == Footprint(3, 18, 0)
    result = simulate(workload, "lru", resolve("10B", workload.footprint))
    assert result.block_hit_ratio == 2 / 6
    assert result.byte_hit_ratio == 10 / (6 + 4 + 6 + 4 + 8 + 6)
    assert result.populated_bytes == 6 + 4 + 8 + 6
    assert result.evictions == 3
    assert result.capacity_bytes == 10


@pytest.mark.parametrize(("gib", "evictions"), [(64, 262_433), (1024, 182_063), (4096, 107_169)], ids=str)
def test_the_published_evictions(gib: int, evictions: int) -> None:
    """DESIGN.md section 6: LRU touched forward on blocks of 64 MiB, full ones as engines cache them."""
    workload = Workload(open_real(CONVERSATION, block_bytes=64 * MIB, full_blocks=True))
    result = simulate(workload, "lru_forward", resolve(f"{gib}GiB", workload.footprint))
    assert result.capacity_blocks == gib * GIB // (64 * MIB)
    assert result.evictions == evictions


PUBLISHED = {
    "belady": [0.087, 0.246, 0.366, 0.366, 0.366, 0.366],
    "lru_forward": [0.042, 0.052, 0.195, 0.278, 0.345, 0.360],
    "arc": [0.045, 0.065, 0.210, 0.284, 0.320, 0.360],
}
FRACTIONS = ["0.1%", "1%", "5%", "10%", "20%", "40%"]


@pytest.mark.parametrize("policy", PUBLISHED)
def test_the_published_hit_ratios_of_conversation(conversation: Workload, policy: str) -> None:
    """DESIGN.md section 6 gives three places."""
    for text, expected in zip(FRACTIONS, PUBLISHED[policy], strict=True):
        result = simulate(conversation, policy, resolve(text, conversation.footprint))
        assert result.block_hit_ratio == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("policy", ["lru", "belady"])
@pytest.mark.parametrize("text", FRACTIONS)
def test_no_child_is_stranded_on_real_traces(
    conversation: Workload, agentic: Workload, policy: str, text: str
) -> None:
    for workload in (conversation, agentic):
        result = simulate(workload, policy, resolve(text, workload.footprint))
        assert result.usable_prefix_hit_ratio == result.block_hit_ratio > 0


@given(chains=tree_chains(), capacity=st.integers(1, 30), policy=st.sampled_from(["lru", "belady"]))
def test_no_child_is_stranded_in_any_tree(chains: list[list[int]], capacity: int, policy: str) -> None:
    workload = Workload(trace_of(chains))
    result = simulate(workload, policy, resolve(f"{capacity}b", workload.footprint))
    assert result.usable_prefix_hit_ratio == result.block_hit_ratio


def most_hits(accesses: list[int], capacity: int) -> int:
    """The most hits that any eviction with forced entry can have, by trying all of them."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for block in accesses:
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            if block in held:
                choices = [held]
            elif len(held) < capacity:
                choices = [held | {block}]
            else:
                choices = [held - {victim} | {block} for victim in held]
            for choice in choices:
                after[choice] = max(after.get(choice, 0), hits + (block in held))
        states = after
    return max(states.values())


@given(
    chains=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=8
    ),
    capacity=st.integers(1, 4),
)
def test_forced_belady_is_the_optimum_of_forced_entry(chains: list[list[int]], capacity: int) -> None:
    trace = trace_of(chains)
    workload = Workload(trace)
    result = simulate(workload, "belady", resolve(f"{capacity}b", workload.footprint), {"forced": 1})
    assert round(result.block_hit_ratio * result.accesses) == most_hits(trace.ids.tolist(), capacity)


@pytest.mark.parametrize("seed", range(4))
def test_nobody_beats_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    workload = Workload(trace_of(random_tree_chains(rng, 300, 600)))
    for text in ("5b", "20b", "80b"):
        capacity = resolve(text, workload.footprint)
        oracle = simulate(workload, "belady", capacity).block_hit_ratio
        for policy in SIMULATED:
            assert simulate(workload, policy, capacity).block_hit_ratio <= oracle


def test_batches_of_any_size_give_the_same() -> None:
    """The oracle keeps its place, and the counts add up."""
    trace = trace_of(random_tree_chains(np.random.default_rng(3), 200, 400))
    sizes = np.ones(trace.head.unique, dtype=np.int64)
    future = Future(trace.ids, trace.depth)
    whole = Belady(future, 40).replay(trace.ids, trace.starts, sizes)
    parts = Belady(future, 40)
    outcomes = [parts.replay(b.ids, b.starts, sizes) for b in trace.batches(max_accesses=50)]
    assert np.array_equal(np.concatenate(outcomes), whole)
    assert parts.used == parts.resident_blocks == 40


@pytest.mark.parametrize("policy", ["lru", "arc", "belady"])
def test_a_streamed_trace_gives_the_figures_of_one_in_memory(policy: str, tmp_path: Path) -> None:
    trace = trace_of(random_tree_chains(np.random.default_rng(5), 400, 900))
    write_parquet(trace, tmp_path / "trace.parquet")
    streamed = Workload(ParquetTrace(tmp_path / "trace.parquet"))
    whole = Workload(trace)
    for text in ("10b", "25%"):
        results = [simulate(w, policy, resolve(text, w.footprint)) for w in (whole, streamed)]
        assert results[0] == dataclasses.replace(results[1], seconds=results[0].seconds)


def test_capacities_as_people_write_them() -> None:
    footprint = Footprint(1_000, 64_000, 64)
    assert [resolve(t, footprint).blocks for t in ("1%", "0.05%", "7b", "70 blocks", "6400B", "10B")] == [
        10, 1, 7, 70, 100, 1,
    ]  # fmt: skip
    assert resolve("12.5%", footprint).fraction == 0.125
    assert resolve("1KiB", footprint).units == 16
    for bad in ("", "x", "10", "5 %%", "-1%", "0%", "many"):
        with pytest.raises(ConfigError, match="capacity"):
            resolve(bad, footprint)


def test_an_unknown_policy_and_an_unknown_parameter() -> None:
    workload = Workload(trace_of([[0, 1]]))
    capacity = resolve("1b", workload.footprint)
    with pytest.raises(ConfigError, match=r"policy 'lur' is not known; known: .*lru"):
        simulate(workload, "lur", capacity)
    for policy, parameter in itertools.product(("lru", "belady"), ("colour",)):
        with pytest.raises(ConfigError, match=f"policy {policy}: no parameter 'colour'"):
            simulate(workload, policy, capacity, {parameter: 1})
