"""The curve of one pass equals as many simulations, at every capacity."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_kit import open_real, random_tree_chains, trace_of, tree_chains

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.sim import curve as curve_module
from kvstrata.sim.capacity import resolve
from kvstrata.sim.curve import CURVES, lru_curve
from kvstrata.sim.curve_file import check_suffix, spread, write_curve
from kvstrata.sim.replay import Workload, simulate
from open_traces import AGENTIC, CONVERSATION

PNG = b"\x89PNG\r\n"


def assert_equals_simulation(workload: Workload, policy: str, capacities: list[int]) -> None:
    curve = lru_curve(workload, policy)
    for blocks in capacities:
        run = simulate(workload, policy, resolve(f"{blocks}b", workload.footprint))
        simulated = run.block_hit_ratio, run.usable_prefix_hit_ratio, run.request_hit_ratio
        ratios = curve.block_hit_ratio, curve.usable_prefix_hit_ratio, curve.request_hit_ratio
        assert tuple(ratio(blocks) for ratio in ratios) == simulated, blocks


@pytest.mark.parametrize("policy", CURVES)
@given(chains=tree_chains())
def test_trees_at_every_capacity(policy: str, chains: list[list[int]]) -> None:
    workload = Workload(trace_of(chains))
    assert_equals_simulation(workload, policy, list(range(1, workload.head.unique + 2)))


@pytest.mark.parametrize("policy", CURVES)
@given(
    chains=st.lists(st.lists(st.integers(0, 11), max_size=8, unique=True), min_size=1, max_size=40).filter(
        any
    )
)
def test_any_requests_at_every_capacity(policy: str, chains: list[list[int]]) -> None:
    """Blocks in any order and empty requests; most capacities are smaller than some request."""
    workload = Workload(trace_of(chains))
    assert_equals_simulation(workload, policy, list(range(1, workload.head.unique + 2)))


@pytest.mark.parametrize("policy", CURVES)
def test_stamps_are_renumbered(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve_module, "AXIS_PER_BLOCK", 1)
    monkeypatch.setattr(curve_module, "BATCH_ACCESSES", 500)
    chains = random_tree_chains(np.random.default_rng(5), 300, 2_000)
    workload = Workload(trace_of(chains))
    assert workload.head.accesses > 8 * workload.head.unique
    assert_equals_simulation(workload, policy, [1, 2, 3, 5, 8, 13, 34, 89, 150, 233, workload.head.unique])


@pytest.mark.parametrize("policy", CURVES)
@pytest.mark.parametrize("path", [CONVERSATION, AGENTIC], ids=["conversation", "agentic"])
def test_real_traces(path: Path, policy: str) -> None:
    workload = Workload(open_real(path))
    unique = workload.head.unique
    assert_equals_simulation(workload, policy, [1, 7, 40, unique // 100, unique // 20, unique // 3, unique])


def test_forward_takes_a_block_twice_and_leaf_first_says_so() -> None:
    chain = trace_of([[0, 1], [2]])
    twice = dataclasses.replace(chain, ids=np.array([0, 0, 1], np.int32))
    workload = Workload(twice)
    forward = lru_curve(workload, "lru_forward")
    assert forward.block_hits.tolist() == [0, 1, 1, 1]
    with pytest.raises(TraceFormatError, match=r"request 0 .* twice"):
        lru_curve(workload, "lru")


def test_only_lru_and_only_one_size() -> None:
    workload = Workload(trace_of([[0, 1], [0, 2]]))
    with pytest.raises(ConfigError, match="arc"):
        lru_curve(workload, "arc")
    head = dataclasses.replace(workload.head, block_bytes=0)
    uneven = dataclasses.replace(trace_of([[0, 1], [0, 2]]), head=head)
    with pytest.raises(ConfigError, match="--block-bytes"):
        lru_curve(Workload(uneven), "lru")


def test_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    curve = lru_curve(Workload(trace_of(random_tree_chains(rng, 200, 500), block_bytes=4096)))
    for name in ("a.csv", "a.json", "a.png"):
        check_suffix(tmp_path / name)
        write_curve(curve, tmp_path / name)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    points = json.loads((tmp_path / "a.json").read_text())["points"]
    assert [float(row["block_hit_ratio"]) for row in rows] == [one["block_hit_ratio"] for one in points]
    steps = [int(row["capacity_blocks"]) for row in rows]
    ratios = [float(row["usable_prefix_hit_ratio"]) for row in rows]
    for blocks in range(curve.unique_blocks + 1):
        step = int(np.searchsorted(steps, blocks, side="right")) - 1
        assert ratios[step] == curve.usable_prefix_hit_ratio(blocks)
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert spread(curve)[0] == 1 and spread(curve)[-1] == curve.unique_blocks
    with pytest.raises(ConfigError, match=r"\.csv"):
        check_suffix(tmp_path / "a.txt")
